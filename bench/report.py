"""Tables and pictures of what was measured.

    python -m bench.report                     # the newest results of each kind of machine: runs/bench/
    python -m bench.report FILE.jsonl ...      # these
    python -m bench.report --publish           # and into README.md and docs/, each table from the newest
                                               # results that have its rows; it names their file

Nothing in the documents is typed: each table stands between two comments that say what it is and from which
file it was rendered (tests/test_bench.py renders them again and compares).
"""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from aer_fast import plan
from bench import findings, measure, pictures
from bench.measure import ROOT, Row
from bench.operations import DISTILL, STEP
from bench.shapes import LINEAR_OPS, LOGITS_OPS
from bench.words import Group, error, label, number, provenance, quoted, table, title, trouble_of

OUTPUT = ROOT / "runs" / "bench"
PICTURES = ROOT / "docs" / "benchmarks"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "linear.md", ROOT / "docs" / "benchmarks.md")
HEADLINES = ("linear_ppo_loss", "ppo_loss", f"{DISTILL}reverse_kl")
UNMEASURED = {"gpu": "**On a GPU: not measured yet.**", "cpu": "**On a CPU: not measured yet.**"}


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
        """Rows that did the same work: an operation at a shape."""
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


# ---- tables


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


def relative_table(group: Group) -> str:
    """The README's: beside eager."""
    by_name = {row.provider: row for row in group}
    base = by_name.get("eager")
    head = ["", "ms", "MiB", "of eager's time", "of eager's memory", "error of the gradient"]
    lines = []
    for row in group:
        if row.status == "missing":
            continue
        name = label(row) + ("" if row.work in ("all", "products alone") else f" ({row.work})")
        if row.ms is None or row.ms_iqr is None or row.peak_mib is None:
            lines.append([name, row.status, *["–"] * 3, error(row, True)])
            continue
        ratios = ["–", "–"]
        if base and base.ms and base.peak_mib:
            ratios = [f"{row.ms / base.ms:.2f}", f"{row.peak_mib / base.peak_mib:.2f}"]
        costs = [f"{number(row.ms)} ± {number(row.ms_iqr, 2)}", number(row.peak_mib)]
        lines.append([name, *costs, *ratios, error(row, True)])
    return table(head, lines)


def headline(results: Results) -> str:
    """The README's first tables."""
    groups = [g for op in HEADLINES for g in results.of(op, headline=True)]
    parts = [f"{title(group[0])}, forward and backward:\n\n{relative_table(group)}" for group in groups]
    return "\n\n".join([*parts, f"{command(results)} on {provenance(results.where)}."])


def command(results: Results) -> str:
    return "`bash bench/gpu.sh`" if results.gpu else "`make bench`"


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


def teacher(results: Results) -> str:
    """Beside a teacher: every table."""
    groups = [group for group in results.groups if group[0].op.startswith(DISTILL)]
    parts = [f"`{results.path.name}`: {provenance(results.where)}."]
    return "\n\n".join([*parts, *tables(groups)])


def tables(groups: list[Group]) -> list[str]:
    """Those of the operations, one after another, and what went wrong."""
    parts, op = list[str](), ""
    for group in groups:
        if group[0].op.startswith(findings.OPS):  # these have tables of their own
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


MODELS = {"Llama-3": (128_256, 4096), "Qwen3": (151_936, 4096), "Gemma-3": (262_144, 3840)}


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


def everything(results: Results, folder: str) -> str:
    """A section: provenance, limits, pictures, every table, who is missing and why."""
    rows = results.rows
    limits = {row.dtype: row.limits for row in rows if row.limits}
    parts = [f"`{results.path.name}`: {provenance(results.where)}."]
    commits = sorted({f"{row.where['commit']} ({row.where['date']})" for row in rows})
    if len(commits) > 1:
        parts.append(f"Measured at several commits: {', '.join(commits)}.")
    parts += [f"**{line}**" for line in results.trouble()]
    if limits:
        copy = next(iter(limits.values()))["gb_per_s"]
        rates = ", ".join(f"{number(x['tflop_per_s'])} TFLOP/s in {dtype}" for dtype, x in limits.items())
        parts.append(
            f"Limits, measured in the same run: a large copy {number(copy)} GB/s, a large product {rates}."
        )
    parts += [
        f"![{alt}]({folder}/{name})"
        for name, alt in pictures.names(results.groups, results.path.stem).items()
    ]
    for heading, text in (
        ("In use", findings.in_use(results.groups)),
        ("Beside the products alone", findings.within(results.groups)),
    ):
        parts += [f"### {heading}", text] if text else []
    parts += tables([group for group in results.groups if not group[0].op.startswith(DISTILL)])
    if text := findings.choices(results.groups):
        parts += ["### Choices", text]
    missing = {f"{label(row)}: {quoted(row.reason)}" for row in rows if row.status == "missing"}
    if missing:
        parts.append("### Not measured\n\n" + "\n".join(f"- {line}" for line in sorted(missing)))
    return "\n\n".join(parts)


