"""Tables, in Markdown: of providers at an operation, of steps in use, of splits of time and of choices."""

from typing import Any

from aer_fast import plan
from bench.cases import (
    AS_IT_IS,
    BARE,
    CHOICES,
    DISTILL,
    ROUNDED,
    STEP,
    TOKENS_THAT_FIT,
    WHOLE,
    WITHIN,
)
from bench.measure import Row
from bench.report.results import Group, Results

OWN_TABLES = (*CHOICES, WITHIN, TOKENS_THAT_FIT)  # how operations begin that are in no table of providers
MODELS = {"Llama-3": (128_256, 4096), "Qwen3": (151_936, 4096), "Gemma-3": (262_144, 3840)}


# ---- cells


def label(row: Row) -> str:
    return " ".join(filter(None, [row.provider, row.version]))


def title(row: Row) -> str:
    sizes = ", ".join(f"{name} = {size:,}" for name, size in row.shape.items())
    return ", ".join([row.op, sizes, row.dtype] + ([] if row.rows == "all" else [f"{row.rows} rows"]))


def provenance(where: dict[str, Any]) -> str:
    """The machine, in words."""
    parts = [str(where["device"])]
    if where["cuda"]:
        parts += [f"driver {where['driver']}", f"CUDA {where['cuda']}"]
    else:
        parts += [f"{where['threads']} threads"]
    parts += [f"torch {where['torch']}", f"triton {where['triton']}", f"Python {where['python']}"]
    return ", ".join([*parts, where["commit"], where["date"]])


def number(value: float | None, digits: int = 3) -> str:
    """In few digits, without an exponent."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 99.5 else f"{value:.{digits}g}"


def quoted(reason: str) -> str:
    return "`" + reason.replace("`", "'") + "`"


def error(row: Row, gradient: bool) -> str:
    found = [value for name, value in row.errors.items() if name.startswith("grad_") == gradient]
    return f"{max(found, key=lambda x: (x != x, x)):.0e}" if found else "–"


def timed(row: Row) -> str:
    return f"{number(row.ms)} ± {number(row.ms_iqr, 2)}"


def share(row: Row) -> str:
    return "–" if row.of_limit is None else f"{100 * row.of_limit:.0f}%"


def of_base(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}" if value and base else "–"


def gib(mib: float | None) -> str:
    return number(None if mib is None else mib / 1024)


def table(head: list[str], lines: list[list[str]]) -> str:
    """Markdown; all but the first column aligned to the right."""
    rule = "|---|" + "--:|" * (len(head) - 1)
    first, *rest = ("| " + " | ".join(cells) + " |" for cells in [head, *lines])
    return "\n".join([first, rule, *rest])


# ---- providers at an operation


def group_table(group: Group) -> str:
    """Everything about one operation at one shape."""
    linear = "D" in group[0].shape
    rate = "TFLOP/s" if linear else "GB/s"
    head = ["", "ms", "± IQR", "rounds", "peak MiB", rate, "of the limit", "error", "of the gradient"]
    lines = []
    for row in sorted(group, key=lambda row: (row.status != "ok", row.ms or 0.0)):
        if row.status == "missing":
            continue
        name = label(row) + ("" if row.work == "all" else f" ({row.work})")
        errors = [error(row, False), error(row, True)]
        if row.status != "ok":
            lines.append([name, row.status, *["–"] * 5, *errors])
            continue
        speed = row.tflop_per_s if linear else row.gb_per_s
        costs = [number(row.ms), number(row.ms_iqr), str(row.rounds), number(row.peak_mib), number(speed)]
        share = "–" if row.of_limit is None else f"{100 * row.of_limit:.0f}%"
        lines.append([name, *costs, share, *errors])
    return table(head, lines)


def command(results: Results) -> str:
    return "`bash bench/gpu.sh`" if results.gpu else "`make bench`"


def silent(results: Results) -> str:
    """The time of the gradient is what the forward alone does not take."""
    rows = [row for g in results.groups for row in g if row.rows.endswith("silent") and row.ms is not None]
    forwards = [row for group in results.of("linear_token_stats forward") for row in group]
    alone = [x.ms for x in forwards if rows and (x.provider, x.shape) == (rows[0].provider, rows[0].shape)]
    if not rows or rows[0].rows != "0% silent" or not alone or alone[0] is None:
        return "Not measured."
    forward, whole = alone[0], rows[0].ms
    assert whole is not None
    lines = []
    for row in rows:
        assert row.ms is not None
        share = f"{(row.ms - forward) / (whole - forward):.2f}"
        lines.append([row.rows.removesuffix(" silent"), f"{number(row.ms)} ± {number(row.ms_iqr, 2)}", share])
    lines.append(["forward alone", number(forward), "0"])
    head = ["rows without a gradient", "ms", "for the gradient"]
    return f"{title(rows[0]).split(', 0%')[0]}; {provenance(rows[0].where)}:\n\n{table(head, lines)}"


def trouble_of(group: Group, named: bool = False) -> list[str]:
    """The providers that were wrong or failed, as one list, if there are any; ``named``: at what."""
    troubled = [row for row in group if row.status in ("wrong", "failed")]
    what = f"{title(group[0])}, " if named else ""
    notes = [f"- {what}{label(row)}: {row.status}, {quoted(row.reason)}" for row in troubled]
    return ["\n".join(notes)] if notes else []


def tables(groups: list[Group]) -> list[str]:
    """Those of the operations, one after another, and what went wrong."""
    parts, op = list[str](), ""
    for group in groups:
        if group[0].op.startswith(OWN_TABLES):  # these have tables of their own
            parts += trouble_of(group, named=True)
            continue
        if all(row.status == "missing" for row in group):
            continue
        if group[0].op != op:
            op = group[0].op
            parts.append(f"### {op}")
        parts.append(f"{title(group[0])}\n\n{group_table(group)}")
        parts += trouble_of(group)
    return parts


def section(results: Results, groups: list[Group]) -> str:
    return "\n\n".join([f"`{results.path.name}`: {provenance(results.where)}.", *tables(groups)])


def teacher(results: Results) -> str:
    """Beside a teacher: every table."""
    return section(results, [group for group in results.groups if group[0].op.startswith(DISTILL)])


def narrow(results: Results) -> list[Group]:
    """The rows in bfloat16 of a CPU, which not every CPU can measure."""
    groups = [group for group in results.groups if not group[0].op.startswith(DISTILL)]
    return [] if results.gpu else [group for group in groups if group[0].dtype == "bfloat16"]


def bfloat16(results: Results) -> str:
    return section(results, narrow(results))


# ---- optimiser steps


def steps(results: Results) -> str:
    """Of one optimiser step: the README's table of memory."""
    head = ["tokens × words", "with", "peak MiB", "of eager's memory", "ms"]
    lines = []
    for group in results.of(STEP):
        base = next((row.peak_mib for row in group if row.provider == "eager"), None)
        for row in group:
            if row.status == "missing":
                continue
            ratio = f"{row.peak_mib / base:.2f}" if row.peak_mib and base else "–"
            costs = [number(row.peak_mib) if row.peak_mib else row.status, ratio, number(row.ms)]
            tokens = row.shape.get("T", row.shape["N"])
            lines.append([f"{tokens:,} × {row.shape['V']:,}", label(row), *costs])
    if not lines:
        return "Not measured."
    return f"{table(head, lines)}\n\n{command(results)} on {provenance(results.where)}."


