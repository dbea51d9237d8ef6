"""What an answer is, by its type: mathematics, a date, a time, a score, a version, a choice's letter, words.

The types but mathematics have a key: answers are equal where their keys are. Mathematics has the LaTeX that
math-verify reads, and its unit beside it.
"""

import re
import unicodedata
from datetime import datetime
from functools import lru_cache
from typing import NamedTuple

LONGEST = 1_000  # characters that are read as mathematics


class Answer(NamedTuple):
    """An answer as it is compared: by ``key`` alone, unless it is mathematics."""

    kind: str  # date, time, code, choice, math, words; "" for nothing
    key: str
    source: str = ""  # as it was written, without its format
    text: str = ""  # of a choice what stands beside the letter, of mathematics its LaTeX
    unit: tuple[str, ...] = ()
    percent: bool = False


SIGNS = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "—": "-",
        "‐": "-",
        "‑": "-",
        "‒": "-",
        "’": "'",
        "∞": "\\infty ",
        "π": "\\pi ",
        "·": "\\cdot ",
    }
    | {
        "×": "\\times ",
        "÷": "/",
        "≤": "\\le ",
        "≥": "\\ge ",
        "≠": "\\ne ",
        "∪": "\\cup ",
        "∈": "\\in ",
        "⁄": "/",
    }
    | {"∅": "\\emptyset ", "∩": "\\cap ", "º": "°", "％": "%"}
    | dict.fromkeys("\u00a0\u2007\u2009\u202f\u200a\u2002\u2003", " ")
    | dict.fromkeys("\u200b\u2060\ufeff\u200e\u200f", "")
)
TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|math(?:rm|bf|it|sf|tt)|mbox|operatorname|bf|rm|bold(?:symbol)?)\s*\{([^{}]*)\}"
)
DATES = [
    *("%Y-%m-%d", "%Y/%m/%d", "%Y.%m.%d", "%B %d %Y", "%b %d %Y", "%d %B %Y", "%d %b %Y"),
    *("%B %d", "%b %d", "%d %B", "%d %b", "%B %Y", "%b %Y"),
]
TIMES = ["%I:%M:%S%p", "%I:%M%p", "%I%p", "%H:%M:%S", "%H:%M"]
NUMBER = r"-?[$€£¥]?\d[\d,]*(?:\.\d+)?%?"
CODES = [  # what joins numbers without being an operation
    ("version", re.compile(r"v?(\d+(?:\.\d+){2,}[\w.+-]*)")),
    ("dimensions", re.compile(rf"{NUMBER}(?:\s*(?:x|\\times)\s*{NUMBER})+(?!\s*\^)")),
    ("telephone", re.compile(r"\+[\d\s().-]{6,}|\(\d+\)[\d\s.-]{5,}|\d+(?:-\d+){2,}|\d+(?: \d+)+ \d{4}")),
    ("ratio", re.compile(rf"{NUMBER}(?:\s*(?::|\\colon|to)\s*{NUMBER})+")),
    ("range", re.compile(rf"{NUMBER}\s*(?:--?|to)\s*{NUMBER}(?:\s*[a-z]+)?")),
    ("slashes", re.compile(r"\d+(?:/\d+){2,}")),
]
CHOICE = re.compile(
    r"(?:(?:option|choice)\s+)?(?:\(([A-Za-z])\)|([A-Z])(?:[):]|\.?$))((?!\s*(?:and|or|,)\b).*)", re.DOTALL
)
COUNTED = re.compile(r"(?<=\d) ?(hundred|thousand|million|billion|trillion)\b")
PERCENT = re.compile(r"(?<=\d)\s*(?:%|percent)$")
NAMES = {
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "arcsin",
    "arccos",
    "arctan",
    "sinh",
    "cosh",
    "tanh",
    "log",
    "ln",
    "lg",
    "exp",
    "sqrt",
    "pi",
    "inf",
    "infinity",
    "lim",
    "max",
    "min",
    "gcd",
    "lcm",
    "mod",
    "det",
    "and",
    "or",
}
COUNTS = {
    "zero": 0,
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "eleven": 11,
    "twelve": 12,
}
POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
UNITS = {
    name: line.split()[0].replace("-", " ")
    for line in """
        dollar dollars $ usd USD bucks|euro euros € EUR|pound pounds £ GBP lb lbs|yen ¥ JPY|
        cent cents ¢|rupee Rs rupees kilometer km kilometers kilometre kilometres|
        meter m meters metre metres|centimeter cm centimeters centimetre|millimeter mm|mile mi miles|
        inch in inches|foot ft feet|yard yd yards|gram g grams|kilogram kg kilograms kgs|milligram mg|
        ounce oz ounces|tonne t tonnes|liter L l liters litre litres|milliliter ml mL|
        gallon gal gallons|second s sec secs seconds|minute min mins minutes|hour h hr hrs hours|
        day d days|week weeks|month months|year yr yrs years|mile-per-hour mph|
        kilometer-per-hour kph kmh|degree ° deg degrees|degree-celsius °C Celsius|
        degree-fahrenheit °F Fahrenheit|kelvin K|newton N newtons|joule J joules|watt W watts|
        volt V volts|ampere A amps|hertz Hz|kilowatt kW|kilowatt-hour kWh|pascal Pa|megabyte MB|
        gigabyte GB|square sq|cubic cu|unit units
    """.replace("\n", " ").split("|")
    for name in line.split()
}
UNIT = re.compile(
    r"(?<=[\d)}\s\]])\s*((?:(?:[A-Za-z°$€£¥¢][A-Za-z'-]*|°[CF])(?:\^\{?[23]\}?|[²³])?[\s/.]*)+)$"
)


