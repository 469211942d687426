"""Carry out a plan: read both inputs, add, digest everything, hand the result to a sink.

The bytes pass through a fixed number of windows. Each input has a station that fills windows with what its
read list says, and one that digests them; one station adds; two digest the result, by tensor and by file; one
gives it to the sink. A window goes back to where it is filled when all its users have released it, so the
slowest station sets the pace, and memory stays what the plan says.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from bayling_delta.arithmetic import STORED, Array, Operation, as_float, differing, make_addition
from bayling_delta.checkpoint import Checkpoint
from bayling_delta.crew import Crew, Station
from bayling_delta.errors import Problem
from bayling_delta.plan import Budget, OutputFile, OutputTensor, Plan
from bayling_delta.reads import ReadList
from bayling_delta.tensors import DTYPES, TensorRef
from bayling_delta.torch_format import record_damage
from bayling_delta.windows import Digester, Reader, RecordChecker, Window, allocate

__all__ = ["DEFAULT_THREADS", "Additions", "Difference", "Digests", "Outcome", "Progress", "Sink", "digest", "run"]

DEFAULT_THREADS: Final = 8
"""As many as there are stations; at any time most of them wait for the disk or for each other."""
_BOUNCE_BYTES: Final = 64 << 10
"""What is copied at once of a tensor that lies at an odd address."""
_TICK_SECONDS: Final = 0.1
_FIRST_DIFFERENCES: Final = 3

Additions = Callable[[str, str, str], Operation]
"""(base, delta and result dtype) -> the addition for them."""
Progress = Callable[[int, int], None]
"""(bytes of the result done, bytes in all); called in the caller's thread, some ten times a second."""


class Sink(Protocol):
    """Where the result goes. Calls come one at a time, in the order of the plan."""

    def begin(self, file: OutputFile) -> None:
        """The bytes of this file come next."""

    def write(self, buffer: memoryview, offset: int, count: int) -> None:
        """The file's bytes from ``offset`` on: the first ``count`` of an aligned buffer.

        All of the buffer is given, but at the end of the file. It is the sink's until the call returns.
        """

    def end(self) -> None:
        """The file has all its bytes."""


@dataclass(frozen=True, slots=True)
class Digests:
    """SHA-256 in hex, of what was digested of a checkpoint."""

    files: dict[str, str]
    """By file name."""
    tensors: dict[str, str]
    """By tensor name."""


@dataclass(slots=True)
class Difference:
    """How one tensor of a model differs from the sum."""

    count: int = 0
    """Elements that differ."""
    first: list[tuple[int, float, float]] = field(default_factory=list)
    """The first few: (place in row-major order, what the sum has, what the model has)."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run found out."""

    base: Digests
    """By file or by tensor, as its read list says."""
    delta: Digests
    result: Digests
    """By file and by tensor."""
    non_finite: dict[str, int]
    """How many elements are infinite or NaN, for the tensors that have any."""
    differences: dict[str, Difference]
    """Where the sum differs from the model that it was compared with, by tensor."""
    damage: list[Problem]
    """Records of ``.bin`` inputs whose bytes are not those that were written."""


