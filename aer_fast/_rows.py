"""The row operations in torch, a tile of rows at a time: impl="torch", on any device.

The same mathematics as the Triton kernels (see kernels/primitives.py): with y the softcapped logits of
a row and d = (y - max y) / τ, e = exp d, s = Σ e, mean_d = Σ e d / s,

    logprob = d[target] - log s,     entropy = log s - mean_d,     log p + entropy = d - mean_d.

Two buffers of a tile are all that is held, and a few more where rows are gathered from between masked ones
or a softcap is given. On the CPU masked rows are not touched at all; elsewhere finding them would wait for
the device, so they are computed and then overwritten with zeros.

Sizes: N = O · I tokens, V vocabulary entries, n rows of a tile.
"""

import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aer_fast.reference import FIELDS, IGNORE, PPOTerms, ppo_fields

# Entries of a tile. On a CPU any size from 2**19 to 2**23 is as fast on an idle machine; on a busy one, where
# threads wait for each other after every operation, few large tiles are far faster than many small ones.
_CPU_TILE, _DEVICE_TILE = 1 << 22, 1 << 26
_UNREACHABLE = -1e4  # exp of it is 0, and unlike -inf it may be multiplied by 0


class _Stats(NamedTuple):
    """Statistics of n rows, each [n]."""

    logprob: Tensor
    entropy: Tensor
    inv_s: Tensor  # also the probability of the most likely token
    mean_d: Tensor
    p_others: Tensor  # 1 - p[target]
    d_target: Tensor


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
) -> tuple[Tensor, Tensor]:
    """Return (logprob, entropy), each [N], of logits [O, I, V]; 0 where the target is IGNORE."""
    stats = temperature.new_zeros(2, target.numel())
    live = target != IGNORE
    for _, rows, tile in _tiles(logits, live, temperature.dtype):
        result = tile.stats(target[rows], temperature[rows], softcap)
        stats[0, rows], stats[1, rows] = result.logprob, result.entropy
    return stats[0].where(live, 0.0), stats[1].where(live, 0.0)


def token_stats_bwd(
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    softcap: float | None,
    grad_logprob: Tensor,
    grad_entropy: Tensor,
) -> Tensor:
    """Return grad_logits [O, I, V], recomputing the statistics tile by tile."""
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    live = target != IGNORE
    for o, rows, tile in _tiles(logits, live, temperature.dtype):
        stats = tile.stats(target[rows], temperature[rows], softcap)
        tile.store_grad(
            grad[o],
            stats,
            grad_logprob[rows],
            grad_entropy[rows],
            target[rows],
            temperature[rows],
            softcap,
        )
    _zero_masked(grad, live)
    return grad


def ppo_loss_fwd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    temperature: Tensor,
    terms: PPOTerms,
    scale: Tensor,
    softcap: float | None,
    grad: Tensor | None,
) -> Tensor:
    """Return the loss's fields [FIELDS, N]; write scale · ∂ Σ loss / ∂ logits to grad, if given."""
    fields = temperature.new_zeros(len(FIELDS), target.numel())
    live = (target != IGNORE) & (weight != 0)
    weight = weight.where(live, 0.0)
    for o, rows, tile in _tiles(logits, live, temperature.dtype):
        stats = tile.stats(target[rows], temperature[rows], softcap)
        constants: dict[str, Any] = {
            name: x[rows] for name, x in terms._asdict().items() if isinstance(x, Tensor)
        }
        fields[:, rows], grad_logprob, grad_entropy = ppo_fields(
            stats.logprob, stats.entropy, stats.inv_s, weight[rows], terms._replace(**constants)
        )
        if grad is not None:
            grad_logprob, grad_entropy = scale * grad_logprob, scale * grad_entropy
            tile.store_grad(
                grad[o], stats, grad_logprob, grad_entropy, target[rows], temperature[rows], softcap
            )
    if grad is not None:
        _zero_masked(grad, live)
    return fields


