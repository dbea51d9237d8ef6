"""The operations on pairs in torch, a strip of rows at a time: impl="torch", on any device.

A divergence that is not small is a plain sum. Rows where it is small, or where an entry is banned, are made
with care (`careful`), and so are all rows off the CPU, where telling them apart would wait for the device.

Sizes: N = O · I tokens, V vocabulary entries, n rows that are computed, r rows of a strip, k rows with care.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from aer_fast._rows import sums
from aer_fast._rows.careful import Careful, Space
from aer_fast._rows.pairs import Grads, Pair, PairStats, Score, finish, with_gradient
from aer_fast._rows.strips import (
    Rows,
    Strip,
    Targets,
    exp_of,
    factor_of,
    largest,
    relative,
    slope,
    sum_of,
    zero_masked,
)
from aer_fast._rows.sums import UNREACHABLE
from aer_fast.kernels.layout import IGNORE, PAIR_SUMS

CARE = 1 / 32  # divergence below which a plain sum has lost too many digits
CPU_HELD, DEVICE_HELD = 1 << 22, 1 << 26  # entries of gradients that are held until their rows are scored


def rows_of(V: int, on_cpu: bool) -> int:
    """Rows whose gradients are held."""
    return max(1, (CPU_HELD if on_cpu else DEVICE_HELD) // max(1, V))


def pair_sums(pair: Pair, state: Tensor, ref_state: Tensor, offset: Tensor) -> Tensor:
    found = pair.temperature.new_zeros(len(PAIR_SUMS), pair.target.numel())
    if pair.logits.shape[-1] > 0:
        space = Space(pair)
        for few in Rows.live(pair.logits, pair.target != IGNORE).indices().split(space.rows):
            if len(few):
                both = Careful(pair, few, state[:, few], ref_state[:, few], space)
                found[:, few] = both.sums(pair.divergence).to(found.dtype)
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
    live, which = pair.target != IGNORE, pair.divergence
    rows, space, done = Rows.live(pair.logits, live, picked), Space(pair), 0
    for few in rows.indices().split(space.rows):
        if len(few) == 0:
            continue
        both = Careful(pair, few, state[:, few], ref_state[:, few], space)
        unit = both.grad(which, pair_state[:, few].double())
        g_logprob, g_entropy, g_divergence = (g[few].unsqueeze(-1) for g in grads)
        _, inv_s, mean_d, p_others = (x.unsqueeze(-1) for x in state[:, few].double())
        target = pair.target[few].unsqueeze(-1)
        here = (target >= 0) & (target < both.p.shape[-1])
        column = target.where(here, 0)
        by_logprob = -both.p
        by_logprob.scatter_(-1, column, p_others.where(here, by_logprob.gather(-1, column)))
        dz = g_logprob * by_logprob - g_entropy * both.p * (both.log_p - inv_s.log() - mean_d)
        dz += (g_divergence * unit).where(g_divergence != 0, 0.0)
        dz /= pair.temperature[few].unsqueeze(-1)
        o, i = few // grad.shape[1], few % grad.shape[1]
        if which.softcap is not None:
            dz *= slope(pair.logits[o, i].double(), which.softcap, None)
        if both.banned is not None:
            dz.masked_fill_(both.banned, 0.0)
        if picked is None:
            grad[o, i] = dz.to(grad.dtype)
        else:
            grad[0, done : done + len(few)] = dz
            done += len(few)
    if picked is None:
        zero_masked(grad, live)


def pair_loss(pair: Pair, score: Score, grad: Tensor | None, *, compact: bool) -> Tensor | None:
    live = pair.target != IGNORE
    rows = Rows.live(pair.logits, live)
    kept, done, group = [pair.target[:0]], 0, Group(pair, rows)
    for part in group.parts():
        some = rows.at(part)
        grads = score(some.chosen, group.statistics(part, with_gradient=grad is not None))
        if grad is None:
            continue
        active = torch.arange(some.n, device=live.device)
        if compact or rows.on_cpu:
            active = with_gradient(grads)
        kept.append(some.indices()[active])
        if len(active):
            all_of_them = not (compact or rows.on_cpu)
            written = some if all_of_them else Rows(pair.logits, kept[-1], packs=compact)
            place = grad[:, done:] if compact else grad
            group.write(written, part.start + active, (g[active] for g in grads), place)
        done += len(active)
    found = torch.cat(kept)
    if compact:
        return found
    if grad is not None:
        zero_masked(grad, torch.zeros_like(live).index_fill_(0, found, True) if rows.on_cpu else live)
    return None


class Group:
    """Rows of a student and its teacher, and what is known of them: vectors [n].

    In a strip d, e and x are buffers of the student, u and f of the teacher: d = (y - m) / τ and e = exp d of
    the softcapped logits y, likewise u and f. The plain gradient of the divergence by y / τ is

        e (a + b G),   G = u - d for reverse_kl and log m - d, of the mixture m, for jsd;
        e a + f b      for forward_kl.
    """

    def __init__(self, pair: Pair, rows: Rows) -> None:
        self.pair, self.rows, self.which = pair, rows, pair.divergence
        self.target, self.temperature, self.ref_temperature = (rows.of(x) for x in pair[2:5])
        self.plain = rows.on_cpu and self.which.floor == -math.inf
        self.space = Space(pair)
        if rows.n:
            self.sum_up()

    def parts(self) -> Iterator[slice]:
        """The rows, as many at a time as their gradients that are made with care can be held."""
        most, n = rows_of(self.pair.logits.shape[-1], self.rows.on_cpu), self.rows.n
        ends = list(range(most, n, most))
        if self.plain and n:
            ends = self.lost.nonzero()[:, 0][most::most].tolist()
        for start, end in pairwise([0, *ends, n]) if n else ():
            yield slice(start, end)

    def strips(self, rows: Rows) -> Iterator[tuple[Strip, Strip]]:
        d, e, x, u, f = rows.buffers(self.temperature.dtype, 5)
        return zip(rows.strips(d, e, x), rows.like(self.pair.ref_logits).strips(u, f, x))

    def sum_up(self) -> None:
        rows, which, dtype = self.rows, self.which, self.temperature.dtype
        at_target = Targets.of(rows, self.target, dtype, which.softcap)
        ref_target = Targets.of(rows.like(self.pair.ref_logits), self.target, dtype, which.ref_softcap)
        factor, ref_factor, parts = factor_of(self.temperature), factor_of(self.ref_temperature), []
        for one, other in self.strips(rows):
            m = fill(one, None, factor, which.softcap)
            ref_m = fill(other, None, ref_factor, which.ref_softcap)
            d, e, u, f, x = one.d, one.e, other.d, other.e, one.x
            total = m[:, 0]
            if self.plain and which.kind != "jsd":
                total = sum_of(torch.mul(e if which.kind == "reverse_kl" else f, u.sub_(d), out=u))
            at_target.zero(e, one.at)  # the target is left out of its own sum
            ref_target.zero(f, one.at)
            torch.mul(e, d.clamp_(min=UNREACHABLE), out=x)
            parts.append(torch.stack((m[:, 0], sum_of(e), sum_of(x), ref_m[:, 0], sum_of(f), total)))
        m, s, t, ref_m, ref_s, total = torch.cat(parts, -1)
        found = torch.stack((m, s, t, at_target.y))
        self.logprob, self.entropy, self.state = sums.finish(found, self.temperature)
        found = torch.stack((ref_m, ref_s, torch.zeros_like(ref_s), ref_target.y))
        self.ref_logprob, _, self.ref_state = sums.finish(found, self.ref_temperature)
        self.value = self.plain_value(total)
        self.lost = ~((self.value >= CARE) & self.value.isfinite())  # what a plain sum has lost

    def plain_value(self, total: Tensor) -> Tensor:
        """The divergence as a plain sum, NaN or infinite where an entry is banned; a, b of its gradient."""
        which, inv_s, ref_inv_s = self.which, self.state[1], self.ref_state[1]
        offset = (inv_s / ref_inv_s).log()  # of δ = u - d - offset
        value: Tensor
        if not self.plain:
            self.a, self.b, value = total.new_zeros(3, len(total))
        elif which.kind == "reverse_kl":  # -p (δ + KL)
            total = total * inv_s
            value, self.a, self.b = offset - total, inv_s * total, -inv_s
        elif which.kind == "forward_kl":  # p - q
            value, self.a, self.b = total * ref_inv_s - offset, inv_s, -ref_inv_s
        else:  # -(1 - β) p (log(m / p) + KL(p‖m)), with log p = d + log inv_s
            of_p, of_q = self.mixed()
            value = -which.beta * of_q - (1 - which.beta) * of_p
            self.b = (which.beta - 1) * inv_s
            self.a = -self.b * (of_p + inv_s.log())
        return value

    def mixed(self) -> tuple[Tensor, Tensor]:
        """Σ p log(m / p) and Σ q log(m / q), each [n]."""
        parts, inv_s, ref_inv_s = [], self.state[1], self.ref_state[1]
        for one, other in self.filled(self.rows, slice(None)):
            log_m = self.log_mixture(one, other, one.at, out=one.x)
            of_q = sum_of(torch.sub(log_m, other.d, out=other.d).mul_(other.e))
            parts.append(torch.stack((sum_of(log_m.sub_(one.d).mul_(one.e)), of_q)))
        of_p, of_q = torch.cat(parts, -1)
        return inv_s * of_p - inv_s.log(), ref_inv_s * of_q - ref_inv_s.log()

    def filled(self, rows: Rows, those: Tensor | slice) -> Iterator[tuple[Strip, Strip]]:
        """Strips of these among the group's rows, filled; without the teacher's e where nothing needs it."""
        m, ref_m = (x[0, those].unsqueeze(-1) for x in (self.state, self.ref_state))
        factor, ref_factor = (factor_of(x[those]) for x in (self.temperature, self.ref_temperature))
        for one, other in self.strips(rows):
            fill(one, m[one.at], factor, self.which.softcap)
            needs_exp = self.which.kind != "reverse_kl"
            fill(other, ref_m[one.at], ref_factor, self.which.ref_softcap, needs_exp=needs_exp)
            yield one, other

    def log_mixture(self, one: Strip, other: Strip, those: Tensor | slice, out: Tensor) -> Tensor:
        """log m of m = β q + (1 - β) p of these rows; finite where that is 0."""
        by_p = (1 - self.which.beta) * self.state[1, those].unsqueeze(-1)
        by_q = self.which.beta * self.ref_state[1, those].unsqueeze(-1)
        torch.mul(other.e, by_q, out=out).addcmul_(one.e, by_p).clamp_(min=torch.finfo(out.dtype).tiny).log_()
        return out

    def statistics(self, part: slice, *, with_gradient: bool) -> PairStats:
        """Of these rows; the gradients of those that are made with care are held."""
        lost = torch.arange(part.start, part.stop, device=self.value.device)
        lost = lost[self.lost[part]] if self.plain else lost
        index, V = self.rows.indices()[lost], self.pair.logits.shape[-1]
        self.slot = torch.full_like(self.target, -1)  # of a row its place among the held
        self.slot[lost] = torch.arange(len(lost), device=lost.device)
        self.held = self.value.new_empty(len(lost) if with_gradient else 0, V)
        for first in range(0, len(lost), self.space.rows):
            at = slice(first, first + self.space.rows)
            few = lost[at]
            states = self.state[:, few], self.ref_state[:, few]
            both = Careful(self.pair, index[at], *states, self.space, whole=True)
            pair_state = finish(both.sums(self.which), both.offset, self.which)
            self.value[few] = pair_state[0].to(self.value.dtype)
            if with_gradient:
                self.held[at] = both.grad(self.which, pair_state)
        found = self.logprob, self.entropy, self.state[1], self.ref_logprob, self.value
        return PairStats(*(x[part] for x in found))

    def write(self, rows: Rows, those: Tensor, grads: Iterable[Tensor], grad: Tensor) -> None:
        """Write the gradients of these rows, ``those`` of the n."""
        tau, state, softcap = self.temperature[those], self.state[:, those], self.which.softcap
        g, h, c = grads
        bonus = not rows.on_cpu or bool(((g != 0) | (h != 0)).any())
        at_target = Targets.of(rows, self.target[those], tau.dtype, softcap)
        of_unit, sure = c / tau, self.sure_of(rows, those, at_target)
        columns = self.a[those] * of_unit, self.b[those] * of_unit, *by_statistics(state, g / tau, h / tau)
        of_e, of_other, of_1, of_d = (x.unsqueeze(-1) for x in columns)
        found = []
        for one, other in self.filled(rows, those):
            at, dz = one.at, one.place(grad, softcap)
            d, e, x, u = one.d, one.e, one.x, other.d
            if self.which.kind == "jsd":
                self.log_mixture(one, other, those[at], out=u).sub_(d)
            elif self.which.kind == "reverse_kl":
                u.sub_(d)
            if bonus:
                torch.mul(e, d.clamp_(min=UNREACHABLE).mul_(of_d[at]).add_(of_1[at]), out=x)
            if self.which.kind == "forward_kl":
                torch.mul(e, of_e[at], out=dz).addcmul_(other.e, of_other[at])
            else:
                torch.mul(e, u.mul_(of_other[at]).add_(of_e[at]), out=dz)
            if sure is not None:
                balance(dz, *(x[at] for x in sure))
            if len(self.held):
                self.put_with_care(dz, those[at], of_unit[at])
            if bonus:
                found.append(dz.gather(-1, at_target.column[at])[:, 0])
                dz.add_(x)
            one.store(grad, dz, softcap)
        if bonus:
            at_target.put(rows, grad, at_target.grads(state, g, h, tau, more=torch.cat(found)))

    def sure_of(self, rows: Rows, those: Tensor, at_target: Targets) -> tuple[Tensor, Tensor] | None:
        """Where p > 1/2: which of these rows have such an entry, and its column [n, 1]; None if none has."""
        m, inv_s = self.state[0, those], self.state[1, those]
        sure, column = inv_s > 0.5, at_target.column.clone()  # inv_s is the largest p
        if not self.plain or self.which.kind == "forward_kl" or not sure.any():
            return None
        o, i = rows.places()
        for few in (sure & (at_target.y != m)).nonzero()[:, 0].split(self.space.rows):
            if len(few):
                column[few] = rows.logits[o[few], i[few]].argmax(-1, keepdim=True)
        return sure, column

    def put_with_care(self, dz: Tensor, those: Tensor, g: Tensor) -> None:
        """Overwrite rows of dz [r, V] by their own gradients times g [r], where these are held."""
        slot = self.slot[those]
        few = (slot >= 0).nonzero()[:, 0] if self.rows.on_cpu else torch.arange(len(slot), device=slot.device)
        if len(few):
            g = g[few].unsqueeze(-1)
            scaled = self.held[slot[few]].mul_(g)
            dz[few] = scaled.masked_fill_(g == 0, 0.0)  # an infinite divergence has a gradient of NaN


def balance(dz: Tensor, sure: Tensor, column: Tensor) -> None:
    """Make the entry in these columns of dz [r, V] what all others add up to, in the rows that are sure.

    The gradient p (δ + KL) of a p near 1 cancels, and what is left is rounding; that of the others is not.
    """
    own = dz.gather(-1, column)[:, 0]
    dz.scatter_(-1, column, own.masked_fill(sure, 0.0).unsqueeze(-1))
    others = sum_of(dz)
    dz.scatter_(-1, column, torch.where(sure, -others, own).unsqueeze(-1))


def by_statistics(state: Tensor, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """g · ∂logprob + h · ∂entropy is e (a + b d) but for the target: a and b, each [n]."""
    _, inv_s, mean_d, _ = state
    return inv_s * (h * mean_d - g), -inv_s * h


def fill(
    strip: Strip,
    m: Tensor | None,
    factor: Tensor | float | None,
    softcap: float | None,
    *,
    needs_exp: bool = True,
) -> Tensor:
    """Fill d with (y - m) / τ, as far as -inf where an entry is banned, and e with exp d; return m [r, 1]."""
    y = strip.softcapped(softcap)
    m = largest(y, strip.d.dtype) if m is None else m
    relative(y, m, strip.part(factor), strip.d)
    if needs_exp:
        exp_of(strip.d, strip.e)
    return m
