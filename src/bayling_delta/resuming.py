"""Take up what an ended run left: what must be as it was, what of it is finished, what is still to do.

A finished file is taken up if it has, read back from the disk, the digests that the journal says. What is left to do
is a plan like any other, for the other files; what it finds out, and what the journal says of the finished
ones, make the outcome of the whole.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from bayling_delta import __version__, engine
from bayling_delta.checkpoint import Checkpoint, open_weights
from bayling_delta.engine import Digests, Outcome, Progress
from bayling_delta.errors import (
    BaylingDeltaError,
    CheckpointError,
    InterruptedRunError,
    MismatchError,
    OutputError,
    Problem,
    RunEndedError,
    refuse,
)
from bayling_delta.journal import Journal, read_journal, write_journal
from bayling_delta.plan import OutputFile, Plan
from bayling_delta.reads import ReadList, read_in_order_of, read_whole
from bayling_delta.sources import changed, file_status
from bayling_delta.staging import Staging, partial_path
from bayling_delta.tally import Finished, FinishedFile, FinishedInput

__all__ = ["Earlier", "journalled", "look_back", "merged", "rest_of", "take_up"]

_SCHEMA: Final = "bayling-delta/journal/1"
_START_OVER: Final = "--no-resume starts over, or choose another output"
_BLAMES: Final = {"crc", "digest", "model", "changed"}
"""Kinds of problem that make an input's file worthless, and all that was made from it."""


# what decides the bytes


def _head(plan: Plan) -> dict[str, Any]:
    """The journal's head: what must be as it was, so that what is finished belongs to what is not."""
    return {
        "schema": _SCHEMA,
        "version": __version__,
        "recipe": plan.recipe.name,
        "result": {file.name: hashlib.sha256(file.header).hexdigest() for file in plan.files},
        "inputs": {"base": _input_head(plan.base), "delta": _input_head(plan.delta)},
    }


def _input_head(checkpoint: Checkpoint) -> dict[str, Any]:
    """By file: its size, time of change, and a digest of where in it which elements are."""
    tables = {file.path: hashlib.sha256() for file in checkpoint.files}
    for name, ref in sorted(checkpoint.tensors.items()):
        for view in ref.views:
            what = (name, ref.dtype, ref.shape, ref.axis, view.offset, view.shape, view.strides)
            tables[view.file].update(repr(what).encode("utf-8", "backslashreplace"))
    return {
        file.path.name: {"size": file.size, "modified_ns": file.modified_ns, "tensors": tables[file.path].hexdigest()}
        for file in checkpoint.files
    }


