"""The tables of the study's report, each from the results of a part."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from training.judgement import (
    WINDOW,
    Comparison,
    bounds_of,
    compare,
    control,
    estimate,
    hard_classes,
    holm,
    lagged,
    score,
    verdict,
)
from training.plot import INITIAL
from training.study import BEST, CARRY, TUNING, Run, read_result

Result = dict[str, Any]
Results = dict[Run, Result]
Row = tuple[str, ...]
LAGS = (0, 5, 10, 20)
MEASURES = ("distinct_answers", "any_right", "answer_entropy")
# What an arm of the ablation has: weights by difficulty, a target anchored to the initial entropy, dynamics.
CELLS = {
    "aer": "difficulty, anchor, dynamics",
    "target": "anchor, dynamics",
    "absolute": "difficulty, dynamics",
    "dynamic": "dynamics",
    "difficulty": "difficulty",
    BEST["fixed"]: "none of them",
}


def load(runs: Sequence[Run]) -> Results:
    """Those that are done."""
    return {run: read_result(run) for run in runs if run.result.exists()}


def by_arm(results: Results) -> dict[str, list[Result]]:
    """An arm's results in the order of their seeds."""
    arms: dict[str, list[Result]] = {}
    for run in sorted(results, key=lambda run: run.seed):
        arms.setdefault(run.arm, []).append(results[run])
    return arms


def of_domain(results: Results, domain: str) -> Results:
    return {run: result for run, result in results.items() if run.domain == domain}


def paired(results: Results, a: str, b: str) -> tuple[list[Result], list[Result]]:
    """The results of two arms on the seeds that both have."""
    by_seed = {(run.arm, run.seed): result for run, result in results.items()}
    seeds = sorted({seed for arm, seed in by_seed if arm == a} & {seed for arm, seed in by_seed if arm == b})
    return [by_seed[a, seed] for seed in seeds], [by_seed[b, seed] for seed in seeds]


def hard(domain: str) -> list[str]:
    """By the models of the tuning seeds; none as long as these are not known."""
    starts = load([Run(domain, INITIAL, seed) for seed in TUNING])
    return hard_classes(list(starts.values())) if len(starts) == len(TUNING) else []


def admission(results: Results) -> list[Row]:
    """What no bonus does to each domain."""
    heading = ("domain", "hard classes", "entropy, last / H₀", "pass@32, start", "pass@32, end", "admitted")
    rows: list[Row] = [heading]
    for domain in dict.fromkeys(run.domain for run in results):
        arms = by_arm(of_domain(results, domain))
        if not {INITIAL, "none"} <= arms.keys():
            continue
        start, end = arms[INITIAL], arms["none"]
        labels = hard_classes(start)
        entropy = [np.mean(r["steps"]["entropy"][-WINDOW:]) / r["steps"]["initial_entropy"][0] for r in end]
        before, after = ([score(r, labels) for r in runs] if labels else [] for runs in (start, end))
        admitted = bool(labels) and max(entropy) < 0.15 and all(b <= 0.8 * a for a, b in zip(before, after))
        cells = (f"{x:.3f}" for x in (np.mean(entropy), np.mean(before or [0]), np.mean(after or [0])))
        rows.append((domain, ", ".join(labels) or "–", *cells, "yes" if admitted else "no"))
    return rows


def laws(results: Results) -> list[Row]:
    """Each law with its figures, means over its seeds; the largest share within 15% first."""
    found = []
    for arm, runs in by_arm(results).items():
        held = [control(run, bounds_of(run)) for run in runs]
        name, seeds = arm.removeprefix("law-"), str(len(runs))
        if all(held):
            means = np.mean(np.array(held), axis=0)
            found.append((name, seeds, *(f"{x:.2f}" for x in means[:3]), f"{means[3]:.0f}"))
        else:
            found.append((name, seeds, "", "", "", "target not met"))
    heading = ("law", "seeds", "within ±15%", "within ±30%", "largest / target", "steps at a bound")
    return [heading, *sorted(found, key=lambda row: row[2:4], reverse=True)]


def tuning(results: Results) -> list[Row]:
    """The score that settings are chosen by, means over the tuning seeds; the best first."""
    labels = hard("carry")
    found = {arm: mean(runs, labels) for arm, runs in by_arm(results).items()}
    best = sorted(found.items(), key=lambda item: -item[1])
    rows = [(arm, f"{value:.3f}", "yes" if arm in BEST.values() else "") for arm, value in best]
    return [("arm", "pass@32 of carry's hard classes", "chosen"), *rows]


def mean(runs: Sequence[Result], labels: Sequence[str], k: int = 32) -> float:
    return float(np.mean([score(run, labels, k) for run in runs]))