class _Tile:
    """Some rows of the logits, and the two buffers they are worked on in."""

    def __init__(self, logits: Tensor, at: Tensor | slice, d: Tensor, e: Tensor):
        # [n, V]; consecutive rows are a view
        self.logits = logits[at] if isinstance(at, slice) else logits.index_select(0, at)
        self.at = at
        n = self.logits.shape[0]
        self.d, self.e = d[:n], e[:n]

    def stats(self, target: Tensor, temperature: Tensor, softcap: float | None) -> _Stats:
        """Fill d with (y - max y) / τ and e with exp d, 0 at the target; return the statistics."""
        x, d, e = self.logits, self.d, self.e
        column = target.where(target != IGNORE, 0).unsqueeze(-1)
        temperature = temperature.unsqueeze(-1)
        y = x
        if softcap is not None:
            y = _softcap(d.copy_(x), softcap)
        m = y.amax(-1, keepdim=True).to(d.dtype)
        d_target = (y.gather(-1, column).to(d.dtype) - m) / temperature
        if y.dtype == d.dtype:
            torch.sub(y, m, out=d)
        else:
            d.copy_(y).sub_(m)
        d.mul_(1.0 / temperature).clamp_(min=_UNREACHABLE)
        torch.exp(d, out=e)
        e.scatter_(-1, column, 0.0)

        # the target is left out of its own sum: a confident token keeps the digits of 1 - p
        s = e.sum(-1)
        t = torch.linalg.vecdot(e, d)
        d_target = d_target.squeeze(-1)
        e_target = d_target.exp()
        t = t + (e_target * d_target).where(e_target != 0, 0.0)
        s_all = s + e_target
        inv_s, mean_d = 1.0 / s_all, t / s_all
        confident = s <= e_target
        rest = torch.log1p(s / e_target)
        log_s = torch.where(confident, rest + d_target, s_all.log())
        logprob = torch.where(confident, -rest, d_target - log_s)
        return _Stats(logprob, log_s - mean_d, inv_s, mean_d, s * inv_s, d_target)

    def store_grad(
        self,
        grad: Tensor,  # [I, V], where the tile's rows are written
        stats: _Stats,
        grad_logprob: Tensor,  # [n]
        grad_entropy: Tensor,  # [n]
        target: Tensor,
        temperature: Tensor,
        softcap: float | None,
    ) -> None:
        """Write grad_logprob · ∂logprob/∂x + grad_entropy · ∂entropy/∂x; uses up d and e."""
        g, h = grad_logprob / temperature, grad_entropy / temperature
        p_target = stats.d_target.exp() * stats.inv_s
        at_target = g * stats.p_others - (h * p_target * (stats.d_target - stats.mean_d)).where(
            p_target != 0, 0.0
        )
        at_target = at_target.where(stats.d_target != -torch.inf, 0.0).unsqueeze(-1)  # banned
        a, b = (stats.inv_s * (h * stats.mean_d - g)).unsqueeze(-1), (-stats.inv_s * h).unsqueeze(-1)

        dz = self.e.mul_(torch.addcmul(a, self.d, b, out=self.d))  # e (a + b d)
        dz.scatter_(-1, target.where(target != IGNORE, 0).unsqueeze(-1), at_target)
        if softcap is not None:
            w = self.d.copy_(self.logits).div_(softcap).abs_().mul_(-2.0).exp_()
            dz.mul_(w).mul_(4.0).div_(w.add_(1.0).square_())  # 1 - tanh², without cancellation
        if isinstance(self.at, slice):
            grad[self.at].copy_(dz)
        else:
            grad.index_copy_(0, self.at, dz.to(grad.dtype))


def _tiles(logits: Tensor, live: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor | slice, _Tile]]:
    """Cut the live rows (off the CPU: all rows) into tiles: (o, rows of the [N] tensors, tile)."""
    O, I, V = logits.shape
    on_cpu = logits.device.type == "cpu"
    n = max(1, min(I, (_CPU_TILE if on_cpu else _DEVICE_TILE) // V))
    d, e = torch.empty(2, n, V, dtype=dtype, device=logits.device)
    for o in range(O):
        if on_cpu:
            picked = [_as_slice(at) for at in torch.split(live[o * I : (o + 1) * I].nonzero()[:, 0], n)]
        else:
            picked = [slice(i, min(i + n, I)) for i in range(0, I, n)]
        for at in picked:
            rows = slice(o * I + at.start, o * I + at.stop) if isinstance(at, slice) else o * I + at
            if not isinstance(at, slice) or at.stop > at.start:
                yield o, rows, _Tile(logits[o], at, d, e)


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


def _softcap(y: Tensor, softcap: float) -> Tensor:
    """softcap · tanh(y / softcap); infinite entries stay what they are."""
    return torch.where(y.isinf(), y, softcap * torch.tanh(y / softcap))
