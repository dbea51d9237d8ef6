"""The row operations in torch, a tile of rows at a time: impl="torch", on any device.

The same mathematics as the Triton kernels (see kernels/primitives.py), behind the same three functions:
with y the softcapped logits of a row and d = (y - max y) / τ, e = exp d, s = Σ e, mean_d = Σ e d / s,

    logprob = d[target] - log s,     entropy = log s - mean_d,     log p + entropy = d - mean_d.

Three buffers of a tile are all that is held, two for a gradient alone, and one more where rows narrower than
float32 are gathered from between masked ones. On the CPU masked rows are not touched at all; elsewhere
finding them would wait for the device, so they are computed and then overwritten with zeros.

Sizes: N = O · I tokens, V vocabulary entries, n rows of a tile.
"""

import math
from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor

from aer_fast.reference import FIELDS, IGNORE, PPOTerms, ppo_fields

# Entries of a tile. On a CPU three buffers of 2**20 to 2**21 stay in the cache between operations; smaller
# tiles cost more on a busy machine, where threads wait for each other after every operation.
CPU_TILE, DEVICE_TILE = 1 << 21, 1 << 26
_UNREACHABLE = -1e4  # exp of it is 0, and unlike -inf it may be multiplied by 0

# What the gradient of a row needs, the rows of a [len(STATE), N] tensor. The second is max p.
STATE = ("m", "inv_s", "mean_d", "p_others", "d_target")


def as_rows(logits: Tensor) -> Tensor:
    """View logits [..., V] as [O, I, V] with last stride 1; copied only if two strides can't say it."""
    V, lead = logits.shape[-1], logits.shape[:-1]
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    for k in range(max(1, len(lead))):
        with suppress(RuntimeError):  # unless these dimensions do not merge
            return logits.view(math.prod(lead[:k]), math.prod(lead[k:]), V)
    return logits.contiguous().view(1, math.prod(lead), V)


def token_stats_fwd(
    logits: Tensor, target: Tensor, temperature: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logprob [N], entropy [N], state [STATE, N]) of logits [O, I, V]; 0 where IGNORE."""
    stats = temperature.new_zeros(2 + len(STATE), target.numel())
    live = target != IGNORE
    for _, rows, tile in _tiles(logits, live, temperature.dtype, 3):
        stats[:, rows] = tile.stats(target[rows], temperature[rows], softcap)
    stats = stats.where(live, 0.0)
    return stats[0], stats[1], stats[2:]


def token_stats_bwd(
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

    The logits may be some columns only of those that the state was made from; a target outside them is -1.
    With ``picked``, ascending indices of k rows, these alone are computed and their gradients written to the
    first k rows of grad, whose O is 1. grad may be the logits themselves.
    """
    live = target != IGNORE
    buffers = 2 if softcap is None else 3
    done = 0
    for o, rows, tile in _tiles(logits, live, temperature.dtype, buffers, picked):
        column = target[rows].clamp(min=0).unsqueeze(-1)
        tile.fill(state[0, rows], column, temperature[rows], softcap)
        dz = tile.grad(
            state[:, rows],
            grad_logprob[rows],
            grad_entropy[rows],
            target[rows],
            temperature[rows],
            softcap,
        )
        if picked is None:
            tile.store(grad[o], dz)
        else:
            grad[o, done : done + len(dz)] = dz
            done += len(dz)
    if picked is None:
        _zero_masked(grad, live)


