"""Tiles and warps of the row kernels: `pytest bench/sweep.py`, on a GPU.

Each choice is a row of the results, checked and timed like any provider, under the name "4096 / 8 warps"; "as
it is" is the one that the kernels make now. What wins goes into `tile_config` of kernels/primitives.py, with
these rows as the reason.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench import operations
from bench.conftest import DEVICE, SHORT, Run, Work, size
from bench.operations import AS_IT_IS, FORWARD, Case
from bench.peers import Provider, providers_of, step_of
from bench.shapes import QWEN, SMOLLM

TILES = (1024, 2048, 4096, 8192, 16_384)
WARPS = (4, 8, 16, 32)
ENTRIES = (4, 64)  # of a thread; fewer waste it, more spill


def cases(chosen: str) -> list[Case]:
    """The most telling first."""
    half = torch.bfloat16
    if chosen == "tiny":
        return [
            Case("ppo_loss", 64, 1000),
            Case(f"token_stats {FORWARD}", 64, 1000),
            Case("token_stats", 64, 1000),
        ]
    return [
        Case("ppo_loss", 8192, QWEN, dtype=half),
        Case(f"token_stats {FORWARD}", 8192, QWEN, dtype=half),
        Case("linear_ppo_loss", 8192, QWEN, 4096, half),
        Case("token_stats", 8192, QWEN, dtype=half),
        Case("ppo_loss", 4096, QWEN),
        Case(f"token_stats {FORWARD}", 4096, QWEN),
        Case("ppo_loss", 8192, SMOLLM, dtype=half),
    ]


def choices(chosen: str) -> Iterator[tuple[int, int] | None]:
    """None is what there is."""
    yield None
    for tile in TILES[:2] if chosen == "tiny" else TILES:
        for warps in WARPS[:1] if chosen == "tiny" else WARPS:
            if ENTRIES[0] <= tile // (32 * warps) <= ENTRIES[1]:
                yield tile, warps


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = size(metafunc.config)
    metafunc.parametrize("case", cases(chosen), ids=lambda case: f"{case.op}, {case}")
    metafunc.parametrize("choice", list(choices(chosen)), ids=named)


def named(choice: tuple[int, int] | None) -> str:
    return AS_IT_IS if choice is None else "{} / {} warps".format(*choice)


def provider_of(case: Case) -> Provider:
    """Ours; in place where that is possible."""
    ours = [p for p in providers_of(case, "triton") if p.name.startswith("aer_fast")]
    return ours[-1]


def test_tile(case: Case, choice: tuple[int, int] | None, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu" and size(run.config) != "tiny":
        pytest.skip("needs a GPU")
    from aer_fast.kernels import primitives

    if choice is not None:
        config = dict(zip(("BLOCK_V", "num_warps"), choice))
        monkeypatch.setattr(primitives, "tile_config", lambda V, align, itemsize: config)

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
        "provider": named(choice),
        "version": "",
        "work": "all",
    }
    run(who, "", build, dtype=case.dtype, ours=True, budget=SHORT)
