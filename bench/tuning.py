"""Choices of the library beside others that it could make: `pytest bench/tuning.py`, on a GPU.

    test_tile       tiles and warps of the row kernels, for `tile_config` of kernels/primitives.py
    test_loop       whole calls of linear_ppo_loss in other loops than the planner's: rows of a chunk, rows of
                    a tile, the vocabulary's order; for `_SPEED`, `_TILES` and `_WORKSPACE` of _linear/plan.py
    test_product    the three products of _linear/products.py alone, with a rounded output, with the factors
                    the other way round, in tiles of rows, in slices of words

Each choice is a row of the results, checked and timed like any provider; "as it is" is the library's own.
What wins goes into the library, with these rows as the reason.

Sizes: n rows, V words, D hidden.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from aer_fast import Plan, plan
from aer_fast._linear import products as ours
from bench import operations
from bench.cases import AS_IT_IS, FORWARD, QWEN, SMOLLM, Case
from bench.conftest import DEVICE, SHORT, Run, Work, size
from bench.operations import Result
from bench.peers.providers import Provider, from_hidden, providers_of, step_of

HALF = torch.bfloat16


def compare(
    run: Run, op: str, shape: dict[str, int], choice: str, build: Callable[[], Work], dtype: torch.dtype
) -> None:
    """One choice, as a row."""
    if DEVICE == "cpu" and size(run.config) != "tiny":
        pytest.skip("needs a GPU")
    identity: dict[str, Any] = {"op": op, "shape": shape, "rows": "all", "work": "all"}
    identity |= {"provider": choice, "version": ""}
    run(identity, "", build, dtype=dtype, ours=True, budget=SHORT)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = size(metafunc.config)
    if metafunc.function is test_tile:
        metafunc.parametrize("case", tile_cases(chosen), ids=lambda case: f"{case.op}, {case}")
        metafunc.parametrize("tile", list(tiles(chosen)), ids=tile_name)
    elif metafunc.function is test_loop:
        metafunc.parametrize(
            ("case", "loop"),
            [pytest.param(case, loop, id=f"{case}, {loop or AS_IT_IS}") for case, loop in loops(chosen)],
        )
    else:
        metafunc.parametrize(
            ("product", "shape", "way"),
            [
                pytest.param(product, shape, way, id=f"{product}, {shape}, {way}")
                for shape in product_shapes(chosen)
                for product in WAYS
                for way in ways(product, shape)
            ],
        )


# ---- tiles and warps of the row kernels

TILES = (1024, 2048, 4096, 8192, 16_384)
WARPS = (4, 8, 16, 32)
ENTRIES = (4, 64)  # of a thread; fewer waste it, more spill
Tile = tuple[int, int]  # entries, warps


def test_tile(case: Case, tile: Tile | None, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> Work:
        if tile is not None:
            from aer_fast.kernels import primitives

            config = dict(zip(("BLOCK_V", "num_warps"), tile))
            monkeypatch.setattr(primitives, "tile_config", lambda V, align, itemsize: config)
        return work_of(case, in_place_if_it_can(case))

    compare(run, f"tiles of {case.op}", case.shape, tile_name(tile), build, case.dtype)


def tile_cases(chosen: str) -> list[Case]:
    """The most telling first."""
    if chosen == "tiny":
        return [
            Case("ppo_loss", 64, 1000),
            Case(f"token_stats {FORWARD}", 64, 1000),
            Case("token_stats", 64, 1000),
        ]
    return [
        Case("ppo_loss", 8192, QWEN, dtype=HALF),
        Case(f"token_stats {FORWARD}", 8192, QWEN, dtype=HALF),
        Case("linear_ppo_loss", 8192, QWEN, 4096, HALF),
        Case("token_stats", 8192, QWEN, dtype=HALF),
        Case("ppo_loss", 4096, QWEN),
        Case(f"token_stats {FORWARD}", 4096, QWEN),
        Case("ppo_loss", 8192, SMOLLM, dtype=HALF),
    ]


def tiles(chosen: str) -> Iterator[Tile | None]:
    """None is what there is."""
    yield None
    for tile in TILES[:2] if chosen == "tiny" else TILES:
        for warps in WARPS[:1] if chosen == "tiny" else WARPS:
            if ENTRIES[0] <= tile // (32 * warps) <= ENTRIES[1]:
                yield tile, warps


def tile_name(tile: Tile | None) -> str:
    return AS_IT_IS if tile is None else "{} / {} warps".format(*tile)


def in_place_if_it_can(case: Case) -> Provider:
    """Ours."""
    return [p for p in providers_of(case, "triton") if p.name.startswith("aer_fast")][-1]


def work_of(case: Case, provider: Provider, found: Callable[[], dict[str, float]] = dict) -> Work:
    inputs, exact = operations.prepare(case.N, case.V, case.D, case.dtype, case.rows, DEVICE)
    fresh, step = step_of(case, provider, inputs)

    def errors(result: Result) -> dict[str, float]:
        return operations.errors(case, "all", exact, result)

    return Work(fresh, step, errors, operations.least(case, exact), found)


# ---- loops of the linear path


@dataclass(frozen=True)
class Loop:
    """rows: ``step`` rows of a chunk; vocabulary: ``step`` words of a slice."""

    order: Literal["rows", "vocabulary"]
    step: int
    tile: int

    def __str__(self) -> str:
        return f"{self.step} {'rows' if self.order == 'rows' else 'words'}, tiles of {self.tile}"


def test_loop(case: Case, loop: Loop | None, run: Run) -> None:
    made: list[Plan] = []

    def chosen(*sizes: Any, **options: Any) -> Plan:
        planned = plan(*sizes, **options)
        made.append(planned if loop is None else take(loop, planned))
        return made[-1]

    def build() -> Work:
        provider = from_hidden(case, run.record.impl, chosen)[0]
        return work_of(case, provider, found=lambda: about(made[-1], loop))

    compare(run, f"loops of {case.op}", case.shape, str(loop or AS_IT_IS), build, case.dtype)


def loops(chosen: str) -> list[tuple[Case, Loop | None]]:
    """None is what the planner chooses."""
    op = "linear_ppo_loss"
    if chosen == "tiny":
        some = [None, Loop("rows", 32, 16), Loop("vocabulary", 512, 16)]
        return [(Case(op, 64, 1024, 128), loop) for loop in some]
    every: list[Loop | None] = [None]
    tiles = {8192: (256, 512, 1024, 2048, 4096), 4096: (512, 1024, 2048), 2048: (512, 1024, 2048)}
    tiles |= {1024: (512, 1024), 512: (512,)}
    every += [Loop("rows", chunk, tile) for chunk, some in tiles.items() for tile in some]
    every += [Loop("vocabulary", 1 << k, 1024) for k in (16, 14, 13, 12, 11)]
    long: list[Loop | None] = [None, *(Loop("rows", chunk, 1024) for chunk in (4096, 8192, 16_384, 32_768))]
    return [
        *((Case(op, 8192, QWEN, 4096, HALF), loop) for loop in every),
        *((Case(op, 8192, QWEN, 1024, HALF), loop) for loop in every),
        *((Case(op, 32_768, QWEN, 4096, HALF), loop) for loop in long),
    ]


def take(loop: Loop, made: Plan) -> Plan:
    """The loop in the place of the one that was planned."""
    if made.products < 3:  # no gradients
        return made
    if loop.order == "rows":
        chunk = min(loop.step, made.rows)
        tile = chunk if made.inplace else min(loop.tile, chunk)
        return replace(made, order="rows", chunk=chunk, tile=tile, slice=made.V)
    tile, words = min(loop.tile, made.rows), min(loop.step, made.V)
    return replace(made, order="vocabulary", chunk=made.rows, tile=tile, slice=words, compact=False)


def about(made: Plan, loop: Loop | None) -> dict[str, float]:
    """The loop that ran; of the planner's own, what it was expected to take."""
    found = {"chunk": float(made.chunk), "tile": float(made.tile), "slice": float(made.slice)}
    return found | ({"predicted_ms": float(f"{1e3 * made.seconds:.3g}")} if loop is None else {})


