"""The machine behind the linear functions: a loop over pieces of the logits, never all of them.

    for each chunk of the rows that count:
        for each tile of the chunk:    z = hidden · weightᵀ in float32;   statistics, loss, and dz over z
        grad_hidden = dz · weight;     grad_weight += dzᵀ · hidden

or, where the plan says so, all statistics first and then dz, one slice of the vocabulary after another. On a
CPU statistics alone are made of slices, too: of a tile's logits a slice, and of that its sums.

Where ranks hold slices of the vocabulary, each does this with its own: statistics are those of all slices,
one exchange a tile, and grad_hidden is summed over the ranks, chunk by chunk.

Sizes: N tokens, V vocabulary entries, D hidden; n rows that count, in the order they are computed.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from aer_fast._linear import products
from aer_fast._linear.call import Head, How, Inputs, Sizes
from aer_fast._linear.plan import Plan
from aer_fast._ranks import CLOSE, Message, Split, pair_messages, statistics_message
from aer_fast._rows import row_ops, sums
from aer_fast.kernels.layout import ELSEWHERE, STATE


class Rows(ABC):
    """What happens to a tile of logits."""

    room: Tensor | None = None  # kept from tile to tile; the loop drops it where products need the memory
    kept: Tensor | None = None  # [n, V], the logits of all rows, if they are kept
    made: bool = False  # whether `kept` holds them already

    def __init__(self, head: Head) -> None:
        self.head, self.ops = head, row_ops(head.impl)

    def constants(self, at: slice) -> tuple[Tensor, Tensor, float | None]:
        return self.head.target[at], self.head.temperature[at], self.head.softcap

    def statistics(self, z: Tensor, at: slice) -> tuple[Tensor, Tensor, Tensor]:
        """logprob [t], entropy [t] and state [STATE, t] of these rows among the n, of logits z [t, V]."""
        if self.head.split is None:
            return self.ops.token_stats_fwd(z.unsqueeze(0), *self.constants(at))
        sums = self.ops.row_sums(z.unsqueeze(0), *self.constants(at))
        return self.head.split.statistics(sums, self.head.temperature[at])

    def logits(self, at: slice, buffer: Tensor | None) -> Tensor:
        """The logits [t, V] of these rows among the n, in the buffer unless all are kept."""
        head, index = self.head, self.head.places[at]
        room = self.kept[at] if buffer is None and self.kept is not None else buffer
        assert room is not None
        z = room[: len(index)]
        if not self.made:
            products.logits(head.take(index), head.weight, head.bias, z)
        return z

    @abstractmethod
    def tile(self, z: Tensor, at: slice, out: Tensor | None, *, compact: bool) -> Tensor | None:
        """Do what is to be done with the logits z [t, V] of these rows among the n.

        Their gradients go to ``out`` [t, V], or nowhere. Those that are not 0 may be written one after
        another, and must be with ``compact``: then their rows, within the t, are returned, else None.
        """


class RowLoss(Rows):
    """Rows that a loss scores."""

    scale: Tensor | None = None  # what the gradients are multiplied by; the loop sets it

    @abstractmethod
    def largest_grad(self) -> Tensor:
        """About the largest gradient by a row's statistics, before ``scale``; []."""


class TokenRows(RowLoss):
    """Statistics, score and gradient, one after another."""

    @abstractmethod
    def score(self, at: slice, logprob: Tensor, entropy: Tensor, top1_prob: Tensor) -> tuple[Tensor, Tensor]:
        """scale times the gradients of the loss by logprob and entropy, of these rows among the n."""

    def known(self, z: Tensor, at: slice) -> Known:
        """What the gradient of these rows needs of their logits z [t, V]."""
        return self.scored(at, *self.statistics(z, at))

    def scored(self, at: slice, logprob: Tensor, entropy: Tensor, state: Tensor) -> Known:
        return Known(state, *self.score(at, logprob, entropy, state[1]))

    def tile(self, z: Tensor, at: slice, out: Tensor | None, *, compact: bool) -> Tensor | None:
        known = self.known(z, at)
        if out is None:
            return None
        rows = known.with_gradient()
        self.ops.token_stats_bwd(z.unsqueeze(0), *self.constants(at), *known, out.unsqueeze(0), rows)
        return rows


