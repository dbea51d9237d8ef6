"""One optimiser step of a model: body, head, loss, backward and AdamW, with the logits and without.

    pytest bench/test_step.py                      # its time and memory, by packed tokens
    pytest bench/test_step.py --memory-cap 77      # instead, the most tokens whose step fits into so many GiB

A model of the shape of SmolLM2-135M in float32; on a GPU of that of Qwen3-0.6B in bfloat16 at 4k, 16k and
64k packed tokens: sequences of 4096, an eighth of each the prompt, whose rows the head is not applied to.
Its 28 layers would keep 0.08 MiB of activations a token each, 144 GiB at 64k: the body is recomputed
layer by layer in the backward, for all providers alike (bench/model.py), and what is left is what the
head and its loss need. A provider that runs out of memory gets a row that says so. What is compared with
float64 is the step's loss and, at the model's hidden states, the head's gradients; the learning rate is
0, so that all steps see the same. Weights and optimiser states are in what was there before the step,
gradients are not. On a CPU no activations are recomputed.

What fits is searched for with sequences of 1024 tokens: the body's memory does not depend on their
length, and the search can take small steps. Twice as many tokens at a time until they do not fit, then
halves between the two until these are less than 5% apart, or the provider's time is up. A step that did
not fit leaves nothing behind. With PYTORCH_ALLOC_CONF=expandable_segments:True, as bench/gpu.sh sets it,
the allocator's own fragments do not decide. A cap of 77 GiB is what an 80 GB card has for torch, some 78
GiB, less a little for libraries; on a larger card it stands for such a one, and inf is the card's own
size. On a CPU a step whose resident size grew by more than the cap did not fit. Nothing is compared with
float64 here, that is what the step's own rows are for; a loss that is not finite fails.
"""

import gc
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import measure, model, operations
from bench.cases import QWEN, SMOLLM, STEP, TOKENS_THAT_FIT, Case
from bench.conftest import DEVICE, RECORD, Run, Work, size
from bench.operations import ENTROPY_COEF, OFFSETS, Inputs, Result
from bench.peers.providers import Provider, from_hidden, loss_function

PROVIDERS = ("eager", "TRL", "aer_fast")  # a step takes seconds, and on a CPU so many that TRL is not timed

# ---- time and memory of a step

TOKENS = {  # packed, of a step
    "cpu": ("SmolLM2-135M", SMOLLM, torch.float32, (1024,)),
    "gpu": ("Qwen3-0.6B", QWEN, torch.bfloat16, (4096, 16_384, 65_536)),
    "tiny": ("tiny", 1024, torch.float32, (512,)),
}


def cases(chosen: str) -> list[tuple[str, int, Case]]:
    """(model, T, case)"""
    name, V, dtype, every = TOKENS[chosen]
    D = model.SHAPES[name].hidden
    return [(name, T, Case(STEP, model.rows_of(T), V, D, dtype)) for T in every]


@lru_cache(maxsize=1)
def prepare(name: str, T: int, case: Case) -> tuple[Any, Tensor, operations.Inputs, operations.Exact]:
    """A model, token ids [B, length], and the head's inputs and exact results at its hidden states."""
    torch.manual_seed(0)
    shape = model.SHAPES[name]
    policy = model.build(shape, case.V, case.dtype, DEVICE)
    ids = torch.randint(case.V, (T // shape.length, shape.length), device=DEVICE)
    with torch.no_grad():
        hidden = model.hidden_of(policy, ids)
    factors = [hidden.requires_grad_(), policy.lm_head.weight]
    return policy, ids, *operations.judge(factors, model.targets_of(ids))


def test_step(name: str, T: int, case: Case, provider: Provider, run: Run) -> None:
    def build() -> Work:
        policy, ids, inputs, exact = prepare(name, T, case)
        loss = loss_function(provider, provider.load(), inputs)
        optimizer = model.optimizer_of(policy)  # the weights stay what was judged

        def head(result: Result) -> dict[str, float]:
            gradient = torch.autograd.grad(loss(*inputs.factors), inputs.factors)
            return operations.errors(case, "all", exact, Result(loss=result.loss, gradient=gradient))

        def step() -> Result:
            return Result(loss=model.train(policy, optimizer, ids, loss))

        return Work(tuple, step, errors=head, least=None)

    identity: dict[str, Any] = {
        "op": STEP,
        "shape": {"T": T, **case.shape},
        "rows": f"{name}'s",
        "provider": provider.name,
        "version": provider.version,
        "work": "all",
        "headline": False,
    }
    run(identity, provider.missing(DEVICE), build, dtype=case.dtype, ours=provider.name == "aer_fast")


# ---- the largest step that fits

LENGTH = 1024  # tokens of a sequence
SHARE = 0.05  # how close the two ends have to be
SECONDS = 50.0  # of a provider, to begin another probe
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
def capped(cap: float) -> Iterator[float]:
    """Within so many GiB, on a GPU by its allocator; the cap, or the size of a smaller card."""
    if DEVICE == "cpu":
        yield cap
        return
    card = torch.cuda.get_device_properties(0).total_memory / 2**30
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / card))
    try:
        yield min(cap, card)
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


def inputs_of(target: Tensor, V: int) -> Inputs:
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


def most_tokens(of: Range, provider: Provider, cap: float) -> tuple[Search, dict[int, dict[str, float]]]:
    """The search, and what each step that fitted has cost."""
    torch.manual_seed(0)
    policy = model.build(replace(model.SHAPES[of.shape], length=of.length), of.V, of.dtype, DEVICE)
    steps = Steps(policy, model.optimizer_of(policy), provider, of.V, of.length, cap)
    search = Search(steps.fit, of.length, seconds=SECONDS)
    search.run(of.first, of.most)
    return search, steps.costs


@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")
def test_tokens_that_fit(of: Range, case: Case, provider: Provider, memory_cap: float, run: Run) -> None:
    shape = {name: size for name, size in case.shape.items() if name != "N"}
    identity: dict[str, Any] = {"op": TOKENS_THAT_FIT, "shape": shape, "rows": f"{of.shape}'s", "work": "all"}
    identity |= {"provider": provider.name, "version": provider.version}
    run.begin(identity, provider.missing(DEVICE), dtype=of.dtype, ours=provider.name == "aer_fast")
    failure: Exception | None = None
    try:
        with capped(memory_cap) as within:
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


# ---- cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen, impl = size(metafunc.config), metafunc.config.stash[RECORD].impl
    if metafunc.function is test_tokens_that_fit:
        of = RANGES.get(chosen, RANGES["gpu"])
        case = Case(STEP, of.first, of.V, model.SHAPES[of.shape].hidden, of.dtype)
        providers = [x for x in from_hidden(case, impl) if x.name in PROVIDERS]
        metafunc.parametrize("provider", providers, ids=lambda provider: provider.name)
        metafunc.parametrize(("of", "case"), [pytest.param(of, case, id=f"{of.shape}, {of.V=}")])
        return
    parameters = [
        pytest.param(name, T, case, provider, id=f"{case.op}, {T=} {case}, {provider.name}")
        for name, T, case in cases(chosen)
        for provider in from_hidden(case, impl)
        if provider.name in PROVIDERS and (provider.name != "TRL" or DEVICE == "cuda")
    ]
    metafunc.parametrize(("name", "T", "case", "provider"), parameters)
