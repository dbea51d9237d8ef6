"""Is a response's final answer the right one?

The type of the right answer decides how it is compared (`forms`). Mathematics goes to math-verify, which
evaluates what it is given: 2024-01-05 would be the difference 2018. So what is none is told from it first.

Nothing here depends on a clock, a signal or a process: a score is the same in a thread.
"""

import logging
import math
import re
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from training.forms import LONGEST, Answer, plain, read
from training.responses import final, given, last_number
from training.units import agree, unit_after

CALLS = 3_000_000  # of functions, for one comparison by math-verify: some seconds
DIGITS = 30_000  # of the largest number that it may be made to compute

TYPED = ("date", "time", "code")
# Numbers that are joined and no operation, in a sentence: dates, times, scores, versions.
JOINED = re.compile(
    r"(?<![\w.])\d+(?:(?:[-–:/]\d+){2,}|(?:\.\d+){2,}|[-–:]\d+(?![\d.]*\s*=))",
)


def score(expected: str, response: str) -> float:
    """1 where the final answer of the response is the expected one, else 0. Raises nothing."""
    right = read(given(expected))
    answers, sentence = final(response)
    found = [read(text) for text in dict.fromkeys(answers)]
    try:
        if any(_same(right, answer) for answer in found):
            return 1.0
        if not sentence or any(answer.kind != "words" for answer in found):
            return 0.0
        if right.kind in TYPED:
            return float(_same(right, _last_typed(sentence)))
        if right.kind != "math" or not agree(right.unit, _unit_in(sentence)):
            return 0.0
        forms = [right.text, f"{right.text}\\%"] if right.percent else [right.text]
        return float(any(_verified(form, sentence, prose=True) for form in forms))
    except TooLong:
        return 0.0


def vote(response: str) -> str:
    """The final answer in a form that equal answers share, as majority votes count it."""
    answers, sentence = final(response)
    found = [answer for answer in map(read, answers) if answer.kind]
    if not found:
        return response.strip()
    best = min(found, key=lambda answer: (answer.kind == "words", len(answer.key)))
    prose = best.kind == "words"
    if best.kind != "math" and not (prose and sentence):
        return best.key
    try:
        value = _bounded(lambda: [str(value) for value in _parse(sentence if prose else best.text, prose)])
    except TooLong:
        value = None
    return str(value[0]) if value else best.key


def _last_typed(sentence: str) -> Answer:
    """The date, time or the like that a sentence ends with."""
    words = sentence.split()[-8:]
    tails = (read(" ".join(words[k:])) for k in range(len(words)))
    return next((tail for tail in tails if tail.kind in TYPED), Answer("", ""))


def _same(right: Answer, said: Answer) -> bool:
    if not right.kind or not said.kind:
        return False
    if "choice" in (right.kind, said.kind):
        return _same_choice(right, said)
    if right.kind != "math" or said.kind != "math":
        keys = [right.key, said.key]
        if right.kind == said.kind == "words" and right.text and said.text:
            return right.text == said.text  # a formula: CO2 is not Co2
        if right.kind == "code" and any("to" in key for key in keys):  # 3 to 2 is 3:2, and 10 to 20 is 10-20
            keys = [re.sub("[:-]", "to", key) for key in keys]
        return right.kind == said.kind and keys[0] == keys[1]
    if not agree(right.unit, said.unit):
        return False
    if right.text == said.text and right.percent == said.percent:
        return True
    hundredth = said.percent and re.match(r"-?(?:0?\.|\\frac)", right.text)  # 0.5 is no 0.5%
    if not hundredth and _verified(right.text, said.text):
        return True
    if right.percent == said.percent:
        return False
    if right.percent:
        return _verified(right.text, f"100\\cdot({said.text})")
    return _verified(f"100\\cdot({right.text})", said.text)


