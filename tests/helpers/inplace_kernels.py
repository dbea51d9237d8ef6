"""Kernels written to be caught, or let through, by the checks of bench.aot.

Run as a program without TRITON_INTERPRET it compiles them and prints {name: what was found} as JSON.
"""

import json
from typing import Any

import torch
import triton
import triton.language as tl

from bench.aot import TARGETS, overwrite_hazards, places, registers_and_spills
from bench.ptx.launch import compiled_for


@triton.jit
def same_width(logits_ptr, V_units, BLOCK_V: tl.constexpr):
    for start in range(0, V_units, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        x = tl.load(logits_ptr + offs_v)
        tl.store(logits_ptr + offs_v, x * 2)


@triton.jit
def narrower(logits_ptr, V_units, BARRIER: tl.constexpr, BLOCK_V: tl.constexpr):
    half_ptr = logits_ptr.to(tl.pointer_type(tl.bfloat16))
    for start in range(0, V_units, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        x = tl.load(logits_ptr + offs_v)
        if BARRIER:
            tl.debug_barrier()
        tl.store(half_ptr + offs_v, x.to(tl.bfloat16))


@triton.jit
def barrier_before(logits_ptr, V_units, BLOCK_V: tl.constexpr):
    half_ptr = logits_ptr.to(tl.pointer_type(tl.bfloat16))
    offs_v = tl.arange(0, BLOCK_V)
    tl.debug_barrier()
    x = tl.load(logits_ptr + V_units + offs_v)
    tl.store(half_ptr + offs_v, x.to(tl.bfloat16))


@triton.jit
def barrier_elsewhere(logits_ptr, V_units, BLOCK_V: tl.constexpr):
    half_ptr = logits_ptr.to(tl.pointer_type(tl.bfloat16))
    offs_v = tl.arange(0, BLOCK_V)
    x = tl.load(logits_ptr + offs_v)
    if V_units > 7:
        tl.debug_barrier()
    tl.store(half_ptr + offs_v, x.to(tl.bfloat16))


@triton.jit
def two_pointers(logits_ptr, grad_ptr, V_units, BLOCK_V: tl.constexpr):
    offs_v = tl.arange(0, BLOCK_V)
    first = tl.load(logits_ptr + V_units)  # every thread reads it, any thread may overwrite it
    x = tl.load(logits_ptr + offs_v)
    tl.store(grad_ptr + offs_v, x * first)


@triton.jit
def hungry(logits_ptr, V_units, BLOCK_V: tl.constexpr):
    """Holds far more values than a thread has registers."""
    offs_v = tl.arange(0, BLOCK_V)
    x = tl.load(logits_ptr + offs_v)
    for _ in range(V_units):
        x = tl.exp(x) + tl.sum(x, axis=0)
    tl.store(logits_ptr + offs_v, x)


def spills(target: str) -> int:
    block_v = 512 * TARGETS[target].warp_size
    return registers_and_spills(compiled(hungry, target, BLOCK_V=block_v, num_warps=1).asm)[1]


def linkable(target: str) -> bool:
    """Whether Triton can link for a target: for AMD, 3.4 asks for ROCm's linker, later ones need none."""
    if TARGETS[target].backend != "hip":
        return True
    from triton.backends.amd.compiler import HIPBackend

    try:
        getattr(HIPBackend, "path_to_rocm_lld", str)()
    except Exception:  # that is what it raises
        return False
    return True


def hazards(fn: Any, aliases: tuple[str, ...] = (), **constants: Any) -> list[str]:
    made = compiled(fn, "sm_90", BLOCK_V=1024, **constants)
    return overwrite_hazards(made.asm["ttgir"], places(made, aliases))


def compiled(fn: Any, target: str, **constants: Any) -> Any:
    found: list[Any] = []
    tensors = {name: torch.zeros(1) for name in ("logits_ptr", "grad_ptr") if name in fn.arg_names}
    with compiled_for(TARGETS[target], lambda kernel, *_: found.append(kernel)):
        fn[(1,)](**tensors, V_units=9, **constants)
    return found[0]


if __name__ == "__main__":
    found = {
        "same width": hazards(same_width),
        "narrower": hazards(narrower, BARRIER=False),
        "narrower with a barrier": hazards(narrower, BARRIER=True),
        "barrier before": hazards(barrier_before),
        "barrier elsewhere": hazards(barrier_elsewhere),
        "two pointers": hazards(two_pointers),
        "two pointers to one tensor": hazards(two_pointers, ("logits_ptr", "grad_ptr")),
    }
    spilled = {f"spills {target}": spills(target) for target in TARGETS if linkable(target)}
    print(json.dumps(found | spilled))
