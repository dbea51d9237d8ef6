"""The largest number of tokens whose optimiser step fits into memory: `pytest bench/capacity.py`, on a GPU.

The step of bench/test_step.py, with sequences of 1024 tokens: the body's memory does not depend on their
length, and the search can take small steps. Twice as many tokens at a time until they do not fit, then
halves between the two until these are less than 5% apart, or the provider's time is up. A step that did not
fit leaves nothing behind. With PYTORCH_ALLOC_CONF=expandable_segments:True, as bench/gpu.sh sets it, the
allocator's own fragments do not decide.

``--memory-cap 77`` is what an 80 GB card has for torch, some 78 GiB, less a little for libraries; on a
larger card it stands for such a one. On a CPU a cap is needed: a step whose resident size grew by more did
not fit. Nothing is compared with float64 here, that is what the step's own rows are for; a loss that is not
finite fails.
"""

import gc
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from bench import measure, model
from bench.conftest import DEVICE, RECORD, Run, size
from bench.operations import ENTROPY_COEF, OFFSETS, STEP, TOKENS_THAT_FIT, Case, Inputs
from bench.peers import Provider, from_hidden, loss_function
from bench.shapes import QWEN

LENGTH = 1024  # tokens of a sequence
SHARE = 0.05  # how close the two ends have to be
SECONDS = 50.0  # of a provider, to begin another probe
PROVIDERS = ("eager", "TRL", "aer_fast")
FULL = re.compile("out of memory|ALLOC_FAILED")


@dataclass(frozen=True)
class Range:
    """Where a search begins and ends, in tokens."""

    shape: str
    V: int
    dtype: torch.dtype
    length: int
    first: int
    most: int


RANGES = {
    "gpu": Range("Qwen3-0.6B", QWEN, torch.bfloat16, LENGTH, 32 * LENGTH, 2048 * LENGTH),
    "tiny": Range("tiny", 1024, torch.float32, 64, 128, 1024),
}


@dataclass
class Search:
    """What fits among multiples of a unit, found with few probes."""

    fits: Callable[[int], bool]
    unit: int
    share: float = SHARE
    seconds: float = math.inf  # no probe begins later
    clock: Callable[[], float] = time.monotonic
    low: int = 0  # the largest that fitted
    high: int | None = None  # the smallest that did not
    probes: list[int] = field(default_factory=list)

    def run(self, first: int, most: int) -> None:
        start = self.clock()
        while (size := self.next(first, most)) is not None and self.clock() - start < self.seconds:
            self.probes.append(size)
            if self.fits(size):
                self.low = size
            else:
                self.high = size

    def next(self, first: int, most: int) -> int | None:
        """What to try now; None where nothing is left to be learnt."""
        if self.high is None:
            following = min(2 * self.low or first, most)
            return following if following > self.low else None
        if self.high - self.low <= max(self.unit, self.share * self.low):
            return None
        return (self.low + self.high) // 2 // self.unit * self.unit


@contextmanager
def capped(cap: float | None) -> Iterator[float]:
    """Within so many GiB, on a GPU by its allocator; the cap, that of the card where none is given."""
    if DEVICE == "cpu":
        yield cap or math.inf
        return
    card = torch.cuda.get_device_properties(0).total_memory / 2**30
    torch.cuda.set_per_process_memory_fraction(min(1.0, (cap or card) / card))
    try:
        yield min(cap or card, card)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def fits(work: Callable[[], None]) -> bool:
    """Whether the work ends within memory; nothing of it stays."""
    fitted = True
    try:
        work()
    except RuntimeError as error:  # of torch's allocator, or of a library beside it
        if not isinstance(error, torch.OutOfMemoryError) and not FULL.search(str(error)):
            raise
        fitted = False
    gc.collect()  # after the except block, which would keep what the work has allocated
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return fitted


def inputs_of(target: torch.Tensor, V: int) -> Inputs:
    """Of a loss at random weights: every word is about as likely as any, and a quarter of the rows is clipped
    at each edge."""
    N, device = len(target), target.device
    offset = torch.tensor(OFFSETS, device=device)[torch.randint(len(OFFSETS), (N,), device=device)]
    return Inputs(
        factors=(),
        target=target,
        old_logprob=offset - math.log(V),
        advantage=torch.randn(N, device=device),
        entropy_coef=ENTROPY_COEF,
        mask=None,
        grad_logprob=offset,
        grad_entropy=offset,
    )