# ---- documents

BLOCK = re.compile(r"(<!-- bench: (\w+)(?: of (\w+), from ([\w.-]+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def has(*ops: str) -> Callable[[Results], bool]:
    """Whether results have rows of all these operations: a run of some does not replace a whole one."""
    return lambda results: set(ops) <= {row.op for row in results.rows}


# What a block shows, and of which results it can.
RENDERERS: dict[str, tuple[Callable[[Results], str], Callable[[Results], bool]]] = {
    "headline": (headline, has(*HEADLINES[:2])),
    "steps": (steps, has(STEP)),
    "silent": (silent, lambda results: any(row.rows.endswith("silent") for row in results.rows)),
    "everything": (lambda results: everything(results, "benchmarks"), has(*LOGITS_OPS, *LINEAR_OPS)),
    "teacher": (teacher, has(f"{DISTILL}reverse_kl")),
}


def render(name: str, machine: str | None, file: str | None) -> str:
    """What stands in a block."""
    if machine is None:
        return split_plans() if name == "split_plans" else plans()
    if file is None or file == "nothing":
        return UNMEASURED[machine]
    return RENDERERS[name][0](Results.read(measure.RESULTS / file))


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(what stands in a document's block, what should stand there)"""
    for found in BLOCK.finditer(text):
        start, name, machine, file, end = found.groups()
        yield found.group(0), f"{start}\n{render(name, machine, file)}\n\n{end}"


def publish_documents() -> None:
    """Render every block of the documents from the newest results that have its rows, and the pictures."""

    def renew(found: re.Match[str]) -> str:
        start, name, machine, _, end = found.groups()
        file = None
        if machine is not None:
            results = newest(machine == "gpu", RENDERERS[name][1])
            file = results.path.name if results else "nothing"
            start = f"<!-- bench: {name} of {machine}, from {file} -->\n"
        return f"{start}\n{render(name, machine, file)}\n\n{end}"

    texts = {document: BLOCK.sub(renew, document.read_text()) for document in DOCUMENTS}
    shutil.rmtree(PICTURES, ignore_errors=True)
    for gpu in (True, False):
        if results := newest(gpu, RENDERERS["everything"][1]):
            pictures.draw(results.groups, PICTURES, results.path.stem, provenance(results.where))
    for document, text in texts.items():
        document.write_text(text)


def main(
    files: Annotated[tuple[Path, ...], tyro.conf.Positional] = (),
    output: Path = OUTPUT,
    publish: bool = False,
) -> None:
    """Render tables and pictures.

    Args:
        files: results; the newest of each kind of machine if there are none.
        output: a folder for report.md and the pictures.
        publish: renew README.md and docs/ too, from the newest results.
    """
    console = Console()
    if publish:
        publish_documents()
        console.print(", ".join(str(document.relative_to(ROOT)) for document in DOCUMENTS))
    every = [Results.read(file) for file in files] or [x for x in map(newest, (True, False)) if x]
    if not every:
        raise SystemExit("nothing was measured yet: make bench")
    output.mkdir(parents=True, exist_ok=True)
    parts = ["# Benchmarks"]
    if not any(results.gpu for results in every):
        parts.append(UNMEASURED["gpu"])
    for results in every:
        pictures.draw(results.groups, output, results.path.stem, provenance(results.where))
        parts.append(f"## {results.where['device']}\n\n{everything(results, '.')}")
        if RENDERERS["teacher"][1](results):
            parts.append(f"## Beside a teacher\n\n{teacher(results)}")
        for line in results.trouble():
            console.print(f"{results.path.name}: {line}", style="yellow")
    (output / "report.md").write_text("\n\n".join(parts) + "\n")
    console.print(f"{output / 'report.md'}, with pictures")


if __name__ == "__main__":
    tyro.cli(main)
