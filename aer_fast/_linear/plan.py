"""The loop of the linear path, chosen from sizes and a memory budget: a pure function.

But for one question: whether this CPU multiplies bfloat16, which takes less memory. It is not asked for
ranks, whose machines may differ and whose loops must not.

Sizes: N rows (tokens that count), V vocabulary entries, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from aer_fast._linear.products import PIECE, narrow_on_cpu, slice_size
from aer_fast._rows import careful, pairs_with_torch, strips
from aer_fast._validation import check_count, check_size
from aer_fast.kernels.layout import PAIR_SUMS, SUMS

MIB = 1 << 20
GIB = 1 << 30

# Products, operations a second in (bfloat16, float32), and bytes a second. One H100 and two cores of an AMD
# EPYC: on other machines the seconds of a plan are off, what it chooses hardly is.
_SPEED = {"cuda": (728e12, 60e12, 3.0e12), "cpu": (2.0e11, 2.0e11, 1.0e10)}
_SYNC = {"cuda": 5e-5, "cpu": 0.0}  # seconds that waiting for the device costs

# What is held beside the gradients that are returned, unless the caller gives a budget. Constants, not what
# happens to be free: the same call must loop in the same way every time.
_WORKSPACE = {"cuda": 4 * GIB, "cpu": 384 * MIB}
_TILES = (1024, 512, 256, 128)  # rows of float32 logits at a time where the gradient has a place of its own
_PIECE_ROWS = 512  # of statistics alone on a CPU, whose logits stay in its caches
_SMALL_TILES = (32, 8, 1)  # tried where none of _TILES fits
_SLICES = tuple(1 << k for k in range(16, 9, -1))  # words of a step of the vocabulary's order
_SMALL_SLICES = (256, 64)
_FEWEST = 64  # rows of the smallest chunk that is considered
# bytes a second between two ranks: NVLink of an H100 in one direction; two processes on one machine
_LINK = {"cuda": 4.5e11, "cpu": 1.0e9}
_CLIPPED = 0.1  # share of rows expected to be clipped, of those that have no gradient then
_TOKEN = 256  # bytes of a token's statistics, constants and indices


@dataclass(frozen=True)
class Plan:
    """How a call loops over the logits, and what that is predicted to cost. Print it.

    There are two orders. "rows" takes one chunk of rows after another. Within a chunk, the float32 logits of
    one tile after another are made and turned into their gradient; the products with it follow at the end of
    the chunk. "vocabulary" makes the statistics of all rows first. A second pass then takes one slice of the
    vocabulary after another: one more product for the logits, but grad_weight is written once and needs no
    accumulator.

    Attributes:
        rows: N, the tokens that count.
        V: size of the vocabulary, the number of rows of the weight.
        D: hidden size, the number of its columns.
        dtype: of the factors, hidden and weight.
        device: "cuda" or "cpu".
        order: "rows" or "vocabulary".
        chunk: rows whose gradient of the logits is held at once.
        tile: rows whose float32 logits are held at once.
        slice: vocabulary entries of a step of the second pass or, on a CPU, of statistics alone, whose logits
            are held no longer than that; V where there is no such step.
        compact: whether rows that clipping leaves without a gradient are left out of the gradient's products.
        products: matrix products of 2 N V D operations each, before rows are left out.
        memory: bytes at the peak above the inputs, gradients included. Those of float16 parameters are held
            in float32; the backward takes their own size in float16 more while it rounds them.
        seconds: predicted time, for an H100 on "cuda" and for two cores of an AMD EPYC on "cpu".
        inplace: whether the gradient of the logits is written over them. Otherwise it has its own place, in
            the dtype of the factors.
        ranks: how many ranks hold slices of the vocabulary.
        traffic: bytes that a rank receives.
        held: bytes of logits that statistics keep for their backward, which then needs one product less.
    """

    rows: int
    V: int
    D: int
    dtype: torch.dtype
    device: str
    order: Literal["rows", "vocabulary"]
    chunk: int
    tile: int
    slice: int
    compact: bool
    products: int
    memory: int
    seconds: float
    inplace: bool = False
    ranks: int = 1
    traffic: int = 0
    held: int = 0

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return max(1, math.ceil(self.rows / self.chunk))

    def __str__(self) -> str:
        if self.order == "rows":
            chunks = "1 chunk" if self.chunks == 1 else f"{self.chunks} chunks"
            words = f" and {self.slice:,} words" if self.slice < math.ceil(self.V / self.ranks) else ""
            loop = f"{chunks} of {self.chunk:,} rows, logits of {self.tile:,} rows{words} at a time"
        else:
            loop = f"statistics of {self.tile:,} rows at a time, gradients of {self.slice:,} words at a time"
        machine = "an H100" if self.device == "cuda" else "two CPU cores"
        sent = f", {self.traffic / MIB:,.1f} MiB received" if self.ranks > 1 else ""
        kept = f", {self.held / GIB:.2f} of them kept for the backward" if self.held else ""
        V = f"{self.V:,} / {self.ranks}" if self.ranks > 1 else f"{self.V:,}"
        return (
            f"{self.rows:,} rows, V = {V}, D = {self.D:,}, {str(self.dtype)[6:]} on {self.device}\n"
            f"{loop}\n"
            f"{self.products} products, {self.memory / GIB:.2f} GiB{kept}{sent}, {self.duration} on {machine}"
        )

    @property
    def duration(self) -> str:
        """``seconds`` to be read, as in "53 ms"."""
        return f"{self.seconds:.1f} s" if self.seconds >= 1 else f"{1e3 * self.seconds:.0f} ms"


def plan(
    rows: int,
    V: int,
    D: int,
    *,
    tokens: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    operation: Literal["loss", "stats"] = "loss",
    grad_hidden: bool = True,
    grad_weight: bool = True,
    grad_bias: bool = False,
    param_dtype: torch.dtype | None = None,
    hidden_dtype: torch.dtype | None = None,
    softcap: bool = False,
    clippable: int = 0,
    impl: Literal["auto", "triton", "torch"] = "auto",
    memory_budget: int | None = None,
    chunk_tokens: int | None = None,
    ranks: int = 1,
    reduce_hidden: bool = True,
    ref_D: int | None = None,
) -> Plan:
    """Choose the loop of a linear function, from sizes and a memory budget.

    The choice is the fastest loop that fits the budget, and the smallest where none fits. Its time is
    predicted as operations over rate plus bytes over bandwidth, with nothing overlapped. This is a pure
    function: nothing is read from the device. The linear functions call it with their own arguments; call it
    to see what they will do.

    Args:
        rows: tokens that count. Masked ones take no part.
        V: size of the vocabulary.
        D: hidden size.
        tokens: all tokens, at least ``rows``: the gradient of hidden has a row for each. None for ``rows``.
        dtype: of hidden and weight; under autocast what they are cast to.
        device: "cuda" or "cpu".
        operation: "loss" computes gradients along with the loss. "stats" has a backward of its own, which
            makes the logits again in a fourth product, or finds them kept where all of them fit the budget.
            They are kept on the CPU, and on a GPU only if a budget is given; never with ``chunk_tokens`` or
            several ranks.
        grad_hidden: whether hidden gets a gradient.
        grad_weight: whether the weight gets one; False for a frozen head.
        grad_bias: whether a bias gets one. It counts where nothing else does.
        param_dtype: dtype of the weight, where autocast casts it to ``dtype`` from another. None for
            ``dtype``.
        hidden_dtype: likewise of hidden. None for ``param_dtype``.
        softcap: whether there is a softcap, which takes scratch memory with impl "torch".
        clippable: how many of the ``rows`` clipping can leave without a gradient: those with no entropy
            coefficient and no KL.
        impl: "auto", "triton" or "torch"; "auto" is "triton" on "cuda" and "torch" on "cpu".
        memory_budget: bytes above the inputs, gradients included. None: the gradients plus 4 GiB on "cuda" or
            384 MiB on "cpu".
        chunk_tokens: rows of a chunk, instead of a budget.
        ranks: how many ranks the vocabulary is split over. Memory, traffic and time are those of one rank.
        reduce_hidden: whether the ranks sum the gradient of hidden.
        ref_D: hidden size of a teacher whose logits are made beside these, in order "rows". None: no teacher.

    Returns:
        A `Plan`.

    Raises:
        ValueError: if an argument is not as above.

    Examples:
        >>> print(plan(8192, 151_936, 4096))  # Qwen3-8B
        8,192 rows, V = 151,936, D = 4,096, bfloat16 on cuda
        1 chunk of 8,192 rows, logits of 1,024 rows at a time
        3 products, 3.73 GiB, 53 ms on an H100
    """
    _check(rows, V, D, dtype, device, operation, impl)
    check_size("tokens", rows if tokens is None else tokens, rows)
    check_size("clippable", clippable, 0, rows)
    flags = {
        "grad_hidden": grad_hidden,
        "grad_weight": grad_weight,
        "grad_bias": grad_bias,
        "softcap": softcap,
    }
    check_size("ranks", ranks, 1)
    check_count("ref_D", ref_D)
    flags["reduce_hidden"] = reduce_hidden
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{name} must be True or False, got {flag!r}")
    param = dtype if param_dtype is None else param_dtype
    _check_dtype("param_dtype", param)
    of_hidden = param if hidden_dtype is None else hidden_dtype
    _check_dtype("hidden_dtype", of_hidden)
    check_count("memory_budget", memory_budget)
    check_count("chunk_tokens", chunk_tokens)
    needs_grad = grad_hidden or grad_weight or grad_bias
    inplace = device == "cpu" and impl != "triton"
    costs = _Costs(
        N=rows,
        tokens=rows if tokens is None else tokens,
        V=math.ceil(V / ranks),
        D=D,
        ranks=ranks,
        reduces=reduce_hidden and grad_hidden and ranks > 1,
        wide=8 if dtype == torch.float64 else 4,
        narrow=dtype.itemsize,
        param=param.itemsize,
        grad=_held(param),
        hidden_grad=_held(of_hidden),
        dz=0 if inplace else dtype.itemsize,
        device=device,
        tiled=impl == "torch" or (impl == "auto" and device == "cpu"),
        softcap=softcap,
        stats=operation == "stats",
        grad_hidden=grad_hidden,
        grad_weight=grad_weight,
        needs_grad=needs_grad,
        clippable=clippable if needs_grad else 0,
        ref_D=ref_D or 0,
        # the memory of ranks is planned for the least of their machines: their loops must be the same
        multiplies=inplace
        and ranks == 1
        and narrow_on_cpu(dtype, [of_hidden] * grad_hidden + [param] * grad_weight),
    )
    compact = needs_grad and (inplace or costs.compacting_pays())
    budget = memory_budget
    if budget is None:
        budget = costs.gradients() + _WORKSPACE[device]

    N = max(1, rows)
    chunk = N if chunk_tokens is None else min(chunk_tokens, N)
    # statistics of all ranks are exchanged once a chunk, which is then one tile
    loop = _Loop(rows, "rows", chunk, chunk if costs.one_tile else min(chunk, _TILES[0]), costs.V, compact)
    if costs.in_pieces and not needs_grad:
        chunk = chunk if chunk_tokens is None else min(chunk, _PIECE_ROWS)
        loop = loop._replace(chunk=chunk, tile=chunk, slice=min(costs.V, PIECE))
    # with room for one chunk no other loop is faster, and nothing is searched for while a device waits
    may_keep = costs.stats and needs_grad and chunk_tokens is None and ranks == 1
    kept = loop._replace(keeps=True)
    if may_keep and (device == "cpu" or memory_budget is not None) and costs.memory(kept) <= budget:
        loop = kept
    elif chunk_tokens is None and not (needs_grad and costs.memory(loop) <= budget):
        loop = _search(loop, costs, inplace, needs_grad, budget)
    products, seconds = costs.time(loop)
    sizes, held = (rows, V, D, dtype, device), costs.logits() if loop.keeps else 0
    memory, traffic = costs.memory(loop), costs.traffic()
    return Plan(*sizes, *loop[1:-1], products, memory, seconds, inplace, ranks, traffic, held)


def _check(rows: int, V: int, D: int, dtype: object, device: str, operation: str, impl: str) -> None:
    for name, value, least in (("rows", rows, 0), ("V", V, 1), ("D", D, 1)):
        check_size(name, value, least)
    _check_dtype("dtype", dtype)
    if not isinstance(device, str) or device not in _SPEED:
        raise ValueError(f"device must be 'cuda' or 'cpu', got {device!r}")
    if operation not in ("loss", "stats"):
        raise ValueError(f"operation must be 'loss' or 'stats', got {operation!r}")
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl must be 'auto', 'triton' or 'torch', got {impl!r}")


def _check_dtype(name: str, dtype: object) -> None:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {dtype!r}")


def _held(dtype: torch.dtype) -> int:
    """Bytes of a gradient's entry, which is held for the backward, of an input of this dtype."""
    return 4 if dtype == torch.float16 else dtype.itemsize


