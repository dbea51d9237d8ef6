"""The report, and the tables of README.md and docs/, each rendered from a file of results."""

import re
import shutil
from collections.abc import Callable, Iterator

from bench import measure
from bench.cases import DISTILL, LINEAR_OPS, LOGITS_OPS, STEP
from bench.measure import ROOT
from bench.report import headlines, pictures, tables
from bench.report.results import Results, newest
from bench.report.tables import label, number, provenance, quoted

PICTURES = ROOT / "docs" / "benchmarks"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "linear.md", ROOT / "docs" / "benchmarks.md")
UNMEASURED = {"gpu": "**On a GPU: not measured yet.**", "cpu": "**On a CPU: not measured yet.**"}


def everything(results: Results, folder: str) -> str:
    """A section: provenance, limits, pictures, every table, the peers that were skipped and why."""
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
        ("In use", tables.in_use(results.groups)),
        ("Beside the products alone", tables.within(results.groups)),
    ):
        parts += [f"### {heading}", text] if text else []
    own = [group for group in results.groups if group[0].op.startswith(DISTILL)] + tables.narrow(results)
    parts += tables.tables([group for group in results.groups if group not in own])
    if text := tables.choices(results.groups):
        parts += ["### Choices", text]
    missing = {f"{label(row)}: {quoted(row.reason)}" for row in rows if row.status == "missing"}
    if missing:
        parts.append("### Not measured\n\n" + "\n".join(f"- {line}" for line in sorted(missing)))
    return "\n\n".join(parts)


BLOCK = re.compile(r"(<!-- bench: (\w+)(?: of (\w+), from ([\w.-]+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def has(*ops: str) -> Callable[[Results], bool]:
    """Whether results have rows of all these operations: a run of some does not replace a whole one."""
    return lambda results: set(ops) <= {row.op for row in results.rows}


ALL_OPERATIONS = has(*LOGITS_OPS, *LINEAR_OPS)  # of the results whose pictures are drawn


def picture(results: Results, folder: str) -> str:
    """The README's first: what the fused loss costs."""
    name = f"{results.path.stem}-{pictures.COSTS}.png"
    return f"![{pictures.names(results.groups, results.path.stem)[name]}]({folder}/{name})"


# What a block shows, and of which results it can.
RENDERERS: dict[str, tuple[Callable[[Results], str], Callable[[Results], bool]]] = {
    "picture": (lambda results: picture(results, "docs/benchmarks"), ALL_OPERATIONS),
    "shortened": (headlines.shortened, has(*headlines.HEADLINES[:2])),
    "headline": (headlines.headline, has(*headlines.HEADLINES[:2])),
    "steps": (tables.steps, has(STEP)),
    "silent": (tables.silent, lambda results: any(row.rows.endswith("silent") for row in results.rows)),
    "everything": (lambda results: everything(results, "benchmarks"), ALL_OPERATIONS),
    "teacher": (tables.teacher, has(f"{DISTILL}reverse_kl")),
    "bfloat16": (tables.bfloat16, lambda results: bool(tables.narrow(results))),
}


def render(name: str, machine: str | None, file: str | None) -> str:
    """What stands in a block."""
    if machine is None:
        return tables.split_plans() if name == "split_plans" else tables.plans()
    if file is None or file == "nothing":
        return UNMEASURED[machine]
    return RENDERERS[name][0](Results.read(measure.RESULTS / file))


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(what stands in a document's block, what should stand there)"""
    for found in BLOCK.finditer(text):
        start, name, machine, file, end = found.groups()
        yield found.group(0), f"{start}\n{render(name, machine, file)}\n\n{end}"


def publish() -> None:
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
