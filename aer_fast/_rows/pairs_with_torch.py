"""The operations on pairs in torch, a tile of rows at a time: impl="torch", on any device.

A divergence that is not small is a plain sum over the buffers of `with_torch`. Rows where it is small, or
where an entry is banned, and all of jsd, are made by the formulas of kernels/divergence.py, which lose no
digits but take many passes.

Sizes: N = O · I tokens, V vocabulary entries, n rows of a tile, k of its rows that are made with care.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from aer_fast._rows import sums
from aer_fast._rows.pairs import (
    Divergence,
    Grads,
    Pair,
    PairStats,
    Score,
    finish,
    offset_of,
    with_gradient,
    within,
)
from aer_fast._rows.with_torch import Tile, softcapped, sum_of, tiles, zero_masked
from aer_fast.kernels.layout import IGNORE, PAIR_SUMS

CARE = 1 / 32  # divergence below which a plain sum has lost too many digits
SMALL = 0.5  # |δ| below which exp(δ) - 1 - δ is a series
BANNED = -1e30  # d of an entry that is -inf: finite, for it is multiplied by 0
# Entries, on a CPU and elsewhere, of a tile, of which there are six buffers; and of a piece made with care.
TILE, CAREFUL_TILE = (1 << 20, 1 << 24), (1 << 18, 1 << 24)


def pair_sums(pair: Pair, state: Tensor, ref_state: Tensor, offset: Tensor) -> Tensor:
    found = pair.temperature.new_zeros(len(PAIR_SUMS), pair.target.numel())
    if pair.logits.shape[-1] == 0:
        return found
    for o, rows, tile in tiles(pair.logits, pair.target != IGNORE, found.dtype, 2, entries=CAREFUL_TILE):
        both = Both.of(pair, o, tile.at, rows, state[:, rows], ref_state[:, rows], offset[rows])
        found[:, rows] = both.sums(pair.divergence)
    return found


def pair_bwd(
    pair: Pair,
    state: Tensor,
    ref_state: Tensor,
    pair_state: Tensor,
    grads: Grads,
    grad: Tensor,
    picked: Tensor | None = None,
) -> None:
    if pair.logits.shape[-1] == 0:
        return
    live, dtype, softcap = pair.target != IGNORE, pair.temperature.dtype, pair.divergence.softcap
    done = 0
    for o, rows, tile in tiles(pair.logits, live, dtype, 2, picked, entries=CAREFUL_TILE):
        both = Both.of(pair, o, tile.at, rows, state[:, rows], ref_state[:, rows], pair_state[1, rows])
        g_logprob, g_entropy, g_divergence = (g[rows].unsqueeze(-1) for g in grads)
        _, _, mean_d, p_others = (x.unsqueeze(-1) for x in state[:, rows])
        target = pair.target[rows].unsqueeze(-1)
        here = (target >= 0) & (target < both.p.shape[-1])
        column = target.where(here, 0)
        by_logprob = -both.p
        by_logprob.scatter_(-1, column, p_others.where(here, by_logprob.gather(-1, column)))
        dz = g_logprob * by_logprob - g_entropy * both.p * (both.d - mean_d)
        dz += (g_divergence * both.grad(pair.divergence, pair_state[2, rows])).where(g_divergence != 0, 0.0)
        dz = tile.capped(dz.div_(pair.temperature[rows].unsqueeze(-1)), softcap)
        dz = dz.masked_fill_(both.banned, 0.0)
        if picked is None:
            tile.store(grad[o], dz)
        else:
            grad[o, done : done + len(dz)] = dz
            done += len(dz)
    if picked is None:
        zero_masked(grad, live)


def pair_loss(pair: Pair, score: Score, grad: Tensor | None, *, compact: bool) -> Tensor | None:
    which, live = pair.divergence, pair.target != IGNORE
    on_cpu, V = pair.logits.device.type == "cpu", pair.logits.shape[-1]
    always = not on_cpu or which.kind == "jsd" or which.floor > -math.inf
    at_once = max(1, CAREFUL_TILE[0 if on_cpu else 1] // max(1, V))
    kept, done = [pair.target[:0]], 0
    teachers = torch.empty(0)
    for o, rows, tile in tiles(pair.logits, live, pair.temperature.dtype, 3, entries=TILE, lowest=BANNED):
        if teachers.numel() < 3 * tile.d.numel():  # a sequence may have more live rows than the one before
            teachers = tile.d.new_empty(3, *tile.d.shape)
        teacher = Tile(pair.ref_logits[o], tile.at, teachers, BANNED)
        target, temperature, ref_temperature = (x[rows] for x in pair[2:5])
        logprob, entropy, state = sums.finish(tile.sums(target, temperature, which.softcap), temperature)
        ref_sums = teacher.sums(target, ref_temperature, which.ref_softcap)
        ref_logprob, _, ref_state = sums.finish(ref_sums, ref_temperature)
        offset = offset_of(state, ref_state, target)

        care = torch.arange(tile.n, device=target.device)
        found = offset.new_zeros(3, tile.n)
        if not always:
            plain = Plain(tile, teacher, state, ref_state, offset, which)
            found = torch.stack((plain.value, offset, plain.value))
            care = ((plain.value < CARE) | plain.bans).nonzero()[:, 0]
        pieces = [few for few in torch.split(care, at_once) if len(few)]
        units = []
        for few in pieces:
            at = within(tile.at, few), within(rows, few)
            both = Both.of(pair, o, *at, state[:, few], ref_state[:, few], offset[few])
            found[:, few] = finish(both.sums(which), offset[few], which)
            if grad is not None:
                both = both._replace(delta=both.shifted(found[1, few] - offset[few]))
                units.append(both.grad(which, found[2, few]))
        grads = score(rows, PairStats(logprob, entropy, state[1], ref_logprob, found[0]))
        if grad is None:
            continue

        g = grads[2] / temperature
        dz = teacher.d if always else plain.grad(g)
        for few, unit in zip(pieces, units):
            dz[few] = unit.mul_(g[few].unsqueeze(-1)).where(g[few].unsqueeze(-1) != 0, 0.0)
        if not on_cpu or (grads[0].count_nonzero() + grads[1].count_nonzero()).item():
            dz += tile.grad_of_capped(state, grads[0], grads[1], temperature)
        dz = tile.capped(dz, which.softcap)
        if compact:
            active = with_gradient(grads)
            grad[o, done : done + len(active)] = dz if len(active) == tile.n else dz[active]
            kept.append(within(rows, active))
            done += len(active)
        else:
            tile.store(grad[o], dz)
    if grad is not None and not compact:
        zero_masked(grad, live)
    return torch.cat(kept) if compact else None


class Plain:
    """Rows whose divergence is a plain sum: E_p[log p - log q] or E_q[log q - log p]."""

    def __init__(
        self,
        tile: Tile,
        teacher: Tile,
        state: Tensor,  # [STATE, n]
        ref_state: Tensor,  # [STATE, n]
        offset: Tensor,  # [n]
        which: Divergence,
    ) -> None:
        self.student, self.teacher, self.forward = tile, teacher, which.kind == "forward_kl"
        self.inv_s, self.ref_inv_s, self.offset = state[1], ref_state[1], offset
        for one in (tile, teacher):  # its target was left out of its sum
            one.put_at_target(one.e, one.at_target(one.d).exp())
        difference = teacher.d.sub_(tile.d)  # δ + offset
        self.bans = (tile.d.amin(-1) <= BANNED) | (difference.amin(-1) <= BANNED / 2)
        e = teacher.e if self.forward else tile.e
        total = sum_of(torch.mul(e, difference, out=tile.spare[0]))
        self.value = total * self.ref_inv_s - offset if self.forward else offset - total * self.inv_s  # [n]

    def grad(self, g: Tensor) -> Tensor:
        """g [n] times the gradient of the divergence by the logits over τ, [n, V], in a buffer."""
        if self.forward:  # p - q
            dz: Tensor = self.teacher.e.mul_((-g * self.ref_inv_s).unsqueeze(-1))
            dz.addcmul_(self.student.e, (g * self.inv_s).unsqueeze(-1))
            return dz
        factor = -g * self.inv_s
        shift = factor * (self.value - self.offset)
        difference: Tensor = self.teacher.d
        torch.addcmul(shift.unsqueeze(-1), difference, factor.unsqueeze(-1), out=difference)
        difference.mul_(self.student.e)  # - p (δ + KL)
        return difference


class Both(NamedTuple):
    """Rows of student and teacher entry by entry, [k, V], as in kernels/divergence.py."""

    p: Tensor
    q: Tensor
    delta: Tensor  # log q - log p; 0 where one of them bans
    d: Tensor  # log p but for the normaliser
    log_p: Tensor
    banned: Tensor  # by the student
    ref_banned: Tensor

    @classmethod
    def of(
        cls,
        pair: Pair,
        o: int,
        at: Tensor | slice,  # the rows of [I]
        rows: Tensor | slice,  # and of [N]
        state: Tensor,  # [STATE, k]
        ref_state: Tensor,  # [STATE, k]
        offset: Tensor,  # [k]
    ) -> "Both":
        dtype, which = pair.temperature.dtype, pair.divergence
        y, u = pair.logits[o][at].to(dtype), pair.ref_logits[o][at].to(dtype)
        y = y if which.softcap is None else softcapped(y, which.softcap, torch.empty_like(y))
        u = u if which.ref_softcap is None else softcapped(u, which.ref_softcap, torch.empty_like(u))
        m, inv_s, ref_m, ref_inv_s = (x.unsqueeze(-1) for x in (*state[:2], *ref_state[:2]))
        inv, ref_inv = (1.0 / x[rows].unsqueeze(-1) for x in (pair.temperature, pair.ref_temperature))
        banned, ref_banned = y == -torch.inf, u == -torch.inf
        y, u = torch.where(banned, m, y), torch.where(ref_banned, ref_m, u)
        d = (y - m) * inv
        p = (d.exp() * inv_s).masked_fill_(banned, 0.0)
        q = ((u - ref_m).mul_(ref_inv).exp_() * ref_inv_s).masked_fill_(ref_banned, 0.0)
        delta = u.sub_(y).sub_(ref_m - m).mul_(ref_inv)
        delta = delta.add_((y - m) * (ref_inv - inv)).sub_(offset.unsqueeze(-1))
        delta = delta.masked_fill_(banned | ref_banned, 0.0)
        return cls(p, q, delta, d, d + inv_s.log(), banned, ref_banned)

    def shifted(self, correction: Tensor) -> Tensor:
        """δ with another offset."""
        shift = correction.unsqueeze(-1).expand_as(self.delta)
        return self.delta - shift.masked_fill(self.banned | self.ref_banned, 0.0)

    @property
    def small(self) -> Tensor:
        return (self.delta.abs() < SMALL) & (self.p > 0) & (self.q > 0)

    def floored(self, floor: float) -> Tensor:
        """δ with a log q of at least ``floor``, -inf where there is none; 0 where the student bans."""
        delta = self.delta.masked_fill(self.ref_banned, -torch.inf)
        if floor > -math.inf:
            delta = torch.where(delta + self.log_p < floor, floor - self.log_p, delta)
        return delta.masked_fill_(self.banned, 0.0)

    def sums(self, which: Divergence) -> Tensor:
        """[PAIR_SUMS, k]."""
        p, q, small = self.p, self.q, self.small
        near = self.delta.where(small, 0.0)
        remainder = exp_remainder(near)
        growth = near + remainder  # exp(δ) - 1
        excess, student_kl = torch.where(small, p * growth, q - p), torch.zeros_like(p)
        if which.kind == "reverse_kl":
            delta = self.floored(which.floor)
            small = small & (delta == self.delta)
            far = q - p - p * delta
            far = far.masked_fill_(self.ref_banned & ~self.banned & (delta == -torch.inf), torch.inf)
            divergence = torch.where(small, p * remainder, far)
        elif which.kind == "forward_kl":  # q (exp(-δ) - 1 + δ)
            divergence = torch.where(small, p * (near * growth - remainder), p - q + q * self.delta)
            divergence = divergence.masked_fill_(self.banned & ~self.ref_banned, torch.inf)
        else:  # with a = log(m / p), b = log(m / q): β q (exp(b) - 1 - b) + (1 - β) p (exp(a) - 1 - a)
            beta, a = which.beta, self.log_mixture(which.beta)
            mixture = beta * q + (1 - beta) * p
            b = torch.where(small, a - near, quotient(mixture, q).log())
            of_p, of_q = exp_remainder(a.where(small, 0.0)), exp_remainder(b.where(small, 0.0))
            student_kl = torch.where(small, p * of_p, mixture - p - p * a)
            far = -beta * q * b - (1 - beta) * p * a
            divergence = torch.where(small, beta * q * of_q + (1 - beta) * p * of_p, far)
        return torch.stack([sum_of(x) for x in (excess, divergence, student_kl)])

    def grad(self, which: Divergence, student_kl: Tensor) -> Tensor:
        """The gradient of the divergence by the student's softcapped logits over τ, [k, V]."""
        student_kl = student_kl.unsqueeze(-1)
        if which.kind == "reverse_kl":
            unit = -self.p * (self.floored(which.floor) + student_kl)
        elif which.kind == "forward_kl":
            growth = torch.expm1(self.delta.where(self.small, 0.0))
            unit = torch.where(self.small, -self.p * growth, self.p - self.q)
        else:
            unit = (which.beta - 1) * self.p * (self.log_mixture(which.beta) + student_kl)
        return unit.masked_fill_(self.banned, 0.0)

    def log_mixture(self, beta: float) -> Tensor:
        """log(m / p) of m = β q + (1 - β) p; 0 where p is 0."""
        near = torch.log1p(beta * torch.expm1(self.delta.where(self.small, 0.0)))
        far = quotient(beta * self.q + (1 - beta) * self.p, self.p).log()
        return torch.where(self.small, near, far).where(self.p > 0, 0.0)


def quotient(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 1 where one of them is 0."""
    return (part / whole).where((whole > 0) & (part > 0), 1.0)


def exp_remainder(x: Tensor) -> Tensor:
    """exp(x) - 1 - x for |x| <= 1/2, with full relative accuracy."""
    total = torch.full_like(x, 1.0 / math.factorial(_TERMS[x.dtype] + 1))
    for k in range(_TERMS[x.dtype], 1, -1):
        total.mul_(x).add_(1.0 / math.factorial(k))
    return total.mul_(x).mul_(x)


_TERMS = {torch.float32: 9, torch.float64: 15}  # what is left out is less than a rounding
