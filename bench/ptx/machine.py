"""The blocks of a launch, executed: all threads in step, each instruction once for every block that is at it.

Triton's branches are decided by a whole block. One that parts the threads of a block is an error, so no part
of a warp reaches a barrier or a shuffle. Blocks that go different ways form groups, which join again where
they meet. No order of threads is tried but in step: what depends on the order is found as a race.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from bench.ptx import EmulationError
from bench.ptx.arithmetic import KINDS, OPERATIONS, Array, Operation, from_bf16
from bench.ptx.memory import CELL, Mask, Region
from bench.ptx.program import Instruction, Program, parse

WARP = 32
SHARED = 1 << 10  # the address of global_smem in every block
BITS = {1: np.dtype("?")} | {bits: np.dtype(f"u{bits // 8}") for bits in (16, 32, 64)}


class Launch:
    """What the blocks of a launch have in common."""

    def __init__(
        self,
        program: Program,
        blocks: int,
        warps: int,
        parameters: list[Array],
        regions: list[Region],
        shared: int,
    ) -> None:
        self.program, self.threads, self.regions = program, warps * WARP, regions
        hidden = program.parameters - len(parameters)  # pointers to scratch memory that nothing uses
        self.parameters = parameters + hidden * [np.zeros((), np.uint64)]
        self.shared_bytes = shared  # of a block; those of all blocks are one region
        cells = np.ones(max(1, blocks * shared // CELL), np.bool_)
        self.shared = Region(0, np.zeros(CELL * len(cells), np.uint8), None, cells)
        self.barriers = np.zeros(blocks, np.int64)  # that each block has passed
        self.executed = 0  # instructions, by all threads

    def region(self, address: int) -> Region:
        for region in self.regions:
            if region.address <= address < region.address + region.halves.nbytes:
                return region
        raise EmulationError(f"nothing lies at the address {address:#x}")


class Group:
    """Blocks that are at the same instruction; a register is their bits, [blocks, threads]."""

    def __init__(self, launch: Launch, blocks: Array, registers: dict[str, Array], now: int) -> None:
        self.launch, self.blocks, self.registers, self.now = launch, blocks, registers, now
        self.shape = len(blocks), launch.threads

    def read(self, operand: str, kind: str) -> Array:
        """A register or a constant, as an array of this kind."""
        dtype = KINDS[kind]
        if not operand.startswith("%"):
            return constant(operand, dtype)
        bits = self.before(operand)
        if kind == "f32x2":
            return np.ascontiguousarray(bits).view(dtype)
        if bits.itemsize > dtype.itemsize:
            bits = bits.astype(f"u{dtype.itemsize}")
        return from_bf16(bits) if kind == "bf16" else bits.view(dtype)

    def write(self, register: str, value: Array) -> None:
        """The bits of ``value``, widened to those of the register as its type is."""
        bits = BITS[self.launch.program.widths[register]]
        if value.itemsize < bits.itemsize and value.dtype.kind in "ui":
            value = value.astype(f"{value.dtype.kind}{bits.itemsize}")
        self.registers[register] = np.broadcast_to(value.view(bits), self.shape)

    def split(self, chosen: Mask, now: int) -> "Group":
        registers = {name: bits[chosen] for name, bits in self.registers.items()}
        return Group(self.launch, self.blocks[chosen], registers, now)

    def join(self, other: "Group") -> "Group":
        names = self.registers.keys() | other.registers.keys()
        registers = {name: np.concatenate([self.before(name), other.before(name)]) for name in names}
        return Group(self.launch, np.concatenate([self.blocks, other.blocks]), registers, self.now)

    def before(self, register: str) -> Array:
        """What is in a register; if nobody wrote it, ones, which is NaN as a float."""
        if register in self.registers:
            return self.registers[register]
        return np.broadcast_to(
            np.invert(np.zeros((), BITS[self.launch.program.widths[register]])), self.shape
        )


@cache
def constant(text: str, dtype: np.dtype[Any]) -> Array:
    bits = 8 * dtype.itemsize
    if text == "global_smem":
        value = SHARED
    else:
        value = int(text[2:], 16) if text[:2].lower() in ("0f", "0d") else int(text, 0)
    return np.array([[value % (1 << bits)]], f"u{bits // 8}").view(dtype)


Step = Callable[[Group], None]


@dataclass(frozen=True)
class Branch:
    """Where those go for whom the guard is true; all of them if there is none."""

    target: int
    guard: str
    negated: bool

    def taken(self, group: Group) -> Mask:
        """Which blocks go there."""
        if not self.guard:
            return np.ones(len(group.blocks), np.bool_)
        chosen = group.read(self.guard, "pred") ^ self.negated
        if (chosen != chosen[:, :1]).any():
            raise EmulationError("a branch parts the threads of a block")
        return chosen[:, 0]


def run(
    ptx: str, blocks: int, warps: int, parameters: list[Array], regions: list[Region], shared: int
) -> int:
    """Execute a grid on these regions; return how many instructions its threads executed in all."""
    program, steps = decoded(ptx)
    launch = Launch(program, blocks, warps, parameters, regions, shared)
    thread = np.broadcast_to(np.arange(launch.threads, dtype=np.uint32), (blocks, launch.threads))
    block = np.broadcast_to(np.arange(blocks, dtype=np.uint32)[:, None], thread.shape)
    special = {"%tid.x": thread, "%ctaid.x": block, "%laneid": thread % np.uint32(WARP)}
    groups = [Group(launch, np.arange(blocks), special, 0)]
    with np.errstate(all="ignore"):
        while groups:
            # the group that is behind goes on, until it is where another one waits
            group, *others = sorted(groups, key=lambda group: group.now)
            if others and others[0].now == group.now:
                groups = [group.join(others[0]), *others[1:]]
            else:
                going = advance(group, steps, others[0].now if others else len(steps))
                groups = others + [group for group in going if group.now < len(steps)]
    return launch.executed


def advance(group: Group, steps: tuple[Step | Branch, ...], end: int) -> list[Group]:
    """Execute until ``end``, or until blocks go different ways."""
    while group.now < end:
        now = group.now
        step = steps[now]
        group.launch.executed += len(group.blocks) * group.launch.threads
        try:
            if not isinstance(step, Branch):
                step(group)
                group.now += 1
                continue
            taken = step.taken(group)
        except EmulationError as error:
            raise EmulationError(f"{error}: {group.launch.program.instructions[now]}") from None
        if taken.any() and not taken.all():
            return [group.split(taken, step.target), group.split(~taken, now + 1)]
        group.now = step.target if taken.all() else now + 1
    return [group]


@cache
def decoded(ptx: str) -> tuple[Program, tuple[Step | Branch, ...]]:
    program = parse(ptx)
    return program, tuple(decode(program, number) for number in range(len(program.instructions)))


def decode(program: Program, number: int) -> Step | Branch:
    """What an instruction does; one that is not known is an error."""
    instruction = program.instructions[number]
    opcode, operands = instruction.opcode, instruction.operands
    if opcode in ("bra", "bra.uni", "ret"):
        target = program.labels[operands[0]] if operands else len(program.instructions)
        return Branch(target, instruction.guard, instruction.negated)
    # what is said about caches changes no value
    opcode = opcode.replace(".L1::evict_first.L2::cache_hint", "")
    if opcode == "createpolicy.fractional.L2::evict_first.b64":
        return ignored
    if found := re.fullmatch(r"(ld|st)\.(global|shared)(?:\.v[24])?\.(b16|b32|b64)", opcode):
        return Access(instruction, number, found[1] == "st", found[2] == "shared", found[3])
    if instruction.guard:
        raise EmulationError(f"unknown with a guard: {instruction}")
    if opcode == "bar.sync" and operands == ("0",):
        return barrier
    if opcode.startswith("mov.b") and operands[0].startswith("{"):
        return unpack(opcode.removeprefix("mov."), *operands)
    if opcode.startswith("mov.b") and operands[1].startswith("{"):
        return pack(opcode.removeprefix("mov."), *operands)
    if found := re.fullmatch(r"ld\.param\.([bus](?:32|64))", opcode):
        return parameter(found[1], *operands)
    if (found := re.fullmatch(r"shfl\.sync\.(bfly|idx)\.b32", opcode)) and operands[3:] == ("31", "-1"):
        return shuffle(found[1], *operands[:3])
    if opcode == "redux.sync.max.f32":
        return greatest_of_warp(operands[0], operands[1])
    if operation := OPERATIONS.get((opcode, len(operands) - 1)):
        return computation(operation, *operands)
    raise EmulationError(f"unknown instruction: {instruction}")


def computation(operation: Operation, target: str, *sources: str) -> Step:
    operands = tuple(zip(sources, operation.operands))

    def step(group: Group) -> None:
        group.write(target, operation.compute(*(group.read(*operand) for operand in operands)))

    return step


def ignored(group: Group) -> None:
    pass


def barrier(group: Group) -> None:
    group.launch.barriers[group.blocks] += 1


def parameter(kind: str, target: str, source: str) -> Step:
    index = int(source.strip("[]").rpartition("_param_")[2])

    def step(group: Group) -> None:
        group.write(target, group.launch.parameters[index].view(KINDS[kind]))

    return step


def parts(braced: str) -> list[str]:
    return braced.strip("{} ").replace(",", " ").split()


def unpack(kind: str, targets: str, source: str) -> Step:
    names = parts(targets)
    narrow = f"u{KINDS[kind].itemsize // len(names)}"

    def step(group: Group) -> None:
        whole = np.broadcast_to(group.read(source, kind), group.shape)
        values = np.ascontiguousarray(whole).view(narrow).reshape(*group.shape, len(names))
        for k, name in enumerate(names):
            if name != "_":
                group.write(name, np.ascontiguousarray(values[..., k]))

    return step


def pack(kind: str, target: str, sources: str) -> Step:
    names = parts(sources)
    narrow = f"b{8 * KINDS[kind].itemsize // len(names)}"

    def step(group: Group) -> None:
        values = [np.broadcast_to(group.read(name, narrow), group.shape) for name in names]
        group.write(target, np.stack(values, -1).view(KINDS[kind])[..., 0])

    return step


def shuffle(how: str, target: str, source: str, lane: str) -> Step:
    """From the lane of this number, or of one's own number by exclusive or with it."""

    def step(group: Group) -> None:
        own = np.arange(group.shape[1])
        number = np.broadcast_to(group.read(lane, "u32"), group.shape).astype(np.int64) % WARP
        giver = own ^ number if how == "bfly" else own - own % WARP + number
        group.write(target, np.take_along_axis(group.read(source, "b32"), giver, 1))

    return step


