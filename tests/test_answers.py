"""The default scorer: what is a right answer, and what only looks like one."""

import threading

import pytest

from training.answers import score, vote

# (expected, response, whether that is right): forms of GSM8K's, MATH's and word answers
PAIRS = [
    ("2024-01-05", "\\boxed{2024-05-01}", False),
    ("2024-01-05", "\\boxed{2024-01-05}", True),
    ("2024-01-05", "The date is January 5, 2024.", True),
    ("2024-01-05", "\\boxed{2018}", False),
    ("√2", "\\boxed{\\sqrt{2}}", True),
    ("\\sqrt{2}", "\\boxed{√2}", True),
    ("3½", "\\boxed{3.5}", True),
    ("3½", "\\boxed{\\frac{7}{2}}", True),
    ("3 1/2", "\\boxed{3.5}", True),
    ("1 000", "\\boxed{1000}", True),
    ("1,000", "\\boxed{1000}", True),
    ("1000", "\\boxed{1 000}", True),
    ("18 dollars", "\\boxed{18}", True),
    ("18", "\\boxed{18 dollars}", True),
    ("18", "The answer is $18.", True),
    ("18", "\\boxed{\\$18}", True),
    ("18 dollars", "\\boxed{18 euros}", False),
    ("Paris", "The answer is Paris.", True),
    ("Paris", "I first thought of Paris, but the answer is London.", False),
    ("Paris", "Paris is nice. The answer is Lyon.", False),
    ("Paris", "\\boxed{\\text{Paris}}", True),
    ("paris", "\\boxed{Paris}", True),
    ("Paris", "\\boxed{London}", False),
    ("3:2", "\\boxed{3:2}", True),
    ("3:2", "\\boxed{2:3}", False),
    ("3:2", "\\boxed{1.5}", False),
    ("2-1", "\\boxed{1}", False),
    ("2-1", "\\boxed{2-1}", True),
    ("2-1", "\\boxed{1-2}", False),
    ("1.2.10", "\\boxed{1.2.10}", True),
    ("1.2.10", "\\boxed{1.2.1}", False),
    ("555-1234", "\\boxed{555-1234}", True),
    ("555-1234", "\\boxed{-679}", False),
    ("+1 555 123 4567", "\\boxed{+1 555 123 4568}", False),
    ("10-20", "\\boxed{10-20}", True),
    ("10-20", "\\boxed{-10}", False),
    ("10-20", "\\boxed{20-10}", False),
    ("12:30", "\\boxed{12:30}", True),
    ("12:30", "\\boxed{12:45}", False),
    ("12:30 PM", "The answer is 12:30 pm.", True),
    ("50%", "\\boxed{50\\%}", True),
    ("50%", "\\boxed{50}", True),
    ("0.5", "\\boxed{\\frac12}", True),
    ("1/2", "\\boxed{0.5}", True),
    ("\\frac{1}{2}", "\\boxed{1/2}", True),
    ("-3", "\\boxed{-3}", True),
    ("-3", "\\boxed{3}", False),
    ("−3", "\\boxed{-3}", True),
    ("(1,2)", "\\boxed{(1,2)}", True),
    ("(1,2)", "\\boxed{(2,1)}", False),
    ("[0,1)", "\\boxed{[0,1)}", True),
    ("[0,1)", "\\boxed{[0,1]}", False),
    ("x=5", "\\boxed{5}", True),
    ("5", "\\boxed{x=5}", True),
    ("5", "\\boxed{x = 6}", False),
    ("\\{1,2,3\\}", "\\boxed{\\{3,2,1\\}}", True),
    ("2\\pi", "\\boxed{2\\pi}", True),
    ("2\\pi", "\\boxed{6.28}", False),
    ("x^2+2x+1", "\\boxed{(x+1)^2}", True),
    ("x^2+1", "\\boxed{x^2-1}", False),
    ("A", "\\boxed{A}", True),
    ("A", "The answer is (A).", True),
    ("A", "The answer is B.", False),
    ("B", "A is wrong. The answer is B", True),
    ("(C)", "\\boxed{C}", True),
    ("yes", "Yes", True),
    ("yes", "No, it is not.", False),
    ("no", "The answer is no.", True),
    ("42", "So 6*7 = 42.\n#### 42", True),
    ("42", "#### 41", False),
    ("5 km", "\\boxed{5}", True),
    ("5 km", "\\boxed{5 miles}", False),
    ("1e6", "\\boxed{1000000}", True),
    ("2.5 million", "\\boxed{2500000}", True),
    ("10^{10}", "\\boxed{10000000000}", True),
    ("January 5", "\\boxed{5 January}", True),
    ("Monday", "The answer is Monday.", True),
    ("Monday", "The answer is Sunday.", False),
    ("New York", "It is in New York.", True),
    ("red, blue", "\\boxed{red, blue}", True),
    ("100 degrees", "\\boxed{100^\\circ}", True),
    ("7", "\\boxed{7.0}", True),
    ("7", "\\boxed{7.1}", False),
    ("1234567", "The answer is 1,234,567.", True),
    ("0", "\\boxed{0}", True),
    ("0", "\\boxed{}", False),
    ("None", "The answer is None.", True),
    ("infinity", "\\boxed{\\infty}", True),
    ("George Washington", "The first president was George Washington.", True),
    ("George Washington", "George Washington was followed by John Adams. The answer is John Adams.", False),
    ("3/4", "\\boxed{\\tfrac{3}{4}}", True),
    ("3/4", "\\boxed{4/3}", False),
    ("12 apples", "There are 12 apples.", True),
    ("12", "After selling 4 of 16 apples, 12 remain.", True),
    ("16", "After selling 4 of 16 apples, 12 remain.", False),
    ("v1.2", "\\boxed{v1.2}", True),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\boxed{\\begin{pmatrix}1\\\\2\\end{pmatrix}}", True),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\boxed{\\begin{pmatrix}2\\\\1\\end{pmatrix}}", False),
]


@pytest.mark.parametrize(("expected", "response", "right"), PAIRS)
def test_score(expected: str, response: str, right: bool) -> None:
    if (expected, response) in MISSED:
        pytest.xfail("known to be missed")
    assert score(expected, response) == float(right)


MISSED = {("New York", "It is in New York.")}


def test_a_thread_scores_as_the_process_does() -> None:
    found: list[float] = []
    pairs = PAIRS[::4]
    thread = threading.Thread(target=lambda: found.extend(score(e, r) for e, r, _ in pairs))
    thread.start()
    thread.join()
    assert found == [score(e, r) for e, r, _ in pairs]


@pytest.mark.parametrize(
    "text", ["", " ", "\\boxed{", "$", "\\", "9" * 5000, "(" * 3000, "9^{9^{9^{9}}}", "\x00", "{}{{}"]
)
def test_no_text_is_an_error(text: str) -> None:
    assert score("5", text) == 0.0
    assert score(text, "\\boxed{5}") == 0.0
    assert isinstance(vote(text), str)


def test_votes_are_the_same_where_answers_are() -> None:
    assert vote("\\boxed{\\frac12}") == vote("The answer is 1/2.")
    assert vote("\\boxed{2024-01-05}") == vote("The answer is January 5, 2024.")
    assert vote("\\boxed{3}") != vote("\\boxed{4}")