def plain(text: str) -> str:
    """Without what only formats: math delimiters, \\text{}, spaces of LaTeX, bold, quotes, a full stop."""
    text = unicodedata.normalize("NFC", text).translate(SIGNS)
    for _ in range(3):
        text = TEXT.sub(r" \1 ", text)
    text = re.sub(r"\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\\!|\\limits|\*\*|__|`", "", text)
    text = re.sub(r"\{\s*,\s*\}", ",", text)
    text = re.sub(r"\\[,;: ]|\\q?quad\b|~", " ", text)
    text = re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree\b", "°", text)
    text = re.sub(r"\\\(|\\\)|\\\[|\\\]", "", text).replace("\\%", "%")
    text = " ".join(text.split())
    while len(text) > 1 and (
        (text[0] == text[-1] and text[0] in "$\"'*_") or (text[0] + text[-1]) in ("“”", "‘’", "{}")
    ):
        text = text[1:-1].strip()
    text = text.replace("\\$", "$")
    return re.sub(r"(?<!\.)[.,;!]$", "", text).strip(" *_")


@lru_cache(maxsize=1024)
def read(answer: str) -> Answer:
    """The answer's type, and what it is compared by."""
    source = text = plain(answer)
    if not text:
        return Answer("", "")
    if match := CHOICE.fullmatch(text):
        return Answer("choice", (match[1] or match[2]).upper(), source, match[3].strip())
    for kind, key in (("date", _date(text)), ("time", _time(text)), ("code", _code(text))):
        if key:
            return Answer(kind, key, source)
    text = COUNTED.sub(lambda match: f"\\times10^{{{POWERS[match[1]]}}}", text)
    text = str(COUNTS.get(text.lower(), text))
    number, unit = _split_unit(text)
    digits = PERCENT.sub("", number)
    if len(digits) <= LONGEST and _is_mathematics(_latex(digits)):
        return Answer("math", " ".join((number, *unit)), source, _latex(digits), unit, digits != number)
    return Answer("words", _folded(text), source)


def _date(text: str) -> str:
    """A day, whichever way it is written; of 05/01/2024 nobody knows which is the month."""
    if not re.search(r"\d", text) or len(text) > 30:
        return ""
    if match := re.fullmatch(r"(\d{1,2})([/.-])(\d{1,2})\2(\d{4}|\d{2})", text):
        first, second = int(match[1]), int(match[3])
        if len(match[4]) < 4 or first == second or max(first, second) <= 12 or min(first, second) > 12:
            return f"{first}/{second}/{match[4]}"
        text = f"{match[4]}-{min(first, second)}-{max(first, second)}"
    text = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b|\bof\b|,|\bthe\b|(?<=[a-z])\.", " ", text)
    text = re.sub(r"\bSept\b", "Sep", " ".join(text.split()))
    for form in DATES:
        try:
            day = datetime.strptime(
                text + ("" if "%Y" in form else " 2000"), form + ("" if "%Y" in form else " %Y")
            )
        except ValueError:
            continue
        return "".join(
            day.strftime(part)
            for part in ("%Y ", "%m ", "%d")
            if part[1].lower() in form.lower() or (part == "%m ")
        )
    return ""


def _time(text: str) -> str:
    compact = re.sub(r"\s|(?<=[ap])\.(?=\s?m)|(?<=[ap]\.m)\.|(?<=[ap]m)\.", "", text.lower()).replace(
        ".m", "m"
    )
    for form in TIMES if len(compact) <= 12 else ():
        if form == "%H:%M" and not re.fullmatch(r"\d?\d:\d\d", compact):
            continue
        try:
            return datetime.strptime(compact, form).strftime("%H:%M:%S")
        except ValueError:
            continue
    return ""


