"""From the sums over pieces of a row to its statistics.

With y the softcapped logits of a row, m not smaller than any of them, d = (y - m) / τ and s, t the sums of
exp d and exp(d) d over all entries but the target,

    Σ = s + e,  e = exp d[target]:     max p = exp(max d) / Σ,     mean_d = (t + e d[target]) / Σ,
    logprob = d[target] - log Σ,       entropy = log Σ - mean_d.

Pieces merge as the tiles of a row do: what has a smaller m is scaled down to the largest one. Tiles,
slices of the vocabulary and slices that other ranks hold are one and the same here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aer_fast.kernels.layout import IGNORE

UNREACHABLE = -1e4  # exp of it is 0, and unlike -inf it may be multiplied by 0


def of_nothing(target: Tensor, temperature: Tensor) -> Tensor:
    """The sums [SUMS, N] of pieces without entries; 0 where IGNORE, as ever."""
    lowest = torch.finfo(temperature.dtype).min
    empty = temperature.new_tensor([lowest, 0.0, 0.0, torch.nan]).unsqueeze(-1)
    return empty.where(target != IGNORE, 0.0)


def merge(pieces: Tensor, temperature: Tensor) -> Tensor:
    """The sums [SUMS, N] of all pieces [k, SUMS, N] together, added up in float64.

    Their order changes rounding alone, and a row has the same bits whatever rows are beside it.
    """
    m, s, t, y_target = pieces.unbind(1)
    top = m.amax(0)
    shift = ((m.double() - top) / temperature.double()).clamp(min=UNREACHABLE)  # finite, also of nothing
    s, t = s.double() * shift.exp(), (t + s * shift) * shift.exp()
    # not over the first dimension, whose order of adding up depends on N
    s, t = (x.T.contiguous().sum(-1).to(top.dtype) for x in (s, t))
    found = ~y_target.isnan()
    target = y_target.where(found, 0.0).sum(0).where(found.any(0), torch.nan)
    return torch.stack((top, s, t, target))


def finish(sums: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return logprob [N], entropy [N] and state [STATE, N] from the sums [SUMS, N] of whole rows.

    All are NaN for a row whose target lies nowhere. A confident token, whose p is near 1, keeps the digits
    of logprob = -log1p(s / e) and of 1 - p = s / Σ: the target is not in s.
    """
    m, s, t, y_target = sums
    d_target = (y_target - m) / temperature
    e_target = d_target.exp()
    t = t + (e_target * d_target).where(e_target != 0, 0.0)
    s_all = s + e_target
    s_all = s_all.where(s_all != 0, torch.nan)  # all banned
    inv_s, mean_d = 1.0 / s_all, t / s_all
    confident = s <= e_target
    rest = torch.log1p(s / e_target)
    log_s = torch.where(confident, rest + d_target, s_all.log())
    logprob = torch.where(confident, -rest, d_target - log_s)
    return logprob, log_s - mean_d, torch.stack((m, inv_s, mean_d, s * inv_s))
