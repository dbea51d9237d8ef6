from typing import Any

import pytest
import torch

from aer_fast import Plan, plan, token_stats
from tests.helpers.heads import (
    LOOPS,
    Products,
    assert_matches_float64,
    head,
    linear_token_stats,
    run,
    take_loop,
)

pytestmark = pytest.mark.numerics
IMPLS = ["torch", "triton"]
SHAPES = [(1, 7, 3), (13, 101, 9), (6, 2049, 33)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(("N", "V", "D"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_matches_float64(
    impl: str,
    loop: str,
    N: int,
    V: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    taken = {"planner": take_loop(loop)}
    inputs: dict[str, Any] = head(N, V, D, device, dtype)
    inputs["target"][N // 2] = -100
    temperature = 0.5 + torch.rand(N, device=device)
    assert_matches_float64(linear_token_stats, inputs, impl, **taken)
    assert_matches_float64(linear_token_stats, inputs, impl, temperature=temperature, softcap=5.0, **taken)
    for frozen in (("weight", "bias"), ("hidden",)):
        assert_matches_float64(linear_token_stats, inputs | {"bias": None}, impl, frozen, **taken)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("upstream", ["logprob", "entropy"])
def test_one_output_alone_can_be_differentiated(impl: str, upstream: str, device: torch.device) -> None:
    inputs = head(13, 101, 9, device, torch.float32)
    hidden, weight, bias = (inputs[k].requires_grad_() for k in ("hidden", "weight", "bias"))
    grads = []
    for statistics in (
        linear_token_stats(hidden, weight, inputs["target"], bias=bias, impl=impl),
        token_stats(hidden @ weight.T + bias, inputs["target"], impl="reference"),
    ):
        slope = torch.linspace(-1, 1, 13, device=device)
        loss = (slope * getattr(statistics, upstream)).sum()
        grads.append(torch.autograd.grad(loss, (hidden, weight, bias)))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loop", LOOPS)
def test_rows_without_an_upstream_gradient_take_no_part_in_the_backward(
    impl: str, loop: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = {"planner": take_loop(loop)}
    inputs = head(13, 101, 9, device, torch.float32)
    hidden, weight = (inputs[k].requires_grad_() for k in ("hidden", "weight"))
    stats = linear_token_stats(hidden, weight, inputs["target"], impl=impl, **taken)
    with Products(101, 9) as products:
        (stats.logprob[2:4].sum() + stats.entropy[7]).backward()
    steps = 3 if loop == "vocabulary" else 1  # slices
    assert products.rows["grad_weight"] == [3] * steps
    assert hidden.grad is not None
    learning = (hidden.grad != 0).any(-1)
    assert learning.nonzero()[:, 0].tolist() == [2, 3, 7]
    with products:
        stats = linear_token_stats(hidden, weight, inputs["target"], impl=impl, **taken)
        (0 * stats.logprob).sum().backward()
    assert products.rows["grad_weight"] == [3] * steps


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_logits_that_fit_the_budget_are_kept_for_the_backward(
    impl: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Three products instead of four; the same gradients to the last bit."""
    V, D = 101, 9
    inputs = head(6, V, D, device, dtype)
    inputs["target"][4] = -100
    hidden, weight = (inputs[k].requires_grad_() for k in ("hidden", "weight"))
    slope = torch.linspace(-1, 2, 6, device=device)
    slope[1] = 0  # of a kept row, which has no gradient
    found = []
    for given, again in (({"memory_budget": 1 << 30}, 0), ({"chunk_tokens": 6}, 4)):
        with Products(V, D) as products:
            stats = linear_token_stats(hidden, weight, inputs["target"], impl=impl, **given)
            assert products.totals == (5, 0, 0)
            products.clear()
            loss = (slope * (stats.logprob + 0.3 * stats.entropy)).sum()
            found.append(torch.autograd.grad(loss, (hidden, weight)))
            assert products.totals == (again, 4, 4)
    for kept, made in zip(*found):
        assert torch.equal(kept, made)


def test_a_row_that_is_made_in_pieces_depends_on_itself_alone() -> None:
    """Of logits that every order of summing makes exactly; on a CPU, where nothing needs a gradient."""
    V, D = 20_001, 8
    hidden = torch.randint(-2, 3, (700, D)).float()
    weight = torch.randint(-8, 9, (V, D)) / 4
    target = torch.randint(V, (700,))
    whole = linear_token_stats(hidden, weight, target)
    exact = token_stats(hidden.double() @ weight.double().T, target)
    for a, x in zip(whole, exact):
        assert (a - x).abs().max() < 4e-6
    for rows in (slice(0, 1), slice(3, 5), slice(7, 107), slice(100, 650)):
        part = linear_token_stats(hidden[rows], weight, target[rows])
        assert torch.equal(part.logprob, whole.logprob[rows])
        assert torch.equal(part.entropy, whole.entropy[rows])


@pytest.mark.parametrize(
    ("banned", "targets"),
    [(slice(105, 210), [5, 110, 211]), (slice(210), [210, 211, 311]), (slice(312), [5, 211, 311])],
    ids=["a piece", "all but the last piece", "all"],
)
def test_pieces_without_a_word(banned: slice, targets: list[int]) -> None:
    """Banned by the bias. Pieces begin at 105 and 210, from where 5 and 110 are -100."""
    inputs = head(3, 312, 9, torch.device("cpu"), torch.float32) | {"target": torch.tensor(targets)}
    inputs["bias"][banned] = -torch.inf
    with torch.no_grad():
        found = linear_token_stats(**inputs, planner=take_loop("chunks"))
    logits = inputs["hidden"].double() @ inputs["weight"].double().T + inputs["bias"]
    for a, x in zip(found, token_stats(logits, inputs["target"])):
        torch.testing.assert_close(a.double(), x, rtol=0, atol=4e-6, equal_nan=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_is_kept_where_there_will_be_no_backward(impl: str, device: torch.device) -> None:
    inputs = head(6, 101, 9, device, torch.float32)
    hidden, given = inputs["hidden"].requires_grad_(), {"memory_budget": 1 << 30, "impl": impl}
    held: list[int] = []

    def planner(*sizes: Any, **options: Any) -> Plan:
        made = plan(*sizes, **options)
        held.append(made.held)
        return made

    linear_token_stats(hidden, inputs["weight"], inputs["target"], planner=planner, **given)
    assert max(held) == 6 * 101 * 4
    held.clear()
    with torch.no_grad():
        linear_token_stats(hidden, inputs["weight"], inputs["target"], planner=planner, **given)
    linear_token_stats(hidden.detach(), inputs["weight"], inputs["target"], planner=planner, **given)
    assert max(held) == 0


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_a_retained_graph_may_be_run_again(impl: str, device: torch.device) -> None:
    """It is an ordinary function: nothing was computed that a second backward could not use."""
    inputs = head(6, 50, 8, device, torch.float32)
    leaf = inputs["hidden"].requires_grad_()
    loss = linear_token_stats(leaf, inputs["weight"], inputs["target"], impl=impl).entropy.sum()
    (once,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (again,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(once, again)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_ignored_rows_are_never_read(impl: str, device: torch.device) -> None:
    inputs = head(6, 50, 8, device, torch.float32)
    inputs["target"][1::2] = -100
    inputs["hidden"][1::2] = torch.nan
    stats, grads = run(linear_token_stats, inputs, impl=impl)
    assert (stats.logprob[1::2] == 0).all()
    assert (stats.entropy[1::2] == 0).all()
    assert (grads["hidden"][1::2] == 0).all()
    assert all(torch.isfinite(g).all() for g in grads.values())
    assert grads["weight"].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loop", LOOPS)
def test_a_small_upstream_gradient_survives_float16(impl: str, loop: str, device: torch.device) -> None:
    taken = {"planner": take_loop(loop)}
    inputs = head(6, 50, 8, device, torch.float16)
    grads = []
    for factor in (1.0, 2.0**-12):
        weight = inputs["weight"].detach().requires_grad_()
        stats = linear_token_stats(inputs["hidden"], weight, inputs["target"], impl=impl, **taken)
        (factor * stats.entropy).sum().backward()
        assert weight.grad is not None
        grads.append(weight.grad.float() / factor)
    assert (grads[0] - grads[1]).abs().max() <= 2.0**12 * 2.0**-24  # float16's smallest number
