"""Where the time of the fused path goes: `pytest bench/breakdown.py -s`.

By torch's profiler: the time of the GPU's kernels themselves, or of operators on a CPU.
"""

import re
from collections import Counter

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from bench import measure
from bench.conftest import DEVICE, RECORD, size
from bench.operations import Case, prepare
from bench.peers import from_hidden, step_of
from bench.shapes import QWEN, SMOLLM

CASES = {
    "gpu": Case("linear_ppo_loss", 8192, QWEN, 4096, torch.bfloat16),
    "cpu": Case("linear_ppo_loss", 512, SMOLLM, 576),
    "tiny": Case("linear_ppo_loss", 64, 1024, 128),
}
KINDS = {  # the first that a kernel's or an operator's name matches
    "row kernel": r"_ppo_loss_kernel|_token_stats",
    "matrix products": r"gemm|nvjet|cutlass|::(mm|addmm|bmm)$",
    "copies": r"copy|memcpy",
}
ROUNDS = 3


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower())), "the rest")


def test_time_within(pytestconfig: pytest.Config) -> None:
    record = pytestconfig.stash[RECORD]
    case = CASES[size(pytestconfig)]
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
    for kind, ms in kinds.most_common():
        row = measure.Row(
            op=f"time within {case.op}",
            shape=case.shape,
            dtype=str(case.dtype).removeprefix("torch."),
            rows=case.rows,
            provider=kind,
            version="",
            work="all",
            ms=float(f"{ms:.4g}"),
            ms_iqr=0.0,
            rounds=ROUNDS,
            where=measure.where(DEVICE),
        )
        record.add(row)
        table.add_row(kind, f"{ms:.3g}", f"{100 * ms / kinds.total():.0f}%")
    for name, ms in names.most_common(12):
        table.add_row(f"  {name[:90]}", f"{ms:.3g}", "")
    Console(width=130).print(table)
