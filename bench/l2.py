"""How much of a row kernel's second read comes from L2: launched under Nsight Compute, its counters as rows.

    ncu $(python -m bench.l2 options) --log-file l2.csv python -m bench.l2 launch
    python -m bench.l2 read l2.csv --results FILE.jsonl

A row of logits is read twice, for its statistics and for its gradient. Where all of the second read comes
from L2, device memory sees each logit once: "reads" is 1 then, and 2 where none of it does. The profiler
empties the caches before each pass and repeats the kernel until it has all counters; what it times is one
launch.
"""

import argparse
import csv
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from torch import Tensor

from aer_fast.kernels.layout import CONSTANTS
from aer_fast.kernels.ppo_loss import ppo_loss_fwd
from bench import measure
from bench.shapes import QWEN

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SECTOR = 32  # bytes
READ, WRITTEN, TIME = "dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum"
SECTORS, HITS = "lts__t_sectors_op_read.sum", "lts__t_sectors_op_read_lookup_hit.sum"
METRICS = (READ, WRITTEN, TIME, SECTORS, HITS)
OPTIONS = (
    *("--csv", "--print-units", "base", "--metrics", ",".join(METRICS)),
    *("--kernel-name", "regex:_ppo_loss_kernel", "--profile-from-start", "off", "--clock-control", "none"),
)
# of a unit's name, what it stands for; ncu has spelled the units of time in two ways
SECONDS = {"nsecond": 1e-9, "ns": 1e-9, "usecond": 1e-6, "us": 1e-6, "msecond": 1e-3, "ms": 1e-3}
UNITS = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "sector": 1.0, "": 1.0, **SECONDS}


@dataclass(frozen=True)
class Launch:
    """One launch of the kernel."""

    name: str
    N: int
    V: int
    dtype: torch.dtype
    inplace: bool = False

    @property
    def size(self) -> int:
        """Bytes of the logits."""
        return self.N * self.V * self.dtype.itemsize


def launches(size: str) -> list[Launch]:
    """In the order in which they are launched."""
    rows, tile, V = (8192, 1024, QWEN) if size == "gpu" else (8, 4, 1000)
    return [
        Launch("out of place", rows, V, torch.bfloat16),
        Launch("in place", rows, V, torch.bfloat16, inplace=True),
        Launch("tile of a head", tile, V, torch.float32),  # its gradient is bfloat16
    ]


def step_of(launch: Launch) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(1, launch.N, launch.V, dtype=launch.dtype, device=DEVICE)
    grad = logits if launch.inplace else torch.empty(logits.shape, dtype=torch.bfloat16, device=DEVICE)
    target = torch.randint(launch.V, (launch.N,), device=DEVICE)
    one = torch.ones(launch.N, device=DEVICE)
    constants = torch.ones(launch.N, len(CONSTANTS), device=DEVICE)
    constants[:, CONSTANTS.index("entropy_coef")] = 0.1
    scale = torch.ones((), device=DEVICE)

    def step() -> Tensor:
        return ppo_loss_fwd(
            *(logits, target, one, 0.0, constants, scale, grad),
            on_policy=True,
            clip_low=0.2,
            clip_high=0.2,
            dual_clip=float("inf"),
            kl_coef=0.0,
        )

    return step


def launch_all(size: str) -> None:
    for launch in launches(size):
        step = step_of(launch)
        fields = step()  # compiles
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStart()
            step()
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()
        assert fields[-1].all(), "a row without a gradient is not read twice"
        del step
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def counters(text: str) -> list[dict[str, float]]:
    """Of each launch, in its order, the counters in bytes, seconds and sectors, from ncu's csv.

    ncu writes one line a counter; with --page raw one line a launch, below a line of units.
    """
    lines = text.splitlines()
    start = next((k for k, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError("no table of ncu in this file; its last lines:\n" + "\n".join(lines[-5:]))
    found: dict[int, dict[str, float]] = {}
    rows = list(csv.DictReader(io.StringIO("\n".join(lines[start:]))))
    long = bool(rows) and "Metric Name" in rows[0]
    units = {} if long else {name: unit or "" for name, unit in rows[0].items()}
    for row in rows if long else rows[1:]:
        if not (row["ID"] or "").isdigit():
            continue
        metrics = found.setdefault(int(row["ID"]), {})
        if long:
            values = [(row["Metric Name"], row["Metric Unit"] or "", row["Metric Value"])]
        else:
            values = [(name, units[name], row[name]) for name in METRICS if name in row]
        for name, unit, value in values:
            if name in METRICS:
                metrics[name] = float(value.replace(",", "")) * UNITS[unit]
    return [found[k] for k in sorted(found)]


def rows_of(text: str, size: str) -> list[measure.Row]:
    measured, known = counters(text), launches(size)
    if len(measured) != len(known) or any(set(m) != set(METRICS) for m in measured):
        names = [sorted(m) for m in measured]
        raise ValueError(f"expected {METRICS} of {len(known)} launches, got {names}")
    return [
        measure.Row(
            op="traffic of ppo_loss",
            shape={"N": launch.N, "V": launch.V, "D": 0},
            dtype=str(launch.dtype).removeprefix("torch."),
            rows="all",
            provider=launch.name,
            version="",
            work="all",
            ms=float(f"{1e3 * m[TIME]:.4g}"),
            ms_iqr=0.0,
            rounds=1,
            gb_per_s=float(f"{(m[READ] + m[WRITTEN]) / m[TIME] / 1e9:.4g}"),
            found={
                "reads": round(m[READ] / launch.size, 3),  # of the logits, from device memory
                "second_read_from_l2": round(2 - m[READ] / launch.size, 3),
                "writes": round(m[WRITTEN] / launch.size, 3),
                "l2_hits": round(m[HITS] / m[SECTORS], 3),  # of the sectors read through L2
                "l2_reads": round(m[SECTORS] * SECTOR / launch.size, 3),
            },
            where=measure.where(DEVICE),
        )
        for launch, m in zip(known, measured)
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.l2", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("options", "launch", "read"))
    parser.add_argument("file", nargs="?", type=Path, help="what ncu has written, for read")
    parser.add_argument("--size", choices=("gpu", "tiny"), default="gpu" if DEVICE == "cuda" else "tiny")
    parser.add_argument("--results", type=Path, help="file to append rows to")
    given = parser.parse_args(arguments)
    if given.what == "options":
        print(" ".join(OPTIONS))
    elif given.what == "launch":
        launch_all(given.size)
    else:
        try:
            rows = rows_of(given.file.read_text(), given.size)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
        for row in rows:
            measure.append(given.results or measure.default_results(DEVICE), row)
            told = ", ".join(f"{name} {value}" for name, value in row.found.items())
            print(f"{row.provider}, {row.shape['N']} x {row.shape['V']} {row.dtype}:", end=" ")
            print(f"{row.ms} ms, {row.gb_per_s} GB/s, {told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
