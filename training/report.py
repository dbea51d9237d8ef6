"""The table and the pictures of a grid of runs.

A mode's scores are pooled over its seeds; the intervals are bootstrapped over held-out prompts.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from training.checkpoint import read_rows
from training.evaluate import pass_at_k
from training.files import write_file, write_text
from training.plot import draw_evaluations, draw_runs

Scores = dict[str, Any]
Histories = dict[str, list[dict[str, Any]]]
INITIAL = "initial"
TAIL = 25  # steps over which the last entropy is averaged


def report(folder: Path, modes: Sequence[str], seeds: Sequence[int], k: int, console: Console) -> None:
    """Print the table; write table.md, scores.json, entropy.png and pass_at_k.png."""
    pooled = {}
    for name in (INITIAL, *modes):
        files = [folder / f"{name}-{seed}" / "scores.json" for seed in seeds]
        pooled[name] = pool([json.loads(file.read_text()) for file in files])
    runs = [f"{mode}-{seed}" for seed in seeds for mode in modes]
    histories = {run: read_rows(folder / run / "metrics.jsonl") for run in runs}
    console.print(table(pooled, histories, seeds, k))
    write_text(folder / "table.md", markdown(pooled, histories, k))
    write_text(folder / "scores.json", json.dumps(pooled, indent=1) + "\n")
    write_file(folder / "entropy.png", lambda path: draw_runs(histories, path))
    write_file(folder / "pass_at_k.png", lambda path: draw_evaluations(pooled, path))


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
    for heading in ("run", "entropy", *map(escape, classes)):
        drawn.add_column(heading, justify="left" if heading == "run" else "right")
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

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cells) + " |\n"

    def cell(row: Scores) -> str:
        low, high = row["intervals"][f"pass@{k}"]
        return f"{row['pass@1']:.3f} / {row[f'pass@{k}']:.3f} [{low:.3f}, {high:.3f}]"

    lines = [line(["run", "entropy, first → last", *(f"{c}: pass@1 / pass@{k} [95%]" for c in classes)])]
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
