"""The clipped PPO loss with an entropy bonus: loss and gradient of a row in one program.

One pass over the row gives its statistics, a few scalar operations its ratio, clipping, KL and bonus,
and a second pass writes the gradient, over the logits themselves if the caller wishes. The loss is
terminal, so nothing waits for a backward.

Shapes: N = O · I tokens, V vocabulary entries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import (
    IGNORE,
    INTEGERS,
    expm1,
    lane_config,
    load_target,
    row_geometry,
    row_of,
    row_stats,
    store_row_grad,
    zero_row,
)

# Rows of the [FIELDS, N] result; the order is that of aer_fast.reference.FIELDS.
FIELDS = 10


@triton.jit(do_not_specialize=INTEGERS)
def _ppo_loss_kernel(
    logits_ptr,  # [O, I, V]
    target_ptr,  # [N] int64
    weight_ptr,  # [N] fp32, the mask; 0 for rows that are not to be read
    temperature_ptr,  # [N] fp32
    old_logprob_ptr,  # [N] fp32
    advantage_ptr,  # [N] fp32
    entropy_coef_ptr,  # [N] fp32
    importance_weight_ptr,  # [N] fp32
    ref_logprob_ptr,  # [N] fp32
    scale_ptr,  # [] fp32, 1 / denominator
    softcap,
    ratio_low,
    ratio_high,
    dual_clip,  # inf for none
    kl_coef,
    fields_ptr,  # [FIELDS, N] fp32, out
    grad_ptr,  # [O, I, V], out if HAS_GRAD; may be logits_ptr
    N,
    I,
    V_units,
    stride_logits_o,
    stride_logits_i,
    stride_grad_o,
    stride_grad_i,
    ALIGN: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    n = tl.program_id(0)
    V = V_units * ALIGN
    logits_ptr = row_of(logits_ptr, n, I, stride_logits_o, stride_logits_i, ALIGN)
    grad_ptr = row_of(grad_ptr, n, I, stride_grad_o, stride_grad_i, ALIGN)
    target = load_target(target_ptr + n, V)
    weight = tl.load(weight_ptr + n)
    live = (target != IGNORE) & (weight != 0)

    loss, logprob, entropy, ratio, approx_kl, top1 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    token, clip_low, clip_high, active = 0.0, 0.0, 0.0, 0.0
    if live:
        temperature = tl.load(temperature_ptr + n)
        logprob, entropy, m, inv_s, mean_d, p_others = row_stats(
            logits_ptr, V, target, temperature, softcap, HAS_SOFTCAP, BLOCK_V, LANES, WIDTH
        )
        token, top1 = 1.0, inv_s
        # every warp has read the row, and logits[target], before zero_row overwrites it
        tl.debug_barrier()

        log_ratio = logprob - (tl.load(old_logprob_ptr + n) if HAS_OLD else logprob)
        ratio = tl.exp(log_ratio)
        approx_kl = expm1(log_ratio) - log_ratio
        advantage = tl.load(advantage_ptr + n)
        entropy_coef = tl.load(entropy_coef_ptr + n)
        importance_weight = tl.load(importance_weight_ptr + n)

        # comparisons, not min and max, which would drop a NaN: a NaN ratio is never clipped, and stays
        clipped_low = (advantage < 0) & (ratio < ratio_low)
        clipped_high = (advantage > 0) & (ratio > ratio_high)
        clipped_dual = (advantage < 0) & (ratio > dual_clip)
        bound = tl.where(clipped_low, ratio_low, tl.where(clipped_high, ratio_high, dual_clip))
        clipped = clipped_low | clipped_high | clipped_dual
        clip_low, clip_high = tl.where(clipped_low, 1.0, 0.0), tl.where(clipped_high, 1.0, 0.0)
        factor = tl.where((advantage == 0) & (ratio == float("inf")), 1.0, ratio)  # 0 * inf is 0 here
        surrogate = tl.where(clipped, bound, factor) * advantage
        loss = -importance_weight * surrogate - entropy_coef * entropy
        g_logprob = tl.where(clipped, 0.0, -importance_weight * advantage * factor)
        if HAS_REF:
            ref_log_ratio = tl.load(ref_logprob_ptr + n) - logprob
            growth = expm1(ref_log_ratio)
            loss += kl_coef * (growth - ref_log_ratio)
            g_logprob -= kl_coef * growth

        weight = tl.where(weight > 0, weight, float("nan"))
        loss *= weight
        weight *= tl.load(scale_ptr)
        g_logprob *= weight
        g_entropy = -entropy_coef * weight
        active = tl.where((g_logprob != 0) | (g_entropy != 0), 1.0, 0.0)
        if HAS_GRAD:
            if active > 0:
                store_row_grad(
                    logits_ptr,
                    grad_ptr,
                    V,
                    target,
                    temperature,
                    softcap,
                    m,
                    inv_s,
                    mean_d,
                    p_others,
                    g_logprob,
                    g_entropy,
                    HAS_SOFTCAP,
                    BLOCK_V,
                )
            else:
                zero_row(grad_ptr, V, BLOCK_V)
    elif HAS_GRAD:
        zero_row(grad_ptr, V, BLOCK_V)

    fields_ptr += n
    tl.store(fields_ptr, loss)
    tl.store(fields_ptr + N, logprob)
    tl.store(fields_ptr + 2 * N, entropy)
    tl.store(fields_ptr + 3 * N, token)
    tl.store(fields_ptr + 4 * N, clip_low)
    tl.store(fields_ptr + 5 * N, clip_high)
    tl.store(fields_ptr + 6 * N, approx_kl)
    tl.store(fields_ptr + 7 * N, ratio)
    tl.store(fields_ptr + 8 * N, top1)
    tl.store(fields_ptr + 9 * N, active)


@triton.jit(do_not_specialize=INTEGERS)
def _scale_grad_kernel(
    grad_ptr,  # [O, I, V], in and out
    factor_ptr,  # []
    I,
    V_units,
    stride_grad_o,
    stride_grad_i,
    ALIGN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:  # decided on the device: the usual backward touches no memory and waits for nobody
        V = V_units * ALIGN
        grad_ptr = row_of(grad_ptr, tl.program_id(0), I, stride_grad_o, stride_grad_i, ALIGN)
        for start in range(0, V, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            grad = tl.load(grad_ptr + offs_v, mask=offs_v < V).to(tl.float32) * factor
            tl.store(grad_ptr + offs_v, grad.to(grad_ptr.dtype.element_ty), mask=offs_v < V)


def ppo_loss_fwd(
    logits: Tensor,  # [O, I, V], last stride 1
    target: Tensor,  # [N] int64
    weight: Tensor,  # [N] float32 and so are the next six
    temperature: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    entropy_coef: Tensor,
    importance_weight: Tensor,
    ref_logprob: Tensor | None,
    scale: Tensor,  # [] float32
    *,
    softcap: float,  # 0 for none
    ratio_low: float,
    ratio_high: float,
    dual_clip: float,
    kl_coef: float,
    grad: Tensor | None,  # [O, I, V], written; may be logits; None for the loss alone
) -> Tensor:
    """Return [FIELDS, N] float32; where ``grad`` is given, write scale · ∂ Σ loss / ∂ logits to it."""
    N = target.numel()
    fields = torch.empty(FIELDS, N, device=logits.device, dtype=torch.float32)
    if N > 0:
        geometry = row_geometry(logits=logits, grad=logits if grad is None else grad)
        with torch.cuda.device_of(logits):
            _ppo_loss_kernel[(N,)](
                logits_ptr=logits,
                target_ptr=target,
                weight_ptr=weight,
                temperature_ptr=temperature,
                old_logprob_ptr=advantage if old_logprob is None else old_logprob,
                advantage_ptr=advantage,
                entropy_coef_ptr=entropy_coef,
                importance_weight_ptr=importance_weight,
                ref_logprob_ptr=advantage if ref_logprob is None else ref_logprob,
                scale_ptr=scale,
                softcap=softcap,
                ratio_low=ratio_low,
                ratio_high=ratio_high,
                dual_clip=dual_clip,
                kl_coef=kl_coef,
                fields_ptr=fields,
                grad_ptr=logits if grad is None else grad,
                N=N,
                HAS_SOFTCAP=softcap > 0,
                HAS_OLD=old_logprob is not None,
                HAS_REF=ref_logprob is not None,
                HAS_GRAD=grad is not None,
                **geometry,
                **lane_config(geometry, logits.element_size()),
            )
    return fields


def scale_grad(grad: Tensor, factor: Tensor) -> None:
    """Multiply grad [O, I, V] by factor [] in place; nothing is read or written where it is 1."""
    if grad.numel() > 0:
        with torch.cuda.device_of(grad):
            _scale_grad_kernel[(grad.shape[0] * grad.shape[1],)](
                grad_ptr=grad, factor_ptr=factor, **row_geometry(grad=grad)
            )
