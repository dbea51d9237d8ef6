"""The study's statistics, against values computed by hand."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training import study
from training.evidence import (
    Comparison,
    admission_table,
    compare,
    control,
    controller_table,
    hard_classes,
    holm,
    lagged,
    report,
    score,
    verdict,
)
from training.study import EVALUATION, PARTS, Run, complete, config_of, read_result


def scored(**right: list[int]) -> dict[str, Any]:
    """A result with these numbers of right samples, of 64."""
    classes = {label: {"samples": 64, "right": counts} for label, counts in right.items()}
    return {"scores": {"classes": classes}}


def test_how_a_target_is_held_by_hand() -> None:
    entropy = [4.0, 3.0, 2.0] + [2.0] * 10 + [2.8] * 10 + [2.0] * 10
    alpha = [0.0] * 5 + [0.1] * 3 + [0.2] * 4 + [0.1] * 21
    found = control({"steps": {"entropy": entropy, "target": [2.0] * 33, "alpha": alpha}}, (0.0, 0.2))
    assert found is not None
    # means of ten from the third step on: 1, 1, then up by 0.04 to 1.4, and down to 1 again
    ratios = [1.0, 1.0] + [1 + 0.04 * k for k in range(1, 11)] + [1.4 - 0.04 * k for k in range(1, 11)]
    assert found.within_15 == pytest.approx(sum(abs(r - 1) <= 0.15 for r in ratios) / 22)
    assert found.within_30 == pytest.approx(sum(abs(r - 1) <= 0.3 for r in ratios) / 22)
    assert found.largest == pytest.approx(1.4)
    assert found.at_bound == 4  # the first five zeros are three after the meeting
    never = {"steps": {"entropy": [3.0] * 33, "target": [2.0] * 33, "alpha": alpha}}
    assert control(never, (0.0, 0.2)) is None


def test_hard_classes_by_hand() -> None:
    # pass@32 of 1 right sample of 64 is 1/2
    start = [scored(easy=[32, 64], hard=[1, 0], none=[0, 0]), scored(easy=[1, 1], hard=[0, 0], none=[0, 0])]
    assert hard_classes(start) == ["hard"]  # pass@32 0.125; easy has pass@1 0.38
    assert score(start[0], ["hard", "none"]) == pytest.approx(0.125)
    assert score(start[0], ["easy"], k=1) == pytest.approx(0.75)


def test_paired_differences_by_hand() -> None:
    a = [scored(x=[64, 64], y=[64, 0]), scored(x=[64, 0], y=[64, 64]), scored(x=[0, 0], y=[64, 64])]
    b = [scored(x=[64, 0], y=[64, 0]), scored(x=[0, 0], y=[64, 0]), scored(x=[64, 64], y=[0, 0])]
    found = compare(a, b, ["x", "y"])
    differences = [0.25, 0.5, 0.0]
    assert found.mean == pytest.approx(0.25)
    flips = [np.mean(np.array(signs) * differences) for signs in product((1, -1), repeat=3)]
    assert found.p == pytest.approx(np.mean([abs(f) >= 0.25 - 1e-12 for f in flips]))
    assert -0.5 < found.low < 0.1
    assert 0.4 < found.high < 1.0
    same = compare(a, a, ["x", "y"])
    assert same == Comparison(0.0, 0.0, 0.0, 1.0)


def test_an_interval_covers_seeds_and_problems() -> None:
    """All seeds alike, but not their problems: the interval is of problems; the other way round, of seeds."""
    problems = [scored(x=[64, 0] * 50) for _ in range(10)]
    seeds = [scored(x=[64 * (k % 2)] * 100) for k in range(10)]
    none = [scored(x=[0] * 100) for _ in range(10)]
    for arm, deviation in ((problems, 0.05), (seeds, 0.5 / 10**0.5)):
        found = compare(arm, none, ["x"])
        assert found.mean == pytest.approx(0.5)
        assert (found.high - found.low) / 2 == pytest.approx(1.96 * deviation, rel=0.15)


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01]) == pytest.approx([0.04, 0.02])
    assert holm([0.03, 0.02]) == pytest.approx([0.04, 0.04])
    assert holm([0.9, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([0.01, 0.02, 0.03]) == pytest.approx([0.03, 0.04, 0.04])


@pytest.mark.parametrize(
    ("found", "p", "words"),
    [
        (Comparison(0.2, 0.1, 0.3, 0.01), 0.02, "helps"),
        (Comparison(-0.2, -0.3, -0.1, 0.01), 0.02, "hurts"),
        (Comparison(0.05, 0.01, 0.09, 0.01), 0.02, "a small difference"),
        (Comparison(0.02, -0.05, 0.09, 0.5), 0.5, "no effect of interest"),
        (Comparison(0.2, -0.05, 0.5, 0.1), 0.2, "inconclusive"),
        (Comparison(-0.02, -0.15, 0.05, 0.5), 0.5, "inconclusive"),
    ],
)
def test_the_words_of_the_protocol(found: Comparison, p: float, words: str) -> None:
    assert verdict(found, p) == words


def test_lagged_correlations_by_hand() -> None:
    x = np.array([1.0, 3.0, 2.0, 5.0, 4.0, 6.0, 0.0])
    y = np.concatenate(([9.0], x[:-1]))  # one step later
    assert lagged(x, y, [1])[0] == pytest.approx(1.0)
    assert lagged(x, -y, [1])[0] == pytest.approx(-1.0)
    assert abs(lagged(x, y, [0])[0]) < 0.6


def test_a_domain_is_admitted_by_what_no_bonus_does() -> None:
    def run(entropy: float, **right: list[int]) -> dict[str, Any]:
        return scored(**right) | {"steps": {"entropy": [entropy] * 12, "initial_entropy": [0.5] * 12}}

    results: dict[Run, dict[str, Any]] = {}
    for domain, last, counts in (("a", 0.05, [0, 1]), ("b", 0.05, [1, 1]), ("c", 0.1, [0, 0])):
        for seed in (100, 101):
            results[Run(domain, "initial", seed)] = run(0.5, easy=[32, 32], hard=[1, 1])
            results[Run(domain, "none", seed)] = run(last, easy=[64, 64], hard=counts)
    results[Run("d", "initial", 100)] = run(0.5, easy=[32, 32], hard=[1, 1])  # no run of it yet
    assert admission_table(results) == [
        ("a", "hard", "0.100", "0.500", "0.250", "yes"),
        ("b", "hard", "0.100", "0.500", "0.500", "no"),  # nothing is lost
        ("c", "hard", "0.200", "0.500", "0.000", "no"),  # no collapse
    ]


def test_laws_are_ranked_and_bounds_are_their_own() -> None:
    def run(entropy: float, alpha: float, **settings: Any) -> dict[str, Any]:
        steps = {"entropy": [3.0] + [entropy] * 20, "target": [1.0] * 21, "alpha": [alpha] * 21}
        return {"steps": steps, "settings": {"k": [1, 2]} | settings}

    results = {
        Run("carry", "law-a", 100): run(0.8, 0.0, law="proportional", alpha_min=0.0),
        Run("carry", "law-a", 101): run(0.9, 0.1, law="proportional", alpha_min=0.0),
        Run("carry", "law-b", 100): run(0.9, 0.0),
        Run("carry", "law-c", 100): run(1.2, 0.0),
    }
    assert controller_table(results) == [
        ("b", "1.00", "1.00", "0.90", "0"),
        ("a", "0.50", "1.00", "0.85", "10"),
        ("c", "", "", "", "target not met"),
    ]


def test_a_report_says_what_is_missing() -> None:
    text = report()
    for part, runs in PARTS.items():
        done = sum(run.result.exists() for run in runs)
        assert f"{done} of {len(runs)} runs." in text, part


def test_a_result_has_every_class_of_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step without a prompt of some class has no value of it; the first step may be one."""
    run = Run("carry", "law-pi-low", 100)
    config = config_of(run, tmp_path)
    config.output.mkdir(parents=True)
    steps = [
        {"step": 1, "coefficient/0 carries": 0.12345678},
        {"step": 2, "coefficient/1 carry": 2, "warnings": ["-"]},
    ]
    for name, rows in (("metrics", steps), ("timing", [{"seconds": 1.25}, {"seconds": 2.5}])):
        (config.output / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (config.output / "scores.json").write_text('{"classes": {}}')
    monkeypatch.setattr(study, "run_one", lambda *_: None)
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    complete(config, EVALUATION)
    found = read_result(run)
    assert found["steps"] == {
        "step": [1, 2],
        "coefficient/0 carries": [0.123457, None],
        "coefficient/1 carry": [None, 2],
    }
    assert (found["domain"], found["arm"], found["seed"]) == run
    assert found["seconds"] == 3.8
    assert found["settings"]["alpha_min"] == -0.05
    assert "output" not in found["settings"]
