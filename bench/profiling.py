"""Where the time of the fused path goes, and where the row kernel's second read comes from.

    pytest bench/profiling.py [-s]

By torch's profiler: the time of the GPU's kernels themselves, or of operators on a CPU. In the same
session, by turns: a whole call, the products that it makes and nothing else (the same sizes, chunks and
dtypes), and three products whose outputs are rounded to the dtype of the factors, the least of any
implementation. With -s it prints the kernels, too.

    ncu $(python -m bench.profiling options) --log-file l2.csv python -m bench.profiling launch
    python -m bench.profiling read l2.csv --results FILE.jsonl

By Nsight Compute, whose counters become rows. A row of logits is read twice, for its statistics and for
its gradient. Where all of the second read comes from L2, device memory sees each logit once: "reads" is 1
then, and 2 where none of it does. The profiler empties the caches before each pass and repeats the kernel
until it has all counters; what it times is one launch.
"""

import argparse
import csv
import io
import os
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from aer_fast import Plan, plan
from aer_fast._linear import products as ours
from aer_fast.kernels.layout import CONSTANTS
from bench import measure
from bench.cases import BARE, QWEN, ROUNDED, SMOLLM, WHOLE, WITHIN, Case
from bench.conftest import DEVICE, RECORD, Record, size
from bench.operations import prepare
from bench.peers.calls import products
from bench.peers.providers import from_hidden, step_of

# ---- a call, by torch's profiler

CASES = {
    "gpu": [Case("linear_ppo_loss", 8192, QWEN, D, torch.bfloat16) for D in (4096, 1024)],
    "cpu": [Case("linear_ppo_loss", 512, SMOLLM, 576)],
    "tiny": [Case("linear_ppo_loss", 64, 1024, 128)],
}
KINDS = {  # the first that a kernel's or an operator's name matches
    "row kernel": r"_ppo_loss_kernel|_token_stats",
    "matrix products": r"gemm|nvjet|cutlass|::(mm|addmm|bmm)$",
    "copies": r"copy|memcpy",
}
ROUNDS = 3  # of the profile
TURNS = {"cuda": 15, "cpu": 3}  # of a call and its products


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("case", CASES[size(metafunc.config)], ids=str)


def test_time_within(case: Case, pytestconfig: pytest.Config) -> None:
    record = pytestconfig.stash[RECORD]
    inputs, _ = prepare(case.N, case.V, case.D, case.dtype, case.rows, DEVICE)
    _, step = step_of(case, from_hidden(case, record.impl)[0], inputs)
    step(*inputs.factors)
    with profile(
        activities=[ProfilerActivity.CUDA if DEVICE == "cuda" else ProfilerActivity.CPU]
    ) as profiler:
        for _ in range(ROUNDS):
            step(*inputs.factors)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    kinds, names = Counter[str](), Counter[str]()
    for event in profiler.key_averages():
        own = event.self_device_time_total if DEVICE == "cuda" else event.self_cpu_time_total
        kinds[kind_of(event.key)] += own / 1e3 / ROUNDS
        names[event.key] += own / 1e3 / ROUNDS
    assert kinds["matrix products"] > 0

    table = Table(title=f"{case.op}, {case}, {measure.where(DEVICE)['device']}")
    for heading in ("", "ms", "share"):
        table.add_column(heading, justify="right" if heading else "left")
    for kind, spent in kinds.most_common():
        write(record, case, kind, spent, rounds=ROUNDS)
        table.add_row(kind, f"{spent:.3g}", f"{100 * spent / kinds.total():.0f}%")
    for name, spent in names.most_common(12):
        table.add_row(f"  {name[:90]}", f"{spent:.3g}", "")

    hidden, weight = (x.detach() for x in inputs.factors)
    impl: Any = record.impl
    made = plan(case.N, case.V, case.D, dtype=case.dtype, device=DEVICE, impl=impl)
    assert made.order == "rows"
    rounded = products()
    times = by_turns(
        {
            WHOLE: lambda: step(*inputs.factors),
            BARE: bare(made, hidden, weight),
            ROUNDED: lambda: rounded(hidden, weight, backward=True),
        }
    )
    operations = 6.0 * case.N * case.V * case.D
    whole = statistics.median(times[WHOLE])
    for name, found in times.items():
        ms = statistics.median(found)
        q1, _, q3 = statistics.quantiles(found, n=4)
        of = {} if name == WHOLE else {"ours_over_it": float(f"{whole / ms:.4g}")}
        rate = float(f"{operations / ms / 1e9:.4g}")
        share = float(f"{rate / measure.limits(DEVICE, case.dtype)['tflop_per_s']:.3g}")
        more: dict[str, Any] = {"tflop_per_s": rate, "of_limit": share, "found": of}
        write(record, case, name, ms, ms_iqr=float(f"{q3 - q1:.3g}"), rounds=len(found), **more)
        table.add_row(name, f"{ms:.3g}", f"whole: {whole / ms:.2f} times" if of else "")
    Console(width=130).print(table)


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower())), "the rest")


