"""Device functions that more than one kernel needs, and the launch geometry they share.

Shapes: N rows (tokens), V vocabulary entries. Logits arrive as [O, I, V]: rows n = o * I + i with two
strides, so that ``logits[:, :-1]`` of a [B, T, V] tensor needs no copy.

One row at temperature τ is described relative to its largest entry: with y the (softcapped) logits
and d = (y - max y) / τ,

    s = Σ exp d,   t = Σ exp(d) d,   mean_d = t / s,
    logprob = d[target] - log s,     entropy = log s - mean_d,     log p + entropy = d - mean_d.

Subtracting the maximum before dividing by τ keeps the digits of d when the logits are large, and the
last identity lets the gradient of the entropy be computed without forming log p.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layout

# Read once, as triton.jit does when it decorates the kernels of this package.
INTERPRETED: bool = triton.knobs.runtime.interpret

WARP_SIZE = 32 if torch.version.hip is None else 64

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# What Triton learns nothing from: where 16 divides one it would compile anew, and share a row differently
# among the threads, by way of shared memory and with other sums. ALIGN says all that it needs.
INTEGERS = ("N", "I", "V_units", *(f"stride_{name}_{dim}" for name in ("logits", "grad") for dim in "oi"))
IGNORE = tl.constexpr(layout.IGNORE)
ELSEWHERE = tl.constexpr(layout.ELSEWHERE)
# The most negative float32: an empty state must be finite, or its rescaling would be 0 * inf.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# 2 to its power is 0, and unlike -inf it may be multiplied by 0.
UNREACHABLE = tl.constexpr(-1e4)
# A product and the addition that follows it become one instruction, which rounds once: without that a softcap
# takes more instructions than there is time for. Asked for, because triton announces another default.
OPTIONS = {"enable_fp_fusion": True}


@triton.jit
def log1p_unit(u):
    """log(1 + u) for 0 <= u <= 1 with full relative accuracy (2 atanh(u / (2 + u)))."""
    r = u / (2.0 + u)
    q = r * r
    series = 1 / 9 + q * (1 / 11 + q * (1 / 13))
    series = 1 / 3 + q * (1 / 5 + q * (1 / 7 + q * series))
    return 2.0 * r * (1.0 + q * series)


@triton.jit
def expm1(x):
    """exp(x) - 1 without cancellation near 0."""
    series = 1.0 + x * (1 / 6) * (1.0 + x * (1 / 7) * (1.0 + x * (1 / 8)))
    series = 1.0 + x * (1 / 3) * (1.0 + x * (1 / 4) * (1.0 + x * (1 / 5) * series))
    small = x * (1.0 + x * 0.5 * series)
    return tl.where((x > -0.5) & (x < 0.5), small, tl.exp(x) - 1.0)


@triton.jit
def tanh(q):
    """(tanh q, its derivative) with full relative accuracy, also near 0."""
    square = q * q
    small = q + q * square * (-0.33331108 + square * 0.1310192)  # relative error 6e-8
    u = tl.exp2(tl.abs(q) * (-2.0 * LOG2E))
    r = tl.rsqrt(1.0 + u)
    r *= r  # 1 / (1 + u), without the care for large denominators that a division takes
    sign = q.to(tl.int32, bitcast=True) & -0x80000000
    large = (((1.0 - u) * r).to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.where(square < 1 / 32, small, large), 4.0 * u * r * r


@triton.jit
def cap(x, softcap, inv_softcap):
    """(softcap · tanh(x · inv_softcap), the derivative of tanh). Infinite entries stay what they are."""
    y, slope = tanh(x * inv_softcap)
    return tl.where(tl.abs(x) == float("inf"), x, y * softcap), slope


@triton.jit
def row_of(ptr, n, I, stride_o, stride_i, ALIGN: tl.constexpr):
    """Pointer to row n of an [O, I, V] tensor, known to be aligned; strides in units of ALIGN."""
    # int64: N * V does not fit in int32
    offset = (n // I).to(tl.int64) * stride_o + (n % I).to(tl.int64) * stride_i
    return tl.multiple_of(ptr + offset * ALIGN, ALIGN * ptr.dtype.element_ty.primitive_bitwidth // 8)


@triton.jit
def load_target(target_ptr, V):
    """Target of a row as int32: IGNORE stays, anything else outside [0, V) is ELSEWHERE."""
    target = tl.load(target_ptr)
    known = ((target >= 0) & (target < V)) | (target == IGNORE)
    return tl.where(known, target, ELSEWHERE).to(tl.int32)


@triton.jit
def load_tile(row_ptr, offs_v, V, inv_softcap, HAS_SOFTCAP: tl.constexpr):
    """One tile of logits in float32, softcapped in units of the softcap; -inf beyond the end of the row."""
    x = tl.load(row_ptr + offs_v, mask=offs_v < V, other=-float("inf")).to(tl.float32)
    return cap(x, 1.0, inv_softcap)[0] if HAS_SOFTCAP else x


@triton.jit
def row_stats(
    row_ptr,  # [V]
    V,
    target,  # ELSEWHERE gives NaN
    temperature,  # not positive, or infinite, gives NaN
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Stream a row once; return (logprob, entropy, m, inv_s, mean_d, p_others).

    m is the largest (softcapped) logit, inv_s = 1 / s its probability and p_others = 1 - p[target].
    """
    unit, scale = units(temperature, softcap, HAS_SOFTCAP)
    m, s_others, t_others, y_target = row_sums(
        row_ptr, V, target, unit, scale, HAS_SOFTCAP, BLOCK_V, LANES, WIDTH
    )
    d_target = (y_target - m) * (unit / temperature)  # in base 2 what float32 can hold might overflow
    e_target = tl.exp2(d_target * LOG2E)
    t = t_others + tl.where(e_target > 0, e_target * (d_target * LOG2E), 0.0)

    s = s_others + e_target
    inv_s = 1.0 / s
    mean_d = t * LN2 * inv_s
    confident = s_others <= e_target
    rest = log1p_unit(s_others / tl.where(confident, e_target, 1.0))
    log_s = tl.where(confident, rest + d_target, tl.log(s))
    logprob = tl.where(confident, -rest, d_target - log_s)
    return logprob, log_s - mean_d, m * unit, inv_s, mean_d, s_others * inv_s


