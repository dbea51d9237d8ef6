"""A vocabulary split between ranks, beside the whole one, in processes of their own."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import aer_fast
from tests.helpers.heads import (
    LOOPS,
    assert_matches_float64,
    head,
    inputs_loss,
    linear_ppo_loss,
    linear_token_loss,
    linear_token_stats,
    run,
    take_loop,
)
from tests.helpers.oracle import assert_within_budget
from tests.helpers.ranks import SLICES, D, N, V, equal_on_all_ranks, on_ranks, split

pytestmark = pytest.mark.host
TERMS = ("old_logprob", "advantage", "entropy_coef", "mask", "temperature")


def objective(logprob: Tensor, entropy: Tensor, advantage: Tensor) -> Tensor:
    return -(logprob * advantage + 0.1 * entropy * logprob.detach())


def terms(N: int) -> dict[str, Any]:
    advantage, mask = torch.randn(N), (torch.rand(N) > 0.2).float()
    advantage[4], mask[5:7] = 0.0, 0.0
    return {
        "old_logprob": torch.randn(N) - 4,
        "advantage": advantage,
        "entropy_coef": 0.1 * torch.rand(N) * (torch.rand(N) > 0.5),
        "mask": mask,
        "temperature": 0.5 + torch.rand(N),
    }


def problem(function: str, dtype: torch.dtype, **changes: Any) -> dict[str, Any]:
    inputs = head(N, V, D, torch.device("cpu"), dtype) | changes
    inputs["target"][3] = -100
    given = terms(N)
    if function == "linear_ppo_loss":
        return inputs | given
    return inputs | {"temperature": given["temperature"]}


def functions() -> dict[str, Any]:
    def token_loss(*, mask: Tensor | None = None, **inputs: Any) -> Any:
        advantage = torch.linspace(-1, 1, N, dtype=torch.float32)
        factors = (inputs.pop(name) for name in ("hidden", "weight", "target"))
        return linear_token_loss(*factors, objective, advantage, **inputs)

    return {
        "linear_ppo_loss": linear_ppo_loss,
        "linear_token_loss": token_loss,
        "linear_token_stats": linear_token_stats,
    }


def linear_functions_match(impl: str) -> None:
    size, whole = dist.get_world_size(), impl == "torch"
    dtypes = (torch.float32, torch.bfloat16) if whole else (torch.bfloat16,)
    for name, function in functions().items():
        for k, ends in enumerate(SLICES[size] if whole else SLICES[size][:2]):
            for dtype in dtypes:
                for loop in LOOPS if k == 0 and whole else LOOPS[1:2]:
                    torch.manual_seed(k)
                    inputs, options = problem(name, dtype), {"softcap": None if k else 20.0}
                    ours = split(function, ends)
                    assert_matches_float64(ours, inputs, impl, planner=take_loop(loop), **options)
                    result, grads = run(ours, inputs, impl=impl, **options)
                    tensors = [x for x in result if isinstance(x, Tensor)]
                    equal_on_all_ranks(*tensors, *getattr(result, "metrics", {}).values(), grads["hidden"])


@pytest.mark.parametrize(("size", "impl"), [(2, "torch"), (3, "torch"), (2, "triton")])
def test_linear_functions_match_the_whole_vocabulary(size: int, impl: str, tmp_path: Path) -> None:
    """Within the error budget against float64; losses and statistics are the same bits on all ranks."""
    on_ranks(size, linear_functions_match, tmp_path, impl)


def logits_match(impl: str) -> None:
    size, whole = dist.get_world_size(), impl == "torch"
    for k, ends in enumerate(SLICES[size]):
        for dtype in (torch.float32, torch.bfloat16) if whole else (torch.float32,):
            for name in ("ppo_loss", "token_stats"):
                for inplace in (False, True) if name == "ppo_loss" else (False,):
                    torch.manual_seed(k)
                    logits = (3 * torch.randn(N, V)).to(dtype)
                    target = torch.randint(V - 1, (N,))
                    target[3], logits[:, V - 1], logits[5] = -100, -torch.inf, torch.nan
                    given = terms(N)
                    if name == "token_stats":
                        given = {"temperature": given["temperature"]}
                        logits[5] = 1.0
                    compare_logits(name, logits, target, ends, impl, inplace=inplace, **given)


def compare_logits(
    name: str, logits: Tensor, target: Tensor, ends: list[int], impl: str, *, inplace: bool, **given: Any
) -> None:
    function = getattr(aer_fast, name)
    options = {"inplace": inplace} if name == "ppo_loss" else {}
    found = []
    for impl_, x in ((impl, logits), ("reference", logits), ("reference", logits.double())):
        leaf = x.clone().requires_grad_()
        kwargs = given | {"logits": leaf * 1, "target": target, "softcap": 30.0, "impl": impl_}
        result = split(function, ends)(**kwargs, **(options if impl_ == impl else {}))
        slope = torch.linspace(-1, 1, N)
        (result.loss if name == "ppo_loss" else (slope * result.logprob + result.entropy).sum()).backward()
        values = [*result[:3], *result[3].values()] if name == "ppo_loss" else list(result)
        found.append((values, leaf.grad))
    (ours, grad), (eager, eager_grad), (exact, exact_grad) = found
    for a, e, x in zip(ours, eager, exact):
        assert_within_budget(a.detach(), e.detach(), x.detach(), terms=V, input_scale=20.0)
    equal_on_all_ranks(*ours)
    assert None not in (grad, eager_grad, exact_grad)
    assert_within_budget(grad, eager_grad, exact_grad, terms=V, input_scale=20.0)


@pytest.mark.parametrize(("size", "impl"), [(2, "torch"), (3, "torch"), (2, "triton")])
def test_logits_match_the_whole_vocabulary(size: int, impl: str, tmp_path: Path) -> None:
    on_ranks(size, logits_match, tmp_path, impl)


def edges() -> None:
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(N, D), torch.randn(V, D), torch.randint(40, (N,))
    ends = [20, 45, V]
    mine = weight[[0, *ends][rank] : ends[rank]]

    # A padded vocabulary: 40 words in 50 rows, of which the last rank has none.
    ours, grads = run(
        aer_fast.linear_token_stats,
        {"hidden": hidden, "weight": mine, "target": target},
        vocab_size=40,
        group=group,
    )
    whole, expected = run(
        aer_fast.linear_token_stats, {"hidden": hidden, "weight": weight[:40], "target": target}
    )
    torch.testing.assert_close(ours.entropy, whole.entropy)
    torch.testing.assert_close(grads["hidden"], expected["hidden"], rtol=1e-4, atol=1e-6)
    padded = torch.zeros(V, D)
    padded[:40] = expected["weight"]
    torch.testing.assert_close(grads["weight"], padded[[0, *ends][rank] : ends[rank]], rtol=1e-4, atol=1e-6)
    alone, own = run(
        aer_fast.linear_token_stats, {"hidden": hidden, "weight": weight, "target": target}, vocab_size=40
    )
    torch.testing.assert_close(alone.entropy, whole.entropy)
    torch.testing.assert_close(own["weight"], padded)

    logits = (hidden @ weight.T).requires_grad_()
    columns = logits[:, [0, *ends][rank] : ends[rank]].detach().clone().requires_grad_()
    for loss_of in (
        lambda x, own: aer_fast.ppo_loss(x, target, None, 1.0, vocab_size=40, group=own).loss,
        lambda x, own: inputs_loss(aer_fast.token_stats(x, target, vocab_size=40, group=own)),
    ):
        for x, ranks in ((logits, None), (columns, group)):
            x.grad = None
            loss_of(x, ranks).backward()
        assert logits.grad is not None
        torch.testing.assert_close(columns.grad, logits.grad[:, [0, *ends][rank] : ends[rank]])

    # Partial sums of the gradient of hidden, for a caller who sums them.
    inputs: dict[str, Any] = {"hidden": hidden, "weight": mine, "target": target}
    inputs |= {"old_logprob": None, "advantage": 1.0}
    partial = run(aer_fast.linear_ppo_loss, inputs, group=group, reduce_hidden=False)[1]["hidden"]
    summed = run(aer_fast.linear_ppo_loss, inputs, group=group)[1]["hidden"]
    assert not torch.allclose(partial, summed)
    dist.all_reduce(partial)
    torch.testing.assert_close(partial, summed)
    narrow = {k: x.bfloat16() if k in ("hidden", "weight") else x for k, x in inputs.items()}
    options: dict[str, Any] = {"group": group, "reduce_hidden": False, "vocab_size": 40}
    assert run(aer_fast.linear_ppo_loss, narrow, **options)[1]["hidden"].any() == (rank < 2)

    # Confident tokens keep their digits, nothing at all is nothing, NaN is NaN on all ranks.
    sharp = torch.zeros(2, V)
    sharp[:, 3] = 17.0
    columns = sharp[:, [0, *ends][rank] : ends[rank]]
    ids = torch.tensor([3, 44])
    stats = aer_fast.token_stats(columns, ids, group=group)
    exact = aer_fast.reference.token_stats(sharp.double(), ids)
    torch.testing.assert_close(stats.logprob.double(), exact.logprob, rtol=3e-6, atol=0)
    for none in (torch.full((N,), -100), torch.zeros(0, dtype=torch.long)):
        rows = hidden[: len(none)].clone().requires_grad_()
        out = aer_fast.linear_ppo_loss(rows, mine, none, None, 1.0, group=group)
        out.loss.backward()
        assert rows.grad is not None
        assert out.loss == 0
        assert not rows.grad.any()
    broken = hidden.clone()
    broken[2] = torch.nan
    stats = aer_fast.linear_token_stats(broken, mine, target, group=group)
    assert stats.entropy.isnan().nonzero()[:, 0].tolist() == [2]

    # More ranks than words; a head that is trained on one rank only, and one that is trained on none.
    few = weight[: size - 1]
    ids = torch.randint(size - 1, (N,))
    ours = aer_fast.linear_token_stats(hidden, few[rank : rank + 1], ids, group=group)
    torch.testing.assert_close(ours.logprob, aer_fast.linear_token_stats(hidden, few, ids).logprob)
    for train in ([0], []):
        one = mine.clone().requires_grad_(rank in train)
        out = aer_fast.linear_ppo_loss(hidden, one, target, None, 1.0, group=group, chunk_tokens=5)
        if rank in train:
            out.loss.backward()
            assert one.grad is not None
            assert one.grad.any()


def test_edges_of_a_split_vocabulary(tmp_path: Path) -> None:
    on_ranks(3, edges, tmp_path)
