"""What people look at while a run runs: a progress display, metrics files, TensorBoard, W&B, trackio.

And signs that a run is failing, named while there is time. docs/training.md says what answers each.
"""

import importlib
import statistics
import threading
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from training.checkpoint import Folder, plain
from training.config import Config
from training.processes import naming

Row = dict[str, Any]
BOUND_STEPS = 10  # α at its bound for so long
RATIO = 10.0  # a ratio above this
GRADIENT = 10.0  # a gradient norm above so many medians of the last 50

COLUMNS = (
    TextColumn("[bold]{task.description}"),
    BarColumn(bar_width=8),
    MofNCompleteColumn(),
    TextColumn("{task.fields[state]}"),
    TimeRemainingColumn(compact=True),
)


class Warmup:
    """A progress bar that appears when a model has to be made first."""

    def __init__(self, *, quiet: bool) -> None:
        self.progress = Progress(*COLUMNS, disable=quiet)
        self.bar: Any = None

    def __enter__(self) -> Callable[[int, int, float], None]:
        return self.report

    def report(self, step: int, steps: int, loss: float) -> None:
        if self.bar is None:
            self.progress.start()
            self.bar = self.progress.add_task("warm-up", total=steps, state="")
        self.progress.update(self.bar, completed=step, state=f"loss {loss:.3f}")

    def __exit__(self, *_: object) -> None:
        self.progress.stop()


class Recorder:
    """Writes each step's metrics to everything that was asked for. ``quiet`` shows nothing."""

    def __init__(self, folder: Folder, config: Config, start: int, *, quiet: bool) -> None:
        self.folder, self.console = folder, Console(quiet=quiet)
        self.progress = Progress(*COLUMNS, console=self.console, disable=quiet)
        self.bar = self.progress.add_task("step", total=config.steps, completed=start, state="")
        self.sinks = [_sink(name, folder, config, start) for name in config.logger]
        self.progress.start()

    def step(self, metrics: dict[str, Any], timing: dict[str, Any]) -> None:
        self.folder.append("metrics.jsonl", metrics)
        self.folder.append("timing.jsonl", timing)
        numbers = {k: v for k, v in (metrics | timing).items() if isinstance(v, (int, float))}
        for sink in self.sinks:
            sink(numbers, metrics["step"])
        for warning in metrics["warnings"]:
            self.progress.console.print(Text(f"step {metrics['step']}: {warning}", style="yellow"))
        state = (
            "reward {reward:.2f} H {entropy:.3f} (target {target:.3f}) α {alpha:.4f}"
            " {tokens_per_second:.0f} tok/s".format(**(metrics | timing))
        )
        if "divergence" in metrics:
            state = f"D {metrics['divergence']:.3f} {state}"
        self.progress.update(self.bar, completed=metrics["step"], state=state)

    def evaluation(self, row: dict[str, Any]) -> None:
        self.folder.append("evaluations.jsonl", row)
        for warning in row["warnings"]:
            text = f"step {row['step']}, evaluation: {warning}"
            self.progress.console.print(text, style="yellow", markup=False)
        numbers = {f"eval/{k}": v for k, v in row["overall"].items() if isinstance(v, (int, float))}
        for sink in self.sinks:
            sink(numbers, row["step"])

    def close(self) -> None:
        self.progress.stop()


def _sink(name: str, folder: Folder, config: Config, start: int) -> Any:
    """A function of (numbers, step) that logs there."""
    if name == "tensorboard":
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("logger 'tensorboard' needs its package: pip install tensorboard") from error
        threading.excepthook = _unless_kept
        fault = f"logger 'tensorboard': {folder.path / 'tensorboard'} takes no events"
        with naming(fault):
            writer = SummaryWriter(str(folder.path / "tensorboard"), purge_step=start + 1)

        def write(numbers: dict[str, float], step: int) -> None:
            with naming(fault):
                for key, value in numbers.items():
                    writer.add_scalar(key, value, step)
                writer.flush()

        return write
    try:
        with naming(f"logger {name!r} can't be imported"):
            module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"logger {name!r} needs its package: pip install {name}") from error
    options = {"id": folder.path.name, "resume": "allow"} if name == "wandb" else {"resume": "allow"}
    with naming(f"logger {name!r} does not start"):
        module.init(project="aer_fast", name=folder.path.name, config=plain(config), **options)

    def log(numbers: dict[str, float], step: int) -> None:
        with naming(f"logger {name!r} takes no metrics"):
            module.log(numbers, step=step)

    return log


def _unless_kept(args: threading.ExceptHookArgs) -> None:
    """Print what ended a thread, but for TensorBoard's, which raises it again where it is called."""
    if not type(args.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(args)


def alarms(rows: list[Row], alpha_range: tuple[float, float]) -> list[str]:
    """What is wrong as of the last row; nothing that was said of the row before it.

    A function of the metrics so far, so that a resumed run warns as an uninterrupted one would.
    """
    before = dict(_signs(rows[:-1], alpha_range))
    return [text for name, text in _signs(rows, alpha_range) if name not in before]


def _signs(rows: list[Row], alpha_range: tuple[float, float]) -> list[tuple[str, str]]:
    if not rows:
        return []
    row, found = rows[-1], []
    entropy, initial = row["entropy"], row["initial_entropy"]
    if entropy > 1.2 * initial:
        found.append(("explosion", f"entropy {entropy:.3f} is above 1.2 times its initial {initial:.3f}"))
    if entropy < 0.1 * initial:
        found.append(("collapse", f"entropy {entropy:.3f} is below a tenth of its initial {initial:.3f}"))
    low, high = alpha_range
    recent = [r["alpha"] for r in rows[-BOUND_STEPS:]]
    moved = any(r["alpha"] != rows[0]["alpha"] for r in rows)
    for bound, name in ((low, "lower"), (high, "upper")):
        stuck = len(recent) == BOUND_STEPS and set(recent) == {bound}
        wrong_side = entropy < row["target"] if bound == high else moved and entropy > row["target"]
        if stuck and wrong_side and low < high:
            text = f"alpha is at its {name} bound {bound:g} for {BOUND_STEPS} steps, entropy {entropy:.3f}"
            found.append((f"alpha {name}", f"{text} against a target of {row['target']:.3f}"))
    if row["ratio_max"] > RATIO:
        found.append(("ratio", f"a probability ratio of {row['ratio_max']:.3g} within one step"))
    before = [r["grad_norm"] for r in rows[-51:-1]]
    if len(before) >= 10 and row["grad_norm"] > GRADIENT * statistics.median(before) > 0:
        norms = f"{row['grad_norm']:.3g}, its median was {statistics.median(before):.3g}"
        found.append(("gradient", f"gradient norm {norms}"))
    return found
