"""Two rows of logits, of a student and its teacher: what their divergence and its gradient are made of.

The mathematics stand in kernels/divergence.py.

Sizes: N = O · I tokens, V vocabulary entries: of whole rows, or of a piece of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from aer_fast.kernels.layout import IGNORE

Grads = tuple[Tensor, Tensor, Tensor]  # of a loss by logprob, entropy and divergence, each [n]


class Divergence(NamedTuple):
    """Which one, and of what."""

    kind: str  # of DIVERGENCES
    beta: float  # of jsd, the teacher's share of the mixture
    floor: float  # of log q, -inf for none
    softcap: float | None
    ref_softcap: float | None


class Pair(NamedTuple):
    """Rows of both, and what is known of them."""

    logits: Tensor  # [O, I, V]
    ref_logits: Tensor  # [O, I, V]
    target: Tensor  # [N]; IGNORE for a row that is never read
    temperature: Tensor  # [N]
    ref_temperature: Tensor  # [N]
    divergence: Divergence


class PairStats(NamedTuple):
    """The statistics of rows [n]."""

    logprob: Tensor
    entropy: Tensor
    top1_prob: Tensor
    ref_logprob: Tensor
    divergence: Tensor


# What a loss makes of the statistics of these rows among the N.
Score = Callable[[Tensor | slice, PairStats], Grads]


def offset_of(state: Tensor, ref_state: Tensor, target: Tensor) -> Tensor:
    """log (Σ exp d of the teacher / that of the student), [N]; 0 where IGNORE."""
    return (state[1] / ref_state[1]).log().where(target != IGNORE, 0.0)


def finish(sums: Tensor, offset: Tensor, divergence: Divergence) -> Tensor:
    """Return [PAIR_STATE, N] from the sums [PAIR_SUMS, N] of whole rows."""
    excess, value, student_kl, others, of_others = sums
    correction = excess.log1p()
    of_others = of_others - (divergence.beta if divergence.kind == "jsd" else 1.0) * correction * others
    if divergence.kind != "jsd":  # there it cancels
        value = value - (excess - correction)
        # where the divergence is infinite, so that it has no gradient
        student_kl = value.masked_fill(value.isposinf(), math.nan)
    nan = ~offset.isfinite()  # a row that is banned as a whole has no normaliser, and is no number
    value, student_kl = (x.masked_fill(nan, math.nan) for x in (value, student_kl))
    return torch.stack((value, offset + correction, student_kl, others, of_others))


def with_nan(grads: Grads, value: Tensor) -> Grads:
    """The gradients of rows [n] of these divergences: NaN for one that is no number, if it is in the loss."""
    g = grads[2]
    return grads[0], grads[1], g.masked_fill(value.isnan() & (g != 0), math.nan)


def within(rows: Tensor | slice, some: Tensor) -> Tensor:
    """Some of the rows: their places among what the rows are places of."""
    found: Tensor = some + rows.start if isinstance(rows, slice) else rows[some]
    return found


def with_gradient(grads: Grads) -> Tensor:
    """The rows with a gradient; NaN is one."""
    return ((grads[0] != 0) | (grads[1] != 0) | (grads[2] != 0)).nonzero()[:, 0]
