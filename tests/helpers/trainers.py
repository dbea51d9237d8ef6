"""Tiny trainers for the tests of training/."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from training.batch import Rollout
from training.config import PRESETS, Config
from training.distributed import World
from training.tasks import Problem
from training.train import Trainer

BASE = replace(
    PRESETS["demo"][1],
    model="carry(digits=2, steps=20, batch=32)",
    task="carry(digits=2)",
    lr=3e-4,
    steps=4,
    prompts=4,
    group_size=4,
    epochs=1,
    minibatches=1,
    initial_tokens=32,
    eval_prompts=2,
    eval_samples=4,
    k=(1, 2),
    logger=(),
)

Make = Callable[..., Trainer]


def small(cache: Path, output: Path, **changes: Any) -> Config:
    return replace(BASE, **{"model_cache": cache, "output": output} | changes)


def trainer(config: Config) -> Trainer:
    made = Trainer(config, World(), None, quiet=True)
    made.initial_entropy = 1.0
    if made.controller.target is None:
        made.controller.anchor(1.0)
    return made


def response(made: Trainer, problem: Problem, text: str, end: bool = True) -> Rollout:
    prompt, ids = made.tokenizer.encode(problem.question), made.tokenizer.encode(text)
    return Rollout(prompt, [*ids, made.tokenizer.eos_token_id] if end else ids, not end)


def script(made: Trainer, monkeypatch: pytest.MonkeyPatch, texts: list[str], ends: list[bool]) -> None:
    """Let the sampler answer with these, in turn."""

    def sample(prompts: list[list[int]], seed: int) -> list[Rollout]:
        rollouts = []
        for k, prompt in enumerate(prompts):
            ids = made.tokenizer.encode(texts[k % len(texts)])
            end = ends[k % len(ends)]
            rollouts.append(Rollout(prompt, [*ids, made.tokenizer.eos_token_id] if end else ids, not end))
        return rollouts

    monkeypatch.setattr(made.sampler, "sample", sample)


def weights(made: Trainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in made.policy.parameters()])
