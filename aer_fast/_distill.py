"""The room of the divergence from a teacher: its constants, checks, scores and results.

The formula stands in `reference.distill_loss`. The row operations compute the divergence and its gradient by
the logits; what a loss makes of them is here, for it is linear.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aer_fast import reference
from aer_fast._exchange import Alike, checksum, of_numbers
from aer_fast._rows import as_rows
from aer_fast._rows.pairs import Divergence, Grads, PairStats
from aer_fast._validation import (
    Tokens,
    check_device,
    check_number,
    check_softcap,
    denominator_scale,
    per_token,
    temperatures,
)
from aer_fast.kernels.layout import DIVERGENCES, IGNORE
from aer_fast.reference import DistillLoss

# What a token contributes, [FIELDS, N]; 0 where masked.
FIELDS = ("loss", "divergence", "entropy", "logprob", "ref_logprob", "active")


class Targets(NamedTuple):
    """The target of a call whose student and teacher may have vocabularies of different sizes."""

    given: Tensor | None  # [...], as the caller has it
    inside: Tensor  # [...], in [0, V) or IGNORE
    outside: Tensor | None  # [N], whether the target lies beyond V; None where there are no targets

    @classmethod
    def of(cls, target: Tensor | None, like: Tensor, V: int, most: int) -> Targets:
        """``like`` [..., ·] has a row for each token; ``most`` words are in the larger vocabulary."""
        if target is None:
            return cls(None, torch.zeros(like.shape[:-1], dtype=torch.int64, device=like.device), None)
        outside = (target >= V) & (target < most)
        return cls(target, target.masked_fill(outside, 0), outside.reshape(-1))


class DistillTerms(NamedTuple):
    """The loss of some tokens: all that is needed besides their statistics."""

    which: Divergence
    mask: Tensor  # [N] and so are the next, 0 where masked
    coef: Tensor
    entropy_coef: Tensor
    temperature: Tensor
    ref_temperature: Tensor
    scale: Tensor  # [], 1 / denominator

    def may_have_gradient(self) -> Tensor:
        return (self.coef != 0) | (self.entropy_coef != 0)

    def at(self, rows: Tensor | slice) -> DistillTerms:
        """The loss of these tokens."""
        constants = {name: x[rows] for name, x in self._asdict().items() if name not in ("which", "scale")}
        return self._replace(**constants)

    def score(self, stats: PairStats) -> tuple[Tensor, Grads]:
        """[FIELDS, N], and scale times the gradients of the loss by logprob, entropy and divergence."""
        token = self.mask != 0
        weight = self.mask * self.coef
        # a coefficient of 0 is no divergence, also where that is infinite
        bonus = self.mask * self.entropy_coef
        loss = (weight * stats.divergence).where(weight != 0, 0.0) - bonus * stats.entropy
        grads = torch.zeros_like(weight), -self.scale * bonus, self.scale * weight
        active = (grads[1] != 0) | (grads[2] != 0)
        found = loss, stats.divergence, stats.entropy, stats.logprob, stats.ref_logprob, active.to(loss.dtype)
        return torch.stack([x.where(token, 0.0) for x in found]), grads

    def alike(self, live: Tensor) -> dict[str, Alike]:
        """What ranks that compute one loss compare."""
        given = torch.stack((self.mask, self.coef, self.entropy_coef, self.ref_temperature), -1)
        kind, beta, floor, _, ref_softcap = self.which
        return {
            "what is given per token (coef, mask, entropy_coef, ref_temperature)": checksum(given, live),
            "divergence, jsd_beta, ref_logprob_floor, ref_softcap": of_numbers(
                DIVERGENCES.index(kind), beta, floor, ref_softcap
            ),
            "denominator": checksum(self.scale.view(1)),
        }

    def largest_grad(self) -> Tensor:
        """About the largest gradient by a statistic, before ``scale``; []."""
        return (self.mask * (self.coef.abs() + self.entropy_coef.abs())).amax()


def distill_terms(
    target: Tensor,
    tokens: Tokens,
    denominator: Tensor | float | None,
    *,
    divergence: str,
    jsd_beta: float,
    coef: Tensor | float,
    entropy_coef: Tensor | float,
    ref_temperature: Tensor | float | None,
    softcap: float | None,
    ref_softcap: float | None,
    ref_logprob_floor: float | None,
) -> DistillTerms:
    """Check the arguments of the loss, and gather them."""
    assert tokens.mask is not None
    dtype = tokens.mask.dtype
    mask = tokens.mask.where(tokens.live, 0.0)
    if ref_temperature is None:
        ref_temperatures = tokens.temperature
    else:
        ref_temperatures = temperatures("ref_temperature", ref_temperature, target, tokens.live, dtype)
    return DistillTerms(
        which_divergence(divergence, jsd_beta, softcap, ref_softcap, ref_logprob_floor),
        mask,
        per_token("coef", coef, target, dtype),
        per_token("entropy_coef", entropy_coef, target, dtype),
        tokens.temperature,
        ref_temperatures,
        denominator_scale(denominator, mask, tokens.live),
    )


def which_divergence(
    divergence: str, jsd_beta: float, softcap: float | None, ref_softcap: float | None, floor: float | None
) -> Divergence:
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    check_number("jsd_beta", jsd_beta)
    if not 0 <= jsd_beta <= 1:
        raise ValueError(f"jsd_beta must be within [0, 1], got {jsd_beta}")
    if divergence == "jsd" and jsd_beta in (0, 1):
        divergence = "reverse_kl" if jsd_beta == 1 else "forward_kl"
    if floor is not None:
        check_number("ref_logprob_floor", floor)
        if floor >= 0 or divergence != "reverse_kl":
            raise ValueError(
                f"ref_logprob_floor must be negative, and None unless divergence is 'reverse_kl', got {floor}"
                f" with {divergence!r}"
            )
    softcaps = check_softcap(softcap), check_softcap(ref_softcap, "ref_softcap")
    return Divergence(divergence, float(jsd_beta), -math.inf if floor is None else float(floor), *softcaps)


def check_ref(name: str, ref: Tensor, like: Tensor, like_name: str) -> None:
    """The teacher's [..., ·] has a row for each of the student's."""
    if ref.shape[:-1] != like.shape[:-1]:
        lead = tuple(like.shape[:-1])
        raise ValueError(f"{name} must have the leading shape of {like_name}, {lead}, got {tuple(ref.shape)}")
    check_device(name, ref, like)


def check_apart(logits: Tensor, ref_logits: Tensor) -> None:
    """Whether a gradient can overwrite the logits without the teacher's. Raises ValueError if not."""
    shared = logits.untyped_storage().data_ptr() == ref_logits.untyped_storage().data_ptr()
    if shared and logits.numel() > 0 and ref_logits.numel() > 0:  # nothing lies nowhere
        raise ValueError("inplace=True would overwrite ref_logits, which share the storage of logits")