def ppo_loss_fwd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    temperature: Tensor,
    terms: PPOTerms,
    scale: Tensor,
    softcap: float | None,
    grad: Tensor | None,
    compact: bool = False,
) -> Tensor:
    """Return the loss's fields [FIELDS, N]; write scale · ∂ Σ loss / ∂ logits to grad, if given.

    compact: write the gradients of the rows that have one ("active_fraction") to the first rows of grad,
    whose O is 1, and nothing to the others. grad may be the logits themselves.
    """
    fields = temperature.new_zeros(len(FIELDS), target.numel())
    live = (target != IGNORE) & (weight != 0)
    weight = weight.where(live, 0.0)
    done = 0
    for o, rows, tile in _tiles(logits, live, temperature.dtype, 3):
        logprob, entropy, *state = tile.stats(target[rows], temperature[rows], softcap)
        fields[:, rows], grad_logprob, grad_entropy = ppo_fields(
            logprob, entropy, state[1], weight[rows], terms.at(rows)
        )
        if grad is None:
            continue
        dz = tile.grad(
            torch.stack(state),
            scale * grad_logprob,
            scale * grad_entropy,
            target[rows],
            temperature[rows],
            softcap,
        )
        if compact:
            active = (fields[-1, rows] != 0).nonzero()[:, 0]
            if active.numel() < tile.n:
                dz = torch.index_select(dz, 0, active, out=tile.spare[0][: active.numel()])
            grad[o, done : done + len(dz)] = dz
            done += len(dz)
        else:
            tile.store(grad[o], dz)
    if grad is not None and not compact:
        _zero_masked(grad, live)
    return fields


