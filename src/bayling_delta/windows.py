"""Windows: the buffers through which all weights pass, how they are filled, and how they are digested."""

import hashlib
import mmap
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bayling_delta.crew import Station
from bayling_delta.errors import CheckpointError
from bayling_delta.gathering import tiles
from bayling_delta.plan import OutputFile
from bayling_delta.reads import Gather, Mark, ReadList, Span
from bayling_delta.sources import Source, changed, open_fastest, open_source
from bayling_delta.system import ALIGNMENT
from bayling_delta.tensors import TensorRef

__all__ = ["Digester", "Piece", "Reader", "RecordChecker", "Window", "allocate"]

Piece = tuple[str, int, int]
"""What one digest covers of a window: (key, from, to), as indices of its buffer."""


@dataclass(slots=True, eq=False)
class Window:
    """A buffer, and what it holds at the moment."""

    stream: str
    """What passes through it: ``base``, ``delta``, ``model`` or ``result``."""
    buffer: memoryview
    """Aligned for direct I/O."""
    home: Station
    """Where it goes when it is free."""
    space: Path | TensorRef | OutputFile | None = None
    """What positions count: bytes of a file, or of a gathered tensor in row-major order."""
    origin: int = 0
    """The position of the buffer's first byte."""
    start: int = 0
    """The first position that is valid, and not in a window before this one."""
    stop: int = 0
    """The position after the last."""
    tensors: list[Piece] = field(default_factory=list)
    """What tensor digests cover of it."""
    whole: bool = True
    """Whether a file digest covers it, from `start` to `stop`."""
    records: list[Piece] = field(default_factory=list)
    """What zip records' checksums cover of it."""
    users: int = 0
    """How many stations have yet to release it."""


def allocate(chunk_bytes: int, count: int) -> list[memoryview]:
    """Return buffers that begin at a page, as direct I/O wants them."""
    memory = memoryview(mmap.mmap(-1, chunk_bytes * count))
    return [memory[number * chunk_bytes : (number + 1) * chunk_bytes] for number in range(count)]


