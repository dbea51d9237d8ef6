"""Where the time of the fused path goes, and what it takes beside its products: `pytest bench/breakdown.py`.

By torch's profiler: the time of the GPU's kernels themselves, or of operators on a CPU. In the same
session, by turns: a whole call, the products that it makes and nothing else (the same sizes, chunks and
dtypes), and three products whose outputs are rounded to the dtype of the factors, the least that anybody
pays. With -s it prints the kernels, too.
"""

import re
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from aer_fast import Plan, plan
from aer_fast._linear import products as ours
from bench import measure
from bench.conftest import DEVICE, RECORD, Record, size
from bench.operations import BARE, ROUNDED, WHOLE, WITHIN, Case, prepare
from bench.peers import from_hidden, products, step_of
from bench.shapes import QWEN, SMOLLM

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
