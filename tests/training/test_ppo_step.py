"""One step of PPO against an oracle that shares nothing with the trainer but the controller and the shuffle.

The oracle works from logits in float64, one sequence at a time, with its own advantages, clipping, KL, value
loss, aggregation and AdamW. Fields are drawn at random; a draw is a seed of the test.
"""

import copy
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.trainers import small, trainer
from training.batch import Rollout
from training.config import Config
from training.entropy import build_controller
from training.policy import Policy
from training.train import Trainer

pytestmark = pytest.mark.needs("training")


def draw_fields(draw: random.Random) -> dict[str, Any]:
    choices: dict[str, list[Any]] = {
        "advantage": ["group", "group_mean", "leave_one_out", "gae"],
        "aggregation": ["token_mean", "sequence_mean", "dr_grpo"],
        "degenerate": ["keep", "drop", "advantage_only"],
        "truncated": ["score", "mask", "penalise"],
        "truncation_penalty": [0.5, 0.3],
        "kl_coef": [0.0, 0.1, 0.5],
        "dual_clip": [None, 1.5],
        "whiten": [True, False],
        "packing": [True, False],
        "epochs": [1, 2, 3],
        "minibatches": [1, 2, 3],
        "clip_low": [0.2, 0.05],
        "clip_high": [0.28, 0.1],
        "gae_lambda": [0.95, 0.5],
        "gamma": [1.0, 0.9],
        "value_coef": [0.5, 1.0],
        "value_clip": [0.2, 0.01],
        "temperature": [1.0, 0.7, 1.5],
        "micro_tokens": [1, 30, 10_000],
        "threshold": [1.0, 0.5],
        "entropy": ["aer", "fixed", "difficulty", "target", "dynamic"],
        "rho": [0.5, 0.9],
        "difficulty_weight": ["linear", "gate", "complement"],
        "target_ratio": [0.4, 2.0],
        "importance_cap": [2.0, 1.1],
        "max_grad_norm": [1.0, 0.1, 1e9],
        "weight_decay": [0.0, 0.1],
        "lr": [1e-2, 3e-3],
        "lr_warmup": [0, 5],
        "lr_decay": ["constant", "linear", "cosine"],
        "lora_rank": [0, 0, 2],
    }
    return {name: draw.choice(values) for name, values in choices.items()}


