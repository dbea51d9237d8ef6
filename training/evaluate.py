"""pass@k, maj@k and entropy on held-out problems, by difficulty class.

python -m training.evaluate runs/demo                     # the last checkpoint of a run
python -m training.evaluate runs/demo --model runs/models/carry-...    # another model, the same problems
"""

import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import tyro

from training.config import Config, check
from training.files import write_file, write_text

if TYPE_CHECKING:
    from training.train import Trainer

Result = dict[str, Any]
EVALUATION = "evaluation"  # the random stream


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Probability that one of k draws without replacement is right: 1 - C(n - c, k) / C(n, k).

    The unbiased estimator of Chen et al. 2021 (2107.03374).
    """
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def maj_at_k(answers: list[str], right: list[bool], k: int) -> float:
    """Share of right majority votes among the disjoint runs of k samples; a tie counts by its right share.

    ``answers`` are what `Task.vote` finds in the responses. The samples are exchangeable, so the runs are k
    draws each: unbiased.
    """
    votes = []
    for start in range(0, len(answers) - k + 1, k):
        run = answers[start : start + k]
        is_right = dict(zip(run, right[start : start + k]))
        counts = Counter(run)
        winners = [answer for answer, count in counts.items() if count == max(counts.values())]
        votes.append(sum(is_right[answer] for answer in winners) / len(winners))
    return sum(votes) / len(votes)


@torch.no_grad()
def evaluate(trainer: "Trainer", prompts: int, samples: int, ks: tuple[int, ...]) -> Result:
    """{"overall": {...}, "classes": {name: {...}}}: pass@k, maj@k, entropy, right samples of each prompt.

    The problems and the random stream are the evaluation's own: neither depends on the step, and training
    does not notice.
    """
    config = trainer.config
    problems = trainer.task.held_out(prompts)
    if not problems:
        raise ValueError("the task has no held-out problems to evaluate on")
    rollouts, score, _ = trainer.collect(problems, samples, EVALUATION)
    stats = trainer.measure(rollouts, [list(range(len(rollouts)))])
    texts = [trainer.tokenizer.decode(r.response, skip_special_tokens=True) for r in rollouts]
    votes = [trainer.task.vote(text) for text in texts]
    right = score >= config.threshold

    def summary(places: list[int]) -> Result:
        rows = [i for p in places for i in range(p * samples, (p + 1) * samples)]
        entropies = torch.cat([stats[i]["entropy"] for i in rows]).double()
        counts = [int(right[p].sum()) for p in places]
        result: Result = {"entropy": entropies.mean().item(), "score": score[places].mean().item()}
        for k in ks:
            result[f"pass@{k}"] = sum(pass_at_k(samples, c, k) for c in counts) / len(counts)
        for k in ks:
            runs = [(votes[p * samples : (p + 1) * samples], right[p].tolist()) for p in places]
            result[f"maj@{k}"] = sum(maj_at_k(*run, k) for run in runs) / len(runs)
        return result | {"prompts": len(places), "samples": samples, "right": counts}

    labels = [problem.label for problem in problems]
    classes = [name for name in trainer.task.classes if name in labels]
    return {
        "overall": summary(list(range(len(problems)))),
        "classes": {name: summary([p for p, x in enumerate(labels) if x == name]) for name in classes},
    }


@dataclass(frozen=True)
class Evaluation:
    """Which model to evaluate on what."""

    run: tyro.conf.Positional[Path]
    """Folder of a run: its task and sampling settings, and the model of its last checkpoint."""
    model: str | None = None
    """Another model: a folder or hub name."""
    prompts: int | None = None
    """Held-out problems of each class; None: the run's eval_prompts."""
    samples: int | None = None
    """Samples of each; None: the run's eval_samples."""
    k: tuple[int, ...] | None = None
    """None: the run's k."""
    output: Path | None = None
    """Where evaluation.json and evaluation.png go; None: the run's folder."""


def main(settings: Evaluation) -> None:
    from rich.console import Console

    from training.checkpoint import read_config
    from training.distributed import world
    from training.plot import draw_evaluations
    from training.train import Trainer

    if not (settings.run / "config.json").exists():
        raise ValueError(f"run {settings.run} holds no run: no config.json")
    config = read_config(settings.run)
    kept = {"prompts": config.eval_prompts, "samples": config.eval_samples, "k": config.k}
    asked = {name: getattr(settings, name) for name in kept if getattr(settings, name) is not None}
    chosen: dict[str, Any] = kept | asked
    config = replace(
        config,
        model=settings.model or newest(settings.run),
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
        trainer = Trainer(config, here, None, quiet=False)
        try:
            result = {"model": config.model} | evaluate(
                trainer, config.eval_prompts, config.eval_samples, config.k
            )
        finally:
            trainer.rewards.close()
    if here.main:
        output = settings.output or settings.run
        Console().print(table(result, config))
        write_text(output / "evaluation.json", json.dumps(result, indent=1) + "\n")
        drawn = {settings.run.name: result}
        write_file(output / "evaluation.png", lambda path: draw_evaluations(drawn, path))
        print(f"{output}/evaluation.json · {output}/evaluation.png")


def newest(run: Path) -> str:
    """The model of a run's last checkpoint."""
    from training.checkpoint import checkpoints, step_of

    last = max(checkpoints(run), default=None, key=step_of)
    if last is None:
        raise ValueError(f"run {run} has no checkpoint yet; --model names another model")
    return str(last / "model")


def table(result: Result, config: Config) -> Any:
    from rich.markup import escape
    from rich.table import Table

    rows = result["classes"] | {"overall": result["overall"]}
    names = [name for name in result["overall"] if name not in ("right", "samples")]
    drawn = Table(
        title=f"{escape(config.model)}: {config.eval_samples} samples a prompt, τ = {config.temperature}"
    )
    drawn.add_column("class")
    for name in names:
        drawn.add_column(name, justify="right")
    for label, row in rows.items():
        cells = (f"{row[name]}" if name == "prompts" else f"{row[name]:.3f}" for name in names)
        drawn.add_row(escape(label), *cells)
    return drawn


if __name__ == "__main__":
    from training.cli import guard

    asked = tyro.cli(Evaluation, description=__doc__)
    guard(lambda: main(asked), "nothing was written")
