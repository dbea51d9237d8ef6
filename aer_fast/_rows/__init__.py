"""The row operations, behind which "torch" and "triton" stand: tensors [O, I, V] in, numbers a row out.

    with_torch     a strip of rows at a time, on any device: strips
    with_triton    the kernels
    sums           the statistics of a row from sums over its pieces
    compiled       what torch.compile sees of the operations from logits
    pairs          rows of a student and its teacher: their divergence; pairs_with_torch, with `careful` for
                   those that need float64, and pairs_with_triton

Sizes: N = O · I tokens, V vocabulary entries: of whole rows, or of a piece of each.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Protocol

from torch import Tensor

from aer_fast._policy_loss import PolicyLoss
from aer_fast._rows.pairs import Grads, Pair, Score


class RowOps(Protocol):
    """What an implementation offers. A target of IGNORE is a row that is never read.

    Sums run in float32, or in float64 where the logits are that: the dtype of temperature.
    """

    def row_sums(self, logits: Tensor, target: Tensor, temperature: Tensor, softcap: float | None) -> Tensor:
        """Return [SUMS, N]; a target is ELSEWHERE where the logits are a piece of the row without it."""

    def token_stats_fwd(
        self, logits: Tensor, target: Tensor, temperature: Tensor, softcap: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logprob [N], entropy [N] and state [STATE, N] of whole rows; 0 where IGNORE."""

    def token_stats_bwd(
        self,
        logits: Tensor,
        target: Tensor,
        temperature: Tensor,
        softcap: float | None,
        state: Tensor,
        grad_logprob: Tensor,
        grad_entropy: Tensor,
        grad: Tensor,
        picked: Tensor | None = None,
    ) -> None:
        """Write grad_logprob · ∂logprob + grad_entropy · ∂entropy to grad [O, I, V]; zeros where IGNORE.

        The logits may be some columns only of those that the state was made from; a target outside them is
        ELSEWHERE. With ``picked``, ascending indices of k rows, these alone are computed and their gradients
        written to the first k rows of grad, whose O is 1. grad may be the logits themselves. No columns at
        all are a piece, too.
        """

    def ppo_loss_fwd(
        self,
        logits: Tensor,
        target: Tensor,
        temperature: Tensor,
        softcap: float | None,
        loss: PolicyLoss,
        grad: Tensor | None,
    ) -> Tensor:
        """Return the loss's fields [FIELDS, N]; write its gradient by the logits to grad, if given.

        grad may be the logits themselves.
        """

    def ppo_loss_compact(
        self,
        logits: Tensor,
        target: Tensor,
        temperature: Tensor,
        softcap: float | None,
        loss: PolicyLoss,
        grad: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """As `ppo_loss_fwd`, but with the gradients of the k rows that have one in the first rows of grad.

        Its O is 1, and nothing is written to its other rows. Return the fields, and those k rows. grad may be
        the logits themselves on the CPU only.
        """

    def scale_grad(self, grad: Tensor, factor: Tensor) -> None:
        """Multiply grad by factor [] in place; nothing is read or written where it is 1."""


class PairOps(Protocol):
    """What an implementation offers. Sums run in the dtype of temperature."""

    def pair_sums(self, pair: Pair, state: Tensor, ref_state: Tensor, offset: Tensor) -> Tensor:
        """Return [PAIR_SUMS, N], from the states [STATE, N] of student and teacher and `offset_of` them.

        The logits may be some columns only of those that the states were made from: the sums of all pieces
        are added. 0 where IGNORE.
        """

    def pair_bwd(
        self,
        pair: Pair,
        state: Tensor,
        ref_state: Tensor,
        pair_state: Tensor,
        grads: Grads,
        grad: Tensor,
        picked: Tensor | None = None,
    ) -> None:
        """Write the gradient by the student's logits to grad [O, I, V], as `RowOps.token_stats_bwd`."""

    def pair_loss(self, pair: Pair, score: Score, grad: Tensor | None, *, compact: bool) -> Tensor | None:
        """Score every live row; write the gradients to grad [O, I, V], if given.

        With ``compact``, O is 1, and the k rows that have a gradient are returned, and theirs written to the
        first k of grad. grad may be the logits themselves, with ``compact`` on the CPU only.
        """


def row_ops(impl: str) -> RowOps:
    """Those of "torch" or "triton"; triton is imported only for its own."""
    if impl == "triton":
        from aer_fast._rows import with_triton

        return with_triton
    from aer_fast._rows import with_torch

    return with_torch


def pair_ops(impl: str) -> PairOps:
    """Those of "torch" or "triton"; triton is imported only for its own."""
    if impl == "triton":
        from aer_fast._rows import pairs_with_triton

        return pairs_with_triton
    from aer_fast._rows import pairs_with_torch

    return pairs_with_torch


def as_rows(logits: Tensor) -> Tensor:
    """View logits [..., V] as [O, I, V] with last stride 1; copied only if two strides can't say it."""
    V, lead = logits.shape[-1], logits.shape[:-1]
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    for k in range(max(1, len(lead))):
        with suppress(RuntimeError):  # unless these dimensions do not merge
            return logits.view(math.prod(lead[:k]), math.prod(lead[k:]), V)
    return logits.contiguous().view(1, math.prod(lead), V)
