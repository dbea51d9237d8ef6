"""A grid of runs, entropy modes x seeds, with a table and pictures at its end.

    python -m training.experiments demo                      # or: make demo
    python -m training.experiments carry --processes 2       # the paper's first comparison, on a tiny model
    python -m training.experiments demo --modes none fixed target aer skywork --seeds 0

Each run is a folder of its own, <mode>-<seed>, made by `training.train` with that mode and seed, and
evaluated on held-out problems at its end. The same command again goes on where it was interrupted; what is
done is not done again. Runs of one seed start from the same model, and meet the same problems.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports below: end, with no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from pebble import ProcessPool
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.text import Text

from training.checkpoint import compare, newest, plain, read_config
from training.config import OPERATIONAL, PRESETS, Config, Entropy, check
from training.data import build_task
from training.distributed import World
from training.files import read_json, write_text
from training.models import resolve
from training.plot import INITIAL, report
from training.processes import command, end_with_parent, fault_of, naming, uninterrupted
from training.record import Warmup
from training.train import Trainer, train


@dataclass(frozen=True)
class Experiment:
    """A grid of runs."""

    modes: tuple[Entropy, ...] = ("none", "aer")
    """Entropy bonuses; each is a run for each seed."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the initial model, the problems and the sampling."""
    processes: int = 1
    """Runs at a time."""
    eval_prompts: int = 40
    """Held-out problems of each class."""
    eval_samples: int = 64
    """Samples of each."""
    train: Config = field(default_factory=Config)
    """The settings that all runs share; output is the folder of the whole grid."""


FEW = 5  # seeds
CAUTION = (
    "So few seeds show how entropy runs with each bonus, and whether it is held at its target (outcome.png)."
    " They can't show whether pass@k is the better for it: from seed to seed it differs as much."
    " docs/evidence.md asks more of them."
)
Work = Callable[[Config, Experiment], None]
Job = tuple[Work, Config, Experiment]


def grid_of(preset: str, **settings: Any) -> Experiment:
    train = PRESETS[preset][1]
    return Experiment(train=replace(train, output=Path("runs") / f"grid-{preset}"), **settings)


GRIDS: dict[str, tuple[str, Experiment]] = {
    "demo": ("No bonus and AER where a policy collapses.", grid_of("demo", processes=2)),
    "carry": (
        "No bonus, fixed coefficient and AER on the carry task, two seeds.",
        grid_of("carry", modes=("none", "fixed", "aer"), seeds=(0, 1), eval_prompts=100),
    ),
    "custom": ("The grid's defaults around the fields of training.train.", grid_of("custom")),
}


def main(settings: Experiment) -> None:
    console, started = Console(), time.monotonic()
    for name in ("processes", "eval_prompts", "eval_samples"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(settings, name)}")
    if not settings.seeds or not settings.modes:
        raise ValueError("seeds and modes must name at least one each")
    runs = [run_config(settings, mode, seed) for seed in settings.seeds for mode in settings.modes]
    for config in runs:
        check(config)
        if (config.output / "config.json").exists():
            compare(plain(read_config(config.output)), plain(config))
    make_models(settings)
    starts = [
        replace(run_config(settings, "none", seed), output=initial_folder(settings, seed))
        for seed in settings.seeds
    ]
    jobs: list[Job] = [(evaluate_start, config, settings) for config in starts]
    jobs += [(run_one, config, settings) for config in runs]
    with Progress(console=console) as progress:
        bars = {
            config.output: progress.add_task(escape(config.output.name), total=config.steps + 1)
            for config in runs
        }

        def show() -> None:
            for run, bar in bars.items():
                progress.update(bar, completed=progress_of(run))

        run_all(jobs, settings.processes, show)
    report(settings.train.output, settings.modes, settings.seeds, ks(settings)[-1], console)
    if len(settings.seeds) < FEW:
        console.print(Text(f"\n{CAUTION}"))
    console.print(Text(f"{settings.train.output} · {time.monotonic() - started:.0f} s"))


