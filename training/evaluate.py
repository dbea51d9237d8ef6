"""pass@1 and pass@k on held-out problems, by difficulty."""

import math
import random
from typing import Any

import torch

from aer_fast import token_stats
from training.config import Config
from training.rollout import sample
from training.tasks import CLASSES, reward, sample_problem


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Probability that one of k draws without replacement is right: 1 - C(n - c, k) / C(n, k).

    The unbiased estimator of Chen et al. 2021 (2107.03374).
    """
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


@torch.no_grad()
def evaluate(model: Any, tokenizer: Any, config: Config) -> dict[str, float]:
    """{"entropy": token-mean in nats, "pass@1 <class>": ..., "pass@k <class>": ...}.

    The problems are the same for every model; the state of torch's random generator is left as it was.
    """
    state = torch.get_rng_state()
    torch.manual_seed(config.seed + 12345)
    rng = random.Random(12345)
    model.eval()
    result: dict[str, float] = {}
    entropy, tokens = 0.0, 0
    for difficulty, name in enumerate(CLASSES):
        problems = [
            sample_problem(rng, held_out=True, difficulty=difficulty) for _ in range(config.eval_prompts)
        ]
        rollouts = sample(model, tokenizer, problems, config.eval_samples, config.temperature, reward)
        right = rollouts.reward.sum(-1).long().tolist()
        for k in (1, config.k):
            scores = [pass_at_k(config.eval_samples, c, k) for c in right]
            result[f"pass@{k} {name}"] = sum(scores) / len(scores)
        logits = model(rollouts.ids).logits
        stats = token_stats(logits, rollouts.target, temperature=config.temperature)
        entropy += stats.entropy.sum().item()
        tokens += rollouts.tokens
    torch.set_rng_state(state)
    return {"entropy": entropy / tokens} | result
