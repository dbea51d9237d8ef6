"""pass@k, maj@k and entropy on held-out problems, by difficulty class.

python -m training.evaluate runs/demo                     # the last checkpoint of a run
python -m training.evaluate runs/demo/checkpoints/step-000050          # one that was kept
python -m training.evaluate runs/demo --model runs/models/carry-...    # another model, the same problems
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports below: end, with no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from training.checkpoint import check_digests, check_writable, newest, read_config
from training.config import Config, check
from training.distributed import world
from training.evaluation import Result
from training.files import write_file, write_text
from training.plot import draw_evaluations
from training.processes import command
from training.train import Trainer


@dataclass(frozen=True)
class Evaluation:
    """Which model to evaluate on what."""

    run: tyro.conf.Positional[Path]
    """Folder of a run: its task and sampling settings, and the model of its last checkpoint; or a checkpoint
    in it."""
    model: str | None = None
    """Another model: a folder, a checkpoint of another run or a hub name."""
    prompts: int | None = None
    """Held-out problems of each class; None: the run's eval_prompts."""
    samples: int | None = None
    """Samples of each; None: the run's eval_samples."""
    k: tuple[int, ...] | None = None
    """None: the run's k."""
    accept_changed_data: bool = False
    """Evaluate although data or eval_data is no longer what the run read."""
    output: Path | None = None
    """Where evaluation.json and evaluation.png go; None: the run's folder."""


def main(settings: Evaluation) -> None:
    run, model = settings.run, settings.model
    for folder in (run.resolve(), run.resolve().parent):
        if (folder / "state.json").exists():  # a checkpoint, or the model in it
            run, model = folder.parent.parent, model or str(folder)
    if not (run / "config.json").exists():
        where = "" if run == settings.run else f" (the folder of the run of this checkpoint would be {run})"
        raise ValueError(f"run {settings.run} holds no run: no config.json{where}")
    config = read_config(run)
    output = settings.output or run
    check_writable(output)
    kept = {"prompts": config.eval_prompts, "samples": config.eval_samples, "k": config.k}
    asked = {name: getattr(settings, name) for name in kept if getattr(settings, name) is not None}
    chosen: dict[str, Any] = kept | asked
    config = replace(
        config,
        model=model or newest(run),
        kl_coef=0.0,
        rollout="hf",
        eval_prompts=chosen["prompts"],
        eval_samples=chosen["samples"],
        k=chosen["k"],
        eval_every=0,
        lora_rank=0,
    )
    check(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    with world() as here:
        trainer = Trainer(config, here, None, quiet=False, trains=False)
        try:
            if here.main:
                check_digests(run, trainer.task.digests, accept=settings.accept_changed_data)
            scores = trainer.evaluate(config.eval_prompts, config.eval_samples, config.k)
            result = {"model": config.model} | scores
        finally:
            trainer.rewards.close()
    if here.main:
        for warning in scores["warnings"]:
            print(f"warning: {warning}", file=sys.stderr)
        Console().print(table(result, config))
        write_text(output / "evaluation.json", json.dumps(result, indent=1) + "\n")
        drawn = {run.resolve().name: result}
        write_file(output / "evaluation.png", lambda path: draw_evaluations(drawn, path))
        print(f"{output}/evaluation.json · {output}/evaluation.png")


def table(result: Result, config: Config) -> Table:
    rows = result["classes"] | {"overall": result["overall"]}
    names = [name for name in result["overall"] if name not in ("right", "samples")]
    drawn = Table(
        title=Text(f"{config.model}: {config.eval_samples} samples a prompt, τ = {config.temperature}")
    )
    drawn.add_column("class")
    for name in names:
        drawn.add_column(name, justify="right")
    for label, row in rows.items():
        cells = (f"{row[name]}" if name == "prompts" else f"{row[name]:.3f}" for name in names)
        drawn.add_row(Text(label), *cells)
    return drawn


if __name__ == "__main__":
    command(
        lambda: tyro.cli(Evaluation, description=__doc__),
        main,
        "nothing was written",
        lambda asked: asked.output or asked.run,
    )
