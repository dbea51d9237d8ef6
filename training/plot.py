"""Pictures of runs: entropy with its target, α, the coefficient by difficulty, accuracy, the divergence
from a teacher, pass@k.

python -m training.plot runs/grid-demo/none-0 runs/grid-demo/aer-0 --output runs/compare.png
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports below: end, with no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from training.evaluation import pass_at_k
from training.files import read_json, read_rows, write_file, write_text
from training.processes import command, naming

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]
Scores = dict[str, Any]
Histories = dict[str, Rows]
STYLES: Any = ("-", "--", ":", "-.")  # of the difficulty classes
DRAWN = ("step", "entropy", "target", "accuracy", "alpha")
COEFFICIENT = "coefficient/"  # followed by a class
DIVERGENCE = "divergence"  # of runs with a teacher
INITIAL = "initial"
LARGEST = 1e99  # number that can be drawn
TAIL = 25  # steps over which the last entropy is averaged


@contextmanager
def _plain_text() -> Iterator[None]:
    """Runs and classes have the names that they have: none is mathematics to matplotlib."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False, "text.usetex": False}):
        yield


def _legend(axis: Any, lines: Sequence[Any], names: Iterable[str], size: int) -> None:
    """Names are put in afterwards, for what begins with _ is none to matplotlib."""
    legend = axis.legend(lines, ["-"] * len(lines), frameon=False, fontsize=size)
    for text, name in zip(legend.get_texts(), names):
        text.set_text(name)