def bare(made: Plan, hidden: Tensor, weight: Tensor) -> Callable[[], object]:
    """The three products of a plan's loop over rows, in the dtypes and places of the fused call."""
    wide = torch.promote_types(hidden.dtype, torch.float32)

    def empty(rows: int, columns: int, dtype: torch.dtype = wide) -> Tensor:
        return torch.empty(rows, columns, dtype=dtype, device=hidden.device)

    V, D = weight.shape
    z = empty(made.tile, V)
    dz = z if made.inplace else empty(made.chunk, V, hidden.dtype).normal_()
    rows_of, grad_weight = empty(made.chunk, D), empty(V, D, weight.dtype if made.chunks == 1 else wide)

    def run() -> None:
        for number, rows in enumerate(hidden.split(made.chunk)):
            for tile in rows.split(made.tile):
                ours.logits(tile, weight, None, z[: len(tile)])
            ours.grad_hidden(dz[: len(rows)], weight, rows_of[: len(rows)])
            ours.grad_weight(dz[: len(rows)], rows, grad_weight, accumulate=number > 0)

    return run


def by_turns(steps: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Milliseconds of each: what drifts, drifts for all of them."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(TURNS[DEVICE] + 1):
        for name, step in steps.items():
            measure.cool(DEVICE)
            start = measure.clock(DEVICE)()
            step()
            seconds = measure.clock(DEVICE)() - start
            if turn > 0:  # the first warms up
                times[name].append(1e3 * seconds)
    return times


def write(record: Record, case: Case, name: str, ms: float, ms_iqr: float = 0.0, **more: Any) -> None:
    record.add(
        measure.Row(
            op=WITHIN + case.op,
            shape=case.shape,
            dtype=str(case.dtype).removeprefix("torch."),
            rows=case.rows,
            provider=name,
            version="",
            work="all",
            ms=float(f"{ms:.4g}"),
            ms_iqr=ms_iqr,
            limits=measure.limits(DEVICE, case.dtype),
            where=measure.where(DEVICE),
            **more,
        )
    )


# ---- the row kernel, by Nsight Compute

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


def launch_step(launch: Launch) -> Callable[[], Tensor]:
    from aer_fast.kernels.ppo_loss import ppo_loss_fwd

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
        step = launch_step(launch)
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


def counted_rows(text: str, size: str) -> list[measure.Row]:
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
    parser = argparse.ArgumentParser(
        prog="python -m bench.profiling", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("what", choices=("options", "launch", "read"))
    parser.add_argument("file", nargs="?", type=Path, help="what ncu has written, for read")
    parser.add_argument("--size", choices=("gpu", "tiny"), default="gpu" if DEVICE == "cuda" else "tiny")
    parser.add_argument("--results", type=Path, help="file to append rows to")
    given = parser.parse_args(arguments)
    if given.what == "options":
        print(" ".join(OPTIONS))
    elif given.what == "launch":
        if DEVICE == "cpu":
            os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
        launch_all(given.size)
    else:
        try:
            rows = counted_rows(given.file.read_text(), given.size)
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
