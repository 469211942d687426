"""Tensors whose elements do not lie in row-major order, brought into it within a bounded memory.

A tile is a range of the tensor in row-major order, all that fits the memory given. Its elements are read
run by run in the order in which they lie, and taken out in the order in which they are wanted.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bayling_delta.errors import CheckpointError, Problem
from bayling_delta.sources import Source
from bayling_delta.tensors import DTYPES, TensorRef, row_major

__all__ = ["Tile", "tiles"]

_RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""Elements are moved, not interpreted: what counts is their size."""
_CLOSE = 1024
"""Bytes from one run to the next up to which reading what is between them is cheaper than a call for each."""
_SCRATCH = 1 << 18
"""Bytes that are read at once of runs that lie close together."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Some elements of a tensor, in memory."""

    start: int
    """The place of its first element, in bytes of the tensor in row-major order."""
    values: npt.NDArray[Any]
    """The elements, row-major as indexed; in memory they may lie otherwise."""

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.values.nbytes

    def copy(self, into: memoryview, start: int) -> None:
        """Fill ``into`` with the tile's bytes from ``start`` on; both in whole elements."""
        item_bytes = self.values.itemsize
        target = np.frombuffer(into, self.values.dtype)
        _copy_range(target, self.values, start // item_bytes)


def tiles(source: Source, ref: TensorRef, tile_bytes: int) -> Iterator[Tile]:
    """Yield the tensor in row-major order, at most ``tile_bytes`` at a time. A tile is valid until the next.

    Raises:
        CheckpointError: the file ends before the tensor does, or cannot be read.
    """
    item_bytes = DTYPES[ref.dtype]
    memory = np.empty(max(1, tile_bytes // item_bytes), _RAW[item_bytes])
    strides = row_major(ref.shape) if ref.strides is None else ref.strides
    for start, box in _boxes(ref.shape, memory.size):
        first = sum(low * stride for (low, _), stride in zip(box, strides, strict=True))
        sizes = tuple(high - low for low, high in box)
        values = _load(source, ref.offset + first * item_bytes, sizes, strides, memory)
        yield Tile(start * item_bytes, values)


def _boxes(shape: tuple[int, ...], elements: int) -> Iterator[tuple[int, tuple[tuple[int, int], ...]]]:
    """Cut an index space into boxes of at most so many elements, in row-major order.

    Yields the place of a box's first element and its (from, to) for every dimension: one index of the outer
    dimensions, a range of one, and the inner dimensions whole.
    """
    axis = len(shape)
    inner = 1
    while axis and inner * shape[axis - 1] <= elements:
        axis -= 1
        inner *= shape[axis]
    whole = tuple((0, size) for size in shape[axis:])
    if not axis:
        yield 0, whole
        return
    cut = axis - 1
    step = elements // inner
    place = 0
    for outer in _indices(shape[:cut]):
        before = tuple((index, index + 1) for index in outer)
        for low in range(0, shape[cut], step):
            high = min(low + step, shape[cut])
            yield place, (*before, (low, high), *whole)
            place += (high - low) * inner


def _indices(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every index of these sizes in row-major order, one at a time: there may be very many."""
    for number in range(math.prod(sizes)):
        index: list[int] = []
        for size in reversed(sizes):
            number, place = divmod(number, size)
            index.append(place)
        yield tuple(reversed(index))


def _load(
    source: Source, offset: int, sizes: tuple[int, ...], strides: tuple[int, ...], memory: npt.NDArray[Any]
) -> npt.NDArray[Any]:
    """Read a box of elements whose first lies at byte ``offset``, and return it indexed in its own order."""
    item_bytes = memory.itemsize
    # Along a stride of 0 the same element comes again: it is read once.
    read = [size if stride else 1 for size, stride in zip(sizes, strides, strict=True)]
    # In the file the dimension of the largest stride is the outermost.
    order = sorted(range(len(sizes)), key=lambda axis: (-strides[axis], axis))
    run, axis = 1, len(order)
    while axis and (read[order[axis - 1]] == 1 or strides[order[axis - 1]] == run):
        axis -= 1
        run *= read[order[axis]]
    # Runs that lie close together are read with what is between them.
    count, spacing = 1, run
    if axis and strides[order[axis - 1]] > run and strides[order[axis - 1]] * item_bytes <= _CLOSE:
        axis -= 1
        count, spacing = read[order[axis]], strides[order[axis]]
    place = 0
    for index in _indices([read[which] for which in order[:axis]]):
        skip = sum(one * strides[which] for one, which in zip(index, order[:axis], strict=True))
        _read_runs(source, offset + skip * item_bytes, memory[place : place + count * run].reshape(count, run), spacing)
        place += count * run
    stored = memory[: math.prod(read)].reshape([read[which] for which in order])
    back = [order.index(which) for which in range(len(order))]
    return np.broadcast_to(stored.transpose(back), sizes)


def _read_runs(source: Source, offset: int, target: npt.NDArray[Any], spacing: int) -> None:
    """Fill rows of ``target`` with runs of elements that begin ``spacing`` elements apart."""
    item_bytes = target.itemsize
    count, run = target.shape
    if count == 1 or spacing == run:
        _read_exactly(source, target.reshape(-1), offset)
        return
    scratch = np.empty(_SCRATCH // item_bytes, target.dtype)
    together = scratch.size // spacing
    for first in range(0, count, together):
        rows = target[first : first + together]
        here = scratch[: (len(rows) - 1) * spacing + run]
        _read_exactly(source, here, offset + first * spacing * item_bytes)
        rows[...] = np.lib.stride_tricks.as_strided(
            here, rows.shape, (spacing * item_bytes, item_bytes), writeable=False
        )


def _read_exactly(source: Source, target: npt.NDArray[Any], offset: int) -> None:
    view = target.data.cast("B")
    if source.read_into(view, offset) < len(view):
        raise CheckpointError(Problem("incomplete", str(source.path), "ends before its tensors do"))


def _copy_range(target: npt.NDArray[Any], values: npt.NDArray[Any], start: int) -> None:
    """Copy ``target.size`` elements of ``values``, counted in row-major order from ``start``."""
    if values.ndim <= 1:
        target[:] = values.reshape(-1)[start : start + target.size]
        return
    inner = math.prod(values.shape[1:])
    row, within = divmod(start, inner)
    done = 0
    if within:  # the rest of a row
        done = min(target.size, inner - within)
        _copy_range(target[:done], values[row], within)
        row += 1
    rows = (target.size - done) // inner
    middle = target[done : done + rows * inner]
    middle.reshape(rows, *values.shape[1:])[...] = values[row : row + rows]
    if done + rows * inner < target.size:  # the beginning of a row
        _copy_range(target[done + rows * inner :], values[row + rows], 0)
