"""A teacher beside the student, both with heads that are split between ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import aer_fast
from aer_fast import plan
from tests.helpers.heads import (
    assert_matches_float64,
    linear_distill_loss,
    linear_ppo_loss,
    per_token,
    run,
    take_loop,
    with_teacher,
)
from tests.helpers.oracle import assert_within_budget
from tests.helpers.ranks import SLICES, D, N, V, counted, equal_on_all_ranks, on_ranks, raises, split

pytestmark = pytest.mark.host
KINDS = ("reverse_kl", "forward_kl", "jsd")
CPU = torch.device("cpu")


def functions_match(impl: str) -> None:
    size, whole = dist.get_world_size(), impl == "torch"
    for k, ends in enumerate(SLICES[size] if whole else SLICES[size][:2]):
        for divergence in (*KINDS, "exact KL") if k == 0 else ("jsd", "exact KL"):
            for loop in ("planned", "chunks") if (k, size) == (0, 2) and whole else ("chunks",):
                torch.manual_seed(k)
                inputs = with_teacher(N, V, D, CPU, torch.float32 if whole else torch.bfloat16)
                inputs |= per_token(N, CPU)
                inputs["target"][3] = -100
                if divergence == "exact KL":
                    function = linear_ppo_loss
                    del inputs["coef"], inputs["ref_temperature"], inputs["ref_softcap"]
                    inputs |= {
                        "old_logprob": -4 + torch.randn(N),
                        "advantage": torch.randn(N),
                        "kl_coef": 0.2,
                    }
                    inputs["ref_logprob"] = torch.full((N,), -4.0)
                else:
                    function, inputs["divergence"], inputs["jsd_beta"] = linear_distill_loss, divergence, 0.3
                ours = split(function, ends)
                assert_matches_float64(ours, inputs, impl, planner=take_loop(loop))
                result, grads = run(ours, inputs, impl=impl)
                tensors = [x for x in result if isinstance(x, Tensor)]
                equal_on_all_ranks(*tensors, *result.metrics.values(), grads["hidden"])


@pytest.mark.parametrize(("size", "impl"), [(2, "torch"), (3, "torch"), (2, "triton")])
def test_a_teacher_beside_matches_the_whole_vocabulary(size: int, impl: str, tmp_path: Path) -> None:
    """Within the error budget against float64; losses and statistics are the same bits on all ranks."""
    on_ranks(size, functions_match, tmp_path, impl)


def logits_match(impl: str) -> None:
    size, whole = dist.get_world_size(), impl == "torch"
    for k, ends in enumerate(SLICES[size] if whole else SLICES[size][:2]):
        for divergence in KINDS:
            for dtype in (torch.float32, torch.bfloat16) if whole and k == 0 else (torch.float32,):
                torch.manual_seed(k)
                logits, ref_logits = (3 * torch.randn(2, N, V)).to(dtype)
                ref_logits[1] = logits[1] + 1e-3 * torch.randn(V)
                logits[:, V - 1] = ref_logits[:, V - 1] = -torch.inf
                given = per_token(N, CPU) | {"target": torch.randint(V - 1, (N,)), "divergence": divergence}
                given["target"][3] = -100
                compare_logits(logits, ref_logits, ends, impl, inplace=k == 0, **given)


def compare_logits(
    logits: Tensor, ref_logits: Tensor, ends: list[int], impl: str, *, inplace: bool, **given: Any
) -> None:
    found = []
    for impl_, dtype in ((impl, logits.dtype), ("reference", logits.dtype), ("reference", torch.float64)):
        leaf = logits.to(dtype, copy=True).requires_grad_()
        pair = {"logits": leaf * 1, "ref_logits": ref_logits.to(dtype), "jsd_beta": 0.3, "impl": impl_}
        call = split(aer_fast.distill_loss, ends)
        result = call(**given, **pair, **({"inplace": inplace} if impl_ == impl else {}))
        result.loss.backward()
        found.append(([*result[:5], *result.metrics.values()], leaf.grad))
    (ours, grad), (eager, eager_grad), (exact, exact_grad) = found
    for a, e, x in zip(ours, eager, exact):
        assert_within_budget(a.detach(), e.detach(), x.detach(), terms=V, input_scale=40.0)
    equal_on_all_ranks(*ours)
    assert grad is not None
    assert eager_grad is not None
    assert exact_grad is not None
    assert_within_budget(grad, eager_grad, exact_grad, terms=V, input_scale=40.0)


@pytest.mark.parametrize(("size", "impl"), [(2, "torch"), (3, "torch"), (2, "triton")])
def test_logits_of_both_match_the_whole_vocabulary(size: int, impl: str, tmp_path: Path) -> None:
    on_ranks(size, logits_match, tmp_path, impl)


def sure_of_different_tokens(impl: str) -> None:
    """The gradient of a p near 1 is made of the others', most of which another rank has."""
    rank, logits, ref_logits = dist.get_rank(), torch.zeros(1, V), torch.zeros(1, V)
    logits[0, 3] = ref_logits[0, V - 2] = 14.0
    start, stop = (0, 7) if rank == 0 else (7, V)
    for divergence in ("reverse_kl", "jsd"):
        whole = logits.double().requires_grad_()
        aer_fast.distill_loss(
            whole, ref_logits.double(), divergence=divergence, impl="reference"
        ).loss.backward()
        assert whole.grad is not None
        mine = logits[:, start:stop].clone().requires_grad_()
        aer_fast.distill_loss(
            mine,
            ref_logits[:, start:stop],
            divergence=divergence,
            impl=impl,
            group=dist.group.WORLD,
        ).loss.backward()
        assert mine.grad is not None
        error = (mine.grad.double() - whole.grad[:, start:stop]).abs().amax()
        assert error < 1e-5 * whole.grad.abs().amax()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_ranks_that_are_sure_of_different_tokens(impl: str, tmp_path: Path) -> None:
    on_ranks(2, sure_of_different_tokens, tmp_path, impl)


