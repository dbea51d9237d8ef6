"""The room of the policy loss: its constants, checks, fields and metrics, and which rows can have a gradient.

The formula itself stands in `reference.ppo_token_loss`, with its derivatives in `ppo_token_grad`, and once
more as `token_loss` of kernels/ppo_loss.py. A constant per token is one row of a [CONSTANTS, N] tensor from
here to the kernel; `layout` has the order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aer_fast import reference
from aer_fast._exchange import Alike, checksum, of_numbers
from aer_fast._validation import Tokens, check_number, denominator_scale, is_number, per_token
from aer_fast.kernels.layout import CONSTANTS, FIELDS
from aer_fast.reference import PPOLoss, PPOTerms


class Settings(NamedTuple):
    """The numbers of the loss."""

    on_policy: bool  # there is no old_logprob
    clip_low: float
    clip_high: float
    dual_clip: float  # inf for none
    kl_coef: float  # 0 where there is no ref_logprob


class PolicyLoss(NamedTuple):
    """The loss of some tokens: all that is needed besides their statistics."""

    constants: Tensor  # [CONSTANTS, N], those of a token together
    settings: Settings
    scale: Tensor  # [], 1 / denominator

    def of(self, name: str) -> Tensor:
        """One constant [N]."""
        return self.constants[CONSTANTS.index(name)]

    def at(self, rows: Tensor | slice) -> PolicyLoss:
        """The loss of these tokens."""
        return self._replace(constants=self.constants.T[rows].T)

    def terms(self) -> PPOTerms:
        """Constants and settings as the specification names them."""
        on_policy, low, high, dual_clip, kl_coef = self.settings
        return PPOTerms(
            old_logprob=None if on_policy else self.of("old_logprob"),
            advantage=self.of("advantage"),
            entropy_coef=self.of("entropy_coef"),
            importance_weight=self.of("importance_weight"),
            ref_logprob=self.of("ref_logprob") if kl_coef > 0 else None,
            clip=(low, high),
            dual_clip=None if dual_clip == math.inf else dual_clip,
            kl_coef=kl_coef,
        )

    def fields(self, logprob: Tensor, entropy: Tensor, top1_prob: Tensor) -> Tensor:
        """Return [FIELDS, N] of tokens with these statistics."""
        found = reference.ppo_fields(logprob, entropy, top1_prob, self.of("mask"), self.terms())
        return torch.stack([found[name] for name in FIELDS])

    def grads(self, logprob: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale · mask · ∂loss / ∂logprob and the same by entropy, 0 where masked."""
        mask = self.of("mask")
        grads = reference.ppo_token_grad(logprob, self.terms())
        grad_logprob, grad_entropy = ((self.scale * (mask * g)).where(mask != 0, 0.0) for g in grads)
        return grad_logprob, grad_entropy

    def may_have_gradient(self) -> Tensor:
        """Whether a token that is not masked can have a gradient, as far as is known before its ratio is."""
        if self.settings.kl_coef > 0:
            return torch.ones_like(self.of("mask"), dtype=torch.bool)
        return (self.of("advantage") != 0) | (self.of("entropy_coef") != 0)

    def clippable(self) -> Tensor:
        """Whether a token has no gradient when its ratio is clipped."""
        if self.settings.on_policy or self.settings.kl_coef > 0:
            return torch.zeros_like(self.of("mask"), dtype=torch.bool)
        return self.of("entropy_coef") == 0

    def alike(self, live: Tensor) -> dict[str, Alike]:
        """What ranks that compute one loss compare."""
        return {
            "what is given per token (advantage, mask, entropy_coef, ...)": checksum(self.constants.T, live),
            "clip, dual_clip, kl_coef": of_numbers(*self.settings),
            "denominator": checksum(self.scale.view(1)),
        }

    def largest_grad(self) -> Tensor:
        """About the largest gradient by logprob or entropy where the ratio is 1, before ``scale``; []."""
        size = (self.of("advantage") * self.of("importance_weight")).abs()
        size = size + self.of("entropy_coef").abs() + self.settings.kl_coef
        return (self.of("mask") * size).amax()


def policy_loss(
    target: Tensor,  # [...], as the caller has it
    tokens: Tokens,
    denominator: Tensor | float | None,
    *,
    old_logprob: Tensor | float | None,
    advantage: Tensor | float,
    entropy_coef: Tensor | float,
    clip: tuple[float, float],
    dual_clip: float | None,
    ref_logprob: Tensor | float | None,
    kl_coef: float,
    importance_weight: Tensor | float | None,
) -> PolicyLoss:
    """Check the arguments of the loss, and gather them."""
    valid = isinstance(clip, (tuple, list)) and len(clip) == 2
    if not valid or not all(c == math.inf or (is_number(c) and c >= 0) for c in clip):
        raise ValueError(f"clip must be two numbers (low, high), each >= 0, got {clip!r}")
    if dual_clip is not None:
        check_number("dual_clip", dual_clip)
        if dual_clip <= 1:
            raise ValueError(f"dual_clip must be greater than 1 or None, got {dual_clip}")
    check_number("kl_coef", kl_coef)
    if kl_coef < 0:
        raise ValueError(f"kl_coef must be >= 0, got {kl_coef}")
    if kl_coef > 0 and ref_logprob is None:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logprob, got None")
    assert tokens.mask is not None
    given = {
        "old_logprob": 0.0 if old_logprob is None else old_logprob,
        "advantage": advantage,
        "entropy_coef": entropy_coef,
        "importance_weight": 1.0 if importance_weight is None else importance_weight,
        "ref_logprob": 0.0 if ref_logprob is None else ref_logprob,
    }
    rows = {name: per_token(name, value, target, tokens.mask.dtype) for name, value in given.items()}
    rows["mask"] = tokens.mask.where(tokens.live, 0.0)
    settings = Settings(
        on_policy=old_logprob is None,
        clip_low=float(clip[0]),
        clip_high=float(clip[1]),
        dual_clip=math.inf if dual_clip is None else float(dual_clip),
        kl_coef=float(kl_coef),
    )
    scale = denominator_scale(denominator, rows["mask"], tokens.live)
    constants = torch.stack([rows[name] for name in CONSTANTS], -1)
    return PolicyLoss(constants.T, settings, scale)


def result(loss: Tensor, fields: Tensor, shape: torch.Size) -> PPOLoss:
    """fields [FIELDS, N] as the caller gets them."""
    logprob, entropy = (fields[FIELDS.index(name)].view(shape) for name in ("logprob", "entropy"))
    return PPOLoss(loss, logprob, entropy, reference.ppo_metrics(fields, FIELDS))


def by_reference(
    function: Callable[..., PPOLoss],
    *factors: Tensor,  # logits [..., V]; or hidden and weight
    loss: PolicyLoss,
    tokens: Tokens,
    computed: Tensor | None = None,  # [N], the tokens that are not left out
    target: Tensor,
    denominator: Tensor | float | None,
    softcap: float | None,
    **options: Any,
) -> PPOLoss:
    """A function of the specification on checked arguments; the gradient comes from autograd."""
    if computed is not None and denominator is None:  # those that are left out count in it
        denominator = loss.of("mask").sum()
    flat = tokens.target if computed is None else tokens.target.where(computed, reference.IGNORE)
    named = dict(zip(CONSTANTS, loss.constants)) | loss.terms()._asdict()
    named |= {"target": flat, "temperature": tokens.temperature}
    shaped = {k: x.view(target.shape) if isinstance(x, Tensor) else x for k, x in named.items()}
    given = shaped | {"denominator": denominator, "softcap": softcap} | options
    return function(*factors, **given)
