"""The default scorer: what is a right answer, and what only looks like one.

answers.jsonl has answers as data sets write them, responses to them, and whether these are right.
"""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from training.answers import score, vote
from training.forms import plain
from training.responses import final

pytestmark = pytest.mark.needs("math_verify")
ROWS = [
    json.loads(line) for line in Path(__file__).with_name("answers.jsonl").read_text("utf-8").splitlines()
]
MISSED = {  # right, and 0
    ("New York", "It is in New York."),
    ("Berlin", "I would say Berlin."),
    ("Berlin", "The capital is Berlin, I am sure."),
}
WRONG: set[tuple[str, str]] = set()  # wrong, and 1


def test_no_answer_is_taken_for_another() -> None:
    def found(right: int) -> set[tuple[str, str]]:
        pairs = [(row["expected"], row["response"]) for row in ROWS if row["score"] == right]
        assert len(pairs) > 190
        return {pair for pair in pairs if score(*pair) != right}

    assert found(0) == WRONG
    assert found(1) == MISSED


def in_thread(function: Any, *args: str) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function(*args)))
    thread.start()
    thread.join()
    return found[0]


def test_a_thread_scores_as_the_process_does() -> None:
    pairs = [(row["expected"], row["response"]) for row in ROWS[::7]]
    assert [in_thread(score, *pair) for pair in pairs] == [score(*pair) for pair in pairs]


def test_the_first_score_of_a_process_is_like_any_other() -> None:
    program = r"from training.answers import score; print(score('(-\\infty, 7]', r'\boxed{x \le 7}'))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["1.0"]


def test_scoring_sets_no_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "alarm", lambda seconds: pytest.fail("an alarm"))
    assert score("x^2+2x+1", "\\boxed{(x+1)^2}") == 1.0


@pytest.mark.parametrize(
    "text", ["", " ", "\\boxed{", "$", "\\", "9" * 5000, "\x00", "\ud800", "{}{{}", "] )"]
)
def test_no_text_is_an_error(text: str) -> None:
    assert score("5", text) == 0.0
    assert score(text, "\\boxed{5}") == 0.0
    assert isinstance(vote(text), str)


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{9^{9^{9^{9}}}}",
        "\\boxed{(9^{9999})^{9999}}",
        "\\boxed{100000000!}",
        "\\boxed{9**9**9**9**9}",
        "\\boxed{9**(9**99999999)}",
        "\\boxed{\\binom{10000000}{5000000}}",
        f"\\boxed{{{'(' * 30}1{')' * 30}}}",
        f"\\boxed{{{'{' * 40}1{'}' * 40}}}",
        "The answer is 5 meals for the many people who came on that day",
        "5" + "m " * 400,
        "5 " + "m/(s" * 240,
        "5 " + "m\\cdot " * 120,
        "5 " + "\\mu" * 300,
        "\\boxed{" * 15_000,
        "\\[" * 50_000,
        "*" * 100_000 + "1",
        "a, the " * 15_000,
        "answer is " * 10_000,
        " " * 100_000 + "x",
        "1-" * 50_000,
    ],
    ids=lambda text: text[:20],
)
def test_every_text_is_scored_in_bounded_time(text: str) -> None:
    """In a thread, where no alarm is heard; ten times what the slowest takes."""
    started = time.monotonic()
    in_thread(score, "7", text)
    in_thread(vote, text)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{1}" * 11_000,
        "\\boxed{1}, x = " * 6_600,
        "\\boxed{" * 14_000,
        "\\boxed{\\boxed{1}" * 6_000,
        "\\boxed{1}" + "and " * 24_000 + "\\boxed{2}",
        "\\boxed{1}" + "{" * 99_000 + "\\boxed{2}",
        "The answer is " + "between " * 12_000 + "1 and 2",
        "less than " + "1/" * 49_000 + "2",
        "less than " + "$" * 99_000 + "2",
        "at least 5" + ")" * 99_000 + "squared",
        "is minus " * 11_000 + "5",
        "=" * 99_000 + "minus 5",
        "2**" * 33_000 + "2",
        "**2" * 33_000,
        "** " * 33_000,
        "\\text{" + "{y}" * 33_000,
        "\\text{a{b}" * 9_000,
        "\\text{" * 16_000,
    ],
    ids=lambda text: text[:20],
)
def test_a_final_answer_is_found_at_once(text: str) -> None:
    """Of long texts, in time that grows with their length and no faster."""
    started = time.process_time()
    plain(final(text)[1] or text)
    assert time.process_time() - started < 1


def test_votes_are_the_same_where_answers_are() -> None:
    assert vote("\\boxed{\\frac12}") == vote("The answer is 1/2.")
    assert vote("\\boxed{2024-01-05}") == vote("The answer is January 5, 2024.")
    assert vote("The answer is Paris.") == vote("\\boxed{\\text{paris}}") != vote("\\boxed{Lyon}")
    assert vote("\\boxed{3}") != vote("\\boxed{4}")
    assert vote("\\boxed{3} and then \\boxed{4}") == vote("\\boxed{4}") != vote("\\boxed{3}, \\boxed{4}")
    assert vote("The answer is minus 4.") == vote("\\boxed{-4}") != vote("The answer is 4.")
    assert vote("\\boxed{4 \\text{ mW}}") == vote("\\boxed{4}")
    assert vote("The answer is forty-two.") == vote("\\boxed{42}")
    assert vote("\\boxed{1 2 3}") != vote("\\boxed{6}")
    assert vote("\\boxed{0.\\overline{3}}") == vote("\\boxed{\\frac13}")
    assert vote("pi") == vote("\\boxed{\\pi}")
    assert vote("\\boxed{\\ce{H2O}}") == vote("\\boxed{\\mathrm{H_2O}}") == vote("The answer is H2O.")
    assert vote("The answer is 4.") == vote("\\boxed{4}") != vote("The answer is at most 4.")