def columns_of_two_sizes() -> None:
    """Of a padded teacher; and what does not fit is told to all."""
    group, rank = dist.group.WORLD, dist.get_rank()
    logits, ref_logits = torch.randn(N, V), torch.randn(N, V + 4)
    target = torch.randint(V, (N,))
    target[2] = V + 1  # which the teacher alone has
    whole = aer_fast.distill_loss(logits, ref_logits, target)
    start, stop = (0, 30) if rank == 0 else (30, V)
    leaf = logits[:, start:stop].clone().requires_grad_()
    mine: dict[str, Any] = {
        "logits": leaf,
        "ref_logits": ref_logits[:, start : stop + 4 * rank],
        "group": group,
    }
    with counted() as found:
        out = aer_fast.distill_loss(**mine, target=target)
    assert [kind for kind, _ in found.calls] == ["gather"] * 4
    assert [size for _, size in found.calls[1:3]] == [4 * (8 * N + 1), 4 * (5 * N + 1)]
    for a, b in zip(out[:5], whole[:5]):
        torch.testing.assert_close(a, b)
    assert whole.logprob is not None
    assert whole.logprob[2] == -torch.inf
    for vocab_size in (None, V - 3):  # of which padding is left out
        grads: list[Any] = []
        for x, y, ranks in ((logits, ref_logits, None), (leaf.detach(), mine["ref_logits"], group)):
            own = x.clone().requires_grad_()
            aer_fast.distill_loss(own, y, group=ranks, vocab_size=vocab_size).loss.backward()
            grads.append(own.grad)
        torch.testing.assert_close(grads[1], grads[0][:, start:stop])

    def loss(**changes: Any) -> Any:
        return lambda: aer_fast.distill_loss(**mine | changes)

    other = ref_logits[:, :25] if rank == 0 else ref_logits[:, 25:]
    raises(ValueError, "ref_logits's slices must begin at the same words", loss(ref_logits=other))
    raises(ValueError, "ref_logits must have the leading shape", loss(ref_logits=ref_logits[1 - rank :]))
    raises(ValueError, "divergence, jsd_beta", loss(divergence=KINDS[rank]))
    raises(ValueError, "target must be the same", loss(target=None if rank else target))
    raises(ValueError, "inplace", loss(inplace=1 if rank else False))
    raises(ValueError, "takes no group", loss(impl="reference"))


def test_columns_of_two_sizes(tmp_path: Path) -> None:
    on_ranks(2, columns_of_two_sizes, tmp_path)


