"""Compile every kernel ahead of time for GPUs that are not here, and read what the compiler made.

    python -m bench.aot            # or: make aot

Per kernel, target, dtype and kind of vocabulary: registers, spills, shared memory, the bytes one
instruction moves where a tile of logits is read or written, and on NVIDIA's the instructions spent on each
logit in every pass. The exit status is 1 if

- a vector register or a byte of local memory is spilled,
- a kernel needs more than 128 registers,
- a tile is read or written less than 16 bytes at a time although 8 divides V,
- a pass spends more instructions on a logit than an H100 has time for although 8 divides V, or
- a kernel overwrites what it reads (in place) and a store can overtake a load: a tile stored with
  another element width or layout than the one it was loaded with, and no barrier between the two.
"""

import ast
import inspect
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aer_fast.kernels import ppo_loss, primitives, token_stats

MAX_REGISTERS = 128
VECTOR_BYTES = 16
# A logit, by whether there is a softcap. An H100 that reads a bfloat16 logit (3.0e12 bytes a second) issues
# 19 instructions of a thread meanwhile (132 multiprocessors × 128 lanes × 1.7 GHz), and 39 for a float32 one.
MAX_INSTRUCTIONS = {False: 12.5, True: 33.0}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Kernel:
    """A kernel, the constants that select a variant of it, and the pointers that may be one."""

    fn: Any
    constants: tuple[tuple[str, bool], ...] = ()
    aliases: tuple[str, ...] = ()
    logits: str = ""  # the dtype of the logits where it is not that of the gradient
    passes: int = 1  # over the row

    @property
    def writes(self) -> bool:
        """Whether this variant writes a gradient."""
        return "grad_ptr" in self.fn.arg_names and ("HAS_GRAD", False) not in self.constants


KERNELS = {
    "token_stats fwd": Kernel(token_stats._token_stats_fwd_kernel),
    "token_stats bwd": Kernel(
        token_stats._token_stats_bwd_kernel,
        constants=(("HAS_PICKED", False),),
        aliases=("logits_ptr", "grad_ptr"),
    ),
    # behind the LM head: float32 logits, a gradient of the dtype of the weights
    "linear bwd": Kernel(
        token_stats._token_stats_bwd_kernel, constants=(("HAS_PICKED", True),), logits="fp32"
    ),
    "linear ppo_loss": Kernel(
        ppo_loss._ppo_loss_kernel,
        constants=(("HAS_OLD", True), ("HAS_REF", True), ("HAS_GRAD", True)),
        logits="fp32",
        passes=2,
    ),
    "ppo_loss": Kernel(
        ppo_loss._ppo_loss_kernel,
        constants=(("HAS_OLD", True), ("HAS_REF", True), ("HAS_GRAD", True)),
        aliases=("logits_ptr", "grad_ptr"),
        passes=2,
    ),
    "ppo_loss no grad": Kernel(
        ppo_loss._ppo_loss_kernel,
        constants=(("HAS_OLD", False), ("HAS_REF", False), ("HAS_GRAD", False)),
    ),
    "scale_grad": Kernel(ppo_loss._scale_grad_kernel),
}


@dataclass(frozen=True)
class Variant:
    """One compilation."""

    kernel: str
    target: str
    dtype: str  # of the gradient, and of the logits unless the kernel says otherwise: "bf16" or "fp32"
    align: int  # the largest power of two up to 8 that divides V
    softcap: bool


