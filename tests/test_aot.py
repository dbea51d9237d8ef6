"""The checks of bench.aot can fail: on kernels made for it, and on assembly with known instructions."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench import aot

ROOT = Path(__file__).parent.parent


def test_overwriting_another_width_needs_a_barrier() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.inplace_kernels"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    caught = {name: bool(hazards) for name, hazards in json.loads(result.stdout).items()}
    assert caught == {
        "same width": False,
        "narrower": True,
        "narrower with a barrier": False,
        "barrier elsewhere": True,
        "two pointers": False,
        "two pointers to one tensor": True,
    }


def test_tile_widths_are_read_from_the_lines_that_move_tiles() -> None:
    name, line = next(place for place in sorted(aot.tile_lines()) if place[0] == "primitives.py")
    ptx = f"""
    .loc 1 {line} 9
    ld.global.v4.b32 {{ %r1, %r2, %r3, %r4 }}, [ %rd1 + 0 ];
    @%p1 st.global.b16 [ %rd2 + 0 ], {{ %rs1 }};
    .loc 1 {line + 1000} 9
    ld.global.b32 {{ %r1 }}, [ %rd1 + 0 ];
    .file 1 "/somewhere/{name}"
    """
    assert aot.tile_widths(ptx, aot.PTX_ACCESS) == {"load": {16}, "store": {2}}
    amd = f"""
    .file 2 "/somewhere" "{name}"
    .loc 2 {line} 9
    global_load_dwordx4 v[0:3], v[4:5], off
    global_store_short v[4:5], v6, off
    """
    assert aot.tile_widths(amd, aot.AMD_ACCESS) == {"load": {16}, "store": {2}}


GOOD = aot.Report(
    aot.Variant("ppo_loss", "sm_90", "bf16", align=8, softcap=False),
    registers=64,
    spills=0,
    shared=32,
    load_bytes=16,
    store_bytes=16,
    hazards=(),
)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"spills": 8}, "8 spilled"),
        ({"registers": 129}, "129 registers"),
        ({"load_bytes": 2}, "tile loads of 2 bytes"),
        ({"store_bytes": 8}, "tile stores of 8 bytes"),
        ({"load_bytes": 0}, "no tile access"),
        ({"store_bytes": 0}, "no tile access"),
        ({"hazards": ("race",)}, "race"),
    ],
)
def test_problems_are_found(change: dict[str, object], problem: str) -> None:
    assert GOOD.problems() == []
    assert problem in " ".join(replace(GOOD, **change).problems())


def test_an_odd_vocabulary_may_be_read_narrowly() -> None:
    odd = replace(GOOD, variant=replace(GOOD.variant, align=1), load_bytes=2, store_bytes=2)
    assert odd.problems() == []