@triton.jit
def units(temperature, softcap, HAS_SOFTCAP: tl.constexpr):
    """(what a unit of `row_sums`' logits is, the factor of their differences to be exponents of 2)."""
    fits = (temperature > 0) & (temperature < float("inf"))
    unit = softcap if HAS_SOFTCAP else 1.0
    return unit, LOG2E / tl.where(fits, temperature, float("nan")) * unit


@triton.jit
def row_sums(
    row_ptr,  # [V], a row or a piece of one
    V,
    target,  # or ELSEWHERE
    unit,
    scale,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Stream a row once; return (m, s, t, y_target) of `layout.SUMS` in units of ``unit``, t in base 2.

    The target is left out of its own sum, so that a confident token keeps the digits of
    logprob = -log1p(s / e_target) and of 1 - p[target] = s / (s + e_target).

    Each of the LANES sums up the entries that it loads, WIDTH neighbours at a time, relative to its own
    maximum: threads meet only after the last tile.
    """
    inv_unit = 1.0 / unit
    # a second dimension of WIDTH makes each thread load just as many neighbours, which then need not move
    LOADS: tl.constexpr = BLOCK_V // WIDTH
    offs_tile = tl.arange(0, LOADS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    # of a lane's entries but the target
    m = tl.full([LANES], LOWEST, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    t = tl.zeros([LANES], tl.float32)
    for start in range(0, V, BLOCK_V):
        offs_v = start + offs_tile
        y = load_tile(row_ptr, offs_v, V, inv_unit, HAS_SOFTCAP)
        if (target >= start) & (target < start + BLOCK_V):
            y = tl.where(offs_v == target, -float("inf"), y)
        y = tl.reshape(y, [LOADS // LANES, LANES, WIDTH])
        m_new = tl.maximum(m, tl.max(tl.max(y, axis=2), axis=0))
        d = (y - m_new[None, :, None]) * scale
        e = tl.exp2(d)
        shift, decay = rescaling(m, m_new, scale)
        # a banned entry adds 0, not 0 * -inf; what is NaN stays so in e
        t = (t + s * shift) * decay + tl.sum(tl.sum(e * tl.maximum(d, UNREACHABLE), axis=2), axis=0)
        s = s * decay + tl.sum(tl.sum(e, axis=2), axis=0)
        m = m_new

    y_target = tl.load(row_ptr + target, mask=target >= 0, other=float("nan")).to(tl.float32)
    if HAS_SOFTCAP:
        y_target = cap(y_target, 1.0, inv_unit)[0]
    m_row = tl.max(m, axis=0)
    m_row = tl.where(y_target > m_row, y_target, m_row)  # not a NaN: one that lies elsewhere
    shift, decay = rescaling(m, m_row, scale)
    return m_row, sum_of_lanes(s * decay), sum_of_lanes((t + s * shift) * decay), y_target


@triton.jit
def sum_of_lanes(x):
    """Sum of [LANES], the same bits in every lane.

    The compiler contracts a product and the addition that follows. Where lanes exchange their sums each would
    then add its own product unrounded to another lane's rounded one, and lanes would differ in the last bit:
    enough to clip a row in one lane and not in the next. A product that 0 was added to is rounded first.
    """
    return tl.sum(x + 0.0, axis=0)


@triton.jit
def rescaling(m, m_new, scale):
    """(log2, itself) of the factor of sums relative to m that become relative to m_new >= m."""
    shift = tl.maximum((m - m_new) * scale, UNREACHABLE)  # finite: an empty state is multiplied by it, too
    return shift, tl.exp2(shift)


@triton.jit
def store_row_grad(
    row_ptr,  # [V]
    grad_ptr,  # [V], out; may be row_ptr itself
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
    HAS_SOFTCAP: tl.constexpr,
    AGAIN: tl.constexpr,  # the row was read just now: what has been used is evicted first
    BLOCK_V: tl.constexpr,
):
    """Stream a row once more and write g_logprob · ∂logprob/∂x + g_entropy · ∂entropy/∂x."""
    FIRST_OUT: tl.constexpr = "evict_first" if AGAIN else ""
    # (-g_logprob - g_entropy (d - mean_d)) p / τ  =  e (a + b d), with d and e = exp2(d) in base 2;
    # the target adds g_logprob / τ, joined with its -p into 1 - p before any digit is lost
    scale = LOG2E / temperature
    g_target = g_logprob / temperature
    a_target = inv_s * g_entropy * mean_d / temperature
    a = a_target - inv_s * g_target
    b = -inv_s * g_entropy * LN2 / temperature

    # target: read before any warp overwrites it, written after the tile that it lies in
    x_target = tl.load(row_ptr + target, mask=target >= 0, other=0.0).to(tl.float32)
    tl.debug_barrier()
    e_target, d_target, slope_target = grad_factors(x_target, m, scale, softcap, HAS_SOFTCAP)
    grad_target = (g_target * p_others + e_target * (a_target + b * d_target)) * slope_target
    grad_target = tl.where(x_target == -float("inf"), 0.0, grad_target)  # its p_others is 1

    last = (V - 1) // BLOCK_V * BLOCK_V
    for done in range(0, V, BLOCK_V):
        offs_v = last - done + tl.arange(0, BLOCK_V)  # backwards: what was read last is still in the cache
        inside = offs_v < V
        x = tl.load(row_ptr + offs_v, mask=inside, other=-float("inf"), eviction_policy=FIRST_OUT)
        x = x.to(tl.float32)
        e, d, slope = grad_factors(x, m, scale, softcap, HAS_SOFTCAP)
        grad = e * (a + b * d) * slope
        grad = grad.to(grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + offs_v, grad, mask=inside, eviction_policy=FIRST_OUT)
    tl.debug_barrier()
    tl.store(grad_ptr + target, grad_target.to(grad_ptr.dtype.element_ty), mask=target >= 0)


@triton.jit
def grad_factors(x, m, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """(exp2 d, d, ∂y/∂x) of logits x, d in base 2 and finite where exp2 d is 0."""
    y, slope = cap(x, softcap, 1.0 / softcap) if HAS_SOFTCAP else (x, 1.0)
    d = (y - m) * scale
    return tl.exp2(d), tl.maximum(d, UNREACHABLE), slope


@triton.jit
def zero_row(grad_ptr, V, BLOCK_V: tl.constexpr):
    """Write zeros over a row."""
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        tl.store(grad_ptr + offs_v, tl.zeros([BLOCK_V], grad_ptr.dtype.element_ty), mask=offs_v < V)


def row_geometry(**tensors: Tensor) -> dict[str, int]:
    """Launch arguments that describe [O, I, V] tensors of one shape to a kernel, by their names there.

    And `OPTIONS` of the compiler, the same for all kernels.

    V and the strides are passed in units of ALIGN entries, the largest power of two up to 8 that divides them
    all and the rows' addresses, and multiplied back inside the kernel. ALIGN is all that the compiler learns.
    """
    first = next(iter(tensors.values()))
    _, I, V = first.shape
    strides = {
        f"stride_{name}_{dim}": x.stride(k) if x.shape[k] > 1 else 0  # of one row no stride matters
        for name, x in tensors.items()
        for k, dim in enumerate("oi")
    }
    starts = (x.data_ptr() // x.element_size() for x in tensors.values())
    align = math.gcd(8, V, *strides.values(), *starts)
    return {
        "I": I,
        "V_units": V // align,
        **{name: stride // align for name, stride in strides.items()},
        "ALIGN": align,
        **tile_config(V, align, first.element_size()),
        **OPTIONS,
    }


def tile_config(V: int, align: int, itemsize: int) -> dict[str, int]:
    """Tile and warps for a row of V entries: the same for all kernels, so that they find the same bits.

    A thread holds 16 entries, or 8 where narrow loads need the registers for addresses. A tile of a long row
    is 32 KiB for 16 warps on NVIDIA's: measured on an H100, so few rows are in flight then that some of a
    second read comes out of L2. However short a row, its tile has 8 entries for each thread of a warp: one
    left without would load what another one overwrites.
    """
    most, of_thread = (4096, 16) if align == 8 else (1024, 8)
    long = (32 << 10) // itemsize
    if align == 8 and long < V and WARP_SIZE == 32:
        most, of_thread = long, long // (16 * WARP_SIZE)
    block_v = min(max(triton.next_power_of_2(V), 8 * WARP_SIZE), most)
    return {"BLOCK_V": block_v, "num_warps": max(1, block_v // (of_thread * WARP_SIZE))}


def lane_config(geometry: dict[str, int], itemsize: int) -> dict[str, int]:
    """How a launch's threads share the entries of a tile: WIDTH neighbours at a time, at most 16 bytes."""
    width = min(geometry["ALIGN"], 16 // itemsize, geometry["BLOCK_V"])
    lanes = min(WARP_SIZE * geometry["num_warps"], geometry["BLOCK_V"] // width)
    return {"LANES": lanes, "WIDTH": width}
