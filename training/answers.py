"""Is a response's final answer the right one?

The type of the right answer decides how it is compared (`forms`). Mathematics goes to math-verify, which
evaluates what it is given: 2024-01-05 would be the difference 2018. So what is none is told from it first.

The final answer of a response is the last \\boxed{}, else what follows ``####``, ``<answer>`` or "the answer
is", else the last line or sentence, if it says just that. What is mentioned on the way does not count; of
numbers, the last one in the last sentence does.

Nothing here depends on a clock, a signal or a process: a score is the same in a thread.
"""

import logging
import math
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from training.forms import LONGEST, UNITS, Answer, plain, read

LONGEST_RESPONSE = 100_000  # characters; of longer ones the end is read
CALLS = 3_000_000  # of functions, for one comparison by math-verify: some seconds
DIGITS = 30_000  # of the largest number that it may be made to compute

NEGATED = r"\b(?:not|never|cannot|neither|nor|or|wrong|incorrect|instead|unless)\b|n['’]t\b|\?"
NO_ANSWER = re.compile(NEGATED, re.IGNORECASE)
NO_STATEMENT = re.compile(
    NEGATED
    + r"|\b(?:if|whether|maybe|perhaps|possibly|might|may|could|would|some|many|people|says?|think|thinks"
    r"|thought|believed?|guess)\b",
    re.IGNORECASE,
)
PHRASE = re.compile(
    r"\banswer\b(?:[^.\n:=]{0,60}?(?:\b(?:is|are|was|be)\b|[:=])|\W{0,4}\n)[:\s*_]*", re.IGNORECASE
)
ASIDE = re.compile(
    r",?\s+(?:because|since|which|who|whose|where|not|so|but|as)\b|,\s+(?:the|a|an|in)\s|\s+\((?!\d)",
    re.IGNORECASE,
)
PREDICATE = re.compile(r"^.*(?:\b(?:is|are|was|were|be|equals)\b:?|['’]s\b|[:=])\s+(?=\S)", re.IGNORECASE)
SO = re.compile(r"^(?:so|thus|therefore|hence|finally|then|in conclusion)\b[,:]?\s+", re.IGNORECASE)
YES_OR_NO = re.compile(r"[*_]*(yes|no|true|false)\b[*_]*[,.;:!]", re.IGNORECASE)
SENTENCE = re.compile(r"(?<=[.!?])[*_\"”)]*\s+")
FORMULA = re.compile(r"\s*(?:\\\[|\$\$)((?:(?!\\\]|\$\$).)*)(?:\\\]|\$\$)", re.DOTALL)
# Numbers that are joined and no operation, in a sentence: dates, times, scores, versions.
JOINED = re.compile(
    r"(?<![\w.])\d+(?:(?:[-–:/]\d+){2,}|(?:\.\d+){2,}|[-–:]\d+(?![\d.]*\s*=))",
)


def score(expected: str, response: str) -> float:
    """1 where the final answer of the response is the expected one, else 0. Raises nothing."""
    right = read(_given(expected))
    answers, sentence = _final(response)
    found = [read(text) for text in answers]
    if any(_same(right, answer) for answer in found):
        return 1.0
    if right.kind != "math" or not sentence or any(answer.kind != "words" for answer in found):
        return 0.0
    forms = [right.text, f"{right.text}\\%"] if right.percent else [right.text]
    agree = _units_agree(right.unit, _unit_in(sentence))
    return float(agree and any(_verified(form, sentence, prose=True) for form in forms))


def vote(response: str) -> str:
    """The final answer in a form that equal answers share, as majority votes count it."""
    answers, sentence = _final(response)
    found = sorted(
        (read(text) for text in answers), key=lambda answer: (answer.kind == "words", len(answer.key))
    )
    if not found:
        return response.strip()
    if found[0].kind == "math" or (found[0].kind == "words" and sentence):
        prose = found[0].kind == "words"
        value = _bounded(lambda: str(_parse(sentence if prose else found[0].text, prose)[0]))
        return value or found[0].key
    return found[0].key or response.strip()


def _given(expected: str) -> str:
    """The answer in a cell that may hold a whole solution, as GSM8K's and MATH's do."""
    if (boxed := _boxed(expected)) is not None:
        return boxed
    last = expected.strip().rpartition("\n")[2]
    return last[4:] if last.startswith("####") else expected


