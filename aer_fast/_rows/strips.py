"""The rows of logits that impl="torch" computes, a strip of a few rows at a time; what is done to a strip.

Sizes: N = O · I tokens, V vocabulary entries, n rows that are computed, r rows of a strip.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from aer_fast._rows.sums import UNREACHABLE

# Entries of a strip. On a CPU its buffers stay in the nearest cache, of 2 MiB a core, from one operation to
# the next: of 150,000 entries two rows, one for each of two threads.
CPU_STRIP, DEVICE_STRIP = 1 << 19, 1 << 26

# On a CPU torch gives a thread at least so many entries, and takes so many at once, or a divisor of that.
GRAIN, AT_ONCE = 1 << 15, 32

LN_2 = math.log(2)
LOG2_E = 1 / LN_2


class Rows:
    """Some rows of logits [O, I, V], a strip at a time."""

    def __init__(self, logits: Tensor, chosen: Tensor | slice, *, packs: bool = False) -> None:
        """``chosen`` of the N, ascending; with ``packs``, O is 1, and results go to as many first rows."""
        self.logits, self.on_cpu, self.packs = logits, logits.device.type == "cpu", packs
        self.chosen = as_slice(chosen) if self.on_cpu and isinstance(chosen, Tensor) else chosen
        self.n = length(self.chosen)
        self.most = rows_of(logits.shape[-1], self.on_cpu)  # rows of a strip, at most

    @classmethod
    def live(cls, logits: Tensor, live: Tensor, picked: Tensor | None = None) -> Rows:
        """Those that are picked, which are packed, else the live ones; off the CPU all stand for them."""
        if picked is not None:
            return cls(logits, picked, packs=True)
        return cls(logits, live.nonzero()[:, 0] if logits.device.type == "cpu" else slice(0, live.numel()))

    def like(self, logits: Tensor) -> Rows:
        """The same rows of other logits."""
        return Rows(logits, self.chosen, packs=self.packs)

    def at(self, part: slice) -> Rows:
        """Some of the n."""
        chosen = self.chosen
        if isinstance(chosen, slice):
            return Rows(
                self.logits, slice(chosen.start + part.start, chosen.start + part.stop), packs=self.packs
            )
        return Rows(self.logits, chosen[part], packs=self.packs)

    def indices(self) -> Tensor:
        chosen = self.chosen
        if isinstance(chosen, slice):
            return torch.arange(chosen.start, chosen.stop, device=self.logits.device)
        return chosen

    def of(self, values: Tensor) -> Tensor:
        """Of values [..., N] those of these rows."""
        found: Tensor = values[..., self.chosen]
        return found

    def buffers(self, dtype: torch.dtype, number: int) -> list[Tensor]:
        """Of a strip [r, V], with the room behind it that `exp2_of` takes."""
        r, V = min(self.n, self.most), self.logits.shape[-1]
        room = AT_ONCE * torch.get_num_threads() if self.on_cpu else 0
        flat = torch.empty(number, r * V + room, dtype=dtype, device=self.logits.device)
        return [x[: r * V].view(r, V) for x in flat]

    def places(self) -> tuple[Tensor, Tensor]:
        """Where in [O, I] they are."""
        index, I = self.indices(), self.logits.shape[1]
        return index // I, index % I

    def strips(self, *buffers: Tensor) -> Iterator[Strip]:
        O, I, _ = self.logits.shape
        if isinstance(self.chosen, slice):
            begin, stop = self.chosen.start, self.chosen.stop
            ends = [min(max((o + 1) * I, begin), stop) - begin for o in range(O)]
        else:  # off the CPU they are picked ones, of one O: nothing waits for the device
            ends = [self.n] if O == 1 else self.places()[0].bincount(minlength=O).cumsum(0).tolist()
        start = 0
        for o, end in enumerate(ends):
            logits = self.logits[o]
            for first in range(start, end, self.most):
                at = slice(first, min(first + self.most, end))
                if isinstance(self.chosen, slice):
                    shift = self.chosen.start - o * I
                    inner: Tensor | slice = slice(shift + at.start, shift + at.stop)
                else:
                    inner = self.chosen[at] - o * I if o else self.chosen[at]
                    inner = as_slice(inner) if self.on_cpu else inner
                r = at.stop - at.start
                space = list(buffers) if r == self.most else [x[:r] for x in buffers]
                yield Strip(self, o, at, logits, inner, space)
            start = end


class Strip:
    """Some of the rows, and the buffers they are worked on in: d, e and x, [r, V]."""

    def __init__(
        self, rows: Rows, o: int, at: slice, logits: Tensor, inner: Tensor | slice, buffers: list[Tensor]
    ) -> None:
        self.rows, self.o, self.at = rows, o, at  # which of the n
        self.logits, self.inner = logits, inner  # [I, V], and which of these
        self.d, self.e, *spare = buffers
        self.x = spare[0] if spare else self.e

    def part(self, column: Tensor | float | None) -> Tensor | float | None:
        """Of a column [n, 1] its own rows; a number stands for all."""
        return column[self.at] if isinstance(column, Tensor) else column

    def raw(self) -> Tensor:
        """The logits: a view where the rows are consecutive, else gathered, into d if of its dtype."""
        if isinstance(self.inner, slice):
            return self.logits[self.inner]
        if self.logits.dtype != self.d.dtype:
            return self.logits.index_select(0, self.inner)
        return torch.index_select(self.logits, 0, self.inner, out=self.d)

    def softcapped(self, softcap: float | None) -> Tensor:
        """The logits, in x where there is a softcap."""
        y = self.raw()
        if softcap is None:
            return y
        return softcapped(y if y is self.d else self.d.copy_(y), softcap, self.x)

    def place(self, grad: Tensor, softcap: float | None) -> Tensor:
        """The rows of the gradient themselves, if it may be made right there, else e."""
        if grad.dtype != self.d.dtype or softcap is not None:
            return self.e
        place = self.at if self.rows.packs else self.inner
        rows: Tensor = grad[self.o][place] if isinstance(place, slice) else self.e
        return rows

    def store(self, grad: Tensor, dz: Tensor, softcap: float | None) -> None:
        """Write what `place` gave to the gradient: by the logits, of dz by the softcapped ones."""
        if dz is not self.e:
            return
        if softcap is not None:
            y = self.raw()
            dz.mul_(slope(y if y is self.d else self.d.copy_(y), softcap, self.x))
        place = self.at if self.rows.packs else self.inner
        if isinstance(place, slice):
            grad[self.o][place].copy_(dz)
        else:
            grad[self.o].index_copy_(0, place, dz.to(grad.dtype))


class Targets(NamedTuple):
    """The entries at the targets of n rows: ``y``, softcapped, is NaN where a target lies elsewhere."""

    column: Tensor  # [n, 1]; 0 where it lies elsewhere
    here: Tensor  # [n]
    all_here: bool
    raw: Tensor  # [n]
    y: Tensor  # [n]
    softcap: float | None

    @classmethod
    def of(cls, rows: Rows, target: Tensor, dtype: torch.dtype, softcap: float | None) -> Targets:
        here = (target >= 0) & (target < rows.logits.shape[-1])
        column = target.where(here, 0)
        o, i = rows.places()
        raw = rows.logits[o, i, column].to(dtype)
        y = raw if softcap is None else softcapped(raw, softcap, torch.empty_like(raw))
        all_here = rows.on_cpu and bool(here.all())
        return cls(column.unsqueeze(-1), here, all_here, raw, y.where(here, torch.nan), softcap)

    def zero(self, entries: Tensor, at: slice) -> None:
        """Write 0 to the entries [r, V] at the targets of these rows."""
        column = self.column[at]
        if self.all_here:
            entries.scatter_(-1, column, 0.0)
        else:
            left = entries.gather(-1, column).masked_fill_(self.here[at].unsqueeze(-1), 0.0)
            entries.scatter_(-1, column, left)

    def grads(
        self, state: Tensor, g: Tensor, h: Tensor, temperature: Tensor, more: Tensor | float = 0.0
    ) -> Tensor:
        """g · ∂logprob + h · ∂entropy by the entries at the targets, [n]: 1 - p is known better than p.

        ``more`` is added to it, a gradient by the softcapped entries.
        """
        m, inv_s, mean_d, p_others = state
        g, h = g / temperature, h / temperature
        d = ((self.y - m) * (1.0 / temperature)).clamp(min=UNREACHABLE)
        p = d.exp() * inv_s
        exact = g * p_others - (h * p * (d - mean_d)).where(p != 0, 0.0)
        exact = exact.masked_fill((self.y == -torch.inf) & ~mean_d.isnan(), 0.0)
        by_raw: Tensor | float = 1.0
        if self.softcap is not None:
            by_raw = slope(self.raw.clone(), self.softcap, None)
        found: Tensor = (exact + more) * by_raw
        return found

    def put(self, rows: Rows, grad: Tensor, values: Tensor) -> None:
        """Write values [n] to the gradients [O, I, V] of these rows, or the first of them, at the targets."""
        if rows.packs:
            o, i = torch.zeros_like(self.column[:, 0]), torch.arange(rows.n, device=grad.device)
        else:
            o, i = rows.places()
        values = values.to(grad.dtype)
        column = self.column[:, 0]
        if not self.all_here:
            values = values.where(self.here, grad[o, i, column])
        grad[o, i, column] = values


def rows_of(V: int, on_cpu: bool) -> int:
    """Rows of a strip, on a CPU an even number; a single one would be summed up in another order."""
    return 2 * max(1, CPU_STRIP // max(1, 2 * V)) if on_cpu else max(1, DEVICE_STRIP // max(1, V))


def factor_of(temperature: Tensor, unit: float = 1.0) -> Tensor | float | None:
    """unit / temperature, [n, 1]; one number where all are known to be 1, None if that is 1."""
    if temperature.device.type == "cpu" and bool((temperature == 1).all()):
        return None if unit == 1.0 else unit
    return (unit / temperature).unsqueeze(-1)


def largest(y: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest entry of each row [r, 1]; finite where all is banned."""
    return y.amax(-1, keepdim=True).to(dtype).clamp(min=torch.finfo(dtype).min)


