"""Problems, data and rewards."""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from tests.helpers.rewards import length
from training.config import Config
from training.data import build_task
from training.rewards import Rewards, load_reward
from training.rollout import encode
from training.tasks import Mixture, Problem, parse
from training.temptations import (
    DOMAINS,
    Example,
    addition,
    class_of,
    classes_of,
    demonstration,
    draw,
    expression,
    run,
)

pytestmark = [pytest.mark.needs("training", "datasets", "reasoning_gym", "math_verify"), pytest.mark.host]


def test_sums_by_hand() -> None:
    # 132, least significant digit first; 7 + 5 -> 2, 4 + 8 -> 2, no carry out
    assert addition(47, 85, 2) == Example("47+85=", "231", "220", 2, "47+85")
    assert addition(85, 47, 2)[1:] == ("231", "220", 2, "47+85")
    assert [addition(a, b, 2).places for a, b in ((11, 22), (19, 1), (90, 10), (99, 1))] == [0, 1, 1, 2]
    assert addition(555, 555, 3).places == 3
    task = Mixture("carry(digits=2)", 0)
    problem = Problem(
        "47+85=", "231", "2+ carries", {"task": ("carry(digits=2)", "carry", {"digits": 2}, 1.0)}
    )
    assert task.scorer(problem, "231") == 1.0
    assert task.scorer(problem, "220") == 0.0


def test_programs_by_hand() -> None:
    assert run(".3.5.2.4") == Example(".3.5.2.4=", "3524", "3524", 0, ".3.5.2.4")
    assert run(".3+5.2-4") == Example(".3+5.2-4=", "3634", "3524", 2, ".3+5.2-4")  # 5 + 1, 2 + 1, 4 + 0
    assert run("-0.0+9+9").answer == "9990"  # 0 - 1, 0 - 1, 9 + 0, 9 + 1
    assert run("-0.0+9+9").places == 3
    assert run("+9+9").answer == "01"


def test_expressions_by_hand() -> None:
    # 1 | (1 & 0) is 1, (1 | 1) & 0 is 0: so in the first bit; 0 | (1 & 1) and (0 | 1) & 1 are 1
    assert expression("10", "11", "01", "|", "&") == Example("10|11&01=", "11", "01", 1, "10|11&01")
    assert expression("10", "11", "01", "&", "|") == Example("10&11|01=", "11", "11", 0, "10&11|01")
    for first in "&^|":
        for second in "&^|":
            for a, b, c in product("01", repeat=3):
                found = expression(a, b, c, first, second)
                assert found.answer == str(eval(f"{a}{first}{b}{second}{c}"))
                assert found.shortcut == str(eval(f"({a}{first}{b}){second}{c}"))
                assert found.places == (found.answer != found.shortcut)


@pytest.mark.parametrize("name", list(DOMAINS))
def test_each_class_is_drawn(name: str) -> None:
    domain, rng = DOMAINS[name], random.Random(0)
    for size in (1, domain.usual, domain.largest):
        classes, lengths = classes_of(domain, size), set()
        for label in classes:
            example = draw(domain, rng, size, label)
            assert class_of(domain, example) == label
            assert (example.answer == example.shortcut) == (example.places == 0)
            assert set(example.question) <= set(domain.alphabet)
            assert set(example.answer + example.shortcut) <= set(domain.symbols) <= set(domain.alphabet)
            lengths.add((len(example.question), len(example.answer), len(example.shortcut)))
        ((asked, answered, shortcut),) = lengths
        assert answered == shortcut
        assert asked + answered + 1 <= 32  # the positions of the model
    drawn = Counter(Mixture(name, 0).training(k).label for k in range(1000))
    assert [drawn[x] / 1000 for x in domain.classes] == pytest.approx(domain.mix, abs=0.05)


def test_a_class_that_never_comes_is_named() -> None:
    def easy(rng: random.Random, digits: int) -> Example:
        return addition(0, rng.randrange(10**digits), digits)

    domain = DOMAINS["carry"]._replace(draw=easy)
    with pytest.raises(ValueError, match=r"no example of the class '1 carry' in 100,000 draws of digits 2"):
        draw(domain, random.Random(0), 2, "1 carry")


