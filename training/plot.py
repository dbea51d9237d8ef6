"""Pictures of runs: entropy with its target, α, the coefficient by difficulty, accuracy, pass@k.

python -m training.plot runs/grid-demo/none-0 runs/grid-demo/aer-0 --output runs/compare.png
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from training.checkpoint import read_rows
from training.files import write_file

Rows = list[dict[str, Any]]
STYLES: Any = ("-", "--", ":", "-.")  # of the difficulty classes


def draw_runs(runs: dict[str, Rows], path: Path) -> None:
    """Entropy, α, accuracy and the coefficient by difficulty over the steps; a mode's seeds in one colour."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    modes = list(dict.fromkeys(map(mode_of, runs)))
    keys = {key for rows in runs.values() for row in rows for key in row}
    classes = sorted(key for key in keys if key.startswith("coefficient/"))
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True).flatten()
    entropy, accuracy, alpha, coefficient = axes
    named = set()
    for name, rows in runs.items():
        mode = mode_of(name)
        color = colormaps["tab10"](modes.index(mode) % 10)
        label = None if mode in named else mode
        named.add(mode)
        steps = [row["step"] for row in rows]
        entropy.plot(steps, [row["entropy"] for row in rows], color=color, label=label, linewidth=1.2)
        entropy.plot(steps, [row["target"] for row in rows], color=color, linestyle=":", linewidth=0.8)
        accuracy.plot(steps, [row["accuracy"] for row in rows], color=color, linewidth=1.2)
        alpha.plot(steps, [row["alpha"] for row in rows], color=color, linewidth=1.2)
        for key, style in zip(classes, STYLES):
            known = [(row["step"], row[key]) for row in rows if key in row]
            coefficient.plot(*zip(*known), color=color, linestyle=style, linewidth=1)
    entropy.set(ylabel="entropy (nats per token)", ylim=(0, None), title="Policy entropy; dotted: target")
    accuracy.set(ylabel="accuracy", ylim=(0, 1), title="Accuracy on training prompts")
    alpha.set(ylabel="α", ylim=(0, None), xlabel="PPO step", title="Global coefficient α")
    coefficient.set(ylabel="mean coefficient", ylim=(0, None), xlabel="PPO step")
    coefficient.set(title="Coefficient by difficulty")
    entropy.legend(frameon=False, fontsize=8)
    lines = [Line2D([], [], color="gray", linestyle=style) for _, style in zip(classes, STYLES)]
    coefficient.legend(lines, [label.split("/", 1)[1] for label in classes], frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def mode_of(run: str) -> str:
    """ "aer" of "aer-0"."""
    head, _, tail = run.rpartition("-")
    return head if head and tail.isdigit() else run


def draw_evaluations(evaluations: dict[str, dict[str, Any]], path: Path) -> None:
    """pass@k against k, one panel a class, one line a run; a band where an interval is known."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    colors = [colormaps["tab10"](k % 10) for k in range(len(evaluations))]
    classes = list(dict.fromkeys(c for result in evaluations.values() for c in result["classes"]))
    figure = Figure(figsize=(3.6 * len(classes), 3.6), layout="constrained")
    for axis, label in zip(figure.subplots(1, len(classes), squeeze=False)[0], classes):
        for (name, result), color in zip(evaluations.items(), colors):
            row = result["classes"].get(label, {})
            ks = [int(key.split("@")[1]) for key in row if key.startswith("pass@")]
            axis.plot(ks, [row[f"pass@{k}"] for k in ks], color=color, marker=".", label=name)
            if "intervals" in row:
                low, high = zip(*(row["intervals"][f"pass@{k}"] for k in ks))
                axis.fill_between(ks, low, high, color=color, alpha=0.15, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ks, [str(k) for k in ks])
        axis.set(xlabel="k", ylabel="pass@k", ylim=(-0.02, 1.02), title=label)
    figure.axes[0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=130)


@dataclass(frozen=True)
class Plot:
    """Which runs to draw."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    output: Path = Path("runs/plot.png")
    """The picture."""


def main(settings: Plot) -> None:
    runs = {}
    for run in settings.runs:
        name = run.name if [other.name for other in settings.runs].count(run.name) == 1 else str(run)
        runs[name] = read_rows(run / "metrics.jsonl")
        if not runs[name]:
            raise ValueError(f"run {run} has no metrics yet")
    write_file(settings.output, lambda path: draw_runs(runs, path))
    print(settings.output)


if __name__ == "__main__":
    from training.cli import guard

    asked = tyro.cli(Plot, description=__doc__)
    guard(lambda: main(asked), "nothing was written")
