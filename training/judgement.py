"""How STUDY.md judges: the statistics of its runs, from their results alone."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from training.config import Config
from training.entropy import build_controller
from training.evaluation import pass_at_k

Result = dict[str, Any]
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


def bootstrap(table: Sequence[np.ndarray]) -> tuple[float, float]:
    """95% percentile interval of the mean over classes of [seeds, problems].

    Seeds, the same for all classes, and each class's problems are drawn independently of each other.
    """
    rng, means = np.random.default_rng(0), np.empty(DRAWS)
    for draw in range(DRAWS):
        seeds = rng.integers(len(table[0]), size=len(table[0]))
        means[draw] = np.mean(
            [rows[seeds][:, rng.integers(rows.shape[1], size=rows.shape[1])].mean() for rows in table]
        )
    low, high = np.quantile(means, (0.025, 0.975)).tolist()
    return low, high


def estimate(runs: Sequence[Result], labels: Sequence[str], k: int = 32) -> tuple[float, float, float]:
    """pass@k of an arm, mean over its seeds and these classes, and its interval."""
    table = [np.array([passes(run, label, k) for run in runs]) for label in labels]
    return (float(np.mean([rows.mean() for rows in table])), *bootstrap(table))


def compare(a: Sequence[Result], b: Sequence[Result], labels: Sequence[str], k: int = 32) -> Comparison:
    """``a`` minus ``b``, paired by seed: mean, its interval (`bootstrap`, jointly for both arms), and p of
    the exact sign-flip test."""
    from scipy.stats import permutation_test

    table = [np.array([passes(x, label, k) - passes(y, label, k) for x, y in zip(a, b)]) for label in labels]
    differences = np.mean([rows.mean(1) for rows in table], axis=0)
    p = 1.0
    if np.any(differences):
        flips = permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf)
        p = float(flips.pvalue)
    return Comparison(float(differences.mean()), *bootstrap(table), p)


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
    """Spearman's correlation of x with y so many steps later; NaN, here or there, is left out."""
    from scipy.stats import spearmanr

    measure: Callable[..., Any] = spearmanr
    found = []
    for lag in lags:
        now, later = x[: len(x) - lag], y[lag:]
        known = ~(np.isnan(now) | np.isnan(later))
        found.append(float(measure(now[known], later[known]).statistic))
    return found


def bounds_of(result: Result) -> tuple[float, float]:
    """Between which α moved."""
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in result["settings"].items()
    }
    return build_controller(Config(**fields)).alpha_range
