"""Tables of what is no comparison of providers at one operation: steps in use, splits of time, choices."""

from bench.measure import Row
from bench.operations import AS_IT_IS, BARE, CHOICES, ROUNDED, STEP, TOKENS_THAT_FIT, WHOLE, WITHIN
from bench.words import Group, label, number, table, title

OPS = (*CHOICES, WITHIN, TOKENS_THAT_FIT)  # how operations begin that have no other table


def of(groups: list[Group], op: str) -> list[Group]:
    return [group for group in groups if group[0].op == op]


def in_use(groups: list[Group]) -> str:
    """Of whole steps: time and memory by packed tokens, and how many fit; nothing where none was measured."""
    steps = [group for group in of(groups, STEP) if "T" in group[0].shape]
    fitting = [group for group in of(groups, TOKENS_THAT_FIT) if any(row.found for row in group)]
    parts = [by_tokens(steps)] if steps else []
    return "\n\n".join(parts + [capacity(group) for group in fitting])


def by_tokens(groups: list[Group]) -> str:
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


def capacity(group: Group) -> str:
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


def of_base(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}" if value and base else "–"


def gib(mib: float | None) -> str:
    return number(None if mib is None else mib / 1024)


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


def timed(row: Row) -> str:
    return f"{number(row.ms)} ± {number(row.ms_iqr, 2)}"


def share(row: Row) -> str:
    return "–" if row.of_limit is None else f"{100 * row.of_limit:.0f}%"
