"""Ranks that hold slices of a vocabulary, where there is nothing, no room, or not what is expected."""

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import aer_fast
from aer_fast import _ranks, plan
from tests.helpers.heads import (
    linear_ppo_loss,
    linear_token_loss,
    linear_token_stats,
    peak_memory,
    run,
    take_loop,
)
from tests.helpers.ranks import on_ranks, raises

pytestmark = pytest.mark.host
N, V, D = 23, 40, 12


def negative(logprob: Tensor, entropy: Tensor) -> Tensor:
    return -logprob - 0.1 * entropy


def nothing() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nobody writes to is full of NaN
    group, rank = dist.group.WORLD, dist.get_rank()
    torch.manual_seed(0)
    inputs: dict[str, Any] = {"hidden": torch.randn(N, D), "weight": torch.randn(V, D)}
    inputs["target"] = torch.randint(V, (N,))
    mine = {"weight": inputs["weight"][: V * (1 - rank)], "group": group, "planner": take_loop("vocabulary")}
    for function, options in (
        (linear_ppo_loss, {"old_logprob": None, "advantage": torch.randn(N)}),
        (linear_token_loss, {"objective": negative}),
        (linear_token_stats, {}),
    ):
        whole, expected = run(function, inputs | options)
        del whole
        for reduce_hidden in (True, False):
            out, grads = run(function, inputs | options | mine, reduce_hidden=reduce_hidden)
            del out
            share = 1.0 if reduce_hidden or rank == 0 else 0.0
            torch.testing.assert_close(grads["hidden"], share * expected["hidden"], rtol=1e-4, atol=1e-6)

    hidden, weight = inputs["hidden"].requires_grad_(), torch.randn(V, D, requires_grad=True)
    forced: Any = {"group": group, "planner": take_loop("vocabulary")}
    for target, upstream in ((torch.full((N,), -100), 1.0), (inputs["target"], 0.0)):
        stats = linear_token_stats(hidden, weight, target, **forced)
        for grad in torch.autograd.grad((upstream * stats.logprob).sum(), (hidden, weight)):
            assert (grad == 0).all()


def test_slices_and_batches_with_nothing_in_them(tmp_path: Path) -> None:
    on_ranks(2, nothing, tmp_path)


class Silent(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def no_room() -> None:
    group, rank = dist.group.WORLD, dist.get_rank()
    torch.manual_seed(0)
    hidden, target = torch.randn(N, D, requires_grad=True), torch.randint(V, (N,))
    weight, logits = torch.randn(V, D, requires_grad=True), torch.randn(N, V)
    stats = partial(aer_fast.linear_token_stats, hidden, weight, target, group=group)

    def full(after: int) -> Any:
        """On rank 1, no memory for one message, after so many others."""
        original, made = torch.empty, [0]

        def empty(*args: Any, **options: Any) -> Tensor:
            made[0] += 1
            if rank == 1 and made[0] == after + 1:
                raise MemoryError("no room")
            return original(*args, **options)

        messages = type("messages", (), {**vars(torch), "empty": staticmethod(empty)})
        return patch.object(_ranks, "torch", messages)

    for after in (0, 1, 2):
        with full(after):
            raises(MemoryError if rank == 1 else RuntimeError, "no room", stats)
        assert stats().logprob.isfinite().all()

    def silent(logprob: Tensor, entropy: Tensor) -> Tensor:
        if rank == 1:
            raise Silent
        return -logprob

    loss = partial(aer_fast.linear_token_loss, hidden, weight, target, silent, group=group)
    if rank == 0:
        raises(RuntimeError, "rank 1 of the group has raised Silent", loss)
    else:
        with pytest.raises(Silent):  # of which nobody may ask the words
            loss()
        dist.barrier()

    others = (
        (aer_fast.token_stats, aer_fast.ppo_loss, (logits, target), (None, 1.0)),
        (aer_fast.linear_token_stats, aer_fast.linear_ppo_loss, (hidden, weight, target), (None, 1.0)),
        (aer_fast.linear_token_stats, aer_fast.linear_token_loss, (hidden, weight, target), (negative,)),
    )
    for one, other, arguments, more in others:
        call = partial(one, *arguments) if rank == 0 else partial(other, *arguments, *more)
        raises(ValueError, "the function that is called", partial(call, group=group))

    # what ends beyond int64 is as good as no limit
    assert torch.equal(stats(chunk_tokens=2**70, memory_budget=2**80).logprob, stats().logprob)
    raises(ValueError, "of this rank's slice", partial(stats, bias=torch.zeros(2 * V)))


def test_faults_in_what_is_sent(tmp_path: Path) -> None:
    on_ranks(2, no_room, tmp_path)


def recomputed() -> None:
    group = dist.group.WORLD
    torch.manual_seed(0)
    logits, target = torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))

    def loss(x: Tensor) -> Tensor:
        return aer_fast.ppo_loss(2 * x, target, None, 1.0, entropy_coef=0.1, group=group).loss

    (expected,) = torch.autograd.grad(loss(logits), logits)
    with patch.object(dist, "all_gather_object", side_effect=AssertionError("this is no fault")):
        kept: Any = checkpoint(loss, logits, use_reentrant=False)
        (grad,) = torch.autograd.grad(kept, logits)
    torch.testing.assert_close(grad, expected)
    dist.barrier()


