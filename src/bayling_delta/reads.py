"""What is read of a checkpoint, in which order, and what is checked of it on the way."""

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise, takewhile
from operator import attrgetter
from pathlib import Path
from typing import Final, NamedTuple

from bayling_delta.checkpoint import Checkpoint
from bayling_delta.gathering import block_bytes
from bayling_delta.system import ALIGNMENT
from bayling_delta.tensors import DTYPES, TensorRef, natural_key
from bayling_delta.zip_records import Record

__all__ = [
    "Gather",
    "Mark",
    "ReadList",
    "Span",
    "in_stored_order",
    "read_files",
    "read_in_order_of",
    "read_whole",
    "undigested",
]

_NEAR: Final = 64 << 10
"""Bytes between two tensors that are read through rather than jumped over."""
_LEAST_TILE: Final = 64 << 10
"""Bytes in which any tensor can be put into order, if need be run by run."""


class Mark(NamedTuple):
    """A range of a file that a digest or checksum covers. There may be 100,000, and a tuple is made fastest."""

    key: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a file that are read in one go forward, and what is checked of them."""

    file: Path
    start: int
    stop: int
    whole: bool
    """Whether they count towards the digest of the file."""
    tensors: tuple[Mark, ...]
    """Tensors, or views of them, to digest: in order, not overlapping, inside the span."""
    records: tuple[Record, ...] = ()
    """Zip records, in order, of whose CRC-32 the span gives all bytes or some that no other step gives."""

    @property
    def nbytes(self) -> int:
        """Bytes read."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Gather:
    """A tensor whose elements do not lie in row-major order, read piece by piece, put into order and digested."""

    ref: TensorRef
    key: str
    block: int = 0
    """Bytes of the least piece that is one run in each file (`block_bytes`); 0 where it is read run by run."""
    records: tuple[tuple[Path, Record], ...] = ()
    """Zip records of whose CRC-32 it gives some bytes that no other step gives."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.ref.nbytes

    @property
    def least_tile(self) -> int:
        """Bytes that reading it takes: direct reads of a block begin and end on the grid."""
        return max(_LEAST_TILE, self.block + 2 * ALIGNMENT * len(self.ref.views) if self.block else 0)


@dataclass(frozen=True, slots=True)
class ReadList:
    """Everything that is read of one checkpoint, in the order in which it is needed."""

    steps: tuple[Span | Gather, ...]
    files: dict[str, int]
    """The files that are digested whole, by name, and their bytes."""
    tensors: dict[str, int]
    """The tensors that are digested each by itself, and their bytes."""
    md5: dict[str, int]
    """Those of the files of which the MD5 is taken too."""
    stops: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Up to where, in the files that are digested whole, what was read so far is digested too."""

    @property
    def nbytes(self) -> int:
        """Bytes read, but for the rounding of windows to blocks."""
        return sum(step.nbytes for step in self.steps)

    @property
    def least_tile(self) -> int:
        """Bytes in which every tensor that has to be put into order can be; 0 where none has."""
        return max((step.least_tile for step in self.steps if isinstance(step, Gather)), default=0)


def in_stored_order(tensors: Mapping[str, TensorRef]) -> list[tuple[str, TensorRef]]:
    """The tensors in the order in which a checkpoint stores them: by file, then byte, then name."""
    firsts = {name: ref.views[0] for name, ref in tensors.items()}
    place = {file: natural_key(file.name) for file in {view.file for view in firsts.values()}}
    return sorted(tensors.items(), key=lambda item: (place[firsts[item[0]].file], firsts[item[0]].offset, item[0]))


def read_in_order_of(
    checkpoint: Checkpoint,
    needed: Sequence[tuple[str, TensorRef]],
    listed: Collection[str] = (),
    md5: Collection[str] = (),
    *,
    by_tensor: bool = False,
) -> ReadList:
    """The reads that bring these tensors in this order, and the digests that can be taken of them once.

    Where each file's bytes are met in order, the files are read whole, gaps included, and each file's
    digest is taken. Else the tensors are read where they lie, and each tensor's digest is taken; the files that
    are ``listed``, because a digest of them is recorded, are then read once more. ``md5`` names those of them
    that are recorded by MD5. With ``by_tensor`` it is done so in any case.
    """
    wanted = [(name, ref) for name, ref in needed if ref.elements]
    sizes = {file.path.name: file.size for file in checkpoint.files}
    md5_sizes = {name: sizes[name] for name in md5}
    if not by_tensor and not _later(wanted):
        whole: list[Span | Gather] = list(_whole_files(checkpoint, _stretches(wanted), digest_tensors=False))
        return ReadList(_with_all_records(checkpoint, wanted, whole), sizes, {}, md5_sizes)
    again = [file for file in checkpoint.files if file.path.name in listed]
    # What is read again whole is checked there.
    others = replace(checkpoint, files=tuple(file for file in checkpoint.files if file not in again))
    steps = [
        *_with_all_records(others, wanted, list(_by_tensor(others, wanted))),
        *(Span(file.path, 0, file.size, True, (), file.records) for file in again if file.size),
    ]
    tensors = {name: ref.nbytes for name, ref in needed}
    return ReadList(tuple(steps), {name: sizes[name] for name in listed}, tensors, md5_sizes)


