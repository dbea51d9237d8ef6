"""Sequences as the model reads them: concatenated without padding, or padded; and cut into micro-batches.

Everything about tokens is flat: one entry for each response token, sequence after sequence. Where the
sequences lie in the model's input is known to `Batch` alone, so that packed and padded differ nowhere else.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Rollout(NamedTuple):
    """One sampled response."""

    prompt: list[int]
    response: list[int]  # up to and including the first end token
    truncated: bool  # no end token within max_new_tokens
    logprob: list[float] | None = None  # by the sampler, if it says

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response)


def cut(prompt: list[int], generated: list[int], ends: list[int]) -> Rollout:
    """What was sampled of a generated row: up to and including the first end token, whatever padding is."""
    for place, token in enumerate(generated):
        if token in ends:
            return Rollout(prompt, generated[: place + 1], truncated=False)
    return Rollout(prompt, generated, truncated=True)


class Batch(NamedTuple):
    """Some sequences in the model's input [R, T]: R = 1 if packed, one row each if padded."""

    ids: Tensor  # [R, T]
    position_ids: Tensor  # [R, T], restarted for each sequence
    attention_mask: Tensor | None  # [R, T]; None if packed
    boundaries: Tensor  # [b + 1] int32, where the sequences of a packed row begin, and its end
    longest: int  # tokens of the longest sequence
    where: Tensor  # [n], positions in [0, R · T) that predict a response token
    target: Tensor  # [n], these tokens
    last: Tensor  # [b], the position of each sequence's last token


def make_batch(rollouts: list[Rollout], *, packing: bool, pad: int, device: torch.device) -> Batch:
    """Lay out sequences; none at all give one padding token, so that every rank can run the model."""
    sequences = [rollout.prompt + rollout.response for rollout in rollouts]
    lengths = [len(sequence) for sequence in sequences]
    if packing or not sequences:
        rows = [[token for sequence in sequences for token in sequence] or [pad]]
        starts = [0, *accumulate(lengths)][: len(lengths)]
        positions = [[t for length in lengths for t in range(length)] or [0]]
        attended = None
    else:
        width = max(lengths)
        rows = [sequence + [pad] * (width - len(sequence)) for sequence in sequences]
        starts = [k * width for k in range(len(lengths))]
        positions = [list(range(width))] * len(lengths)
        attended = torch.tensor([[t < length for t in range(width)] for length in lengths], device=device)
    where = [
        start + t - 1
        for start, rollout in zip(starts, rollouts)
        for t in range(len(rollout.prompt), rollout.length)
    ]
    target = [token for rollout in rollouts for token in rollout.response]
    last = [start + length - 1 for start, length in zip(starts, lengths)]
    flat = [torch.tensor(x, dtype=torch.long, device=device) for x in (where, target, last)]
    ids, position_ids = (torch.tensor(x, device=device) for x in (rows, positions))
    tokens = lengths or [1]
    boundaries = torch.tensor([0, *accumulate(tokens)], dtype=torch.int32, device=device)
    return Batch(ids, position_ids, attended, boundaries, max(tokens), *flat)


def micro_batches(lengths: list[int], tokens: int, packing: bool) -> list[list[int]]:
    """Cut sequences, in their order, into runs of at most ``tokens`` tokens (padding counted), or of one."""
    batches: list[list[int]] = []
    for index, length in enumerate(lengths):
        if batches:
            longest = max(length, *(lengths[k] for k in batches[-1]))
            together = sum(lengths[k] for k in batches[-1]) + length
            size = together if packing else longest * (len(batches[-1]) + 1)
            if size <= tokens:
                batches[-1].append(index)
                continue
        batches.append([index])
    return batches


def shares(lengths: list[int], ranks: int) -> list[list[int]]:
    """Deal sequences to ranks, the longest first to the rank with the fewest tokens; each share in order."""
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for index in sorted(range(len(lengths)), key=lambda k: (-lengths[k], k)):
        rank = load.index(min(load))
        dealt[rank].append(index)
        load[rank] += lengths[index]
    return [sorted(share) for share in dealt]
