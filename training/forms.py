"""What an answer is, by its type: mathematics, a date, a time, a score, a version, a list, a choice, words.

The types but mathematics have a key: answers are equal where their keys are. Mathematics has the LaTeX that
math-verify reads, and its unit beside it.
"""

import re
import unicodedata
from datetime import datetime
from functools import lru_cache
from typing import NamedTuple

from training.units import FUNCTIONS, split

LONGEST = 1_000  # characters; what is longer is compared as it stands


class Answer(NamedTuple):
    """An answer as it is compared: by ``key`` alone, unless it is mathematics."""

    kind: str  # date, time, code, list, choice, math, words; "" for nothing
    key: str
    source: str = ""  # as it was written, without its format
    # What stands beside the letter of a choice, the LaTeX of mathematics, the formula of a compound.
    text: str = ""
    unit: tuple[str, ...] = ()
    percent: bool = False


MINUS, SPACES, NOTHING = (
    "−–—‐‑‒",
    "\u00a0\u2007\u2009\u202f\u200a\u2002\u2003",
    "\u200b\u2060\ufeff\u200e\u200f",
)
SIGNS = str.maketrans(
    {"µ": "μ"}  # the sign and the letter
    | dict.fromkeys(MINUS, "-")
    | dict.fromkeys(SPACES, " ")
    | dict.fromkeys(NOTHING, "")
    | dict(zip("’÷⁄º％", "'//°%"))
    | {"∞": "\\infty ", "π": "\\pi ", "·": "\\cdot ", "×": "\\times ", "≤": "\\le ", "≥": "\\ge "}
    | {"≠": "\\ne ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "∅": "\\emptyset "}
)
TEXT = re.compile(
    r"\\(?:ce|text(?:bf|it|rm|normal|sf|tt)?|math(?:rm|bf|it|sf|tt)|mbox|operatorname|bf|rm|bold(?:symbol)?)\s*"
    r"\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}"
)
DATES = [
    *("%Y-%m-%d", "%Y/%m/%d", "%Y.%m.%d", "%B %d %Y", "%b %d %Y", "%d %B %Y", "%d %b %Y"),
    *("%B %d", "%b %d", "%d %B", "%d %b", "%B %Y", "%b %Y"),
]
TIMES = ["%I:%M:%S%p", "%I:%M%p", "%I%p", "%H:%M:%S", "%H:%M"]
NUMBER = r"-?[$€£¥]?\d+(?:,\d{3})*(?:\.\d+)?%?"
CODES = [  # what joins numbers without being an operation
    ("version", re.compile(r"v?(\d+(?:\.\d+){2,}[\w.+-]*)")),
    ("dimensions", re.compile(rf"{NUMBER}(?:\s*(?:x|\\times)\s*{NUMBER})+(?!\s*\^)")),
    ("telephone", re.compile(r"\+[\d\s().-]{6,}|\(\d+\)[\d\s.-]{5,}|\d+(?:-\d+){2,}|\d+(?: \d+)+ \d{4}")),
    ("ratio", re.compile(rf"{NUMBER}(?:\s*(?::|\\colon)\s*{NUMBER})+")),
    ("range", re.compile(rf"{NUMBER}\s*(?:--?|to)\s*{NUMBER}(?:\s+[a-z]{{2,}}|\s*(?:[kcm]m|[km]g|°[CF]?))?")),
    ("slashes", re.compile(r"\d+(?:/\d+){2,}")),
]
REPEATING = re.compile(r"(?<![\d.,])(\d*)\.(\d*)\\(?:overline|bar)\s*\{(\d+)\}")
# Without a backslash math-verify takes them for products of letters.
NAMED = re.compile(
    r"(?<![A-Za-z\\])(pi(?![A-Za-z])|(?:log|ln|sin|cos|tan)(?= ?(?:[\d(\\]|[A-Za-z](?![A-Za-z]))))"
)
# Numbers side by side are no product, but digits may be grouped.
LIST = re.compile(r"-?\d+(?:\.\d+)?(?: -?\d+(?:\.\d+)?)+")
THOUSANDS = re.compile(r"-?\d{1,3}(?: \d{3})+(?:\.\d+)?")
CHOICE = re.compile(
    r"(?:(?:option|choice)\s+)?(?:\(([A-Za-z])\)|([A-Z])(?:[):]|\.?$))((?!\s*(?:and|or|,)\b).*)", re.DOTALL
)
COUNTED = re.compile(r"(?<=\d) ?(hundred|thousand|million|billion|trillion)\b")
BOLD = re.compile(r"\*\*")
# After a number, a bracket or a single letter, and before one: 2**3, x ** 2, (a+b)**n.
POWER = re.compile(
    r"(?:(?<=[\d)\]}])|(?<=\b[A-Za-z]))\*\*(?=[-+]?(?:[\d(\\]|[A-Za-z]\b))"
    r"|(?:(?<=[\d)\]}] )|(?<=\b[A-Za-z] ))\*\*(?= [-+]?(?:[\d(\\]|[A-Za-z]\b))"
)
CARET = re.compile(r"\s?\*\*\s?(?:\(([^()]*)\)|([-+]?[\d.]+))")
NEGATIVE = re.compile(r"^(?:minus|negative) (?=[$\\\d])", re.IGNORECASE)
PERCENT = re.compile(r"(?<=\d)\s*(?:%|percent)$")
ELEMENTS = re.compile(
    r"H[efgo]?|Li|B[aeikr]?|C[adeflmorsu]?|N[abdeip]?|O|F[emr]?|M[gno]|A[cglmrstu]|S[bceimnr]?|P[abdmortu]?|Kr?"
    r"|T[abcehilm]|V|Zn|Zr|G[ade]|R[abehnu]|Yb?|I[nr]?|Xe|L[au]|E[rsu]|Dy|Os|W|U"
)
ONES = re.findall(
    r"\w+",
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen",
)
TENS = re.findall(r"\w+", "twenty thirty forty fifty sixty seventy eighty ninety")
COUNTS = re.compile(
    rf"(?:({'|'.join(TENS)})(?:[- ]({'|'.join(ONES[1:10])}))?|({'|'.join(reversed(ONES))}))\b", re.IGNORECASE
)
POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}


