"""Pictures of results: cost against N and V, the roofline, and speed-up bars."""

from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from bench.measure import Row
from bench.report.results import Group

Series = dict[str, list[Row]]  # by provider

OPS = ("linear_ppo_loss", "ppo_loss")
COSTS = "costs"  # of the first of them, at the headline: the README's picture


def pictures(groups: list[Group], stem: str) -> dict[str, tuple[str, Callable[[Any], None]]]:
    """File name -> (what it shows, how to draw it into a figure), of those that have something to show."""
    found: dict[str, tuple[str, Callable[[Any], None]]] = {}
    for op in OPS:
        panels = {axis: curve(groups, op, axis) for axis in ("N", "V")}
        panels = {axis: series for axis, series in panels.items() if series}
        if panels:
            words = f"Time and memory of {op} against the number of tokens and of words"
            found[f"{stem}-{op}.png"] = (words, partial(draw_curves, op, panels))
    heads = [[row for row in group if row.ms] for group in groups if group[0].headline]
    costs = [row for group in heads if group and group[0].op == OPS[0] for row in group if row.peak_mib]
    if costs:
        words = f"Time and memory of {OPS[0]} and of what else there is, forward and backward"
        found[f"{stem}-{COSTS}.png"] = (words, partial(draw_costs, costs))
    compared = [group for group in heads if any(row.provider == "eager" for row in group)]
    if compared:
        found[f"{stem}-speed.png"] = ("Time relative to eager PyTorch", partial(draw_bars, compared))
    if any(row.tflop_per_s and row.gb_per_s for group in heads for row in group):
        found[f"{stem}-roofline.png"] = ("Roofline", partial(draw_roofline, heads))
    return found


def names(groups: list[Group], stem: str) -> dict[str, str]:
    """File name -> what it shows."""
    return {name: words for name, (words, _) in pictures(groups, stem).items()}


def draw(groups: list[Group], folder: Path, stem: str, provenance: str) -> None:
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, into) in pictures(groups, stem).items():
        figure = Figure(figsize=(10, 6.5), layout="constrained")
        into(figure)
        figure.supxlabel(provenance, fontsize=7, color="gray")
        figure.savefig(folder / name, dpi=110)


def curve(groups: list[Group], op: str, axis: str) -> Series:
    """The longest set of measured cases of an operation that differ in one size alone."""
    families: dict[tuple[Any, ...], dict[int, Group]] = {}
    for group in groups:
        first = group[0]
        if first.op == op and first.rows == "all":
            others = tuple((name, size) for name, size in first.shape.items() if name != axis)
            families.setdefault((first.dtype, others), {})[first.shape[axis]] = group
    family = max(families.values(), key=len, default={})
    series: Series = {}
    for size in sorted(family):
        for row in family[size]:
            if row.ms:
                series.setdefault(row.provider, []).append(row)
    return {name: rows for name, rows in series.items() if len(rows) > 1}


COLORS = {
    "aer_fast": "black",
    "aer_fast, in place": "dimgray",
    "eager": "tab:pink",
    "torch.compile": "tab:brown",
    "TRL": "tab:green",
    "Liger": "tab:cyan",
    "Liger torch": "lightseagreen",
    "Liger GRPO": "tab:red",
    "verl Triton": "tab:purple",
    "verl torch": "mediumpurple",
    "unsloth-zoo": "tab:blue",
    "one product alone": "tab:orange",
    "three products alone": "tab:orange",
    "four products alone": "tab:orange",
}


def color_of(provider: str) -> str:
    """The same in every picture."""
    return COLORS.get(provider, "tab:olive")


def draw_curves(op: str, panels: dict[str, Series], figure: Any) -> None:
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    rows = figure.subplots(2, len(panels), squeeze=False)
    for column, (axis, series) in enumerate(panels.items()):
        first = next(iter(series.values()))[0]
        fixed = ", ".join(f"{name} = {size:,}" for name, size in first.shape.items() if name != axis)
        for provider, points in series.items():
            sizes = [row.shape[axis] for row in points]
            style = {"color": color_of(provider), "marker": ".", "linewidth": 1.4, "label": provider}
            rows[0][column].plot(sizes, [row.ms for row in points], **style)
            rows[1][column].plot(sizes, [max(row.peak_mib or 0, 1) for row in points], **style)
        ticks = sorted({row.shape[axis] for points in series.values() for row in points})
        for panel, what in ((rows[0][column], "ms"), (rows[1][column], "peak MiB above inputs")):
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=7, rotation=30)
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
            panel.minorticks_off()
            panel.set(xlabel=axis, ylabel=what)
            panel.grid(alpha=0.25)
        rows[0][column].set_title(f"{op} against {axis}; {fixed}, {first.dtype}", fontsize=9)
    figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)