@pytest.mark.parametrize("name", list(DOMAINS))
def test_demonstrations_mix_right_and_wrong(name: str) -> None:
    domain, rng, right, noisy = DOMAINS[name], random.Random(0), 0, 0
    for _ in range(2000):
        example = draw(domain, rng, domain.usual, domain.classes[2])
        shown = demonstration(domain, rng, example, right=0.25, noise=0.0)
        assert shown in (example.answer, example.shortcut)
        right += shown == example.answer
        noise = demonstration(domain, rng, example, right=1.0, noise=0.5)
        noisy += sum(a != b for a, b in zip(noise, example.answer, strict=True))
    assert right / 2000 == pytest.approx(0.25, abs=0.04)
    changed = 0.5 * (1 - 1 / len(domain.symbols))
    assert noisy / (2000 * len(example.answer)) == pytest.approx(changed, abs=0.03)


@pytest.mark.parametrize(
    "name", ["carry(digits=2)", *DOMAINS, "chain_sum(max_terms=2, max_digits=1) * 2 + leg_counting"]
)
def test_training_and_held_out_problems_are_apart(name: str) -> None:
    task = Mixture(name, 0)
    training = {task.training(k).question for k in range(1500)}
    held_out = task.held_out(10)
    assert not training & {p.question for p in held_out}
    assert [p.question for p in Mixture(name, 5).held_out(10)] == [p.question for p in held_out]
    assert {p.label for p in held_out} == set(task.classes)
    assert len({p.question for p in held_out}) == len(held_out)


def test_mirrored_sums_are_held_out_together() -> None:
    task = Mixture("carry(digits=2)", 0)
    training = {task.training(k).question for k in range(3000)}
    mirrored = {f"{p.question[3:5]}+{p.question[:2]}=" for p in task.held_out(40)}
    assert not training & mirrored


def test_a_problem_depends_on_its_number_and_the_seed_alone() -> None:
    one, other = Mixture("carry(digits=3)", 1), Mixture("carry(digits=3)", 1)
    [other.training(k) for k in range(50)]
    assert [one.training(k) for k in (7, 3, 40)] == [other.training(k) for k in (7, 3, 40)]
    assert [one.training(k) for k in range(9)] != [Mixture("carry", 2).training(k) for k in range(9)]
    labels = [one.training(k).label for k in range(1000)]
    assert [labels.count(x) / 1000 for x in DOMAINS["carry"].classes] == pytest.approx(
        DOMAINS["carry"].mix, abs=0.05
    )


def test_a_mixture_has_its_weights_and_settings() -> None:
    task = Mixture("chain_sum(min_terms=2, max_terms=2) * 3 + chain_sum(min_terms=4, max_terms=4)", 0)
    problems = [task.training(k) for k in range(400)]
    terms = [p.metadata["entry"]["metadata"]["num_terms"] for p in problems]
    assert set(terms) == {2, 4}
    assert terms.count(2) / 400 == pytest.approx(0.75, abs=0.07)
    assert all((p.label == task.classes[0]) == (t == 2) for p, t in zip(problems, terms))
    for p in problems[:20]:
        assert task.scorer(p, f" {p.answer}\n") == 1.0
        assert task.scorer(p, p.answer + "1") < 1.0


def test_specifications_are_read() -> None:
    (call,) = parse("carry(digits=3)")
    assert (call.name, call.settings, call.weight) == ("carry", {"digits": 3}, 1.0)
    calls = parse("2 * a + b(x=[1, 2], y='z') * 0.5 + c")
    assert [(c.name, c.weight) for c in calls] == [("a", 2.0), ("b", 0.5), ("c", 1.0)]
    assert calls[1].settings == {"x": [1, 2], "y": "z"}


@pytest.mark.parametrize(
    "text", ["a b", "a(1)", "a * -1", "a * b", "a - b", "", "a(x=print)", "3", "a * 0", "a.b(x=1)"]
)
def test_bad_specifications_are_shown(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not of the form name"):
        parse(text)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_task", "unknown task 'no_such_task'"),
        ("chain_sum(no_such_setting=1)", "task chain_sum.no_such_setting=1.: .*no_such_setting"),
        ("chain_sum(min_terms=5, max_terms=2)", "task chain_sum"),
        ("chain_sum(seed='a')", "task chain_sum.seed='a'.: "),
        ("carry(digits=True)", "its one setting is digits, from 1 to 9"),
        ("carry(digits=0)", "its one setting is digits, from 1 to 9"),
    ],
)
def test_unknown_tasks_are_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_task(Config(task=name))


def test_a_task_with_too_few_problems_is_named() -> None:
    task = Mixture("chain_sum(size=1)", 0)
    with pytest.raises(ValueError, match=r"no (held-out|training) problem in 10,000 draws"):
        (task.training(0), task.held_out(1))