def in_use(groups: list[Group]) -> str:
    """Of whole steps: time and memory by packed tokens, and how many fit; nothing where none was measured."""
    by_tokens = [group for group in groups if group[0].op == STEP and "T" in group[0].shape]
    fitting = [g for g in groups if g[0].op == TOKENS_THAT_FIT and any(row.found for row in g)]
    parts = [steps_by_tokens(by_tokens)] if by_tokens else []
    return "\n\n".join(parts + [tokens_that_fit(group) for group in fitting])


def steps_by_tokens(groups: list[Group]) -> str:
    """One optimiser step after another, of more and more tokens."""
    lines = []
    for group in groups:
        ms, mib = next(((row.ms, row.peak_mib) for row in group if row.provider == "eager"), (None, None))
        for row in group:
            if row.status == "missing":
                continue
            costs = [row.status, *["–"] * 3]
            if row.ms is not None and row.peak_mib is not None:
                costs = [timed(row), gib(row.peak_mib), of_base(row.ms, ms), of_base(row.peak_mib, mib)]
            lines.append([f"{row.shape['T']:,}", label(row), *costs])
    head = ["packed tokens", "with", "ms", "peak GiB", "of eager's time", "of eager's memory"]
    first = groups[0][0]
    what = f"One optimiser step of a model of {first.rows} shape, V = {first.shape['V']:,}, {first.dtype}"
    return f"{what}; weights and optimiser states are not in the peak:\n\n{table(head, lines)}"