@dataclass(frozen=True)
class Report:
    """What the compiler made of a variant."""

    variant: Variant
    registers: int
    spills: int  # vector registers on AMD, bytes of local memory on NVIDIA
    shared: int  # bytes
    load_bytes: int  # the narrowest tile load; 0 where there is none
    store_bytes: int
    instructions: tuple[float, ...]  # a logit, of each pass over the row that reads it
    hazards: tuple[str, ...]

    def problems(self) -> list[str]:
        found = list(self.hazards)
        if self.spills:
            found.append(f"{self.spills} spilled")
        if self.registers > MAX_REGISTERS:
            found.append(f"{self.registers} registers, more than {MAX_REGISTERS}")
        if self.load_bytes == 0 or (self.store_bytes == 0 and KERNELS[self.variant.kernel].writes):
            found.append("no tile access found in the assembly")
        if self.variant.align == 8:
            for name, width in (("load", self.load_bytes), ("store", self.store_bytes)):
                if 0 < width < VECTOR_BYTES:
                    found.append(f"tile {name}s of {width} bytes")
            most = MAX_INSTRUCTIONS[self.variant.softcap]
            found_passes, passes = len(self.instructions), KERNELS[self.variant.kernel].passes
            if TARGETS[self.variant.target].backend == "cuda" and found_passes != passes:
                found.append(f"{found_passes} loops that read logits in the assembly, not {passes}")
            if max(self.instructions, default=0) > most:
                found.append(f"{max(self.instructions)} instructions a logit, more than {most}")
        return found


def variants() -> list[Variant]:
    chosen = product(KERNELS, TARGETS, ("bf16", "fp32"), (8, 1), (False, True))
    return [Variant(*v) for v in chosen if not v[-1] or "HAS_SOFTCAP" in KERNELS[v[0]].fn.arg_names]


def report(variant: Variant) -> Report:
    """Compile one variant and read registers, spills, shared memory, widths and hazards."""
    kernel = KERNELS[variant.kernel]
    target = TARGETS[variant.target]
    tile = primitives.tile_config(128_256, variant.align, target.warp_size)
    dtypes = {"logits_ptr": kernel.logits or variant.dtype, "grad_ptr": variant.dtype}
    constants = {"ALIGN": variant.align, **tile, **dict(kernel.constants)}
    if "LANES" in kernel.fn.arg_names:
        itemsize = ITEMSIZE[dtypes["logits_ptr"]]
        constants |= primitives.lane_config(constants, itemsize, target.warp_size)
    options = {"num_warps": constants.pop("num_warps")}
    if "HAS_SOFTCAP" in kernel.fn.arg_names:
        constants["HAS_SOFTCAP"] = variant.softcap
    compiled = compile_kernel(kernel.fn, target, dtypes, constants, options)

    if "ptx" in compiled.asm:
        widths = tile_widths(compiled.asm["ptx"], PTX_ACCESS)
    else:
        widths = tile_widths(compiled.asm["amdgcn"], AMD_ACCESS)
    return Report(
        variant,
        *registers_and_spills(compiled.asm),
        compiled.metadata.shared,
        min(widths["load"], default=0),
        min(widths["store"], default=0),
        passes(compiled.asm, constants["BLOCK_V"] // (target.warp_size * options["num_warps"])),
        tuple(overwrite_hazards(compiled.asm["ttgir"], kernel.aliases)),
    )


def compile_kernel(
    fn: Any, target: GPUTarget, dtypes: dict[str, str], constants: dict[str, Any], options: dict[str, Any]
) -> Any:
    """Compile as a launch on 16-byte aligned tensors would, with no luck in the integers."""
    signature = {}
    for name in fn.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in dtypes:
            signature[name] = f"*{dtypes[name]}"
        elif name.endswith("_ptr"):
            signature[name] = "*i64" if name in ("target_ptr", "picked_ptr") else "*fp32"
        else:
            signature[name] = "i32" if name in INTEGERS or name.startswith("stride_") else "fp32"
    aligned = {
        (k,): [["tt.divisibility", 16]]
        for k, name in enumerate(fn.arg_names)
        if signature[name].startswith("*")
    }
    return triton.compile(ASTSource(fn, signature, constants, aligned), target, options)


INTEGERS = ("N", "I", "V_units")
ITEMSIZE = {"bf16": 2, "fp32": 4}


def registers_and_spills(asm: dict[str, Any]) -> tuple[int, int]:
    """Vector registers of a thread; and bytes of local memory on NVIDIA, registers or bytes on AMD."""
    if "cubin" in asm:
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", resource_usage(asm["cubin"])))
        return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])
    notes = dict(re.findall(r"\.(\w+):\s*(\d+)", asm["amdgcn"]))
    return int(notes["vgpr_count"]), int(notes["vgpr_spill_count"]) + int(notes["private_segment_fixed_size"])