class Known(NamedTuple):
    """What the gradients of rows are made of, once their statistics and the loss are known."""

    state: Tensor  # [STATE, n]
    grad_logprob: Tensor  # [n]
    grad_entropy: Tensor  # [n]

    def with_gradient(self) -> Tensor:
        """The rows with a gradient; NaN is one."""
        return ((self.grad_logprob != 0) | (self.grad_entropy != 0)).nonzero()[:, 0]

    def at(self, rows: Tensor | slice) -> Known:
        return Known(self.state[:, rows].contiguous(), self.grad_logprob[rows], self.grad_entropy[rows])


def loss_pass(
    loss: RowLoss,
    inputs: Inputs,
    first: int,
    scale: Tensor,
    *,
    clippable: int = 0,
    ends: list[int] | None = None,
) -> Inputs:
    """Score every row of the loss's head; return the gradients of the ``inputs`` that are not None.

    The ``first`` rows may have a gradient, the others have none, and ``clippable`` of them none if they are
    clipped. ``scale`` [] multiplies the loss. ``ends`` are the ends of the sequences that are not to be cut.
    """
    head, split = loss.head, loss.head.split
    n, loss.scale = head.places.numel(), scale
    trains = any(x is not None for x in inputs) if split is None else split.trains
    first = first if trains else 0
    last_scale, chunks, by_row = None, list[list[slice]](), True
    if trains:
        plan = head.plan_alike(first, inputs, clippable=clippable)
        chunks, by_row = chunks_of(range(first), plan, ends), plan.order == "rows"
    if trains and wants_unit(head, plan):
        size = loss.largest_grad()
        size = size.where((size > 0) & size.isfinite(), 1.0)
        loss.scale, last_scale = 1.0 / size, scale * size
    if n > first:  # before there are gradients to hold
        forward = head.plan(n - first)
        rest = chunks_of(range(first, n), forward, None if first else ends)
        if head.how.ref_D is None and (forward.inplace or split is not None):
            assert isinstance(loss, TokenRows)
            score(loss, forward, rest)
        else:
            by_rows(loss, forward, rest, None)
    made: Inputs = (None, None, None)
    if trains:
        gradients = Gradients(head, inputs, last_scale)
        if by_row:
            by_rows(loss, plan, chunks, gradients)
        elif first:
            assert isinstance(loss, TokenRows)
            known = score(loss, plan, chunks)
            rows = known.with_gradient()
            by_vocabulary(head, plan, rows, known.at(rows), gradients, most=first)
        made = gradients.finish()
    if split is not None:
        split.ranks.close()
    return made


def messages(
    how: How, sizes: Sizes, *, first: int, n: int, clippable: int = 0, ends: list[int] | None = None
) -> list[Message]:
    """What the ranks of `loss_pass` will send."""
    split = how.split
    assert split is not None
    first = first if split.trains else 0
    chunks, by_row = list[list[slice]](), True
    if split.trains:
        plan = how.plan_alike(how.planner_of(sizes), first, clippable=clippable)
        chunks, by_row = chunks_of(range(first), plan, ends), plan.order == "rows"
    after = list[Message]()
    if n > first and how.ref_D is None:
        after.append(statistics_message(n - first, sizes.wide))
    elif n > first:
        forward = how.planner_of(sizes)(n - first, grad_hidden=False, grad_weight=False)
        tiles = itertools.chain.from_iterable(chunks_of(range(first, n), forward))
        after += [m for tile in tiles for m in pair_messages(tile.stop - tile.start, sizes.wide)]
    sent = chunk_messages(split, sizes, chunks, by_row=by_row, paired=how.ref_D is not None)
    return [*after, *sent, CLOSE]


def chunk_messages(
    split: Split,
    sizes: Sizes | Head,
    chunks: list[list[slice]],
    *,
    by_row: bool,
    again: bool = False,
    paired: bool = False,
) -> list[Message]:
    """Of each chunk, the statistics of its tiles and the sum of its grad_hidden; ``again``: the sum alone."""
    sent = list[Message]()
    pieces = [[tile.stop - tile.start for tile in chunk] for chunk in chunks]
    if not by_row:  # all statistics first, and one sum
        rows = sum(map(sum, pieces))
        pieces = [[rows]] if rows else []
    for tiles in pieces:
        for rows in () if again else tiles:
            sent += pair_messages(rows, sizes.wide) if paired else [statistics_message(rows, sizes.wide)]
        if split.reduces:
            sent.append(Message(True, sum(tiles) * sizes.D, sizes.wide))
    return sent