def _final(response: str) -> tuple[list[str], str]:
    """The texts that may be the final answer, and a sentence in which to look for a number else."""
    text = response[-LONGEST_RESPONSE:].rpartition("</think>")[2]
    if (boxed := _boxed(text)) is not None:
        return [boxed], ""
    if (start := text.rfind("<answer>")) >= 0 and (end := text.find("</answer>", start)) >= 0:
        text = text[start + len("<answer>") : end]
    text = FORMULA.sub(lambda match: f" ${' '.join(match[1].split())}$", text)  # of lines of its own
    lines = [line.strip() for line in text.splitlines() if re.search(r"\w|[^\s*_`#.=-]", line)]
    if not lines:
        return [], ""
    if lines[-1].startswith("####"):
        return [lines[-1][4:]], lines[-1][4:]
    marked = [match.end() for match in PHRASE.finditer(text)]
    line = text[marked[-1] :].strip().partition("\n")[0] if marked else ""
    if line and not line.endswith("?"):
        first = SENTENCE.split(line)[0]
        return [line, *_heads(first)], "" if NO_ANSWER.search(first) else f"answer: {first}"
    line = lines[-1]
    last = SENTENCE.split(line)[-1]
    answers = [line, *_heads(last), *_heads(SO.sub("", last)), *YES_OR_NO.findall(line)[:1]]
    if not NO_STATEMENT.search(last) and PREDICATE.search(last):
        answers += _heads(PREDICATE.sub("", last))
    return answers, "" if NO_ANSWER.search(last) else last


def _heads(text: str) -> Iterator[str]:
    """A text, and what stands in it before an explanation."""
    yield text
    if (aside := ASIDE.search(text)) and aside.start() > 0:
        yield text[: aside.start()]
    if head := YES_OR_NO.match(text):
        yield head[1]


def _boxed(text: str) -> str | None:
    """The content of the last \\boxed{}, or of several that stand together; "" where it never ends."""
    last = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if last < 0:
        return None
    from latex2sympy2_extended.math_normalization import extract_boxed_content

    depth = 0
    for end, sign in enumerate(text[last:], start=last):
        depth += (sign == "{") - (sign == "}")
        if depth == 0 and sign == "}":
            return str(extract_boxed_content(text[max(0, last - 200) : end + 1], "last"))
    return ""


def _same(right: Answer, said: Answer) -> bool:
    if not right.kind or not said.kind:
        return False
    if "choice" in (right.kind, said.kind):
        return _same_choice(right, said)
    if right.kind != "math" or said.kind != "math":
        return right.kind == said.kind and right.key == said.key
    if not _units_agree(right.unit, said.unit):
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


def _units_agree(right: tuple[str, ...], said: tuple[str, ...]) -> bool:
    """A unit may be left out or said in more words, but not be another."""
    if not right or not said:
        return True
    a, b = set(right), set(said)
    rate = "per" in a ^ b and right[0] not in ("dollar", "euro", "pound", "cent")
    return (a <= b or b <= a) and not (a ^ b) & {"square", "cubic"} and not rate


def _unit_in(sentence: str) -> tuple[str, ...]:
    """The unit of the last number of a sentence, if it is a known one."""
    found = re.search(r"([$€£¥]?)\s*\d[\d.,]*\s*([A-Za-z°]*)[^\d]*$", sentence)
    return tuple(UNITS[name] for name in found.groups() if name in UNITS) if found else ()


def _verified(right: str, said: str, prose: bool = False) -> bool:
    return bool(_bounded(lambda: _verify(_parse(right), _parse(said, prose), prose)))


def _parse(text: str, prose: bool = False) -> list[Any]:
    """What math-verify reads in a text that is an answer, or that says one."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it sets no alarm
    if prose:
        text = JOINED.sub(" ", plain(text)[-LONGEST:])
        found = math_verify.parse(text, fallback_mode="no_fallback", parsing_timeout=None)
    else:
        latex = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]
        text = f"\\boxed{{{text}}}"
        found = math_verify.parse(text, latex, fallback_mode="no_fallback", parsing_timeout=None)
    return [value for value in found if _digits(value) <= DIGITS]


def _verify(right: list[Any], said: list[Any], prose: bool) -> bool:
    import math_verify

    if not right or not said or not math_verify.verify(right, said, timeout_seconds=None):
        return False
    a, b = right[0], said[0]
    if prose or a == b or not (getattr(a, "is_number", False) and getattr(b, "is_number", False)):
        return True
    # it rounds to so many decimals, and takes 1e-9 for 2e-9
    return bool(abs((a - b).evalf(20)) <= 1e-4 * abs(a.evalf(20)))


def _digits(value: Any) -> float:
    """About how many digits the numbers have that evaluating makes: a power of powers would never end."""
    parts = [_digits(part) for part in (value.flat() if hasattr(value, "flat") else value.args)]
    name = type(value).__name__
    if name in ("Pow", "factorial") and value.args[-1].is_number:
        if parts[-1] > 6:
            return math.inf
        number = abs(complex(value.args[-1]))
        return max(parts) + number * (parts[0] if name == "Pow" else parts[0] + 1)
    return (
        max(sum(parts), len(str(value)) if value.is_Number else 1.0)
        if not parts or name != "Add"
        else max(parts)
    )


def _bounded(work: Callable[[], Any]) -> Any:
    """What the work gives, or None where it fails or calls more than CALLS functions.

    math-verify's own limit is an alarm, which threads don't have; a count is the same on a slow machine, too.
    It fails on a text in as many ways as there are formulas.
    """
    from math_verify.errors import TimeoutException

    left = CALLS

    def count(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise TimeoutException

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        found = work()
    except (Exception, TimeoutException):
        return None
    finally:
        sys.setprofile(before)
    return found if left >= 0 else None
