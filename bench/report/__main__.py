"""`python -m bench.report`: tables and pictures of what was measured, as the package says."""

from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from bench.measure import ROOT
from bench.report import documents, pictures, tables
from bench.report.results import Results, newest
from bench.report.tables import provenance

OUTPUT = ROOT / "runs" / "bench"


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
        documents.publish()
        console.print(", ".join(str(document.relative_to(ROOT)) for document in documents.DOCUMENTS))
    every = [Results.read(file) for file in files] or [x for x in map(newest, (True, False)) if x]
    if not every:
        raise SystemExit("nothing was measured yet: make bench")
    output.mkdir(parents=True, exist_ok=True)
    parts = ["# Benchmarks"]
    if not any(results.gpu for results in every):
        parts.append(documents.UNMEASURED["gpu"])
    for results in every:
        pictures.draw(results.groups, output, results.path.stem, provenance(results.where))
        parts.append(f"## {results.where['device']}\n\n{documents.everything(results, '.')}")
        if documents.RENDERERS["teacher"][1](results):
            parts.append(f"## Beside a teacher\n\n{tables.teacher(results)}")
        for line in results.trouble():
            console.print(f"{results.path.name}: {line}", style="yellow")
    (output / "report.md").write_text("\n\n".join(parts) + "\n")
    console.print(f"{output / 'report.md'}, with pictures")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m bench.report")
