"""Compile every kernel ahead of time for GPUs that are not here, and read what the compiler made.

    python -m bench.aot            # or: make aot

The kernels are launched as the library does it, on a few rows of zeros, and Triton compiles what it makes of
such a launch. Per kernel, target, dtype and form of the logits: registers, spills, shared memory, the bytes
one instruction moves where a tile of logits is read or written, and on NVIDIA's the instructions spent on a
logit: those of every pass's loop in the assembly, or, where a row is shorter than a tile and most of them lie
outside of the loop, those of PTX that are executed when it is emulated. The exit status is 1 if

- a vector register or a byte of local memory is spilled,
- a kernel needs more than 128 registers,
- a tile is read or written less than 16 bytes at a time, or than ALIGN allows,
- more instructions are spent on a logit than MAX_INSTRUCTIONS and its like say,
- logits that are aligned alike are not given the same kernel, or
- a kernel overwrites what it reads (in place) and a store can overtake a load: a tile stored with
  another element width or layout than the one it was loaded with, and no barrier between the two.
"""

import ast
import inspect
import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget

from aer_fast.kernels import divergence, ppo_loss, primitives, token_stats
from aer_fast.kernels.layout import CONSTANTS, DIVERGENCES, PAIR_STATE
from bench.ptx import launch

MAX_REGISTERS = 128
VECTOR_BYTES = 16
# A logit, by whether there is a softcap. An H100 that reads a bfloat16 logit (3.0e12 bytes a second) issues
# 19 instructions of a thread meanwhile (132 multiprocessors × 128 lanes × 1.7 GHz), and 39 for a float32 one.
MAX_INSTRUCTIONS = {False: 12.5, True: 31.5}
# Where loads are narrower than 16 bytes, and each has an address and a mask.
MAX_NARROW_INSTRUCTIONS = {False: 18.0, True: 38.5}
# Executed in a pass over a row of at most one warp's tile.
MAX_SHORT_INSTRUCTIONS = 55.0
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Form:
    """Logits [N, V] as users have them: rows of V + padding entries, from some entry of the memory on."""

    V: int
    padding: int = 0
    start: int = 0
    N: int = 2

    def rows(self, dtype: torch.dtype) -> Tensor:
        memory = torch.zeros(self.start + self.N * (self.V + self.padding), dtype=dtype)
        return memory[self.start :].view(1, self.N, -1)[..., : self.V]


# Each with forms that are aligned alike and so must be given the same kernel.
FORMS = {
    "8|V": (Form(32_776), Form(32_776, padding=8), Form(32_776, start=8), Form(32_776, N=1)),
    "4|V": (Form(16_388), Form(16_388, padding=12), Form(16_392, start=4), Form(16_388, N=1)),
    "2|V": (Form(16_386), Form(16_386, padding=14), Form(16_392, start=2), Form(16_386, N=1)),
    "odd": (Form(16_385), Form(16_385, padding=15), Form(16_392, start=1), Form(16_385, N=1)),
    "8|V short": (Form(256), Form(8), Form(200, padding=8), Form(256, N=1)),
    "odd short": (Form(255), Form(1), Form(255, padding=1), Form(256, start=1), Form(255, N=1)),
}
# Compiled in both dtypes and with a softcap, too, and for all targets or for one of each maker.
EVERY_DTYPE = ("8|V", "odd")
EVERY_TARGET = (*EVERY_DTYPE, "8|V short", "odd short")
SOME_TARGETS = ("sm_90", "gfx942")


@dataclass(frozen=True)
class Inputs:
    """What kernels are launched with."""

    logits: Tensor  # [1, N, V]
    grad: Tensor  # [1, N, V]
    target: Tensor  # [N]
    ones: Tensor  # [N]
    softcap: float


