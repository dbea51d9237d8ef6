"""What the instructions that only compute do, on arrays with an entry for each thread.

Float32 arithmetic is IEEE's; a fused multiply-add is rounded to float64 and then to float32, which differs
from one rounding in one case of 2^29. The .approx and .full instructions are rounded correctly, unlike those
of a GPU: ``NOISE = 1`` makes them wrong by up to what NVIDIA documents, always alike for the same operands.
What the assembler may contract after PTX, a product and a sum without .rn, is rounded twice here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

NOISE = 0.0  # of the approximate instructions, as a share of the error that is documented

# How an operand's bits are read. bf16 is widened to float32 when it is read; x2 is a pair.
KINDS: dict[str, np.dtype[Any]] = {
    f"{letter}{bits}": np.dtype(f"{kind}{bits // 8}")
    for letter, kind in (("b", "u"), ("u", "u"), ("s", "i"))
    for bits in (16, 32, 64)
}
KINDS |= {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f32x2": np.dtype("f4"), "bf16": np.dtype("u2")}
KINDS |= {"pred": np.dtype("?")}


class Operation(NamedTuple):
    """A function of arrays, and how its operands are read; the bits of what it returns are the result."""

    compute: Callable[..., Array]
    operands: tuple[str, ...]


def fused(a: Array, b: Array, c: Array) -> Array:
    return (a.astype(np.float64) * b + c).astype(np.float32)


def flushed(compute: Callable[..., Array]) -> Callable[..., Array]:
    """The .ftz form: what is subnormal is 0, coming and going."""

    def flush(x: Array) -> Array:
        return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)

    return lambda *operands: flush(compute(*map(flush, operands)))


def approximate(exact: Callable[..., Array], ulps: float) -> Callable[..., Array]:
    """``exact`` in float64, rounded; with all of the noise wrong by up to ``ulps`` units of 2^-23."""

    def compute(*operands: Array) -> Array:
        result = exact(*(x.astype(np.float64) for x in operands))
        if not NOISE:
            return result.astype(np.float32)
        mixed = np.uint32(0x9E3779B9)
        for operand in operands:
            mixed = (mixed ^ operand.view(np.uint32)) * np.uint32(0x85EBCA6B)
            mixed = mixed ^ (mixed >> np.uint32(13))
        error = NOISE * ulps * 2.0**-23 * (mixed / 2.0**31 - 1)
        return np.where(result == 1, 1, result * (1 + error)).astype(np.float32)

    return compute


def to_bf16(x: Array) -> Array:
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_f16(x: Array) -> Array:
    return x.astype(np.float16).view(np.uint16)


def pair(narrow: Callable[[Array], Array], high: Array, low: Array) -> Array:
    return narrow(high).astype(np.uint32) << np.uint32(16) | narrow(low)


def divide(a: Array, b: Array) -> Array:
    """Integers, towards zero."""
    quotient = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)


def doubled(a: Array, b: Array) -> Array:
    """The whole product of two integers."""
    wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    return a.astype(wide) * b.astype(wide)


def multiply_add(multiply: Callable[..., Array], a: Array, b: Array, c: Array) -> Array:
    return multiply(a, b) + c


def shift_left(a: Array, count: Array) -> Array:
    bits = 8 * a.itemsize
    return np.where(count < bits, a << np.minimum(count, bits - 1).astype(a.dtype), a.dtype.type(0))


def shift_right(a: Array, count: Array) -> Array:
    """Of unsigned integers zeros come in, of signed ones the sign."""
    bits = 8 * a.itemsize
    shifted = a >> np.minimum(count, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count < bits, shifted, a.dtype.type(0))


def extract(a: Array, start: Array, count: Array) -> Array:
    """Some bits of an unsigned integer, moved to its end; fewer than 32."""
    return a >> start & ((np.uint32(1) << count) - np.uint32(1))


def select(a: Array, b: Array, chosen: Array) -> Array:
    return np.where(chosen, a, b)


def unordered(compare: Callable[..., Array]) -> Callable[..., Array]:
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


def operations() -> dict[tuple[str, int], Operation]:
    """What is known, by opcode and number of operands."""
    table: dict[tuple[str, int], Operation] = {}

    def add(opcode: str, compute: Callable[..., Array], *operands: str) -> None:
        table[opcode, len(operands)] = Operation(compute, operands)

    comparisons: dict[str, Callable[..., Array]] = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }

    # floating point
    plain: dict[str, tuple[int, Callable[..., Array]]] = {
        "add": (2, np.add),
        "sub": (2, np.subtract),
        "mul": (2, np.multiply),
        "fma.rn": (3, fused),
        "neg": (1, np.negative),
        "abs": (1, np.abs),
        "max": (2, np.fmax),
        "min": (2, np.fmin),
        "ex2.approx": (1, approximate(np.exp2, 2)),
        "rsqrt.approx": (1, approximate(lambda x: 1 / np.sqrt(x), 2**0.1)),
        "rcp.approx": (1, approximate(np.reciprocal, 1)),
        "div.full": (2, approximate(np.divide, 2)),
    }
    for name, (count, compute) in plain.items():
        add(f"{name}.f32", compute, *count * ["f32"])
        add(f"{name}.ftz.f32", flushed(compute), *count * ["f32"])
    add("max.f32", lambda a, b, c: np.fmax(np.fmax(a, b), c), "f32", "f32", "f32")
    for name in ("add", "sub", "mul", "fma.rn"):
        count, compute = plain[name]
        add(f"{name}.f32x2", compute, *count * ["f32x2"])
    for narrow in ("f16", "bf16"):
        add(f"add.rn.f32.{narrow}", lambda a, b: a.astype(np.float32) + b, narrow, "f32")
        add(f"sub.rn.f32.{narrow}", lambda a, b: a.astype(np.float32) - b, narrow, "f32")
    for kind in ("f16", "bf16", "f32"):
        for name, compare in comparisons.items():
            ordered = (lambda a, b: (a < b) | (a > b)) if name == "ne" else compare
            add(f"setp.{name}.{kind}", ordered, kind, kind)
            add(f"setp.{name}u.{kind}", unordered(compare), kind, kind)

    # integers
    for kind in ("u16", "s16", "u32", "s32", "u64", "s64"):
        bits = int(kind[1:])
        for name, whole in (("add", np.add), ("sub", np.subtract), ("mul.lo", np.multiply)):
            add(f"{name}.{kind}", whole, kind, kind)
        add(f"mad.lo.{kind}", partial(multiply_add, np.multiply), kind, kind, kind)
        if bits < 64:
            add(f"mul.wide.{kind}", doubled, kind, kind)
            add(f"mad.wide.{kind}", partial(multiply_add, doubled), kind, kind, f"{kind[0]}{2 * bits}")
        add(f"div.{kind}", divide, kind, kind)
        add(f"rem.{kind}", lambda a, b: a - divide(a, b) * b, kind, kind)
        add(f"min.{kind}", np.minimum, kind, kind)
        add(f"max.{kind}", np.maximum, kind, kind)
        add(f"neg.{kind}", np.negative, kind)
        add(f"shr.{kind}", shift_right, kind, "u32")
    add("bfe.u32", extract, "u32", "u32", "u32")
    for kind in ("b16", "b32", "b64", "pred"):
        for name, logical in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
            add(f"{name}.{kind}", logical, kind, kind)
        add(f"not.{kind}", np.invert, kind)
        add(f"mov.{kind}", lambda a: a, kind)
    for kind, dtype in KINDS.items():
        if dtype.kind in "ui" and kind != "bf16":
            for name, compare in comparisons.items():
                add(f"setp.{name}.{kind}", compare, kind, kind)
        add(f"mov.{kind}", lambda a: a, kind)
        add(f"selp.{kind}", select, kind, kind, "pred")
        add(f"shl.{kind}", shift_left, kind, "u32")

    # conversions
    whole_numbers = [kind for kind in KINDS if kind[0] in "us"]
    for source in whole_numbers:
        for to in whole_numbers:
            add(f"cvt.{to}.{source}", partial(np.ndarray.astype, dtype=KINDS[to]), source)
        add(f"cvt.rn.f32.{source}", partial(np.ndarray.astype, dtype=np.float32), source)
    for kind, narrower in (("bf16", to_bf16), ("f16", to_f16)):
        add(f"cvt.f32.{kind}", partial(np.ndarray.astype, dtype=np.float32), kind)
        add(f"cvt.rn.{kind}.f32", narrower, "f32")
        add(f"cvt.rn.{kind}x2.f32", partial(pair, narrower), "f32", "f32")
    return table


OPERATIONS = operations()