def read_whole(checkpoint: Checkpoint, tensors: Mapping[str, TensorRef], md5: Collection[str] = ()) -> ReadList:
    """The reads that give the digest of every file and of each of these tensors, in one pass as far as can be.

    Tensors that a forward pass over the files does not meet in order (transposed views, views that overlap)
    are read once more by themselves. ``md5`` names the files of which the MD5 is wanted too.
    """
    wanted = [(name, ref) for name, ref in in_stored_order(tensors) if ref.elements]
    again = _later(wanted)
    forward = [(name, ref) for name, ref in wanted if name not in again]
    whole: list[Span | Gather] = list(_whole_files(checkpoint, _stretches(forward), digest_tensors=True))
    steps = [
        *_with_all_records(checkpoint, wanted, whole),
        *_by_tensor(replace(checkpoint, files=()), list(again.items())),  # their records are checked by now
    ]
    sizes = {file.path.name: file.size for file in checkpoint.files}
    digested = {name: ref.nbytes for name, ref in tensors.items()}
    return ReadList(tuple(steps), sizes, digested, {name: sizes[name] for name in md5})


def read_files(checkpoint: Checkpoint) -> ReadList:
    """The reads that give the digests of every file, SHA-256 and MD5, and nothing else."""
    sizes = {file.path.name: file.size for file in checkpoint.files}
    return ReadList(tuple(_whole_files(checkpoint, [], digest_tensors=False)), sizes, {}, sizes)


def undigested(reads: ReadList) -> ReadList:
    """The same reads with nothing to digest or to check of them: for measurements."""
    steps = (
        replace(step, whole=False, tensors=(), records=()) if isinstance(step, Span) else replace(step, records=())
        for step in reads.steps
    )
    return replace(reads, steps=tuple(steps), files={}, tensors={}, md5={}, stops={})


_Stretch = tuple[Path, Mark]
"""A view whose elements lie together: its file, and where in it they are."""


def _stretches(wanted: Iterable[tuple[str, TensorRef]]) -> list[_Stretch]:
    """The views of tensors, one after the other, each of elements that lie together."""
    return [
        (view.file, Mark(name, view.offset, view.offset + view.elements * DTYPES[ref.dtype]))
        for name, ref in wanted
        for view in ref.views
    ]


def _later(wanted: Iterable[tuple[str, TensorRef]]) -> dict[str, TensorRef]:
    """The tensors that a pass forward through each file, in this order, has no way to meet."""
    reached: dict[Path, int] = {}
    later: dict[str, TensorRef] = {}
    for name, ref in wanted:
        ends = reached.copy() if len(ref.views) > 1 else reached
        if _meets(ref, ends):
            reached = ends
        else:
            later[name] = ref
    return later


def _meets(ref: TensorRef, ends: dict[Path, int]) -> bool:
    """Whether a pass forward that has come so far in each file meets a tensor in order; it comes further then."""
    if not ref.in_order:
        return False
    width = DTYPES[ref.dtype]
    for view in ref.views:
        if view.offset < ends.get(view.file, 0):
            return False
        ends[view.file] = view.offset + view.elements * width
    return True


def _whole_files(checkpoint: Checkpoint, wanted: Sequence[_Stretch], *, digest_tensors: bool) -> Iterator[Span]:
    """Spans that cover every file of the checkpoint once, in the order in which the tensors need them."""
    last = {path: place for place, (path, _) in enumerate(wanted)}
    files = {file.path: file for file in checkpoint.files}
    reached = dict.fromkeys(files, 0)
    marks: list[Mark] = []
    for place, (path, mark) in enumerate(wanted):
        if digest_tensors:
            marks.append(mark)
        if place + 1 < len(wanted) and (wanted[place + 1][0] is path or wanted[place + 1][0] == path):
            continue  # paths are slow to compare, and mostly one and the same
        # The file is left here: for good, with all that it still has, or until the order comes back to it.
        file = files[path]
        stop = file.size if last[path] == place else mark.stop
        yield Span(path, reached[path], stop, True, tuple(marks), _inside(file.records, reached[path], stop))
        reached[path] = stop
        marks = []
    for path, file in files.items():
        if path not in last and file.size:
            yield Span(path, 0, file.size, True, (), file.records)