@_plain_text()
def draw_runs(runs: dict[str, Rows], path: Path) -> None:
    """Entropy, α, accuracy and the coefficient by difficulty over the steps, the divergence from a teacher
    where there is one; a mode's seeds in one colour."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    modes = list(dict.fromkeys(map(mode_of, runs)))
    keys = {key for rows in runs.values() for row in rows for key in row}
    classes = sorted(key for key in keys if key.startswith(COEFFICIENT))
    columns = 3 if DIVERGENCE in keys else 2
    figure = Figure(figsize=(5.5 * columns, 7), layout="constrained")
    axes = figure.subplots(2, columns, sharex=True)
    entropy, accuracy, alpha, coefficient = axes[:, :2].flatten()
    if DIVERGENCE in keys:
        _draw_divergence(axes[0, 2], runs, modes)
        axes[1, 2].set_axis_off()
    _draw_entropy(entropy, runs, modes)
    for name, rows in runs.items():
        color = _color(modes.index(mode_of(name)))
        steps = [row["step"] for row in rows]
        accuracy.plot(steps, [row["accuracy"] for row in rows], color=color, linewidth=1.2)
        alpha.plot(steps, [row["alpha"] for row in rows], color=color, linewidth=1.2)
        for key, style in zip(classes, STYLES):
            known = [(row["step"], row[key]) for row in rows if key in row]
            coefficient.plot(*zip(*known), color=color, linestyle=style, linewidth=1)
    accuracy.set(ylabel="accuracy", ylim=(0, 1), title="Accuracy on training prompts")
    alpha.set(ylabel="α", xlabel="PPO step", title="Global coefficient α")
    coefficient.set(ylabel="mean coefficient", xlabel="PPO step")
    coefficient.set(title="Coefficient by difficulty")
    lines = [Line2D([], [], color="gray", linestyle=style) for _, style in zip(classes, STYLES)]
    _legend(coefficient, lines, (key.removeprefix(COEFFICIENT) for key in classes), 8)
    _draw(figure, path)


def _color(place: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab10"](place % 10)


def _draw_entropy(axis: Any, runs: dict[str, Rows], modes: Sequence[str]) -> None:
    """Entropy and target over the steps, coloured by the place of the mode among ``modes``."""
    first: dict[str, Any] = {}  # line of a mode
    for name, rows in runs.items():
        mode, steps = mode_of(name), [row["step"] for row in rows]
        color = _color(modes.index(mode))
        line, *_ = axis.plot(steps, [row["entropy"] for row in rows], color=color, linewidth=1.2)
        first.setdefault(mode, line)
        axis.plot(steps, [row["target"] for row in rows], color=color, linestyle=":", linewidth=0.8)
    axis.set(ylabel="entropy (nats per token)", ylim=(0, None), title="Policy entropy; dotted: target")
    _legend(axis, list(first.values()), first, 8)


def _draw_divergence(axis: Any, runs: dict[str, Rows], modes: Sequence[str]) -> None:
    """Of the steps that were taught: of some runs there may be none."""
    for name, rows in runs.items():
        if known := [(row["step"], row[DIVERGENCE]) for row in rows if DIVERGENCE in row]:
            axis.plot(*zip(*known), color=_color(modes.index(mode_of(name))), linewidth=1.2)
    axis.set(ylabel="divergence (nats per token)", ylim=(0, None), title="Divergence from the teacher")
    axis.set(xlabel="PPO step")
    axis.xaxis.set_tick_params(labelbottom=True)


def _draw(figure: "Figure", path: Path) -> None:
    drawn = BytesIO()  # what the file can't take is no matter of drawing
    with naming(f"output {path.name} can't be drawn"):
        figure.savefig(drawn, dpi=130, format=path.suffix[1:] or "png")
    path.write_bytes(drawn.getvalue())


def mode_of(run: str) -> str:
    """ "aer" of "aer-0"."""
    head, _, tail = run.rpartition("-")
    return head if head and tail.isdigit() else run


@_plain_text()
def draw_evaluations(evaluations: dict[str, dict[str, Any]], path: Path) -> None:
    """pass@k against k, one panel a class, one line a run; a band where an interval is known."""
    from matplotlib.figure import Figure

    classes = _classes(evaluations)
    figure = Figure(figsize=(3.6 * len(classes), 3.6), layout="constrained")
    _draw_pass_at_k(figure.subplots(1, len(classes), squeeze=False)[0], evaluations)
    _draw(figure, path)


@_plain_text()
def draw_outcome(runs: dict[str, Rows], evaluations: dict[str, dict[str, Any]], path: Path) -> None:
    """What a grid is made for, in one picture: entropy over the steps, and pass@k at the end by class."""
    from matplotlib.figure import Figure

    classes = _classes(evaluations)
    figure = Figure(figsize=(5 + 3.3 * len(classes), 3.6), layout="constrained")
    ratios = [1.5, *[1] * len(classes)]
    entropy, *axes = figure.subplots(1, 1 + len(classes), width_ratios=ratios)
    _draw_entropy(entropy, runs, list(evaluations))
    entropy.set(xlabel="PPO step")
    _draw_pass_at_k(axes, evaluations)
    _draw(figure, path)


def _classes(evaluations: dict[str, dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(c for result in evaluations.values() for c in result["classes"]))


def _draw_pass_at_k(axes: Sequence[Any], evaluations: dict[str, dict[str, Any]]) -> None:
    for axis, label in zip(axes, _classes(evaluations)):
        for place, result in enumerate(evaluations.values()):
            color, row = _color(place), result["classes"].get(label, {})
            ks = [int(key.split("@")[1]) for key in row if key.startswith("pass@")]
            axis.plot(ks, [row[f"pass@{k}"] for k in ks], color=color, marker=".")
            if "intervals" in row:
                low, high = zip(*(row["intervals"][f"pass@{k}"] for k in ks))
                axis.fill_between(ks, low, high, color=color, alpha=0.15, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ks, [str(k) for k in ks])
        axis.set(xlabel="k", ylabel="pass@k", ylim=(-0.02, 1.02), title=label)
    _legend(axes[0], axes[0].lines, evaluations, 7)


def report(folder: Path, modes: Sequence[str], seeds: Sequence[int], k: int, console: Console) -> None:
    """Of a grid of runs: print the table; write table.md, scores.json, entropy.png and outcome.png.

    A mode's scores are pooled over its seeds; the intervals are bootstrapped over held-out prompts.
    """
    pooled = {}
    for name in (INITIAL, *modes):
        files = [folder / f"{name}-{seed}" / "scores.json" for seed in seeds]
        pooled[name] = pool([read_json(file) for file in files])
    runs = [f"{mode}-{seed}" for seed in seeds for mode in modes]
    histories = {run: read_metrics(folder / run) for run in runs}
    console.print(table(pooled, histories, seeds, k))
    write_text(folder / "table.md", markdown(pooled, histories, k))
    write_text(folder / "scores.json", json.dumps(pooled, indent=1) + "\n")
    write_file(folder / "entropy.png", lambda path: draw_runs(histories, path))
    write_file(folder / "outcome.png", lambda path: draw_outcome(histories, pooled, path))


def read_metrics(run: Path) -> Rows:
    """A run's metrics. Raises ValueError that names file and line, if what is drawn of them is no number."""
    rows = read_rows(run / "metrics.jsonl")
    for line, row in enumerate(rows, start=1):
        for name in (*DRAWN, *(key for key in row if key == DIVERGENCE or key.startswith(COEFFICIENT))):
            value: Any = row.get(name)
            if type(value) not in (int, float) or abs(value) > LARGEST:
                wrong = f"{name} is {json.dumps(value):.50}" if name in row else f"has no {name}"
                raise ValueError(f"{run}/metrics.jsonl can't be drawn: line {line}: {wrong}")
    return rows


