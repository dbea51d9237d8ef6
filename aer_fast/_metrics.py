"""Public operation: the metrics of several calls of a loss, merged to those of one."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from aer_fast._exchange import exchange_device
from aer_fast._validation import check_device, readable

Metrics = Sequence[Mapping[str, Tensor | float]]

# What the losses return, see `ppo_metrics` and `distill_metrics` of `reference`; means but for two.
METRICS = (
    "tokens",
    "entropy",
    "clip_fraction_low",
    "clip_fraction_high",
    "clip_fraction",
    "approx_kl",
    "ratio_max",
    "top1_prob",
    "active_fraction",
    "divergence",
    "ref_kl",
    "ref_kl_k3",
)
SUMMED, LARGEST = "tokens", "ratio_max"

# What the given values say of the dtype of the result; of all ranks the largest counts.
NOTHING, NUMBERS, SINGLE, DOUBLE = range(4)
DTYPES = {
    NOTHING: torch.float32,
    NUMBERS: torch.float64,
    SINGLE: torch.float32,
    DOUBLE: torch.float64,
}


class Sums(NamedTuple):
    """What can be added up of some metrics."""

    names: tuple[str, ...]  # K of METRICS, the first one "tokens"
    kind: int  # of DTYPES
    values: Tensor  # [K] float64: the tokens, the largest, of means Σ tokens · mean


def merge_metrics(metrics: Metrics, group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """The metrics of several calls of a loss, merged to those of one call on all of their tokens.

    ``tokens`` is summed. ``ratio_max`` is the largest. Every other metric is a mean weighted by tokens, and
    ``clip_fraction`` stays the sum of its two parts. Sums are made in float64: up to rounding, it does not
    matter how the calls are cut into micro-batches, ranks and merges of merges.

    Args:
        metrics: a sequence of the ``metrics`` of calls of a loss, any number of them, all with the same keys.
            A number may stand in the place of a tensor. A call without a token contributes nothing.
        group: process group to merge over, too. All its ranks must call, each with what it has, be that an
            empty list. They exchange a few numbers, once. None: this process alone.

    Returns:
        A dict with the keys given, of detached 0-d tensors on the device of the given ones. They are float64
        if a given tensor is, or if no given value is a floating-point tensor; else float32, which counts
        tokens exactly up to 2²⁴. With ``group`` all ranks get the same bits. Without it the host does not
        wait for the device.

        If nothing is given on any rank the result is {"tokens": 0}: the metrics of the loss are not known
        then. Look at ``tokens`` before reading a mean.

    Raises:
        ValueError: if metrics is no sequence of dicts; ``tokens`` is missing; a key is no metric of a loss;
            the dicts have different keys; a value is no number or 0-d tensor; or a number of tokens is not
            finite and >= 0 (not read on a GPU). With ``group`` all ranks raise: those at fault say why, the
            others on which ranks.

    Examples:
        >>> first = {"tokens": torch.tensor(3.0), "entropy": torch.tensor(1.0)}
        >>> second = {"tokens": torch.tensor(1.0), "entropy": torch.tensor(2.0)}
        >>> merge_metrics([first, second])
        {'tokens': tensor(4.), 'entropy': tensor(1.2500)}
    """
    if group is None:
        sums = _sums(metrics)
        return _means(sums, sums.values.device)
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group must be a process group with this rank in it, or None, got {group!r}")
    return _over_ranks(metrics, group)


def _over_ranks(metrics: Metrics, group: dist.ProcessGroup) -> dict[str, Tensor]:
    device = home = exchange_device(group)
    fault: Exception | None = None
    kind, mine = NOTHING, dict[str, float]()
    try:
        names, kind, sums = _sums(metrics)
        if kind != NOTHING:
            mine, home = dict(zip(names, sums.tolist())), sums.device
    except Exception as error:  # whatever it is, it is raised once the other ranks know
        fault = error
    row = [float(fault is not None), float(kind)]
    row += [float(name in mine) for name in METRICS] + [mine.get(name, 0.0) for name in METRICS]
    sent = torch.tensor(row, dtype=torch.float64, device=device)
    rows = [torch.empty_like(sent) for _ in range(group.size())]
    dist.all_gather(rows, sent, group=group)
    if fault is not None:
        raise fault
    # the rest on the host, from the same numbers in the same order: the same bits on every rank
    K = len(METRICS)
    table = torch.stack(rows).cpu()
    flags, kinds, given, parts = torch.split(table, [1, 1, K, K], dim=1)
    if flags.any():
        ranks = ", ".join(str(rank) for rank, flag in enumerate(flags) if flag)
        raise ValueError(f"metrics must be valid on every rank of the group, and are not on rank {ranks}")
    names = _common_names(given)
    own = {LARGEST: parts.amax(0)}
    total = functools.reduce(torch.add, parts)
    values = torch.stack([own.get(name, total)[k] for k, name in enumerate(METRICS) if name in names])
    return _means(Sums(names, int(kinds.amax()), values), home)


def _common_names(given: Tensor) -> tuple[str, ...]:
    """Of the ranks that have metrics; given [ranks, METRICS] is 1 where a rank has one."""
    names = [tuple(name for name, there in zip(METRICS, row) if there) for row in given]
    having = [rank for rank, its in enumerate(names) if its]
    for rank in having:
        if names[rank] != names[having[0]]:
            raise ValueError(
                "metrics must have the same keys on every rank of the group, got"
                f" {list(names[having[0]])} on rank {having[0]} and {list(names[rank])} on rank {rank}"
            )
    return names[having[0]] if having else METRICS[:1]


def _sums(metrics: Metrics) -> Sums:
    """Of the metrics of this process; nothing waits for the device."""
    if not isinstance(metrics, Sequence) or isinstance(metrics, (str, bytes)):
        raise ValueError(f"metrics must be a sequence of dicts, got {type(metrics).__name__}")
    if len(metrics) == 0:
        return Sums(METRICS[:1], NOTHING, torch.zeros(1, dtype=torch.float64))
    for k, one in enumerate(metrics):
        _check_keys(k, one, metrics[0])
    names = tuple(name for name in METRICS if name in metrics[0])
    given = {f"metrics[{k}][{name!r}]": one[name] for k, one in enumerate(metrics) for name in names}
    for name, value in given.items():
        _check_value(name, value)
    rows = _stacked(given).view(len(metrics), len(names))
    tokens = rows[:, :1]
    if readable(tokens):
        for k, count in enumerate(tokens[:, 0].tolist()):
            if not 0 <= count < math.inf:
                raise ValueError(f"metrics[{k}]['tokens'] must be a finite number >= 0, got {count}")
    rows = rows.where(tokens != 0, 0.0)
    own = {SUMMED: rows.sum(0), LARGEST: rows.amax(0)}
    weighted = (rows * tokens).sum(0)
    values = torch.stack([own.get(name, weighted)[k] for k, name in enumerate(names)])
    return Sums(names, _kind(given.values()), values)


def _means(sums: Sums, device: torch.device) -> dict[str, Tensor]:
    """What the sums mean, on a device."""
    tokens = sums.values[0]
    means = sums.values / tokens.where(tokens > 0, 1.0)
    picked = [(sums.values if name in (SUMMED, LARGEST) else means)[k] for k, name in enumerate(sums.names)]
    merged = dict(zip(sums.names, torch.stack(picked).to(device, DTYPES[sums.kind]).unbind()))
    if {"clip_fraction", "clip_fraction_low", "clip_fraction_high"} <= merged.keys():
        merged["clip_fraction"] = merged["clip_fraction_low"] + merged["clip_fraction_high"]
    return merged


def _check_keys(k: int, one: object, first: Mapping[str, object]) -> None:
    if not isinstance(one, Mapping):
        raise ValueError(f"metrics[{k}] must be a dict, got {type(one).__name__}")
    if unknown := [name for name in one if name not in METRICS]:
        raise ValueError(f"metrics[{k}] has unknown keys {unknown}, expected some of {list(METRICS)}")
    if SUMMED not in one:
        raise ValueError(f"metrics[{k}] must have the key {SUMMED!r}, got {list(one)}")
    if one.keys() != first.keys():
        raise ValueError(f"metrics[{k}] must have the keys of metrics[0], {list(first)}, got {list(one)}")


def _check_value(name: str, value: object) -> None:
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.is_complex() or value.dtype == torch.bool:
            got = f"{tuple(value.shape)} {value.dtype}"
            raise ValueError(f"{name} must be a number or a 0-d tensor of numbers, got {got}")
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a number or a 0-d tensor, got {value!r}")


def _stacked(given: Mapping[str, Tensor | float]) -> Tensor:
    """[len(given)], float64, on the device of those that are on one, if any is, else on the CPU."""
    tensors = {name: x.detach() for name, x in given.items() if isinstance(x, Tensor)}
    there = [x for x in tensors.values() if x.device.type != "cpu"]
    for name, x in tensors.items():
        if there and x.device.type != "cpu":
            check_device(name, x, there[0])
    device = there[0].device if there else torch.device("cpu")

    def placed(name: str) -> Tensor:
        if name in tensors and tensors[name].device == device:
            return tensors[name]
        try:  # filled, not copied: a copy would wait for the device
            return torch.full((), float(tensors.get(name, given[name])), dtype=torch.float64, device=device)
        except OverflowError:
            raise ValueError(f"{name} must be a number that float64 can hold, got {given[name]!r}") from None

    parts = [placed(name) for name in given]
    if len({x.dtype for x in parts}) > 1:  # stacked as they are, integers would become float32
        parts = [x.double() for x in parts]
    return torch.stack(parts).double()


def _kind(values: Iterable[Tensor | float]) -> int:
    floating = {x.dtype for x in values if isinstance(x, Tensor) and x.is_floating_point()}
    return DOUBLE if torch.float64 in floating else SINGLE if floating else NUMBERS
