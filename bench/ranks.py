"""A vocabulary split between GPUs: right beside the whole one, and how long it takes. Writes OUT/ranks.json.

    torchrun --standalone --nproc-per-node 4 -m bench.ranks

One process a GPU (NCCL), or on a CPU (gloo) with a tiny shape. Times are of forward and backward of
linear_ppo_loss in bfloat16, the slowest rank's median of ten; beside them what `plan` predicts, which knows
one H100 and its NVLink.
"""

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aer_fast import linear_ppo_loss, plan
from bench.measure import commit


def main() -> None:
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    try:
        errors = right(device)
        shape = (8192, 151_936, 4096) if gpu else (64, 1000, 16)
        row = {"ranks": size, "shape": shape, "errors": errors, "commit": commit()}
        row |= {"device": torch.cuda.get_device_name() if gpu else "cpu", "torch": torch.__version__}
        row["ms"] = timed(device, *shape)
        made = plan(*shape, ranks=size, device=device.type)
        row |= {"predicted_ms": 1e3 * made.seconds, "received_mib": made.traffic / 2**20}
        if rank == 0:
            out = Path(os.environ.get("OUT", "runs"))
            out.mkdir(parents=True, exist_ok=True)
            (out / "ranks.json").write_text(json.dumps(row) + "\n")
            print(json.dumps(row, indent=1))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def problem(device: torch.device, N: int, V: int, D: int) -> dict[str, Any]:
    """The same on all ranks, whatever the device draws."""
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(device, torch.bfloat16)

    hidden, weight = normal(N, D), normal(V, D) / D**0.5
    target = torch.randint(V, (N,), generator=generator).to(device)
    advantage = torch.randn(N, generator=generator).to(device)
    given = {"target": target, "advantage": advantage, "old_logprob": None, "entropy_coef": 0.01}
    return {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_()} | given


def slice_of(inputs: dict[str, Any]) -> dict[str, Any]:
    part = inputs["weight"].detach().tensor_split(dist.get_world_size())[dist.get_rank()]
    return inputs | {"weight": part.clone().requires_grad_(), "group": dist.group.WORLD}


def right(device: torch.device) -> dict[str, float]:
    """Largest differences from the whole vocabulary, relative to its largest entry; over all ranks."""
    whole = problem(device, 256, 1003, 64)
    mine = slice_of(whole)
    results = []
    for inputs in (whole, mine):
        inputs["hidden"].grad = None
        out = linear_ppo_loss(**inputs, chunk_tokens=100)
        out.loss.backward()
        results.append((out.logprob, out.entropy, inputs["hidden"].grad.clone(), inputs["weight"].grad))
    expected = list(results[0])
    expected[-1] = expected[-1].tensor_split(dist.get_world_size())[dist.get_rank()]
    errors = {}
    for name, a, b in zip(("logprob", "entropy", "grad_hidden", "grad_weight"), results[1], expected):
        error = (a.float() - b.float()).abs().amax() / b.float().abs().amax()
        dist.all_reduce(error, dist.ReduceOp.MAX)
        errors[name] = error.item()
    assert errors["logprob"] < 1e-5, errors
    assert errors["entropy"] < 1e-5, errors
    assert max(errors.values()) < 0.02, errors  # bfloat16, rounded in other places
    return errors


def timed(device: torch.device, N: int, V: int, D: int) -> float:
    """Milliseconds of a call with its backward: median of ten, of the slowest rank."""
    inputs = slice_of(problem(device, N, V, D))

    def step() -> None:
        inputs["hidden"].grad = inputs["weight"].grad = None
        linear_ppo_loss(**inputs).loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        step()
    found = []
    for _ in range(10):
        dist.barrier()
        start = time.perf_counter()
        step()
        found.append(1e3 * (time.perf_counter() - start))
    slowest = torch.tensor(statistics.median(found), device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


if __name__ == "__main__":
    main()
