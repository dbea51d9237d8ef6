"""Divergences that lose no digits: rows of student and teacher entry by entry, in float64.

Differences of logarithms, of which nearly equal policies are made, keep digits to spare there. What is left
of the normalisers' rounding, which came before, is the sum of q - p, see kernels/divergence.py.

Sizes: k rows, V vocabulary entries: of whole rows, or of a piece of each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aer_fast._rows.pairs import Divergence, Pair
from aer_fast._rows.strips import softcapped, sum_of

CPU_ENTRIES, DEVICE_ENTRIES = 1 << 19, 1 << 23  # float64 entries at a time


def rows_of(V: int, on_cpu: bool) -> int:
    """Rows at a time."""
    return max(1, (CPU_ENTRIES if on_cpu else DEVICE_ENTRIES) // max(1, V))


class Space:
    """Buffers for some rows, made when they are needed."""

    def __init__(self, pair: Pair) -> None:
        most = rows_of(pair.logits.shape[-1], pair.logits.device.type == "cpu")
        self.rows, self.like = min(most, max(1, pair.target.numel())), pair.temperature
        self.buffers: Tensor | None = None

    def of(self, k: int, V: int) -> tuple[Tensor, ...]:
        """Six [k, V]."""
        if self.buffers is None:
            self.buffers = self.like.new_empty(6, self.rows, V, dtype=torch.float64)
        return self.buffers[:, :k].unbind()


class Careful:
    """Some rows; log_p, log_q, p and q are off by the rounding of the normalisers alone.

    A softcap is not what it was in float32, and so the normalisers of ``whole`` rows are made anew.
    """

    def __init__(
        self,
        pair: Pair,
        rows: Tensor,  # [k], which of the N
        state: Tensor,  # [STATE, k]
        ref_state: Tensor,  # [STATE, k]
        space: Space,
        *,
        whole: bool = False,
    ) -> None:
        which, I = pair.divergence, pair.logits.shape[1]
        self.log_p, self.log_q, self.p, self.q, self.x, self.y = space.of(len(rows), pair.logits.shape[-1])
        student = self.log_p, pair.logits, pair.temperature, which.softcap, state
        teacher = self.log_q, pair.ref_logits, pair.ref_temperature, which.ref_softcap, ref_state
        for out, logits, temperature, softcap, (m, inv_s, *_) in (student, teacher):
            out.copy_(logits[rows // I, rows % I])
            if softcap is not None:
                out.copy_(softcapped(out, softcap, self.x))
            tau, log_s = temperature[rows].double(), -inv_s.double().log()
            out.sub_((m + tau * log_s).unsqueeze(-1))
            if out.device.type != "cpu" or (tau != 1).any():
                out.mul_(1.0 / tau.unsqueeze(-1))
        for log_x, x, softcap in (
            (self.log_p, self.p, which.softcap),
            (self.log_q, self.q, which.ref_softcap),
        ):
            torch.exp(log_x, out=x)
            if whole and softcap is not None:
                total = sum_of(x).unsqueeze(-1)
                log_x.sub_(total.log())
                x.div_(total)
        self.offset = (state[1].double() / ref_state[1].double()).log()  # where `offset_of` is rounded
        self.banned: Tensor | None = None  # what the student bans, if anybody bans anything
        self.ref_banned: Tensor | None = None
        # where the largest p is, and which of them are above 1/2; None if none is
        self.top: tuple[Tensor, Tensor] | None = None
        if pair.logits.device.type != "cpu" or (state[1] > 0.5).any():
            column = self.p.argmax(-1, keepdim=True)
            self.top = column, self.p.gather(-1, column) > 0.5
        logs = self.log_p, self.log_q
        if pair.logits.device.type != "cpu" or any((x.amin(-1) == -torch.inf).any() for x in logs):
            self.banned, self.ref_banned = (x == -torch.inf for x in logs)

    def gap(self, correction: Tensor | None, floor: float) -> Tensor:
        """-δ = log p - log q of a log q of at least ``floor``; 0 where one of them bans for all that."""
        gap = torch.sub(self.log_p, self.log_q, out=self.x)
        if correction is not None:
            gap += correction.unsqueeze(-1)
        if floor > -math.inf:
            gap = torch.minimum(gap, torch.sub(self.log_p, floor, out=self.y), out=self.x)
        else:
            zeroed(gap, self.ref_banned)
        return zeroed(gap, self.banned)

    def log_mixture(self, by_q: Tensor, by_p: float) -> Tensor:
        """log m of m = by_q q + by_p p; finite where that is 0."""
        mixture = torch.mul(self.q, by_q.unsqueeze(-1), out=self.x).add_(self.p, alpha=by_p)
        return mixture.clamp_(min=torch.finfo(mixture.dtype).tiny).log_()

    def of_others(self, product: Tensor, total: Tensor) -> Tensor:
        """The sum of a product over the entries with p <= 1/2, in place; its total where all of them are."""
        if self.top is None:
            return total
        column, sure = self.top
        return sum_of(product.scatter_(-1, column, product.gather(-1, column).masked_fill_(sure, 0.0)))

    def sums(self, which: Divergence) -> Tensor:
        """[PAIR_SUMS, k]."""
        total = sum_of(self.p)
        excess = sum_of(self.q) - total
        others = self.of_others(self.p if self.top is None else self.x.copy_(self.p), total)
        of_student, of_others = torch.zeros_like(excess), torch.zeros_like(excess)
        one: Tensor | None  # where it bans and `other` does not, the divergence is infinite
        one, other = self.banned, self.ref_banned
        if which.kind == "reverse_kl":  # Σ q - p - p δ
            product = self.gap(None, which.floor).mul_(self.p)
            total = sum_of(product)
            divergence, of_others = excess + total, -self.of_others(product, total)
            one, other = None if which.floor > -math.inf else self.ref_banned, self.banned
        elif which.kind == "forward_kl":  # Σ p - q + q δ
            divergence = -excess - sum_of(self.gap(None, -math.inf).mul_(self.q))
        else:  # with a = log(m / p), b = log(m / q): Σ -β q b - (1 - β) p a, and Σ m - p - p a
            log_m = self.log_mixture(torch.full_like(excess, which.beta), 1 - which.beta)
            product = zeroed(torch.sub(log_m, self.log_p, out=self.y), self.banned).mul_(self.p)
            of_p = sum_of(product)
            of_others = self.of_others(product, of_p)
            of_q = sum_of(zeroed(torch.sub(log_m, self.log_q, out=self.y), self.ref_banned).mul_(self.q))
            divergence = -which.beta * of_q - (1 - which.beta) * of_p
            of_student, one = which.beta * excess - of_p, None
        if one is not None and other is not None:
            divergence.masked_fill_((one & ~other).any(-1), torch.inf)
        return torch.stack((excess, divergence, of_student, others, of_others))

    def grad(self, which: Divergence, pair_state: Tensor) -> Tensor:
        """The gradient of the divergence by the student's softcapped logits over τ, [k, V]."""
        correction = pair_state[1] - self.offset  # to be subtracted from δ
        right = correction.neg().exp()
        if which.kind == "reverse_kl":  # -p (δ + KL)
            unit = self.bracket(self.gap(correction, which.floor).neg_(), pair_state).mul_(self.p).neg_()
        elif which.kind == "forward_kl":  # p - q
            unit = torch.mul(self.q, -right.unsqueeze(-1), out=self.x).add_(self.p)
        else:  # -(1 - β) p (a + KL(p‖m))
            log_m = self.log_mixture(which.beta * right, 1 - which.beta)
            unit = self.bracket(log_m.sub_(self.log_p), pair_state).mul_(self.p).mul_(which.beta - 1)
        return zeroed(unit, self.banned)

    def bracket(self, gain: Tensor, pair_state: Tensor) -> Tensor:
        """δ + KL(p‖q) or a + KL(p‖m), in place; of a p above 1/2 from the other entries."""
        _, _, student_kl, others, of_others = pair_state.unsqueeze(-1)
        if self.top is None:
            return gain.add_(student_kl)
        column, sure = self.top
        own = gain.gather(-1, column)
        own = torch.where(sure, others * own - of_others, own + student_kl)
        return gain.add_(student_kl).scatter_(-1, column, own)


def zeroed(x: Tensor, banned: Tensor | None) -> Tensor:
    """x with 0 where banned, in place."""
    return x if banned is None else x.masked_fill_(banned, 0.0)