def run(
    plan: Plan,
    sink: Sink | None,
    *,
    threads: int = DEFAULT_THREADS,
    direct: bool = True,
    additions: Additions = make_addition,
    progress: Progress | None = None,
) -> Outcome:
    """Add base and delta as planned; give the result to ``sink``, if any, and compare it with the plan's model, if any.

    Memory is the plan's budget and a few hundred bytes a tensor. ``direct`` asks for reads past the page
    cache where the system has them. ``additions`` makes the addition for dtypes: the CPU's, or that of `gpu`.
    The result does not depend on any of these.

    Raises:
        CheckpointError: an input cannot be read, or is not what the plan was made of.
        OutputError: from the sink.
    """
    flow = _Flow(threads, direct)
    adding = Station()
    tensors = Digester({tensor.name: tensor.nbytes for tensor in plan.tensors})
    files = Digester({file.name: file.size for file in plan.files})
    users = [
        flow.station(lambda window: tensors.update(window.buffer, window.tensors)),
        flow.station(lambda window: _digest_file(files, window)),
    ]
    if sink is not None:
        users.append(flow.station(lambda window: _hand_over(sink, window)))
    adder = _Adder(plan.files, additions, flow.release, lambda window: flow.share(window, users))
    adding.handle = adder.take
    flow.supply("result", plan.budget, adding)
    base = flow.read("base", plan.base, plan.base_reads, plan.budget, adding)
    delta = flow.read("delta", plan.delta, plan.delta_reads, plan.budget, adding)
    model: _Input | None = None
    if plan.model is not None and plan.model_reads is not None:
        model = flow.read("model", plan.model, plan.model_reads, plan.budget, adding)
    total = sum(tensor.nbytes for tensor in plan.tensors)
    flow.run(lambda: progress(adder.done_bytes, total) if progress else None)
    if not adder.finished:
        raise RuntimeError("the addition came to a stop before its end")
    return Outcome(
        base.digests(),
        delta.digests(),
        Digests(files.finish(), tensors.finish()),
        adder.non_finite,
        adder.differences,
        [problem for side in (base, delta, model) if side for problem in side.damage()],
    )


def digest(
    checkpoint: Checkpoint,
    reads: ReadList,
    budget: Budget,
    *,
    threads: int = DEFAULT_THREADS,
    direct: bool = True,
    progress: Progress | None = None,
) -> tuple[Digests, list[Problem]]:
    """Read a checkpoint as its read list says, and return its digests and the damage found by checksums.

    Raises:
        CheckpointError: it cannot be read, or changes meanwhile.
    """
    flow = _Flow(threads, direct)
    found = flow.read("model", checkpoint, reads, budget, None)
    flow.run(lambda: progress(min(found.reader.done_bytes, reads.nbytes), reads.nbytes) if progress else None)
    return found.digests(), found.damage()


# the stations


class _Flow:
    """The crew, the windows, and what fills and digests them, for one run."""

    def __init__(self, threads: int, direct: bool) -> None:
        self._crew = Crew(threads)
        self._direct = direct
        self._lock = threading.Lock()
        self._free: list[Window] = []
        self._readers: list[Reader] = []

    def supply(self, stream: str, budget: Budget, home: Station) -> None:
        """Make the windows of a stream; they start, and end up, at their home."""
        self._free += [Window(stream, buffer, home) for buffer in allocate(budget.chunk_bytes, budget.windows)]

    def read(
        self, stream: str, checkpoint: Checkpoint, reads: ReadList, budget: Budget, then: Station | None
    ) -> "_Input":
        """Have a checkpoint read and digested, and every window given to ``then`` too."""
        reader = Reader(reads, {file.path: file.stamp for file in checkpoint.files}, budget.tile_bytes, self._direct)
        found = _Input(reader, Digester(reads.files), Digester(reads.tensors), RecordChecker(reads))
        users = [self.station(found.check_files)]
        if reads.tensors:
            users.append(self.station(found.check_tensors))
        if then is not None:
            users.append(then)
        self.supply(stream, budget, Station(lambda window: self.share(window, users) if reader.fill(window) else None))
        self._readers.append(reader)
        return found

    def station(self, use: Callable[[Window], None]) -> Station:
        """A station that does one thing with a window, and releases it."""

        def handle(window: Window) -> None:
            use(window)
            self.release(window)

        return Station(handle)

    def share(self, window: Window, users: Sequence[Station]) -> None:
        """Give a window to several stations, each of which will release it."""
        window.users = len(users)
        for user in users:
            self._crew.post(user, window)

    def release(self, window: Window) -> None:
        """One user is done with a window; when all are, it goes home."""
        with self._lock:
            window.users -= 1
            free = not window.users
        if free:
            self._crew.post(window.home, window)

    def run(self, tick: Callable[[], None]) -> None:
        """Let everything flow until it comes to rest, calling ``tick`` in this thread now and then."""
        try:
            with self._crew:  # when this is left, all threads have ended
                for window in self._free:
                    self._crew.post(window.home, window)
                while not self._crew.wait_until_idle(_TICK_SECONDS):
                    tick()
            tick()
        finally:
            for reader in self._readers:
                reader.close()


