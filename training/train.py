"""The demo's two phases: a supervised warm-up, and PPO with group-relative advantages.

`ppo` is the whole algorithm from top to bottom.
"""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aer_fast import AdaptiveEntropy, ppo_loss, token_stats
from training.config import Config
from training.rollout import Rollouts, sample
from training.tasks import demonstration, reward, sample_problem

Report = Callable[[dict[str, float]], None]


def warm_up(model: Any, tokenizer: Any, config: Config, report: Report) -> None:
    """Train on demonstrations, the loss on the response alone."""
    rng = random.Random(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.warmup_lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.warmup_lr, total_steps=config.warmup_steps, pct_start=0.05, final_div_factor=1e4
    )
    model.train()
    for step in range(config.warmup_steps):
        pairs = [demonstration(rng, config.right, config.noise) for _ in range(config.warmup_batch)]
        ids = torch.tensor([[*tokenizer.encode(p + r), tokenizer.eos_token_id] for p, r in pairs])
        prompt = len(tokenizer.encode(pairs[0][0]))
        logits = model(ids[:, :-1]).logits[:, prompt - 1 :]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, prompt:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        report({"step": step + 1, "loss": loss.item()})


def ppo(model: Any, tokenizer: Any, config: Config, entropy_bonus: bool, report: Report) -> None:
    """PPO with group-relative advantages and, if asked for, the bonus of `AdaptiveEntropy` at its defaults.

    All rollouts are kept: a prompt without a right one has advantage 0, and the bonus at full weight is its
    only gradient.
    """
    torch.manual_seed(config.seed)
    rng = random.Random(config.seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    controller = AdaptiveEntropy()
    model.eval()  # no dropout: the ratio compares the policy with itself

    for step in range(config.steps):
        problems = [
            sample_problem(rng, difficulty=rng.choices((0, 1, 2), (0.6, 0.2, 0.2))[0])
            for _ in range(config.prompts)
        ]
        rollouts = sample(model, tokenizer, problems, config.group_size, config.temperature, reward)

        # the policy that sampled: its log-probabilities, and the entropy that the controller follows
        with torch.no_grad():
            logits = model(rollouts.ids).logits
            old = token_stats(logits, rollouts.target, temperature=config.temperature)
        entropy = old.entropy.sum().item() / rollouts.tokens
        controller.update(entropy, rollouts.tokens)
        accuracy = rollouts.reward.mean(-1)
        coefficient = controller.coefficient(accuracy)
        if not entropy_bonus:
            coefficient = torch.zeros_like(coefficient)

        metrics = optimise(
            model,
            optimizer,
            rollouts,
            old.logprob,
            group_relative(rollouts.reward).flatten(),
            coefficient.repeat_interleave(config.group_size),
            config,
        )
        report(
            {
                "step": step + 1,
                "reward": accuracy.mean().item(),
                "entropy": entropy,
                "target": controller.target or 0.0,
                "alpha": controller.alpha if entropy_bonus else 0.0,
                "coefficient": coefficient.mean().item(),
                **metrics,
            }
        )


def group_relative(rewards: Tensor) -> Tensor:
    """(reward - mean of its group) / standard deviation of its group [prompts, G]; 0 where all are equal."""
    centred = rewards - rewards.mean(-1, keepdim=True)
    return centred / (rewards.std(-1, keepdim=True, unbiased=False) + 1e-6)


def optimise(
    model: Any,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    old_logprob: Tensor,  # [B, T]
    advantage: Tensor,  # [B]
    entropy_coef: Tensor,  # [B]
    config: Config,
) -> dict[str, float]:
    """Several passes of minibatches over one batch of rollouts; metrics averaged over the minibatches."""
    history: list[dict[str, Tensor]] = []
    for _ in range(config.epochs):
        for rows in torch.randperm(len(rollouts.ids)).chunk(config.minibatches):
            logits = model(rollouts.ids[rows]).logits
            loss = ppo_loss(
                logits,
                rollouts.target[rows],
                old_logprob[rows],
                advantage[rows, None],
                entropy_coef=entropy_coef[rows, None],
                clip=(config.clip_low, config.clip_high),
                temperature=config.temperature,
                inplace=True,
            )
            loss.loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            if not torch.isfinite(norm):
                raise FloatingPointError(f"the gradient is not finite (norm {norm.item()}); stopping")
            optimizer.step()
            optimizer.zero_grad()
            history.append({"loss": loss.loss.detach(), "grad_norm": norm, **loss.metrics})
    names = ("loss", "grad_norm", "clip_fraction", "approx_kl")
    means = {name: torch.stack([m[name] for m in history]).mean().item() for name in names}
    return means | {"ratio_max": torch.stack([m["ratio_max"] for m in history]).max().item()}
