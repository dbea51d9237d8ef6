"""Sequences as the model reads them: concatenated without padding, or padded; and cut into micro-batches.

Everything about tokens is flat: one entry for each response token, sequence after sequence. Where the
sequences lie in the model's input is known to `Batch` alone, so that packed and padded differ nowhere else.
"""

from collections.abc import Sequence
from itertools import accumulate, groupby
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


class Part(NamedTuple):
    """A run of tokens of a packed row: a whole sequence; a prompt that several responses share; or one of
    these responses, which follow it."""

    length: int
    prompt: int = 0  # of a response: tokens of the shared prompt that it goes on from


class Batch(NamedTuple):
    """Some sequences in the model's input [R, T]: R = 1 if packed, one row each if padded."""

    ids: Tensor  # [R, T]
    position_ids: Tensor  # [R, T], restarted for each sequence
    attention_mask: Tensor | None  # [R, T]; None if packed
    parts: tuple[Part, ...] | None  # of a packed row
    boundaries: Tensor  # [b + 1] int32, where the sequences of a packed row begin, and its end
    longest: int  # tokens of the longest sequence
    where: Tensor  # [n], positions in [0, R · T) that predict a response token
    target: Tensor  # [n], these tokens
    last: Tensor  # [b], the position of each sequence's last token


def make_batch(
    rollouts: list[Rollout], *, packing: bool, pad: int, device: torch.device, share: bool = False
) -> Batch:
    """Lay out sequences; none at all give one padding token, so that every rank can run the model.

    With ``share`` a prompt that neighbours have in common stands in a packed row once: for a model whose
    attention knows of it (`attention.packed_sdpa`).
    """
    parts: tuple[Part, ...] | None = None
    if packing or not rollouts:
        row, positions, parts, where, last = _pack(rollouts, pad, share=share)
        rows, position_ids, attended = [row], [positions], None
        lengths = stretches(parts)
    else:
        sequences = [rollout.prompt + rollout.response for rollout in rollouts]
        lengths = [len(sequence) for sequence in sequences]
        width = max(lengths)
        rows = [sequence + [pad] * (width - len(sequence)) for sequence in sequences]
        position_ids = [list(range(width))] * len(lengths)
        attended = torch.tensor([[t < length for t in range(width)] for length in lengths], device=device)
        last = [k * width + length - 1 for k, length in enumerate(lengths)]
        where = [
            [k * width + t - 1 for t in range(len(rollout.prompt), rollout.length)]
            for k, rollout in enumerate(rollouts)
        ]
    target = [token for rollout in rollouts for token in rollout.response]
    predict = [place for places in where for place in places]
    flat = [torch.tensor(x, dtype=torch.long, device=device) for x in (predict, target, last)]
    ids, at = (torch.tensor(x, device=device) for x in (rows, position_ids))
    boundaries = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return Batch(ids, at, attended, parts, boundaries, max(lengths), *flat)


def _pack(
    rollouts: list[Rollout], pad: int, *, share: bool
) -> tuple[list[int], list[int], tuple[Part, ...], list[list[int]], list[int]]:
    """A packed row: tokens, positions, parts; of each sequence, the places that predict a response token and
    the place of the last token.

    The longest response stands right after a shared prompt: what a model takes for one sequence is then as
    long as any.
    """
    row: list[int] = []
    positions: list[int] = []
    parts: list[Part] = []
    where: list[list[int]] = [[] for _ in rollouts]
    last = [0] * len(rollouts)

    def put(tokens: list[int], first: int, prompt: int = 0) -> None:
        row.extend(tokens)
        positions.extend(range(first, first + len(tokens)))
        parts.append(Part(len(tokens), prompt))

    together = groupby(range(len(rollouts)), lambda k: rollouts[k].prompt if share else k)
    for members in [list(members) for _, members in together]:
        order = sorted(members, key=lambda k: -len(rollouts[k].response))
        prompt, longest = rollouts[order[0]][:2]
        several = len(order) > 1 and bool(rollouts[order[1]].response)
        end = len(row) + len(prompt) - 1  # where the prompt ends
        put(prompt if several else prompt + longest, 0)
        for k in order:
            response = rollouts[k].response
            if several and response:
                put(response, len(prompt), len(prompt))
            last[k] = len(row) - 1 if response else end
            where[k] = [end, *range(len(row) - len(response), len(row) - 1)][: len(response)]
    if not rollouts:
        put([pad], 0)
    return row, positions, tuple(parts), where, last


def stretches(parts: Sequence[Part]) -> list[int]:
    """The lengths of what lies between two restarts of the positions of a packed row: its sequences, where no
    prompt is shared; a shared prompt and the response right after it are one."""
    lengths: list[int] = []
    for before, part in zip([None, *parts], parts):
        if before is not None and part.prompt and not before.prompt:
            lengths[-1] += part.length
        else:
            lengths.append(part.length)
    return lengths


def micro_batches(
    rollouts: Sequence[Rollout], tokens: int, *, packing: bool, share: bool = False
) -> list[list[int]]:
    """Cut sequences, in their order, into runs of at most ``tokens`` tokens as `make_batch` lays them out
    (padding counted, a shared prompt once), or of one."""
    batches: list[list[int]] = []
    row = longest = 0  # tokens of the last run, packed; of its longest sequence
    for index, rollout in enumerate(rollouts):
        spared = bool(index) and share and rollout.prompt == rollouts[index - 1].prompt
        more = len(rollout.response) if spared else rollout.length
        widest = max(longest, rollout.length)
        size = row + more if packing else widest * (len(batches[-1]) + 1 if batches else 1)
        if batches and size <= tokens:
            batches[-1].append(index)
            row, longest = row + more, widest
        else:
            batches.append([index])
            row = longest = rollout.length
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
