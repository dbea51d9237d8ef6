"""Divergence of a policy from a teacher, from two tiles of logits: its sums, and its gradient.

The statistics of each tile by itself come first, from `token_stats`. With p of the student, q of the teacher
and δ = log q - log p, everything is made of terms that are never negative and vanish where the two agree, so
that nearly equal ones lose no digits:

    KL(p‖q) = Σ p (exp(δ) - 1 - δ),   since Σ p (exp(δ) - 1) = Σ (q - p) = 0

That last sum, as computed, is what the normalisers are off by: `offset`, the log of their quotient, is
corrected with it, and then even 1 - p of a confident token is right. With R(g) = g - log(1 + g) a mixture
m = β q + (1 - β) p has

    jsd = Σ (1 - β) p R(m / p - 1) + β q R(m / q - 1)

for any β. The gradients are -p (δ + KL(p‖q)) of KL(p‖q), p - q of KL(q‖p) and, with a = log(m / p),
-(1 - β) p (a + KL(p‖m)) of jsd. Where p > 1/2, what such a bracket leaves may be rounding alone; there it is
(1 - p) δ - Σ p' δ' over the other entries (likewise with a), whose sums `pair_sums_fwd` makes, too.

Shapes: N = O · I tokens, V vocabulary entries, the same of both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layout, primitives
from .primitives import (
    INTEGERS,
    LOG2E,
    LOWEST,
    UNREACHABLE,
    cap,
    lane_config,
    load_target,
    row_geometry,
    row_of,
)

FORWARD_KL = tl.constexpr(layout.DIVERGENCES.index("forward_kl"))
JSD = tl.constexpr(layout.DIVERGENCES.index("jsd"))
IGNORE = tl.constexpr(layout.IGNORE)
# index in layout.DIVERGENCES; beta of jsd; floor of log q, -inf for none; softcaps of both, 0 for none
Constants = tuple[int, float, float, float, float]
SMALLEST = tl.constexpr(1.1754943508222875e-38)  # the smallest float32 that is not denormal
SMALL = tl.constexpr(0.5)  # |δ| below which exp(δ) - 1 - δ is a series


@triton.jit
def exp_remainder(x):
    """exp(x) - 1 - x for |x| <= 1/2, with full relative accuracy."""
    series = 1 / 720 + x * (1 / 5040 + x * (1 / 40320 + x * (1 / 362880)))
    series = 1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * series)))
    return x * x * series


@triton.jit
def log1p(x):
    """(log(1 + x), x - log(1 + x)) for -0.4 <= x <= 0.65, each with full relative accuracy."""
    s = x / (2.0 + x)  # log(1 + x) = 2 atanh s,   x - 2 s = x s
    q = s * s
    series = 2 / 5 + q * (2 / 7 + q * (2 / 9 + q * (2 / 11 + q * (2 / 13))))
    more = s * q * (2 / 3 + q * series)
    return 2.0 * s + more, x * s - more


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
    """(p, q, δ, d, d of the teacher, ∂y/∂x, whether the student bans, whether the teacher bans) of a tile.

    δ is UNREACHABLE where the teacher bans, else its negative where the student does; d = (y - m) / τ of a
    banned y is 0. Both ban what is beyond V.
    """
    x = tl.load(row_ptr + offs_v, mask=offs_v < V, other=-float("inf")).to(tl.float32)
    ref_x = tl.load(ref_ptr + offs_v, mask=offs_v < V, other=-float("inf")).to(tl.float32)
    banned, ref_banned = x < LOWEST, ref_x < LOWEST  # -inf
    y, u, slope = x, ref_x, 1.0
    if HAS_SOFTCAP:
        y, slope = cap(x, softcap, 1.0 / softcap)
    if HAS_REF_SOFTCAP:
        u, _ = cap(ref_x, ref_softcap, 1.0 / ref_softcap)
    y, u = tl.where(banned, m, y), tl.where(ref_banned, ref_m, u)
    p = tl.where(banned, 0.0, tl.exp2((y - m) * (inv_temperature * LOG2E)) * inv_s)
    q = tl.where(ref_banned, 0.0, tl.exp2((u - ref_m) * (ref_inv_temperature * LOG2E)) * ref_inv_s)
    # finite where its exponential is 0
    d = tl.maximum((y - m) * inv_temperature, UNREACHABLE)
    ref_d = tl.maximum((u - ref_m) * ref_inv_temperature, UNREACHABLE)
    # the logits are subtracted from each other first: nearly equal ones exactly
    delta = ((u - y) - (ref_m - m)) * ref_inv_temperature
    delta += (y - m) * (ref_inv_temperature - inv_temperature) - offset
    delta = tl.where(ref_banned, UNREACHABLE, tl.where(banned, -UNREACHABLE, delta))
    return p, q, delta, d, ref_d, slope, banned, ref_banned


@triton.jit
def of_student(delta, log_p, floor, ref_banned, HAS_FLOOR: tl.constexpr):
    """δ as p is multiplied by it: finite where p is 0, and of a log q of at least ``floor``."""
    delta = tl.minimum(delta, -UNREACHABLE)
    if HAS_FLOOR:
        delta = tl.maximum(tl.where(ref_banned, -float("inf"), delta), floor - log_p)
    return delta


@triton.jit
def of_lanes(x, LANES: tl.constexpr):
    """Sums [LANES] of what each lane has of a tile [LOADS, WIDTH]."""
    return tl.sum(tl.sum(tl.reshape(x, [x.shape[0] // LANES, LANES, x.shape[1]]), axis=2), axis=0)


@triton.jit
def growths(delta):
    """(q / p - 1, p / q - 1), each with full relative accuracy."""
    small = tl.abs(delta) < SMALL
    near = tl.where(small, delta, 0.0)
    up, inverse = near + exp_remainder(near), tl.exp(-delta)
    return tl.where(small, up, tl.exp(delta) - 1.0), tl.where(small, -up * inverse, inverse - 1.0)


@triton.jit
def log_growth(growth, log_whole, log_part):
    """(whether growth = whole / part - 1 is small, log(whole / part), R(growth) of a small one)."""
    small = (growth > -0.4) & (growth < 0.65)
    near, remainder = log1p(tl.where(small, growth, 0.0))
    return small, near + tl.where(small, 0.0, 1.0) * (log_whole - log_part), remainder


@triton.jit
def log_mixture(p, q, beta):
    """log m of the mixture m = β q + (1 - β) p; finite where that is 0."""
    return tl.log(tl.maximum(beta * q + (1.0 - beta) * p, SMALLEST))


@triton.jit
def pair_terms(
    p, q, delta, log_p, log_q, banned, ref_banned, floor, beta, KIND: tl.constexpr, HAS_FLOOR: tl.constexpr
):
    """What each entry adds to the `layout.PAIR_SUMS`."""
    small = tl.abs(delta) < SMALL
    near = tl.where(small, delta, 0.0)
    others = tl.where(p > 0.5, 0.0, p)
    of_others, student_kl = tl.zeros_like(p), tl.zeros_like(p)
    if KIND == JSD:
        up, down = growths(delta)
        log_m = log_mixture(p, q, beta)
        gained = beta * (q - p)  # m - p
        p_small, a, of_p = log_growth(beta * up, log_m, log_p)
        q_small, b, of_q = log_growth((1.0 - beta) * down, log_m, log_q)
        excess = tl.where(small, p * up, q - p)
        of_p = tl.where(p_small, p * of_p, gained - p * a)
        of_q = tl.where(q_small, q * of_q, (1.0 - beta) * (p - q) - q * b)
        divergence = (1.0 - beta) * of_p + beta * of_q
        student_kl = beta * excess - p * a
        of_others = others * a
    else:
        remainder = exp_remainder(near)
        growth = near + remainder  # exp(δ) - 1
        excess = tl.where(small, p * growth, q - p)
        if KIND == FORWARD_KL:  # q (exp(-δ) - 1 + δ)
            divergence = tl.where(small, p * (near * growth - remainder), p - q + q * delta)
            divergence = tl.where(banned & ~ref_banned, float("inf"), divergence)
        else:
            bounded = of_student(delta, log_p, floor, ref_banned, HAS_FLOOR)
            if HAS_FLOOR:
                small = small & (bounded == delta)
            divergence = tl.where(small, p * remainder, q - p - p * bounded)
            if not HAS_FLOOR:
                divergence = tl.where(ref_banned & ~banned, float("inf"), divergence)
            of_others = others * bounded
    return excess, divergence, student_kl, others, of_others


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
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    n = tl.program_id(0)
    V = V_units * ALIGN
    logits_ptr = row_of(logits_ptr, n, I, stride_logits_o, stride_logits_i, ALIGN)
    ref_ptr = row_of(ref_ptr, n, I, stride_ref_o, stride_ref_i, ALIGN)
    # as in `row_sums`
    offs_tile = tl.arange(0, BLOCK_V // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    excess = tl.zeros([LANES], tl.float32)
    divergence = tl.zeros([LANES], tl.float32)
    student_kl = tl.zeros([LANES], tl.float32)
    others = tl.zeros([LANES], tl.float32)
    of_others = tl.zeros([LANES], tl.float32)
    if load_target(target_ptr + n, V) != IGNORE:
        m, inv_s = load_row(state_ptr + n, N)
        ref_m, ref_inv_s = load_row(ref_state_ptr + n, N)
        offset = tl.load(offset_ptr + n)
        inv_temperature = 1.0 / tl.load(temperature_ptr + n)
        ref_inv_temperature = 1.0 / tl.load(ref_temperature_ptr + n)
        log_inv_s, log_ref_inv_s = tl.log(inv_s), tl.log(ref_inv_s)
        for start in range(0, V, BLOCK_V):
            p, q, delta, d, ref_d, _, banned, ref_banned = pair_tile(
                logits_ptr,
                ref_ptr,
                start + offs_tile,
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
            log_p, log_q = d + log_inv_s, ref_d + log_ref_inv_s
            more = pair_terms(p, q, delta, log_p, log_q, banned, ref_banned, floor, beta, KIND, HAS_FLOOR)
            excess += of_lanes(more[0], LANES)
            divergence += of_lanes(more[1], LANES)
            if KIND == JSD:
                student_kl += of_lanes(more[2], LANES)
            if KIND != FORWARD_KL:
                others += of_lanes(more[3], LANES)
                of_others += of_lanes(more[4], LANES)
    sums_ptr += n
    tl.store(sums_ptr, tl.sum(excess, axis=0))
    tl.store(sums_ptr + N, tl.sum(divergence, axis=0))
    tl.store(sums_ptr + 2 * N, tl.sum(student_kl, axis=0) if KIND == JSD else 0.0)
    tl.store(sums_ptr + 3 * N, tl.sum(others, axis=0) if KIND != FORWARD_KL else 0.0)
    tl.store(sums_ptr + 4 * N, tl.sum(of_others, axis=0) if KIND != FORWARD_KL else 0.0)


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
    others, of_others = tl.load(pair_state_ptr + 3 * N + n), tl.load(pair_state_ptr + 4 * N + n)
    inv_temperature = 1.0 / tl.load(temperature_ptr + n)
    ref_inv_temperature = 1.0 / tl.load(ref_temperature_ptr + n)
    g_logprob = tl.load(grad_logprob_ptr + n) * inv_temperature
    g_entropy = tl.load(grad_entropy_ptr + n) * inv_temperature
    g_divergence = tl.load(grad_divergence_ptr + n) * inv_temperature
    if g_divergence == 0:  # an infinite one has NaN there
        student_kl, others, of_others = 0.0, 0.0, 0.0
    log_inv_s = tl.log(inv_s)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        p, q, delta, d, _, slope, banned, ref_banned = pair_tile(
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
        if KIND == FORWARD_KL:
            small = tl.abs(delta) < SMALL
            near = tl.where(small, delta, 0.0)
            by_divergence = g_divergence * tl.where(small, -p * (near + exp_remainder(near)), p - q)
        else:
            if KIND == JSD:
                up, _ = growths(delta)
                _, gain, _ = log_growth(beta * up, log_mixture(p, q, beta), d + log_inv_s)
                g = g_divergence * (beta - 1.0)
            else:
                gain = of_student(delta, d + log_inv_s, floor, ref_banned, HAS_FLOOR)
                g = -g_divergence
            # of a p above 1/2: others * gain - of_others
            many = p <= 0.5
            less = tl.where(many, student_kl, -of_others)
            by_divergence = g * p * (gain * tl.where(many, 1.0, others) + less)
        by_logprob = tl.where(offs_v == target, p_others, -p)
        grad = g_logprob * by_logprob - g_entropy * p * (d - mean_d)
        grad += by_divergence
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
    geometry = pair_geometry(logits=logits, ref=ref_logits)
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
                **geometry,
                **lane_config(geometry, logits.element_size()),
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
    itemsize = tensors["logits"].element_size()
    entries = 4 * warp // 32  # a thread's
    if geometry["ALIGN"] == 8:  # sums: 16 bytes of what is narrowest
        entries = 8 * warp // 32 if "grad" in tensors else max(entries, 16 // itemsize)
    block_v = min(max(triton.next_power_of_2(V), 8 * warp), 8 * entries * warp, 2048)  # at most eight warps
    return geometry | {"BLOCK_V": block_v, "num_warps": max(1, block_v // (entries * warp))}