# ---- products of the linear path

SLICES = 4  # of words
Multiply = Callable[[], Tensor]  # the output, or its last rows


@dataclass(frozen=True)
class Shape:
    n: int
    V: int
    D: int
    dtype: torch.dtype = HALF
    tiles: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"n={self.n} V={self.V} D={self.D}"


def test_product(product: str, shape: Shape, way: str, run: Run) -> None:
    def build() -> Work:
        outputs: list[Tensor] = []
        multiply = ways(product, shape)[way](factors(shape))

        def step() -> Result:
            outputs[:] = [multiply()]
            return Result()

        def errors(_: Result) -> dict[str, float]:
            return {product: float(f"{off(product, shape, outputs.pop()):.2g}")}

        return Work(tuple, step, errors, least(product, shape))

    sizes = {"N": shape.n, "V": shape.V, "D": shape.D}
    compare(run, f"product {product}", sizes, way, build, shape.dtype)


def product_shapes(chosen: str) -> list[Shape]:
    if chosen == "tiny":
        return [Shape(64, 1000, 32, torch.float32, (24,))]
    every = []
    for D in (4096, 1024):
        every.append(Shape(8192, QWEN, D, tiles=(256, 512, 1024, 2048, 4096)))
        every += [Shape(n, QWEN, D) for n in (4096, 2048, 1024, 512)]
    return every


