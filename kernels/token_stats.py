"""Log-probability of the taken token and entropy of the policy, from logits.

One program per token streams its row of V logits once (forward) or once more (backward). Nothing of
size [N, V] is written in the forward; the backward writes only grad_logits.

Shapes: N = O · I tokens, V vocabulary entries. A target of IGNORE marks a row that is never read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layout
from .primitives import (
    IGNORE,
    INTEGERS,
    LN2,
    LOWEST,
    lane_config,
    load_target,
    row_geometry,
    row_of,
    row_stats,
    row_sums,
    store_row_grad,
    units,
    zero_row,
)


@triton.jit(do_not_specialize=INTEGERS)
def _token_stats_fwd_kernel(
    logits_ptr,  # [O, I, V]
    target_ptr,  # [N] int64
    temperature_ptr,  # [N] fp32
    softcap,
    logprob_ptr,  # [N] fp32, out
    entropy_ptr,  # [N] fp32, out
    state_ptr,  # [STATE, N] fp32, out: what the backward needs
    N,
    I,
    V_units,
    stride_logits_o,
    stride_logits_i,
    ALIGN: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    n = tl.program_id(0)
    V = V_units * ALIGN
    logits_ptr = row_of(logits_ptr, n, I, stride_logits_o, stride_logits_i, ALIGN)
    target = load_target(target_ptr + n, V)
    logprob, entropy, m, inv_s, mean_d, p_others = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    if target != IGNORE:
        temperature = tl.load(temperature_ptr + n)
        logprob, entropy, m, inv_s, mean_d, p_others = row_stats(
            logits_ptr, V, target, temperature, softcap, HAS_SOFTCAP, BLOCK_V, LANES, WIDTH
        )
    tl.store(logprob_ptr + n, logprob)
    tl.store(entropy_ptr + n, entropy)
    state_ptr += n
    tl.store(state_ptr, m)
    tl.store(state_ptr + N, inv_s)
    tl.store(state_ptr + 2 * N, mean_d)
    tl.store(state_ptr + 3 * N, p_others)


@triton.jit(do_not_specialize=INTEGERS)
def _row_sums_kernel(
    logits_ptr,  # [O, I, V]
    target_ptr,  # [N] int64
    temperature_ptr,  # [N] fp32
    softcap,
    sums_ptr,  # [SUMS, N] fp32, out
    N,
    I,
    V_units,
    stride_logits_o,
    stride_logits_i,
    ALIGN: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    n = tl.program_id(0)
    V = V_units * ALIGN
    logits_ptr = row_of(logits_ptr, n, I, stride_logits_o, stride_logits_i, ALIGN)
    target = load_target(target_ptr + n, V)
    m, s, t, y_target = 0.0, 0.0, 0.0, 0.0
    if target != IGNORE:
        unit, scale = units(tl.load(temperature_ptr + n), softcap, HAS_SOFTCAP)
        m, s, t, y_target = row_sums(logits_ptr, V, target, unit, scale, HAS_SOFTCAP, BLOCK_V, LANES, WIDTH)
        m = tl.maximum(m * unit, LOWEST)  # of a piece with nothing in it
        t, y_target = t * LN2, y_target * unit
    sums_ptr += n
    tl.store(sums_ptr, m)
    tl.store(sums_ptr + N, s)
    tl.store(sums_ptr + 2 * N, t)
    tl.store(sums_ptr + 3 * N, y_target)


@triton.jit(do_not_specialize=INTEGERS)
def _token_stats_bwd_kernel(
    logits_ptr,  # [O, I, V]
    target_ptr,  # [N] int64
    temperature_ptr,  # [N] fp32
    softcap,
    state_ptr,  # [STATE, N] fp32
    grad_logprob_ptr,  # [N] fp32
    grad_entropy_ptr,  # [N] fp32
    picked_ptr,  # [number of programs] int64, the row of each program
    grad_ptr,  # [O, I, V], out; may be logits_ptr unless rows are picked
    N,
    I,
    V_units,
    stride_logits_o,
    stride_logits_i,
    stride_grad_o,
    stride_grad_i,
    ALIGN: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_PICKED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    out = tl.program_id(0)
    n = tl.load(picked_ptr + out) if HAS_PICKED else out
    V = V_units * ALIGN
    logits_ptr = row_of(logits_ptr, n, I, stride_logits_o, stride_logits_i, ALIGN)
    grad_ptr = row_of(grad_ptr, out, I, stride_grad_o, stride_grad_i, ALIGN)
    target = load_target(target_ptr + n, V)
    if target == IGNORE:
        zero_row(grad_ptr, V, BLOCK_V)
    else:
        state_ptr += n
        store_row_grad(
            logits_ptr,
            grad_ptr,
            V,
            target,
            tl.load(temperature_ptr + n),
            softcap,
            tl.load(state_ptr),
            tl.load(state_ptr + N),
            tl.load(state_ptr + 2 * N),
            tl.load(state_ptr + 3 * N),
            tl.load(grad_logprob_ptr + n),
            tl.load(grad_entropy_ptr + n),
            HAS_SOFTCAP,
            False,
            BLOCK_V,
        )


def token_stats_fwd(
    logits: Tensor,  # [O, I, V], last stride 1
    target: Tensor,  # [N] int64
    temperature: Tensor,  # [N] float32
    softcap: float,  # 0 for none
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logprob [N], entropy [N], state [STATE, N]), float32; the state is for the backward."""
    N = target.numel()
    logprob, entropy = torch.empty_like(temperature), torch.empty_like(temperature)
    state = torch.empty(len(layout.STATE), N, device=logits.device, dtype=torch.float32)
    if N > 0:
        geometry = row_geometry(logits=logits)
        with torch.cuda.device_of(logits):
            _token_stats_fwd_kernel[(N,)](
                logits_ptr=logits,
                target_ptr=target,
                temperature_ptr=temperature,
                softcap=softcap,
                logprob_ptr=logprob,
                entropy_ptr=entropy,
                state_ptr=state,
                N=N,
                HAS_SOFTCAP=softcap > 0,
                **geometry,
                **lane_config(geometry, logits.element_size()),
            )
    return logprob, entropy, state


