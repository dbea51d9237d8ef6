"""Pictures of the study: how entropy is held, what arms keep, what the coefficient does to sampling."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from training.judgement import WINDOW

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Any]
Curves = Mapping[str, Sequence[np.ndarray]]  # of an arm or class: one curve a seed


def draw_control(domains: Mapping[str, Mapping[str, Sequence[Result]]], path: Path) -> None:
    """A column a domain: entropy over its target, and α; a line an arm, a band from its least to its most."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(domains), 5.5), layout="constrained")
    axes = figure.subplots(2, len(domains), squeeze=False, sharex="col")
    for (above, below), (domain, arms) in zip(axes.T, domains.items()):
        ratios = {
            arm: [np.array(r["steps"]["entropy"]) / r["steps"]["target"][-1] for r in runs]
            for arm, runs in arms.items()
        }
        _curves(above, ratios)
        above.axhspan(0.85, 1.15, color="gray", alpha=0.2, linewidth=0)
        above.set(title=domain, ylim=(0, 3))
        _curves(below, {arm: [np.array(r["steps"]["alpha"]) for r in runs] for arm, runs in arms.items()})
        below.set(xlabel="step")
    axes[0][0].set(ylabel="entropy / target; gray: ±15%")
    axes[1][0].set(ylabel="α")
    axes[0][0].legend(frameon=False, fontsize=8)
    _save(figure, path)


def draw_arms(scores: Mapping[str, Sequence[float]], heading: str, path: Path) -> None:
    """A row an arm: a dot a seed, a bar at their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.4 * len(scores) + 1), layout="constrained")
    axis = figure.subplots()
    for place, values in enumerate(scores.values()):
        axis.plot(values, [place] * len(values), "o", color="C0", alpha=0.4, markersize=5, linewidth=0)
        axis.plot([np.mean(values)], [place], "|", color="black", markersize=16, markeredgewidth=2)
    axis.set_yticks(range(len(scores)), list(scores))
    axis.invert_yaxis()
    axis.set(xlabel=heading, xlim=(-0.02, None))
    axis.grid(axis="x", alpha=0.3)
    _save(figure, path)


def draw_exploration(panels: Mapping[str, Curves], path: Path) -> None:
    """A panel a measure, a line a class."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(panels), 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (measure, curves) in zip(axes, panels.items()):
        _curves(axis, curves)
        axis.set(title=measure, xlabel="step")
    axes[0].legend(frameon=False, fontsize=8)
    _save(figure, path)


def _curves(axis: Any, curves: Curves) -> None:
    """Means over seeds of means over ten steps, with a band from the least to the most."""
    for name, runs in curves.items():
        thin = np.array([_thinned(run) for run in runs])
        steps = WINDOW * (np.arange(thin.shape[1]) + 0.5)
        (line,) = axis.plot(steps, thin.mean(0), label=name, linewidth=1.3)
        axis.fill_between(steps, thin.min(0), thin.max(0), color=line.get_color(), alpha=0.15, linewidth=0)


def _thinned(run: np.ndarray) -> np.ndarray:
    """Means of ten steps, of those that are known."""
    means: np.ndarray = np.nanmean(run[: len(run) // WINDOW * WINDOW].reshape(-1, WINDOW), axis=1)
    return means


def _save(figure: "Figure", path: Path) -> None:
    drawn = BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    path.write_bytes(drawn.getvalue())
