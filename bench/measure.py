"""What the benchmarks share: one measurement with its provenance, peak memory, tables and records.

Every provider runs in a process of its own, several times after a warm-up, and only after its gradient was
found right. Memory is the peak during a step above what was there before it: the resident size, or on a GPU
what torch has allocated.
"""

import ctypes
import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Measurement:
    """What ran, where, and what it cost."""

    op: str
    provider: str
    shape: dict[str, int]
    dtype: str
    ms: float  # median
    ms_iqr: float
    peak_mib: float  # largest over the repetitions, above what was there before the step
    error: float | None  # of the gradient against float64, relative to its largest entry
    device: str
    threads: int
    torch: str
    python: str
    commit: str  # "-dirty" if anything but the records was changed since
    date: str


class PeakMemory:
    """The largest size while the context is open: on a GPU what torch has allocated there, else the resident
    size, sampled every 2 ms."""

    def __init__(self, device: str = "cpu") -> None:
        self.gpu = device.startswith("cuda")

    def __enter__(self) -> "PeakMemory":
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
            return self
        # what the allocator keeps of earlier steps is resident, and would not count when it is used again
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        self.before = self.peak = self.resident()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.gpu:
            self.peak = torch.cuda.max_memory_allocated() / 2**20
            return
        self.done.set()
        self.thread.join()

    def watch(self) -> None:
        while not self.done.wait(0.002):
            self.peak = max(self.peak, self.resident())

    @staticmethod
    def resident() -> float:
        """MiB, from Linux's /proc."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * 4096 / 2**20


def measure(
    step: Callable[..., object],
    fresh: Callable[[], Sequence[Any]],
    repetitions: int,
    *,
    op: str,
    provider: str,
    shape: dict[str, int],
    error: float | None,
    device: str = "cpu",
) -> Measurement:
    """Time ``step(*fresh())``; making the arguments is not measured."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else bool
    times, peaks = [], []
    for repetition in range(repetitions + 1):
        arguments = fresh()
        with PeakMemory(device) as memory:
            wait()
            start = time.perf_counter()
            result = step(*arguments)
            wait()
            elapsed = time.perf_counter() - start
        del result, arguments
        if repetition > 0:  # the first one warms up
            times.append(1e3 * elapsed)
            peaks.append(memory.peak - memory.before)
    q1, median, q3 = statistics.quantiles(times, n=4)
    return Measurement(
        op=op,
        provider=provider,
        shape=shape,
        dtype="float32",
        ms=round(median, 1),
        ms_iqr=round(q3 - q1, 1),
        peak_mib=round(max(peaks), 1),
        error=None if error is None else float(f"{error:.1e}"),
        device=torch.cuda.get_device_name() if device.startswith("cuda") else cpu_name(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
        commit=commit(),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    )


def commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.check_output(["git", *arguments], text=True, cwd=RESULTS.parent.parent).strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return git("rev-parse", "--short=7", "HEAD") + ("-dirty" if changed else "")


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def run_each(module: str, providers: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each provider, from ``python -m module --provider name`` in a process of its own."""
    rows: list[dict[str, Any]] = []
    for name in providers:
        command = [sys.executable, "-m", module, "--provider", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
    return rows


def print_row(measurement: Measurement) -> None:
    print(json.dumps(asdict(measurement)))


def print_table(rows: list[dict[str, Any]], baseline: dict[str, Any]) -> None:
    sizes = ", ".join(f"{name}={size}" for name, size in baseline["shape"].items())
    table = Table(title=f"{baseline['op']}, {sizes}, float32, {baseline['device']}")
    for heading in ("provider", "ms", "± IQR", "peak MiB", "time", "memory", "error"):
        table.add_column(heading, justify="left" if heading == "provider" else "right")
    for row in rows:
        costs = (f"{row['ms']:.0f}", f"{row['ms_iqr']:.0f}", f"{row['peak_mib']:.0f}")
        ratios = (f"{row[key] / baseline[key]:.2f}" for key in ("ms", "peak_mib"))
        error = "-" if row["error"] is None else f"{row['error']:.0e}"
        table.add_row(row["provider"], *costs, *ratios, error)
    Console().print(table)


def markdown(rows: list[dict[str, Any]], baseline: dict[str, Any]) -> str:
    """The README's table; ratios are those to ``baseline``."""
    name = baseline["provider"]
    lines = [f"| | ms | memory, MiB | of {name}'s time | of {name}'s memory |", "|---|--:|--:|--:|--:|"]
    for row in rows:
        ratios = [f"{row[key] / baseline[key]:.2f}" for key in ("ms", "peak_mib")]
        costs = [f"{row['ms']:.0f} ± {row['ms_iqr']:.0f}", f"{row['peak_mib']:.0f}"]
        lines.append("| " + " | ".join([row["provider"], *costs, *ratios]) + " |")
    return "\n".join(lines)


def where(row: dict[str, Any]) -> str:
    """The provenance of a row, in words."""
    return f"{row['device']}, {row['threads']} threads, torch {row['torch']}, {row['commit']}, {row['date']}"


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def last_run(path: Path, op: str) -> list[dict[str, Any]]:
    """The rows of the last saved run of an operation: those that are new since a provider came again."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if row["op"] == op:
            if rows and rows[0]["provider"] == row["provider"]:
                rows = []
            rows.append(row)
    return rows


def with_provider(row: Measurement, provider: str) -> Measurement:
    """The row under another name, such as one with a version."""
    return replace(row, provider=provider)
