"""ppo_loss from logits on a CPU: time and memory of forward and backward, beside eager PyTorch.

    python -m bench.from_logits            # print the table
    python -m bench.from_logits --save     # and append to bench/results/from_logits.jsonl

Every row runs in a process of its own. Nothing is timed before it is right: each provider's gradient is first
compared with float64 on a few rows. Memory is the peak resident size during a step above what was resident
before it, the logits included in what was there.
"""

import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from aer_fast import ppo_loss

RESULTS = Path(__file__).parent / "results" / "from_logits.jsonl"
N, V = 1024, 151_936
REPETITIONS = 5


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
    error: float  # of the gradient against float64, relative to its largest entry
    device: str
    threads: int
    torch: str
    python: str
    commit: str  # "-dirty" if the tree was
    date: str


def eager(logits: Tensor, target: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """The loss as most trainers write it."""
    logp = logits.log_softmax(-1)
    logprob = logp.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    ratio = (logprob - old).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return (-surrogate - 0.01 * entropy).mean()


def fused(*inputs: Tensor, inplace: bool) -> Tensor:
    return ppo_loss(*inputs, entropy_coef=0.01, inplace=inplace, impl="torch").loss


PROVIDERS: dict[str, Callable[..., Tensor]] = {
    "eager": eager,
    "aer_fast": partial(fused, inplace=False),
    "aer_fast inplace": partial(fused, inplace=True),
}


def step(loss: Callable[..., Tensor], logits: Tensor, *constants: Tensor) -> Tensor:
    """Forward, and backward to the logits."""
    (grad,) = torch.autograd.grad(loss(logits, *constants), logits)
    return grad


def inputs(n: int) -> list[Tensor]:
    torch.manual_seed(0)
    logits = 2 * torch.randn(n, V)
    target = torch.randint(V, (n,))
    logprob = logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return [logits, target, logprob + 0.2 * torch.randn(n), torch.randn(n)]


def not_a_leaf(logits: Tensor) -> Tensor:
    return logits.requires_grad_().clone()


def gradient_error(loss: Callable[..., Tensor]) -> float:
    logits, *constants = inputs(8)
    exact = step(eager, not_a_leaf(logits.detach().double()), *constants)
    actual = step(loss, not_a_leaf(logits), *constants)
    return ((actual - exact).abs().max() / exact.abs().max()).item()


class PeakMemory:
    """The largest resident size while the context is open, sampled every 2 ms."""

    def __enter__(self) -> "PeakMemory":
        self.before = self.peak = self.resident()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
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


def measure(provider: str) -> Measurement:
    loss = PROVIDERS[provider]
    error = gradient_error(loss)
    assert error < 1e-4, f"{provider} is wrong: relative error {error:.1e}"
    original, *constants = inputs(N)
    times, peaks = [], []
    for repetition in range(REPETITIONS + 1):
        logits = not_a_leaf(original)  # in place, a step uses its logits up
        with PeakMemory() as memory:
            start = time.perf_counter()
            step(loss, logits, *constants)
            elapsed = time.perf_counter() - start
        if repetition > 0:  # the first one warms up
            times.append(1e3 * elapsed)
            peaks.append(memory.peak - memory.before)
    q1, median, q3 = statistics.quantiles(times, n=4)
    git = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    return Measurement(
        op="ppo_loss forward + backward",
        provider=provider,
        shape={"N": N, "V": V},
        dtype="float32",
        ms=round(median, 1),
        ms_iqr=round(q3 - q1, 1),
        peak_mib=round(max(peaks), 1),
        error=float(f"{error:.1e}"),
        device=cpu_name(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
        commit=subprocess.check_output(git, text=True, cwd=Path(__file__).parent).strip(),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    )


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def recorded() -> list[dict[str, Any]]:
    """The rows of the last saved run."""
    lines = RESULTS.read_text().splitlines()
    return [json.loads(line) for line in lines[-len(PROVIDERS) :]]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The README's table."""
    lines = ["| | ms | memory, MiB | of eager's time | of eager's memory |", "|---|--:|--:|--:|--:|"]
    for row in rows:
        ratios = [f"{row[key] / rows[0][key]:.2f}" for key in ("ms", "peak_mib")]
        costs = [f"{row['ms']:.0f} ± {row['ms_iqr']:.0f}", f"{row['peak_mib']:.0f}"]
        lines.append("| " + " | ".join([row["provider"], *costs, *ratios]) + " |")
    return "\n".join(lines)


def main(save: bool = False, provider: str | None = None) -> None:
    """Measure every provider, or one in this process.

    Args:
        save: append the rows to bench/results/from_logits.jsonl.
        provider: measure this one alone, and print its row as JSON.
    """
    if provider is not None:
        print(json.dumps(asdict(measure(provider))))
        return
    rows: list[dict[str, Any]] = []
    for name in PROVIDERS:
        command = [sys.executable, "-m", "bench.from_logits", "--provider", name]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    baseline = rows[0]
    table = Table(title=f"{baseline['op']}, N={N}, V={V}, float32, {baseline['device']}")
    for heading in ("provider", "ms", "± IQR", "peak MiB", "time", "memory", "error"):
        table.add_column(heading, justify="left" if heading == "provider" else "right")
    for row in rows:
        ratios = (f"{row[key] / baseline[key]:.2f}" for key in ("ms", "peak_mib"))
        costs = (f"{row['ms']:.0f}", f"{row['ms_iqr']:.0f}", f"{row['peak_mib']:.0f}")
        table.add_row(row["provider"], *costs, *ratios, f"{row['error']:.0e}")
    Console().print(table)
    if save:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        print(markdown(recorded()))


if __name__ == "__main__":
    tyro.cli(main)