def _by_tensor(checkpoint: Checkpoint, wanted: Sequence[tuple[str, TensorRef]]) -> Iterator[Span | Gather]:
    """Spans over tensors that follow each other closely, and gathers, in this order."""
    records = {file.path: file.records for file in checkpoint.files}
    marks: list[Mark] = []
    here = Path()

    def span() -> Span:
        start, stop = marks[0].start, marks[-1].stop
        return Span(here, start, stop, False, tuple(marks), _inside(records.get(here, ()), start, stop))

    for name, ref in wanted:
        for path, mark in _stretches([(name, ref)]) if ref.in_order else ():
            if marks and not (path == here and 0 <= mark.start - marks[-1].stop <= _NEAR):
                yield span()
                marks = []
            here = path
            marks.append(mark)
        if not ref.in_order:
            if marks:
                yield span()
                marks = []
            yield Gather(ref, name, block_bytes(ref))
    if marks:
        yield span()


def _inside(records: Sequence[Record], start: int, stop: int) -> tuple[Record, ...]:
    """The records, which are sorted by offset, that lie whole in a range."""
    first = bisect_left(records, start, key=attrgetter("offset"))
    return tuple(takewhile(lambda record: record.offset + record.size <= stop, islice(records, first, None)))


# zip records that lie whole in no span


def _with_all_records(
    checkpoint: Checkpoint, wanted: Iterable[tuple[str, TensorRef]], steps: list[Span | Gather]
) -> tuple[Span | Gather, ...]:
    """The steps, and after them what else must be read so that each record with elements of these tensors is checked.

    A record that lies whole in no span is put together from what the steps read of it, and from the rest, which is
    read for its checksum alone. It is read once more where steps overlap, or do not read it in whole runs.
    """
    missed = _missed(checkpoint, wanted, steps)
    if not missed:
        return tuple(steps)
    records = {file.path: file.records for file in checkpoint.files}
    for place, step in enumerate(steps):
        for path, start, stop in _runs(step):
            for record in _touched(records.get(path, ()), start, stop):
                if (path, record.name) in missed:
                    piece = (max(start, record.offset), min(stop, record.offset + record.size), place)
                    missed[path, record.name][1].append(piece)
    shared: dict[int, list[tuple[Path, Record]]] = {}
    rest: list[Span] = []
    for (path, _), (record, pieces) in missed.items():
        pieces.sort()
        if any(stop > start for (_, stop, _), (start, _, _) in pairwise(pieces)):
            pieces.clear()
        for _, _, place in pieces:
            shared.setdefault(place, []).append((path, record))
        edges = [record.offset, *(edge for piece in pieces for edge in piece[:2]), record.offset + record.size]
        gaps = zip(edges[::2], edges[1::2], strict=True)
        rest += [Span(path, start, stop, False, (), (record,)) for start, stop in gaps if start < stop]
    return (*(_with_records(step, shared.get(place, ())) for place, step in enumerate(steps)), *rest)


_Missed = dict[tuple[Path, str], tuple[Record, list[tuple[int, int, int]]]]
"""Records by file and name, each with what is read of it: from, to, and which step reads it."""


def _missed(checkpoint: Checkpoint, wanted: Iterable[tuple[str, TensorRef]], steps: Sequence[Span | Gather]) -> _Missed:
    """The records with elements of these tensors that lie whole in no span."""
    met = {(step.file, record.name) for step in steps if isinstance(step, Span) for record in step.records}
    records = {file.path: file.records for file in checkpoint.files if file.records}
    missed: _Missed = {}
    for _, ref in wanted:
        for view in ref.views:
            if view.file in records:
                here = records[view.file]
                record = here[bisect_right(here, view.offset, key=attrgetter("offset")) - 1]
                if (view.file, record.name) not in met:
                    missed.setdefault((view.file, record.name), (record, []))
    return missed


def _runs(step: Span | Gather) -> list[tuple[Path, int, int]]:
    """The ranges of files of which a step reads each byte once, in runs."""
    if isinstance(step, Span):
        return [(step.file, step.start, step.stop)]
    return [(path, mark.start, mark.stop) for path, mark in _stretches([(step.key, step.ref)])] if step.block else []


def _touched(records: Sequence[Record], start: int, stop: int) -> Iterator[Record]:
    """The records, which are sorted by offset, that have bytes in a range."""
    first = max(0, bisect_right(records, start, key=attrgetter("offset")) - 1)
    for record in takewhile(lambda record: record.offset < stop, islice(records, first, None)):
        if record.offset + record.size > start:
            yield record


def _with_records(step: Span | Gather, records: Sequence[tuple[Path, Record]]) -> Span | Gather:
    """The step, giving these records' bytes too."""
    if not records:
        return step
    if isinstance(step, Gather):
        return replace(step, records=tuple(records))
    return replace(
        step, records=tuple(sorted((*step.records, *(record for _, record in records)), key=attrgetter("offset")))
    )
