"""Arguments at the edge of what numbers are: one ValueError that names the argument, or the right value."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import aer_fast
from aer_fast.integrations.aer import Bookkeeping
from training.evaluation import pass_at_k

HUGE = 10**400
SIZES: dict[str, Any] = {"rows": 8, "V": 100, "D": 16, "tokens": 8, "clippable": 0}


@pytest.mark.parametrize("value", [-1, -3, True, "x", 1.5, None, HUGE, -HUGE, [1]], ids=lambda x: repr(x)[:9])
@pytest.mark.parametrize("name", [*SIZES, "chunk_tokens", "memory_budget"])
def test_sizes_of_a_plan(name: str, value: Any) -> None:
    if value is None and name in ("tokens", "chunk_tokens", "memory_budget"):
        return
    if value == HUGE and name in ("chunk_tokens", "memory_budget"):  # no limit
        aer_fast.plan(**SIZES | {name: value})
        return
    with pytest.raises(ValueError, match=f"^{name} must be "):
        aer_fast.plan(**SIZES | {name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens", 7),  # fewer than rows
        ("clippable", 9),  # more than rows
        ("grad_hidden", 1),
        ("grad_weight", "no"),
        ("softcap", 30.0),
        ("param_dtype", torch.int8),
        ("param_dtype", "float32"),
        ("hidden_dtype", torch.int8),
        ("device", ["cpu"]),
    ],
)
def test_other_arguments_of_a_plan(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be "):
        aer_fast.plan(**SIZES | {name: value})


@pytest.mark.parametrize("value", [HUGE, -HUGE])
def test_numbers_beyond_float64(value: int) -> None:
    aer = aer_fast.AdaptiveEntropy()
    with pytest.raises(ValueError, match=r"^entropy must be a finite number"):
        aer.update(value)
    with pytest.raises(ValueError, match=r"^entropy must be a finite number"):
        aer.anchor(value)
    with pytest.raises(ValueError, match=r"^count must be a finite number"):
        aer.update(1.0, value)
    with pytest.raises(ValueError, match=r"^accuracy must be "):
        aer.weight(value)
    with pytest.raises(ValueError, match=r"^threshold must be a finite number"):
        Bookkeeping(aer, value)
    assert aer.target is None


@pytest.mark.parametrize(("samples", "right", "k"), [(3, 1, 4), (0, 0, 1), (3, 1, 0), (3, 4, 1), (3, -1, 1)])
def test_pass_at_k_of_too_few_samples(samples: int, right: int, k: int) -> None:
    with pytest.raises(ValueError, match=r"^(k|right) must be within"):
        pass_at_k(samples, right, k)


@pytest.mark.parametrize("rho", [5e-324, 1e-320, 1e-40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_rho_that_is_0_in_the_dtype_of_the_accuracy(rho: float, dtype: torch.dtype) -> None:
    weight = aer_fast.AdaptiveEntropy(rho=rho).weight(torch.tensor([0.0, 0.5, 1.0], dtype=dtype))
    assert weight.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_a_head_made_under_inference_mode(impl: Any) -> None:
    with torch.inference_mode():
        weight, bias = torch.randn(5, 3), torch.randn(5)
    hidden, target = torch.randn(2, 3, requires_grad=True), torch.tensor([1, 4])
    made = aer_fast.linear_token_stats(hidden, weight, target, bias=bias, impl=impl)
    plain = aer_fast.linear_token_stats(hidden, weight.clone(), target, bias=bias.clone(), impl=impl)
    for one, other in zip(made, plain):
        grads = [torch.autograd.grad(x.sum(), hidden, retain_graph=True)[0] for x in (one, other)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("target", [0, 1, 2])
def test_logits_as_far_apart_as_float32_has_them(
    target: int, temperature: float, impl: Any, device: torch.device
) -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0]], device=device, requires_grad=True)
    out = aer_fast.token_stats(
        logits, torch.tensor([target], device=device), temperature=temperature, impl=impl
    )
    exact = (logits.detach().double()[0, target] - logits.detach().double()[0, 0]) / temperature
    torch.testing.assert_close(out.logprob[0], exact.float())
    assert out.entropy.item() == 0.0
    (grad,) = torch.autograd.grad(out.logprob.sum(), logits, retain_graph=True)
    expected = torch.zeros_like(logits)
    expected[0, target] += 1 / temperature
    expected[0, 0] -= 1 / temperature
    torch.testing.assert_close(grad, expected)
    (grad,) = torch.autograd.grad(out.entropy.sum(), logits)
    assert not grad.any()


def calls(impl: Any) -> dict[str, Callable[[], Tensor]]:
    target, advantage = torch.randint(20, (6,)), torch.randn(6)

    def head() -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(6, 4, requires_grad=True), torch.randn(20, 4, requires_grad=True), target

    def logits() -> Tensor:
        return torch.randn(6, 20, requires_grad=True)

    policy = {"advantage": advantage, "old_logprob": advantage, "impl": impl}
    return {
        "token_stats": lambda: aer_fast.token_stats(logits(), target, impl=impl).logprob.sum(),
        "ppo_loss": lambda: aer_fast.ppo_loss(logits(), target, **policy).loss,
        "in place": lambda: aer_fast.ppo_loss(1 * logits(), target, inplace=True, **policy).loss,
        "linear_ppo_loss": lambda: aer_fast.linear_ppo_loss(*head(), **policy).loss,
        "linear_token_loss": lambda: aer_fast.linear_token_loss(*head(), lambda p, h: p - h, impl=impl).loss,
        "linear_token_stats": lambda: aer_fast.linear_token_stats(*head(), impl=impl).entropy.sum(),
    }


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("name", calls("torch"))
def test_a_call_leaves_no_cycle(name: str, impl: str) -> None:
    call = calls(impl)[name]
    call().backward()  # what is made once
    gc.collect()
    gc.disable()
    try:
        gc.set_debug(gc.DEBUG_SAVEALL)
        call().backward()
        gc.collect()
        # what torch's own caches let go of meanwhile are fake tensors
        assert not [x for x in gc.garbage if type(x) is Tensor]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
