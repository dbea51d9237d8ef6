"""From rewards to advantages.

P prompts, G rollouts of each; rewards are [P, G].
"""

import torch
from torch import Tensor


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
