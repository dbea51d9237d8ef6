"""Tiles and warps of the row kernels: `pytest bench/sweep.py`, on a GPU.

Each choice is a row of the results, checked and timed like any provider, under the name "4096 / 8 warps".
What wins goes into `tile_config` of kernels/primitives.py, with these rows as the reason.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from aer_fast import ppo_loss, token_stats
from bench import operations
from bench.conftest import DEVICE, Run, Work, size
from bench.operations import FORWARD, Case
from bench.peers import Provider, ours, step_of
from bench.shapes import QWEN, SMOLLM

OPS = (f"token_stats {FORWARD}", "token_stats", "ppo_loss")
TILES = (1024, 2048, 4096, 8192, 16_384)
WARPS = (4, 8, 16, 32)
ENTRIES = (4, 64)  # of a thread; fewer waste it, more spill


def cases(chosen: str) -> list[Case]:
    if chosen == "tiny":
        return [Case(op, 64, 1000) for op in OPS]
    shapes = [(8192, QWEN, torch.bfloat16), (4096, QWEN, torch.float32), (8192, SMOLLM, torch.bfloat16)]
    return [Case(op, N, V, dtype=dtype) for op in OPS for N, V, dtype in shapes]


def choices(chosen: str) -> Iterator[tuple[int, int]]:
    for tile in TILES[:2] if chosen == "tiny" else TILES:
        for warps in WARPS[:1] if chosen == "tiny" else WARPS:
            if ENTRIES[0] <= tile // (32 * warps) <= ENTRIES[1]:
                yield tile, warps


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = size(metafunc.config)
    metafunc.parametrize("case", cases(chosen), ids=lambda case: f"{case.op}, {case}")
    metafunc.parametrize(("tile", "warps"), list(choices(chosen)))


def provider_of(case: Case) -> Provider:
    if case.op == "ppo_loss":
        load: Callable[[], Any] = lambda: ours(ppo_loss, "triton", inplace=True)  # noqa: E731
        return Provider("aer_fast", load, "loss", copy=torch.clone)
    return Provider("aer_fast", lambda: lambda logits, y: token_stats(logits, y, impl="triton"))


def test_tile(case: Case, tile: int, warps: int, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu" and size(run.config) != "tiny":
        pytest.skip("needs a GPU")
    from aer_fast.kernels import primitives

    def config(V: int, align: int) -> dict[str, int]:
        return {"BLOCK_V": tile, "num_warps": warps}

    monkeypatch.setattr(primitives, "tile_config", config)

    def build() -> Work:
        inputs, exact = operations.prepare(case.N, case.V, case.D, case.dtype, case.rows, DEVICE)
        fresh, step = step_of(case, provider_of(case), inputs)
        return Work(
            fresh,
            step,
            errors=lambda result: operations.errors(case, "all", exact, result),
            least=operations.least(case, exact),
        )

    who: dict[str, Any] = {
        "op": f"tiles of {case.op}",
        "shape": case.shape,
        "rows": case.rows,
        "provider": f"{tile} / {warps} warps",
        "version": "",
        "work": "all",
    }
    run(who, "", build, dtype=case.dtype, ours=True)