def primary(results: Results) -> list[Row]:
    """The two comparisons that are tested."""
    pairs = {f"aer − {arm}": paired(results, "aer", arm) for arm in ("none", BEST["fixed"])}
    found = {name: compare(*runs, hard("carry")) for name, runs in pairs.items() if runs[0]}
    adjusted = holm([comparison.p for comparison in found.values()])
    rows: list[Row] = [("comparison", "seeds", "pass@32 [95%]", "p", "p, Holm", "in words")]
    for (name, comparison), p in zip(found.items(), adjusted):
        seeds = len(pairs[name][0])
        words = verdict(comparison, p) if seeds == len(CARRY) else "not complete"
        rows.append((name, str(seeds), written(comparison), f"{comparison.p:.3f}", f"{p:.3f}", words))
    return rows


def written(found: Comparison) -> str:
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def arms(results: Results) -> list[Row]:
    """pass@1 and pass@32 of the hard classes, entropy, coverage of training prompts and time, by arm."""
    labels = hard(next(iter(results)).domain)
    heading = ("arm", "seeds", *(f"{label}: pass@1 / pass@32" for label in labels), "pass@32 [95%]")
    heading += ("entropy, last / target", "prompts with a right sample", "seconds")
    rows: list[Row] = [heading]
    for arm, runs in by_arm(results).items():
        value, low, high = estimate(runs, labels)
        each = (f"{mean(runs, [label], 1):.3f} / {mean(runs, [label]):.3f}" for label in labels)
        tail = ("–", "–", "–")
        if arm != INITIAL:
            steps = [run["steps"] for run in runs]
            last = np.mean([np.mean(step["entropy"][-50:]) / step["target"][-1] for step in steps])
            covered = 1 - np.mean([step["all_wrong"][-50:] for step in steps])
            seconds = np.median([run["seconds"] for run in runs])
            tail = (f"{last:.2f}", f"{covered:.2f}", f"{seconds:.0f}")
        rows.append((arm, str(len(runs)), *each, f"{value:.3f} [{low:.3f}, {high:.3f}]", *tail))
    return rows


def differences(results: Results) -> list[Row]:
    """AER beside each other arm, paired by seed: an interval, no test."""
    labels = hard(next(iter(results)).domain)
    rows: list[Row] = [("comparison", "seeds", "pass@32 [95%]", "pass@1 [95%]")]
    for arm in by_arm(results):
        pair = paired(results, "aer", arm)
        if arm != "aer" and pair[0]:
            found = (written(compare(*pair, labels, k)) for k in (32, 1))
            rows.append((f"aer − {arm}", str(len(pair[0])), *found))
    return rows


def cells(results: Results) -> list[Row]:
    """The arms of the ablation, with what they have."""
    heading, *rows = arms(results)
    found = {row[0]: row[1:] for row in rows}
    return [
        ("arm", "has", *heading[1:]),
        *((arm, has, *found[arm]) for arm, has in CELLS.items() if arm in found),
    ]


def exploration(results: Results) -> list[Row]:
    """Spearman's correlation of α·w with what is sampled later: mean over seeds, least and most."""
    rows: list[Row] = [("class", "coefficient with", *(f"{lag} steps later" for lag in LAGS))]
    runs = by_arm(results).get("aer", [])
    for label in runs[0]["scores"]["classes"] if runs else ():
        for measure in MEASURES:
            found = np.array(
                [
                    lagged(series(r, f"coefficient/{label}"), series(r, f"{measure}/{label}"), LAGS)
                    for r in runs
                ]
            )
            rows.append((label, measure.replace("_", " "), *map(spread, found.T)))
    return rows


def series(run: Result, name: str) -> np.ndarray:
    """A run's values by step; NaN where a step has none."""
    return np.array(run["steps"][name], dtype=float)


def spread(values: np.ndarray) -> str:
    if np.isnan(values).all():  # of what is always the same there is no correlation
        return "–"
    return f"{np.nanmean(values):+.2f} ({np.nanmin(values):+.2f} to {np.nanmax(values):+.2f})"


def goals(results: Results) -> list[Row]:
    """What the controller promises, on seeds that nobody tuned on."""
    heading = ("domain", "seeds", "within ±15%", "within ±30%", "largest / target, median")
    rows: list[Row] = [(*heading, "steps at a bound, most")]
    held: dict[str, list[tuple[float, ...]]] = {}
    for run, result in results.items():
        if run.arm == "aer":
            found = control(result, bounds_of(result))
            held.setdefault(run.domain, []).extend([] if found is None else [found])
    held["all"] = [found for some in held.values() for found in some]
    for domain, some in held.items():
        if not some:  # entropy never met its target
            rows.append((domain, "0", "–", "–", "–", "–"))
            continue
        table = np.array(some)
        means = (f"{x:.2f}" for x in table[:, :2].mean(0))
        largest = f"{np.median(table[:, 2]):.2f}"
        rows.append((domain, str(len(some)), *means, largest, f"{table[:, 3].max():.0f}"))
    return [*rows, ("goal", "", "≥ 0.80", "≥ 0.97", "≤ 1.30", "≤ 5")]