@dataclass(frozen=True)
class Kernel:
    """How the library launches a kernel, and what is true of it."""

    launch: Callable[[Inputs], object]
    wide: bool = False  # float32 logits whatever the gradient's dtype
    in_place: bool = False
    writes: bool = True
    softcap: bool = True
    passes: int = 1  # over the row
    most: tuple[float, float, float] | None = None  # instructions of its own: a logit, with a softcap, short
    registers: int = MAX_REGISTERS


def stats_bwd(x: Inputs, grad: Tensor, picked: Tensor | None = None) -> None:
    state = torch.ones(4, len(x.ones))
    token_stats.token_stats_bwd(x.logits, x.target, x.ones, x.softcap, state, x.ones, x.ones, grad, picked)


def loss(x: Inputs, grad: Tensor | None, *, on_policy: bool = False) -> None:
    constants = torch.ones(len(x.ones), len(CONSTANTS))
    ppo_loss.ppo_loss_fwd(
        *(x.logits, x.target, x.ones, x.softcap, constants, torch.ones(()), grad),
        on_policy=on_policy,
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=3.0,
        kl_coef=0.0 if on_policy else 0.1,
    )


def pair(x: Inputs, kind: str, grad: Tensor | None = None) -> None:
    """Of student and teacher; with a floor of log q for reverse_kl, which alone has one."""
    floor = -20.0 if kind == "reverse_kl" else -math.inf
    state, which = torch.ones(4, len(x.ones)), (DIVERGENCES.index(kind), 0.5, floor, x.softcap, x.softcap)
    both = x.logits, torch.zeros_like(x.logits), x.target, x.ones, x.ones, state, state
    if grad is None:
        divergence.pair_sums_fwd(*both, x.ones, which)
    else:
        pair_state = torch.ones(len(PAIR_STATE), len(x.ones))
        divergence.pair_bwd(*both, pair_state, (x.ones, x.ones, x.ones), grad, None, which)


KERNELS = {
    "token_stats fwd": Kernel(
        lambda x: token_stats.token_stats_fwd(x.logits, x.target, x.ones, x.softcap), writes=False
    ),
    "row_sums": Kernel(
        lambda x: token_stats.row_sums_fwd(x.logits, x.target, x.ones, x.softcap), writes=False
    ),
    "token_stats bwd": Kernel(lambda x: stats_bwd(x, x.logits), in_place=True),
    # behind the LM head: float32 logits, a gradient of the dtype of the weights
    "linear bwd": Kernel(lambda x: stats_bwd(x, x.grad, picked=torch.zeros_like(x.target)), wide=True),
    "linear ppo_loss": Kernel(lambda x: loss(x, x.grad), wide=True, passes=2),
    "ppo_loss": Kernel(lambda x: loss(x, x.logits), in_place=True, passes=2),
    "ppo_loss no grad": Kernel(lambda x: loss(x, None, on_policy=True), writes=False),
    # two logits and what is made of both; jsd with four exponentials and a logarithm
    "reverse_kl": Kernel(lambda x: pair(x, "reverse_kl"), writes=False, most=(65.0, 100.0, 134.0)),
    "reverse_kl grad": Kernel(
        lambda x: pair(x, "reverse_kl", x.logits), in_place=True, most=(55.0, 94.0, 97.0)
    ),
    "linear forward_kl grad": Kernel(
        lambda x: pair(x, "forward_kl", x.grad), wide=True, most=(64.0, 101.0, 97.0)
    ),
    "jsd": Kernel(lambda x: pair(x, "jsd"), writes=False, most=(175.0, 212.0, 256.0), registers=192),
    "jsd grad": Kernel(
        lambda x: pair(x, "jsd", x.logits), in_place=True, most=(136.0, 173.0, 176.0), registers=192
    ),
    "scale_grad": Kernel(lambda x: ppo_loss.scale_grad(x.grad, 2 * torch.ones(())), softcap=False),
}


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    kernel: str
    target: str
    dtype: str  # of the gradient, and of the logits unless the kernel says otherwise: "bf16" or "fp32"
    form: str
    softcap: bool


