"""merge_metrics: what several calls of a loss returned, as one call on all of their tokens would."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from aer_fast import linear_token_loss, merge_metrics, ppo_loss
from aer_fast._exchange import exchange_device

N = 24
# every metric is a sum of at most N numbers >= 0, divided: so many roundings on either side
ROUNDING = 2 * (N + 4) * torch.finfo(torch.float64).eps


def calls(cuts: list[int], dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    """The metrics of `ppo_loss` on the same N tokens, in micro-batches between these cuts."""
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(N, 11, dtype=dtype, generator=generator)
    target = torch.randint(11, (N,), generator=generator)
    old_logprob = -3 + torch.randn(N, dtype=dtype, generator=generator)
    advantage = torch.randn(N, dtype=dtype, generator=generator)
    mask = torch.rand(N, generator=generator) < 0.8
    mask[4:8] = False
    found = []
    for first, end in zip([0, *cuts], [*cuts, N]):
        rows = slice(first, end)
        out = ppo_loss(logits[rows], target[rows], old_logprob[rows], advantage[rows], mask[rows])
        found.append(out.metrics)
    return found


def assert_close(merged: Mapping[str, Tensor], expected: Mapping[str, Tensor], rounding: float) -> None:
    assert list(merged) == list(expected)
    for name, value in merged.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=rounding, abs=0), name


def test_by_hand() -> None:
    first = {"tokens": 3.0, "entropy": 1.0, "clip_fraction_low": 1 / 4, "clip_fraction_high": 1 / 2}
    second = {"tokens": 1.0, "entropy": 2.0, "clip_fraction_low": 3 / 4, "clip_fraction_high": 0.0}
    first |= {"clip_fraction": 3 / 4, "approx_kl": 4.0, "ratio_max": 1.5, "top1_prob": 1 / 2}
    second |= {"clip_fraction": 3 / 4, "approx_kl": 8.0, "ratio_max": 1.25, "top1_prob": 1.0}
    first, second = first | {"active_fraction": 1.0}, second | {"active_fraction": 0.0}
    merged = merge_metrics([first, second])
    assert {name: value.item() for name, value in merged.items()} == {
        "tokens": 4.0,
        "entropy": 1.25,
        "clip_fraction_low": 3 / 8,
        "clip_fraction_high": 3 / 8,
        "clip_fraction": 3 / 4,
        "approx_kl": 5.0,
        "ratio_max": 1.5,
        "top1_prob": 5 / 8,
        "active_fraction": 3 / 4,
    }
    assert merge_metrics([second, first]) == merged
    assert all(value.shape == () for value in merged.values())


@pytest.mark.parametrize("cuts", [[], [12], [1, 2, 3], [5, 5, 20], [0, 4, 8, N, N], list(range(1, N))])
def test_any_cut_is_one_call_on_all_tokens(cuts: list[int]) -> None:
    (whole,) = calls([])
    assert 0 < whole["clip_fraction_low"] < whole["clip_fraction"] < 1 < whole["ratio_max"]
    parts = calls(cuts)
    assert_close(merge_metrics(parts), whole, ROUNDING)
    assert_close(merge_metrics(parts[::-1]), whole, ROUNDING)
    for k in range(len(parts)):  # merges of merges
        halves = [merge_metrics(half) for half in (parts[:k], parts[k:]) if half]
        assert_close(merge_metrics(halves), whole, ROUNDING)


def test_of_any_objective() -> None:
    hidden, weight = torch.randn(N, 4, dtype=torch.float64), torch.randn(11, 4, dtype=torch.float64)
    target, coefficient = torch.randint(11, (N,)), (torch.arange(N) % 3).double()

    def metrics(rows: slice) -> dict[str, Tensor]:
        def objective(logprob: Tensor, entropy: Tensor, coefficient: Tensor) -> Tensor:
            return -coefficient * logprob

        tensors = (hidden[rows].requires_grad_(), weight, target[rows], objective, coefficient[rows])
        return linear_token_loss(*tensors).metrics

    whole = metrics(slice(N))
    assert whole["active_fraction"] == 2 / 3
    parts = [metrics(slice(first, end)) for first, end in ((0, 5), (5, 5), (5, N))]
    assert_close(merge_metrics(parts), whole, ROUNDING)


def test_sums_are_made_in_float64() -> None:
    third = {"tokens": torch.tensor(3.0), "entropy": torch.tensor(1 / 3)}
    merged = merge_metrics([third] * 1000)
    assert merged == {"tokens": 3000.0, "entropy": third["entropy"]}
    many = {"tokens": torch.tensor(2.0**24), "entropy": torch.tensor(0.0)}
    one = {"tokens": torch.tensor(1.0), "entropy": torch.tensor(2.0**24)}
    tokens = 2**24 + 4
    assert merge_metrics([many, *[one] * 4]) == {"tokens": tokens, "entropy": torch.tensor(2**26 / tokens)}


def test_one_call_is_what_it_was() -> None:
    (single,) = calls([], torch.float32)
    assert merge_metrics([single]) == single
    assert all(x.dtype == torch.float32 for x in merge_metrics([single]).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clip_fraction_stays_the_sum_of_its_parts(dtype: torch.dtype) -> None:
    for cut in range(1, N):
        merged = merge_metrics(calls([cut], dtype))
        assert merged["clip_fraction"] == merged["clip_fraction_low"] + merged["clip_fraction_high"]
    alone = [{"tokens": 1.0, "clip_fraction": 0.25}, {"tokens": 1.0, "clip_fraction": 0.75}]
    assert merge_metrics(alone)["clip_fraction"] == 0.5


def test_a_call_without_a_token_contributes_nothing() -> None:
    some = {"tokens": torch.tensor(2.0), "entropy": torch.tensor(0.5), "ratio_max": torch.tensor(0.5)}
    for value in (0.0, 7.0, math.nan, math.inf):
        none = {"tokens": torch.tensor(0.0), "entropy": torch.tensor(value), "ratio_max": torch.tensor(value)}
        assert merge_metrics([none, some, none]) == some
        assert merge_metrics([none]) == {"tokens": 0.0, "entropy": 0.0, "ratio_max": 0.0}


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_shows(value: float) -> None:
    bad = {"tokens": torch.tensor(1.0), "approx_kl": torch.tensor(value), "ratio_max": torch.tensor(value)}
    merged = merge_metrics([{name: torch.tensor(3.0) for name in bad}, bad])
    assert str(merged["approx_kl"].item()) == str(merged["ratio_max"].item()) == str(value)


def test_nothing_given() -> None:
    empty: list[Sequence[dict[str, Tensor]]] = [[], ()]
    for nothing in empty:
        merged = merge_metrics(nothing)
        assert merged == {"tokens": 0.0}
        assert merged["tokens"].shape == ()
        assert merged["tokens"].dtype == torch.float32


SINGLE, DOUBLE = torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([SINGLE, SINGLE], torch.float32),
        ([SINGLE, DOUBLE], torch.float64),
        ([SINGLE, 0.1], torch.float32),
        ([0.1, Fraction(1, 10)], torch.float64),
        ([SINGLE.bfloat16(), SINGLE.bfloat16()], torch.float32),
        ([torch.tensor(1), 1], torch.float64),
    ],
    ids=str,
)
def test_dtypes(values: list[Any], expected: torch.dtype) -> None:
    merged = merge_metrics([{"tokens": 2, "entropy": x} for x in values])
    assert {x.dtype for x in merged.values()} == {expected}
    mean = sum(float(x) for x in values) / 2
    assert merged["entropy"].item() == pytest.approx(mean, rel=torch.finfo(expected).eps)


def test_integers_are_counted_exactly() -> None:
    tokens = torch.tensor(2**24 + 1)
    merged = merge_metrics([{"tokens": tokens, "entropy": torch.tensor(0.5, dtype=torch.float64)}])
    assert merged["tokens"] == 2**24 + 1
    single = [{"tokens": torch.tensor(n), "entropy": torch.tensor(1.0)} for n in (2**24 + 1, 1)]
    assert merge_metrics(single)["tokens"] == 2**24 + 2  # rounded once, at the end


def test_nothing_is_read_and_nothing_has_a_gradient() -> None:
    """A tensor of the device meta cannot be read: what asked a GPU for a value would fail on it."""
    parts = [{name: x.to("meta") for name, x in part.items()} for part in calls([3, 9])]
    merged = merge_metrics([*parts, dict.fromkeys(parts[0], 1.0), dict.fromkeys(parts[0], torch.tensor(1.0))])
    assert list(merged) == list(parts[0])
    assert {x.device.type for x in merged.values()} == {"meta"}
    leaf = torch.ones((), requires_grad=True)
    assert not any(x.requires_grad for x in merge_metrics([{"tokens": leaf, "entropy": leaf}]).values())


GOOD = {"tokens": 1.0, "entropy": 0.5}


class Broken(dict[str, float]):
    """A dict that fails in a way of its own."""

    def __iter__(self) -> Iterator[str]:
        raise RuntimeError("broken")


FAULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "a dict": (lambda: GOOD, r"metrics must be a sequence of dicts, got dict"),
    "a generator": (lambda: (x for x in [GOOD]), r"metrics must be a sequence of dicts, got generator"),
    "text": (lambda: "", r"metrics must be a sequence of dicts, got str"),
    "None": (lambda: None, r"metrics must be a sequence of dicts, got NoneType"),
    "no dict": (lambda: [GOOD, SINGLE], r"metrics\[1\] must be a dict, got Tensor"),
    "the loss": (
        lambda: ppo_loss(torch.zeros(1, 2), torch.tensor([0]), None, 1.0),
        r"metrics\[0\] must be a d",
    ),
    "no tokens": (
        lambda: [GOOD, {"entropy": 1.0}],
        r"metrics\[1\] must have the key 'tokens', got \['entropy'",
    ),
    "unknown": (
        lambda: [GOOD | {"loss": 1.0}],
        r"metrics\[0\] has unknown keys \['loss'\], expected some of",
    ),
    "no name": (lambda: [GOOD | {1: 1.0}], r"metrics\[0\] has unknown keys \[1\]"),
    "other keys": (
        lambda: [GOOD, {"tokens": 1.0}],
        r"metrics\[1\] must have the keys of metrics\[0\], \['tokens'",
    ),
    "a row": (
        lambda: [GOOD, GOOD | {"entropy": torch.ones(1)}],
        r"metrics\[1\]\['entropy'\] must be a number or a 0-d tensor of numbers, got \(1,\) torch.float32",
    ),
    "a flag": (
        lambda: [GOOD | {"entropy": True}],
        r"metrics\[0\]\['entropy'\] must be a number .*, got True",
    ),
    "flags": (lambda: [GOOD | {"entropy": torch.tensor(True)}], r"metrics\[0\]\['entropy'\] .* torch.bool"),
    "complex": (
        lambda: [GOOD | {"entropy": torch.tensor(1j)}],
        r"metrics\[0\]\['entropy'\] .* torch.complex64",
    ),
    "words": (
        lambda: [GOOD | {"entropy": "0.5"}],
        r"metrics\[0\]\['entropy'\] must be a number .*, got '0.5'",
    ),
    "too large": (lambda: [GOOD | {"entropy": 10**400}], r"metrics\[0\]\['entropy'\] .* float64 can hold"),
    "less than none": (
        lambda: [GOOD, GOOD | {"tokens": torch.tensor(-1.0)}],
        r"metrics\[1\]\['tokens'\] must be a finite number >= 0, got -1",
    ),
    "no number": (lambda: [GOOD | {"tokens": math.nan}], r"metrics\[0\]\['tokens'\] .*>= 0, got nan"),
    "no end": (lambda: [GOOD | {"tokens": math.inf}], r"metrics\[0\]\['tokens'\] .*>= 0, got inf"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_refused(fault: str) -> None:
    make, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        merge_metrics(make())


def test_a_group_is_a_group() -> None:
    with pytest.raises(
        ValueError, match="group must be a process group with this rank in it, or None, got 'w"
    ):
        merge_metrics([GOOD], "world")


# ---- over the ranks of a group

CUTS = [2, 3, 9, 15, 20]  # six micro-batches
SHARES = {  # those of each rank, by the number of ranks
    2: [[[0, 1, 2], [3, 4, 5]], [[], [0, 1, 2, 3, 4, 5]], [[5, 0], [1, 4, 2, 3]]],
    3: [[[0, 1], [2, 3], [4, 5]], [[], [0, 1, 2, 3, 4, 5], []], [[5], [1, 4, 2, 3], [0]]],
}
ELSEWHERE = "metrics must be valid on every rank of the group, and are not on rank 1$"


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_are_one(size: int, tmp_path: Path) -> None:
    spawn(on_a_rank, args=(size, str(tmp_path)), nprocs=size)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(size)]
    shares, special = ranks[0]["shares"], ranks[0]["special"]
    for rank, found in enumerate(ranks):
        assert (found["shares"], found["special"]) == (shares, special)  # bit for bit
        assert set(found["exchanges"]) == {1}, rank  # faults included

    (whole,) = calls([])
    for merged in shares:
        assert {dtype for _, dtype in merged.values()} == {"torch.float64"}
        values = {
            name: torch.tensor(float.fromhex(x), dtype=torch.float64) for name, (x, _) in merged.items()
        }
        assert_close(values, whole, ROUNDING)
    assert special["nothing"] == {"tokens": exactly(0.0, torch.float32)}
    assert special["no token"] == {name: exactly(0.0, torch.float32) for name in GOOD}
    assert special["float64 on one"]["entropy"] == exactly(0.5, torch.float64)
    assert special["numbers on one"]["entropy"] == exactly(0.5, torch.float32)
    assert special["numbers"] == {name: exactly(x, torch.float64) for name, x in GOOD.items()}
    assert special["NaN"]["ratio_max"] == exactly(math.nan, torch.float64)

    for rank, found in enumerate(ranks):
        raised = found["raised"]
        for fault, (_, message) in FAULTS.items():
            kind, text = raised[fault]
            assert kind == "ValueError"
            assert re.search(message if rank == 1 else ELSEWHERE, text), (rank, text)
        assert raised["broken"][0] == ("RuntimeError" if rank == 1 else "ValueError")
        assert raised["all"] == ["ValueError", "metrics must be a sequence of dicts, got dict"]
        assert raised["keys"] == [
            "ValueError",
            "metrics must have the same keys on every rank of the group,"
            f" got ['tokens', 'entropy'] on rank 0 and ['tokens'] on rank {size - 1}",
        ]
        if rank < 2:
            assert found["pair"]["tokens"] == exactly(2.0, torch.float64)
        else:
            assert found["pair"][1].startswith("group must be a process group with this rank in it")


def exactly(value: float, dtype: torch.dtype) -> list[str]:
    return [value.hex(), str(dtype)]


def on_a_rank(rank: int, size: int, folder: str) -> None:
    address = f"file://{folder}/store"
    patience = timedelta(seconds=60)  # a rank that waits for another in vain fails the test, soon
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size, timeout=patience)
    exchanges: list[int] = []

    def counted(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        exchanges[-1] += 1
        return call(*args, **options)

    for name in ("all_gather", "all_gather_object", "all_gather_into_tensor", "all_reduce", "broadcast"):
        setattr(dist, name, partial(counted, getattr(dist, name)))

    def merged(metrics: Any, group: Any = dist.group.WORLD) -> Any:
        exchanges.append(0)
        try:
            found = merge_metrics(metrics, group)
        except Exception as error:
            return [type(error).__name__, str(error)]
        return {name: exactly(x.item(), x.dtype) for name, x in found.items()}

    last, single = rank == size - 1, {name: torch.tensor(x) for name, x in GOOD.items()}
    double, none = {name: x.double() for name, x in single.items()}, single | {"tokens": torch.tensor(0.0)}
    parts = calls(CUTS)
    try:
        shares = [merged([parts[k] for k in share[rank]]) for share in SHARES[size]]
        special = {
            "nothing": merged([]),
            "no token": merged([none] if last else []),
            "float64 on one": merged([double if last else single]),
            "numbers on one": merged([GOOD if last else single]),
            "numbers": merged([GOOD] if last else []),
            "NaN": merged([{"tokens": 1.0, "ratio_max": math.nan if last else 2.0}]),
        }
        raised = {name: merged(make() if rank == 1 else [GOOD]) for name, (make, _) in FAULTS.items()}
        raised["broken"] = merged([Broken(GOOD)] if rank == 1 else [])
        raised["all"] = merged(GOOD)
        raised["keys"] = merged([{"tokens": 1.0}] if last else [GOOD])
        found = {"shares": shares, "special": special, "raised": raised, "exchanges": list(exchanges)}
        found["pair"] = merged([GOOD], dist.new_group([0, 1]))
        Path(folder, f"{rank}.json").write_text(json.dumps(found))
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_the_result_is_where_the_metrics_are(backend: str, device: torch.device, tmp_path: Path) -> None:
    if backend == "nccl" and device.type != "cuda":
        pytest.skip("NCCL needs a GPU")
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for there in (device, torch.device("cpu")):
            parts = [{name: x.to(there) for name, x in part.items()} for part in calls(CUTS)]
            merged = merge_metrics(parts, dist.group.WORLD)
            assert {x.device.type for x in merged.values()} == {there.type}
            assert_close(merged, calls([])[0], ROUNDING)
        nothing = merge_metrics([], dist.group.WORLD)["tokens"]
        assert nothing.device.type == ("cuda" if backend == "nccl" else "cpu")
    finally:
        dist.destroy_process_group()


def test_the_backend_says_where_ranks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a rank's own tensors: ranks with an empty list have none, and gloo and NCCL never meet."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for backend, device in (("gloo", "cpu"), ("nccl", "cuda:3"), ("cpu:gloo,cuda:nccl", "cuda:3")):
        monkeypatch.setattr(dist, "get_backend", lambda group, name=backend: name)
        assert exchange_device(object()) == torch.device(device)
