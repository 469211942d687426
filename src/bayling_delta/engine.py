"""Carry out a plan: read both inputs, add, digest everything, hand the result to a sink.

The bytes pass through a fixed number of windows. Each input has a station that fills windows with what its
read list says, and one that digests them; one station adds; two digest the result, by tensor and by file; one
gives it to the sink. A window goes back to where it is filled when all its users have released it, so the
slowest station sets the pace, and memory stays what the plan says.
"""

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final, Protocol

from bayling_delta.adding import Adder, Additions, Difference
from bayling_delta.arithmetic import make_addition
from bayling_delta.checkpoint import Checkpoint
from bayling_delta.crew import Crew, Station
from bayling_delta.errors import Problem
from bayling_delta.growing import mean_rows
from bayling_delta.plan import Budget, OutputFile, Plan
from bayling_delta.reads import ReadList, undigested
from bayling_delta.tally import Finished, FinishedFile, FinishedInput, Tally
from bayling_delta.torch_format import record_damage
from bayling_delta.windows import Digester, Reader, Window, allocate

__all__ = ["DEFAULT_THREADS", "Digests", "Outcome", "Progress", "Sink", "digest", "run"]

DEFAULT_THREADS: Final = 8
"""As many as there are stations; at any time most of them wait for the disk or for each other."""
_TICK_SECONDS: Final = 0.1

Progress = Callable[[int, int], None]
"""(bytes of the result done, bytes in all); called in the caller's thread, some ten times a second."""
_Hears = Callable[[str], Callable[[str, str], None] | None]
"""What to tell of an event of this kind, if anybody listens."""


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
    """Digests in hex, of what was digested of a checkpoint."""

    files: dict[str, str]
    """SHA-256 by file name."""
    tensors: dict[str, str]
    """SHA-256 by tensor name."""
    md5: dict[str, str] = field(default_factory=dict)
    """MD5 by file name, where a list has it."""
    parts: dict[str, str] = field(default_factory=dict)
    """SHA-256 of a file's bytes up to a stop of the read list, by ``name@stop``."""


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
    digests: bool = True,
    additions: Additions = make_addition,
    progress: Progress | None = None,
    report: Callable[[Finished], None] | None = None,
) -> Outcome:
    """Add base and delta as planned; give the result to ``sink``, if any, and compare it with the plan's model, if any.

    Memory is the plan's budget and a few hundred bytes a tensor. ``direct`` allows reads past the page
    cache, where they are faster. Without ``digests`` nothing is digested or checked, and the outcome has none: for
    measurements alone. ``additions`` makes the addition for dtypes: the CPU's, or that of `gpu`. ``report`` is
    given each file when nothing is left to do for it, in a thread of the run, but an input's that proved to be damaged.
    The result does not depend on any of these.

    Raises:
        CheckpointError: an input cannot be read, or is not what the plan was made of.
        OutputError: from the sink.
    """
    if not digests:
        plan = replace(
            plan,
            base_reads=undigested(plan.base_reads),
            delta_reads=undigested(plan.delta_reads),
            model_reads=undigested(plan.model_reads) if plan.model_reads else None,
        )
    tally = Tally(plan) if report and digests else None
    hears: _Hears = tally.hears if tally else lambda _: None
    flow = _Flow(threads, direct)
    adding = Station()
    sizes = {tensor.name: tensor.nbytes for tensor in plan.tensors}
    tensors = Digester(sizes if digests else {}, finished=hears("tensor"))
    files = Digester({file.name: file.size for file in plan.files} if digests else {}, finished=hears("file"))
    users: list[Station] = []
    if digests:
        users.append(flow.station(lambda window: tensors.update(window.buffer, window.tensors)))
        users.append(flow.station(lambda window: _digest_file(files, window)))
    hand_over: Station | None = None
    if sink is not None:
        hand_over = Station(_HandOver(sink, hears("written"), flow.release).take)
        users.append(hand_over)
    means = mean_rows(plan.tensors)
    adder = Adder(plan.files, additions, flow.release, lambda window: flow.share(window, users), means)
    adding.handle = adder.take
    flow.supply("result", plan.budget, adding)
    base = flow.read("base", plan.base, plan.base_reads, plan.budget, adding, hears)
    delta = flow.read("delta", plan.delta, plan.delta_reads, plan.budget, adding, hears)
    model: _Input | None = None
    if plan.model is not None and plan.model_reads is not None:
        model = flow.read("model", plan.model, plan.model_reads, plan.budget, adding)
    if tally and report:
        tally.report = partial(_report, report, adder.non_finite, (base, delta), partial(flow.tell, hand_over))
    total = sum(sizes.values())
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
        self,
        stream: str,
        checkpoint: Checkpoint,
        reads: ReadList,
        budget: Budget,
        then: Station | None,
        hears: _Hears = lambda _: None,
    ) -> "_Input":
        """Have a checkpoint read and digested, and every window given to ``then`` too."""
        reader = Reader(reads, {file.path: file.stamp for file in checkpoint.files}, budget.tile_bytes, self._direct)
        new_md5 = partial(hashlib.md5, usedforsecurity=False)
        found = _Input(
            reader,
            Digester(
                reads.files,
                finished=hears(f"file of the {stream}"),
                stops=reads.stops,
                passed=hears(f"part of the {stream}"),
            ),
            Digester(reads.tensors, finished=hears(f"tensor of the {stream}")),
            Digester(reads.md5, new_md5, finished=hears(f"MD5 of the {stream}")),
        )
        users = [self.station(found.check_files)]
        if reads.md5:
            users.append(self.station(found.check_md5))
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
        """Give a window to several stations, each of which will release it; to none, and it goes home."""
        window.users = len(users)
        if not users:
            self._crew.post(window.home, window)
        for user in users:
            self._crew.post(user, window)

    def tell(self, station: Station | None, message: object) -> None:
        """Give a station, where there is one, something else than a window."""
        if station is not None:
            self._crew.post(station, message)

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
    _md5: Digester

    def check_files(self, window: Window) -> None:
        if isinstance(window.space, Path):
            for name, start, stop in window.records:
                self.reader.records.update(window.space, name, window.origin + start, window.buffer[start:stop])
        if window.whole and isinstance(window.space, Path):  # after its records: by now damage is known
            piece = (window.space.name, window.start - window.origin, window.stop - window.origin)
            self._files.update(window.buffer, [piece])

    def check_md5(self, window: Window) -> None:
        if window.whole and isinstance(window.space, Path) and window.space.name in self.reader.reads.md5:
            piece = (window.space.name, window.start - window.origin, window.stop - window.origin)
            self._md5.update(window.buffer, [piece])

    def check_tensors(self, window: Window) -> None:
        self._tensors.update(window.buffer, window.tensors)

    def digests(self) -> Digests:
        return Digests(self._files.finish(), self._tensors.finish(), self._md5.finish(), self._files.parts)

    def damage(self) -> list[Problem]:
        return [record_damage(file, name) for file, name in sorted(self.reader.records.finish())]