class _Tile:
    """Some rows of the logits, and the buffers they are worked on in."""

    def __init__(self, logits: Tensor, at: Tensor | slice, buffers: Tensor):
        self.logits, self.at = logits, at  # [I, V], and which of these
        self.n = at.stop - at.start if isinstance(at, slice) else at.numel()
        self.d, self.e, *self.spare = buffers[:, : self.n]

    def rows(self) -> Tensor:
        """The logits [n, V]: a view where they are consecutive, else gathered, into d if of its dtype."""
        if isinstance(self.at, slice):
            return self.logits[self.at]
        if self.logits.dtype != self.d.dtype:
            return self.logits.index_select(0, self.at)
        return torch.index_select(self.logits, 0, self.at, out=self.d)

    def fill(
        self, m: Tensor | None, column: Tensor, temperature: Tensor, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """Fill d with (y - m) / τ and e with exp d; return m, the largest y unless given, and y[column]."""
        y, d = self.rows(), self.d
        if softcap is not None:
            y = _softcap(y if y is d else d.copy_(y), softcap, self.spare[0])
        m = (y.amax(-1) if m is None else m).to(d.dtype)
        y_target = y.gather(-1, column).squeeze(-1).to(d.dtype)
        if y.dtype == d.dtype:
            torch.sub(y, m.unsqueeze(-1), out=d)
        else:
            d.copy_(y).sub_(m.unsqueeze(-1))
        d.mul_(1.0 / temperature.unsqueeze(-1)).clamp_(min=_UNREACHABLE)
        torch.exp(d, out=self.e)
        return m, y_target

    def stats(self, target: Tensor, temperature: Tensor, softcap: float | None) -> Tensor:
        """Return logprob, entropy and the rows of STATE, stacked; d and e are filled."""
        column = target.where(target != IGNORE, 0).unsqueeze(-1)
        m, y_target = self.fill(None, column, temperature, softcap)
        d, e = self.d, self.e
        d_target = (y_target - m) / temperature
        e.scatter_(-1, column, 0.0)

        # the target is left out of its own sum: a confident token keeps the digits of 1 - p
        product = torch.mul(e, d, out=self.spare[0])
        if len(e) == 1:  # one row alone would be summed by all threads together, in another order
            e, product = e.expand(2, -1), product.expand(2, -1)
        s, t = e.sum(-1)[: len(m)], product.sum(-1)[: len(m)]
        e_target = d_target.exp()
        t = t + (e_target * d_target).where(e_target != 0, 0.0)
        s_all = s + e_target
        inv_s, mean_d = 1.0 / s_all, t / s_all
        confident = s <= e_target
        rest = torch.log1p(s / e_target)
        log_s = torch.where(confident, rest + d_target, s_all.log())
        logprob = torch.where(confident, -rest, d_target - log_s)
        return torch.stack((logprob, log_s - mean_d, m, inv_s, mean_d, s * inv_s, d_target))

    def grad(
        self,
        state: Tensor,  # [STATE, n]
        grad_logprob: Tensor,  # [n]
        grad_entropy: Tensor,  # [n]
        target: Tensor,  # [n]; -1 where it is none of these columns
        temperature: Tensor,
        softcap: float | None,
    ) -> Tensor:
        """grad_logprob · ∂logprob/∂x + grad_entropy · ∂entropy/∂x, [n, V]; uses up d and e."""
        _, inv_s, mean_d, p_others, d_target = state
        g, h = grad_logprob / temperature, grad_entropy / temperature
        p_target = d_target.exp() * inv_s
        at_target = g * p_others - (h * p_target * (d_target - mean_d)).where(p_target != 0, 0.0)
        at_target = at_target.where(d_target != -torch.inf, 0.0)  # banned
        a, b = (inv_s * (h * mean_d - g)).unsqueeze(-1), (-inv_s * h).unsqueeze(-1)

        dz: Tensor = self.e.mul_(torch.addcmul(a, self.d, b, out=self.d))  # e (a + b d)
        column = target.clamp(min=0).unsqueeze(-1)
        at_target = torch.where(target < 0, dz.gather(-1, column).squeeze(-1), at_target)
        dz.scatter_(-1, column, at_target.unsqueeze(-1))
        if softcap is not None:
            x = self.rows()
            w = (x if x is self.d else self.d.copy_(x)).div_(softcap).abs_().mul_(-2.0).exp_()
            dz.mul_(w).mul_(4.0).div_(w.add_(1.0).square_())  # 1 - tanh², without cancellation
        return dz

    def store(self, grad: Tensor, dz: Tensor) -> None:
        """Write the gradient to this tile's rows of grad [I, V]."""
        if isinstance(self.at, slice):
            grad[self.at].copy_(dz)
        else:
            grad.index_copy_(0, self.at, dz.to(grad.dtype))


def _tiles(
    logits: Tensor, live: Tensor, dtype: torch.dtype, buffers: int, picked: Tensor | None = None
) -> Iterator[tuple[int, Tensor | slice, _Tile]]:
    """Cut the picked, else the live rows (off the CPU: all rows) into tiles: (o, rows of [N], tile)."""
    O, I, V = logits.shape
    on_cpu = logits.device.type == "cpu"
    n = max(1, min(I, (CPU_TILE if on_cpu else DEVICE_TILE) // V))
    space = torch.empty(buffers, n, V, dtype=dtype, device=logits.device)
    for o in range(O):
        if on_cpu or picked is not None:
            index = live[o * I : (o + 1) * I].nonzero()[:, 0] if picked is None else picked
            chosen = [_as_slice(at) if on_cpu else at for at in torch.split(index, n)]
        else:
            chosen = [slice(i, min(i + n, I)) for i in range(0, I, n)]
        for at in chosen:
            rows = slice(o * I + at.start, o * I + at.stop) if isinstance(at, slice) else o * I + at
            if not isinstance(at, slice) or at.stop > at.start:
                yield o, rows, _Tile(logits[o], at, space)


def _as_slice(index: Tensor) -> Tensor | slice:
    """Consecutive indices as a slice: rows that need not be gathered."""
    first, last = (int(index[0]), int(index[-1])) if index.numel() else (0, -1)
    return slice(first, last + 1) if last - first + 1 == index.numel() else index


def _zero_masked(grad: Tensor, live: Tensor) -> None:
    """Write exact zeros to the masked rows of grad [O, I, V]."""
    masked = ~live.view(grad.shape[:2])
    if grad.device.type == "cpu":
        grad[masked] = 0.0
    else:
        grad.masked_fill_(masked.unsqueeze(-1), 0.0)  # indexing would wait for the device


def _softcap(y: Tensor, softcap: float, out: Tensor) -> Tensor:
    """softcap · tanh(y / softcap); infinite entries stay what they are."""
    torch.div(y, softcap, out=out).tanh_().mul_(softcap)
    for infinite in (torch.inf, -torch.inf):
        out.masked_fill_(y == infinite, infinite)
    return out