def row_sums_fwd(
    logits: Tensor,  # [O, I, V], last stride 1: a piece of each row
    target: Tensor,  # [N] int64; ELSEWHERE where it is none of these columns
    temperature: Tensor,  # [N] float32
    softcap: float,  # 0 for none
) -> Tensor:
    """Return [SUMS, N] float32, from which the statistics of whole rows are made."""
    N = target.numel()
    sums = torch.empty(len(layout.SUMS), N, device=logits.device, dtype=torch.float32)
    if N > 0:
        geometry = row_geometry(logits=logits)
        with torch.cuda.device_of(logits):
            _row_sums_kernel[(N,)](
                logits_ptr=logits,
                target_ptr=target,
                temperature_ptr=temperature,
                softcap=softcap,
                sums_ptr=sums,
                N=N,
                HAS_SOFTCAP=softcap > 0,
                **geometry,
                **lane_config(geometry, logits.element_size()),
            )
    return sums


def token_stats_bwd(
    logits: Tensor,  # [O, I, V], last stride 1
    target: Tensor,  # [N] int64; ELSEWHERE where it is none of these columns
    temperature: Tensor,  # [N] float32
    softcap: float,
    state: Tensor,  # [STATE, N] of the forward, which may have seen more columns
    grad_logprob: Tensor,  # [N] float32
    grad_entropy: Tensor,  # [N] float32
    grad: Tensor,  # [O, I, V], written; may be logits unless rows are picked
    picked: Tensor | None = None,  # [k] int64: write the gradients of these rows to the first k of grad
) -> None:
    """Write grad_logprob · ∂logprob/∂x + grad_entropy · ∂entropy/∂x to grad, in its own dtype."""
    programs = target.numel() if picked is None else picked.numel()
    if programs > 0:
        with torch.cuda.device_of(logits):
            _token_stats_bwd_kernel[(programs,)](
                logits_ptr=logits,
                target_ptr=target,
                temperature_ptr=temperature,
                softcap=softcap,
                state_ptr=state,
                grad_logprob_ptr=grad_logprob,
                grad_entropy_ptr=grad_entropy,
                picked_ptr=target if picked is None else picked,
                grad_ptr=grad,
                N=target.numel(),
                HAS_SOFTCAP=softcap > 0,
                HAS_PICKED=picked is not None,
                **row_geometry(logits=logits, grad=grad),
            )