@dataclass(frozen=True, slots=True)
class _Input:
    """What is found out about one input."""

    reader: Reader
    _files: Digester
    _tensors: Digester
    _records: RecordChecker

    def check_files(self, window: Window) -> None:
        if window.whole and isinstance(window.space, Path):
            piece = (window.space.name, window.start - window.origin, window.stop - window.origin)
            self._files.update(window.buffer, [piece])
        if window.records and isinstance(window.space, Path):
            self._records.update(window.space, window.buffer, window.records)

    def check_tensors(self, window: Window) -> None:
        self._tensors.update(window.buffer, window.tensors)

    def digests(self) -> Digests:
        return Digests(self._files.finish(), self._tensors.finish())

    def damage(self) -> list[Problem]:
        found = {(file, record.name) for file, record in self._records.damaged}
        return [record_damage(file, name) for file, name in sorted(found)]


def _digest_file(digester: Digester, window: Window) -> None:
    if isinstance(window.space, OutputFile):
        digester.update(window.buffer, [(window.space.name, 0, window.stop - window.origin)])


def _hand_over(sink: Sink, window: Window) -> None:
    file = window.space
    if isinstance(file, OutputFile):
        if not window.origin:
            sink.begin(file)
        sink.write(window.buffer, window.origin, window.stop - window.origin)
        if window.stop == file.size:
            sink.end()


# the addition

_INPUTS: Final = ("base", "delta", "model")
_Wait = Generator[str, Window, Any]
"""Part of the addition: it yields the stream of which it needs the next window, and is sent that."""