def relative(y: Tensor, m: Tensor, factor: Tensor | float | None, out: Tensor) -> Tensor:
    """(y - m) · factor."""
    if y.dtype == out.dtype:
        torch.sub(y, m, out=out)
    else:
        out.copy_(y).sub_(m)
    return out if factor is None else out.mul_(factor)


def exp_of(d: Tensor, out: Tensor) -> None:
    """exp d of a buffer, in another one."""
    if d.device.type == "cpu":  # the product and exp2 together take a half to three quarters of exp's time
        exp2_of(torch.mul(d, LOG2_E, out=out), out)
    else:
        torch.exp(d, out=out)


def exp2_of(d: Tensor, out: Tensor) -> None:
    """2^d of a buffer, in another one or in itself; on a CPU with the same bits wherever an entry lies.

    What does not fill a vector at the end of a thread's part torch computes by other code, whose last bit
    differs. So the room behind the buffer is taken along, as far as all parts are of whole vectors.
    """
    if d.device.type == "cpu":
        threads = max(1, min(torch.get_num_threads(), math.ceil(d.numel() / GRAIN)))
        size = (math.ceil(d.numel() / (threads * AT_ONCE)) * threads * AT_ONCE,)
        d, out = (x.as_strided(size, (1,), x.storage_offset()) for x in (d, out))
    torch.exp2(d, out=out)


