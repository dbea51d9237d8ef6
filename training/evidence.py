"""What the runs of STUDY.md show: statistics and tables, from the results alone.

python -m training.evidence        # writes docs/evidence.md; what has not run is said
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports below: end, with no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from training.config import Config
from training.entropy import build_controller
from training.evaluation import pass_at_k
from training.files import write_text
from training.plot import INITIAL
from training.processes import command
from training.study import PARTS, RESULTS, Run, read_result

Result = dict[str, Any]
Results = dict[Run, Result]
Row = tuple[str, ...]
WINDOW = 10  # steps of a mean, in the controller's figures
SMALLEST = 0.10  # effect of interest, in pass@32
DRAWS = 10_000


class Control(NamedTuple):
    """How a run held its target, from the step at which entropy first met it."""

    within_15: float
    within_30: float
    largest: float  # mean of ten steps, over the target
    at_bound: int  # steps in a row


class Comparison(NamedTuple):
    """Paired differences of two arms over seeds."""

    mean: float
    low: float
    high: float
    p: float


def control(result: Result, bounds: tuple[float, float]) -> Control | None:
    """None where entropy never met the target."""
    steps = result["steps"]
    entropy, target = np.array(steps["entropy"]), steps["target"][-1]
    met = np.flatnonzero(entropy <= target)
    if not met.size or met[0] + WINDOW > entropy.size:
        return None
    ratio = np.convolve(entropy[met[0] :] / target, np.full(WINDOW, 1 / WINDOW), "valid")
    longest = run = 0
    for alpha in steps["alpha"][met[0] :]:
        run = run + 1 if not bounds[0] < alpha < bounds[1] else 0
        longest = max(longest, run)
    off = np.abs(ratio - 1)
    return Control(float((off <= 0.15).mean()), float((off <= 0.3).mean()), float(ratio.max()), longest)


def hard_classes(initial: Sequence[Result]) -> list[str]:
    """Classes with pass@1 < .1 and pass@32 >= .05 at the start, means over the tuning seeds."""
    means = {
        label: [np.mean([passes(r, label, k).mean() for r in initial]) for k in (1, 32)]
        for label in initial[0]["scores"]["classes"]
    }
    return [label for label, (one, many) in means.items() if one < 0.1 and many >= 0.05]


def passes(result: Result, label: str, k: int) -> np.ndarray:
    """pass@k of each held-out problem of a class."""
    row = result["scores"]["classes"][label]
    return np.array([pass_at_k(row["samples"], right, k) for right in row["right"]])


def score(result: Result, labels: Sequence[str], k: int = 32) -> float:
    """Mean over classes of the mean over their problems."""
    return float(np.mean([passes(result, label, k).mean() for label in labels]))


def compare(a: Sequence[Result], b: Sequence[Result], labels: Sequence[str], k: int = 32) -> Comparison:
    """``a`` minus ``b``, paired by seed: mean, its interval, and p of the exact sign-flip test.

    The interval (95%, percentile) resamples seeds and, of each class, problems, jointly for both arms.
    """
    from scipy.stats import permutation_test

    table = {
        label: np.array([passes(x, label, k) - passes(y, label, k) for x, y in zip(a, b)]) for label in labels
    }
    differences = np.mean([rows.mean(1) for rows in table.values()], axis=0)
    rng = np.random.default_rng(0)
    means = np.empty(DRAWS)
    for draw in range(DRAWS):
        seeds = rng.integers(len(a), size=len(a))
        means[draw] = np.mean(
            [
                rows[seeds][:, rng.integers(rows.shape[1], size=rows.shape[1])].mean()
                for rows in table.values()
            ]
        )
    p = 1.0
    if np.any(differences):
        flips = permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf)
        p = float(flips.pvalue)
    low, high = np.quantile(means, (0.025, 0.975)).tolist()
    return Comparison(float(differences.mean()), low, high, p)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values."""
    order, adjusted, largest = np.argsort(p, kind="stable"), [0.0] * len(p), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = largest
    return adjusted


def verdict(found: Comparison, p: float) -> str:
    """In the protocol's words."""
    if p <= 0.05:
        size = "a small difference" if abs(found.mean) < SMALLEST else ""
        return size or ("helps" if found.mean > 0 else "hurts")
    return "no effect of interest" if found.low > -SMALLEST and found.high < SMALLEST else "inconclusive"


