"""The final answer of a response.

It is the last \\boxed{}, else what follows ``####``, ``<answer>`` or "the answer is", else the last line or
sentence, if it says just that. What is mentioned on the way does not count; of numbers, the last one in the
last sentence does.
"""

import re
from collections.abc import Iterator

LONGEST_RESPONSE = 100_000  # characters; of longer ones the end is read
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
PREDICATE = re.compile(
    r"^.*(?:\b(?:is|are|was|were|be|equals|choose|pick|select)\b:?|['’]s\b|[:=])\s+(?=\S)", re.IGNORECASE
)
SO = re.compile(r"^(?:so|thus|therefore|hence|finally|then|in conclusion)\b[,:]?\s+", re.IGNORECASE)
YES_OR_NO = re.compile(r"[*_]*(yes|no|true|false)\b[*_]*[,.;:!]", re.IGNORECASE)
SENTENCE = re.compile(r"(?<=[.!?])[*_\"”)]*\s+")
# Of a bound, a part, a multiple or a power the number is not the answer. The word stands beside the number:
# "twice as many as 5" says something else. A bound of what is needed or possible is its value, though.
OPENING = r"(?:\s|[-$€£¥*_(~{+]|\\[a-z]*(?:frac|sqrt)|\\[(]|[\d.,]+[/:])*\Z"
QUALIFIED = re.compile(
    r"(?:\b(?:(?:less|more|fewer|greater|larger|smaller|bigger|higher|lower|longer|shorter|other) than"
    r"|(at (?:least|most))|exceed(?:s|ed|ing)?|not exceed|no longer|divisible by|minus|negative"
    r"|(?:half|third|quarter|multiple|divisor|root|square|cube) of|twice|double|triple|root"
    r"|between(?: \S+){1,3} and)"
    r"|(?:(?:^|[:,])\W*|\b(?:is|are|was|were|be|has|have|had|lies|just|well|slightly|far) )"
    r"(?:over|under|above|below)\b)" + OPENING,
    re.IGNORECASE,
)
RAISED = re.compile(
    r"[\s$*_)}]{0,9}(?:(?:squared|cubed)\b(?! [a-z])|dozens?\b|and (?:a|one) (?:half|third|quarter)\b"
    r"|and three quarters)",
    re.IGNORECASE,
)
NEEDED = re.compile(
    r"\b(?:needs?|needed|must|requires?|should|ha(?:s|ve) to|takes?|can|could)\b", re.IGNORECASE
)
SIGNED = re.compile(
    r"((?:^|\b(?:is|are|was|be|equals?|makes?|means)\b|[:=])\W{0,4}?)\b(?:minus|negative) (?=[$\\\d])",
    re.IGNORECASE,
)
DENIED = re.compile(r"(?:\b(?:not|never|cannot)|n['’]t)(?: longer)? (?:be|is|are|was)\W*$", re.IGNORECASE)
NUMBER = re.compile(r"\d(?:[\d.,]*\d)?")
BOX = re.compile(r"\\(?:boxed|fbox)")
LONGEST_GAP = 60
# What may stand between boxes that are one answer: a list's signs. Of two statements the later one counts.
LISTED = re.compile(
    r"(?:[ \t$,;&~*]|\\[,;: ]|\\q?quad\b|\\[()]|\\text\{ *(?:and|or) *\}|\b(?:and|or)\b"
    r"|(?:[A-Za-z]|\\[a-z]{2,9})(?:_\{?\w\}?)? ?=)*"
)


def given(expected: str) -> str:
    """The answer in a cell that may hold a whole solution, as GSM8K's and MATH's do."""
    if (content := boxed(expected)) is not None:
        return content
    last = expected.strip().rpartition("\n")[2]
    return last[4:] if last.startswith("####") else expected


def final(response: str) -> tuple[list[str], str]:
    """The texts that may be the final answer, and a sentence in which to look for a number else."""
    text = response[-LONGEST_RESPONSE:].rpartition("</think>")[2]
    if (content := boxed(text)) is not None:
        return [content], ""
    if (start := text.rfind("<answer>")) >= 0 and (end := text.find("</answer>", start)) >= 0:
        text = text[start + len("<answer>") : end]
    # A formula on lines of its own belongs to the line before.
    parts = re.split(r"\s{0,9}\\\[|\\\]|\s{0,9}\$\$", text)
    text = "".join(f" ${' '.join(p.split()).rstrip('.,')}$" if k % 2 else p for k, p in enumerate(parts))
    lines = [" ".join(line.split()) for line in text.splitlines() if re.search(r"\w|[^\s*_`#.=-]", line)]
    if not lines:
        return [], ""
    if lines[-1].startswith("####"):
        return [lines[-1][4:]], _searched(lines[-1][4:])
    marked = [match.end() for match in PHRASE.finditer(text) if not DENIED.search(match[0])]
    line = " ".join(text[marked[-1] :].strip().partition("\n")[0].split()) if marked else ""
    if line and not line.endswith("?"):
        first = SENTENCE.split(line)[0]
        return [line, *_heads(first)], _searched(first, "answer: ")
    line = lines[-1]
    last = SENTENCE.split(line)[-1]
    answers = [line, *_heads(last), *_heads(SO.sub("", last))]
    if head := YES_OR_NO.match(line):
        answers.append(head[1])
    if not NO_STATEMENT.search(last) and PREDICATE.search(last):
        answers += _heads(PREDICATE.sub("", last))
    return answers, _searched(last)


def _searched(sentence: str, before: str = "") -> str:
    """The sentence, if its last number may be the answer that it gives."""
    sentence = SIGNED.sub(r"\1-", sentence)
    number = last_number(sentence)
    if NO_ANSWER.search(sentence):
        return ""
    if number:
        said = sentence[max(0, number.start() - 80) : number.start()]
        bound = QUALIFIED.search(said)
        if (bound and not (bound[1] and NEEDED.search(said))) or RAISED.match(sentence, number.end()):
            return ""
    return before + sentence


def last_number(sentence: str) -> re.Match[str] | None:
    return next(iter([*NUMBER.finditer(sentence)][-1:]), None)


def _heads(text: str) -> Iterator[str]:
    """A text, and what stands in it before an explanation."""
    yield text
    if (aside := ASIDE.search(text)) and aside.start() > 0:
        yield text[: aside.start()]
    if head := YES_OR_NO.match(text):
        yield head[1]


def boxed(text: str) -> str | None:
    """What is in the last \\boxed{}, and before it in a list of boxes; "" where it never ends."""
    starts = [match.start() for match in BOX.finditer(text)]
    if not starts:
        return None
    start = starts.pop()
    if (end := _end(text, start, len(text))) is None:
        return ""
    contents = [text[text.find("{", start) + 1 : end - 1]]
    while starts and (end := _end(text, starts[-1], start)) is not None:
        if start - end > LONGEST_GAP or not LISTED.fullmatch(text, end, start):
            break
        start = starts.pop()
        contents.append(text[text.find("{", start) + 1 : end - 1])
    return ",".join(content.strip() for content in reversed(contents))


def _end(text: str, start: int, limit: int) -> int | None:
    """Where the braces close that a command opens."""
    depth = 0
    for end in range(start, limit):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0 and text[end] == "}":
            return end + 1
    return None