def rows_like(ref_logits: Tensor, rows: Tensor) -> Tensor:
    """The teacher's logits as the student's rows [O, I, ·] are."""
    O, I, _ = rows.shape
    ref = as_rows(ref_logits)
    return ref if ref.shape[:2] == (O, I) else ref.contiguous().view(O, I, -1)


def by_reference(terms: DistillTerms, targets: Targets, live: Tensor) -> dict[str, Any]:
    """Arguments of the specification: what was checked."""
    shape = targets.inside.shape
    which = terms.which
    return {
        "target": None if targets.given is None else targets.given.where(live.view(shape), IGNORE),
        "mask": terms.mask.view(shape),
        "divergence": which.kind,
        "jsd_beta": which.beta,
        "coef": terms.coef.view(shape),
        "entropy_coef": terms.entropy_coef.view(shape),
        "temperature": terms.temperature.view(shape),
        "ref_temperature": terms.ref_temperature.view(shape),
        "ref_softcap": which.ref_softcap,
        "ref_logprob_floor": None if which.floor == -math.inf else which.floor,
    }


def result(loss: Tensor, fields: Tensor, live: Tensor, targets: Targets) -> DistillLoss:
    """fields [FIELDS, N] as the caller gets them."""
    shape = targets.inside.shape
    found = dict(zip(FIELDS, fields))
    metrics = reference.distill_metrics(live, found["divergence"], found["entropy"], found["active"])
    logprob, ref_logprob = None, None
    if targets.outside is not None:
        beyond = targets.outside & live
        logprob, ref_logprob = (
            found[name].masked_fill(beyond, -torch.inf).view(shape) for name in ("logprob", "ref_logprob")
        )
    divergence, entropy = found["divergence"].view(shape), found["entropy"].view(shape)
    return DistillLoss(loss, divergence, entropy, logprob, ref_logprob, metrics)
