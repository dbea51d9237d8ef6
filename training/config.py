"""Everything the demo can be told, in one flat place."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Config:
    """Settings of the demo job; every field is a flag of ``python -m training.demo``."""

    output: Path = Path("runs/demo")
    """Folder for the initial model, the metrics, the scores and the picture."""
    seed: int = 0
    """Seeds the weights, the problems and the sampling."""

    warmup_steps: int = 500
    """Steps of supervised training on demonstrations."""
    warmup_batch: int = 128
    """Demonstrations in a step."""
    warmup_lr: float = 1e-3
    """Peak learning rate of the warm-up; linear warm-up over 5% of the steps, cosine decay to 0."""
    right: float = 0.05
    """Share of demonstrations with the right sum; the others show the carry-free shortcut."""
    noise: float = 0.1
    """Probability with which a digit of a demonstration is replaced by a random one."""

    steps: int = 150
    """PPO steps of a run."""
    prompts: int = 32
    """Prompts in a step; 60% without a carry, 20% with one, 20% with two."""
    group_size: int = 8
    """Rollouts of a prompt, G."""
    epochs: int = 2
    """Passes over the rollouts of a step; from the second on ratios leave 1 and clipping acts."""
    minibatches: int = 2
    """Optimiser steps of a pass."""
    lr: float = 3e-4
    """Learning rate of PPO, constant."""
    clip_low: float = 0.2
    """The ratio is clipped at 1 - clip_low ..."""
    clip_high: float = 0.2
    """... and at 1 + clip_high."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    temperature: float = 1.0
    """Sampling temperature, of the rollouts and of the loss."""

    eval_prompts: int = 40
    """Held-out problems of each difficulty."""
    eval_samples: int = 64
    """Samples of a held-out problem."""
    k: int = 32
    """pass@k is reported for 1 and for this k; at most eval_samples."""
