"""The study's statistics, against values computed by hand."""

import gzip
import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import ROOT
from training import evidence, judgement, study
from training.evidence import report
from training.findings import admission, exploration, goals, laws, paired, primary, spread
from training.judgement import Comparison, compare, control, hard_classes, holm, lagged, score, verdict
from training.study import BEST, EVALUATION, PARTS, Run, complete, config_of, read_result

pytestmark = pytest.mark.needs("training", "scipy")


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
    assert admission(results)[1:] == [
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
    assert laws(results)[1:] == [
        ("b", "1", "1.00", "1.00", "0.90", "0"),
        ("a", "2", "0.50", "1.00", "0.85", "10"),
        ("c", "1", "", "", "", "target not met"),
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


def test_a_run_that_stops_counts_as_its_initial_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(*_: Any) -> None:
        raise FloatingPointError("step 7: its update made weights that are not finite")

    run = Run("carry", "clip-higher", 10)
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    initial = {"scores": {"classes": {"0 carries": {"samples": 64, "right": [3]}}}}
    run._replace(arm="initial").result.write_bytes(gzip.compress(json.dumps(initial).encode()))
    config = config_of(run, tmp_path)
    config.output.mkdir(parents=True)
    (config.output / "metrics.jsonl").write_text('{"step": 1, "entropy": 0.5}\n')
    (config.output / "timing.jsonl").write_text('{"seconds": 1}\n')
    monkeypatch.setattr(study, "run_one", stops)
    complete(config, EVALUATION)
    found = read_result(run)
    assert found["scores"] == initial["scores"]
    assert found["error"].startswith("step 7")
    assert evidence.failures({run: found}) == (
        "\nStopped with an error, and count as their initial models: carry-clip-higher-10"
        " (step 7: its update made weights that are not finite).\n"
    )


CLASSES = ("0 carries", "1 carry", "2+ carries")


def made(run: Run, right: int, entropy: float = 0.1) -> dict[str, Any]:
    """A result of 60 steps: entropy meets its target of 0.1 at the eleventh."""
    rng = np.random.default_rng(run.seed)
    coefficient = rng.random(60)
    steps: dict[str, Any] = {
        "entropy": [0.5] * 10 + [entropy] * 50,
        "target": [0.1] * 60,
        "initial_entropy": [1.0] * 60,
        "alpha": [0.01] * 60,
        "all_wrong": [0.25] * 60,
    }
    for label in CLASSES:
        steps[f"coefficient/{label}"] = [*coefficient.tolist()[:-1], None]
        later = [0.0] * 5 + (-coefficient[:-5]).tolist()
        steps |= {f"{name}/{label}": later for name in ("distinct_answers", "any_right", "answer_entropy")}
    counts = {CLASSES[0]: [64, 64], CLASSES[1]: [right, 0], CLASSES[2]: [0, right]}
    scores = {"classes": {label: {"samples": 64, "right": row} for label, row in counts.items()}}
    kept = {"domain": run.domain, "arm": run.arm, "seed": run.seed, "settings": {}, "seconds": 100.0}
    return kept | {
        "commit": "0" * 40,
        "machine": "a processor",
        "versions": {"torch": "2"},
        "date": "2026-01-01",
        "scores": scores,
        "steps": steps,
    }


def keep(run: Run, **what: Any) -> None:
    run.result.write_bytes(gzip.compress(json.dumps(made(run, **what)).encode()))


def test_a_whole_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each table has what was made up; the pictures are drawn."""
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr(evidence, "DOCS", tmp_path)
    monkeypatch.setattr(judgement, "DRAWS", 20)
    for run in {run for runs in PARTS.values() for run in runs}:
        keep(run, right={"aer": 64, "initial": 1}.get(run.arm, 0))
    evidence.main()
    text = (tmp_path / "evidence.md").read_text()
    assert "| aer − none | 10 | +0.500 [+0.000, +1.000] | 0.002 | 0.004 | helps |" in text
    assert "| aer | 10 | 0.500 / 0.500 | 0.500 / 0.500 | 0.500 [" in text
    summary = " ".join(text.split("## In short")[1].split("\n## ")[0].split())
    assert (
        "no bonus is +0.500 [+0.000, +1.000] (p = 0.004 by Holm; in the protocol's words: *helps*)" in summary
    )
    assert "had 6 seeds" in summary
    assert "from 0.250 to 0.000 without a bonus. AER does not prevent that (0.500)" in summary
    assert "in 1.00 of the steps of carry" in summary
    assert "| none | 6 | 0.000 / 0.000 | 0.000 / 0.000 | 0.000 [0.000, 0.000] | 1.00 | 0.75 | 100 |" in text
    assert "| dynamic | dynamics | 5 | 0.000 / 0.000 |" in text
    assert "| all | 22 | 1.00 | 1.00 | 1.00 | 0 |" in text
    assert f"a processor, one thread a run; torch 2; 2026-01-01; commit {'0' * 7}." in text
    for picture in ("arms", "control", "exploration"):
        assert (tmp_path / f"evidence-{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_there_is_no_summary_of_some_of_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    assert "## In short" not in report()


def test_the_page_has_the_words_of_its_generator() -> None:
    page = (ROOT / "docs" / "evidence.md").read_text()
    captions = [caption for _, _, tables in evidence.SECTIONS.values() for caption in tables]
    for words in (evidence.THREATS, *captions, *(what for _, what, _ in evidence.SECTIONS.values())):
        assert words in page
    end = 0
    for words in re.split(r"\{.+?\}", evidence.INTRODUCTION + evidence.SUMMARY):
        end = page.index(words, end) + len(words)  # one after another, with the figures between them


def test_a_comparison_in_words_needs_all_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    for seed in (100, 101):
        keep(Run("carry", "initial", seed), right=1)
    runs = [Run("carry", arm, seed) for seed in range(10, 19) for arm in ("aer", "none", BEST["fixed"])]
    results = {run: made(run, right=64 * (run.arm == "aer")) for run in [*runs, Run("carry", "none", 19)]}
    rows = primary(results)[1:]
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        ("aer − none", "9", "not complete"),
        (f"aer − {BEST['fixed']}", "9", "not complete"),
    ]
    a, b = paired(results, "aer", "none")
    assert [r["seed"] for r in a] == [r["seed"] for r in b] == list(range(10, 19))


def test_goals_by_hand() -> None:
    """A domain where entropy never met its target has no figures."""
    results = {Run("a", "aer", 10): made(Run("a", "aer", 10), 1, entropy=0.1)}
    results[Run("a", "aer", 11)] = made(Run("a", "aer", 11), 1, entropy=0.08)
    results[Run("b", "aer", 10)] = made(Run("b", "aer", 10), 1, entropy=0.4)
    results[Run("b", "none", 10)] = made(Run("b", "none", 10), 1)
    assert goals(results)[1:-1] == [
        ("a", "2", "0.50", "1.00", "0.90", "0"),
        ("b", "0", "–", "–", "–", "–"),
        ("all", "2", "0.50", "1.00", "0.90", "0"),
    ]


def test_exploration_by_hand() -> None:
    """What is sampled is the coefficient of five steps before, with its sign turned."""
    results = {Run("a", "aer", seed): made(Run("a", "aer", seed), 1) for seed in (10, 11)}
    rows = exploration(results)[1:]
    assert len(rows) == 9
    for row in rows:
        assert row[3] == "-1.00 (-1.00 to -1.00)"
        assert "-1.00" not in row[2] + row[4] + row[5]
    assert spread(np.array([np.nan, 0.5, 0.25])) == "+0.38 (+0.25 to +0.50)"
    assert spread(np.array([np.nan])) == "–"
