"""How everything here is measured: the clock, peak memory, the machine's limits, and the record of a row.

A row is one provider (ours, or a peer) at one operation and shape. It is timed several times after a warm-up,
only after its values and gradients were compared with float64. On a GPU the clock is the device's own, and
its L2 cache is cold at every repetition. Memory is the peak during further steps above what was there before:
what torch has allocated on a GPU, the resident size elsewhere. What a machine can do at best, a large copy
and a large matrix product, is measured in the same run.
"""

import ctypes
import json
import os
import platform
import re
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import cpuinfo
import psutil
import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PROVENANCE = {"device", "driver", "cuda", "threads", "torch", "triton", "python", "commit", "date"}
NEEDED = {"row": {"where"}, "start": {"id", "planned", "time"}, "end": {"id", "how", "rows"}}  # in a line
FLUSH_BYTES = 512 << 20  # ten times the L2 of an H100


@dataclass(frozen=True)
class Row:
    """One line of bench/results/*.jsonl: what ran, what it cost, how right it was, and where."""

    op: str
    shape: dict[str, int]  # N tokens, V words, D hidden, D_ref of a teacher
    dtype: str
    rows: str  # which rows count: "all", "realistic", "30% silent"
    provider: str
    version: str  # of the provider's package
    work: str  # "all", or what it leaves out
    headline: bool = False  # of the README
    status: str = "ok"  # or "wrong", "missing", "failed", "out of memory"
    reason: str = ""
    ms: float | None = None  # median
    ms_iqr: float | None = None
    rounds: int = 0
    peak_mib: float | None = None  # largest over the rounds
    gb_per_s: float | None = None  # the least traffic that the operation needs over the median time
    tflop_per_s: float | None = None  # likewise its least arithmetic
    of_limit: float | None = None  # of this machine's copy or matrix product, whichever binds
    errors: dict[str, float] = field(default_factory=dict)  # against float64
    limits: dict[str, float] = field(default_factory=dict)  # "gb_per_s", "tflop_per_s"
    found: dict[str, float] = field(default_factory=dict)  # what else: "tokens" that fit, counters
    where: dict[str, Any] = field(default_factory=dict)
    kind: str = "row"


class Moment:
    """A point on the GPU's own clock; subtracting one waits for it, and gives seconds."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "Moment") -> float:
        self.event.synchronize()
        elapsed: float = earlier.event.elapsed_time(self.event)
        return elapsed / 1e3


def clock(device: str) -> Callable[[], Any]:
    """What is read before and after a step."""
    return Moment if device == "cuda" else time.perf_counter


@cache
def flush() -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")


def cool(device: str) -> None:
    """Empty a GPU's L2. The step is queued meanwhile, so that launching it is not what is timed."""
    if device == "cuda":
        flush().zero_()


class PeakMemory:
    """The largest size while the context is open, in MiB above that at its start: ``peak``."""

    def __init__(self, device: str) -> None:
        self.gpu = device == "cuda"
        self.process = psutil.Process()
        self.before = self.highest = 0

    def __enter__(self) -> "PeakMemory":
        if self.gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        # what the allocator keeps of earlier steps is resident, and would not count when it is used again
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        self.before = self.highest = self.process.memory_info().rss
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.gpu:
            self.highest = torch.cuda.max_memory_allocated()
        else:
            self.done.set()
            self.thread.join()

    @property
    def peak(self) -> float:
        return float(self.highest - self.before) / 2**20

    def watch(self) -> None:
        while not self.done.wait(0.003):
            self.highest = max(self.highest, self.process.memory_info().rss)


def seconds(step: Callable[[], object], device: str, rounds: int) -> float:
    """The median of a few rounds after one that warms up."""
    times: list[float] = []
    for _ in range(rounds + 1):
        start = clock(device)()
        step()
        times.append(clock(device)() - start)
    return statistics.median(times[1:])


@cache
def copy_limit(device: str) -> float:
    """GB/s of a large copy, bytes read and bytes written."""
    source = torch.empty((4 << 30) if device == "cuda" else (256 << 20), dtype=torch.int8, device=device)
    copy = torch.empty_like(source).fill_(1)
    return 2 * source.numel() / seconds(lambda: copy.copy_(source), device, 7) / 1e9


@cache
def product_limit(device: str, dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product of random numbers; float32 without tf32."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / seconds(lambda: torch.mm(a, b, out=out), device, 7) / 1e12


def multiplies_bfloat16() -> bool:
    """Whether this CPU can. Without AVX-512 torch multiplies bfloat16 entry by entry, far slower."""
    flags = cpuinfo.get_cpu_info().get("flags", [])
    return any("bf16" in flag or flag == "avx512bw" for flag in flags)


def limits(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What this machine does at best, measured in this run."""
    return {
        "gb_per_s": round(copy_limit(device), 1),
        "tflop_per_s": float(f"{product_limit(device, dtype):.3g}"),
    }


def version(package: str) -> str:
    """Of a distribution; "" where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


@cache
def where(device: str) -> dict[str, Any]:
    """The machine, the versions and the commit."""
    gpu = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if gpu else cpuinfo.get_cpu_info().get("brand_raw", "CPU"),
        "driver": driver() if gpu else "",
        "cuda": (torch.version.cuda or "") if gpu else "",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.check_output(query, text=True).splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def commit() -> str:
    """Of the tree, "-dirty" if anything but the records was changed since. Without a repository, as in a tree
    that was copied: AER_FAST_COMMIT of the environment."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.check_output(command, text=True, cwd=ROOT, stderr=subprocess.DEVNULL).strip()

    try:
        head = git("rev-parse", "--short=7", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("AER_FAST_COMMIT", "unknown")
    return head + ("-dirty" if changed else "")


def default_results(device: str) -> Path:
    """A file for each machine, day and commit: what is run in parts stays together."""
    here = where(device)
    name = re.sub(r"[^a-z0-9]+", "-", str(here["device"]).lower()).strip("-")
    return RESULTS / f"{name}-{here['date']}-{here['commit']}.jsonl"


def append(path: Path, line: Row | dict[str, Any]) -> None:
    """At once and as a whole: a run that is cut short keeps what it measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(line) if isinstance(line, Row) else line)
    with path.open("a+") as file:
        if end := file.tell():
            os.lseek(file.fileno(), end - 1, os.SEEK_SET)
            text = text if os.read(file.fileno(), 1) == b"\n" else "\n" + text
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> tuple[list[Row], list[dict[str, Any]]]:
    """The rows, and the other lines: starts and ends of sessions, and "damaged" ones, such as the last line
    of a run that was killed. Of each (operation, shape, dtype, rows, provider) the last row counts, one that
    says "missing" only if there is no other."""
    rows: dict[str, Row] = {}
    others: list[dict[str, Any]] = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
            if not NEEDED[line["kind"]] <= line.keys():
                raise KeyError
            if line["kind"] != "row":
                others.append(line)
                continue
            row = Row(**line)
            if not row.where.keys() >= PROVENANCE:
                raise KeyError
        except (ValueError, TypeError, KeyError, AttributeError):
            others.append({"kind": "damaged"})
            continue
        key = json.dumps([row.op, row.shape, row.dtype, row.rows, row.provider])
        if row.status != "missing" or key not in rows:
            rows[key] = row
    return list(rows.values()), others