@dataclass(frozen=True)
class Factors:
    hidden: Tensor  # [n, D]
    weight: Tensor  # [V, D]
    dz: Tensor  # [n, V]

    def empty(self, rows: int, columns: int, wide: bool = True) -> Tensor:
        dtype = torch.promote_types(self.dz.dtype, torch.float32) if wide else self.dz.dtype
        return torch.empty(rows, columns, dtype=dtype, device=self.dz.device)


@lru_cache(maxsize=1)
def factors(shape: Shape) -> Factors:
    torch.manual_seed(0)
    n, V, D = shape.n, shape.V, shape.D
    made = (torch.randn(*x, dtype=shape.dtype, device=DEVICE) for x in ((n, D), (V, D), (n, V)))
    return Factors(*made)


def logits(f: Factors, tile: int | None = None) -> Multiply:
    rows_at_once = tile or len(f.hidden)
    z = f.empty(rows_at_once, len(f.weight))

    def multiply() -> Tensor:
        for rows in f.hidden.split(rows_at_once):
            last = ours.logits(rows, f.weight, None, z[: len(rows)])
        return last

    return multiply


def logits_rounded(f: Factors) -> Multiply:
    z = f.empty(len(f.hidden), len(f.weight), wide=False)
    return lambda: torch.mm(f.hidden, f.weight.T, out=z)


def logits_words_first(f: Factors) -> Multiply:
    z = f.empty(len(f.weight), len(f.hidden))
    return lambda: ours.logits(f.weight, f.hidden, None, z).T


def logits_transposed(f: Factors) -> Multiply:
    """Of a copy of the weight, as another layout of the factor would be."""
    z, other = f.empty(len(f.hidden), len(f.weight)), f.weight.T.contiguous()
    return lambda: ours.logits(f.hidden, other.T, None, z)


def grad_hidden(f: Factors, tile: int | None = None) -> Multiply:
    out, rows_at_once = f.empty(*f.hidden.shape), tile or len(f.hidden)

    def multiply() -> Tensor:
        for dz, rows in zip(f.dz.split(rows_at_once), out.split(rows_at_once)):
            ours.grad_hidden(dz, f.weight, rows)
        return out

    return multiply


