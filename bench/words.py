"""How the report says what rows say."""

from typing import Any

from bench.measure import Row

Group = list[Row]  # rows that did the same work: an operation at a shape


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


def table(head: list[str], lines: list[list[str]]) -> str:
    """Markdown; all but the first column aligned to the right."""
    rule = "|---|" + "--:|" * (len(head) - 1)
    first, *rest = ("| " + " | ".join(cells) + " |" for cells in [head, *lines])
    return "\n".join([first, rule, *rest])


def trouble_of(group: Group, named: bool = False) -> list[str]:
    """Who was wrong or failed, as one list, if there is anybody; ``named``: at what."""
    troubled = [row for row in group if row.status in ("wrong", "failed")]
    what = f"{title(group[0])}, " if named else ""
    notes = [f"- {what}{label(row)}: {row.status}, {quoted(row.reason)}" for row in troubled]
    return ["\n".join(notes)] if notes else []