class Digester:
    """SHA-256 of several things at once, each fed in order and finished when all its bytes have come."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._left = {key: size for key, size in sizes.items() if size}
        self._open: dict[str, Any] = {}
        self._done = {key: hashlib.sha256().hexdigest() for key, size in sizes.items() if not size}

    def update(self, buffer: memoryview, pieces: Sequence[Piece]) -> None:
        """Take in the next bytes of each key."""
        for key, start, stop in pieces:
            digest = self._open.get(key)
            if digest is None:
                digest = self._open[key] = hashlib.sha256()
            digest.update(buffer[start:stop])
            self._left[key] -= stop - start
            if not self._left[key]:
                del self._left[key]
                self._done[key] = self._open.pop(key).hexdigest()

    def finish(self) -> dict[str, str]:
        """Return every digest in hex; all bytes must have come."""
        if self._left:
            raise RuntimeError(f"{len(self._left)} digests are unfinished, that of {next(iter(self._left))} among them")
        return self._done


class RecordChecker:
    """CRC-32 of zip records, each fed in order, held against what the archive has of it."""

    def __init__(self, reads: ReadList) -> None:
        self._expected = {
            (step.file, record.name): record
            for step in reads.steps
            if isinstance(step, Span)
            for record in step.records
        }
        self._open: dict[tuple[Path, str], tuple[int, int]] = {}
        self.damaged: set[tuple[Path, str]] = set()
        """Files, and names of their records."""

    def update(self, file: Path, buffer: memoryview, pieces: Sequence[Piece]) -> None:
        """Take in the next bytes of each record."""
        if not pieces:
            return
        from isal.isal_zlib import crc32

        for name, start, stop in pieces:
            key = (file, name)
            record = self._expected[key]
            value, done = self._open.pop(key, (0, 0))
            value, done = crc32(buffer[start:stop], value), done + stop - start
            if done < record.size:
                self._open[key] = value, done
            elif value != record.crc32:
                self.damaged.add(key)


class _Cutter:
    """Hands out, window by window, what lies in each of a row of marks."""

    def __init__(self, marks: Sequence[Mark]) -> None:
        self._marks = marks
        self._next = 0

    def cut(self, window: Window) -> list[Piece]:
        pieces: list[Piece] = []
        while self._next < len(self._marks) and self._marks[self._next].start < window.stop:
            mark = self._marks[self._next]
            start, stop = max(mark.start, window.start), min(mark.stop, window.stop)
            pieces.append((mark.key, start - window.origin, stop - window.origin))
            if mark.stop > window.stop:
                break
            self._next += 1
        return pieces


class Reader:
    """Fills windows with what a read list says, one after the other."""

    def __init__(self, reads: ReadList, stamps: Mapping[Path, tuple[int, int]], tile_bytes: int, direct: bool) -> None:
        """``stamps``: each file's size and time of change when the plan was made."""
        self.done_bytes = 0
        self._stamps = stamps
        self._tile_bytes = tile_bytes
        self._direct = direct
        self._source: Source | None = None
        self._open = ExitStack()
        self._fills = self._all(reads)
        next(self._fills)

    def fill(self, window: Window) -> bool:
        """Fill the window with what comes next; False if nothing is left.

        Raises:
            CheckpointError: the input cannot be read, or is not what the plan was made of.
        """
        try:
            self._fills.send(window)
        except StopIteration:
            return False
        self.done_bytes += window.stop - window.start
        return True

    def close(self) -> None:
        """Close what is open, wherever the reading stands."""
        self._open.close()

    # Generators, each given the window to fill next: what is left to do is where they stand.

    def _all(self, reads: ReadList) -> Generator[None, Window, None]:
        window = yield
        for step in reads.steps:
            window = yield from self._span(step, window) if isinstance(step, Span) else self._gather(step, window)
        self._leave()

    def _span(self, span: Span, window: Window) -> Generator[None, Window, Window]:
        source = self._enter(span.file, window.buffer if self._direct else None)
        tensors = _Cutter(span.tensors)
        records = _Cutter([Mark(record.name, record.offset, record.offset + record.size) for record in span.records])
        position = span.start
        while position < span.stop:
            window.space, window.start = span.file, position
            window.origin = position // ALIGNMENT * ALIGNMENT
            window.stop = min(window.origin + len(window.buffer), span.stop)
            # Direct reads are of whole blocks; at the end of the file one comes back short.
            blocks = -(-(window.stop - window.origin) // ALIGNMENT)
            if source.read_into(window.buffer[: blocks * ALIGNMENT], window.origin) < window.stop - window.origin:
                raise CheckpointError(changed(span.file))
            source.forget(window.origin)
            window.whole = span.whole
            window.tensors = tensors.cut(window)
            window.records = records.cut(window)
            position = window.stop
            window = yield
        return window

    def _gather(self, gather: Gather, window: Window) -> Generator[None, Window, Window]:
        source = self._enter(gather.ref.file, None)
        for tile in tiles(source, gather.ref, self._tile_bytes):
            for start in range(0, tile.nbytes, len(window.buffer)):
                count = min(len(window.buffer), tile.nbytes - start)
                tile.copy(window.buffer[:count], start)
                window.space = gather.ref
                window.origin = window.start = tile.start + start
                window.stop = window.start + count
                window.tensors, window.whole, window.records = [(gather.key, 0, count)], False, []
                window = yield
        return window

    def _enter(self, path: Path, scratch: memoryview | None) -> Source:
        """The open file; the one before it is closed. Without ``scratch`` it is read through the page cache."""
        if self._source is None or self._source.path != path or (self._source.direct and scratch is None):
            self._leave()
            opened = open_source(path) if scratch is None else open_fastest(path, scratch)
            self._source = self._open.enter_context(opened)
            if self._source.stamp != self._stamps[path]:
                raise CheckpointError(changed(path))
        return self._source

    def _leave(self) -> None:
        if self._source is not None:
            self._source.check_unchanged()
            self._source = None
            self._open.close()
