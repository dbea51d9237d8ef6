"""The demonstration: the same model trained by PPO without and with adaptive entropy regularisation.

    python -m training.demo            # or: make demo
    python -m training.demo --help

A supervised warm-up makes the initial policy; from it two runs start, with the same problems and the same
seed, one without an entropy bonus and one with `AdaptiveEntropy`. The end is a table (entropy, pass@1 and
pass@k on held-out problems by difficulty) and a picture of both entropies with the target. No setting was
chosen for a result: what is printed is what happened.
"""

import json
import math
import sys
import time
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from training.config import Config
from training.evaluate import evaluate
from training.files import write_file, write_folder, write_text
from training.model import build_model, build_tokenizer
from training.tasks import ALPHABET, CLASSES
from training.train import ppo, warm_up

Metrics = list[dict[str, float]]
Mode = Literal["none", "aer"]
LABELS: dict[Mode, str] = {"none": "no bonus", "aer": "AER"}
RESULTS = ("none.jsonl", "aer.jsonl", "scores.json", "entropy.png")


def main(config: Config) -> None:
    console = Console()
    started = time.monotonic()
    check(config)
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # the model is small: a second thread costs more than it brings

    for name in RESULTS:  # of an earlier run: an interruption must not leave two runs mixed
        (config.output / name).unlink(missing_ok=True)

    start = config.output / "initial"
    histories: dict[Mode, Metrics] = {}
    scores: dict[str, dict[str, float]] = {}
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=console) as progress:
        tokenizer = build_tokenizer(ALPHABET)
        model = build_model(tokenizer, config.seed)
        bar = progress.add_task("warm-up ", total=config.warmup_steps, state="")
        warm_up(model, tokenizer, config, lambda m: show(progress, bar, f"loss {m['loss']:.3f}"))
        write_folder(start, lambda path: save(model, tokenizer, path))
        scores["initial"] = evaluate(model, tokenizer, config)

        for mode, label in LABELS.items():
            model, tokenizer = load(start)
            bar = progress.add_task(f"{label:8}", total=config.steps, state="")
            history: Metrics = []

            def report(metrics: dict[str, float], bar: Any = bar, history: Metrics = history) -> None:
                history.append(metrics)
                show(progress, bar, "reward {reward:.2f}  entropy {entropy:.3f}".format(**metrics))

            ppo(model, tokenizer, config, mode == "aer", report)
            histories[mode] = history
            write_text(config.output / f"{mode}.jsonl", "".join(json.dumps(m) + "\n" for m in history))
            scores[label] = evaluate(model, tokenizer, config)

    write_text(config.output / "scores.json", json.dumps(scores, indent=1) + "\n")
    picture = config.output / "entropy.png"
    write_file(picture, lambda path: draw(histories, path))
    console.print(table(scores, histories, config.k))
    console.print(f"{picture} · {config.output}/*.jsonl · {time.monotonic() - started:.0f} s")


def check(config: Config) -> None:
    """One clear line for a setting that cannot work, before anything is computed."""
    at_least = dict.fromkeys(
        ("warmup_steps", "warmup_batch", "steps", "prompts", "epochs", "eval_prompts", "k"), 1
    )
    at_least["group_size"] = 2  # advantages are relative to the group
    for name, least in at_least.items():
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(config, name)}")
    for name in ("warmup_lr", "lr", "max_grad_norm", "temperature"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {getattr(config, name)}")
    for name in ("right", "noise"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} must be from 0 to 1, got {getattr(config, name)}")
    for name in ("clip_low", "clip_high"):
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name} must be at least 0, got {getattr(config, name)}")
    if not 1 <= config.minibatches <= config.prompts * config.group_size:
        raise ValueError(f"minibatches must be from 1 to prompts x group_size, got {config.minibatches}")
    if config.k > config.eval_samples:
        raise ValueError(f"k must be at most eval_samples={config.eval_samples}, got {config.k}")
    try:
        config.output.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=config.output):
            pass
    except OSError as error:
        raise ValueError(f"output {config.output} is no folder to write to: {error.strerror}") from error


def show(progress: Progress, bar: Any, state: str) -> None:
    progress.update(bar, advance=1, state=state)


def save(model: Any, tokenizer: Any, path: Path) -> None:
    """A folder that AutoModelForCausalLM and AutoTokenizer load."""
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def load(path: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def table(scores: dict[str, dict[str, float]], histories: dict[Mode, Metrics], k: int) -> Table:
    """Entropy over training, and pass@1 / pass@k on held-out problems."""
    result = Table(title=f"Two-digit addition, held-out problems: pass@1 / pass@{k}")
    result.add_column("run")
    for heading in ("entropy, first → last", *CLASSES):
        result.add_column(heading, justify="right")
    training = {LABELS[mode]: history for mode, history in histories.items()}
    for run, score in scores.items():
        history = training.get(run)
        course = f"{history[0]['entropy']:.3f} → {history[-1]['entropy']:.3f}" if history else "-"
        passes = [f"{score[f'pass@1 {name}']:.3f} / {score[f'pass@{k} {name}']:.3f}" for name in CLASSES]
        result.add_row(run, course, *passes)
    target = histories["aer"][0]["target"]
    result.caption = f"entropy in nats per sampled token, over training; target H* = {target:.3f} = 0.4 · H₀"
    return result


def draw(histories: dict[Mode, Metrics], path: Path) -> None:
    """Entropy of both runs over the steps, with the target."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    entropy, alpha = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for (mode, history), color in zip(histories.items(), ("tab:gray", "tab:blue")):
        steps = [row["step"] for row in history]
        entropy.plot(steps, [row["entropy"] for row in history], color=color, label=LABELS[mode])
        if mode == "aer":
            target = history[0]["target"]
            entropy.axhline(target, color="tab:red", linestyle="--", label=f"target H* = {target:.3f}")
            alpha.plot(steps, [row["alpha"] for row in history], color=color)
    entropy.set(ylabel="entropy (nats per token)", ylim=(0, None), title="Policy entropy during PPO")
    entropy.legend(frameon=False)
    alpha.set(ylabel="α", xlabel="PPO step", ylim=(0, None))
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    settings = tyro.cli(Config, description=__doc__)
    try:
        main(settings)
    except KeyboardInterrupt:
        print(f"\ninterrupted; what is in {settings.output} is whole", file=sys.stderr)
        sys.exit(130)
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