@dataclass(frozen=True)
class Report:
    """What the compiler made of a variant."""

    variant: Variant
    align: int
    registers: int
    spills: int  # vector registers on AMD, bytes of local memory on NVIDIA
    shared: int  # bytes
    load_bytes: int  # the narrowest tile load; 0 where there is none
    store_bytes: int
    instructions: tuple[float, ...]  # a logit, of each pass over the row that reads it
    hazards: tuple[str, ...]
    others: tuple[Form, ...]  # that are given another kernel

    def problems(self) -> list[str]:
        variant = self.variant
        found = [*self.hazards, *(f"another kernel for {form}" for form in self.others)]
        if self.spills:
            found.append(f"{self.spills} spilled")
        if self.registers > (allowed := KERNELS[variant.kernel].registers):
            found.append(f"{self.registers} registers, more than {allowed}")
        if self.load_bytes == 0 or (self.store_bytes == 0 and KERNELS[variant.kernel].writes):
            found.append("no tile access found in the assembly")
        widest = min(VECTOR_BYTES, self.align * DTYPES[variant.dtype].itemsize)
        for name, width in (("load", self.load_bytes), ("store", self.store_bytes)):
            if 0 < width < widest:
                found.append(f"tile {name}s of {width} bytes")
        passes = KERNELS[variant.kernel].passes
        if variant.form.endswith("short"):
            most = MAX_SHORT_INSTRUCTIONS
        else:
            most = (MAX_INSTRUCTIONS if self.align == 8 else MAX_NARROW_INSTRUCTIONS)[variant.softcap]
            if TARGETS[variant.target].backend == "cuda" and len(self.instructions) != passes:
                found.append(f"{len(self.instructions)} loops that read logits in the assembly, not {passes}")
        if (own := KERNELS[variant.kernel].most) is not None:
            most = own[2 if variant.form.endswith("short") else variant.softcap]
        if (spent := max(self.instructions, default=0.0)) > most:
            found.append(f"{spent} instructions a logit, more than {most}")
        return found


def variants() -> list[Variant]:
    def wanted(v: Variant) -> bool:
        return (
            (KERNELS[v.kernel].softcap or not v.softcap)
            and (v.form in EVERY_DTYPE or (v.dtype == "bf16" and not v.softcap))
            and (v.form in EVERY_TARGET or v.target in SOME_TARGETS)
        )

    chosen = itertools.product(KERNELS, TARGETS, DTYPES, FORMS, (False, True))
    return [v for v in itertools.starmap(Variant, chosen) if wanted(v)]


def report(variant: Variant) -> Report:
    """Compile one variant and read registers, spills, shared memory, widths, instructions and hazards."""
    kernel, target = KERNELS[variant.kernel], TARGETS[variant.target]
    primitives.WARP_SIZE = target.warp_size
    form, *others = FORMS[variant.form]
    if variant.softcap or variant.dtype != "bf16" or variant.target not in SOME_TARGETS:
        others = []
    if target.backend == "hip":  # there an address that 16 bytes do not divide is read narrowly
        others = [other for other in others if other.start % 8 == 0]
    compiled, grid, arguments = compile_launch(variant, form)
    widths = tile_widths(*assembly(compiled))
    entries = arguments["BLOCK_V"] // (target.warp_size * compiled.metadata.num_warps)
    instructions = passes(compiled.asm, entries)
    if variant.form.endswith("short") and target.backend == "cuda" and not launch.unsupported():
        executed = launch.emulate(compiled, grid, arguments)
        instructions = (round(executed / (form.N * form.V * kernel.passes), 1),)
    aliases = ("logits_ptr", "grad_ptr") if kernel.in_place else ()
    return Report(
        variant,
        arguments["ALIGN"],
        *registers_and_spills(compiled.asm),
        compiled.metadata.shared,
        min(widths["load"], default=0),
        min(widths["store"], default=0),
        instructions,
        tuple(overwrite_hazards(compiled.asm["ttgir"], places(compiled, aliases))),
        tuple(other for other in others if code(compile_launch(variant, other)[0]) != code(compiled)),
    )