def grad_hidden_rounded(f: Factors) -> Multiply:
    out = f.empty(len(f.hidden), f.hidden.shape[1], wide=False)
    return lambda: torch.mm(f.dz, f.weight, out=out)


def grad_hidden_slices(f: Factors) -> Multiply:
    out, step = f.empty(*f.hidden.shape), -(-len(f.weight) // SLICES)

    def multiply() -> Tensor:
        for start in range(0, len(f.weight), step):
            s = slice(start, start + step)
            ours.grad_hidden(f.dz[:, s], f.weight[s], out, accumulate=start > 0)
        return out

    return multiply


def grad_weight(f: Factors, tile: int | None = None, wide: bool = False) -> Multiply:
    """Of one product; in tiles, summed up in float32 as the loop over chunks does it."""
    rows_at_once = tile or len(f.hidden)
    out = f.empty(len(f.weight), f.weight.shape[1], wide or tile is not None)

    def multiply() -> Tensor:
        for k, (dz, rows) in enumerate(zip(f.dz.split(rows_at_once), f.hidden.split(rows_at_once))):
            ours.grad_weight(dz, rows, out, accumulate=k > 0)
        return out

    return multiply


def grad_weight_rows_last(f: Factors) -> Multiply:
    out = f.empty(f.hidden.shape[1], len(f.weight), wide=False)
    return lambda: torch.mm(f.hidden.T, f.dz, out=out).T


Ways = dict[str, Callable[[Factors], Multiply]]
IN_TILES: dict[str, Callable[[Factors, int], Multiply]] = {
    "logits": logits,
    "grad_hidden": grad_hidden,
    "grad_weight": grad_weight,
}
WAYS: dict[str, Ways] = {
    "logits": {
        AS_IT_IS: logits,
        "rounded": logits_rounded,
        "words first": logits_words_first,
        "weight transposed": logits_transposed,
    },
    "grad_hidden": {
        AS_IT_IS: grad_hidden,
        "rounded": grad_hidden_rounded,
        f"{SLICES} slices of words": grad_hidden_slices,
    },
    "grad_weight": {
        AS_IT_IS: grad_weight,
        "float32": partial(grad_weight, wide=True),
        "rows last": grad_weight_rows_last,
    },
}


def ways(product: str, shape: Shape) -> Ways:
    in_tiles = IN_TILES[product]
    tiled: Ways = {f"tiles of {t}": lambda f, t=t: in_tiles(f, t) for t in shape.tiles}  # type: ignore[misc]
    return WAYS[product] | tiled


@lru_cache(maxsize=3)
def exact(product: str, shape: Shape) -> Tensor:
    """The output's product with a random vector, in float64."""
    f = factors(shape)
    if product == "logits":
        onto = operations.direction(shape.V, f.dz.device)
        return operations.project(f.hidden, operations.project(f.weight.T, onto))
    onto = operations.direction(shape.D, f.dz.device)
    if product == "grad_hidden":
        return operations.project(f.dz, operations.project(f.weight, onto))
    return operations.project(f.dz.T, operations.project(f.hidden, onto))


def off(product: str, shape: Shape, output: Tensor) -> float:
    """Relative to the norm."""
    expected = exact(product, shape)[-len(output) :]
    found = operations.project(output, operations.direction(output.shape[1], output.device))
    return float((found - expected).norm() / expected.norm())


def least(product: str, shape: Shape) -> tuple[float, float]:
    """Bytes and operations of the product as it is."""
    size = shape.dtype.itemsize
    out = {"logits": shape.n * shape.V * 4, "grad_hidden": shape.n * shape.D * 4}
    factors = {"logits": (shape.n + shape.V) * shape.D, "grad_hidden": shape.V * (shape.n + shape.D)}
    moved = factors.get(product, shape.n * (shape.V + shape.D)) * size
    moved += out.get(product, shape.V * shape.D * size)
    return float(moved), 2.0 * shape.n * shape.V * shape.D
