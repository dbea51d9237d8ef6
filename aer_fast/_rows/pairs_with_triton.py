"""The kernels of kernels/divergence.py as operations on pairs. Imported only when impl="triton" is chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from aer_fast._rows import with_triton
from aer_fast._rows.pairs import (
    Divergence,
    Grads,
    Pair,
    PairStats,
    Score,
    finish,
    offset_of,
    with_gradient,
    with_nan,
)
from aer_fast.kernels import divergence
from aer_fast.kernels.layout import DIVERGENCES, PAIR_SUMS


def pair_sums(pair: Pair, state: Tensor, ref_state: Tensor, offset: Tensor) -> Tensor:
    if pair.logits.shape[-1] == 0:
        return pair.temperature.new_zeros(len(PAIR_SUMS), pair.target.numel())
    return divergence.pair_sums_fwd(*pair[:-1], state, ref_state, offset, _constants(pair.divergence))


def pair_bwd(
    pair: Pair,
    state: Tensor,
    ref_state: Tensor,
    pair_state: Tensor,
    grads: Grads,
    grad: Tensor,
    picked: Tensor | None = None,
) -> None:
    if pair.logits.shape[-1] > 0:
        constants = _constants(pair.divergence)
        divergence.pair_bwd(*pair[:-1], state, ref_state, pair_state, grads, grad, picked, constants)
        torch.autograd.graph.increment_version(grad)  # autograd does not see the kernel's write


def pair_loss(pair: Pair, score: Score, grad: Tensor | None, *, compact: bool) -> Tensor | None:
    """Two kernels for the statistics, one for the divergence, one for the gradient."""
    logits, ref_logits, target, temperature, ref_temperature, which = pair
    logprob, entropy, state = with_triton.token_stats_fwd(logits, target, temperature, which.softcap)
    ref_logprob, _, ref_state = with_triton.token_stats_fwd(
        ref_logits, target, ref_temperature, which.ref_softcap
    )
    offset = offset_of(state, ref_state, target)
    pair_state = finish(pair_sums(pair, state, ref_state, offset), offset, which)
    stats = PairStats(logprob, entropy, state[1], ref_logprob, pair_state[0])
    grads = score(slice(0, target.numel()), stats)
    if grad is None:
        return None
    grads = with_nan(grads, pair_state[0])
    rows = with_gradient(grads) if compact else None
    pair_bwd(pair, state, ref_state, pair_state, grads, grad, rows)
    return rows


def _constants(which: Divergence) -> divergence.Constants:
    kind = DIVERGENCES.index(which.kind)
    return kind, which.beta, which.floor, which.softcap or 0.0, which.ref_softcap or 0.0
