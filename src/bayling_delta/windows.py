"""Windows: the buffers through which all weights pass, how they are filled, and how they are digested."""

import hashlib
import mmap
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bayling_delta.crew import Station
from bayling_delta.errors import CheckpointError
from bayling_delta.gathering import Seen, tile_memory, tiles
from bayling_delta.plan import OutputFile
from bayling_delta.reads import Gather, Mark, ReadList, Span
from bayling_delta.sources import Source, changed, open_fastest, open_source
from bayling_delta.system import ALIGNMENT
from bayling_delta.tensors import TensorRef
from bayling_delta.zip_records import Record

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
    """Digests of several things at once, each fed in order and finished when all its bytes have come."""

    def __init__(
        self,
        sizes: Mapping[str, int],
        new: Callable[[], Any] = hashlib.sha256,
        finished: Callable[[str, str], None] | None = None,
        stops: Mapping[str, Sequence[int]] | None = None,
        passed: Callable[[str, str], None] | None = None,
    ) -> None:
        """``new`` begins a digest: SHA-256, or another of `hashlib`. ``finished`` is told each as (key, hex).

        ``stops`` are numbers of bytes of a key, ascending: when so many have come, ``passed`` is told the digest of
        them as (``key@stop``, hex).
        """
        self.parts: dict[str, str] = {}
        """Digests at the stops, by ``key@stop``."""
        self._new = new
        self._finished = finished
        self._passed = passed
        self._stops = {key: deque(places) for key, places in (stops or {}).items()}
        self._come = dict.fromkeys(self._stops, 0)
        self._left = {key: size for key, size in sizes.items() if size}
        self._open: dict[str, Any] = {}
        self._done = {key: new().hexdigest() for key, size in sizes.items() if not size}

    def update(self, buffer: memoryview, pieces: Sequence[Piece]) -> None:
        """Take in the next bytes of each key."""
        for key, start, stop in pieces:
            digest = self._open.get(key)
            if digest is None:
                digest = self._open[key] = self._new()
            self._left[key] -= stop - start
            if key in self._stops:
                start = self._up_to_last_stop(key, digest, buffer, start, stop)
            digest.update(buffer[start:stop])
            if not self._left[key]:
                del self._left[key]
                self._done[key] = self._open.pop(key).hexdigest()
                if self._finished:
                    self._finished(key, self._done[key])

    def _up_to_last_stop(self, key: str, digest: Any, buffer: memoryview, start: int, stop: int) -> int:
        """Take in the bytes before each stop that lies in the piece; return where the last of them is."""
        origin = self._come[key] - start
        self._come[key] += stop - start
        stops = self._stops[key]
        while stops and stops[0] - origin <= stop:
            place = stops.popleft()
            digest.update(buffer[start : place - origin])
            start = place - origin
            self.parts[f"{key}@{place}"] = digest.copy().hexdigest()
            if self._passed:
                self._passed(f"{key}@{place}", self.parts[f"{key}@{place}"])
        return start

    def finish(self) -> dict[str, str]:
        """Return every digest in hex; all bytes must have come."""
        if self._left:
            raise RuntimeError(f"{len(self._left)} digests are unfinished, that of {next(iter(self._left))} among them")
        return self._done


class RecordChecker:
    """CRC-32 of zip records, put together from pieces in any order, held against what the archive has of them."""

    def __init__(self, reads: ReadList) -> None:
        self._expected = {(file, record.name): record for step in reads.steps for file, record in _records_of(step)}
        self._left = set(self._expected)
        self._lock = threading.Lock()
        self._stretches: dict[tuple[Path, str, int], tuple[int, int]] = {}
        """What has come and does not yet reach its neighbours: from where, to where, and its CRC-32."""
        self._begins: dict[tuple[Path, str, int], int] = {}
        """Where the stretch begins that ends here."""
        self._damaged: set[tuple[Path, str]] = set()

    def update(self, file: Path, name: str, offset: int, data: memoryview) -> None:
        """Take in a record's bytes that lie at this offset of the file; each comes once."""
        from isal.isal_zlib import crc32, crc32_combine

        record = self._expected[file, name]
        start, stop, value = offset, offset + len(data), crc32(data)
        with self._lock:
            if (begin := self._begins.pop((file, name, start), None)) is not None:
                _, before = self._stretches.pop((file, name, begin))
                start, value = begin, crc32_combine(before, value, len(data))
            if (beyond := self._stretches.pop((file, name, stop), None)) is not None:
                end, after = beyond
                stop, value = end, crc32_combine(value, after, end - stop)
            if stop - start < record.size:
                self._stretches[file, name, start] = stop, value
                self._begins[file, name, stop] = start
            else:
                self._begins.pop((file, name, stop), None)
                self._left.discard((file, name))
                if value != record.crc32:
                    self._damaged.add((file, name))

    def damaged_files(self) -> set[Path]:
        """The files of which a record has proved to be damaged by now."""
        with self._lock:
            return {file for file, _ in self._damaged}

    def finish(self) -> set[tuple[Path, str]]:
        """Return the files and names of the records that are damaged; all bytes must have come."""
        if self._left:
            raise RuntimeError(f"{len(self._left)} records are unfinished, {next(iter(self._left))} among them")
        return self._damaged


def _records_of(step: Span | Gather) -> Iterable[tuple[Path, Record]]:
    return step.records if isinstance(step, Gather) else ((step.file, record) for record in step.records)


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
        self.reads = reads
        self.records = RecordChecker(reads)
        self._stamps = stamps
        self._tile_memory = tile_memory(tile_bytes)
        self._direct = direct
        self._sources: dict[Path, Source] = {}
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
        source = self._enter([span.file], window.buffer if self._direct else None)[span.file]
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
        files = [view.file for view in gather.ref.views]
        sources = self._enter(files, window.buffer if self._direct and gather.block > 0 else None)
        for tile in tiles(sources, gather.ref, self._tile_memory, self._seen(gather)):
            for start in range(0, tile.nbytes, len(window.buffer)):
                count = min(len(window.buffer), tile.nbytes - start)
                tile.copy(window.buffer[:count], start)
                window.space = gather.ref
                window.origin = window.start = tile.start + start
                window.stop = window.start + count
                window.tensors, window.whole, window.records = [(gather.key, 0, count)], False, []
                window = yield
        return window

    def _seen(self, gather: Gather) -> Seen:
        """What checks the bytes that a gathered tensor is read from."""

        def seen(file: Path, offset: int, data: memoryview) -> None:
            for path, record in gather.records:
                start = max(record.offset, offset)
                stop = min(record.offset + record.size, offset + len(data))
                if path == file and start < stop:
                    self.records.update(file, record.name, start, data[start - offset : stop - offset])

        return seen

    def _enter(self, paths: Sequence[Path], scratch: memoryview | None) -> Mapping[Path, Source]:
        """These files, open; others are closed. Without ``scratch`` they are read through the page cache."""
        wrong = {path for path, source in self._sources.items() if source.direct and scratch is None}
        if set(paths) != self._sources.keys() or wrong:
            self._leave()
            for path in dict.fromkeys(paths):
                opened = open_source(path) if scratch is None else open_fastest(path, scratch)
                source = self._sources[path] = self._open.enter_context(opened)
                if source.stamp != self._stamps[path]:
                    raise CheckpointError(changed(path))
        return self._sources

    def _leave(self) -> None:
        for source in self._sources.values():
            source.check_unchanged()
        self._sources = {}
        self._open.close()
