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

from .layout import CONSTANTS, FIELDS
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

NUMBER = tl.constexpr(len(CONSTANTS))
MASK = tl.constexpr(CONSTANTS.index("mask"))
OLD_LOGPROB = tl.constexpr(CONSTANTS.index("old_logprob"))
ADVANTAGE = tl.constexpr(CONSTANTS.index("advantage"))
ENTROPY_COEF = tl.constexpr(CONSTANTS.index("entropy_coef"))
IMPORTANCE_WEIGHT = tl.constexpr(CONSTANTS.index("importance_weight"))
REF_LOGPROB = tl.constexpr(CONSTANTS.index("ref_logprob"))


@triton.jit
def token_loss(
    logprob,
    entropy,
    constants_ptr,  # [CONSTANTS] of the token
    ratio_low,
    ratio_high,
    dual_clip,
    kl_coef,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
):
    """`reference.ppo_token_loss` and `ppo_token_grad` of one token.

    Returns (loss, ∂loss/∂logprob, ∂loss/∂entropy, ratio, approx_kl, clip_fraction_low, clip_fraction_high).
    """
    log_ratio = logprob - (tl.load(constants_ptr + OLD_LOGPROB) if HAS_OLD else logprob)
    ratio = tl.exp(log_ratio)
    advantage = tl.load(constants_ptr + ADVANTAGE)
    entropy_coef = tl.load(constants_ptr + ENTROPY_COEF)
    importance_weight = tl.load(constants_ptr + IMPORTANCE_WEIGHT)

    # comparisons, not min and max, which would drop a NaN: a NaN ratio is never clipped, and stays
    clipped_low = (advantage < 0) & (ratio < ratio_low)
    clipped_high = (advantage > 0) & (ratio > ratio_high)
    clipped_dual = (advantage < 0) & (ratio > dual_clip)
    bound = tl.where(clipped_low, ratio_low, tl.where(clipped_high, ratio_high, dual_clip))
    clipped = clipped_low | clipped_high | clipped_dual
    factor = tl.where((advantage == 0) & (ratio == float("inf")), 1.0, ratio)  # 0 * inf is 0 here
    surrogate = tl.where(clipped, bound, factor) * advantage

    loss = -importance_weight * surrogate - entropy_coef * entropy
    g_logprob = tl.where(clipped, 0.0, -importance_weight * advantage * factor)
    g_entropy = -entropy_coef
    if HAS_REF:
        ref_log_ratio = tl.load(constants_ptr + REF_LOGPROB) - logprob
        growth = expm1(ref_log_ratio)
        loss += kl_coef * (growth - ref_log_ratio)
        g_logprob -= kl_coef * growth
    low, high = tl.where(clipped_low, 1.0, 0.0), tl.where(clipped_high, 1.0, 0.0)
    return loss, g_logprob, g_entropy, ratio, expm1(log_ratio) - log_ratio, low, high


@triton.jit(do_not_specialize=INTEGERS)
def _ppo_loss_kernel(
    logits_ptr,  # [O, I, V]
    target_ptr,  # [N] int64
    temperature_ptr,  # [N] fp32
    softcap,
    constants_ptr,  # [N, CONSTANTS] fp32; mask 0 for rows that are not to be read
    scale_ptr,  # [] fp32, 1 / denominator
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
    constants_ptr += n * NUMBER
    mask = tl.load(constants_ptr + MASK)
    live = (target != IGNORE) & (mask != 0)

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

        loss, g_logprob, g_entropy, ratio, approx_kl, clip_low, clip_high = token_loss(
            logprob,
            entropy,
            constants_ptr,
            ratio_low,
            ratio_high,
            dual_clip,
            kl_coef,
            HAS_OLD,
            HAS_REF,
        )
        weight = tl.where(mask > 0, mask, float("nan"))
        loss *= weight
        weight *= tl.load(scale_ptr)
        g_logprob *= weight
        g_entropy *= weight
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
                    ALIGN == 8 and not HAS_SOFTCAP,  # where instructions bind, to say so costs too many
                    BLOCK_V,
                )
            else:
                zero_row(grad_ptr, V, BLOCK_V)
    elif HAS_GRAD:
        zero_row(grad_ptr, V, BLOCK_V)

    # in the order of FIELDS
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
    temperature: Tensor,  # [N] float32
    softcap: float,  # 0 for none
    constants: Tensor,  # [N, CONSTANTS] float32, contiguous
    scale: Tensor,  # [] float32
    grad: Tensor | None,  # [O, I, V], written; may be logits; None for the loss alone
    *,
    on_policy: bool,  # old_logprob is not read, and the ratio is 1
    clip_low: float,
    clip_high: float,
    dual_clip: float,  # inf for none
    kl_coef: float,  # 0: ref_logprob is not read
) -> Tensor:
    """Return [FIELDS, N] float32; where ``grad`` is given, write scale · ∂ Σ loss / ∂ logits to it."""
    N = target.numel()
    fields = torch.empty(len(FIELDS), N, device=logits.device, dtype=torch.float32)
    if N > 0:
        geometry = row_geometry(logits=logits, grad=logits if grad is None else grad)
        with torch.cuda.device_of(logits):
            _ppo_loss_kernel[(N,)](
                logits_ptr=logits,
                target_ptr=target,
                temperature_ptr=temperature,
                softcap=softcap,
                constants_ptr=constants,
                scale_ptr=scale,
                ratio_low=1 - clip_low,
                ratio_high=1 + clip_high,
                dual_clip=dual_clip,
                kl_coef=kl_coef,
                fields_ptr=fields,
                grad_ptr=logits if grad is None else grad,
                N=N,
                HAS_SOFTCAP=softcap > 0,
                HAS_OLD=not on_policy,
                HAS_REF=kl_coef > 0,
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
