"""From the sums over pieces of a row to its statistics.

With y the softcapped logits of a row, m not smaller than any of them, d = (y - m) / τ and s, t the sums of
exp d and exp(d) d over all entries but the target,

    Σ = s + e,  e = exp d[target]:     max p = exp(max d) / Σ,     mean_d = (t + e d[target]) / Σ,
    logprob = d[target] - log Σ,       entropy = log Σ - mean_d.

Two pieces merge as two tiles of one row do: what has the smaller m is scaled down to the larger one. Tiles,
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


def merge(one: Tensor, other: Tensor, temperature: Tensor) -> Tensor:
    """The sums [SUMS, N] of two pieces together. The order of merging changes rounding alone."""
    m = torch.maximum(one[0], other[0])
    s, t = (sum(x) for x in zip(_relative_to(m, one, temperature), _relative_to(m, other, temperature)))
    y_target = one[3].where(~one[3].isnan(), other[3])
    return torch.stack((m, torch.as_tensor(s), torch.as_tensor(t), y_target))


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


def _relative_to(m: Tensor, sums: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """s and t of a piece, relative to m instead of its own."""
    # Finite: an empty piece is scaled by it, too.
    shift = ((sums[0] - m) / temperature).clamp(min=UNREACHABLE)
    decay = shift.exp()
    return sums[1] * decay, (sums[2] + sums[1] * shift) * decay
