"""The policy loss with the exact KL to a reference policy, from the hidden states and heads of both."""

from typing import Any

import pytest
import torch

import aer_fast
from aer_fast import merge_metrics
from tests.helpers.heads import (
    LOOPS,
    Products,
    assert_matches_float64,
    linear_ppo_loss,
    run,
    take_loop,
    with_teacher,
)

pytestmark = pytest.mark.numerics
IMPLS = ["torch", "triton"]
SHAPES = [(1, 7, 3), (13, 101, 9), (6, 2049, 33)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def policy(N: int, device: torch.device) -> dict[str, Any]:
    row = torch.arange(N, device=device)
    return {
        "old_logprob": -4.0 + torch.rand(N, device=device),
        "advantage": (row % 5 - 2).float(),
        "mask": (row % 8 != 3).float() * 1.5,
        "entropy_coef": 0.1 * (row % 3).float(),
        "temperature": 0.5 + torch.rand(N, device=device),
        "softcap": 10.0,
        "denominator": 7.0,
        "kl_coef": 0.3,
    }


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loop", [x for x in LOOPS if x != "vocabulary"])
@pytest.mark.parametrize(("N", "V", "D"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_matches_float64(
    impl: str, loop: str, N: int, V: int, D: int, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = with_teacher(N, V, D, device, dtype, V + 4) | policy(N, device)
    inputs["target"][N // 2] = -100
    taken = {"planner": take_loop(loop)}
    assert_matches_float64(linear_ppo_loss, inputs, impl, **taken)
    inputs |= {"old_logprob": None, "kl_coef": 0.0, "stats": "active"}
    assert_matches_float64(linear_ppo_loss, inputs, impl, ("weight", "bias"), **taken)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_it_is_the_kl_of_the_two_distributions(impl: str, device: torch.device) -> None:
    inputs = with_teacher(6, 50, 8, device, torch.float32)
    given = {"old_logprob": None, "advantage": 0.0, "kl_coef": 0.5, "temperature": 0.7}
    out, grads = run(linear_ppo_loss, inputs | given, impl=impl)
    hidden = inputs["hidden"].double().requires_grad_()
    logp = ((hidden @ inputs["weight"].double().T + inputs["bias"].double()) / 0.7).log_softmax(-1)
    ref_logits = inputs["ref_hidden"].double() @ inputs["ref_weight"].double().T + inputs["ref_bias"].double()
    kl = (logp.exp() * (logp - (ref_logits / 0.7).log_softmax(-1))).sum(-1).mean()
    (0.5 * kl).backward()
    torch.testing.assert_close(out.loss.double(), 0.5 * kl, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(out.metrics["ref_kl"].double(), kl.detach(), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(grads["hidden"].double(), hidden.grad, rtol=1e-4, atol=1e-6)
    assert "ref_kl_k3" not in out.metrics
    assert out.metrics["active_fraction"] == 1


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_a_reference_logprob_only_feeds_the_k3_metric(impl: str, device: torch.device) -> None:
    inputs = with_teacher(6, 50, 8, device, torch.float32) | policy(6, device)
    out, grads = run(linear_ppo_loss, inputs, impl=impl)
    ref_logprob = out.logprob + torch.linspace(-0.5, 0.5, 6, device=device)
    also, also_grads = run(linear_ppo_loss, inputs, impl=impl, ref_logprob=ref_logprob)
    torch.testing.assert_close(also.loss, out.loss, rtol=0.0, atol=0.0)
    torch.testing.assert_close(also_grads, grads, rtol=0.0, atol=0.0)
    d = (ref_logprob - out.logprob)[inputs["mask"] != 0]
    torch.testing.assert_close(also.metrics["ref_kl_k3"], (d.exp() - 1 - d).mean(), rtol=1e-4, atol=1e-6)
    merged = merge_metrics([also.metrics, also.metrics])
    torch.testing.assert_close(merged["ref_kl"], also.metrics["ref_kl"])


@pytest.mark.parametrize("impl", IMPLS)
def test_one_more_product(impl: str, device: torch.device) -> None:
    inputs = with_teacher(13, 101, 9, device, torch.float32)
    given = {"old_logprob": None, "advantage": 0.0, "kl_coef": 0.5}
    with Products(101, 9) as student, Products(101, 14) as reference:
        run(linear_ppo_loss, inputs | given, impl=impl)
        assert (student.totals, reference.totals[0]) == ((13, 13, 13), 13)
        for products in (student, reference):
            products.clear()
        run(linear_ppo_loss, inputs | given | {"kl_coef": 0.0}, impl=impl)
        assert (student.totals, reference.totals[0]) == ((13, 0, 0), 13)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ref_weight": None}, "ref_hidden and ref_weight must both be given"),
        ({"ref_hidden": None}, "ref_hidden and ref_weight must both be given"),
        ({"ref_hidden": None, "ref_weight": None}, "must both be given, or neither and no ref_bias"),
        ({"ref_weight": torch.zeros(49, 13), "ref_bias": None}, "ref_weight must have the V=50 words"),
        ({"ref_hidden": torch.zeros(5, 13)}, "ref_hidden must have the leading shape"),
        ({"kl_coef": -1.0}, "kl_coef must be >= 0"),
        ({"kl_coef": None}, "kl_coef must be a finite number"),
        ({"ref_logprob": torch.zeros(3)}, "ref_logprob must"),
    ],
)
def test_bad_arguments_are_named(wrong: dict[str, Any], message: str) -> None:
    good = with_teacher(6, 50, 8, torch.device("cpu"), torch.float32)
    good |= {"old_logprob": None, "advantage": 1.0, "kl_coef": 0.1}
    with pytest.raises(ValueError, match=message):
        aer_fast.linear_ppo_loss(**good | wrong)