def test_a_recomputation_that_ends_early_is_no_fault(tmp_path: Path) -> None:
    on_ranks(2, recomputed, tmp_path)


def dtensors() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    torch.manual_seed(0)
    hidden, target, weight = torch.randn(N, D), torch.randint(V, (N,)), torch.randn(V, D)
    whole = distribute_tensor(weight, mesh, [Replicate()])
    bias = distribute_tensor(torch.zeros(V), mesh, [Shard(0)])
    mine = hidden + rank
    calls = (
        partial(aer_fast.linear_token_stats, mine, whole, target),
        partial(aer_fast.linear_ppo_loss, mine, whole, target, None, 1.0),
        partial(aer_fast.linear_token_loss, mine, whole, target, negative),
    )
    for call in calls:
        raises(ValueError, r"must be the same on all ranks.*full_tensor\(\)", call)
    raises(ValueError, "target must be in", partial(aer_fast.linear_token_stats, hidden, whole, target + V))
    raises(ValueError, "bias must be split as", partial(calls[0], bias=bias))
    logits = distribute_tensor(torch.randn(N, V), mesh, [Replicate()])
    raises(ValueError, r"logits must be a plain tensor.*logits.full_tensor\(\)", partial(logits_of, logits))
    advantage = distribute_tensor(torch.randn(N), mesh, [Replicate()])
    call = partial(aer_fast.ppo_loss, torch.randn(N, V), target, None, advantage)
    raises(ValueError, "advantage must be a plain tensor", call)


def logits_of(logits: Tensor) -> None:
    aer_fast.token_stats(logits, torch.zeros(N, dtype=torch.long))


def test_dtensors_that_are_not_what_they_seem(tmp_path: Path) -> None:
    """A whole weight whose ranks have other tokens: its gradients would not be whole."""
    on_ranks(2, dtensors, tmp_path)


def memory() -> None:
    n, words, width = 4096, 1000, 512
    weight, target = torch.randn(words, width), torch.randint(words, (n,))
    for hidden in (torch.randn(n, width), torch.randn(2, n // 2 + 1, width)[:, :-1]):
        made: list[Any] = []

        def spying(*sizes: Any, made: list[Any] = made, **options: Any) -> Any:
            made.append(plan(*sizes, **options))
            return made[-1]

        call = partial(
            linear_token_stats,
            *(hidden, weight, target.view(hidden.shape[:-1])),
            group=dist.group.WORLD,
            memory_budget=4 << 20,
            planner=spying,
        )
        with torch.no_grad():
            peak = peak_memory(call)
        assert peak <= 1.1 * max(x.memory for x in made) + (2 << 20)
        assert peak < 8 << 20


def test_what_is_compared_takes_little_memory(tmp_path: Path) -> None:
    on_ranks(2, memory, tmp_path)


def fused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    from aer_fast.integrations.transformers import fuse_lm_head, next_token_target
    from tests.helpers.models import build

    mesh, ids = init_device_mesh("cpu", (2,)), torch.randint(3, 60, (2, 6))
    named = {"target": next_token_target(ids), "advantage": torch.ones(2, 1), "entropy_coef": 0.1}
    torch.manual_seed(1)
    alone = build()
    fuse_lm_head(alone)
    expected = alone(ids, **named).loss
    expected.backward()
    for layout, local in (
        (None, True),
        (Replicate(), True),
        (Shard(-1), False),
        (Replicate(), False),
    ):
        torch.manual_seed(1)
        model = build()
        style = ColwiseParallel(output_layouts=layout, use_local_output=local)
        parallelize_module(model, mesh, {"lm_head": style})
        fuse_lm_head(model)
        loss = model(ids, **named).loss
        torch.testing.assert_close(loss, expected)
        loss.backward()
        grad: Any = model.lm_head.weight.grad
        torch.testing.assert_close(grad.full_tensor(), alone.lm_head.weight.grad, rtol=1e-4, atol=1e-6)

    model = build()
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel()})
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ValueError, match="does more to its logits"):
        fuse_lm_head(model)


def test_heads_that_are_split_by_columns_are_tried_on_what_they_leave_here(tmp_path: Path) -> None:
    for package in ("transformers", "peft"):
        pytest.importorskip(package)
    on_ranks(2, fused, tmp_path)
