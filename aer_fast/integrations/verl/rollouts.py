"""What the controller reads of a batch, and what it writes for each token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def is_padding(tags: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Whether each row is nobody's rollout: verl fills a batch up with such rows, and marks them.

    Args:
        tags: of every row.

    Returns:
        True for such rows, by row.
    """
    return [bool(tag.get("is_padding", False)) for tag in tags]


def entropy_sum(entropy: Tensor, mask: Tensor, padding: Sequence[bool]) -> tuple[float, int]:
    """The sum of the entropy over the response tokens of real rollouts, and the number of these tokens.

    Args:
        entropy: [rows, tokens], nested or padded.
        mask: as entropy, verl's response_mask: 0 for what the policy did not write.
        padding: [rows], true for rows that do not count.

    Returns:
        (sum, number).
    """
    total, count = 0.0, 0
    for row, kept, skip in zip(entropy.unbind(), mask.unbind(), padding, strict=True):
        if not skip:
            values = row[kept.bool()].double()
            total, count = total + values.sum().item(), count + values.numel()
    return total, count


def final_rows(keys: Sequence[str], padding: Sequence[bool]) -> list[int]:
    """The last output of each session, by row.

    An agent loop may return several outputs for one rollout, and the last one carries its score. A key is
    {uid}_{session}_{index}; any other key is a session of its own.

    Args:
        keys: of every row.
        padding: of every row, true for rows that do not count.

    Returns:
        The rows.
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
    """The scores of rollouts, by prompt.

    Args:
        uids: of every row.
        scores: of one row per rollout.

    Returns:
        The prompts, and their scores [prompts, rollouts], filled up with NaN.
    """
    groups: dict[str, list[float]] = defaultdict(list)
    for row, score in scores.items():
        groups[uids[row]].append(score)
    # float32, as verl's scores are: 0.7 is less than 0.7 in them
    rows = [torch.tensor(group, dtype=torch.float32) for group in groups.values()] or [torch.zeros(0)]
    return list(groups), pad_sequence(rows, batch_first=True, padding_value=torch.nan)[: len(groups)]


def spread(coefficients: Sequence[float], mask: Tensor) -> Tensor:
    """[rows, tokens], nested: the coefficient of a row for each token of its response.

    Args:
        coefficients: of every row.
        mask: [rows, tokens], nested or padded; only the lengths of its rows count.
    """
    rows = [torch.full((len(row),), value) for value, row in zip(coefficients, mask.unbind(), strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)
