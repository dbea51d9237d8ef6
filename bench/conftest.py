"""`pytest bench/`: every operation beside the peers, each row in bench/results/ as soon as it is known.

    pytest bench/                  # sizes follow the device
    pytest bench/ -m headline      # one shape of each operation
    pytest bench/ --size tiny      # does it run at all?

A peer that is missing, fails or is wrong gets a row that says so, and the run goes on; likewise a provider
that runs out of memory. Ours, failing otherwise or wrong, fails the run.
The rows of a session stand between a line at its start and one at its end; without the latter it was cut
short. pytest-benchmark's own table and JSON (in .benchmarks/) are made as well.
"""

import gc
import os
import site
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from pytest_benchmark.logger import PytestBenchmarkWarning

from bench import measure, operations
from bench.cases import SIZES
from bench.operations import Fresh, Result, Step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BUDGET = {"cuda": 1.0, "cpu": 1.5}  # seconds for the rounds of a row, unless a suite of many rows takes less
SHORT = 0.15  # likewise, where hundreds of choices are compared
ROUNDS = {"cuda": (5, 50), "cpu": (3, 15)}

if "AER_FAST_PEERS" in os.environ:  # a folder that peers were installed into
    site.addsitedir(os.environ["AER_FAST_PEERS"])

collect_ignore_glob = ["[!t]*.py", "t[!e]*.py"]  # modules, for doctests


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("aer_fast benchmarks")
    group.addoption("--size", choices=("auto", *SIZES), default="auto", help="shapes; auto: of the device")
    group.addoption("--impl", choices=("auto", "triton", "torch"), default="auto", help="which of ours")
    group.addoption("--results", type=Path, help="file to append rows to; default: one in bench/results/")
    group.addoption(
        "--memory-cap",
        type=float,
        help="only search for the largest optimiser step that fits into so many GiB; inf: the card's",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "headline: one shape of each operation, for the README and the bars")
    config.addinivalue_line("filterwarnings", "default")  # peers warn
    if not config.option.benchmark_disable:
        config.option.benchmark_autosave = config.option.benchmark_autosave or measure.commit()
    config.option.benchmark_columns = ["median", "iqr", "rounds"]
    config.option.benchmark_sort = "median"
    config.stash[RECORD] = Record(config)


class Record:
    """The results file of a session."""

    def __init__(self, config: pytest.Config) -> None:
        tiny = measure.ROOT / "runs" / "bench" / "tiny.jsonl"  # nothing to publish
        default = tiny if config.getoption("--size") == "tiny" else measure.default_results(DEVICE)
        self.path: Path = config.getoption("--results") or default
        self.impl: str = config.getoption("--impl")
        self.planned = 0
        self.rows: list[measure.Row] = []

    def start(self) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.id = f"{now} {os.getpid()}"
        line = {"kind": "start", "id": self.id, "planned": self.planned, "time": now}
        measure.append(self.path, {**line, "where": measure.where(DEVICE)})

    def add(self, row: measure.Row) -> None:
        if not self.rows:
            self.start()
        self.rows.append(row)
        measure.append(self.path, row)

    def end(self, interrupted: bool) -> None:
        if self.rows:
            how = "interrupted" if interrupted or len(self.rows) < self.planned else "complete"
            measure.append(self.path, {"kind": "end", "id": self.id, "how": how, "rows": len(self.rows)})


