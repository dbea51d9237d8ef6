"""A file of bench/results/, by groups of rows, and what became of its sessions."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bench import measure
from bench.measure import Row

Group = list[Row]  # rows that did the same work: an operation at a shape


@dataclass(frozen=True)
class Results:
    """A file of bench/results/."""

    path: Path
    rows: list[Row]
    others: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> "Results":
        if not path.exists():
            raise SystemExit(f"no such file: {path}")
        rows, others = measure.read(path)
        if not rows:
            raise SystemExit(f"no rows in {path}")
        return cls(path, rows, others)

    @property
    def where(self) -> dict[str, Any]:
        starts = [other["where"] for other in self.others if "where" in other]
        found: dict[str, Any] = starts[-1] if starts else self.rows[-1].where
        return found

    @property
    def gpu(self) -> bool:
        return bool(self.where["cuda"])

    @cached_property
    def groups(self) -> list[Group]:
        groups: dict[tuple[Any, ...], Group] = {}
        for row in self.rows:
            groups.setdefault((row.op, *row.shape.items(), row.dtype, row.rows), []).append(row)
        order = list(dict.fromkeys(row.op for row in self.rows))
        return sorted(groups.values(), key=lambda group: order.index(group[0].op))

    def of(self, op: str, *, headline: bool | None = None) -> list[Group]:
        return [g for g in self.groups if g[0].op == op and headline in (None, g[0].headline)]

    def trouble(self) -> list[str]:
        """Sessions that did not end, and lines that were cut short."""
        starts = {other["id"]: other for other in self.others if other["kind"] == "start"}
        ends = {other["id"]: other for other in self.others if other["kind"] == "end"}
        found = []
        for name, start in starts.items():
            if name not in ends:
                found.append(f"A session of {start['planned']} rows was cut short.")
            elif ends[name]["how"] != "complete":
                found.append(
                    f"A session of {start['planned']} rows was interrupted after {ends[name]['rows']}."
                )
        damaged = sum(other["kind"] == "damaged" for other in self.others)
        if damaged:
            found.append("1 damaged line was left out." if damaged == 1 else f"{damaged} lines were damaged.")
        return found


def newest(gpu: bool, shows: Callable[[Results], bool] = lambda _: True) -> Results | None:
    """By the time of the last session, of those that have what is to be shown."""

    def last(results: Results) -> str:
        return max((other["time"] for other in results.others if other["kind"] == "start"), default="")

    every = [Results(path, *measure.read(path)) for path in sorted(measure.RESULTS.glob("*.jsonl"))]
    return max((x for x in every if x.rows and x.gpu == gpu and shows(x)), key=last, default=None)
