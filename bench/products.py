"""How the linear path multiplies and loops: `pytest bench/products.py`, on a GPU.

The three products of aer_fast/_linear/products.py alone, each as the library makes it ("as it is") and in
other ways: with a rounded output, with the factors the other way round, in tiles of rows, in slices of words.
And whole calls of linear_ppo_loss with the loop that the planner chooses beside others: rows of a chunk, rows
of a tile, or the vocabulary's order. Each choice is a row of the results, checked and timed like any
provider. What wins goes into `products.py`, and into `_SPEED`, `_TILES` and `_WORKSPACE` of `plan.py`,
with these rows as the reason.

Sizes: n rows, V words, D hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from aer_fast import Plan, plan
from aer_fast._linear import products as ours
from bench import operations
from bench.conftest import DEVICE, SHORT, Run, Work, size
from bench.operations import AS_IT_IS, Case, Result
from bench.peers import from_hidden, step_of
from bench.shapes import QWEN

HALF = torch.bfloat16
SLICES = 4  # of words

# ---- the products


@dataclass(frozen=True)
class Shape:
    n: int
    V: int
    D: int
    dtype: torch.dtype = HALF
    tiles: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"n={self.n} V={self.V} D={self.D}"


def shapes(chosen: str) -> list[Shape]:
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


Multiply = Callable[[], Tensor]  # the output, or its last rows
Ways = dict[str, Callable[[Factors], Multiply]]


def logits(f: Factors) -> Multiply:
    z = f.empty(len(f.hidden), len(f.weight))
    return lambda: ours.logits(f.hidden, f.weight, None, z)


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


def logits_tiles(f: Factors, tile: int) -> Multiply:
    z = f.empty(tile, len(f.weight))

    def multiply() -> Tensor:
        for rows in f.hidden.split(tile):
            last = ours.logits(rows, f.weight, None, z[: len(rows)])
        return last

    return multiply


def grad_hidden(f: Factors) -> Multiply:
    out = f.empty(*f.hidden.shape)

    def multiply() -> Tensor:
        ours.grad_hidden(f.dz, f.weight, out)
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


def grad_hidden_tiles(f: Factors, tile: int) -> Multiply:
    out = f.empty(*f.hidden.shape)

    def multiply() -> Tensor:
        for dz, rows in zip(f.dz.split(tile), out.split(tile)):
            ours.grad_hidden(dz, f.weight, rows)
        return out

    return multiply


def grad_weight(f: Factors, wide: bool = False) -> Multiply:
    out = f.empty(len(f.weight), f.weight.shape[1], wide)

    def multiply() -> Tensor:
        ours.grad_weight(f.dz, f.hidden, out)
        return out

    return multiply


def grad_weight_wide(f: Factors) -> Multiply:
    return grad_weight(f, wide=True)


def grad_weight_rows_last(f: Factors) -> Multiply:
    out = f.empty(f.hidden.shape[1], len(f.weight), wide=False)
    return lambda: torch.mm(f.hidden.T, f.dz, out=out).T


def grad_weight_tiles(f: Factors, tile: int) -> Multiply:
    """Summed up as the loop over chunks does it."""
    out = f.empty(*f.weight.shape)

    def multiply() -> Tensor:
        for k, (dz, rows) in enumerate(zip(f.dz.split(tile), f.hidden.split(tile))):
            ours.grad_weight(dz, rows, out, accumulate=k > 0)
        return out

    return multiply


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
        "float32": grad_weight_wide,
        "rows last": grad_weight_rows_last,
    },
}
IN_TILES = {"logits": logits_tiles, "grad_hidden": grad_hidden_tiles, "grad_weight": grad_weight_tiles}


def ways(product: str, shape: Shape) -> Ways:
    tiled: Ways = {f"tiles of {t}": tiles_of(product, t) for t in shape.tiles}
    return WAYS[product] | tiled


def tiles_of(product: str, tile: int) -> Callable[[Factors], Multiply]:
    return lambda f: IN_TILES[product](f, tile)


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


# ---- the loops


@dataclass(frozen=True)
class Loop:
    """rows: ``step`` rows of a chunk; vocabulary: ``step`` words of a slice."""

    order: Literal["rows", "vocabulary"]
    step: int
    tile: int

    def __str__(self) -> str:
        return f"{self.step} {'rows' if self.order == 'rows' else 'words'}, tiles of {self.tile}"


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


# ---- rows


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = size(metafunc.config)
    if "loop" in metafunc.fixturenames:
        metafunc.parametrize(
            ("case", "loop"),
            [pytest.param(case, loop, id=f"{case}, {loop or AS_IT_IS}") for case, loop in loops(chosen)],
        )
        return
    metafunc.parametrize(
        ("product", "shape", "way"),
        [
            pytest.param(product, shape, way, id=f"{product}, {shape}, {way}")
            for shape in shapes(chosen)
            for product in WAYS
            for way in ways(product, shape)
        ],
    )


def needs_a_gpu(config: pytest.Config) -> None:
    if DEVICE == "cpu" and size(config) != "tiny":
        pytest.skip("needs a GPU")


def test_loop(case: Case, loop: Loop | None, run: Run) -> None:
    needs_a_gpu(run.config)
    made: list[Plan] = []

    def chosen(*sizes: Any, **options: Any) -> Plan:
        planned = plan(*sizes, **options)
        made.append(planned if loop is None else take(loop, planned))
        return made[-1]

    def build() -> Work:
        inputs, exact = operations.prepare(case.N, case.V, case.D, case.dtype, case.rows, DEVICE)
        fresh, step = step_of(case, from_hidden(case, run.record.impl, chosen)[0], inputs)

        def errors(result: Result) -> dict[str, float]:
            return operations.errors(case, "all", exact, result)

        return Work(fresh, step, errors, operations.least(case, exact), found=lambda: about(made[-1], loop))

    who: dict[str, Any] = {"op": f"loops of {case.op}", "shape": case.shape, "rows": case.rows, "work": "all"}
    who |= {"provider": str(loop or AS_IT_IS), "version": ""}
    run(who, "", build, dtype=case.dtype, ours=True, budget=SHORT)


def about(made: Plan, loop: Loop | None) -> dict[str, float]:
    """The loop that ran; of the planner's own, what it was expected to take."""
    found = {"chunk": float(made.chunk), "tile": float(made.tile), "slice": float(made.slice)}
    return found | ({"predicted_ms": float(f"{1e3 * made.seconds:.3g}")} if loop is None else {})


def test_product(product: str, shape: Shape, way: str, run: Run) -> None:
    needs_a_gpu(run.config)

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
    who: dict[str, Any] = {"op": f"product {product}", "shape": sizes, "rows": "all", "work": "all"}
    who |= {"provider": way, "version": ""}
    run(who, "", build, dtype=shape.dtype, ours=True, budget=SHORT)