def _digest_file(digester: Digester, window: Window) -> None:
    if isinstance(window.space, OutputFile):
        digester.update(window.buffer, [(window.space.name, 0, window.stop - window.origin)])


def _report(
    report: Callable[[Finished], None],
    non_finite: Mapping[str, int],
    inputs: Sequence[_Input],
    tell: Callable[[object], None],
    finished: Finished,
) -> None:
    if isinstance(finished, FinishedInput):
        # A damaged file is not called finished: a later run reads it again, and finds the damage again.
        if any(file.name == finished.name for side in inputs for file in side.reader.records.damaged_files()):
            return
        report(finished)
        return
    finished = replace(finished, non_finite={name: non_finite[name] for name in finished.tensors if name in non_finite})
    report(finished)
    tell(finished)


class _HandOver:
    """Gives the result to the sink; where files are reported, none is begun before the one before it has been.

    So a run that ends loses one file and no more, however far the digests are behind the writing.
    """

    def __init__(
        self, sink: Sink, written: Callable[[str, str], None] | None, release: Callable[[Window], None]
    ) -> None:
        """``written`` is told of each file that is whole; that it has been reported comes back as a message."""
        self._sink = sink
        self._written = written
        self._release = release
        self._held: deque[Window] = deque()
        self._unreported = False

    def take(self, message: Window | FinishedFile) -> None:
        if isinstance(message, Window):
            self._held.append(message)
        else:
            self._unreported = False
        while self._held and not self._unreported:
            window = self._held.popleft()
            self._give(window)
            self._release(window)

    def _give(self, window: Window) -> None:
        file = window.space
        if not isinstance(file, OutputFile):
            return
        if not window.origin:
            self._sink.begin(file)
        self._sink.write(window.buffer, window.origin, window.stop - window.origin)
        if window.stop == file.size:
            self._sink.end()
            if self._written:
                self._unreported = True
                self._written(file.name, "")