def draw_costs(group: Group, figure: Any) -> None:
    """Time beside memory of those that do the whole work, and of the products alone: shorter is better."""
    shown = [row for row in group if row.work in ("all", "products alone")]
    shown.sort(key=lambda row: -(row.ms or 0.0))
    figure.set_size_inches(10, 1.4 + 0.28 * len(shown))
    panels = figure.subplots(1, 2, sharey=True)
    names = [" ".join(filter(None, [row.provider, row.version])) for row in shown]
    colors = [color_of(row.provider) if row.work == "all" else "lightgray" for row in shown]
    for panel, what, costs in (
        (panels[0], "time, ms", [row.ms or 0.0 for row in shown]),
        (panels[1], "peak memory above the inputs, MiB", [row.peak_mib or 0.0 for row in shown]),
    ):
        panel.barh(names, costs, color=colors)
        for k, cost in enumerate(costs):
            panel.text(cost, k, f" {cost:,.3g}" if cost < 99.5 else f" {cost:,.0f}", va="center", fontsize=8)
        panel.margins(x=0.15)
        panel.tick_params(labelsize=8)
        panel.set_title(what, fontsize=9)
    sizes = ", ".join(f"{name} = {size:,}" for name, size in group[0].shape.items())
    figure.suptitle(f"{group[0].op}, forward and backward; {sizes}, {group[0].dtype}", fontsize=10)


def draw_bars(heads: list[Group], figure: Any) -> None:
    """How many times faster than eager: longer is better."""
    panels = figure.subplots(1, len(heads), squeeze=False)[0] if len(heads) <= 3 else None
    if panels is None:
        panels = figure.subplots(2, (len(heads) + 1) // 2, squeeze=False).flatten()
        for spare in panels[len(heads) :]:
            spare.set_visible(False)
    for panel, group in zip(panels, heads):
        base = next(row.ms or 0.0 for row in group if row.provider == "eager")
        shown = sorted(group, key=lambda row: -(row.ms or 0.0))
        speeds = [base / (row.ms or 1.0) for row in shown]
        colors = [color_of(row.provider) if row.work == "all" else "lightgray" for row in shown]
        panel.barh([row.provider for row in shown], speeds, color=colors)
        for k, speed in enumerate(speeds):
            panel.text(speed, k, f" {speed:.2f}", va="center", fontsize=7)
        panel.axvline(1, color="gray", linewidth=0.8)
        panel.margins(x=0.15)
        panel.tick_params(labelsize=7)
        sizes = ", ".join(f"{name} = {size:,}" for name, size in group[0].shape.items())
        panel.set_title(f"{group[0].op}\n{sizes}, {group[0].dtype}", fontsize=7)
    figure.suptitle("Times faster than eager PyTorch; gray: does less", fontsize=10)


def draw_roofline(heads: list[Group], figure: Any) -> None:
    """The least arithmetic over the least traffic of an operation, and the rate at which it was done."""
    panel = figure.subplots()
    points = [row for group in heads for row in group if row.tflop_per_s and row.gb_per_s]
    by_dtype = {row.dtype: row.limits for row in points}
    intensities = [1e3 * (row.tflop_per_s or 0.0) / (row.gb_per_s or 1.0) for row in points]
    low, high = min(intensities) / 3, max(intensities) * 3
    for dtype, limits in by_dtype.items():
        knee = 1e3 * limits["tflop_per_s"] / limits["gb_per_s"]
        line = [low, min(max(knee, low), high), high]
        roof = [min(x * limits["gb_per_s"] / 1e3, limits["tflop_per_s"]) for x in line]
        panel.plot(line, roof, color="gray", linewidth=1, label=f"limit, {dtype}")
    markers = dict(zip(dict.fromkeys(row.op for row in points), cycle("osD^vPX")))
    named = set()
    for row, intensity in zip(points, intensities):
        name = row.provider if row.provider not in named else None
        named.add(row.provider)
        style = {"color": color_of(row.provider), "marker": markers[row.op], "linestyle": "", "markersize": 6}
        aside = intensity * 1.06 ** list(COLORS).index(row.provider) if row.provider in COLORS else intensity
        panel.plot([aside], [row.tflop_per_s], label=name, **style)
    for op, marker in markers.items():
        panel.plot([], [], color="white", markeredgecolor="black", marker=marker, linestyle="", label=op)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set(xlabel="operations per byte, at the least; spread to the right to be seen", ylabel="TFLOP/s")
    panel.grid(alpha=0.25)
    panel.legend(frameon=False, fontsize=7, ncols=2)
