"""The emulation of PTX: instructions by hand, and every error that it is there to find.

The kernels themselves are emulated in `tests/kernels/test_emulated.py`, a part of which is run from here.
"""

import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import triton

from bench.ptx import EmulationError, arithmetic, launch, machine
from bench.ptx.memory import Region
from tests import ROOT

pytestmark = pytest.mark.host
HERE = 1 << 20  # where the memory of these tests lies


def entry(body: str, parameters: int = 1) -> str:
    """An entry as Triton writes it; parameter 0 is the address of memory."""
    declared = ",\n".join(f"\t.param .u64 .ptr .global .align 1 k_param_{k}" for k in range(parameters))
    lines = "\n".join(f"\t{line.strip()}" for line in body.strip().splitlines())
    return f""".visible .entry k(
{declared}
)
.reqntid 32
{{
\t.reg .pred \t%p<9>;
\t.reg .b16 \t%rs<9>;
\t.reg .b32 \t%r<9>;
\t.reg .b64 \t%rd<9>;
\t.loc\t1 7 9
{lines}
}}
\t.file\t1 "/somewhere/kernel.py"
"""


def run(
    body: str,
    blocks: int = 1,
    warps: int = 1,
    shared: int = 0,
    values: Any = 256 * (0,),
    readable: Any = True,
    writable: Any = True,
) -> Any:
    """What is in memory afterwards; %r1 is the thread, %r2 the block, %rd1 the address of "its" word."""
    start = """
        ld.param.b64 %rd1, [k_param_0];
        mov.u32 %r1, %tid.x;
        mov.u32 %r2, %ctaid.x;
        mad.wide.u32 %rd1, %r1, 4, %rd1;
    """
    values = np.array(values, np.uint32)
    cells = np.ones(values.nbytes // 2, np.bool_)
    region = Region(HERE, values.view(np.uint8), cells & readable, cells & writable)
    machine.run(entry(start + body + "\nret;"), blocks, warps, [np.array(HERE, np.uint64)], [region], shared)
    return values


def f32(*values: float) -> list[int]:
    return [int(x) for x in np.array(values, np.float32).view(np.uint32)]


def bits(value: float) -> int:
    return f32(value)[0]


BIG = 1 << 31
OPERATIONS: list[tuple[str, list[int], int]] = [
    ("add.s32", [BIG - 1, 1], BIG),
    ("sub.s32", [0, 1], 2**32 - 1),
    ("mul.lo.s32", [1 << 20, 1 << 13], 0),
    ("mad.lo.s32", [7, 5, 3], 38),
    ("div.s32", [2**32 - 7, 2], 2**32 - 3),  # -7 / 2 = -3, towards zero
    ("div.u32", [2**32 - 7, 2], (2**32 - 7) // 2),
    ("rem.s32", [2**32 - 7, 2], 2**32 - 1),
    ("min.s32", [2**32 - 1, 1], 2**32 - 1),
    ("min.u32", [2**32 - 1, 1], 1),
    ("shl.b32", [3, 31], BIG),
    ("shl.b32", [3, 32], 0),
    ("shr.u32", [BIG, 31], 1),
    ("shr.u32", [BIG, 40], 0),
    ("shr.s32", [BIG, 31], 2**32 - 1),
    ("shr.s32", [BIG, 40], 2**32 - 1),
    ("xor.b32", [6, 3], 5),
    ("not.b32", [0], 2**32 - 1),
    ("bfe.u32", [0b1011000, 3, 3], 0b011),
    ("add.f32", f32(1, 2**-24), bits(1)),  # to even
    ("add.f32", f32(1, 1.5 * 2**-24), bits(1 + 2**-23)),
    ("mul.f32", f32(3, -0.5), bits(-1.5)),
    ("fma.rn.f32", f32(1 + 2**-12, 1 + 2**-12, -1 - 2**-11), bits(2**-24)),  # one rounding, not two
    ("mul.ftz.f32", f32(2**-100, -(2**-30)), bits(-0.0)),
    ("mul.f32", f32(2**-100, 2**-30), bits(2**-130)),
    ("max.f32", f32(np.nan, 1), bits(1)),
    ("max.f32", f32(-2, -1, np.nan), bits(-1)),
    ("min.f32", f32(-2, np.nan), bits(-2)),
    ("neg.f32", f32(1), bits(-1)),
    ("abs.f32", f32(-1), bits(1)),
    ("ex2.approx.ftz.f32", f32(-3), bits(0.125)),
    ("ex2.approx.ftz.f32", f32(-np.inf), bits(0)),
    ("rsqrt.approx.ftz.f32", f32(4), bits(0.5)),
    ("div.full.f32", f32(1, 3), bits(1 / 3)),
    ("cvt.rn.f32.s32", [2**32 - 3], bits(-3)),
    ("cvt.rn.bf16x2.f32", f32(1 + 2**-8, 1 + 3 * 2**-8), 0x3F80_3F82),  # both to even
    ("cvt.rn.f16x2.f32", f32(1, -2), 0x3C00_C000),
]


@pytest.mark.parametrize(("opcode", "operands", "expected"), OPERATIONS, ids=[str(x[0]) for x in OPERATIONS])
def test_an_instruction_computes(opcode: str, operands: list[int], expected: int) -> None:
    moves = "\n".join(f"mov.b32 %r{k + 3}, {x};" for k, x in enumerate(operands))
    registers = ", ".join(f"%r{k + 3}" for k in range(len(operands)))
    found = run(f"{moves}\n{opcode} %r8, {registers};\nst.global.b32 [ %rd1 + 0 ], {{ %r8 }};")
    assert hex(found[0]) == hex(expected)
    assert (found[:32] == expected).all()
    assert (found[32:] == 0).all()


@pytest.mark.parametrize(
    ("compare", "a", "b", "expected"),
    [
        ("lt.f32", 1.0, 2.0, True),
        ("lt.f32", np.nan, 2.0, False),
        ("ltu.f32", np.nan, 2.0, True),
        ("ne.f32", np.nan, 2.0, False),
        ("neu.f32", np.nan, 2.0, True),
        ("equ.f32", 1.0, 2.0, False),
        ("geu.f32", 1.0, 2.0, False),
        ("lt.s32", -1.0, 1.0, True),  # floats' bits: negative as integers, too
        ("lt.u32", -1.0, 1.0, False),
    ],
)
def test_comparisons_know_nan_and_signs(compare: str, a: float, b: float, expected: bool) -> None:
    (x, y) = f32(a, b)
    body = f"setp.{compare} %p1, {x}, {y};\nselp.b32 %r3, 1, 2, %p1;\nst.global.b32 [ %rd1 + 0 ], {{ %r3 }};"
    assert run(body.replace(f"{x}, {y}", f"0f{x:08X}, 0f{y:08X}"))[0] == (1 if expected else 2)


def test_wide_and_narrow_registers() -> None:
    body = """
        mov.b32 %r3, -2;
        mul.wide.s32 %rd2, %r3, 3;
        mov.b64 {%r4, %r5}, %rd2;
        cvt.u32.u64 %r6, %rd2;
        mov.b32 {%rs1, %rs2}, 0x3F80C000;
        cvt.f32.bf16 %r7, %rs2;
        mov.b32 %r8, {%rs2, %rs1};
        mad.wide.u32 %rd1, %r1, 12, %rd1;
        st.global.v2.b32 [ %rd1 + 0 ], { %r4, %r5 };
        st.global.b32 [ %rd1 + 8 ], { %r7 };
        st.global.b32 [ %rd1 + 12 ], { %r8 };
    """
    found = run(body)
    assert [hex(x) for x in found[:4]] == ["0xfffffffa", "0xffffffff", "0x3f800000", "0xc0003f80"]


def test_pairs_of_floats() -> None:
    body = """
        mov.b32 %r3, 0f40000000;
        mov.b32 %r4, 0f40400000;
        mov.b64 %rd2, {%r3, %r4};
        fma.rn.f32x2 %rd3, %rd2, %rd2, %rd2;
        mov.b64 {_, %r5}, %rd3;
        st.global.b32 [ %rd1 + 0 ], { %r5 };
    """
    found = run(body)
    assert found[0] == bits(12)


def test_lanes_exchange() -> None:
    body = """
        shfl.sync.bfly.b32 %r3, %r1, 5, 31, -1;
        st.global.b32 [ %rd1 + 0 ], { %r3 };
    """
    assert run(body, warps=2)[:64].tolist() == [k ^ 5 for k in range(64)]
    body = """
        shr.u32 %r4, %r1, 1;
        shfl.sync.idx.b32 %r3, %r1, %r4, 31, -1;
        st.global.b32 [ %rd1 + 0 ], { %r3 };
    """
    assert run(body, warps=2)[:64].tolist() == [k // 32 * 32 + k // 2 % 32 for k in range(64)]
    body = """
        cvt.rn.f32.s32 %r3, %r1;
        mov.b32 %r4, -1;
        redux.sync.max.f32 %r3, %r3, %r4;
        st.global.b32 [ %rd1 + 0 ], { %r3 };
    """
    assert run(body, warps=2)[:64].tolist() == 32 * f32(31) + 32 * f32(63)


LOOP = """
    mov.b32 %r3, 0;
    mov.b32 %r4, 0;
    $L__again:
    add.s32 %r3, %r3, %r4;
    add.s32 %r4, %r4, 1;
    setp.le.s32 %p1, %r4, %r2;
    @%p1 bra $L__again;
    setp.eq.b32 %p2, %r2, 1;
    @!%p2 bra $L__end;
    add.s32 %r3, %r3, 100;
    $L__end:
    mad.wide.u32 %rd1, %r2, 128, %rd1;
    st.global.b32 [ %rd1 + 0 ], { %r3 };
"""


def test_blocks_go_different_ways() -> None:
    found = run(LOOP, blocks=4).reshape(8, 32)
    assert [set(row) for row in found[:5].tolist()] == [{0}, {101}, {3}, {6}, {0}]


def test_a_guard_leaves_the_others_as_they_were() -> None:
    body = """
        setp.lt.u32 %p1, %r1, 3;
        mov.b32 %r3, 7;
        @%p1 ld.global.b32 { %r3 }, [ %rd1 + 0 ];
        add.s32 %r3, %r3, 1;
        @!%p1 st.global.b32 [ %rd1 + 0 ], { %r3 };
    """
    assert run(body, values=np.full(64, 5, np.uint32))[:32].tolist() == 3 * [5] + 29 * [8]


STORE = "st.global.b32 [ %rd1 + 0 ], { %r1 };"
NEIGHBOUR = "add.s64 %rd2, %rd1, 4;"
SHARED = """
    shl.b32 %r3, %r1, 2;
    mov.b32 %r4, global_smem;
    add.s32 %r4, %r4, %r3;
    st.shared.b32 [ %r4 + 0 ], %r1;
    xor.b32 %r3, %r3, 128;
    mov.b32 %r5, global_smem;
    add.s32 %r5, %r5, %r3;
    bar.sync 0;
    ld.shared.b32 %r6, [ %r5 + 0 ];
    st.global.b32 [ %rd1 + 0 ], { %r6 };
"""
ERRORS = {
    "beyond the end": (
        f"{NEIGHBOUR} add.s64 %rd2, %rd2, 900; {STORE.replace('rd1', 'rd2')}",
        "out of bounds",
    ),
    "before the start": ("ld.global.b32 { %r3 }, [ %rd1 + -4 ];", "nothing lies at the address"),
    "misaligned": ("ld.global.b32 { %r3 }, [ %rd1 + 2 ];", "misaligned load of 4 bytes"),
    "a vector misaligned": ("ld.global.v2.b32 { %r3, %r4 }, [ %rd1 + 0 ];", "misaligned load of 8 bytes"),
    "unknown": ("sin.approx.f32 %r3, %r1;", "unknown instruction"),
    "unknown modifier": ("add.sat.f32 %r3, %r1, %r1;", "unknown instruction"),
    "unknown guard": ("setp.eq.b32 %p1, %r1, 1; @%p1 mov.b32 %r3, %r1;", "unknown with a guard"),
    "unknown barrier": ("bar.sync 1;", "unknown instruction"),
    "a part of a block": (
        f"setp.lt.u32 %p1, %r1, 40; @%p1 bra $L__end; bar.sync 0; $L__end: {STORE}",
        "a branch parts the threads of a block",
    ),
    "a part of a warp": (
        f"setp.lt.u32 %p1, %r1, 3; @%p1 bra $L__end; bar.sync 0; $L__end: {STORE}",
        "a branch parts the threads of a block",
    ),
    "a return of some": ("setp.lt.u32 %p1, %r1, 3; @%p1 ret;", "a branch parts the threads of a block"),
    "a neighbour's word": (
        f"{NEIGHBOUR} {STORE} ld.global.b32 {{ %r3 }}, [ %rd2 + 0 ];",
        "a race with st.global",
    ),
    "overwritten": (f"{NEIGHBOUR} ld.global.b32 {{ %r3 }}, [ %rd2 + 0 ]; {STORE}", "a race with ld.global"),
    "two blocks": (
        f"mov.b32 %r1, %r2; setp.eq.b32 %p1, %r1, 0; bar.sync 0; {STORE}",
        "a race with st.global",
    ),
    "one place": ("and.b64 %rd2, %rd1, -512; st.global.b32 [ %rd2 + 0 ], { %r1 };", "hold different values"),
    "no barrier": (SHARED.replace("bar.sync 0;", ""), "a race with st.shared"),
    "shared memory that nobody wrote": ("ld.shared.b32 %r6, [ global_smem ];", "has written"),
    "beyond shared memory": (SHARED.replace("%r1, 2;", "%r1, 3;"), "out of the bounds of shared memory"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_found(name: str) -> None:
    body, message = ERRORS[name]
    body = re.sub(r"[;:] +", lambda found: f"{found[0].strip()}\n", body)
    with pytest.raises(EmulationError, match=message) as error:
        run(body, blocks=2 if name == "two blocks" else 1, warps=2, shared=256)
    assert "kernel.py:7" in str(error.value)


def test_with_a_barrier_between_there_is_no_race() -> None:
    assert run(SHARED, warps=2, shared=256)[:64].tolist() == [k ^ 32 for k in range(64)]
    run(f"{NEIGHBOUR}\n{STORE}\nbar.sync 0;\nld.global.b32 {{ %r3 }}, [ %rd2 + 0 ];", warps=2)


def test_what_may_be_read_and_written_is_kept_apart() -> None:
    load = "ld.global.b32 { %r3 }, [ %rd1 + 0 ];"
    run(load, writable=False)
    run(STORE, readable=False)
    for body, masks in ((load, {"readable": False}), (STORE, {"writable": False})):
        with pytest.raises(EmulationError, match="nobody may touch"):
            run(body, **masks)
    half = np.arange(512) < 63  # the last of 32 words in part
    with pytest.raises(EmulationError, match="out of bounds"):
        run(load, readable=half)


def test_what_cannot_be_read_is_an_error() -> None:
    with pytest.raises(EmulationError, match="cannot read 'call something'"):
        run("call something")
    with pytest.raises(EmulationError, match="no entry"):
        machine.run("// nothing", 1, 1, [], [], 0)


def test_noise_is_as_large_as_documented_and_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = arithmetic.OPERATIONS["ex2.approx.f32", 1].compute
    x = np.random.default_rng(0).uniform(-9, 9, 9999).astype(np.float32)
    exact = np.exp2(x.astype(np.float64))
    assert np.abs(operation(x) / exact - 1).max() <= 2.0**-24
    monkeypatch.setattr(arithmetic, "NOISE", 1.0)
    error = operation(x) / exact - 1
    assert 1.8 * 2.0**-23 < np.abs(error).max() <= 2.5 * 2.0**-23
    assert abs(error.mean()) < 0.1 * 2.0**-23
    assert (operation(x) == operation(x)).all()
    assert operation(np.zeros(1, np.float32)) == 1


def test_comments_say_what_is_written() -> None:
    source = """
    def kernel(
        logits_ptr,  # [O, I, V]
        state_ptr,  # [4, N] fp32, out: what the backward needs
        grad_ptr,  # [O, I, V], out if HAS_GRAD; may be logits_ptr
        sum_ptr,  # [N], in and out
        N,
    """
    assert launch.written_by(source, {"HAS_GRAD": False}) == {"state_ptr": "out", "sum_ptr": "in and out"}
    assert launch.written_by(source, {"HAS_GRAD": True})["grad_ptr"] == "out"


# ---- the kernels


def emulated(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ.copy(), capture_output=True, text=True)


@pytest.mark.skipif(bool(launch.unsupported()), reason=launch.unsupported() or "supported")
def test_the_compiled_kernels_are_right_and_their_barriers_needed() -> None:
    done = emulated("--emulate", "sm_90", "-m", "not thorough", "tests/kernels/test_emulated.py")
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"(\d+) passed, \d+ deselected", done.stdout)
    assert found, done.stdout
    assert int(found[1]) >= 10


def test_an_unknown_target_and_another_triton_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    done = emulated("--emulate", "sm_75", "tests/kernels/test_emulated.py")
    assert done.returncode == 4
    assert "--emulate takes sm_80, sm_90, sm_100, got sm_75" in done.stderr
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert launch.unsupported() == "the emulation is written for the PTX of triton 3.7, this is 3.5.1"