def greatest_of_warp(target: str, source: str) -> Step:
    def step(group: Group) -> None:
        warps = group.read(source, "f32").reshape(len(group.blocks), -1, WARP)
        group.write(target, np.fmax.reduce(warps, axis=2).repeat(WARP, axis=1))

    return step


ADDRESS = re.compile(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]")


class Access:
    """A load or a store of one or several registers a thread."""

    def __init__(self, instruction: Instruction, number: int, writes: bool, shared: bool, kind: str) -> None:
        self.instruction, self.number = instruction, number
        self.writes, self.shared, self.kind = writes, shared, kind
        first, second = instruction.operands[:2]  # a third is a policy of the caches
        address, registers = (first, second) if writes else (second, first)
        self.names = parts(registers)
        self.bytes = len(self.names) * KINDS[kind].itemsize
        found = ADDRESS.fullmatch(address)
        if not found:
            raise EmulationError(f"unknown address: {instruction}")
        self.base, self.offset = found[1], int(found[2] or 0)

    def __call__(self, group: Group) -> None:
        active = np.ones(group.shape, np.bool_)
        if self.instruction.guard:
            active = group.read(self.instruction.guard, "pred") ^ self.instruction.negated
        base = group.read(self.base, "u32" if self.shared else "u64").astype(np.int64)
        addresses = np.broadcast_to(base + self.offset, group.shape)
        if self.writes:
            values = [np.broadcast_to(group.read(name, self.kind), group.shape) for name in self.names]
            self.store(group, addresses, active, np.stack(values, -1))
        else:
            self.load(group, addresses, active)

    def load(self, group: Group, addresses: Array, active: Mask) -> None:
        values = np.stack([group.before(name) for name in self.names], -1)
        if active.any():
            region, cells = self.touch(group, addresses, active)
            values[active] = region.load(cells, values.dtype)
        for k, name in enumerate(self.names):
            group.write(name, values[..., k])

    def store(self, group: Group, addresses: Array, active: Mask, values: Array) -> None:
        """Of what has one place for the whole block every thread must hold the same value, also idle ones."""
        one_place = (addresses == addresses[:, :1]).all(1)
        one_value = (values == values[:, :1]).all((1, 2))
        if (one_place & ~one_value).any():
            raise EmulationError("the threads of a block hold different values of what one of them stores")
        if active.any():
            region, cells = self.touch(group, addresses, active)
            region.store(cells, values[active])

    def touch(self, group: Group, addresses: Array, active: Mask) -> tuple[Region, Array]:
        """Where the active threads access what, once that is checked and noted."""
        launch = group.launch
        row, thread = np.nonzero(active)
        block, addresses = group.blocks[row], addresses[active]
        if self.shared:
            inside = (addresses >= SHARED) & (addresses + self.bytes <= SHARED + launch.shared_bytes)
            if not inside.all():
                raise EmulationError("out of the bounds of shared memory")
            region, addresses = launch.shared, addresses - SHARED + block * launch.shared_bytes
        else:
            region = launch.region(int(addresses[0]))
        cells = region.cells(addresses, self.bytes, self.writes)
        earlier = region.race(cells, thread, block, launch.barriers[block], self.writes, self.number)
        if earlier is not None:
            raise EmulationError(f"a race with {launch.program.instructions[earlier]}")
        return region, cells