def sum_of(entries: Tensor) -> Tensor:
    """Σ over the vocabulary of entries [n, V]."""
    # one row alone would be summed by all threads together, in another order
    return entries.sum(-1) if entries.shape[0] > 1 else entries.expand(2, -1).sum(-1)[:1]


def length(rows: Tensor | slice) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else rows.numel()


def as_slice(index: Tensor) -> Tensor | slice:
    """Consecutive indices as a slice: rows that need not be gathered."""
    first, last = (int(index[0]), int(index[-1])) if index.numel() else (0, -1)
    return slice(first, last + 1) if last - first + 1 == index.numel() else index


def zero_masked(grad: Tensor, live: Tensor) -> None:
    """Write exact zeros to the masked rows of grad [O, I, V]."""
    masked = ~live.view(grad.shape[:2])
    if grad.device.type != "cpu":
        grad.masked_fill_(masked.unsqueeze(-1), 0.0)  # indexing would wait for the device
    elif masked.any():
        grad[masked.nonzero(as_tuple=True)] = 0.0  # a mask would be held against every entry


def softcapped(y: Tensor, softcap: float, out: Tensor) -> Tensor:
    """softcap · tanh(y / softcap); infinite entries stay what they are."""
    torch.div(y, softcap, out=out).tanh_().mul_(softcap)
    for infinite in (torch.inf, -torch.inf):
        out.masked_fill_(y == infinite, infinite)
    return out


def slope(y: Tensor, softcap: float, spare: Tensor | None) -> Tensor:
    """1 - tanh²(y / softcap) without cancellation, in place; ``spare`` is overwritten."""
    w = y.div_(softcap).abs_().mul_(-2.0).exp_()
    square = torch.add(w, 1.0, out=spare).square_()
    return w.mul_(4.0).div_(square)
