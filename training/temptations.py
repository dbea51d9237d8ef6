"""Tasks with a tempting shortcut: small, verifiable, and a collapsing policy loses pass@k on them.

Each has a right answer and a *shortcut*, which is right on easy questions and wrong on hard ones. The
supervised warm-up of `scratch` mostly shows the shortcut and only sometimes the right answer: the model
starts with a strong wrong habit and a rare right mode. Easy prompts reward the habit, which erases the rare
mode where it is needed; whether it survives is what the entropy coefficient decides. (In `logic` it survives
without one: STUDY.md.)

    carry     ``ab+cd=``       digits of the sum, the least significant first; the shortcut drops the carries
    program   ``.3+5.2-4=``    what each line prints, its digit plus a counter (modulo 10) that + and - move
                               by one first; the shortcut ignores the counter
    logic     ``01|10&11=``    bits of an expression, & before ^ before |; the shortcut reads from the left

Difficulty is the number of places where the shortcut fails: carries, lines with a counter that is not 0,
bits that differ. All questions of a size are of one length.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

DIGITS, BITS = "0123456789", "01"
DRAWS = 100_000  # until a class is given up


class Example(NamedTuple):
    """A question with both answers, which are of one length."""

    question: str
    answer: str
    shortcut: str
    places: int  # where the shortcut fails
    key: str  # the same for questions that ask the same


class Domain(NamedTuple):
    """One of the tasks; its size has a name of its own."""

    draw: Callable[[random.Random, int], Example]
    setting: str
    usual: int
    largest: int
    alphabet: str  # of the questions; of the answers
    symbols: str
    classes: tuple[str, ...]  # by places; the last one has all that are above

    mix: tuple[float, ...] = (0.6, 0.2, 0.2)  # shares of the classes in training


def draw(domain: Domain, rng: random.Random, size: int, label: str | None = None) -> Example:
    """A random example; of one class, if given. Raises ValueError for one that does not come."""
    for _ in range(DRAWS):
        example = domain.draw(rng, size)
        if label in (None, class_of(domain, example)):
            return example
    raise ValueError(f"no example of the class {label!r} in {DRAWS:,} draws of {domain.setting} {size}")


def class_of(domain: Domain, example: Example) -> str:
    return domain.classes[min(example.places, len(domain.classes) - 1)]


def classes_of(domain: Domain, size: int) -> tuple[str, ...]:
    """A question of one place has no class of two."""
    return domain.classes[: size + 1]


def demonstration(domain: Domain, rng: random.Random, example: Example, *, right: float, noise: float) -> str:
    """A response of the warm-up: the answer with probability ``right``, else the shortcut; then each symbol
    is replaced by a random one with probability ``noise``."""
    response = example.answer if rng.random() < right else example.shortcut
    return "".join(rng.choice(domain.symbols) if rng.random() < noise else symbol for symbol in response)


def carry(rng: random.Random, digits: int) -> Example:
    return addition(rng.randrange(10**digits), rng.randrange(10**digits), digits)


def addition(a: int, b: int, digits: int) -> Example:
    """The sum of two numbers, and their sum digit by digit modulo 10; b + a is held out where a + b is."""
    columns = list(zip(reversed(f"{a:0{digits}d}"), reversed(f"{b:0{digits}d}")))
    carries = [a % 10**k + b % 10**k >= 10**k for k in range(1, digits + 1)].count(True)
    return Example(
        f"{a:0{digits}d}+{b:0{digits}d}=",
        f"{a + b:0{digits + 1}d}"[::-1],
        "".join(str((int(x) + int(y)) % 10) for x, y in columns) + "0",
        carries,
        f"{min(a, b)}+{max(a, b)}",
    )


def program(rng: random.Random, lines: int) -> Example:
    return run("".join(rng.choice("...+-") + rng.choice(DIGITS) for _ in range(lines)))


def run(source: str) -> Example:
    """What a program of lines of two characters prints."""
    counter, places, printed = 0, 0, ""
    for operation, digit in zip(source[::2], source[1::2]):
        counter += {".": 0, "+": 1, "-": -1}[operation]
        places += counter != 0
        printed += str((int(digit) + counter) % 10)
    return Example(f"{source}=", printed, source[1::2], places, source)


def logic(rng: random.Random, width: int) -> Example:
    a, b, c = ("".join(rng.choice(BITS) for _ in range(width)) for _ in range(3))
    return expression(a, b, c, rng.choice("&^|"), rng.choice("&^|"))


def expression(a: str, b: str, c: str, first: str, second: str) -> Example:
    """The bits of a three-operand expression under Python's rules of precedence, and read from the left."""
    values = [int(x, 2) for x in (a, b, c)]
    operations: dict[str, Callable[[int, int], int]] = {
        "&": lambda x, y: x & y,
        "^": lambda x, y: x ^ y,
        "|": lambda x, y: x | y,
    }
    left = operations[second](operations[first](values[0], values[1]), values[2])
    right = left
    if "&^|".index(second) < "&^|".index(first):  # the second binds tighter
        right = operations[first](values[0], operations[second](values[1], values[2]))
    question = f"{a}{first}{b}{second}{c}"
    width = len(a)
    return Example(
        f"{question}=", f"{right:0{width}b}", f"{left:0{width}b}", (left ^ right).bit_count(), question
    )


DOMAINS: dict[str, Domain] = {
    "carry": Domain(carry, "digits", 3, 9, DIGITS + "+=", DIGITS, ("0 carries", "1 carry", "2+ carries")),
    "program": Domain(
        program,
        "lines",
        4,
        10,
        DIGITS + ".+-=",
        DIGITS,
        ("stateless", "1 line with state", "2+ lines with state"),
    ),
    "logic": Domain(
        logic, "width", 4, 7, BITS + "&^|=", BITS, ("0 bits differ", "1 bit differs", "2+ bits differ")
    ),
}
