"""What is read of a checkpoint, in which order, and what is checked of it on the way."""

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from operator import attrgetter
from pathlib import Path
from typing import Final

from bayling_delta.checkpoint import Checkpoint
from bayling_delta.tensors import TensorRef, natural_key
from bayling_delta.zip_records import Record

__all__ = ["Gather", "Mark", "ReadList", "Span", "in_stored_order", "read_files", "read_in_order_of", "read_whole"]

_NEAR: Final = 64 << 10
"""Bytes between two tensors that are read through rather than jumped over."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A range of a file that a digest or checksum covers."""

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
    """Tensors to digest: in order, not overlapping, inside the span."""
    records: tuple[Record, ...] = ()
    """Zip records that lie inside the span and whose CRC-32 is known, in order."""


@dataclass(frozen=True, slots=True)
class Gather:
    """A tensor whose elements do not lie in row-major order, read piece by piece, put into order and digested."""

    ref: TensorRef
    key: str


@dataclass(frozen=True, slots=True)
class ReadList:
    """Everything that is read of one checkpoint, in the order in which it is needed."""

    steps: tuple[Span | Gather, ...]
    files: dict[str, int]
    """The files that are digested whole, by name, and their bytes."""
    tensors: dict[str, int]
    """The tensors that are digested each by itself, and their bytes."""

    @property
    def nbytes(self) -> int:
        """Bytes read, but for the rounding of windows to blocks."""
        return sum(step.stop - step.start if isinstance(step, Span) else step.ref.nbytes for step in self.steps)

    @property
    def gathers(self) -> bool:
        """Whether any tensor has to be put into order."""
        return any(isinstance(step, Gather) for step in self.steps)


def in_stored_order(tensors: Mapping[str, TensorRef]) -> list[tuple[str, TensorRef]]:
    """The tensors in the order in which a checkpoint stores them: by file, then byte, then name."""
    place = {file: natural_key(file.name) for file in {ref.file for ref in tensors.values()}}
    return sorted(tensors.items(), key=lambda item: (place[item[1].file], item[1].offset, item[0]))


def read_in_order_of(
    checkpoint: Checkpoint, needed: Sequence[tuple[str, TensorRef]], digest_files: Collection[Path] = ()
) -> ReadList:
    """The reads that bring these tensors in this order, and the digests that can be taken of them once.

    Where each file's bytes are met in order, the files are read whole, gaps included, and each file's
    digest is taken. Else the tensors are read where they lie, and each tensor's digest is taken; those of
    ``digest_files``, of which somebody may know the digest, are then read once more by themselves.
    """
    wanted = [(name, ref) for name, ref in needed if ref.elements]
    if not _later(wanted):
        whole: list[Span | Gather] = list(_whole_files(checkpoint, wanted, digest_tensors=False))
        return ReadList(_with_all_records(checkpoint, wanted, whole), _sizes(checkpoint), {})
    again = [file for file in checkpoint.files if file.path in digest_files]
    steps = [
        *_by_tensor(checkpoint, wanted),
        *(Span(file.path, 0, file.size, True, (), file.records) for file in again),
    ]
    sizes = {name: ref.nbytes for name, ref in needed}
    return ReadList(_with_all_records(checkpoint, wanted, steps), {file.path.name: file.size for file in again}, sizes)


def read_whole(checkpoint: Checkpoint, tensors: Mapping[str, TensorRef]) -> ReadList:
    """The reads that give the digest of every file and of each of these tensors, in one pass as far as can be.

    Tensors that a forward pass over the files does not meet in order (transposed views, views that overlap)
    are read once more by themselves.
    """
    wanted = [(name, ref) for name, ref in in_stored_order(tensors) if ref.elements]
    again = _later(wanted)
    forward = [(name, ref) for name, ref in wanted if name not in again]
    steps = [*_whole_files(checkpoint, forward, digest_tensors=True), *_by_tensor(checkpoint, list(again.items()))]
    return ReadList(tuple(steps), _sizes(checkpoint), {name: ref.nbytes for name, ref in tensors.items()})


