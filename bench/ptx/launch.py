"""Triton with the emulation in the place of a GPU, on CPU tensors.

    with emulated("sm_90"):
        token_stats(logits, target, impl="triton")

Triton itself decides what a launch is specialised on, and compiles it. The comment at a kernel's argument
says whether it is written: "out", "out if SOME_FLAG" or "in and out"; what is none of them is only read. What
is "out" has to be written to the last byte: all of it, or as many rows of [O, I, V] as there are programs.
"""

import ctypes
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.ptx import EmulationError, machine
from bench.ptx.arithmetic import Array
from bench.ptx.memory import CELL, Mask, Region

TRITON = "3.7"  # whose PTX this was written for
TARGETS = ("sm_80", "sm_90", "sm_100")


def unsupported() -> str:
    """Why kernels cannot be emulated here; empty if they can be."""
    if triton.__version__.startswith(f"{TRITON}."):
        return ""
    return f"the emulation is written for the PTX of triton {TRITON}, this is {triton.__version__}"


class Pretender:
    """A driver for a device of this target, as far as Triton asks it in order to compile."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # what is compiled is kept for each device

    def get_current_stream(self, device: str) -> int:
        return 0


# What is called with a compiled kernel, its grid and its arguments.
Launched = Callable[[Any, tuple[int, ...], dict[str, Any]], object]


@contextmanager
def compiled_for(target: GPUTarget, launched: Launched) -> Iterator[None]:
    """Call ``launched(compiled kernel, grid, arguments)`` instead of launching kernels on a GPU."""
    original = JITFunction.run

    def run(self: Any, *, grid: tuple[int, ...], warmup: bool, **arguments: Any) -> Any:
        kernel = original(self, grid=grid, warmup=True, **arguments)
        if not warmup:
            launched(kernel, grid, arguments)
        return kernel

    before = dict(vars(driver))  # by whatever name a Triton keeps the active one
    driver.set_active(Pretender(target))
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = original
        vars(driver).update(before)


@contextmanager
def emulated(target: str) -> Iterator[None]:
    """Compile kernels for this target, and emulate them."""
    with compiled_for(GPUTarget("cuda", int(target.removeprefix("sm_")), 32), emulate):
        yield


def emulate(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> int:
    """Run a compiled kernel on CPU tensors; return how many instructions its threads executed."""
    tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    outputs = written_by(kernel.src.fn.src, arguments)
    regions: dict[int, Region] = {}
    for name, x in tensors.items():
        storage = x.untyped_storage()
        if storage.data_ptr() not in regions:
            nobody = np.zeros((2, storage.nbytes() // CELL), np.bool_)
            raw = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
            regions[storage.data_ptr()] = Region(storage.data_ptr(), np.ctypeslib.as_array(raw), *nobody)
        region = regions[storage.data_ptr()]
        region.writable |= elements(x) & (name in outputs)
        region.readable |= elements(x) & (outputs.get(name) != "out")
    signature, metadata = kernel.src.signature, kernel.metadata
    parameters = [bits(arguments[name], kind) for name, kind in signature.items() if kind != "constexpr"]
    program = kernel.asm["ptx"]
    try:
        executed = machine.run(
            program, grid[0], metadata.num_warps, parameters, [*regions.values()], metadata.shared
        )
        for name, x in tensors.items():
            promised = elements(x, grid[0]) & (outputs.get(name) == "out")
            if (promised & ~regions[x.untyped_storage().data_ptr()].written).any():
                raise EmulationError(f"a part of {name} was not written")
    except EmulationError as error:
        raise EmulationError(f"{kernel.name} for {metadata.target.arch}: {error}") from None
    return executed


def written_by(source: str, arguments: dict[str, Any]) -> dict[str, str]:
    """Of each argument that the kernel may write, "out" or "in and out"."""
    found = re.findall(r"(\w+),\s*#.*?, (out|in and out)\b(?: if (\w+))?", source)
    return {name: how for name, how, flag in found if not flag or arguments[flag]}


def elements(x: Tensor, programs: int | None = None) -> Mask:
    """The cells of its storage that are a tensor's; of [O, I, V] only those of its first rows."""
    wanted = np.ones(x.shape, np.bool_)
    if programs is not None and x.dim() == 3:
        wanted.reshape(-1, x.shape[2])[programs:] = False
    of_storage = np.zeros(x.untyped_storage().nbytes() // x.element_size(), np.bool_)
    np.lib.stride_tricks.as_strided(of_storage[x.storage_offset() :], x.shape, x.stride())[...] = wanted
    return np.repeat(of_storage, x.element_size() // CELL)


def bits(value: Any, kind: str) -> Array:
    """A parameter as the launcher hands it over."""
    if isinstance(value, Tensor):
        return np.array(value.data_ptr(), np.uint64)
    return np.array(value, np.float32 if kind == "fp32" else f"{kind[0]}{int(kind[1:]) // 8}")