def lagged(x: np.ndarray, y: np.ndarray, lags: Sequence[int]) -> list[float]:
    """Spearman's correlation of x with y so many steps later."""
    from scipy.stats import spearmanr

    measure: Callable[..., Any] = spearmanr
    return [float(measure(x[: len(x) - lag], y[lag:]).statistic) for lag in lags]


def bounds_of(result: Result) -> tuple[float, float]:
    """Between which α moved."""
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in result["settings"].items()
    }
    return build_controller(Config(**fields)).alpha_range


def controller_table(results: Results) -> list[Row]:
    """Each law with its figures, means over its seeds; the largest share within 15% first."""
    found = []
    for arm, runs in by_arm(results).items():
        held = [control(run, bounds_of(run)) for run in runs]
        if all(held):
            means = np.mean(np.array(held), axis=0)
            found.append((arm.removeprefix("law-"), *(f"{x:.2f}" for x in means[:3]), f"{means[3]:.0f}"))
        else:
            found.append((arm.removeprefix("law-"), "", "", "", "target not met"))
    return sorted(found, key=lambda row: row[1:3], reverse=True)


def admission_table(results: Results) -> list[Row]:
    """What no bonus does to each domain."""
    rows = []
    for domain in dict.fromkeys(run.domain for run in results):
        arms = by_arm({run: result for run, result in results.items() if run.domain == domain})
        if not {INITIAL, "none"} <= arms.keys():
            continue
        start, end = arms[INITIAL], arms["none"]
        hard = hard_classes(start)
        entropy = [np.mean(r["steps"]["entropy"][-WINDOW:]) / r["steps"]["initial_entropy"][0] for r in end]
        before, after = ([score(r, hard) for r in runs] if hard else [] for runs in (start, end))
        admitted = bool(hard) and max(entropy) < 0.15 and all(b <= 0.8 * a for a, b in zip(before, after))
        cells = (f"{x:.3f}" for x in (np.mean(entropy), np.mean(before or [0]), np.mean(after or [0])))
        rows.append((domain, ", ".join(hard) or "–", *cells, "yes" if admitted else "no"))
    return rows


def tuning_table(results: Results) -> list[Row]:
    """The score that settings are chosen by, means over the tuning seeds; the best first."""
    hard = ["1 carry", "2+ carries"]
    found = {arm: np.mean([score(run, hard) for run in runs]) for arm, runs in by_arm(results).items()}
    return [(arm, f"{value:.3f}") for arm, value in sorted(found.items(), key=lambda item: -item[1])]


TABLES: dict[str, tuple[str, Row, Callable[[Results], list[Row]]]] = {
    "admission": (
        "What no bonus does",
        ("domain", "hard classes", "entropy, last / H₀", "pass@32, start", "pass@32, end", "admitted"),
        admission_table,
    ),
    "controller": (
        "Laws of α on carry's tuning seeds, mean1: weights divided by their mean",
        ("law", "within ±15%", "within ±30%", "largest / target", "steps at a bound"),
        controller_table,
    ),
    "tuning": ("Settings of the rivals", ("arm", "pass@32 of carry's hard classes"), tuning_table),
}


def by_arm(results: Results) -> dict[str, list[Result]]:
    arms: dict[str, list[Result]] = {}
    for run, result in results.items():
        arms.setdefault(run.arm, []).append(result)
    return arms


def report() -> str:
    """The evidence in Markdown; of a part that is not whole, how much of it there is."""
    text = "# Does adaptive entropy help? The evidence\n\nRendered by `python -m training.evidence` from"
    text += " [training/results](../training/results); judged by [the protocol](../training/STUDY.md).\n"
    for part, (title, heading, table) in TABLES.items():
        results = {run: read_result(run) for run in PARTS[part] if run.result.exists()}
        text += f"\n## {title}\n\n{len(results)} of {len(PARTS[part])} runs.\n"
        if results:
            rows = [heading, ("---",) * len(heading), *table(results)]
            text += "\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)
            machines = sorted({result["machine"] for result in results.values()})
            commits = sorted({result["commit"][:7] for result in results.values()})
            text += f"\n{', '.join(machines)}; commit {', '.join(commits)}.\n"
    return text


def main() -> None:
    path = RESULTS.parent.parent / "docs" / "evidence.md"
    write_text(path, report())
    print(path)


if __name__ == "__main__":
    command(lambda: None, lambda _: main(), "nothing was written", lambda _: RESULTS)