def _code(text: str) -> str:
    for name, pattern in CODES:
        if not (match := pattern.fullmatch(text)):
            continue
        if name == "telephone":
            return re.sub(r"[^\d+]", "", text)
        if name == "version":
            return match[1]
        joint = {"dimensions": "x", "ratio": ":", "range": "-"}.get(name, "/")
        key = re.sub(r"\s*(?:\\times|\\colon|to|--|x(?=[\s\d]))\s*", joint, text)
        return re.sub(r"[\s$€£¥%]|(?<=\d),(?=\d{3})", "", key)
    return ""


def _split_unit(text: str) -> tuple[str, tuple[str, ...]]:
    """A number and the words of its unit. A letter that clings to its number is a variable: 5m, but 5 m."""
    money = re.match(r"(-?)\s*([$€£¥])\s*(?=[\d.])", text)
    if money:
        text = money[1] + text[money.end() :]
    match = UNIT.search(text)
    words = re.sub(r"/", " per ", match[1]).split() if match else []
    head = text[: match.start()].rstrip() if match else text
    known = all(_is_unit(word) for word in words)
    clings = match is not None and len(words[0]) == 1 and words[0] not in "°$€£¥¢" and text[len(head)] != " "
    if not words or not known or clings or not re.search(r"\d", head) or not _is_mathematics(head):
        words, head = [], text
    if money:
        words = [money[2], *words]
    return head, tuple(token for word in words for token in _unit(word))


def _is_unit(word: str) -> bool:
    bare = re.sub(r"\^.*|[²³.]+$", "", word)
    return bare in UNITS or (len(bare) > 1 and bare.islower() and bare not in NAMES)


def _unit(word: str) -> list[str]:
    power = "square" if re.search(r"\^\{?2|²", word) else "cubic" if re.search(r"\^\{?3|³", word) else ""
    bare = re.sub(r"\^.*|[²³.]+$", "", word)
    name = UNITS.get(bare) or (bare[:-1] if bare.endswith("s") else bare)
    return [*([power] if power else []), *name.split()]


def _is_mathematics(text: str) -> bool:
    """No words: single letters, names of functions, or letters multiplied beside other mathematics."""
    bare = re.sub(r"\\(?:begin|end)\s*\{[a-z]*\}(?:\{[clr|]*\})?|\\[A-Za-z]+", " ", text)
    if not re.search(r"[^\W_]", bare) and not re.search(r"\\(?:infty|pi|emptyset|varnothing)", text):
        return False
    signs = re.search(r"[\\^=+*<>√]|\d[a-z]|\b[a-z]\b", text)
    for match in re.finditer(r"[^\W\d_]+", bare):
        word = match[0]
        if not word.isascii() or (
            len(word) > 1 and word.lower() not in NAMES and (len(word) > 3 or not signs)
        ):
            return False
        if re.match(r"\d", bare[match.end() :]) and word.lower() not in NAMES:
            return False
    return True


def _latex(text: str) -> str:
    """Mathematics in the signs that math-verify reads."""
    text = re.sub(
        "[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda m: f"^{{{unicodedata.normalize('NFKC', m[0])}}}".replace("−", "-"), text
    )
    text = re.sub(
        "([¼-¾⅐-⅞])",
        lambda m: "\\frac{" + unicodedata.normalize("NFKC", m[0]).replace("⁄", "}{") + "}",
        text,
    )
    text = re.sub(r"(?<![\d.}])(\d+) +(\d+)/(\d+)(?![\d/])", r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"√\s*(?:\(([^()]*)\)|(\d+|\w))", lambda m: f"\\sqrt{{{m[1] or m[2]}}}", text)
    text = re.sub(r"(?<=\d)[eE]([+-]?\d+)\b", r"\\times10^{\1}", text)
    text = re.sub(r"(?<=\d)\s*[x*]\s*(?=10\s*\^)", r"\\times ", text).replace("**", "^")
    separator = r"[ '’_]" if re.match(r"[(\[{\\]", text) else r"[ ,'’_]"  # (100,200) is a point
    return re.sub(
        rf"(?<![\d.,])\d{{1,3}}(?:{separator}\d{{3}})+(?![\d])", lambda m: re.sub(r"\D", "", m[0]), text
    )


def _folded(text: str) -> str:
    """Words without case, accents, articles and punctuation, but for what stands in 3.10 and C++."""
    text = unicodedata.normalize("NFKD", text.casefold())
    text = "".join(sign for sign in text if not unicodedata.combining(sign)).replace("&", " and ")
    short = re.sub(r"(?<!\d)[.,]|[.,](?!\d)|[;:!?\"'“”‘’(){}\[\]*_$\\]", " ", text)
    short = re.sub(r"\b(?:a|an|the|and)\b(?=.*\w)|(?<=\w)-(?=\w)", " ", short)
    return "".join(short.split()) or "".join(text.split())
