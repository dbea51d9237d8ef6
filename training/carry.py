"""Addition with a tempting shortcut: a verifiable task on which a collapsing policy loses pass@k.

A prompt is ``ab+cd=``, the answer the digits of the sum, least significant first. The supervised warm-up of
`scratch` mostly shows the *carry-free* sum, digit by digit modulo 10, and only sometimes the right one: the
model starts with a strong wrong habit and a rare right mode. Prompts without a carry reward the habit, which
erases the rare mode where it is needed; whether it survives is what the entropy coefficient decides.

Difficulty is the number of carries.
"""

import random

CLASSES = ("0 carries", "1 carry", "2+ carries")
MIX = (0.6, 0.2, 0.2)
ALPHABET = "0123456789+="


def question(a: int, b: int, digits: int) -> str:
    return f"{a:0{digits}d}+{b:0{digits}d}="


def answer(a: int, b: int, digits: int) -> str:
    return f"{a + b:0{digits + 1}d}"[::-1]


def shortcut(a: int, b: int, digits: int) -> str:
    """The sum without carries."""
    columns = zip(reversed(f"{a:0{digits}d}"), reversed(f"{b:0{digits}d}"))
    return "".join(str((int(x) + int(y)) % 10) for x, y in columns) + "0"


def carries(a: int, b: int, digits: int) -> int:
    return [a % 10**k + b % 10**k >= 10**k for k in range(1, digits + 1)].count(True)


def draw(rng: random.Random, digits: int, difficulty: int | None = None) -> tuple[int, int]:
    """Two numbers; of one difficulty, an index into CLASSES, if given."""
    while True:
        a, b = rng.randrange(10**digits), rng.randrange(10**digits)
        if difficulty in (None, min(carries(a, b, digits), 2)):
            return a, b


def demonstration(
    rng: random.Random, a: int, b: int, *, digits: int, right: float, noise: float
) -> tuple[str, str]:
    """(question, response) of the warm-up: the right sum with probability ``right``, else the shortcut; then
    each digit is replaced by a random one with probability ``noise``."""
    response = answer(a, b, digits) if rng.random() < right else shortcut(a, b, digits)
    noisy = (rng.choice("0123456789") if rng.random() < noise else digit for digit in response)
    return question(a, b, digits), "".join(noisy)
