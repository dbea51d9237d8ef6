"""Bytes, who may touch them, and who has: what is out of bounds, misaligned, never written, or a race."""

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.ptx import EmulationError
from bench.ptx.arithmetic import Array

Mask = NDArray[np.bool_]
CELL = 2  # bytes; nothing narrower is accessed


class Touches:
    """Who has touched each cell since its stamp changed: the least and greatest number, and if one wrote."""

    def __init__(self, cells: int) -> None:
        self.stamp, self.least, self.greatest = np.full((3, cells), -1)
        self.wrote = np.zeros(cells, np.bool_)

    def add(self, cells: Array, who: Array, stamp: Array, writes: bool) -> Mask:
        """Note them; where now one has written and another touched."""
        new = self.stamp[cells] != stamp
        restarted = cells[new]
        self.stamp[restarted] = stamp[new]
        self.least[restarted], self.greatest[restarted], self.wrote[restarted] = who[new], who[new], False
        np.minimum.at(self.least, cells, who)
        np.maximum.at(self.greatest, cells, who)
        if writes:
            self.wrote[cells] = True
        return self.wrote[cells] & (self.least[cells] != self.greatest[cells])


class Region:
    """Memory in one piece, from ``address`` on; with no ``readable``, only what was written may be read.

    Two accesses race if one of them writes, and they are of two blocks, or of two threads of a block with no
    barrier between them.
    """

    def __init__(self, address: int, data: NDArray[np.uint8], readable: Mask | None, writable: Mask) -> None:
        self.address, self.halves = address, data.view(np.uint16)
        self.writable, self.written = writable, np.zeros(len(writable), np.bool_)
        self.readable = self.written if readable is None else readable
        self.last_access = np.full(len(writable), -1)  # the number of an instruction
        self.intervals, self.blocks = Touches(len(writable)), Touches(len(writable))

    @cached_property
    def is_written(self) -> bool:
        return bool(self.writable.any())

    def load(self, cells: Array, dtype: np.dtype[Any]) -> Array:
        """[accesses, parts] of the cells [accesses, cells of an access]."""
        return self.halves[cells].view(dtype)

    def store(self, cells: Array, values: Array) -> None:
        self.halves[cells] = np.ascontiguousarray(values).view(np.uint16)
        self.written[cells] = True

    def cells(self, addresses: Array, size: int, writes: bool) -> Array:
        """[accesses, size / CELL], if these may be accessed."""
        what = f"{'store' if writes else 'load'} of {size} bytes"
        if (addresses % size).any():
            raise EmulationError(f"misaligned {what}")
        cells = (addresses.astype(np.int64) - self.address)[:, None] // CELL + np.arange(size // CELL)
        allowed = self.writable if writes else self.readable
        inside = (cells >= 0) & (cells < len(allowed))
        if not (inside.all() and allowed[cells].all()):
            raise EmulationError(f"{what} out of bounds, or of what nobody may touch or has written")
        return cells

    def race(
        self, cells: Array, thread: Array, block: Array, barriers: Array, writes: bool, now: int
    ) -> int | None:
        """Note the access, by instruction ``now``; the number of the one that it races with."""
        if not self.is_written:
            return None
        of_cell = [np.repeat(x, cells.shape[1]) for x in (thread, block, block << 32 | barriers)]
        flat = cells.ravel()
        races = self.intervals.add(flat, of_cell[0], of_cell[2], writes)
        races |= self.blocks.add(flat, of_cell[1], np.zeros_like(flat), writes)
        earlier = self.last_access[flat[races]]
        self.last_access[flat] = now
        if not len(earlier):
            return None
        return int(earlier[0]) if earlier[0] >= 0 else now