GOOD = {"question": "a", "answer": "1"}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> Config:
    rows = [{"question": f"What is {k} + {k}?", "answer": str(2 * k), "level": str(k % 2)} for k in range(60)]
    return Config(data=write(tmp_path / "rows.jsonl", rows), class_field="level")


def test_rows_are_shuffled_anew_in_each_pass_and_all_seen(data: Config) -> None:
    task = build_task(data)
    held_out = task.held_out(100)
    n = 60 - len(held_out)
    assert 0 < len(held_out) < 20
    passes = [[task.training(k) for k in range(p * n, (p + 1) * n)] for p in range(2)]
    for seen in passes:
        assert len({p.question for p in seen}) == n
        assert not {p.question for p in seen} & {p.question for p in held_out}
    assert passes[0] != passes[1]
    again = build_task(data)
    assert again.training(n + 3) == passes[1][3]  # without the passes before it
    other = build_task(replace(data, seed=1))
    assert [other.training(k) for k in range(n)] != passes[0]
    assert task.classes == ("0", "1")
    assert {p.label for p in task.held_out(1)} <= {"0", "1"}


def test_held_out_rows_of_a_file_of_their_own(data: Config, tmp_path: Path) -> None:
    rows = [{"question": "What is 3 + 3?", "answer": "6", "level": "0"}]
    task = build_task(replace(data, eval_data=write(tmp_path / "eval.jsonl", rows)))
    assert [p.question for p in task.held_out(5)] == ["What is 3 + 3?"]
    assert "What is 3 + 3?" not in {task.training(k).question for k in range(59)}
    assert len({task.training(k).question for k in range(59)}) == 59