class _Adder:
    """Adds tensor by tensor, over whatever of base, delta and result lies in memory together."""

    def __init__(
        self,
        files: Sequence[OutputFile],
        additions: Additions,
        release: Callable[[Window], None],
        emit: Callable[[Window], None],
    ) -> None:
        self.done_bytes = 0
        self.non_finite: dict[str, int] = {}
        self.differences: dict[str, Difference] = {}
        self._additions = additions
        self._release = release
        self._emit = emit
        self._arrived: dict[str, deque[Window]] = {stream: deque() for stream in (*_INPUTS, "result")}
        self._current: dict[str, Window | None] = dict.fromkeys((*_INPUTS, "result"))
        self._bounce = {stream: np.empty(_BOUNCE_BYTES, np.uint8) for stream in _INPUTS}
        self._operations: dict[tuple[str, str, str], Operation] = {}
        self._work = self._all(files)
        self._wanted: str | None = next(self._work)

    @property
    def finished(self) -> bool:
        """Whether every tensor has been added."""
        return self._wanted is None

    def take(self, window: Window) -> None:
        """A window has arrived: go on as far as what is here allows."""
        self._arrived[window.stream].append(window)
        while self._wanted is not None and self._arrived[self._wanted]:
            try:
                self._wanted = self._work.send(self._arrived[self._wanted].popleft())
            except StopIteration:
                self._wanted = None
        if self.finished:  # what an input still has is digested, and not added
            for stream in _INPUTS:
                while self._arrived[stream]:
                    self._release(self._arrived[stream].popleft())

    def _all(self, files: Sequence[OutputFile]) -> _Wait:
        for file in files:
            position = yield from self._header(file)
            for tensor in file.tensors:
                yield from self._tensor(file, tensor, position)
                position += tensor.nbytes
            self._send_result(position)
        for stream in _INPUTS:
            if (window := self._current[stream]) is not None:
                self._release(window)

    def _header(self, file: OutputFile) -> Generator[str, Window, int]:
        position = 0
        while position < len(file.header):
            window = yield from self._room(file, position)
            start = position - window.origin
            part = file.header[position : position + len(window.buffer) - start]
            window.buffer[start : start + len(part)] = part
            position += len(part)
        return position

    def _tensor(self, file: OutputFile, tensor: OutputTensor, position: int) -> _Wait:
        """Add one tensor; ``position`` is its first byte's in the file."""
        dtypes = (tensor.base.dtype, tensor.delta.dtype, tensor.dtype)
        operation = self._operations.get(dtypes)
        if operation is None:
            operation = self._operations[dtypes] = self._additions(*dtypes)
        item_bytes = DTYPES[tensor.dtype]
        done, elements, found = 0, tensor.base.elements, 0
        while done < elements:
            base = yield from self._elements("base", tensor.base, done)
            delta = yield from self._elements("delta", tensor.delta, done)
            window = yield from self._room(file, position)
            start = position - window.origin
            count = min(base.size, delta.size, elements - done, (len(window.buffer) - start) // item_bytes)
            model: Array | None = None
            if tensor.model is not None:
                model = yield from self._elements("model", tensor.model, done)
                count = min(count, model.size)
            result = np.frombuffer(window.buffer, STORED[tensor.dtype], count, start)
            found += operation(result, base[:count], delta[:count])
            if model is not None:
                self._compare(tensor, done, result, model[:count])
            window.tensors.append((tensor.name, start, start + count * item_bytes))
            position += count * item_bytes
            self.done_bytes += count * item_bytes
            done += count
        if found:
            self.non_finite[tensor.name] = found

    def _compare(self, tensor: OutputTensor, done: int, result: Array, model: Array) -> None:
        places = differing(result, model, tensor.dtype)
        if places.size:
            difference = self.differences.setdefault(tensor.name, Difference())
            difference.count += places.size
            for place in places[: _FIRST_DIFFERENCES - len(difference.first)].tolist():
                values = (as_float(array[place], tensor.dtype) for array in (result, model))
                difference.first.append((done + place, *values))

    def _room(self, file: OutputFile, position: int) -> Generator[str, Window, Window]:
        """The result's window that has a position, with room for one element at least; a full one is sent off."""
        window = self._current["result"]
        if window is not None and position - window.origin == len(window.buffer):
            self._send_result(position)
            window = None
        if window is None:
            window = self._current["result"] = yield "result"
            window.space, window.origin, window.tensors = file, position, []
        return window

    def _send_result(self, position: int) -> None:
        """The result's window is complete up to a position of its file."""
        window = self._current["result"]
        if window is not None:
            window.stop = position
            self._current["result"] = None
            self._emit(window)

    def _elements(self, stream: str, ref: TensorRef, done: int) -> Generator[str, Window, Array]:
        """Elements of a tensor from its ``done``-th on, one at least.

        They are where they were read, or copied from there if that is an odd address.
        """
        item_bytes = DTYPES[ref.dtype]
        space = ref.file if ref.strides is None else ref
        position = done * item_bytes + (ref.offset if ref.strides is None else 0)
        window = yield from self._seek(stream, space, position)
        start = position - window.origin
        if start % item_bytes == 0:
            return np.frombuffer(window.buffer, STORED[ref.dtype], (window.stop - position) // item_bytes, start)
        bounce = self._bounce[stream]
        wanted = min(bounce.size, ref.nbytes - done * item_bytes)
        copied = 0
        while copied < wanted:
            window = yield from self._seek(stream, space, position + copied)
            start = position + copied - window.origin
            count = min(wanted - copied, window.stop - position - copied)
            bounce[copied : copied + count] = np.frombuffer(window.buffer, np.uint8, count, start)
            copied += count
        return bounce[:wanted].view(STORED[ref.dtype])

    def _seek(self, stream: str, space: Path | TensorRef, position: int) -> Generator[str, Window, Window]:
        """The input's window that has a position; those before it are released."""
        window = self._current[stream]
        while window is None or window.space != space or not window.origin <= position < window.stop:
            if window is not None:
                self._current[stream] = None
                self._release(window)
            window = self._current[stream] = yield stream
        return window
