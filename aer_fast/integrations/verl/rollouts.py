"""What the controller reads of a batch, and what it writes for each token."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from aer_fast.integrations._difficulty import BINS


def is_padding(tags: Sequence[Mapping[str, Any]]) -> list[bool]:
    """verl fills a batch up with rows that are nobody's rollout, and marks them."""
    return [bool(tag.get("is_padding", False)) for tag in tags]


def entropy_sum(entropy: Tensor, mask: Tensor, padding: Sequence[bool]) -> tuple[float, int]:
    """Sum of the entropy over the response tokens of real rollouts, and their number.

    Args:
        entropy: [rows, tokens], nested or padded.
        mask: as entropy, verl's response_mask: 0 for what the policy did not write.
        padding: [rows], whose rows do not count.
    """
    total, count = 0.0, 0
    for row, kept, skip in zip(entropy.unbind(), mask.unbind(), padding, strict=True):
        if not skip:
            values = row[kept.bool()].double()
            total, count = total + values.sum().item(), count + values.numel()
    return total, count


def final_rows(keys: Sequence[str], padding: Sequence[bool]) -> list[int]:
    """The last output of each session, by row.

    A key is {uid}_{session}_{index}: an agent loop may return several outputs for one rollout, and the last
    one carries its score. Any other key is a session of its own.
    """
    last: dict[str, tuple[int, int]] = {}
    for row, (key, skip) in enumerate(zip(keys, padding, strict=True)):
        if skip:
            continue
        parts = key.rsplit("_", 2)
        session, index = (f"{parts[0]}_{parts[1]}", int(parts[2])) if len(parts) == 3 else (key, 0)
        if session not in last or index > last[session][0]:
            last[session] = (index, row)
    return [row for _, row in last.values()]


def accuracies(uids: Sequence[str], scores: Mapping[int, float], threshold: float) -> dict[str, float]:
    """Share of the rollouts of each prompt whose score is at least the threshold.

    Args:
        uids: of every row.
        scores: of one row per rollout.
        threshold: as in `Settings`.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for row, score in scores.items():  # scores are float32, in which 0.7 is less than 0.7
        right[uids[row]].append(bool(torch.tensor(score).float() >= torch.tensor(threshold).float()))
    return {uid: sum(each) / len(each) for uid, each in right.items()}


def spread(coefficients: Sequence[float], mask: Tensor) -> Tensor:
    """[rows, tokens], nested: the coefficient of a row for each token of its response."""
    rows = [torch.full((len(row),), value) for value, row in zip(coefficients, mask.unbind(), strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def by_difficulty(accuracy: Mapping[str, float], coefficient: Mapping[str, float]) -> dict[str, float]:
    """Mean coefficient of the hard, medium and easy prompts; an empty bin is left out."""
    means = {}
    for name, (low, high) in BINS.items():
        values = [coefficient[uid] for uid, share in accuracy.items() if low <= share < high]
        if values:
            means[name] = sum(values) / len(values)
    return means
