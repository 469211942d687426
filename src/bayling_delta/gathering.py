"""Tensors whose elements do not lie in row-major order, brought into it within a bounded memory.

A tile is a range of the tensor in row-major order, all that fits the memory given. Its elements are read
run by run in the order in which they lie, and taken out in the order in which they are wanted. What lies in
*blocks*, whole heads of a permuted q or k, or a piece of every row, is one run for each view in a tile.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from bayling_delta.errors import CheckpointError, Problem
from bayling_delta.sources import Source, open_source
from bayling_delta.system import ALIGNMENT
from bayling_delta.tensors import DTYPES, TensorRef, View

__all__ = ["Seen", "Tile", "block_bytes", "elements_digest", "read_elements", "tile_memory", "tiles"]

_RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""Elements are moved, not interpreted: what counts is their size."""
_CLOSE = 1024
"""Bytes from one run to the next up to which reading what is between them is cheaper than a call for each."""
_SCRATCH = 1 << 18
"""Bytes that are read at once of runs that lie close together."""
_LARGEST_BLOCK: Final = 8 << 20
"""Bytes of a block: a head of Llama-3 405B has 8 MiB in float32. What lies in larger ones is read run by run."""
_DIGESTED: Final = 1 << 20
"""Bytes that are digested at once of tensors that are only compared."""