def wants_unit(head: Head, plan: Plan) -> bool:
    """Whether dz is held without the factor 1 / denominator, which comes last: float16 has not the range."""
    return head.weight.dtype == torch.float16 and not plan.inplace and head.places.numel() > 0


def score(loss: TokenRows, plan: Plan, chunks: list[list[slice]]) -> Known:
    """Score rows, and keep what their gradients will need."""
    tiles = [tile for chunk in chunks for tile in chunk]
    whole = statistics(loss.head, plan, chunks)
    start, found = tiles[0].start, list[Known]()
    for at in tiles:
        found.append(loss.scored(at, *(x[..., at.start - start : at.stop - start] for x in whole)))
    return Known(*(torch.cat(x, -1) for x in zip(*found)))


def statistics(
    head: Head, plan: Plan, chunks: list[list[slice]], kept: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """logprob [k], entropy [k] and state [STATE, k] of the chunks' rows, one after another.

    ``kept`` [n, V] is where the logits of all rows stay, if they do.
    """
    tiles = [tile for chunk in chunks for tile in chunk]
    if not tiles:
        nothing = head.temperature[:0]
        return nothing, nothing, nothing.new_zeros(len(STATE), 0)
    temperature = head.temperature[tiles[0].start : tiles[-1].stop]
    pieces = plan.inplace and kept is None
    if pieces:
        found = by_pieces(head, plan, tiles)
    else:
        rows = Statistics(head, kept)
        by_rows(rows, plan, chunks, None)
        found = torch.cat(rows.found, -1)
    if head.split is not None:  # those of all rows are exchanged at once
        return head.split.statistics(found, temperature)
    return sums.finish(found, temperature) if pieces else (found[0], found[1], found[2:])


class Statistics(Rows):
    """Statistics alone; where ranks hold slices, the sums of ours."""

    def __init__(self, head: Head, kept: Tensor | None) -> None:
        super().__init__(head)
        self.kept, self.found = kept, list[Tensor]()  # [2 + STATE, t], or [SUMS, t]

    def tile(self, z: Tensor, at: slice, out: Tensor | None, *, compact: bool) -> None:
        arguments = (z.unsqueeze(0), *self.constants(at))
        if self.head.split is not None:
            self.found.append(self.ops.row_sums(*arguments))
        else:
            logprob, entropy, state = self.ops.token_stats_fwd(*arguments)
            self.found.append(torch.cat((logprob[None], entropy[None], state)))


def by_pieces(head: Head, plan: Plan, tiles: list[slice]) -> Tensor:
    """The sums [SUMS, k] of the tiles' rows, of logits that are made a slice of the vocabulary at a time."""
    V, words, found = len(head.weight), min(plan.slice, products.PIECE), list[Tensor]()
    room = head.empty(max(at.stop - at.start for at in tiles) * words)
    for at in tiles:
        hidden, target, temperature = head.take(head.places[at]), head.target[at], head.temperature[at]
        pieces = [sums.of_nothing(target, temperature)]
        for s in slices(V, words):
            weight, bias = head.weight[s], None if head.bias is None else head.bias[s]
            z = room[: len(hidden) * len(weight)].view(len(hidden), len(weight))
            products.logits(hidden, weight, bias, z)
            constants = local(target, s), temperature, head.softcap
            pieces.append(row_ops(head.impl).row_sums(z.unsqueeze(0), *constants))
        found.append(sums.merge(torch.stack(pieces), temperature))
    return torch.cat(found, -1)


def local(target: Tensor, s: slice) -> Tensor:
    """Targets as columns of a slice of the vocabulary."""
    return torch.where((target >= s.start) & (target < s.stop), target - s.start, ELSEWHERE)


def slices(V: int, words: int) -> Iterator[slice]:
    return (slice(start, min(start + words, V)) for start in range(0, V, max(1, words)))


def by_rows(loss: Rows, plan: Plan, chunks: list[list[slice]], gradients: Gradients | None) -> None:
    """Make the logits tile by tile, hand them to the loss; after each chunk, the products with its dz."""
    head, V = loss.head, loss.head.weight.shape[0]
    tile_rows = max((t.stop - t.start for c in chunks for t in c), default=0)
    chunk_rows = max((c[-1].stop - c[0].start for c in chunks), default=0)
    dz = None
    if gradients is not None and not plan.inplace:
        dz = head.empty_dz(chunk_rows, V)
    buffer = out = None
    for number, chunk in enumerate(chunks):
        if buffer is None and loss.kept is None:
            buffer = head.empty(tile_rows, V)
        filled, kept = 0, []
        for at in chunk:
            index, z = head.places[at], loss.logits(at, buffer)
            if gradients is not None:
                out = gradients.over(z) if dz is None else dz[filled : filled + len(index)]
            live = loss.tile(z, at, out, compact=plan.compact)
            kept.append(index if live is None else index[live])
            filled += len(kept[-1])
        if gradients is not None:
            done = out if dz is None else dz  # where it is in place, a chunk is one tile
            assert done is not None
            if dz is not None:
                del z  # the products need the memory
                buffer = out = loss.room = None
            rows, last = chunk[-1].stop - chunk[0].start, number == len(chunks) - 1
            loss.room = None if last else loss.room
            gradients.add(torch.cat(kept), done[:filled], last=last, most=rows)
    loss.room = None


def by_vocabulary(
    head: Head, plan: Plan, rows: Tensor, known: Known, gradients: Gradients, *, most: int
) -> None:
    """The gradients of those rows of the head that are ``known``, a slice of the vocabulary at a time.

    ``most``: rows that there might have been.
    """
    if rows.numel() == 0 and not gradients.reduces:
        return
    ops = row_ops(head.impl)
    V, D = head.weight.shape
    index, target, temperature = (x[rows] for x in (head.places, head.target, head.temperature))
    hidden = head.take(index)
    total = gradients.room(len(index), most, whole=plan.slice >= V) if gradients.hidden is not None else None
    if total is not None and V == 0:  # nothing will be written to it
        total.rows.zero_()
    if gradients.like_weight is not None:
        dtype = held_dtype(gradients.like_weight) if gradients.scale is None else head.wide
        gradients.weight = torch.empty(V, D, dtype=dtype, device=hidden.device)
    if gradients.like_bias is not None:
        gradients.bias = head.empty(V)
    for s in slices(V, plan.slice):
        weight, bias = head.weight[s], None if head.bias is None else head.bias[s]
        z = products.logits(hidden, weight, bias, head.empty(len(index), len(weight)))
        dz = gradients.over(z) if plan.inplace else head.empty_dz(*z.shape)
        here = local(target, s)
        ops.token_stats_bwd(z.unsqueeze(0), here, temperature, head.softcap, *known, dz.unsqueeze(0))
        if total is not None:
            products.grad_hidden(dz, weight, total.rows, accumulate=s.start > 0)
        if gradients.weight is not None:
            products.grad_weight(dz, hidden, gradients.weight[s])
        if gradients.bias is not None:
            gradients.bias[s] = dz.sum(0, dtype=head.wide)
        del z, dz  # before the next are there
    if total is not None:
        gradients.put_hidden(index, total)


class Room(NamedTuple):
    """Rows of the gradient of hidden [k, D]; where ranks sum it, they are the first numbers of a message."""

    rows: Tensor
    message: Tensor | None


def held_dtype(like: Tensor) -> torch.dtype:
    """The dtype a gradient is held in: float16 has no room for one that a loss scaler has yet to multiply."""
    return torch.float32 if like.dtype == torch.float16 else like.dtype


class Gradients:
    """The gradients of hidden, weight and bias, summed up chunk by chunk; None for what gets none."""

    def __init__(self, head: Head, inputs: Inputs, scale: Tensor | None):
        """``scale`` multiplies the sums at the end."""
        self.head, self.scale = head, scale
        hidden, self.like_weight, self.like_bias = inputs
        self.hidden = None
        if hidden is not None:
            self.hidden = torch.zeros(hidden.shape, dtype=held_dtype(hidden), device=hidden.device)
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        held = [held_dtype(x) for x in inputs if x is not None]
        self.narrow = products.narrow(head.weight, held)

    @property
    def reduces(self) -> bool:
        """Whether the gradient of hidden is summed over ranks: they all take part, rows or none."""
        return self.head.split is not None and self.head.split.reduces

    def over(self, z: Tensor) -> Tensor:
        """Room for dz [n, V] over the logits z [n, V]: they themselves, or narrow if products take that."""
        return products.over(z, self.head.weight.dtype if self.narrow else z.dtype)

    def add(self, index: Tensor, dz: Tensor, last: bool, most: int) -> None:
        """Add what the rows at ``index`` give, by their dz [rows, V]; ``last``: nothing follows.

        ``most``: rows of the chunk, of which these are some.
        """
        head = self.head
        if self.hidden is not None and (index.numel() or self.reduces):
            room = self.room(len(index), most, whole=True)
            products.grad_hidden(dz, head.weight, room.rows)
            self.put_hidden(index, room)
        if index.numel() == 0:
            return
        if self.like_weight is not None:
            hidden = head.take(index)
            accumulate = self.weight is not None
            if self.weight is None:
                # a single product is rounded once by itself; a sum of several has to stay wide until its end
                dtype = held_dtype(self.like_weight) if last and self.scale is None else head.wide
                self.weight = torch.empty(self.like_weight.shape, dtype=dtype, device=hidden.device)
            products.grad_weight(dz, hidden, self.weight, accumulate)
        if self.like_bias is not None:
            total = dz.sum(0, dtype=head.wide)
            self.bias = total if self.bias is None else self.bias.add_(total)

    def room(self, rows: int, most: int, *, whole: bool) -> Room:
        """For the sums of so many rows; ``whole``: if one product makes them."""
        D, weight = self.head.weight.shape[1], self.head.weight
        if not self.reduces:
            once = whole and self.scale is None  # rounded once, and by the product if it does that
            dtype = weight.dtype if once and self.narrow else self.head.wide
            return Room(torch.empty(rows, D, dtype=dtype, device=weight.device), None)
        message = torch.zeros(most * D + 1, dtype=self.head.wide, device=self.head.hidden.device)
        return Room(message[: rows * D].view(rows, D), message)

    def put_hidden(self, index: Tensor, room: Room) -> None:
        assert self.hidden is not None
        rows, message = room
        if message is not None:
            assert self.head.split is not None
            self.head.split.ranks.sum_(message)
        rows = rows if self.scale is None else rows.mul_(self.scale)
        flat = self.hidden.view(-1, self.hidden.shape[-1])
        flat.index_copy_(0, index, rows.to(self.hidden.dtype))

    def finish(self) -> Inputs:
        """Return the gradients in the shapes of the inputs, and their dtypes or wider."""

        def rounded(total: Tensor | None, like: Tensor | None) -> Tensor | None:
            if like is None:
                return None
            if total is None:
                return torch.zeros(like.shape, dtype=held_dtype(like), device=like.device)
            return (total if self.scale is None else total.mul_(self.scale)).to(held_dtype(like))

        weight, self.weight = self.weight, None
        return self.hidden, rounded(weight, self.like_weight), rounded(self.bias, self.like_bias)


def chunks_of(rows: range, plan: Plan, ends: list[int] | None = None) -> list[list[slice]]:
    """Cut rows into chunks of tiles; with ``ends``, the ends of the sequences, only between sequences."""
    if ends is None:
        whole = [range(i, min(i + plan.chunk, rows.stop)) for i in rows[:: plan.chunk]]
        return [[slice(i, min(i + plan.tile, c.stop)) for i in c[:: plan.tile]] for c in whole]
    tiles = _pack([slice(*pair) for pair in pairwise([0, *ends]) if pair[0] < pair[1]], plan.tile)
    chunks = _pack(tiles, plan.chunk)
    return [[t for t in tiles if c.start <= t.start < c.stop] for c in chunks]


def _pack(pieces: list[slice], most: int) -> list[slice]:
    """Join neighbours to pieces of at most ``most`` rows; one that is longer stays alone."""
    joined: list[slice] = []
    for piece in pieces:
        if joined and piece.stop - joined[-1].start <= most:
            joined[-1] = slice(joined[-1].start, piece.stop)
        else:
            joined.append(piece)
    return joined