def run_all(jobs: Sequence[Job], processes: int, show: Callable[[], None]) -> None:
    """Do each in a process of its own: a run's memory and random state end with it. Calls ``show`` meanwhile.

    Raises ValueError that names the run, if one can't be done.
    """
    context = multiprocessing.get_context("spawn")
    waiting: dict[Future[str | None], str] = {}
    pool = ProcessPool(processes, max_tasks=1, initializer=end_with_parent, context=context)
    try:
        with uninterrupted():  # the first call starts the processes
            for job in jobs:
                waiting[pool.schedule(in_process, args=job)] = job[1].output.name
        while waiting:
            for future in [future for future in waiting if future.done()]:
                finish(future, waiting.pop(future))
            show()
            time.sleep(0.5)
    finally:
        pool.stop()
        pool.join()


def in_process(work: Work, config: Config, settings: Experiment) -> str | None:
    """What the process of a run does: returns the line that says why it could not, if so."""
    return fault_of(lambda: work(config, settings), config.output)


def finish(future: "Future[str | None]", run: str) -> None:
    """A run that failed stops the grid, with its name."""
    with naming(f"run {run}"):  # the process may have been killed
        fault = future.result()
    if fault is not None:
        raise ValueError(f"run {run}: {fault.removeprefix('error: ')}")


def progress_of(run: Path) -> int:
    """Steps that are done, and one more when they are scored; cheap, for it is asked all the time."""
    metrics = run / "metrics.jsonl"
    steps = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    return steps + (run / "scores.json").exists()


def run_config(settings: Experiment, mode: Entropy, seed: int) -> Config:
    output = settings.train.output / f"{mode}-{seed}"
    return replace(settings.train, output=output, entropy=mode, seed=seed, resume=True)


def initial_folder(settings: Experiment, seed: int) -> Path:
    return settings.train.output / f"{INITIAL}-{seed}"


def make_models(settings: Experiment) -> None:
    """The initial models, before the runs: with a progress bar, and once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.train.threads or threads)
    for seed in settings.seeds:
        with Warmup(quiet=False) as show:
            resolve(replace(settings.train, seed=seed), show)
    torch.set_num_threads(threads)


def run_one(config: Config, settings: Experiment) -> None:
    """Train, or go on; then evaluate."""
    if not is_scored(config, settings):
        train(config, quiet=True)
        score(config, settings, newest(config.output))


def evaluate_start(config: Config, settings: Experiment) -> None:
    """Evaluate the model that the runs of a seed start from."""
    if not is_scored(config, settings):
        score(config, settings, resolve(config))


def asked(config: Config, settings: Experiment) -> dict[str, Any]:
    """What the scores of a run depend on."""
    found = {name: value for name, value in plain(config).items() if name not in OPERATIONAL}
    digests = build_task(config).digests if config.data is not None else {}
    return found | {"digests": digests, "prompts": settings.eval_prompts, "samples": settings.eval_samples}


def is_scored(config: Config, settings: Experiment) -> bool:
    scores = config.output / "scores.json"
    try:
        known = read_json(scores)
    except (OSError, ValueError):  # none yet, or nothing that can be read
        return False
    return isinstance(known, dict) and known.get("asked") == asked(config, settings)


def score(config: Config, settings: Experiment, model: str) -> None:
    if config.threads:
        torch.set_num_threads(config.threads)
    plain_model = replace(config, model=model, resume=False, kl_coef=0.0, lora_rank=0, eval_every=0)
    trainer = Trainer(plain_model, World(), None, quiet=True, trains=False)
    try:
        result = trainer.evaluate(settings.eval_prompts, settings.eval_samples, ks(settings))
    finally:
        trainer.rewards.close()
    for warning in result["warnings"]:
        print(f"warning: run {config.output.name}: {warning}", file=sys.stderr)
    result["asked"] = asked(config, settings)
    write_text(config.output / "scores.json", json.dumps(result) + "\n")


def ks(settings: Experiment) -> tuple[int, ...]:
    """1, 2, 4, ... up to half of the samples: beyond, the estimate hangs on a few draws."""
    return tuple(2**k for k in range(10) if 2**k <= max(settings.eval_samples // 2, 1))


if __name__ == "__main__":
    command(
        lambda: tyro.extras.overridable_config_cli(GRIDS, description=__doc__),
        main,
        "the same command goes on",
        lambda chosen: chosen.train.output,
    )
