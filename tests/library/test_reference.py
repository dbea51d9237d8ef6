"""The specification against arithmetic written out by hand, and against its own derivative."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from aer_fast import reference
from aer_fast.reference import PPOLoss, PPOTerms

N, V = 6, 5


def by_hand(
    logits: list[float], target: int, old: float, advantage: float, coef: float, weight: float, **s: Any
) -> Any:
    """mask · L of one token in Python floats, straight from the definitions."""
    z = [x / s["temperature"] for x in logits]
    if s["softcap"]:
        z = [s["softcap"] * math.tanh(x / s["softcap"]) / s["temperature"] for x in logits]
    lse = math.log(sum(math.exp(x) for x in z))
    p = [math.exp(x - lse) for x in z]
    entropy = -sum(q * math.log(q) for q in p)
    logprob = z[target] - lse
    r = math.exp(logprob - old)
    surrogate = min(r * advantage, min(max(r, 1 - s["clip"][0]), 1 + s["clip"][1]) * advantage)
    if s["dual_clip"] is not None and advantage < 0:
        surrogate = max(surrogate, s["dual_clip"] * advantage)
    d = s["ref"] - logprob
    kl = math.exp(d) - d - 1
    return weight * (-s["importance"] * surrogate - coef * entropy + s["kl_coef"] * kl)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("clip", [(0.2, 0.28), (1.0, 0.0), (math.inf, math.inf)], ids=str)
def test_ppo_loss_is_the_formula(
    softcap: float | None, dual_clip: float | None, clip: tuple[float, float]
) -> None:
    logits = torch.randn(N, V, dtype=torch.float64)
    target = torch.randint(V, (N,))
    old, ref = -1 + torch.randn(2, N, dtype=torch.float64)
    advantage = torch.tensor([2.0, -2.0, 0.5, -0.5, 0.0, -1.0], dtype=torch.float64)
    coef, weight = torch.rand(2, N, dtype=torch.float64)
    settings: dict[str, Any] = {"clip": clip, "dual_clip": dual_clip, "softcap": softcap, "temperature": 0.7}
    out = reference.ppo_loss(
        logits,
        target,
        old,
        advantage,
        weight,
        entropy_coef=coef,
        ref_logprob=ref,
        kl_coef=0.3,
        importance_weight=0.9,
        denominator=4.0,
        **settings,
    )
    rows = zip(*(x.tolist() for x in (logits, target, old, advantage, coef, weight, ref)))
    expected = sum(by_hand(*row[:-1], ref=row[-1], kl_coef=0.3, importance=0.9, **settings) for row in rows)
    assert out.loss.item() == pytest.approx(expected / 4.0, rel=1e-12)


def test_metrics_by_hand() -> None:
    """Uniform over 4 tokens: logprob = -log 4; the ratios are chosen through old_logprob."""
    ratio = torch.tensor([0.5, 0.5, 2.0, 2.0, 1.1, 9.0], dtype=torch.float64)
    advantage = torch.tensor([-1.0, 1.0, -1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    logits = torch.zeros(6, 4, dtype=torch.float64)
    mask = torch.tensor([True] * 5 + [False])
    old = -math.log(4) - ratio.log()
    metrics = reference.ppo_loss(logits, torch.zeros(6, dtype=torch.long), old, advantage, mask).metrics
    kl = sum(r - 1 - math.log(r) for r in (0.5, 0.5, 2.0, 2.0, 1.1)) / 5
    expected = {
        "tokens": 5.0,
        "entropy": math.log(4),
        "clip_fraction_low": 0.2,  # A < 0 and r = 0.5
        "clip_fraction_high": 0.2,  # A > 0 and r = 2
        "clip_fraction": 0.4,
        "approx_kl": kl,
        "ratio_max": 2.0,
        "top1_prob": 0.25,
        "active_fraction": 0.4,  # neither the clipped two nor A = 0
    }
    assert {name: x.item() for name, x in metrics.items()} == pytest.approx(expected, rel=1e-12)


def loss_of(logits: Tensor, **options: Any) -> PPOLoss:
    target = torch.tensor([0, 1, 2, -100, 4, 2])
    old = torch.tensor([-1.0, -3.0, -0.5, 0.0, -2.0, -1.5], dtype=torch.float64)
    advantage = torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0, 0.0], dtype=torch.float64)
    mask = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    return reference.ppo_loss(logits, target, old, advantage, mask, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"entropy_coef": 0.3, "temperature": 0.7},
        {"entropy_coef": torch.rand(N, dtype=torch.float64), "softcap": 2.0, "dual_clip": 1.2},
        {"ref_logprob": -1.0, "kl_coef": 0.5, "importance_weight": 0.8, "denominator": 7.0},
    ],
    ids=["plain", "bonus", "softcap-dual", "kl"],
)
def test_the_gradient_is_the_derivative(options: dict[str, Any]) -> None:
    logits = torch.randn(N, V, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: loss_of(z, **options).loss, (logits,))
    target = torch.tensor([0, 1, 2, -100, 4, 2])
    settings = {key: options[key] for key in ("temperature", "softcap") if key in options}
    assert torch.autograd.gradcheck(lambda z: tuple(reference.token_stats(z, target, **settings)), (logits,))


def test_on_policy_keeps_the_policy_gradient() -> None:
    logits = torch.randn(N, V, dtype=torch.float64, requires_grad=True)
    target = torch.randint(V, (N,))
    advantage = torch.randn(N, dtype=torch.float64)
    out = reference.ppo_loss(logits, target, None, advantage)
    (actual,) = torch.autograd.grad(out.loss, logits)
    plain = -(advantage * logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]).mean()
    (expected,) = torch.autograd.grad(plain, logits)
    torch.testing.assert_close(actual, expected)
    assert out.loss.item() == pytest.approx(-advantage.mean().item())
    assert out.metrics["ratio_max"] == 1.0
    assert out.metrics["approx_kl"] == 0.0


def test_an_overflowing_ratio_that_is_clipped_has_no_gradient() -> None:
    logits = torch.randn(1, V, requires_grad=True)
    out = reference.ppo_loss(logits, torch.tensor([1]), -300.0, 1.0)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(-1.2)
    assert logits.grad is not None
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_the_derivatives_are_those_of_the_formula(
    on_policy: bool, dual_clip: float | None, kl_coef: float
) -> None:
    """By autograd, over ratios on both sides of every bound."""
    ratio, advantage = torch.meshgrid(
        torch.tensor([0.1, 0.79, 0.81, 1.0, 1.27, 1.29, 1.6, math.inf], dtype=torch.float64),
        torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0], dtype=torch.float64),
        indexing="ij",
    )
    logprob = torch.full_like(ratio, -1.0).requires_grad_()
    entropy = torch.full_like(ratio, 0.7).requires_grad_()
    coef, importance, ref = torch.rand(3, *ratio.shape, dtype=torch.float64)
    terms = PPOTerms(
        old_logprob=None if on_policy else -1.0 - ratio.log(),
        advantage=advantage,
        entropy_coef=coef,
        importance_weight=importance,
        ref_logprob=-ref if kl_coef else None,
        clip=(0.2, 0.28),
        dual_clip=dual_clip,
        kl_coef=kl_coef,
    )
    loss = reference.ppo_token_loss(logprob, entropy, terms)
    expected = torch.autograd.grad(loss.sum(), (logprob, entropy))
    actual = reference.ppo_token_grad(logprob.detach(), terms)
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    clipped = (actual[0] == 0).any() if not kl_coef else True
    assert clipped