def script(made: Trainer, draw: random.Random) -> tuple[list[Rollout], list[float]]:
    """Random responses, some cut, some with the sampler's log-probabilities, and scores of all kinds."""
    end, V = made.tokenizer.eos_token_id, len(made.tokenizer)
    reports = draw.random() < 0.5
    rollouts: list[Rollout] = []
    scores: list[float] = []
    kinds = [draw.choice(["mixed", "mixed", "right", "wrong", "low"]) for _ in range(made.config.prompts)]

    def sample(prompts: list[list[int]], seed: int) -> list[Rollout]:
        for prompt in prompts:
            n = draw.randint(1, made.config.max_new_tokens)
            tokens = [draw.choice([t for t in range(V) if t != end]) for _ in range(n)]
            truncated = n == made.config.max_new_tokens and draw.random() < 0.7
            if not truncated:
                tokens[-1] = end
            logprob = [-3 * draw.random() for _ in tokens] if reports else None
            rollouts.append(Rollout(prompt[draw.randrange(3) :], tokens, truncated, logprob))
        return rollouts

    def scorer(problem: Any, response: str) -> float:
        kind = kinds[len(scores) // made.config.group_size]
        options = {"mixed": [0.0, 0.5, 1.0], "right": [1.0], "wrong": [0.0], "low": [0.0, 0.25]}
        scores.append(draw.choice(options[kind]))
        return scores[-1]

    made.sampler.sample = sample  # type: ignore[method-assign]
    made.rewards.scorer = scorer
    return rollouts, scores


def forward(policy: Policy, rollout: Rollout, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy, value of each response token, value after the last), from logits."""
    ids = torch.tensor([rollout.prompt + rollout.response])
    output = policy.model(ids, output_hidden_states=True)
    start = len(rollout.prompt) - 1
    logp = (output.logits[0] / temperature).log_softmax(-1)[start:-1]
    value = torch.zeros(ids.shape[1], dtype=logp.dtype)
    if policy.value_head is not None:
        value = policy.value_head(output.hidden_states[-1][0])[:, 0]
    logprob = logp.gather(1, torch.tensor(rollout.response)[:, None])[:, 0]
    return logprob, -(logp.exp() * logp).sum(-1), value[start:-1], value[-1]


def advantages(
    c: Config, rollouts: list[Rollout], reward: Tensor, old: list[Any]
) -> tuple[list[Tensor], list[Tensor]]:
    found, returns = [], []
    for i, r in enumerate(rollouts):
        q, j, T = i // c.group_size, i % c.group_size, len(r.response)
        group = reward[q]
        if c.advantage == "gae":
            value = [*old[i][2].tolist(), old[i][3].item() if r.truncated else 0.0]
            delta = [c.gamma * value[t + 1] - value[t] for t in range(T)]
            delta[-1] += group[j].item()
            decay = c.gamma * c.gae_lambda
            a = [sum(decay ** (u - t) * delta[u] for u in range(t, T)) for t in range(T)]
            found.append(torch.tensor(a, dtype=torch.float64))
            returns.append(found[-1] + old[i][2])
            continue
        if c.advantage == "leave_one_out":
            relative = group[j] - (group.sum() - group[j]) / (c.group_size - 1)
        else:
            relative = group[j] - group.mean()
            if c.advantage == "group":
                relative = relative / (((group - group.mean()) ** 2).mean().sqrt() + 1e-6)
        found.append(relative.repeat(T))
    if c.whiten:
        flat = torch.cat(found)
        spread = ((flat - flat.mean()) ** 2).mean().sqrt()
        if spread > 1e-9:
            found = [(a - flat.mean()) / spread for a in found]
    return found, returns


def rate(c: Config, step: int) -> float:
    if step <= c.lr_warmup:
        return c.lr * step / c.lr_warmup
    done = (step - 1 - c.lr_warmup) / (c.steps - c.lr_warmup)
    return (
        c.lr
        * {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[c.lr_decay]
    )


def oracle(
    c: Config, policy: Policy, initial: Policy, rollouts: list[Rollout], scores: list[float], step: int
) -> dict[str, Any]:
    """The metrics of the step; ``policy`` is trained."""
    P, G = c.prompts, c.group_size
    with torch.no_grad():
        old = [forward(policy, r, c.temperature) for r in rollouts]
        ref = [forward(initial, r, c.temperature)[0] for r in rollouts]
    score = torch.tensor(scores, dtype=torch.float64).view(P, G)
    cut = torch.tensor([float(r.truncated) for r in rollouts]).view(P, G)
    reward = score - (c.truncation_penalty * cut if c.truncated == "penalise" else 0.0)
    accuracy = (score >= c.threshold).double().mean(1)
    degenerate = (accuracy == 0) | (accuracy == 1)
    tokens = sum(len(r.response) for r in rollouts)
    entropy = sum(o[1].sum().item() for o in old) / tokens
    controller = build_controller(c)
    if controller.target is None:
        controller.anchor(1.0)
    controller.update(entropy, tokens, weight=controller.weight(accuracy).mean(), prompts=P)
    coefficient = controller.coefficient(accuracy)
    if c.degenerate == "advantage_only":
        coefficient = torch.where(degenerate, 0.0, coefficient)
    advantage, returns = advantages(c, rollouts, reward, old)

    def counts(i: int) -> bool:
        masked = c.truncated == "mask" and rollouts[i].truncated
        return not masked and not (c.degenerate == "drop" and bool(degenerate[i // G]))

    def loss_of(i: int) -> tuple[Tensor, Tensor, Tensor]:
        r, a = rollouts[i], advantage[i]
        logprob, H, value, _ = forward(policy, r, c.temperature)
        ratio = (logprob - old[i][0]).exp()
        S = torch.minimum(ratio * a, ratio.clamp(1 - c.clip_low, 1 + c.clip_high) * a)
        if c.dual_clip is not None:
            S = torch.where(a < 0, torch.maximum(S, c.dual_clip * a), S)
        weight = torch.ones_like(S)
        if r.logprob is not None:
            weight = (
                (old[i][0] - torch.tensor(r.logprob, dtype=torch.float64)).exp().clamp(max=c.importance_cap)
            )
        d = ref[i] - logprob
        loss = -weight * S - coefficient[i // G] * H + c.kl_coef * (d.exp() - d - 1)
        if c.advantage != "gae":
            return loss, torch.zeros_like(loss), ratio
        clipped = old[i][2] + (value - old[i][2]).clamp(-c.value_clip, c.value_clip)
        return loss, 0.5 * torch.maximum((value - returns[i]) ** 2, (clipped - returns[i]) ** 2), ratio

    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate(c, step), weight_decay=c.weight_decay, eps=1e-4)
    losses, norms, value_losses, ratios = [], [0.0], [], [0.0]
    for epoch in range(c.epochs):
        order = [i for i in range(P * G) if counts(i)]
        random.Random(f"minibatches {c.seed} {step} {epoch}").shuffle(order)
        for k in range(c.minibatches):
            rows = order[len(order) * k // c.minibatches : len(order) * (k + 1) // c.minibatches]
            if not rows:
                continue
            n = sum(len(rollouts[i].response) for i in rows)
            total, value_total = torch.zeros(()), 0.0
            for i in rows:
                loss, value_loss, ratio = loss_of(i)
                length = len(rollouts[i].response)
                share = {"token_mean": 1 / n, "sequence_mean": 1 / len(rows) / length}
                share["dr_grpo"] = 1 / len(rows) / c.max_new_tokens
                total = total + share[c.aggregation] * (loss + c.value_coef * value_loss).sum()
                value_total += share[c.aggregation] * value_loss.sum().item()
                ratios.append(ratio.max().item())
            grads = torch.autograd.grad(total, trained, allow_unused=True)
            norm = math.sqrt(sum(g.pow(2).sum().item() for g in grads if g is not None))
            for p, g in zip(trained, grads):
                p.grad = None if g is None else g * min(1.0, c.max_grad_norm / (norm + 1e-6))
            optimizer.step()
            losses.append(total.item())
            value_losses.append(value_total)
            norms.append(norm)
    updates = max(len(losses), 1)
    kl = torch.cat([(b - o[0]).exp() - (b - o[0]) - 1 for b, o in zip(ref, old)]).mean().item()
    return {
        "loss": sum(losses) / updates,
        "value_loss": sum(value_losses) / updates,
        "grad_norm": max(norms),
        "ratio_max": max(ratios) if losses else 1.0,
        "entropy": entropy,
        "accuracy": accuracy.mean().item(),
        "coefficient": coefficient.mean().item(),
        "reward": reward.mean().item(),
    } | ({"kl": kl} if c.kl_coef > 0 else {})


@pytest.mark.parametrize("seed", range(16))
def test_a_step_is_the_oracles(seed: int, cache: Path, tmp_path: Path) -> None:
    draw = random.Random(seed)
    fields = draw_fields(draw)
    made = trainer(
        small(cache, tmp_path, prompts=3, group_size=3, max_new_tokens=5, steps=10, seed=seed, **fields)
    )
    initial = copy.deepcopy(made.policy).double().cpu()
    torch.manual_seed(seed)
    with torch.no_grad():  # away from the initial model, so that the KL says something
        for p in made.policy.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    for group in made.learner.optimizer.param_groups:
        group["eps"] = 1e-4  # an entry whose gradient is rounding error moves no farther than that
    policy = copy.deepcopy(made.policy).double().cpu()
    rollouts, scores = script(made, draw)
    step = draw.randint(1, 8)
    metrics = made.step(step)
    expected = oracle(made.config, policy, initial, rollouts, scores, step)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=2e-3, abs=1e-4), (name, fields)
    largest = rate(made.config, step) * made.config.epochs * made.config.minibatches
    for mine, theirs in zip(made.policy.parameters(), policy.parameters()):
        assert (mine.double().cpu() - theirs).abs().max() < 0.03 * largest + 1e-5, fields
