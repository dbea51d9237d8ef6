"""Divergence of a policy from a teacher, from two tiles of logits: its sums, and its gradient.

The statistics of each tile by itself come first, from `token_stats`. With p of the student, q of the teacher
and δ = log q - log p, everything is made of terms that are never negative and vanish where the two agree, so
that nearly equal ones lose no digits:

    KL(p‖q) = Σ p (exp(δ) - 1 - δ),   since Σ p (exp(δ) - 1) = Σ (q - p) = 0

That last sum, as computed, is what the normalisers are off by: `offset`, the log of their quotient, is
corrected with it, and then even 1 - p of a confident token is right.

Shapes: N = O · I tokens, V vocabulary entries, the same of both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layout, primitives
from .primitives import INTEGERS, LOWEST, cap, load_target, row_geometry, row_of

REVERSE_KL = tl.constexpr(layout.DIVERGENCES.index("reverse_kl"))
FORWARD_KL = tl.constexpr(layout.DIVERGENCES.index("forward_kl"))
IGNORE = tl.constexpr(layout.IGNORE)
# index in layout.DIVERGENCES; beta of jsd; floor of log q, -inf for none; softcaps of both, 0 for none
Constants = tuple[int, float, float, float, float]
SMALL = tl.constexpr(0.5)  # |δ| below which exp(δ) - 1 - δ is a series


@triton.jit
def exp_remainder(x):
    """exp(x) - 1 - x for |x| <= 1/2, with full relative accuracy."""
    series = 1.0 + x * (1 / 7) * (1.0 + x * (1 / 8) * (1.0 + x * (1 / 9)))
    series = 1.0 + x * (1 / 4) * (1.0 + x * (1 / 5) * (1.0 + x * (1 / 6) * series))
    return x * x * 0.5 * (1.0 + x * (1 / 3) * series)


@triton.jit
def log_remainder(x):
    """x - log(1 + x) for -0.4 <= x <= 0.65, with full relative accuracy."""
    s = x / (2.0 + x)  # log(1 + x) = 2 atanh s,   x - 2 s = x s
    q = s * s
    series = 2 / 5 + q * (2 / 7 + q * (2 / 9 + q * (2 / 11 + q * (2 / 13))))
    return x * s - s * q * (2 / 3 + q * series)


@triton.jit
def divide(part, whole):
    """part / whole, or 1 where there is neither."""
    return part / tl.where(whole > 0, whole, 1.0) + tl.where(whole > 0, 0.0, 1.0)


@triton.jit
def load_row(state_ptr, N):
    """m and inv_s of `layout.STATE`."""
    return tl.load(state_ptr), tl.load(state_ptr + N)


@triton.jit
def pair_tile(
    row_ptr,  # [V], of the student
    ref_ptr,  # [V], of the teacher
    offs_v,
    V,
    softcap,
    ref_softcap,
    inv_temperature,
    ref_inv_temperature,
    m,
    inv_s,
    ref_m,
    ref_inv_s,
    offset,
    HAS_SOFTCAP: tl.constexpr,
    HAS_REF_SOFTCAP: tl.constexpr,
):
    """(p, q, δ, d, ∂y/∂x, whether the student bans, whether the teacher bans) of a tile.

    δ is 0 where one of them bans, and d = (y - m) / τ where the student does. Both ban what is beyond V.
    """
    y = tl.load(row_ptr + offs_v, mask=offs_v < V, other=-float("inf")).to(tl.float32)
    u = tl.load(ref_ptr + offs_v, mask=offs_v < V, other=-float("inf")).to(tl.float32)
    slope = 1.0
    if HAS_SOFTCAP:
        y, slope = cap(y, softcap, 1.0 / softcap)
    if HAS_REF_SOFTCAP:
        u, _ = cap(u, ref_softcap, 1.0 / ref_softcap)
    banned, ref_banned = y < LOWEST, u < LOWEST  # -inf
    y, u = tl.where(banned, m, y), tl.where(ref_banned, ref_m, u)
    d = (y - m) * inv_temperature
    p = tl.where(banned, 0.0, tl.exp(d) * inv_s)
    q = tl.where(ref_banned, 0.0, tl.exp((u - ref_m) * ref_inv_temperature) * ref_inv_s)
    # the logits are subtracted from each other first: nearly equal ones exactly
    delta = ((u - y) - (ref_m - m)) * ref_inv_temperature
    delta += (y - m) * (ref_inv_temperature - inv_temperature) - offset
    return p, q, tl.where(banned | ref_banned, 0.0, delta), d, slope, banned, ref_banned


@triton.jit
def floored(delta, log_p, floor, banned, ref_banned):
    """δ with a log q of at least ``floor``; -inf where there is none, and 0 where the student bans."""
    delta = tl.where(ref_banned, -float("inf"), delta)
    delta = tl.where(delta + log_p < floor, floor - log_p, delta)
    return tl.where(banned, 0.0, delta)


@triton.jit
def log_mixture(p, q, delta, log_p, small, beta):
    """log(m / p) of the mixture m = β q + (1 - β) p; finite where p is 0."""
    near = tl.where(small, delta, 0.0)
    growth = beta * (near + exp_remainder(near))
    mixture = beta * q + (1.0 - beta) * p
    # chosen before, and no quotient: after a logarithm or a division a choice becomes a branch
    far = tl.log(tl.where((mixture > 0) & (small == 0), mixture, 1.0)) - tl.where(small, 0.0, log_p)
    return growth - log_remainder(growth) + far


@triton.jit
def pair_terms(
    p, q, delta, log_p, banned, ref_banned, floor, beta, KIND: tl.constexpr, HAS_FLOOR: tl.constexpr
):
    """What each entry adds to the `layout.PAIR_SUMS`."""
    small = (tl.abs(delta) < SMALL) & (p > 0) & (q > 0)
    near = tl.where(small, delta, 0.0)
    remainder = exp_remainder(near)
    growth = near + remainder  # exp(δ) - 1
    excess = tl.where(small, p * growth, q - p)
    student_kl = tl.zeros_like(p)
    if KIND == REVERSE_KL:
        if HAS_FLOOR:
            bounded = floored(delta, log_p, floor, banned, ref_banned)
            small = small & (bounded == delta)
            divergence = tl.where(small, p * remainder, q - p - p * bounded)
        else:
            divergence = tl.where(small, p * remainder, q - p - p * delta)
            divergence = tl.where(ref_banned & ~banned, float("inf"), divergence)
    elif KIND == FORWARD_KL:  # q (exp(-δ) - 1 + δ)
        divergence = tl.where(small, p * (near * growth - remainder), p - q + q * delta)
        divergence = tl.where(banned & ~ref_banned, float("inf"), divergence)
    else:  # with a = log(m / p), b = log(m / q): β q (exp(b) - 1 - b) + (1 - β) p (exp(a) - 1 - a)
        a = log_mixture(p, q, delta, log_p, small, beta)
        mixture = beta * q + (1.0 - beta) * p
        b = tl.where(small, a - near, tl.where(q > 0, tl.log(divide(mixture, q)), 0.0))
        of_p = exp_remainder(tl.where(small, a, 0.0))
        of_q = exp_remainder(tl.where(small, b, 0.0))
        student_kl = tl.where(small, p * of_p, mixture - p - p * a)
        far = -beta * q * b - (1.0 - beta) * p * a
        divergence = tl.where(small, beta * q * of_q + (1.0 - beta) * p * of_p, far)
    return excess, divergence, student_kl


@triton.jit(do_not_specialize=(*INTEGERS, "stride_ref_o", "stride_ref_i"))
def _pair_sums_kernel(
    logits_ptr,  # [O, I, V]
    ref_ptr,  # [O, I, V]
    target_ptr,  # [N] int64
    temperature_ptr,  # [N] fp32
    ref_temperature_ptr,  # [N] fp32
    softcap,
    ref_softcap,
    beta,
    floor,
    state_ptr,  # [STATE, N] fp32, of the student
    ref_state_ptr,  # [STATE, N] fp32, of the teacher
    offset_ptr,  # [N] fp32
    sums_ptr,  # [PAIR_SUMS, N] fp32, out
    N,
    I,
    V_units,
    stride_logits_o,
    stride_logits_i,
    stride_ref_o,
    stride_ref_i,
    ALIGN: tl.constexpr,
    KIND: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_REF_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0)
    V = V_units * ALIGN
    logits_ptr = row_of(logits_ptr, n, I, stride_logits_o, stride_logits_i, ALIGN)
    ref_ptr = row_of(ref_ptr, n, I, stride_ref_o, stride_ref_i, ALIGN)
    excess = tl.zeros([BLOCK_V], tl.float32)
    divergence = tl.zeros([BLOCK_V], tl.float32)
    student_kl = tl.zeros([BLOCK_V], tl.float32)
    if load_target(target_ptr + n, V) != IGNORE:
        m, inv_s = load_row(state_ptr + n, N)
        ref_m, ref_inv_s = load_row(ref_state_ptr + n, N)
        offset = tl.load(offset_ptr + n)
        inv_temperature = 1.0 / tl.load(temperature_ptr + n)
        ref_inv_temperature = 1.0 / tl.load(ref_temperature_ptr + n)
        log_inv_s = tl.log(inv_s)
        for start in range(0, V, BLOCK_V):
            p, q, delta, d, _, banned, ref_banned = pair_tile(
                logits_ptr,
                ref_ptr,
                start + tl.arange(0, BLOCK_V),
                V,
                softcap,
                ref_softcap,
                inv_temperature,
                ref_inv_temperature,
                m,
                inv_s,
                ref_m,
                ref_inv_s,
                offset,
                HAS_SOFTCAP,
                HAS_REF_SOFTCAP,
            )
            more = pair_terms(p, q, delta, d + log_inv_s, banned, ref_banned, floor, beta, KIND, HAS_FLOOR)
            excess += more[0]
            divergence += more[1]
            student_kl += more[2]
    sums_ptr += n
    tl.store(sums_ptr, tl.sum(excess, axis=0))
    tl.store(sums_ptr + N, tl.sum(divergence, axis=0))
    tl.store(sums_ptr + 2 * N, tl.sum(student_kl, axis=0))


@triton.jit(do_not_specialize=(*INTEGERS, "stride_ref_o", "stride_ref_i"))
def _pair_grad_kernel(
    logits_ptr,  # [O, I, V]
    ref_ptr,  # [O, I, V]
    target_ptr,  # [N] int64
    temperature_ptr,  # [N] fp32
    ref_temperature_ptr,  # [N] fp32
    softcap,
    ref_softcap,
    beta,
    floor,
    state_ptr,  # [STATE, N] fp32, of the student
    ref_state_ptr,  # [STATE, N] fp32, of the teacher
    pair_state_ptr,  # [PAIR_STATE, N] fp32
    grad_logprob_ptr,  # [N] fp32
    grad_entropy_ptr,  # [N] fp32
    grad_divergence_ptr,  # [N] fp32
    picked_ptr,  # [number of programs] int64, the row of each program
    grad_ptr,  # [O, I, V], out; may be logits_ptr unless rows are picked
    N,
    I,
    V_units,
    stride_logits_o,
    stride_logits_i,
    stride_ref_o,
    stride_ref_i,
    stride_grad_o,
    stride_grad_i,
    ALIGN: tl.constexpr,
    KIND: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_REF_SOFTCAP: tl.constexpr,
    HAS_PICKED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    out = tl.program_id(0)
    n = tl.load(picked_ptr + out) if HAS_PICKED else out
    V = V_units * ALIGN
    logits_ptr = row_of(logits_ptr, n, I, stride_logits_o, stride_logits_i, ALIGN)
    ref_ptr = row_of(ref_ptr, n, I, stride_ref_o, stride_ref_i, ALIGN)
    grad_ptr = row_of(grad_ptr, out, I, stride_grad_o, stride_grad_i, ALIGN)
    target = load_target(target_ptr + n, V)
    live = target != IGNORE
    m, inv_s = load_row(state_ptr + n, N)
    mean_d, p_others = tl.load(state_ptr + 2 * N + n), tl.load(state_ptr + 3 * N + n)
    ref_m, ref_inv_s = load_row(ref_state_ptr + n, N)
    offset, student_kl = tl.load(pair_state_ptr + N + n), tl.load(pair_state_ptr + 2 * N + n)
    inv_temperature = 1.0 / tl.load(temperature_ptr + n)
    ref_inv_temperature = 1.0 / tl.load(ref_temperature_ptr + n)
    g_logprob = tl.load(grad_logprob_ptr + n) * inv_temperature
    g_entropy = tl.load(grad_entropy_ptr + n) * inv_temperature
    g_divergence = tl.load(grad_divergence_ptr + n) * inv_temperature
    log_inv_s = tl.log(inv_s)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        p, q, delta, d, slope, banned, ref_banned = pair_tile(
            logits_ptr,
            ref_ptr,
            offs_v,
            V,
            softcap,
            ref_softcap,
            inv_temperature,
            ref_inv_temperature,
            m,
            inv_s,
            ref_m,
            ref_inv_s,
            offset,
            HAS_SOFTCAP,
            HAS_REF_SOFTCAP,
        )
        small = (tl.abs(delta) < SMALL) & (p > 0) & (q > 0)
        if KIND == REVERSE_KL:
            if HAS_FLOOR:
                delta = floored(delta, d + log_inv_s, floor, banned, ref_banned)
            by_divergence = -p * (delta + student_kl)
        elif KIND == FORWARD_KL:
            near = tl.where(small, delta, 0.0)
            by_divergence = tl.where(small, -p * (near + exp_remainder(near)), p - q)
        else:
            by_divergence = (
                (beta - 1.0) * p * (log_mixture(p, q, delta, d + log_inv_s, small, beta) + student_kl)
            )
        by_logprob = tl.where(offs_v == target, p_others, -p)
        grad = g_logprob * by_logprob - g_entropy * p * (d - mean_d)
        grad += tl.where(g_divergence != 0, g_divergence * by_divergence, 0.0)
        grad = tl.where(live & ~banned, grad * slope, 0.0)
        tl.store(grad_ptr + offs_v, grad.to(grad_ptr.dtype.element_ty), mask=offs_v < V)


def pair_sums_fwd(
    logits: Tensor,  # [O, I, V], last stride 1
    ref_logits: Tensor,  # [O, I, V], last stride 1
    target: Tensor,  # [N] int64; IGNORE for rows that are not read
    temperature: Tensor,  # [N] float32
    ref_temperature: Tensor,  # [N] float32
    state: Tensor,  # [STATE, N] float32, of the student
    ref_state: Tensor,  # [STATE, N] float32, of the teacher
    offset: Tensor,  # [N] float32
    which: Constants,
) -> Tensor:
    """Return [PAIR_SUMS, N] float32; those of pieces of a row add up."""
    N = target.numel()
    sums = torch.empty(len(layout.PAIR_SUMS), N, device=logits.device, dtype=torch.float32)
    if N > 0:
        with torch.cuda.device_of(logits):
            _pair_sums_kernel[(N,)](
                logits_ptr=logits,
                ref_ptr=ref_logits,
                target_ptr=target,
                temperature_ptr=temperature,
                ref_temperature_ptr=ref_temperature,
                state_ptr=state,
                ref_state_ptr=ref_state,
                offset_ptr=offset,
                sums_ptr=sums,
                N=N,
                **_constants(which),
                **pair_geometry(logits=logits, ref=ref_logits),
            )
    return sums


def pair_bwd(
    logits: Tensor,  # [O, I, V], last stride 1
    ref_logits: Tensor,  # [O, I, V], last stride 1
    target: Tensor,  # [N] int64
    temperature: Tensor,  # [N] float32
    ref_temperature: Tensor,  # [N] float32
    state: Tensor,  # [STATE, N] float32
    ref_state: Tensor,  # [STATE, N] float32
    pair_state: Tensor,  # [PAIR_STATE, N] float32
    grads: tuple[Tensor, Tensor, Tensor],  # by logprob, entropy and divergence, each [N] float32
    grad: Tensor,  # [O, I, V], written; may be logits unless rows are picked
    picked: Tensor | None,  # [k] int64: write the gradients of these rows to the first k of grad
    which: Constants,
) -> None:
    """Write the gradient of a loss of logprob, entropy and divergence by the student's logits."""
    programs = target.numel() if picked is None else picked.numel()
    if programs > 0:
        with torch.cuda.device_of(logits):
            _pair_grad_kernel[(programs,)](
                logits_ptr=logits,
                ref_ptr=ref_logits,
                target_ptr=target,
                temperature_ptr=temperature,
                ref_temperature_ptr=ref_temperature,
                state_ptr=state,
                ref_state_ptr=ref_state,
                pair_state_ptr=pair_state,
                grad_logprob_ptr=grads[0],
                grad_entropy_ptr=grads[1],
                grad_divergence_ptr=grads[2],
                picked_ptr=target if picked is None else picked,
                grad_ptr=grad,
                N=target.numel(),
                HAS_PICKED=picked is not None,
                **_constants(which),
                **pair_geometry(logits=logits, ref=ref_logits, grad=grad),
            )


def _constants(which: Constants) -> dict[str, float]:
    """Launch arguments of both kernels."""
    kind, beta, floor, softcap, ref_softcap = which
    return {
        "softcap": softcap,
        "ref_softcap": ref_softcap,
        "beta": beta,
        "floor": floor,
        "KIND": kind,
        "HAS_FLOOR": floor > -float("inf"),
        "HAS_SOFTCAP": softcap > 0,
        "HAS_REF_SOFTCAP": ref_softcap > 0,
    }


def pair_geometry(**tensors: Tensor) -> dict[str, int]:
    """`row_geometry` with few entries a thread: there are two logits each, and all that is made of them."""
    geometry = row_geometry(**tensors)
    warp, V = primitives.WARP_SIZE, geometry["V_units"] * geometry["ALIGN"]
    entries = (
        8 if "grad" in tensors else 16 // tensors["logits"].element_size()
    )  # 16 bytes of what is narrowest
    entries = (entries if geometry["ALIGN"] == 8 else 4) * warp // 32
    block_v = min(max(triton.next_power_of_2(V), 8 * warp), 2048)
    return geometry | {"BLOCK_V": block_v, "num_warps": max(1, block_v // (entries * warp))}