def plain(text: str) -> str:
    """Without what only formats: math delimiters, \\text{}, spaces of LaTeX, bold, quotes, a full stop."""
    text = unicodedata.normalize("NFC", text).translate(SIGNS)
    for _ in range(3):
        text = TEXT.sub(r" \1 ", text)
    text = re.sub(
        r"\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\\!|\\limits|(?<!\w)__|__(?!\w)|`", "", text
    )
    text = _without_bold(text)
    text = re.sub(r"\{\s*,\s*\}", ",", text)
    text = re.sub(r"(?<!\\)\\[,;: ]|\\q?quad\b|~", " ", text)
    text = re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree\b", "°", text)
    text = re.sub(r"(?<=\d)\s*°\s*(?=[CF]\b)", " °", text)  # of a temperature, in one word
    text = re.sub(r"\\\(|\\\)|\\\[|\\\]", "", text).replace("\\%", "%")
    text = re.sub(r"^\s*\{([^{}]*)\}\s*$", r"\1", text)
    text = re.sub(r"(?<=[$\"'*_”’])[.,;]$", "", " ".join(text.split()).replace(" ^", "^"))
    while len(text) > 1 and (
        (text[0] == text[-1] and text[0] in "$\"'*_") or (text[0] + text[-1]) in ("“”", "‘’")
    ):
        text = text[1:-1].strip()
    text = re.sub(r"(?<!\\)\\([$&#])", r"\1", text)
    return re.sub(r"(?<!\.)[.,;]$|(?<=[A-Za-z])!$", "", text).strip(" *_")


def _without_bold(text: str) -> str:
    """Without the ** of emphasis; between operands it is a power, unless it closes what another opened."""
    marks = text.count("**")
    opened = False

    def sign(match: re.Match[str]) -> str:
        nonlocal marks, opened
        marks -= 1
        if POWER.match(text, match.start()) and (marks or not opened):
            return "**"
        opened = not opened
        return ""

    return BOLD.sub(sign, text)


@lru_cache(maxsize=1024)
def read(answer: str) -> Answer:
    """The answer's type, and what it is compared by."""
    if len(answer) > LONGEST:
        return Answer("words", " ".join(answer.split()))
    source = text = plain(answer)
    text = NEGATIVE.sub("-", text)
    if not text:
        return Answer("", "")
    if match := CHOICE.fullmatch(text):
        return Answer("choice", (match[1] or match[2]).upper(), source, match[3].strip())
    if LIST.fullmatch(text) and not THOUSANDS.fullmatch(text) and not _code(text):
        return Answer("list", text, source)
    for kind, key in (("date", _date(text)), ("time", _time(text)), ("code", _code(text))):
        if key:
            return Answer(kind, key, source)
    if formula := _formula(text):
        return Answer("words", _folded(formula), source, formula)
    text = _powers(text)
    if (parts := re.split(r",\s*|\s+and\s+", text))[1:] and any(_code(part) for part in parts):
        return Answer("code", ", ".join(_code(part) or part for part in parts), source)
    if (count := COUNTS.match(text)) and re.fullmatch(
        r"(?: (?!of\b|or\b|and\b)[a-z]+)?", text[count.end() :]
    ):
        text = _powers(f"{_cardinal(*count.groups())}{text[count.end() :]}")
    text = _latex(text)
    number, unit = split(text)
    if unit and not (re.search(r"\d", number) and _is_mathematics(number)):
        number, unit = text, ()
    digits = PERCENT.sub("", number)
    if _is_mathematics(digits):
        return Answer("math", " ".join((number, *unit)), source, digits, unit, digits != number)
    return Answer("words", _folded(text), source)


