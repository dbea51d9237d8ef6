"""PTX as Triton emits it, read into instructions."""

import re
from dataclasses import dataclass
from pathlib import Path

from bench.ptx import EmulationError


@dataclass(frozen=True)
class Instruction:
    text: str
    place: str  # file:line of the Triton source that it stems from
    opcode: str  # with all of its modifiers
    operands: tuple[str, ...]
    guard: str = ""  # the predicate of the threads that execute it; all of them if there is none
    negated: bool = False

    def __str__(self) -> str:
        return f"{self.text} ({self.place})"


@dataclass(frozen=True)
class Program:
    """An entry: its instructions, and for a label the number of the one that follows it."""

    parameters: int
    widths: dict[str, int]  # bits of each register; 1 for predicates
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*);")
OPERAND = re.compile(r"\{[^}]*\}|\[[^]]*\]|[^,\s{\[]+")


def parse(ptx: str) -> Program:
    """Read the one entry of a module; anything that is not understood is an error."""
    found = re.search(r"\.entry\s+\w+\s*\((.*?)\)[^{]*\{\n(.*?)^\}", ptx, re.DOTALL | re.MULTILINE)
    if not found:
        raise EmulationError("no entry in the PTX")
    files = {k: Path(path).name for k, path in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', ptx)}
    widths: dict[str, int] = {}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    place, in_assembly = "", False
    for line in found[2].splitlines():
        text = line.partition("//")[0].strip()
        if loc := re.match(r"\.loc\s+(\d+)\s+(\d+)", text):
            # inside of inline assembly lines are counted on from where it stands
            place = place if in_assembly else f"{files.get(loc[1], loc[1])}:{loc[2]}"
        elif "inline asm" in line:
            in_assembly = "begin" in line
        elif register := re.fullmatch(r"\.reg\s+\.([a-z]+)(\d*)\s+(%\w+)<(\d+)>;", text):
            width = int(register[2] or 1)
            widths |= {f"{register[3]}{k}": width for k in range(int(register[4]))}
        elif label := re.fullmatch(r"(\$?\w+):", text):
            labels[label[1]] = len(instructions)
        elif statement := STATEMENT.fullmatch(text):
            negated, guard, opcode, operands = statement.groups()
            split = tuple(OPERAND.findall(operands))
            instructions.append(Instruction(text, place, opcode, split, guard or "", bool(negated)))
        elif text and not re.match(r"\.pragma\b", text):
            raise EmulationError(f"cannot read {text!r}")
    return Program(len(re.findall(r"\.param\b", found[1])), widths, tuple(instructions), labels)