class _Loop(NamedTuple):
    """What a plan decides, in its order."""

    rows: int
    order: Literal["rows", "vocabulary"]
    chunk: int
    tile: int
    slice: int
    compact: bool
    keeps: bool = False  # the logits, from the forward of statistics to their backward

    @property
    def chunks(self) -> int:
        return max(1, math.ceil(self.rows / self.chunk))


def _search(one: _Loop, costs: _Costs, inplace: bool, needs_grad: bool, budget: int) -> _Loop:
    """The fastest loop that fits; the smallest where none does."""
    chosen: list[_Loop] = []
    for tiles, slices in ((_TILES, _SLICES), (_SMALL_TILES, _SMALL_SLICES)):
        chosen += _loops(one, costs, inplace, needs_grad, budget, tiles, slices)
        fitting = [loop for loop in chosen if costs.memory(loop) <= budget]
        if fitting:
            return min(fitting, key=lambda loop: costs.time(loop)[1])
    return min(chosen, key=costs.memory)


def _loops(
    one: _Loop,  # a single chunk
    costs: _Costs,
    inplace: bool,
    needs_grad: bool,
    budget: int,
    tiles: tuple[int, ...],
    slices: tuple[int, ...],
) -> Iterator[_Loop]:
    """The loops worth pricing."""
    N, V = one.chunk, costs.V
    for tile in dict.fromkeys(min(t, N) for t in tiles):
        if not needs_grad:
            most = tile
            if costs.in_pieces:
                most = min(tile, _PIECE_ROWS)
            elif inplace:
                most = costs.rows_that_fit(one._replace(tile=1), budget)
            rows = _even(N, max(min(most, N), 1))
            yield one._replace(chunk=rows, tile=rows)
            continue
        for words in dict.fromkeys(min(V, step) for step in slices if not costs.ref_D):
            rows = min(tile, _PIECE_ROWS) if inplace else tile
            yield one._replace(order="vocabulary", tile=rows, slice=words, compact=False)
        one = one._replace(tile=N if costs.one_tile else tile)
        yield one
        most = costs.rows_that_fit(one._replace(chunk=max(1, N - 1)), budget)
        for rows in {max(min(most, N - 1), 1), min(_FEWEST, N)}:
            chunk = _even(N, rows)
            yield one._replace(chunk=chunk, tile=chunk if costs.one_tile else min(tile, chunk))