def test_parquet_is_read(data: Config, tmp_path: Path) -> None:
    import datasets

    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list([{"question": "a?", "answer": 4}, {"question": "b?", "answer": 5}]).to_parquet(
        path
    )
    task = build_task(replace(data, data=str(path), class_field=None))
    found = {task.training(k) for k in range(9)} | set(task.held_out(9))
    assert {(p.question, p.answer, p.label) for p in found} == {("a?", "4", "all"), ("b?", "5", "all")}


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (
            [{"question": "a", "answer": "1"}, {"question": "b", "answer": None}],
            {},
            "row 2: answer is missing",
        ),
        (
            [{"question": "a", "answer": "1"}, {"question": " ", "answer": "2"}],
            {},
            "row 2: question is missing",
        ),
        ([{"question": "a"}], {}, "has no column 'answer'; it has question"),
        ([GOOD], {"class_field": "level"}, "has no column 'level'"),
        ([], {}, r"rows\.jsonl is empty"),
    ],
)
def test_bad_rows_are_named(
    rows: list[dict[str, Any]], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = Config(**({"data": write(tmp_path / "rows.jsonl", rows)} | changes))
    with pytest.raises(ValueError, match=message):
        build_task(config)


def test_data_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data .*nowhere\.jsonl: no such file"):
        build_task(Config(data=str(tmp_path / "nowhere.jsonl")))
    (tmp_path / "junk.parquet").write_text("junk")
    with pytest.raises(ValueError, match=r"data .*junk\.parquet can't be read: "):
        build_task(Config(data=str(tmp_path / "junk.parquet")))
    with pytest.raises(ValueError, match=r"must be one of \.jsonl, \.json, \.parquet, \.csv or a name on"):
        build_task(Config(data=str(tmp_path)))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question": "a", "ans')
    with pytest.raises(ValueError, match=r"data .*broken\.jsonl can't be read"):
        build_task(Config(data=str(broken)))


def test_math_verify_knows_equal_answers(data: Config) -> None:
    task = build_task(data)
    half = Problem("?", "\\frac{1}{2}", "all")
    assert task.scorer(half, "So it is $\\boxed{0.5}$.") == 1.0
    assert task.scorer(half, "So it is $\\boxed{0.25}$.") == 0.0
    assert task.scorer(half, "I do not know.") == 0.0


class Characters:
    """A tokenizer that shows its text."""

    chat_template = "there is one"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[str]:
        return [text]

    def apply_chat_template(self, turns: Any, add_generation_prompt: bool, tokenize: bool) -> str:
        assert add_generation_prompt
        assert not tokenize
        return "|".join(f"{turn['role']}:{turn['content']}" for turn in turns)


def test_prompts_with_examples() -> None:
    shown, asked = [Problem("1+1", "2", "a")], Problem("2+2", "4", "a")
    tokenizer: Any = Characters()
    plain = Config(prompt="Q: {question} A:")
    found: Any = encode(asked, shown, tokenizer, plain)
    assert found == ["Q: 1+1 A: 2\n\nQ: 2+2 A:"]
    chat = replace(plain, chat=True)
    found = encode(asked, shown, tokenizer, chat)
    assert found == ["user:Q: 1+1 A:|assistant:2|user:Q: 2+2 A:"]


def test_examples_are_no_problem_of_a_step() -> None:
    task = Mixture("carry(digits=3)", 0)
    shown = task.examples(2)
    assert shown == [task.training(-1), task.training(-2)]
    assert shown[0] != shown[1]


def test_examples_of_rows_are_not_trained_on(data: Config) -> None:
    task = build_task(replace(data, shots=2))
    shown = {p.question for p in task.examples(2)}
    assert len(shown) == 2
    assert not shown & {task.training(k).question for k in range(200)}
    assert not shown & {p.question for p in task.held_out(100)}


def test_votes_are_for_answers_not_for_words(data: Config) -> None:
    task = build_task(data)
    said = ["So it is $\\boxed{4}$.", "We get $\\boxed{4}$", "$\\boxed{5}$", "Hence the answer is $4$."]
    votes = [task.vote(text) for text in said]
    assert votes[0] == votes[1] == votes[3] != votes[2]
    assert Mixture("carry", 0).vote(" 12\n") == "12"


def test_bad_rewards_count_as_0_and_the_others_are_kept() -> None:
    """Raised, hung, NaN, no number, and a process that ended: each is reported, and the pool goes on."""
    rewards = Rewards("tests.helpers.rewards:fragile", workers=2, timeout=5.0)
    try:
        started = time.monotonic()
        responses = ["fine", "raise", "hang", "nan", "exit", "text", "fine"]
        scores = rewards.score([Problem("q", "a", "x")] * 7, responses)
        assert time.monotonic() - started < 50
        assert scores.values == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
        reasons: tuple[str, ...] = ("raised KeyError: 'no such thing'", "took more than 5 s", "returned nan")
        reasons += ("ended its process with exit code 3", "raised ValueError: could not convert")
        assert len(scores.failures) == 5
        for failure, reason in zip(scores.failures, reasons):
            assert failure.startswith(f"reward tests.helpers.rewards:fragile {reason}")
        assert rewards.score([Problem("q", "a", "x")], ["fine"]) == ([1.0], [])
    finally:
        rewards.close()


ORPHAN = """
import sys
from tests.helpers.rewards import where
from training.rewards import Rewards
from training.tasks import Problem

if __name__ == "__main__":
    rewards = Rewards("tests.helpers.rewards:where", 1, 60.0)
    rewards.score([Problem(sys.argv[1], "", "")], ["hang"])
"""


def test_a_scoring_process_ends_with_a_killed_trainer(tmp_path: Path) -> None:
    script, pid = tmp_path / "orphan.py", tmp_path / "pid"
    script.write_text(ORPHAN)
    trainer = subprocess.Popen(
        [sys.executable, str(script), str(pid)], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}
    )
    wait_for(lambda: pid.exists() and pid.read_text().endswith("."))
    worker = int(pid.read_text()[:-1])
    assert alive(worker)
    trainer.kill()
    trainer.wait()
    wait_for(lambda: not alive(worker))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_scorers_work_in_processes_as_here() -> None:
    task = Mixture("chain_sum(max_terms=2)", 0)
    problems = [task.training(k) for k in range(6)]
    responses = [p.answer if k % 2 else "no" for k, p in enumerate(problems)]
    pool, here = Rewards(task.scorer, 1, 30.0), Rewards(task.scorer, 0, 30.0)
    try:
        assert pool.score(problems, responses) == here.score(problems, responses)
        assert here.score(problems, responses).values == [0.0, 1.0] * 3
    finally:
        pool.close()


def test_a_reward_of_ones_own() -> None:
    assert load_reward("tests.helpers.rewards:length") is length
    rewards = Rewards("tests.helpers.rewards:length", 0, 1.0)
    assert rewards.score([Problem("q", "a", "x", {"level": 1})], ["12345"]).values == [1.5]


@pytest.mark.parametrize(
    "name", [".x:f", ":f", "tests.no_such:f", "tests.helpers.rewards:nothing", "tests.helpers.rewards:NUMBER"]
)
def test_rewards_that_are_not_there_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"reward '{name}'"):
        Rewards(name, 2, 1.0)
