"""What the controller reads of a batch, and what it writes for each token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


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


def by_prompt(uids: Sequence[str], scores: Mapping[int, float]) -> tuple[list[str], Tensor]:
    """The prompts, and the scores of their rollouts [prompts, rollouts], filled up with NaN.

    Args:
        uids: of every row.
        scores: of one row per rollout.
    """
    groups: dict[str, list[float]] = defaultdict(list)
    for row, score in scores.items():
        groups[uids[row]].append(score)
    # float32, as verl's scores are: 0.7 is less than 0.7 in them
    rows = [torch.tensor(group, dtype=torch.float32) for group in groups.values()] or [torch.zeros(0)]
    return list(groups), pad_sequence(rows, batch_first=True, padding_value=torch.nan)[: len(groups)]


def spread(coefficients: Sequence[float], mask: Tensor) -> Tensor:
    """[rows, tokens], nested: the coefficient of a row for each token of its response."""
    rows = [torch.full((len(row),), value) for value, row in zip(coefficients, mask.unbind(), strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)