def tokens_that_fit(group: Group) -> str:
    """The largest step that fits, and the smallest that does not."""
    measured = [row for row in group if row.found]
    base = next((row.found["tokens"] for row in measured if row.provider == "eager"), None)
    lines = []
    for row in measured:
        tokens, too_many = row.found["tokens"], row.found.get("too_many")
        ends = [f"{tokens:,.0f}", "not reached" if too_many is None else f"{too_many:,.0f}"]
        lines.append([label(row), *ends, of_base(tokens, base), number(row.ms), gib(row.peak_mib)])
    head = ["with", "tokens that fit", "that do not", "of eager's", "ms of that step", "its peak GiB"]
    first = measured[0]
    what = f"The largest step of a model of {first.rows} shape, V = {first.shape['V']:,}, {first.dtype}"
    return f"{what}, within {number(first.found['cap_gib'])} GiB of memory:\n\n{table(head, lines)}"


# ---- where the time goes


def within(groups: list[Group]) -> str:
    """Where the time goes, and what a call takes beside its own products."""
    return "\n\n".join(split(group) for group in groups if group[0].op.startswith(WITHIN))


def split(group: Group) -> str:
    parts = [title(group[0]).removeprefix(WITHIN)]
    lines = []
    for row in group:
        if row.provider in (WHOLE, BARE, ROUNDED):
            ratio = of_base(row.found.get("ours_over_it"), 1.0)
            lines.append([row.provider, timed(row), number(row.tflop_per_s), share(row), ratio])
    if lines:
        head = ["", "ms", "TFLOP/s", "of the limit", "times that the whole takes of it"]
        parts.append(table(head, lines))
    kinds = [row for row in group if row.provider not in (WHOLE, BARE, ROUNDED)]
    total = sum(row.ms or 0.0 for row in kinds)
    shares = [[row.provider, number(row.ms), f"{100 * (row.ms or 0.0) / total:.0f}%"] for row in kinds]
    if shares:
        parts.append(table(["by the profiler", "ms", "share"], shares))
    return "\n\n".join(parts)


# ---- choices


def choices(groups: list[Group]) -> str:
    """Of tiles, products and loops: what there is, and what was fastest."""
    lines = []
    for group in groups:
        ranked = sorted((row for row in group if row.ms is not None), key=lambda row: row.ms or 0.0)
        if not group[0].op.startswith(CHOICES) or not ranked:
            continue
        best, second = ranked[0], ranked[1] if len(ranked) > 1 else None
        now = next((row for row in ranked if row.provider == AS_IT_IS), None)
        gain = of_base(now.ms, best.ms) if now else "–"
        cells = [timed(now) if now else "–", best.provider, timed(best), gain, share(best)]
        lines.append([title(group[0]), *cells, f"{second.provider}: {number(second.ms)}" if second else "–"])
    head = ["", f"{AS_IT_IS}, ms", "fastest", "ms", "times faster", "of the limit", "second, ms"]
    return table(head, lines) if lines else ""


# ---- plans


def plans() -> str:
    """What the planner chooses for a GPU; predictions, not measurements."""
    head = ["V × D", "tokens", "loop", "products", "memory, GiB", "predicted"]
    lines = []
    for model, (V, D) in MODELS.items():
        for rows in (4096, 16_384, 65_536):
            made = plan(rows, V, D)
            chunks = "1 chunk" if made.chunks == 1 else f"{made.chunks} chunks of {made.chunk:,}"
            cells = [f"{made.products}", f"{made.memory / 2**30:.1f}", made.duration]
            lines.append([f"{model}: {V:,} × {D:,}", f"{rows:,}", chunks, *cells])
        less = plan(8192, V, D, memory_budget=5 << 29)
        cells = [f"{less.products}", f"{less.memory / 2**30:.1f}", less.duration]
        loop = f"{less.slice:,} words at a time"
        lines.append([f"{model}, memory_budget 2.5 GiB", "8,192", loop, *cells])
    return table(head, lines)


def split_plans() -> str:
    """What the planner chooses where ranks hold slices of the vocabulary; predictions, not measurements."""
    lines = []
    for model, (V, D) in MODELS.items():
        for ranks in (1, 2, 4, 8):
            made = plan(8192, V, D, ranks=ranks)
            chunks = "1 chunk" if made.chunks == 1 else f"{made.chunks} chunks of {made.chunk:,}"
            cells = [f"{made.memory / 2**30:.2f}", f"{made.traffic / 2**20:,.0f}", made.duration]
            lines.append([f"{model}: {V:,} × {D:,}", f"{ranks}", chunks, *cells])
    return table(["V × D", "ranks", "loop", "memory, GiB", "received, MiB", "predicted"], lines)