def _same_choice(right: Answer, said: Answer) -> bool:
    """The letter, or the text of the choice beside it; both where both are said."""
    if right.kind == said.kind:
        named = right.text and said.text
        return right.key == said.key and (not named or _same(read(right.text), read(said.text)))
    if right.kind == "choice":
        letter = re.match(r"([A-Z])\. |([A-Za-z])$", said.source)
        return (letter is not None and (letter[1] or letter[2]).upper() == right.key) or (
            right.text != "" and _same(read(right.text), said)
        )
    return said.text != "" and _same(right, read(said.text))


def _unit_in(sentence: str) -> tuple[str, ...]:
    """The unit of the last number of a sentence."""
    sentence = sentence.translate({ord("µ"): "μ"})
    number = last_number(sentence)
    return unit_after(sentence, *number.span()) if number else ()


def _verified(right: str, said: str, prose: bool = False) -> bool:
    return bool(_bounded(lambda: _verify(_parse(right), _parse(said, prose), prose)))


def _parse(text: str, prose: bool = False) -> list[Any]:
    """What math-verify reads in a text that is an answer, or that says one."""
    import math_verify
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig  # without units: to it 2ab is 2

    if re.search(r"binom|choose", text) and re.search(r"\d{5}|\d\}?\s*[\^!]", text):
        return []  # the only numbers that are computed while they are read, in one long loop
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it sets no alarm
    if prose:
        text = JOINED.sub(" ", plain(text)[-LONGEST:]).replace("**", "^")
        found = math_verify.parse(text, fallback_mode="no_fallback", parsing_timeout=None)
    else:
        normal = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, boxed="all")
        latex = [math_verify.LatexExtractionConfig(boxed_match_priority=0, normalization_config=normal)]
        text = f"\\boxed{{{text}}}"
        found = math_verify.parse(text, latex, fallback_mode="no_fallback", parsing_timeout=None)
    return [value for value in found if _digits(value) <= DIGITS]


def _verify(right: list[Any], said: list[Any], prose: bool) -> bool:
    import math_verify

    # (-oo, 3] is x <= 3, whichever is expected; a relation in a sentence may be one on the way
    if not right or not said:
        return False
    if not math_verify.verify(right, said, allow_set_relation_comp=not prose, timeout_seconds=None):
        return False
    a, b = right[0], said[0]
    if prose or a == b or not (getattr(a, "is_number", False) and getattr(b, "is_number", False)):
        return True
    # it rounds to so many decimals, and takes 1e-9 for 2e-9
    return bool(abs((a - b).evalf(20)) <= 1e-4 * abs(a.evalf(20)))


def _digits(value: Any) -> float:
    """About how many digits the numbers have that evaluating makes: a power of powers would never end."""
    parts = [_digits(part) for part in (value.flat() if hasattr(value, "flat") else value.args)]
    if not parts:
        return float(len(str(value))) if getattr(value, "is_Number", False) else 1.0
    name = type(value).__name__
    if name in ("Pow", "factorial") and value.args[-1].is_number:
        if parts[-1] > 6:
            return math.inf
        return max(parts) + (parts[0] + (name == "factorial")) * abs(complex(value.args[-1]))
    return max(parts) if name == "Add" else sum(parts)


@lru_cache(maxsize=1)
def _imported() -> None:
    """What sympy imports and caches when it is first used; it would count as work on the first text."""
    _verify(_parse("(-\\infty, 1]"), _parse("x \\le 1"), prose=False)
    _parse("The answer is 1.", prose=True)


class TooLong(Exception):
    """More than CALLS calls."""


def _bounded(work: Callable[[], Any]) -> Any:
    """What the work gives, or None where math-verify fails on a text, which it does in many ways.

    Its own limit is an alarm, which threads don't have; a count is the same on a slow machine, too.
    """
    from math_verify.errors import TimeoutException

    _imported()
    left = CALLS

    def count(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise TimeoutException  # math-verify lets this one through

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        found = work()
    except (Exception, TimeoutException):
        found = None
    finally:
        sys.setprofile(before)
    if left < 0:
        raise TooLong
    return found