def faults() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    group, rank = dist.group.WORLD, dist.get_rank()
    inputs = with_teacher(N, V, D, CPU, torch.float32, V + 4)
    del inputs["bias"], inputs["ref_bias"]
    whole, expected = run(aer_fast.linear_distill_loss, inputs)
    start, stop = (0, 30) if rank == 0 else (30, V)
    mine = inputs | {"weight": inputs["weight"][start:stop], "group": group}
    mine["ref_weight"] = inputs["ref_weight"][start : stop + 4 * rank]
    out, grads = run(aer_fast.linear_distill_loss, mine)  # the teacher's is padded
    torch.testing.assert_close(out.divergence, whole.divergence)
    torch.testing.assert_close(grads["hidden"], expected["hidden"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grads["weight"], expected["weight"][start:stop], rtol=1e-4, atol=1e-6)
    target = inputs["target"].clone()
    target[2] = V + 1  # which the teacher alone has
    out, _ = run(aer_fast.linear_distill_loss, mine | {"target": target})
    assert out.logprob[2] == -torch.inf
    assert out.ref_logprob[2] == -torch.inf

    def loss(**changes: Any) -> Any:
        return lambda: aer_fast.linear_distill_loss(**mine | changes)

    def policy(**changes: Any) -> Any:
        given = {"old_logprob": None, "advantage": 1.0, "kl_coef": 0.1} | changes
        return lambda: aer_fast.linear_ppo_loss(**mine | given)

    other = inputs["ref_weight"][:25] if rank == 0 else inputs["ref_weight"][25:]
    for call in (loss(ref_weight=other), policy(ref_weight=other)):
        raises(ValueError, "ref_weight's slices must begin at the same words", call)
    few = inputs["ref_weight"][start : stop - 3 * rank]
    raises(ValueError, "ref_weight must have the", policy(ref_weight=few))
    ref_hidden = inputs["ref_hidden"] + 1e-6 * rank
    for call in (loss(ref_hidden=ref_hidden), policy(ref_hidden=ref_hidden)):
        raises(ValueError, "ref_hidden must be the same", call)
    raises(ValueError, "target must be the same", loss(target=None if rank else inputs["target"]))
    raises(ValueError, "divergence, jsd_beta", loss(divergence=KINDS[rank]))
    raises(ValueError, "coef", loss(coef=1.0 + rank))
    raises(ValueError, "kl_coef", policy(kl_coef=0.1 + rank))
    raises(ValueError, "target must be in", loss(target=target + 3))
    raises(ValueError, "ref_softcap must be positive", loss(ref_softcap=-1.0 if rank else None))
    raises(ValueError, "takes no group", loss(impl="reference"))

    mesh = init_device_mesh("cpu", (2,))
    whole, expected = run(aer_fast.linear_distill_loss, inputs | {"ref_weight": inputs["ref_weight"][:V]})
    placed = {"weight": distribute_tensor(inputs["weight"], mesh, [Shard(0)])}
    placed["ref_weight"] = distribute_tensor(inputs["ref_weight"][:V], mesh, [Shard(0)])
    out, grads = run(aer_fast.linear_distill_loss, inputs | placed)
    torch.testing.assert_close(out.divergence, whole.divergence)
    full: Any = grads["weight"]
    torch.testing.assert_close(full.full_tensor(), expected["weight"], rtol=1e-4, atol=1e-6)
    copies = distribute_tensor(inputs["ref_weight"], mesh, [Replicate()])
    call = lambda: aer_fast.linear_distill_loss(**inputs | placed | {"ref_weight": copies})  # noqa: E731
    raises(ValueError, "ref_weight must be split between the ranks as weight is", call)


def test_slices_that_do_not_fit_and_other_faults(tmp_path: Path) -> None:
    on_ranks(2, faults, tmp_path)


def traffic() -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    inputs = with_teacher(N, V, D, CPU, torch.float32)
    del inputs["bias"], inputs["ref_bias"]
    for name in ("weight", "ref_weight"):
        inputs[name] = inputs[name][V // 2 * rank : V // 2 * (rank + 1)]
    with counted() as found:
        run(aer_fast.linear_distill_loss, inputs | {"group": dist.group.WORLD})
    assert [kind for kind, _ in found.calls] == ["gather", "gather", "gather", "sum", "gather"]
    assert [size for _, size in found.calls[1:3]] == [
        4 * (8 * N + 1) * (size - 1),
        4 * (5 * N + 1) * (size - 1),
    ]
    made = plan(N, V, D, ranks=2, ref_D=D + 5, dtype=torch.float32, device="cpu")
    assert made.traffic == 4 * 13 * N + 4 * N * D


def test_two_exchanges_of_a_few_numbers_a_token(tmp_path: Path) -> None:
    on_ranks(2, traffic, tmp_path)