def pool(results: list[Scores]) -> Scores:
    """One mode's scores over its seeds: pass@k by class, with 95% intervals."""
    classes = {}
    for label, row in results[0]["classes"].items():
        right = [count for result in results for count in result["classes"][label]["right"]]
        samples = row["samples"]
        pooled: Scores = {"prompts": len(right), "samples": samples, "intervals": {}}
        for key in (key for key in row if key.startswith("pass@")):
            values = [pass_at_k(samples, c, int(key.split("@")[1])) for c in right]
            pooled[key] = sum(values) / len(values)
            pooled["intervals"][key] = interval(values)
        classes[label] = pooled
    entropy = sum(result["overall"]["entropy"] for result in results) / len(results)
    return {"classes": classes, "entropy": entropy}


def interval(values: list[float]) -> tuple[float, float]:
    """95% bootstrap interval of the mean (percentile method); the value itself where all are equal."""
    from scipy.stats import bootstrap

    if min(values) == max(values):
        return values[0], values[0]
    found = bootstrap([values], lambda x, axis: x.mean(axis), method="percentile", rng=0).confidence_interval
    return float(found.low), float(found.high)


def table(pooled: dict[str, Scores], histories: Histories, seeds: Sequence[int], k: int) -> Table:
    classes = list(pooled[INITIAL]["classes"])
    drawn = Table(title=f"Held-out problems: pass@1 / pass@{k}")
    drawn.add_column("run")
    for heading in ("entropy", *classes):
        drawn.add_column(Text(heading), justify="right")
    for name, result in pooled.items():
        rows = [result["classes"][label] for label in classes]
        drawn.add_row(
            name, course(name, histories), *(f"{r['pass@1']:.3f} / {r[f'pass@{k}']:.3f}" for r in rows)
        )
    target = [rows[0]["target"] for rows in histories.values()]
    drawn.caption = (
        f"entropy in nats per sampled token, first step → mean of the last {TAIL}; target"
        f" {sum(target) / len(target):.3f}; seeds {', '.join(map(str, seeds))}"
    )
    return drawn


def markdown(pooled: dict[str, Scores], histories: Histories, k: int) -> str:
    """The same with the intervals of pass@k."""
    classes = list(pooled[INITIAL]["classes"])
    written = [re.sub(r"([\\`*<\[|])", r"\\\1", " ".join(label.split())) for label in classes]

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cells) + " |\n"

    def cell(row: Scores) -> str:
        low, high = row["intervals"][f"pass@{k}"]
        return f"{row['pass@1']:.3f} / {row[f'pass@{k}']:.3f} [{low:.3f}, {high:.3f}]"

    lines = [line(["run", "entropy, first → last", *(f"{c}: pass@1 / pass@{k} [95%]" for c in written)])]
    lines.append("|---|" + "--:|" * (len(classes) + 1) + "\n")
    for name, result in pooled.items():
        lines.append(line([name, course(name, histories), *(cell(result["classes"][c]) for c in classes)]))
    return "".join(lines)


def course(name: str, histories: Histories) -> str:
    """Entropy of the first step and its mean over the last ones, over a mode's seeds."""
    runs = [rows for run, rows in histories.items() if run.rsplit("-", 1)[0] == name]
    if not runs:
        return "–"
    first = sum(rows[0]["entropy"] for rows in runs) / len(runs)
    tails = [[row["entropy"] for row in rows[-TAIL:]] for rows in runs]
    last = sum(sum(tail) / len(tail) for tail in tails) / len(tails)
    return f"{first:.3f} → {last:.3f}"


@dataclass(frozen=True)
class Plot:
    """Which runs to draw."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    output: Path = Path("runs/plot.png")
    """The picture."""


def main(settings: Plot) -> None:
    if not settings.runs:
        raise ValueError("runs must name at least one folder of a run")
    runs, names = {}, [run.resolve().name for run in settings.runs]
    for run, own in zip(settings.runs, names):
        name = own if names.count(own) == 1 else str(run)
        runs[name] = read_metrics(run)
        if not runs[name]:
            raise ValueError(f"run {run} has no metrics yet")
    write_file(settings.output, lambda path: draw_runs(runs, path))
    print(settings.output)


if __name__ == "__main__":
    command(
        lambda: tyro.cli(Plot, description=__doc__),
        main,
        "nothing was written",
        lambda asked: next((run for run in asked.runs if run.is_dir()), asked.output.parent),
    )
