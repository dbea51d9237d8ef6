"""pass@k, maj@k and entropy of sampled responses, by difficulty class.

P problems, S samples of each.
"""

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from training.tasks import Problem

Result = dict[str, Any]


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Probability that one of k draws without replacement is right: 1 - C(n - c, k) / C(n, k).

    The unbiased estimator of Chen et al. 2021 (2107.03374). Raises ValueError unless 1 <= k <= samples and
    0 <= right <= samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k must be within [1, samples={samples}], got {k}")
    if not 0 <= right <= samples:
        raise ValueError(f"right must be within [0, samples={samples}], got {right}")
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


def variety(answers: list[str], samples: int) -> tuple[Tensor, Tensor]:
    """Of each prompt: how many of its answers differ, [P], and their entropy in nats, [P].

    ``answers`` are those of P prompts, ``samples`` each.
    """
    groups = [Counter(answers[k : k + samples]).values() for k in range(0, len(answers), samples)]
    distinct = [float(len(counts)) for counts in groups]
    entropy = [sum(n / samples * math.log(samples / n) for n in counts) for counts in groups]
    return torch.tensor(distinct, dtype=torch.float64), torch.tensor(entropy, dtype=torch.float64)


def summarise(
    problems: list[Problem],
    classes: tuple[str, ...],
    score: Tensor,
    votes: list[str],
    entropy: list[Tensor],
    *,
    threshold: float,
    ks: tuple[int, ...],
) -> Result:
    """{"overall": {...}, "classes": {name: {...}}}: pass@k, maj@k, entropy, right samples of each prompt.

    Args:
        problems: P of them.
        classes: difficulty classes, in the order of the result.
        score: [P, S]; a sample is right from ``threshold`` on.
        votes: of the P · S samples, what `Task.vote` finds in them.
        entropy: of the P · S samples, at each of their tokens.
        ks: of pass@k and maj@k, up to S.
    """
    right, samples = score >= threshold, score.shape[1]

    def summary(places: list[int]) -> Result:
        rows = [i for p in places for i in range(p * samples, (p + 1) * samples)]
        entropies = torch.cat([entropy[i] for i in rows]).double()
        counts = [int(right[p].sum()) for p in places]
        result: Result = {"entropy": entropies.mean().item(), "score": score[places].mean().item()}
        for k in ks:
            result[f"pass@{k}"] = sum(pass_at_k(samples, c, k) for c in counts) / len(counts)
        for k in ks:
            runs = [(votes[p * samples : (p + 1) * samples], right[p].tolist()) for p in places]
            result[f"maj@{k}"] = sum(maj_at_k(*run, k) for run in runs) / len(runs)
        return result | {"prompts": len(places), "samples": samples, "right": counts}

    labels = [problem.label for problem in problems]
    return {
        "overall": summary(list(range(len(problems)))),
        "classes": {
            name: summary([p for p, x in enumerate(labels) if x == name])
            for name in classes
            if name in labels
        },
    }
