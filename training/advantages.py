"""From rewards to what each response token counts: its advantage, and its weight in the mean.

P prompts, G rollouts of each; rewards are [P, G].
"""

import torch
from torch import Tensor

from training.batch import Rollout
from training.config import Config


def token_advantages(
    config: Config, rollouts: list[Rollout], reward: Tensor, old: list[dict[str, Tensor]]
) -> list[Tensor]:
    """Of each response token; with GAE the returns are noted in ``old``, too."""
    if config.advantage == "gae":
        found = []
        for rollout, total, stats in zip(rollouts, reward.flatten().tolist(), old):
            after = stats["final_value"].item() if rollout.truncated else 0.0
            a = gae(stats["value"], total, after, gamma=config.gamma, lam=config.gae_lambda)
            stats["returns"] = a + stats["value"]
            found.append(a)
    else:
        if config.advantage == "leave_one_out":
            relative = leave_one_out(reward)
        else:
            relative = group_relative(reward, scale=config.advantage == "group")
        found = [torch.full_like(stats["logprob"], a) for stats, a in zip(old, relative.flatten().tolist())]
    return whiten(found) if config.whiten else found


def group_relative(reward: Tensor, *, scale: bool) -> Tensor:
    """reward - mean of its group, over the group's standard deviation if ``scale``.

    With it GRPO (2402.03300), without it Dr. GRPO (2503.20783). 0 where all rewards of a group are equal.
    """
    centred = reward - reward.mean(-1, keepdim=True)
    equal = reward.amax(-1, keepdim=True) == reward.amin(-1, keepdim=True)
    centred = centred.masked_fill(equal, 0.0)  # no rounding error, which the division would make large
    if not scale:
        return centred
    return centred / (reward.std(-1, keepdim=True, unbiased=False) + 1e-6)


def leave_one_out(reward: Tensor) -> Tensor:
    """reward - mean of the group's other rewards (RLOO, 2402.14740)."""
    others = (reward.sum(-1, keepdim=True) - reward) / (reward.shape[-1] - 1)
    return reward - others


def gae(value: Tensor, reward: float, bootstrap: float, *, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation (1506.02438) of one response, T tokens, rewarded at its end.

        δ_t = r_t + γ V_{t+1} - V_t,   A_t = δ_t + γ λ A_{t+1},   A_T = 0

    Args:
        value: [T], V before each token.
        reward: of the whole response: r of its last token; the others have 0.
        bootstrap: V after the last token: 0 where the response ended, the value there where it was cut.
    """
    values = [*value.tolist(), bootstrap]
    advantages, running = [], 0.0
    for t in reversed(range(value.numel())):
        delta = (reward if t == value.numel() - 1 else 0.0) + gamma * values[t + 1] - values[t]
        running = delta + gamma * lam * running
        advantages.append(running)
    return torch.tensor(advantages[::-1], dtype=value.dtype)


def whiten(advantages: list[Tensor]) -> list[Tensor]:
    """Mean 0 and standard deviation 1 over all tokens of all responses; unchanged where all are equal."""
    flat = torch.cat(advantages)
    deviation = flat.std(unbiased=False)
    if deviation <= 1e-6 * flat.abs().max():
        return advantages
    return [(a - flat.mean()) / deviation for a in advantages]


def clip_cov(
    advantage: Tensor,
    logprob: Tensor,
    old_logprob: Tensor,
    *,
    share: float,
    between: tuple[float, float],
    clip: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    """Which of a minibatch's tokens [n] Clip-Cov drops from the loss (2505.22617; verl's clip_cov).

    cov_t = (A_t - mean A) (ℓ_t - mean ℓ), with the log-probabilities of the policy as it is. Of the tokens
    with cov_t within ``between`` that the ratio's ``clip`` leaves a gradient, max(1, share · n) at random.
    """
    covariance = (advantage - advantage.mean()) * (logprob - logprob.mean())
    ratio = (logprob - old_logprob).exp()
    clipped = (ratio > 1 + clip[1]) & (advantage > 0) | (ratio < 1 - clip[0]) & (advantage < 0)
    eligible = ((covariance > between[0]) & (covariance < between[1]) & ~clipped).nonzero()[:, 0]
    chosen = torch.randperm(eligible.numel(), generator=generator)[: max(1, int(share * advantage.numel()))]
    return torch.zeros_like(clipped).index_fill(0, eligible[chosen], True)


def aggregation(config: Config, lengths: list[int]) -> tuple[list[float], float]:
    """(a weight for each sequence's tokens, denominator) of a minibatch with responses of these lengths."""
    if config.aggregation == "token_mean":
        return [1.0] * len(lengths), float(sum(lengths))
    if config.aggregation == "sequence_mean":
        return [1.0 / length for length in lengths], float(len(lengths))
    return [1.0] * len(lengths), float(len(lengths) * config.max_new_tokens)
