"""Addition with a tempting shortcut: a verifiable task on which a collapsing policy loses pass@k.

A prompt is ``ab+cd=``, the answer the three digits of the sum, least significant first. The supervised
warm-up mostly shows the *carry-free* sum, digit by digit modulo 10, and only sometimes the right one: the
model starts with a strong wrong habit and a rare right mode. Prompts without a carry reward the habit, which
erases the rare mode where it is needed; whether it survives is what the entropy coefficient decides.

Difficulty is the number of carries.
"""

import random
import zlib
from dataclasses import dataclass

DIGITS = 2
CLASSES = ("0 carries", "1 carry", "2 carries")
ALPHABET = "0123456789+="


@dataclass(frozen=True)
class Problem:
    """One addition."""

    a: int
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a:0{DIGITS}d}+{self.b:0{DIGITS}d}="

    @property
    def answer(self) -> str:
        return f"{self.a + self.b:0{DIGITS + 1}d}"[::-1]

    @property
    def shortcut(self) -> str:
        """The sum without carries."""
        columns = zip(reversed(self.prompt[:DIGITS]), reversed(self.prompt[DIGITS + 1 : -1]))
        return "".join(str((int(x) + int(y)) % 10) for x, y in columns) + "0"

    @property
    def difficulty(self) -> int:
        """The number of carries, an index into CLASSES."""
        return [self.a % 10**k + self.b % 10**k >= 10**k for k in range(1, DIGITS + 1)].count(True)

    @property
    def held_out(self) -> bool:
        """A tenth of all problems, by a hash: never trained on, nor is b + a; the same in every run."""
        return zlib.crc32(f"{min(self.a, self.b)}+{max(self.a, self.b)}".encode()) % 10 == 0


def sample_problem(rng: random.Random, *, held_out: bool = False, difficulty: int | None = None) -> Problem:
    """Draw a problem of the training or of the held-out set, of one difficulty if given."""
    while True:
        problem = Problem(rng.randrange(10**DIGITS), rng.randrange(10**DIGITS))
        if problem.held_out == held_out and difficulty in (None, problem.difficulty):
            return problem


def demonstration(rng: random.Random, right: float, noise: float) -> tuple[str, str]:
    """(prompt, response) of the warm-up: the right sum with probability ``right``, else the shortcut; then
    each digit is replaced by a random one with probability ``noise``."""
    problem = sample_problem(rng)
    response = problem.answer if rng.random() < right else problem.shortcut
    noisy = (rng.choice("0123456789") if rng.random() < noise else digit for digit in response)
    return problem.prompt, "".join(noisy)


def reward(problem: Problem, response: str) -> float:
    """1 for the right digits and an end after them, else 0."""
    return float(response == problem.answer)