@dataclass
class Steps:
    """Optimiser steps of one model with one provider, of any number of tokens."""

    policy: Any
    optimizer: torch.optim.Optimizer
    provider: Provider
    V: int
    length: int
    cap: float  # GiB
    costs: dict[int, dict[str, float]] = field(default_factory=dict)  # by T

    def __post_init__(self) -> None:
        self.function = self.provider.load()
        cap, self.cap = self.cap, math.inf
        self.step(self.length)  # what the first step of all loads and compiles is no other's
        self.cap = cap
        self.costs.clear()

    def fit(self, tokens: int) -> bool:
        fitted = fits(lambda: self.step(tokens))
        for parameter in self.policy.parameters():  # of a backward that broke off
            parameter.grad = None
        return fitted

    def step(self, tokens: int) -> None:
        ids = torch.randint(self.V, (tokens // self.length, self.length), device=DEVICE)
        loss = loss_function(self.provider, self.function, inputs_of(model.targets_of(ids), self.V))
        with measure.PeakMemory(DEVICE) as memory:
            start = measure.clock(DEVICE)()
            value = model.train(self.policy, self.optimizer, ids, loss)
            seconds = measure.clock(DEVICE)() - start
        if not value.isfinite():
            raise FloatingPointError(f"a loss of {float(value)} at {tokens:,} tokens")
        if DEVICE == "cpu" and memory.peak > 1024 * self.cap:
            raise torch.OutOfMemoryError(f"{memory.peak:.0f} MiB")
        reserved = torch.cuda.max_memory_reserved() / 2**30 if DEVICE == "cuda" else 0.0
        self.costs[tokens] = {"ms": 1e3 * seconds, "mib": memory.peak, "reserved_gib": reserved}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = size(metafunc.config)
    of = RANGES.get(chosen, RANGES["gpu"])
    case = Case(STEP, of.first, of.V, model.SHAPES[of.shape].hidden, of.dtype)
    every = from_hidden(case, metafunc.config.stash[RECORD].impl)
    providers = [provider for provider in every if provider.name in PROVIDERS]
    metafunc.parametrize("provider", providers, ids=lambda provider: provider.name)
    metafunc.parametrize(("of", "case"), [pytest.param(of, case, id=f"{of.shape}, {of.V=}")])


@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")
def test_tokens_that_fit(of: Range, case: Case, provider: Provider, run: Run) -> None:
    cap: float | None = run.config.getoption("--memory-cap")
    if DEVICE == "cpu" and cap is None:
        pytest.skip("needs a GPU, or a --memory-cap")
    shape = {name: size for name, size in case.shape.items() if name != "N"}
    who: dict[str, Any] = {"op": TOKENS_THAT_FIT, "shape": shape, "rows": f"{of.shape}'s", "work": "all"}
    who |= {"provider": provider.name, "version": provider.version}
    run.begin(who, provider.missing(DEVICE), dtype=of.dtype, ours=provider.name == "aer_fast")
    failure: Exception | None = None
    try:
        with capped(cap) as within:
            search, costs = most_tokens(of, provider, within)
    except Exception as error:
        failure = error
    if failure is not None:  # outside the except block, which would keep what the step has allocated
        run.give_up(failure, {})
    found = {"tokens": search.low, "cap_gib": float(f"{within:.3g}"), "probes": len(search.probes)}
    if search.high is not None:
        found["too_many"] = search.high
    if search.low == 0:
        run.write("out of memory", found=found)
        return
    cost = costs[search.low]
    found["reserved_gib"] = round(cost["reserved_gib"], 1)
    ms, mib = float(f"{cost['ms']:.4g}"), round(cost["mib"], 1)
    run.write("ok", ms=ms, ms_iqr=0.0, rounds=1, peak_mib=mib, found=found)


def most_tokens(of: Range, provider: Provider, cap: float) -> tuple[Search, dict[int, dict[str, float]]]:
    """The search, and what each step that fitted has cost."""
    torch.manual_seed(0)
    policy = model.build(replace(model.SHAPES[of.shape], length=of.length), of.V, of.dtype, DEVICE)
    steps = Steps(policy, model.optimizer_of(policy), provider, of.V, of.length, cap)
    search = Search(steps.fit, of.length, seconds=SECONDS)
    search.run(of.first, of.most)
    return search, steps.costs