Array = npt.NDArray[Any]
Seen = Callable[[Path, int, memoryview], None]
"""Given what is read of a file in one run: the file, the first byte's offset, the bytes."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Some elements of a tensor, in memory."""

    start: int
    """The place of its first element, in bytes of the tensor in row-major order."""
    values: tuple[Array, ...]
    """The elements, row-major as indexed; in memory they may lie otherwise. Several are matrices joined row by row."""

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return sum(values.nbytes for values in self.values)

    def copy(self, into: memoryview, start: int) -> None:
        """Fill ``into`` with the tile's bytes from ``start`` on; both in whole elements."""
        item_bytes = self.values[0].itemsize
        target = np.frombuffer(into, self.values[0].dtype)
        if len(self.values) == 1:
            _copy_range(target, self.values[0], start // item_bytes)
        else:
            _copy_joined(target, self.values, start // item_bytes)


def tile_memory(tile_bytes: int) -> npt.NDArray[np.uint8]:
    """Memory for tiles of so many bytes, at an address that direct I/O takes."""
    memory = np.empty(tile_bytes + ALIGNMENT, np.uint8)
    lead = -memory.ctypes.data % ALIGNMENT
    return memory[lead : lead + tile_bytes]


def tiles(sources: Mapping[Path, Source], ref: TensorRef, memory: Array, seen: Seen | None = None) -> Iterator[Tile]:
    """Yield the tensor in row-major order, as much at a time as ``memory`` holds, which is one element or more.

    A tile is valid until the next. ``sources`` are the files of its views, open. They may be direct ones where the
    tensor lies in blocks (`block_bytes`) of which one, and two times `ALIGNMENT` for each view, fit into ``memory``;
    ``seen`` is then given every byte of the tensor once.

    Raises:
        CheckpointError: a file ends before the tensor does, or cannot be read.
    """
    item_bytes = DTYPES[ref.dtype]
    load = _Loader(sources, item_bytes, seen)
    # A direct read begins and ends on the grid, before and after what is wanted.
    around = 2 * ALIGNMENT if any(sources[view.file].direct for view in ref.views) else 0
    if not ref.axis:
        yield from _one_after_another(ref.views, load, memory, max(1, (memory.size - around) // item_bytes))
        return
    rows, width = ref.views[0].shape[0], sum(view.shape[1] for view in ref.views)
    together = (memory.size - around * len(ref.views)) // (width * item_bytes)
    if together < 1:
        for row in range(rows):
            pieces = [_row(view, row, item_bytes) for view in ref.views]
            for tile in _one_after_another(pieces, load, memory, max(1, (memory.size - around) // item_bytes)):
                yield Tile(row * width * item_bytes + tile.start, tile.values)
        return
    for low in range(0, rows, together):
        high = min(low + together, rows)
        values: list[Array] = []
        start = 0
        for view in ref.views:
            stop = start + (high - low) * view.shape[1] * item_bytes + around
            stop -= stop % ALIGNMENT if around else 0
            values.append(load.box(view, ((low, high), (0, view.shape[1])), memory[start:stop]))
            start = stop
        yield Tile(low * width * item_bytes, tuple(values))


def _one_after_another(views: Sequence[View], load: "_Loader", memory: Array, elements: int) -> Iterator[Tile]:
    start = 0
    for view in views:
        for place, box in _boxes(view.shape, elements):
            yield Tile(start + place * load.item_bytes, (load.box(view, box, memory),))
        start += view.elements * load.item_bytes


def _row(view: View, row: int, item_bytes: int) -> View:
    return View(view.file, view.offset + row * view.steps[0] * item_bytes, view.shape[1:], view.steps[1:])


def block_bytes(ref: TensorRef) -> int:
    """The bytes of the least piece of a tensor that is one run in each of its views; 0 where there is no such piece.

    It is one index of the views' first dimension, where the next one's elements follow in the file: a row, or a
    head of a permuted q or k.
    """
    inner = sum(math.prod(view.shape[1:]) for view in (ref.views if ref.axis else ref.views[:1]))
    nbytes = inner * DTYPES[ref.dtype]
    return nbytes if nbytes <= _LARGEST_BLOCK and all(map(_lies_in_blocks, ref.views)) else 0


def _lies_in_blocks(view: View) -> bool:
    if not view.shape:
        return True
    dense = 1
    for stride, size in sorted(zip(view.steps[1:], view.shape[1:], strict=True)):
        if size > 1:
            if stride != dense:
                return False
            dense *= size
    return view.shape[0] <= 1 or view.steps[0] == dense


def read_elements(sources: Mapping[Path, Source], ref: TensorRef, start: int, count: int) -> Array:
    """Read a range of a tensor's elements in row-major order: one dimension, unsigned integers of their size.

    For a few elements: what lies together in the range is read together, row by row.

    Raises:
        CheckpointError: a file ends before the tensor does, or cannot be read.
    """
    item_bytes = DTYPES[ref.dtype]
    load = _Loader(sources, item_bytes, None)
    found = np.empty(count, _RAW[item_bytes])
    rows = ref.views[0].shape[0] if ref.axis else 1
    widths = [view.elements // rows for view in ref.views]
    done = 0
    while done < count:
        row, within = divmod(start + done, sum(widths))
        which = 0
        while within >= widths[which]:
            within -= widths[which]
            which += 1
        view = ref.views[which]
        shape, steps = view.shape or (1,), view.steps or (1,)
        *outer, inner = (int(index) for index in np.unravel_index(row * widths[which] + within, shape))
        size = min(count - done, shape[-1] - inner)
        box = (*((index, index + 1) for index in outer), (inner, inner + size))
        room = np.empty(size * item_bytes, np.uint8)
        run = View(view.file, view.offset, shape, steps)
        found[done : done + size] = load.box(run, box, room).reshape(-1)
        done += size
    return found


def elements_digest(ref: TensorRef) -> bytes:
    """The SHA-256 of a tensor's elements in row-major order.

    Raises:
        CheckpointError: a file ends before the tensor does, or cannot be read.
    """
    digest = hashlib.sha256()
    part = bytearray(_DIGESTED)
    with ExitStack() as stack:
        sources = {path: stack.enter_context(open_source(path)) for path in {view.file for view in ref.views}}
        for tile in tiles(sources, ref, tile_memory(_DIGESTED)) if ref.elements else ():
            here = memoryview(part)[: tile.nbytes]
            tile.copy(here, 0)
            digest.update(here)
    return digest.digest()


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


@dataclass(frozen=True, slots=True)
class _Loader:
    """Reads boxes of views' elements into memory."""

    sources: Mapping[Path, Source]
    item_bytes: int
    seen: Seen | None

    def box(self, view: View, box: Sequence[tuple[int, int]], room: Array) -> Array:
        """Read a box of a view's elements into ``room``, bytes enough for them, and return it indexed in its order."""
        strides, source = view.steps, self.sources[view.file]
        sizes = [high - low for low, high in box]
        first = sum(low * stride for (low, _), stride in zip(box, strides, strict=True))
        offset = view.offset + first * self.item_bytes
        # Along a stride of 0 the same element comes again: it is read once.
        read = [size if stride else 1 for size, stride in zip(sizes, strides, strict=True)]
        # In the file the dimension of the largest stride is the outermost.
        order = sorted(range(len(sizes)), key=lambda axis: (-strides[axis], axis))
        run, axis = 1, len(order)
        while axis and (read[order[axis - 1]] == 1 or strides[order[axis - 1]] == run):
            axis -= 1
            run *= read[order[axis]]
        if axis:
            stored = room[: math.prod(read) * self.item_bytes].view(_RAW[self.item_bytes])
            self._read_all_runs(source, offset, stored, run, [(read[which], strides[which]) for which in order[:axis]])
        else:
            stored = self._read_run(source, offset, run, room)
        shaped = stored.reshape([read[which] for which in order])
        back = [order.index(which) for which in range(len(order))]
        return np.broadcast_to(shaped.transpose(back), sizes)

    def _read_run(self, source: Source, offset: int, run: int, room: Array) -> Array:
        """Elements that lie together, read at once, on the grid if the source wants that."""
        wanted = run * self.item_bytes
        lead = offset % ALIGNMENT if source.direct else 0
        length = -(-(lead + wanted) // ALIGNMENT) * ALIGNMENT if source.direct else wanted
        _read_exactly(source, room[:length], offset - lead, lead + wanted)
        found = room[lead : lead + wanted]
        if self.seen is not None:
            self.seen(source.path, offset, found.data)
        return found.view(_RAW[self.item_bytes])

    def _read_all_runs(
        self, source: Source, offset: int, target: Array, run: int, outer: Sequence[tuple[int, int]]
    ) -> None:
        """Fill ``target`` with the runs of every index of the ``outer`` dimensions, given as (size, stride)."""
        # Runs that lie close together are read with what is between them.
        count, spacing = 1, run
        size, stride = outer[-1]
        if stride > run and stride * self.item_bytes <= _CLOSE:
            count, spacing = size, stride
            outer = outer[:-1]
        place = 0
        for index in _indices([size for size, _ in outer]):
            skip = sum(one * stride for one, (_, stride) in zip(index, outer, strict=True))
            rows = target[place : place + count * run].reshape(count, run)
            _read_runs(source, offset + skip * self.item_bytes, rows, spacing)
            place += count * run


def _read_runs(source: Source, offset: int, target: Array, spacing: int) -> None:
    """Fill rows of ``target`` with runs of elements that begin ``spacing`` elements apart."""
    item_bytes = target.itemsize
    count, run = target.shape
    if count == 1 or spacing == run:
        _read_exactly(source, target.reshape(-1), offset, target.nbytes)
        return
    scratch = np.empty(_SCRATCH // item_bytes, target.dtype)
    together = scratch.size // spacing
    for first in range(0, count, together):
        rows = target[first : first + together]
        here = scratch[: (len(rows) - 1) * spacing + run]
        _read_exactly(source, here, offset + first * spacing * item_bytes, here.nbytes)
        rows[...] = np.lib.stride_tricks.as_strided(
            here, rows.shape, (spacing * item_bytes, item_bytes), writeable=False
        )


def _read_exactly(source: Source, target: Array, offset: int, wanted: int) -> None:
    """Fill ``target``, of which the file must have the first ``wanted`` bytes."""
    if source.read_into(target.data.cast("B"), offset) < wanted:
        raise CheckpointError(Problem("incomplete", str(source.path), "ends before its tensors do"))


def _copy_range(target: Array, values: Array, start: int) -> None:
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


def _copy_joined(target: Array, matrices: Sequence[Array], start: int) -> None:
    """The same of matrices whose rows follow one another: the first row of each, the second of each, and so on."""
    width = sum(matrix.shape[1] for matrix in matrices)
    row, within = divmod(start, width)
    done = 0
    if target.size and (within or target.size < width):  # a piece of a row
        line = np.concatenate([matrix[row] for matrix in matrices])
        done = min(target.size, width - within)
        target[:done] = line[within : within + done]
        row += 1
    rows = (target.size - done) // width
    middle = target[done : done + rows * width].reshape(rows, width)
    column = 0
    for matrix in matrices:
        middle[:, column : column + matrix.shape[1]] = matrix[row : row + rows]
        column += matrix.shape[1]
    if done + rows * width < target.size:
        _copy_joined(target[done + rows * width :], matrices, (row + rows) * width)