def resource_usage(cubin: bytes) -> str:
    return about("cuobjdump", "--dump-resource-usage", cubin)


def about(program: str, option: str, cubin: bytes) -> str:
    """What one of NVIDIA's programs prints."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(BINARIES / program), option, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def passes(asm: dict[str, Any], entries: int) -> tuple[float, ...]:
    """Instructions a logit of each loop that loads from global memory; a thread has ``entries`` of a tile."""
    if "cubin" not in asm:
        return ()
    loops = [count for count, loads in loops_of(about("nvdisasm", "-c", asm["cubin"])) if loads]
    return tuple(round(count / entries, 1) for count in loops)


def loops_of(sass: str) -> list[tuple[int, int]]:
    """(instructions, global loads) of every innermost loop; what a branch inside it skips is left out."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for text in sass.splitlines():
        if found := re.match(r"\s*(\.L_\w+):", text):
            labels[found[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", text):
            instructions.append(found[1])
    branches = {}
    for number, text in enumerate(instructions):
        if found := re.search(r"\bBRA\b.*?(\.L_\w+)", text):
            branches[number] = labels[found[1]]
    loops = [
        (to, number) for number, to in branches.items() if to < number
    ]  # one that ends a kernel is empty
    counted = []
    for start, end in loops:
        if any(start <= s and e <= end for s, e in loops if (s, e) != (start, end)):
            continue
        skipped = {k for b, to in branches.items() if start <= b < to <= end for k in range(b + 1, to)}
        body = [text for k, text in enumerate(instructions[start : end + 1], start) if k not in skipped]
        counted.append((len(body), sum("LDG" in text for text in body)))
    return counted


# The width of a memory instruction: (kind, number of parts, bits of a part).
PTX_ACCESS = re.compile(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bfus](\d+)\b")
AMD_ACCESS = re.compile(r"\b(?:global|buffer|flat)_(load|store)_(\w+)")
AMD_BYTES = {"byte": 1, "ubyte": 1, "short": 2, "ushort": 2, "dword": 4, "dwordx2": 8}
AMD_BYTES |= {"dwordx3": 12, "dwordx4": 16, "short_d16": 2, "short_d16_hi": 2, "ubyte_d16": 1}


def tile_widths(assembly: str, access: re.Pattern[str]) -> dict[str, set[int]]:
    """Bytes per thread of the loads and stores that stem from a source line moving a tile."""
    files: dict[str, str] = {}
    line, inline = ("", 0), False
    widths: dict[str, set[int]] = {"load": set(), "store": set()}
    for number, path in re.findall(r'\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]*)"', assembly):
        files[number] = Path(path).name
    for text in assembly.splitlines():
        if found := re.search(r"\.loc\s+(\d+)\s+(\d+)", text):
            # the lines of one inline assembly are counted on from the source line that it stems from
            line = line if inline else (files.get(found[1], found[1]), int(found[2]))
        elif " inline asm" in text:
            inline = "begin" in text
        elif line in tile_lines() and (found := access.search(text)):
            kind = {"ld": "load", "st": "store"}.get(found[1], found[1])
            if access is PTX_ACCESS:
                widths[kind].add(int(found[2] or 1) * int(found[3]) // 8)
            else:
                widths[kind].add(AMD_BYTES[found[2]])
    return widths


@cache
def tile_lines() -> frozenset[tuple[str, int]]:
    """(file, line) of every tl.load and tl.store of the kernels that moves a tile: it names offs_v."""
    lines = set()
    for path in Path(inspect.getfile(primitives)).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) not in ("tl.load", "tl.store"):
                continue
            if "offs_v" in ast.unparse(node.args[0]):
                lines.add((path.name, node.lineno))
    return frozenset(lines)


def overwrite_hazards(ttgir: str, aliases: tuple[str, ...] = ()) -> list[str]:
    """Stores that may overwrite what another thread has yet to load.

    A tile stored with the element type and layout of the load is taken to be safe, as it is at the same
    offsets: each thread overwrites only what it has read itself. Anything else (another width, another
    layout, a scalar that all threads read) needs a barrier after the load, in a region that also encloses
    the store. Not seen: permuted or shifted offsets, and a load early in a loop's body that reads what an
    earlier iteration stored.
    """
    source: dict[str, str] = {}  # the value a pointer was made from
    regions: list[int] = []  # the lines that opened the regions around this one
    other_branch: dict[int, int] = {}  # of an else region
    loads: list[tuple[int, list[int], str, str]] = []  # line, regions, pointer, type
    barriers: list[tuple[int, list[int]]] = []  # line, regions
    hazards = set()

    def base(value: str) -> str:
        while value in source:
            value = source[value]
        if value not in arguments:
            raise ValueError(f"cannot trace the pointer {value} to an argument of the kernel")
        return "in place" if value.removeprefix("%") in aliases else value

    arguments = re.findall(r"(%\w+): !tt\.ptr", next(x for x in ttgir.splitlines() if "tt.func" in x))
    for number, text in enumerate(ttgir.splitlines()):
        if found := re.search(r"(%\w+) = tt\.(?:addptr|splat|bitcast|broadcast) (%[\w#]+)", text):
            source[found[1]] = found[2]
        elif found := re.search(r"tt\.load (%[\w#]+).* : (.*?)(?: loc\(|$)", text):
            loads.append((number, list(regions), base(found[1]), found[2]))
        elif re.search(r"\b(?:gpu|ttg)\.\w*barrier\b", text):
            barriers.append((number, list(regions)))
        elif found := re.search(r"tt\.store (%[\w#]+).* : (.*?)(?: loc\(|$)", text):
            enclosing = [n for n, around in barriers if around == regions[: len(around)]]
            exclusive = {other_branch[n] for n in regions if n in other_branch}
            for loaded, around, pointer, kind in loads:
                separated = any(loaded < n for n in enclosing) or exclusive & {*around}
                if pointer == base(found[1]) and kind != found[2] and not separated:
                    hazards.add(f"{found[2]} stored over {kind} without a barrier")
        for brace in re.findall(r"[{}]", text):
            if brace == "{":
                regions.append(number)
            else:
                closed = regions.pop()
                if "} else {" in text:
                    other_branch[number] = closed
    return sorted(hazards)


def render(reports: list[Report], console: Console) -> None:
    """A table of 90 columns, and below it what is wrong."""
    table = Table(
        title=f"Kernels compiled ahead of time by triton {triton.__version__}",
        box=None,
        pad_edge=False,
        header_style="bold underline",
        caption="load, store: bytes that one instruction moves of a tile of logits; smem: bytes;"
        " instr: instructions a logit, of each pass",
    )
    for heading in ("kernel", "target", "dtype", "V", "cap"):
        table.add_column(heading, no_wrap=True)
    for heading in ("regs", "spills", "smem", "load", "store", "instr"):
        table.add_column(heading, justify="right", no_wrap=True)
    for r in reports:
        v = r.variant
        widths = [str(width or "-") for width in (r.load_bytes, r.store_bytes)]
        table.add_row(
            *(v.kernel, v.target, v.dtype, "8|V" if v.align == 8 else "odd", "yes" if v.softcap else "-"),
            *(str(r.registers), str(r.spills), str(r.shared), *widths),
            "+".join(f"{count:.0f}" for count in r.instructions) or "-",
            style="bold red" if r.problems() else None,
        )
    console.print(table)
    for r in reports:
        for problem in r.problems():
            console.print(f"{r.variant}: {problem}", style="bold red", markup=False)


def main() -> int:
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: the interpreter compiles nothing. Unset it.")
    chosen = variants()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        reports = list(track(pool.map(report, chosen), "compiling", total=len(chosen), transient=True))
    render(reports, Console(width=90))
    failed = sum(bool(r.problems()) for r in reports)
    print(f"{len(reports)} variants, {failed} with problems")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