def read_files(checkpoint: Checkpoint) -> ReadList:
    """The reads that give the digest of every file, and of nothing else."""
    return ReadList(tuple(_whole_files(checkpoint, [], digest_tensors=False)), _sizes(checkpoint), {})


def _sizes(checkpoint: Checkpoint) -> dict[str, int]:
    return {file.path.name: file.size for file in checkpoint.files}


def _later(wanted: Iterable[tuple[str, TensorRef]]) -> dict[str, TensorRef]:
    """The tensors that a pass forward through each file, in this order, has no way to meet."""
    reached: dict[Path, int] = {}
    later: dict[str, TensorRef] = {}
    for name, ref in wanted:
        if ref.strides is not None or ref.offset < reached.get(ref.file, 0):
            later[name] = ref
        else:
            reached[ref.file] = ref.offset + ref.nbytes
    return later


def _whole_files(
    checkpoint: Checkpoint, wanted: Sequence[tuple[str, TensorRef]], *, digest_tensors: bool
) -> Iterator[Span]:
    """Spans that cover every file of the checkpoint once, in the order in which the tensors need them."""
    last = {ref.file: place for place, (_, ref) in enumerate(wanted)}
    files = {file.path: file for file in checkpoint.files}
    reached = dict.fromkeys(files, 0)
    marks: list[Mark] = []
    for place, (name, ref) in enumerate(wanted):
        if digest_tensors:
            marks.append(Mark(name, ref.offset, ref.offset + ref.nbytes))
        if place + 1 < len(wanted) and wanted[place + 1][1].file == ref.file:
            continue
        # The file is left here: for good, with all that it still has, or until the order comes back to it.
        file = files[ref.file]
        stop = file.size if last[ref.file] == place else ref.offset + ref.nbytes
        yield Span(
            ref.file, reached[ref.file], stop, True, tuple(marks), _inside(file.records, reached[ref.file], stop)
        )
        reached[ref.file] = stop
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
        return Span(here, start, stop, False, tuple(marks), _inside(records[here], start, stop))

    for name, ref in wanted:
        near = ref.strides is None and ref.file == here and 0 <= ref.offset - marks[-1].stop <= _NEAR if marks else True
        if not near:
            yield span()
            marks = []
        if ref.strides is None:
            here = ref.file
            marks.append(Mark(name, ref.offset, ref.offset + ref.nbytes))
        else:
            yield Gather(ref, name)
    if marks:
        yield span()


def _with_all_records(
    checkpoint: Checkpoint, wanted: Iterable[tuple[str, TensorRef]], steps: list[Span | Gather]
) -> tuple[Span | Gather, ...]:
    """The steps, and after them a read of each record that has elements of these tensors and lies whole in no span.

    Without it, damage to a tensor that is gathered, or a view of a part of its record, would not be found.
    """
    met = {(step.file, record.name) for step in steps if isinstance(step, Span) for record in step.records}
    records = {file.path: file.records for file in checkpoint.files if file.records}
    missed: dict[tuple[Path, str], Span] = {}
    for _, ref in wanted:
        if ref.file in records:
            here = records[ref.file]
            record = here[bisect_right(here, ref.offset, key=attrgetter("offset")) - 1]
            if (ref.file, record.name) not in met:
                span = Span(ref.file, record.offset, record.offset + record.size, False, (), (record,))
                missed[ref.file, record.name] = span
    return (*steps, *missed.values())


def _inside(records: Sequence[Record], start: int, stop: int) -> tuple[Record, ...]:
    """The records, which are sorted by offset, that lie whole in a range."""
    first = bisect_left(records, start, key=attrgetter("offset"))
    return tuple(takewhile(lambda record: record.offset + record.size <= stop, islice(records, first, None)))