def _changes(plan: Plan, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What is not as it was, in words."""
    if before.get("schema") != _SCHEMA or before.get("version") != now["version"]:
        yield f"it was begun by another version, {str(before.get('version'))[:40]}"
        return
    if before.get("recipe") != now["recipe"]:
        yield f"the recipe was {str(before.get('recipe'))[:40]}, and is {now['recipe']}"
    if before.get("result") != now["result"]:
        yield "the result's files are others now: --dtype, --max-shard-size, or what the inputs hold"
    for role, side in (("base", plan.base), ("delta", plan.delta)):
        inputs = before.get("inputs")
        files = inputs.get(role) if isinstance(inputs, dict) else None
        if not isinstance(files, dict) or files.keys() != now["inputs"][role].keys():
            yield f"the {role} has other files: {side.path}"
            continue
        # None stands for a file that proved to be damaged: nothing is left of what was made from it
        others = [name for name, file in now["inputs"][role].items() if files[name] not in (None, file)]
        if others:
            yield f"the {role} has changed: {', '.join(others)}"


# what is finished


@dataclass(frozen=True, slots=True)
class Earlier:
    """What earlier runs finished of an output."""

    files: Mapping[str, FinishedFile]
    inputs: Mapping[tuple[str, str], FinishedInput]
    """By role and name."""

    @property
    def nbytes(self) -> int:
        """Bytes of the finished files."""
        return sum(file.size for file in self.files.values())

    @property
    def entries(self) -> tuple[Finished, ...]:
        """All of it."""
        return (*self.inputs.values(), *self.files.values())


def look_back(target: Path, plan: Plan) -> str | None:
    """What an ended run has left of an output, as its journal says, in words; None where there is nothing.

    Raises:
        OutputError: it is of a run with other inputs or options, or cannot be used.
    """
    partial = partial_path(target)
    names = {entry.name for entry in _entries(partial, plan) if isinstance(entry, FinishedFile)}
    count = sum(1 for file in plan.files if file.name in names)
    if not count:
        return None
    what = f"{count} of {len(plan.files)} weight files were finished by an earlier run"
    return f"{partial}: {what}; those that are as it left them are taken up"


def _entries(directory: Path, plan: Plan) -> list[Finished]:
    """What the journal of an unfinished output says is finished; nothing where there is no journal.

    Raises:
        OutputError: it is of a run with other inputs or options, or cannot be used.
    """
    try:
        found = read_journal(directory / "journal")
    except CheckpointError as error:
        message = f"{error.problems[0].message}; {_START_OVER}"
        raise OutputError(Problem("unfinished", str(directory / "journal"), message)) from error
    if found is None:
        return []
    head, entries = found
    if changes := list(_changes(plan, head, _head(plan))):
        message = "was begun otherwise, and cannot be gone on with"
        where = str(directory)
        raise OutputError([Problem("unfinished", where, f"{message}: {change}; {_START_OVER}") for change in changes])
    return entries


def take_up(
    staging: Staging,
    plan: Plan,
    *,
    threads: int,
    direct: bool,
    progress: Progress | None,
    tell: Callable[[str], None] | None,
) -> Earlier:
    """Find out what is finished, and remove what was only begun.

    Every file that the journal calls finished is read back and digested.

    Raises:
        OutputError: the journal is of a run with other inputs or options, or cannot be used.
        CheckpointError: the system does not tell of an input.
    """
    entries = _entries(staging.directory, plan)
    finished = _as_written(staging, plan, entries, threads, direct, progress)
    for name in staging.files():
        if name not in finished:
            staging.discard(name)
    inputs = {
        (entry.role, entry.name): entry
        for entry in entries
        if isinstance(entry, FinishedInput) and _fits_input(entry, plan)
    }
    others = sorted({entry.name for entry in entries if isinstance(entry, FinishedFile)} - finished.keys())
    if others and tell:
        tell(f"{staging.directory}: what was finished is not as it was, and is made again: {', '.join(others)}")
    if finished and tell:
        tell(
            f"{staging.directory}: {len(finished)} of {len(plan.files)} weight files were finished by an earlier run, "
            "and are as it wrote them"
        )
    return Earlier(finished, inputs if finished else {})


def _as_written(
    staging: Staging, plan: Plan, entries: Sequence[Finished], threads: int, direct: bool, progress: Progress | None
) -> dict[str, FinishedFile]:
    """Those of the files that are called finished that are, on the disk, what the journal says."""
    planned = {file.name: file for file in plan.files}
    called = {
        entry.name: entry
        for entry in entries
        if isinstance(entry, FinishedFile) and entry.name in planned and _fits(entry, planned[entry.name], plan)
    }
    found: dict[str, FinishedFile] = {}
    for name, entry in called.items():
        before = sum(file.size for file in found.values())
        move = _within(before, plan.output_bytes, progress)
        with suppress(BaylingDeltaError):  # what cannot be read is not as it was written
            if _is_as_written(staging, planned[name], entry, plan, threads, direct, move):
                found[name] = entry
    return found


def _within(before: int, total: int, progress: Progress | None) -> Progress | None:
    """The progress of a part of a whole, of which so many bytes come before."""
    return (lambda done, _: progress(before + done, total)) if progress else None


def _is_as_written(
    staging: Staging,
    planned: OutputFile,
    entry: FinishedFile,
    plan: Plan,
    threads: int,
    direct: bool,
    progress: Progress | None,
) -> bool:
    """Whether a file is the one that was called finished, by the time that the system keeps of it and by its bytes.

    The time is what a journal that came with the files from elsewhere cannot know.

    Raises:
        BaylingDeltaError: it cannot be read.
    """
    if entry.changed_ns <= 0 or staging.changed_ns(entry.name) != entry.changed_ns:
        return False
    container, file, refs = open_weights(staging.model / entry.name)
    if container != "safetensors" or file.size != planned.size:
        return False
    checkpoint = Checkpoint(staging.model, staging.model, container, (file,), refs, None)
    reads = read_whole(checkpoint, refs)
    digests, _ = engine.digest(checkpoint, reads, plan.budget, threads=threads, direct=direct, progress=progress)
    return digests.files[entry.name] == entry.sha256 and digests.tensors == entry.tensors


def _fits(entry: FinishedFile, file: OutputFile, plan: Plan) -> bool:
    """Whether an entry has what the plan needs to know of a file."""
    names = {tensor.name for tensor in file.tensors}
    of_sides = ((entry.base, plan.base_reads), (entry.delta, plan.delta_reads))
    return (
        entry.size == file.size
        and entry.tensors.keys() == names
        and entry.non_finite.keys() <= names
        and all(found.keys() == names & reads.tensors.keys() for found, reads in of_sides)
        and entry.parts.keys()
        == {
            f"{role}/{name}@{stop}"
            for role, reads in (("base", plan.base_reads), ("delta", plan.delta_reads))
            if reads.stops
            for name, stop in file.made_of(role).items()
        }
    )


def _fits_input(entry: FinishedInput, plan: Plan) -> bool:
    """The same for an input's file."""
    reads = {"base": plan.base_reads, "delta": plan.delta_reads}.get(entry.role)
    if (
        reads is None
        or entry.changed_ns <= 0
        or _input_changed_ns(entry, plan) != entry.changed_ns
        or entry.name not in reads.files
        or (entry.md5 is None) == (entry.name in reads.md5)
    ):
        return False
    stops = reads.stops.get(entry.name, ())
    return entry.parts.keys() == {f"{entry.role}/{entry.name}@{stop}" for stop in stops}


def _input_changed_ns(entry: FinishedInput, plan: Plan) -> int | None:
    """When an input's file was last changed in any way; None if there is no such file."""
    side = plan.base if entry.role == "base" else plan.delta
    status = next((file_status(file.path) for file in side.files if file.path.name == entry.name), None)
    return status.st_ctime_ns if status else None


# what is still to do


def rest_of(plan: Plan, earlier: Earlier) -> Plan | None:
    """The plan of what is left; None where nothing is.

    An input's file that was digested to its end is read no more, unless something is still to be made from it.
    """
    if not earlier.files and not earlier.inputs:
        return plan
    files = tuple(file for file in plan.files if file.name not in earlier.files)
    base, base_reads = _rest_of_input("base", plan.base, plan.base_reads, plan, files, earlier)
    delta, delta_reads = _rest_of_input("delta", plan.delta, plan.delta_reads, plan, files, earlier)
    if not files and not base_reads.steps and not delta_reads.steps:
        return None
    return replace(plan, files=files, base=base, base_reads=base_reads, delta=delta, delta_reads=delta_reads)


def _rest_of_input(
    role: str, side: Checkpoint, reads: ReadList, plan: Plan, files: Sequence[OutputFile], earlier: Earlier
) -> tuple[Checkpoint, ReadList]:
    tensors = [tensor for file in files for tensor in file.tensors]
    refs = ((tensor.name, tensor.base if role == "base" else tensor.delta) for tensor in tensors)
    needed = [(name, ref) for name, ref in refs if ref is not None]
    used = {view.file for _, ref in needed for view in ref.views}
    digested = {name for name in reads.files if (role, name) in earlier.inputs}
    by_tensor = bool(reads.tensors)
    listed = [name for name in reads.files if name not in digested]
    if by_tensor:
        # The checksums of records that finished files were made of may not have been seen to their end.
        made_of = {name for file in plan.files if file.name in earlier.files for name in file.made_of(role)}
        checked = [file.path.name for file in side.files if file.records and file.path.name in made_of]
        listed += [name for name in checked if name not in {*listed, *digested}]
    left = [file for file in side.files if file.path in used or file.path.name in listed]
    left_names = {file.path.name for file in left}
    rest = replace(side, files=tuple(left))
    md5 = [name for name in reads.md5 if name in (listed if by_tensor else left_names)]
    stops = {name: stops for name, stops in reads.stops.items() if name in left_names}
    return rest, replace(read_in_order_of(rest, needed, listed, md5, by_tensor=by_tensor), stops=stops)


def merged(plan: Plan, earlier: Earlier, outcome: Outcome | None) -> Outcome:
    """What all runs together found out.

    Raises:
        CheckpointError: what an earlier run read of an input is not what was digested of it in the end.
    """
    found = outcome or Outcome(Digests({}, {}), Digests({}, {}), Digests({}, {}), {}, {}, [])
    parts = {key: digest for entry in earlier.inputs.values() for key, digest in entry.parts.items()}
    for role, digests in (("base", found.base), ("delta", found.delta)):
        parts |= {f"{role}/{key}": digest for key, digest in digests.parts.items()}
    others = {key for file in earlier.files.values() for key, digest in file.parts.items() if parts.get(key) != digest}
    sides = {"base": plan.base, "delta": plan.delta}
    places = (key.rpartition("@")[0].split("/", 1) for key in sorted(others))
    refuse([changed(path) for path in dict.fromkeys(sides[role].directory / name for role, name in places)])
    before = list(earlier.files.values())
    result = Digests(
        {file.name: file.sha256 for file in before} | found.result.files,
        {name: digest for file in before for name, digest in file.tensors.items()} | found.result.tensors,
    )
    non_finite = {name: count for file in before for name, count in file.non_finite.items()} | found.non_finite
    return replace(
        found,
        base=_merged_input("base", plan.base_reads, earlier, found.base, [file.base for file in before]),
        delta=_merged_input("delta", plan.delta_reads, earlier, found.delta, [file.delta for file in before]),
        result=result,
        non_finite=non_finite,
    )


def _merged_input(
    role: str, reads: ReadList, earlier: Earlier, digests: Digests, tensors: Sequence[Mapping[str, str]]
) -> Digests:
    entries = [entry for (of, _), entry in earlier.inputs.items() if of == role]
    files = {entry.name: entry.sha256 for entry in entries} | digests.files
    return Digests(
        {name: digest for name, digest in files.items() if name in reads.files},
        {name: digest for table in tensors for name, digest in table.items()} | digests.tensors,
        {entry.name: entry.md5 for entry in entries if entry.md5} | digests.md5,
    )


# keeping it


@contextmanager
def journalled(staging: Staging, plan: Plan, earlier: Earlier) -> Iterator[Callable[[Finished], None]]:
    """Yield what writes down that something is finished; if the body fails, keep what a later run can use, and say so.

    Raises:
        OutputError: the journal cannot be written.
    """
    staging.keep = bool(earlier.files)
    head = _head(plan)
    journal = Journal(staging.journal, head, earlier.entries)

    def note(finished: Finished) -> None:
        if isinstance(finished, FinishedFile):
            journal.add(replace(finished, changed_ns=staging.changed_ns(finished.name)))
        else:
            journal.add(replace(finished, changed_ns=_input_changed_ns(finished, plan) or 0))

    try:
        yield note
    except BaseException as error:
        journal.close()
        kept = _worth_keeping(plan, journal.entries, error)
        count = sum(1 for entry in kept if isinstance(entry, FinishedFile))
        staging.keep = count > 0
        if staging.keep:
            _keep(staging, plan, head, kept, error)
        if isinstance(error, RunEndedError) and count:
            what = f"{count} of {len(plan.files)} weight files are finished, in {staging.directory}"
            once_more = isinstance(error, (InterruptedRunError, OutputError))
            error.hint = (
                f"{what}: run the command again to go on" if once_more else f"{what}; the next run takes them up"
            )
        raise
    journal.close()
    staging.keep = True  # should its name not be given to it


def _worth_keeping(plan: Plan, entries: Sequence[Finished], error: BaseException) -> list[Finished]:
    """What an ended run leaves that a later one can use: nothing that was made from what proved to be wrong."""
    if isinstance(error, MismatchError):
        return []
    blamed = _blamed(plan, error)
    spoilt = {
        file.name
        for file in plan.files
        for tensor in file.tensors
        for ref in (tensor.base, tensor.delta)
        if ref is not None and any(view.file in blamed for view in ref.views)
    }
    names = {(role, path.name) for path, role in blamed.items()}
    return [
        entry
        for entry in entries
        if (entry.name not in spoilt if isinstance(entry, FinishedFile) else (entry.role, entry.name) not in names)
    ]


def _blamed(plan: Plan, error: BaseException) -> dict[Path, str]:
    """The inputs' files that proved to be wrong, and whose they are."""
    if not isinstance(error, BaylingDeltaError):
        return {}
    places = [problem.where for problem in error.problems if problem.kind in _BLAMES]
    return {
        file.path: role
        for role, side in (("base", plan.base), ("delta", plan.delta))
        for file in side.files
        if any(where in (str(file.path), str(side.directory)) or where.startswith(f"{file.path}: ") for where in places)
    }


def _keep(staging: Staging, plan: Plan, head: dict[str, Any], kept: Sequence[Finished], error: BaseException) -> None:
    """Leave the files that are kept, and a journal of them alone.

    Where the disk refuses, the old journal stays: it calls files finished that are not there, which will be seen.
    """
    names = {entry.name for entry in kept if isinstance(entry, FinishedFile)}
    blamed = {(role, path.name) for path, role in _blamed(plan, error).items()}
    inputs = {
        role: {name: None if (role, name) in blamed else file for name, file in files.items()}
        for role, files in head["inputs"].items()
    }
    with suppress(OutputError):
        for name in staging.files():
            if name not in names:
                staging.discard(name)
        write_journal(staging.journal, {**head, "inputs": inputs}, kept)