def code(compiled: Any) -> str:
    """What the compiler made, but for what it notes for debuggers: the paths of the sources, too.

    Those differ where Triton's cache holds what a copy of this project elsewhere has compiled.
    """
    text = re.split(r"^\s*\.section\s+\.debug", assembly(compiled)[0], maxsplit=1, flags=re.MULTILINE)[0]
    return re.sub(r"^\s*\.(loc|file)\b.*", "", text, flags=re.MULTILINE)


def assembly(compiled: Any) -> tuple[str, re.Pattern[str]]:
    """The text, and what reads its memory instructions."""
    if "ptx" in compiled.asm:
        return compiled.asm["ptx"], PTX_ACCESS
    return compiled.asm["amdgcn"], AMD_ACCESS


def compile_launch(variant: Variant, form: Form) -> tuple[Any, tuple[int, ...], dict[str, Any]]:
    """What the launch on such logits compiles, its grid and its arguments."""
    launched: list[tuple[Any, tuple[int, ...], dict[str, Any]]] = []
    with launch.compiled_for(TARGETS[variant.target], lambda *what: launched.append(what)):
        KERNELS[variant.kernel].launch(inputs(variant, form))
    (only,) = launched
    return only


def inputs(variant: Variant, form: Form) -> Inputs:
    dtype = DTYPES[variant.dtype]
    logits = form.rows(torch.float32 if KERNELS[variant.kernel].wide else dtype)
    ones = torch.ones(form.N)
    target = torch.zeros(form.N, dtype=torch.long)
    return Inputs(logits, form.rows(dtype), target, ones, 30.0 if variant.softcap else 0.0)


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


# What makes pointers of pointers; triton 3.9 gives those of narrow loads another layout before it loads.
MAKE_POINTERS = r"tt\.addptr|tt\.splat|tt\.bitcast|tt\.broadcast|ttg\.convert_layout"


def places(compiled: Any, names: tuple[str, ...]) -> tuple[int, ...]:
    """Where parameters stand among a kernel's pointers: triton 3.4's code does not have their names."""
    pointers = [name for name, kind in compiled.src.signature.items() if kind.startswith("*")]
    return tuple(pointers.index(name) for name in names)


def overwrite_hazards(ttgir: str, aliases: tuple[int, ...] = ()) -> list[str]:
    """Stores that may overwrite what another thread has yet to load; aliases are the places of pointers
    to one tensor among the kernel's pointers.

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
        return "in place" if arguments.index(value) in aliases else value

    arguments = re.findall(r"(%\w+): !tt\.ptr", next(x for x in ttgir.splitlines() if "tt.func" in x))
    for number, text in enumerate(ttgir.splitlines()):
        if found := re.search(rf"(%\w+) = (?:{MAKE_POINTERS}) (%[\w#]+)", text):
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
    """A table of 100 columns, and below it what is wrong."""
    table = Table(
        title=f"Kernels compiled ahead of time by triton {triton.__version__}",
        box=None,
        pad_edge=False,
        header_style="bold underline",
        caption="load, store: bytes that one instruction moves of a tile of logits; smem: bytes;"
        " instr: instructions a logit, of each pass; of short rows: executed, on average",
    )
    for heading in ("kernel", "target", "dtype", "logits", "cap"):
        table.add_column(heading, no_wrap=True)
    for heading in ("regs", "spills", "smem", "load", "store", "instr"):
        table.add_column(heading, justify="right", no_wrap=True)
    for r in reports:
        v = r.variant
        widths = [str(width or "-") for width in (r.load_bytes, r.store_bytes)]
        table.add_row(
            *(v.kernel, v.target, v.dtype, v.form, "yes" if v.softcap else "-"),
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
    render(reports, Console(width=100))
    failed = sum(bool(r.problems()) for r in reports)
    print(f"{len(reports)} variants, {failed} with problems")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