RECORD = pytest.StashKey[Record]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A search for what fits takes minutes and all memory: it runs where it is asked for, and then alone."""
    searching = config.getoption("--memory-cap") is not None
    by_kind: dict[bool, list[pytest.Item]] = {True: [], False: []}
    for item in items:
        by_kind["memory_cap" in getattr(item, "fixturenames", ())].append(item)
    if by_kind[not searching]:
        config.hook.pytest_deselected(items=by_kind[not searching])
        items[:] = by_kind[searching]


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[RECORD].planned = len(session.items)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> Iterator[None]:
    interrupted = exitstatus in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR)
    session.config.stash[RECORD].end(interrupted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PytestBenchmarkWarning)  # that nothing was timed, so nothing is saved
        return (yield)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    record = config.stash[RECORD]
    if record.rows:
        terminalreporter.write_line(f"{len(record.rows)} rows in {record.path}")
        terminalreporter.write_line(f"tables and pictures: python -m bench.report {record.path}")


@dataclass(frozen=True)
class Work:
    """What is timed, and how it is judged."""

    fresh: Fresh  # arguments of a round
    step: Step
    errors: Callable[[Result], dict[str, float]]  # against float64
    least: tuple[float, float] | None  # bytes and floating-point operations
    found: Callable[[], dict[str, float]] = dict  # what else a row is to say, after the rounds


class Run:
    """Checks, times and records one provider."""

    def __init__(self, benchmark: BenchmarkFixture, config: pytest.Config) -> None:
        self.benchmark, self.config, self.record = benchmark, config, config.stash[RECORD]

    def begin(self, identity: dict[str, Any], missing: str, *, dtype: torch.dtype, ours: bool) -> None:
        """What identifies the rows from here on; ``missing``: why there is nothing to measure."""
        if ours and self.record.impl != "auto":
            identity = {**identity, "version": f"(impl={self.record.impl})"}
        self.identity = {**identity, "dtype": str(dtype).removeprefix("torch.")}
        self.ours = ours
        if missing:
            self.write("missing", missing)
            pytest.skip(missing)

    def __call__(
        self,
        identity: dict[str, Any],
        missing: str,
        build: Callable[[], Work],
        *,
        dtype: torch.dtype,
        ours: bool,
        budget: float = BUDGET[DEVICE],  # seconds for the rounds
    ) -> None:
        self.begin(identity, missing, dtype=dtype, ours=ours)
        failure: BaseException | None = None
        errors: dict[str, float] = {}
        try:
            work = build()
            seconds, errors = self.first(work)
        except (Exception, SystemExit) as error:
            failure = error
        if failure is not None:  # outside the except block, which would keep what the step has allocated
            self.give_up(failure, errors)
        if wrong := operations.complaint(dtype, errors):
            self.write("wrong", wrong, errors=errors)
            (pytest.fail if self.ours else pytest.xfail)(f"wrong: {wrong}")
        try:
            peak = self.time(work, seconds, budget)
        except (Exception, SystemExit) as error:
            failure = error
        if failure is not None:
            self.give_up(failure, errors)
        if self.benchmark.stats is None:  # --benchmark-disable: a check, not a measurement
            return
        self.write("ok", **self.costs(work, dtype, peak), errors=errors, found=work.found())

    def first(self, work: Work) -> tuple[float, dict[str, float]]:
        """Warm up, see how long a step takes, and compare its result."""
        if DEVICE == "cuda":
            work.step(*work.fresh())  # compiles
        arguments = work.fresh()
        start = measure.clock(DEVICE)()
        result = work.step(*arguments)
        return measure.clock(DEVICE)() - start, work.errors(result)

    def time(self, work: Work, seconds: float, budget: float = BUDGET[DEVICE]) -> float:
        """Return the largest peak memory; the times are in self.benchmark.stats.

        Memory has rounds of its own: on a CPU it is watched by a thread, which takes time from Python's.
        """
        gc.collect()
        measure.cool(DEVICE)  # what that takes is not the step's
        fewest, most = ROUNDS[DEVICE]
        arguments: list[tuple[Any, ...]] = []

        def setup() -> None:
            arguments.clear()  # before there are new ones
            arguments.append(work.fresh())
            measure.cool(DEVICE)

        def step() -> None:
            work.step(*arguments[0])

        self.benchmark._timer = measure.clock(DEVICE)
        self.benchmark.name, self.benchmark.params = str(self.identity["provider"]), {}
        self.benchmark.group = " ".join(
            [
                self.identity["op"],
                *(f"{k}={v}" for k, v in self.identity["shape"].items()),
                self.identity["dtype"],
            ]
            + ([] if self.identity["rows"] == "all" else [self.identity["rows"]])
        )
        fit = int(budget / max(seconds, 1e-6))
        self.benchmark.pedantic(step, setup=setup, rounds=min(most, max(fewest, fit)))
        peaks = []
        for _ in range(max(1, min(fewest, fit))):
            setup()
            with measure.PeakMemory(DEVICE) as memory:
                step()
            peaks.append(memory.peak)
        return max(peaks)

    def costs(self, work: Work, dtype: torch.dtype, peak: float) -> dict[str, Any]:
        assert self.benchmark.stats is not None
        stats = self.benchmark.stats.stats
        limits = measure.limits(DEVICE, dtype)
        costs: dict[str, Any] = {
            "ms": float(f"{1e3 * stats.median:.5g}"),
            "ms_iqr": float(f"{1e3 * stats.iqr:.3g}"),
            "rounds": stats.rounds,
            "peak_mib": round(peak, 1),
            "limits": limits,
        }
        if work.least is not None:
            moved, done = (x / stats.median for x in work.least)
            best = max(moved / limits["gb_per_s"] / 1e9, done / limits["tflop_per_s"] / 1e12)
            costs["gb_per_s"] = float(f"{moved / 1e9:.4g}")
            costs["tflop_per_s"] = float(f"{done / 1e12:.4g}")
            costs["of_limit"] = float(f"{best:.3g}")
        return costs

    def give_up(self, error: BaseException, errors: dict[str, float]) -> NoReturn:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, torch.OutOfMemoryError):
            self.write("out of memory", errors=errors)
            pytest.xfail("out of memory")
        if self.ours:
            self.write("failed", reason, errors=errors)
            raise error
        if isinstance(error, ImportError):  # of what a peer needs
            self.write("missing", reason)
            pytest.skip(reason)
        self.write("failed", reason, errors=errors)
        pytest.xfail(reason)

    def write(self, status: str, reason: str = "", **costs: Any) -> None:
        row = measure.Row(**self.identity, status=status, reason=reason, where=measure.where(DEVICE), **costs)
        self.benchmark.extra_info.update(asdict(row))
        self.record.add(row)


@pytest.fixture
def run(benchmark: BenchmarkFixture, pytestconfig: pytest.Config) -> Iterator[Run]:
    yield Run(benchmark, pytestconfig)
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture
def memory_cap(pytestconfig: pytest.Config) -> float:
    """GiB; a test that asks for it is run with --memory-cap alone."""
    cap: float = pytestconfig.getoption("--memory-cap")
    return cap


@pytest.fixture(scope="session", autouse=True)
def _limits_first() -> None:
    """On an idle machine, before anything else."""
    measure.limits(DEVICE, torch.float32)


def size(config: pytest.Config) -> str:
    chosen: str = config.getoption("--size")
    return ("gpu" if DEVICE == "cuda" else "cpu") if chosen == "auto" else chosen