def _powers(text: str) -> str:
    return COUNTED.sub(lambda match: f"\\times10^{{{POWERS[match[1]]}}}", text)


def _formula(text: str) -> str:
    """A compound of two elements or more, with a count: H2O, \\mathrm{C_6H_{12}O_6}, Ca(OH)₂."""
    if not re.match(r"[A-Z(]", text) or len(text) > 60:
        return ""
    text = re.sub("[₀-₉]", lambda match: unicodedata.normalize("NFKC", match[0]), text)
    if "_" in text:
        text = re.sub(r"_(?:(\d)|\{(\d+)\})", r"\1\2", text.replace(" ", ""))
    known = re.fullmatch(r"(?:(?:[A-Z][a-z]?|[()])\d*)+", text) and re.search(r"\d", text)
    elements = set(re.findall(r"[A-Z][a-z]?", text)) if known else set()
    return text if len(elements) > 1 and all(map(ELEMENTS.fullmatch, elements)) else ""


def _cardinal(ten: str | None, one: str | None, small: str | None) -> int:
    if small or not ten:
        return ONES.index((small or "zero").lower())
    return 10 * TENS.index(ten.lower()) + 20 + (ONES.index(one.lower()) if one else 0)


def _date(text: str) -> str:
    """A day, whichever way it is written; of 05/01/2024 nobody knows which is the month."""
    if not re.search(r"\d", text) or len(text) > 30:
        return ""
    if match := re.fullmatch(r"(\d{1,2})([/.-])(\d{1,2})\2(\d{4}|(?<=/)\d{2})", text):
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
        key = re.sub(r"\s*(?:\\times|\\colon|--|x(?=[\s\d]))\s*", joint, text)
        return re.sub(r"[\s$€£¥%]|(?<=\d),(?=\d{3})", "", key)
    return ""


def _is_mathematics(text: str) -> bool:
    """No words: single letters, names of functions, or letters multiplied beside other mathematics."""
    bare = re.sub(r"\\(?:begin|end)\s*\{[a-z]*\}(?:\{[clr|]*\})?|\\[A-Za-z]+", " ", text)
    if not re.search(r"[^\W_]", bare) and not re.search(r"\\(?:infty|pi|emptyset|varnothing)", text):
        return False
    if re.search(r"\d(?:[-:/.]\d+){2,}|\d:\d|\d0s\b|^[a-zA-Z](?: [a-zA-Z])+$", text):  # nor lists of letters
        return False
    signs = re.search(r"[\\^=+*<>√]|\d[a-z]|\b[a-z]\b", text)
    for match in re.finditer(r"[^\W\d_]+", bare):
        word = match[0]
        if not word.isascii() or (
            len(word) > 1 and not FUNCTIONS.fullmatch(word.lower()) and (len(word) > 3 or not signs)
        ):
            return False
        if re.match(r"\d", bare[match.end() :]) and not FUNCTIONS.fullmatch(word.lower()):
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
    text = re.sub(r"(?<=\d)\s*[x*]\s*(?=10\s*\^)", r"\\times ", text)
    text = CARET.sub(r"^{\1\2}", text).replace("**", "^")
    text = REPEATING.sub(_repeating, text)
    text = NAMED.sub(r"\\\1 ", text)
    separator = r"[ '’_]" if re.match(r"[(\[{\\]", text) else r"[ ,'’_]"  # (100,200) is a point
    return re.sub(
        rf"(?<![\d.,])\d{{1,3}}(?:{separator}\d{{3}})+(?![\d])", lambda m: re.sub(r"\D", "", m[0]), text
    )


def _repeating(match: re.Match[str]) -> str:
    """0.1\\overline{6} as a fraction: 16 - 1 over 90."""
    whole, once, again = match.groups()
    before, with_period = int(f"0{whole}{once}"), int(f"0{whole}{once}{again}")
    return f"\\frac{{{with_period - before}}}{{{'9' * len(again) + '0' * len(once)}}}"


def _folded(text: str) -> str:
    """Words without case, accents, articles and punctuation, but for what stands in 3.10 and C++."""
    text = unicodedata.normalize("NFKD", text.casefold())
    text = "".join(sign for sign in text if not unicodedata.combining(sign)).replace("&", " and ")
    short = re.sub(r"(?<!\d)[.,]|[.,](?!\d)|[;:!?\"'“”‘’(){}\[\]*_$\\]|(?<=\w)-(?=\w)", " ", text)
    short = re.sub(r"\b(?:a|an|the|and)\b", " ", short) if len(short.split()) > 1 else short
    return "".join(short.split()) or "".join(text.split())
