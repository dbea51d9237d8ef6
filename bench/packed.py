"""Packed rows beside padded ones: a policy's forward and backward, by attention. Writes OUT/packed.jsonl.

    python -m bench.packed            # sizes of the device
    python -m bench.packed tiny       # does it run at all?

A Qwen3 with random weights and the trainer's policy on it: its loss for responses of three quarters of each
sequence. On a GPU one of Qwen3-0.6B's shape in bfloat16, layers computed again in the backward, in
milliseconds (the median of five); on a CPU a small one in float32, in CPU-seconds (the least of three).
Before it is timed, each gradient is compared with that of the padded batch.
"""

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.import_utils import is_flash_attn_2_available

from bench import measure, model
from training.attention import FLASH, PACKED
from training.batch import Batch, Rollout, make_batch
from training.policy import Objective, Policy, Tokens

SMALL = model.Shape("qwen3", 256, 1024, 4, 8, 4, 32, length=128, recompute=False)
DEMO = model.Shape("qwen3", 96, 256, 4, 4, 4, 24, length=12, recompute=False)
# shape, words, sequences, and their least and greatest length
CASES: dict[str, list[tuple[model.Shape, int, int, int, int]]] = {
    "cuda": [
        (model.SHAPES["Qwen3-0.6B"], 151_936, 4, 4096, 4096),
        (model.SHAPES["Qwen3-0.6B"], 151_936, 8, 256, 4096),
        (model.SHAPES["Qwen3-0.6B"], 151_936, 64, 64, 512),
    ],
    "cpu": [
        (SMALL, 1000, 32, 128, 128),
        (SMALL, 1000, 32, 32, 224),
        (SMALL, 1000, 8, 256, 768),
        (DEMO, 40, 64, 12, 12),
        (DEMO, 40, 64, 8, 16),
    ],
    "tiny": [(model.SHAPES["tiny"], 40, 4, 3, 9)],
}
# attention, and whether sequences are packed; the first is what the others are compared with
KINDS = [("sdpa", False), (PACKED, True), ("sdpa", True)]
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of a gradient's distance from the padded one, relative


def main(size: str, out: Path) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kinds = KINDS + ([(FLASH, True)] if device == "cuda" and is_flash_attn_2_available() else [])
    for shape, words, count, least, most in CASES[size if size == "tiny" else device]:
        rng = random.Random(0)
        lengths = [rng.randint(least, most) for _ in range(count)]
        cut = [length // 4 or 1 for length in lengths]
        rows = [[rng.randrange(words) for _ in range(length)] for length in lengths]
        rollouts = [Rollout(row[:k], row[k:], False) for row, k in zip(rows, cut)]
        torch.manual_seed(0)
        # master weights in float32, as the trainer has them
        built = model.build(shape, words, torch.float32, device)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        policy = Policy(built, temperature=1.0, dtype=str(dtype).removeprefix("torch."), value_head=False)
        expected = None
        for attention, packing in kinds:
            built.set_attn_implementation(attention)
            batch = make_batch(rollouts, packing=packing, pad=0, device=torch.device(device))
            row = {"sequences": count, "lengths": [least, most], "width": shape.hidden}
            row |= {"attention": attention, "packed": packing, "tokens": sum(lengths)}
            try:
                gradient = step(policy, batch)
                expected = gradient if expected is None else expected
                error = ((gradient - expected).norm() / expected.norm()).item()
                row |= {"error": error} | timed(lambda: step(policy, batch), device)  # noqa: B023
                if not error < LIMITS[dtype]:
                    raise ValueError(f"the gradient of {row} is not that of padded sequences")
            except torch.OutOfMemoryError:
                row["error"] = "out of memory"
            row["where"] = measure.where(device)
            out.mkdir(parents=True, exist_ok=True)
            with (out / "packed.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            print({name: value for name, value in row.items() if name != "where"}, flush=True)


def step(policy: Policy, batch: Batch) -> Tensor:
    """The gradient of a loss, flat."""
    n, device = len(batch.target), policy.device
    ones, signs = torch.ones(n, device=device), torch.ones(n, device=device)
    signs[::2] = -1.0
    tokens = Tokens(-4 * ones, signs, ones, 0.01 * ones, None, None, None, None)
    loss, *_ = policy(batch, tokens, Objective((0.2, 0.2), None, 0.0, 0.5, 0.2), float(n))
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    policy.zero_grad()
    return gradient


def timed(call: Callable[[], Any], device: str) -> dict[str, float]:
    if device == "cpu":
        spent = []
        for _ in range(3):
            began = time.process_time()
            call()
            spent.append(time.process_time() - began)
        return {"cpu_seconds": min(spent)}
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return {"ms": statistics.median(times), "peak_mib": torch.cuda.max_memory_allocated() / 2**20}


if __name__ == "__main__":
    # a machine with a GPU has no tyro
    parser = argparse.ArgumentParser(description="Packed rows beside padded ones")
    parser.add_argument("size", nargs="?", choices=("auto", "tiny"), default="auto")
    main(parser.parse_args().size, Path(os.environ.get("OUT", "runs")))