def _even(N: int, most: int) -> int:
    """Rows of chunks of about one size and at most ``most`` rows; a multiple of 8, if that fits."""
    chunk = math.ceil(N / math.ceil(N / most))
    rounded = math.ceil(chunk / 8) * 8
    return rounded if rounded <= most else chunk


@dataclass(frozen=True)
class _Costs:
    """What a loop takes: bytes at the peak, and seconds."""

    N: int
    tokens: int
    V: int
    D: int
    wide: int  # bytes of a logit, a sum
    narrow: int  # bytes of a factor's entry; likewise below
    param: int  # the weight's, before autocast
    grad: int  # that of the weight's gradient, as it is held for the backward
    hidden_grad: int  # likewise of hidden's
    dz: int  # the gradient's of a logit, 0 where it overwrites the logit
    device: str
    tiled: bool  # whether the row operations are those of torch, which work on tiles
    softcap: bool
    stats: bool
    grad_hidden: bool
    grad_weight: bool
    needs_grad: bool  # whether anything gets a gradient
    clippable: int
    ranks: int
    reduces: bool
    ref_D: int  # a teacher's D, 0 where there is none
    multiplies: bool  # whether gradients that one product makes are made of factors that are not widened

    @property
    def one_tile(self) -> bool:
        """Whether a chunk is made in one piece."""
        return self.dz == 0 or self.ranks > 1

    @property
    def in_pieces(self) -> bool:
        """Whether statistics alone are made of some words at a time."""
        return self.dz == 0 and not self.ref_D

    def traffic(self) -> int:
        """Bytes that a rank receives: sums over the others' pieces, and grad_hidden as a ring sums it."""
        numbers = 2 * len(SUMS) + len(PAIR_SUMS) if self.ref_D else len(SUMS)
        sums = numbers * self.N * self.wide * (self.ranks - 1)
        return sums + 2 * (self.ranks - 1) * self.N * self.D * self.wide * self.reduces // self.ranks

    def logits(self) -> int:
        """Bytes of all logits."""
        return self.N * self.V * self.wide

    def gradients(self) -> int:
        hidden = self.tokens * self.grad_hidden * self.hidden_grad
        return (hidden + self.V * self.grad_weight * self.grad) * self.D

    def memory(self, loop: _Loop) -> int:
        N, V, D = self.N, self.V, self.D
        widened = self.device == "cpu" and self.narrow < self.wide
        always = self.tokens * _TOKEN
        if self.narrow != self.param:  # autocast: a copy of the weight
            always += V * (D + self.ref_D) * self.narrow
        grad_hidden = self.tokens * D * self.hidden_grad * self.grad_hidden
        grad_weight = V * D * self.grad * self.grad_weight
        slices = slice_size(V, D) * D * self.wide * widened

        def gathered(rows: int, *, narrow: bool = False) -> int:  # hidden, and its gradient before rounding
            if narrow:
                return rows * D * self.narrow * (1 + self.grad_hidden)
            return rows * D * (self.narrow + self.wide * (widened + self.grad_hidden))

        tile = self.logits() if loop.keeps else loop.tile * V * self.wide
        teacher = self.teacher(loop.tile, widened)
        words = min(V, PIECE) if self.in_pieces else V
        first = loop.tile * words * self.wide + gathered(loop.tile)
        first += max(self.work(loop.tile, words) + teacher, slices)
        if not self.needs_grad:
            return always + first
        if loop.order == "vocabulary":
            second = N * loop.slice * (self.wide + self.dz) + gathered(N) + grad_weight
            # a sum over slices widens dz, too
            rows = N if self.multiplies and self.grad_hidden and loop.slice < V else 0
            widened_slices = slice_size(loop.slice, D + rows) * (D + rows) * self.wide * widened
            second += max(self.work(N, loop.slice), widened_slices)
            return int(always + grad_hidden + max(first, second))
        accumulator = grad_weight
        if loop.chunks > 1 and self.grad < self.wide:
            accumulator = V * D * self.wide * self.grad_weight
        work = self.work(loop.tile, V) + teacher
        dz = loop.chunk * V * self.dz
        if self.dz and loop.keeps:
            taken = dz + tile + max(work + gathered(loop.tile), gathered(loop.chunk) + accumulator)
        elif self.dz:  # the tile is gone before the products; a first chunk has no accumulator yet
            taken = dz + tile + work + gathered(loop.tile)
            taken += accumulator * (loop.chunks > 1)
            taken = max(taken, dz + gathered(loop.chunk) + accumulator)
        else:
            apart = loop.chunks == 1 and self.grad == self.wide  # no slice is narrowed into the accumulator
            if self.multiplies and self.grad_weight:  # a sum over chunks widens slices of dz, which is narrow
                of_dz = slice_size(V, D + loop.chunk) * loop.chunk * self.wide
                products = accumulator + max(of_dz, slices)  # those are of the next chunk's logits
            else:
                products = max(accumulator, slices) if apart else accumulator + slices
            if self.multiplies and loop.chunks == 1:
                made = gathered(loop.chunk, narrow=True) + accumulator
                taken = tile + max(made, gathered(loop.tile) + slices, work)
            else:
                taken = tile + max(gathered(loop.chunk) + products, accumulator * (loop.chunks > 1) + work)
        rounding = accumulator + grad_weight if accumulator != grad_weight else 0
        return int(always + grad_hidden + max(taken, rounding))

    def teacher(self, rows: int, widened: bool) -> int:
        """Of so many rows of a teacher: hidden, logits, and what the row operations in torch need of them."""
        if not self.ref_D:
            return 0
        hidden = rows * self.ref_D * (self.narrow + self.wide * widened)
        if not self.tiled:
            return hidden + rows * self.V * self.wide
        on_cpu = self.device == "cpu"
        strip = min(rows, strips.rows_of(self.V, on_cpu)) * 5
        held = min(rows, pairs_with_torch.rows_of(self.V, on_cpu))
        few = min(rows, careful.rows_of(self.V, on_cpu)) * 14
        return hidden + (rows + strip + held + few) * self.V * self.wide

    def work(self, rows: int, columns: int) -> int:
        """Scratch memory of the row operations in torch."""
        if not self.tiled or self.ref_D:
            return 0
        strip = min(rows, strips.rows_of(columns, self.device == "cpu")) * columns * self.wide
        return int(strip * (3.25 if self.softcap else 2))

    def rows_that_fit(self, loop: _Loop, budget: int) -> int:
        """The largest chunk of a loop over rows within the budget; 0 if none."""
        low, high = 0, loop.chunk
        while low < high:
            rows = (low + high + 1) // 2
            tile = rows if self.one_tile or not self.needs_grad else loop.tile
            fits = self.memory(loop._replace(chunk=rows, tile=min(tile, rows))) <= budget
            low, high = (rows, high) if fits else (low, rows - 1)
        return low

    def compacting_pays(self) -> bool:
        """Whether two kernels and a wait save more than the products of the rows expected to be clipped."""
        rate, bandwidth = self.speed()
        dead = _CLIPPED * self.clippable
        saved = dead * (self.grad_hidden + self.grad_weight) * 2 * self.V * self.D / rate
        spent = self.N * self.V * self.wide / bandwidth + _SYNC[self.device] * self.N / _TILES[0]
        return saved > spent

    def speed(self) -> tuple[float, float]:
        narrow, wide, bandwidth = _SPEED[self.device]
        return (wide if self.narrow >= 4 else narrow), bandwidth

    def time(self, loop: _Loop) -> tuple[int, float]:
        """Matrix products, and seconds."""
        N, V, D = self.N, self.V, self.D
        rate, bandwidth = self.speed()
        gradients = self.grad_hidden + self.grad_weight
        again = self.needs_grad and not loop.keeps and (self.stats or loop.order == "vocabulary")
        dead = _CLIPPED * self.clippable / max(1, N) if loop.compact else 0.0
        products = 1 + again + gradients + (self.ref_D > 0)
        operations = (1 + again + gradients * (1 - dead)) * 2 * N * V * D + 2 * N * V * self.ref_D

        dz = self.dz or self.wide
        first = not self.needs_grad or loop.order == "vocabulary"  # makes statistics alone
        made = 1 + again + (self.ref_D > 0) - (first and self.in_pieces)
        moved = N * V * made * 2 * self.wide  # written by a product, read by the row kernel
        if self.needs_grad:
            moved += N * V * (self.wide * (not again) + dz * (1 + gradients))
        weights = V * D * self.narrow
        moved += V * self.ref_D * self.narrow * math.ceil(N / loop.tile)
        moved += weights * math.ceil(N / loop.tile)
        if loop.order == "rows":
            moved += weights * loop.chunks * self.grad_hidden
            if loop.chunks > 1:
                moved += self.grad_weight * V * D * (2 * loop.chunks * self.wide + self.grad)
        else:
            steps = math.ceil(V / loop.slice)
            moved += weights * (1 + self.grad_hidden) + N * D * self.narrow * steps
            moved += 2 * N * D * self.wide * steps * self.grad_hidden
        sent = self.traffic() / _LINK[self.device]
        return products, operations / rate + moved / bandwidth + sent
