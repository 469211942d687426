"""A new directory that is there whole, or not at all; what an ended run leaves of it can be taken up.

It grows as ``NAME.partial/model`` beside its place, under a lock that goes with the process, and is renamed to
``NAME`` when all of it is written and synced. Nothing that exists is ever replaced. ``NAME.partial`` holds ``lock``,
``journal`` and ``model/``, and no directory that holds anything else is touched.
"""

import errno
import json
import os
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Final

from bayling_delta import system
from bayling_delta.errors import CheckpointError, OutputError, Problem, RunEndedError
from bayling_delta.files import is_inside, reported, write_all
from bayling_delta.sources import file_size, file_status, is_directory, link_target, list_directory, read_file
from bayling_delta.strict_json import load_strict

__all__ = [
    "Staging",
    "output_problems",
    "partial_path",
    "place_problems",
    "remove_remnant",
    "room_problems",
    "staged_directory",
    "staged_files",
]

_LONGEST_NAME: Final = 255
"""Bytes; what nearly all file systems allow."""
_OWN: Final = {"lock", "journal", "journal.new", "model"}
_OWNER_CAP: Final = 4096
_OTHER_FILES: Final = 16
"""Directories, lock and journal, and what lies beside the weights, generously."""
_LOCK_TRIES: Final = 5
_LOCK_SECONDS: Final = 0.1
_ELSEWHERE: Final = "choose another output, or move it away"


@dataclass(slots=True)
class Staging:
    """A directory that is not finished, and is locked by this run."""

    directory: Path
    keep: bool = False
    """Whether it stays if the run fails: at first, whether an ended run has left a journal in it."""
    named: bool = False
    """Whether what was in it has its name: it is whole."""

    @property
    def model(self) -> Path:
        """What will be renamed."""
        return self.directory / "model"

    @property
    def journal(self) -> Path:
        """Where it is written down what is finished."""
        return self.directory / "journal"

    def files(self) -> list[str]:
        """The names of what was made so far.

        Raises:
            OutputError: the system refuses.
        """
        with reported(self.model):
            return sorted(system.calls.list_directory(self.model))

    def put(self, name: str, directory: Path) -> None:
        """Move a file that was made to where it belongs, in place of one that may be there, for whoever may read that.

        Raises:
            OutputError: the system refuses.
        """
        with suppress(OSError):  # there is none, or its file system has no modes
            mode = stat.S_IMODE(system.calls.stat(directory / name).st_mode)
            system.calls.set_mode(self.model / name, mode)
        with reported(directory / name):
            system.calls.replace(self.model / name, directory / name)
            system.calls.sync_directory(directory)

    def changed_ns(self, name: str) -> int:
        """When a file that was made was last changed in any way: a time that nobody can choose, on a disk of one's own.

        Raises:
            OutputError: the system refuses.
        """
        with reported(self.model / name):
            return system.calls.stat(self.model / name).st_ctime_ns

    def discard(self, name: str) -> None:
        """Remove a file that was made, or was begun.

        Raises:
            OutputError: the system refuses.
        """
        with reported(self.model / name):
            system.calls.remove_file(self.model / name)


def partial_path(target: Path) -> Path:
    """Where a directory grows before it has its name."""
    return target.with_name(f"{target.name}.partial")


def output_problems(target: Path, needed_bytes: int, *, mending: bool = False) -> list[Problem]:
    """What keeps a directory of this size from being made, or finished, as far as can be seen without trying.

    ``mending`` is of one that exists, beside which so many bytes are needed.
    """
    if target.name in ("", ".."):
        return [Problem("output_exists", str(target), "exists, and nothing is replaced; choose a name for the output")]
    if len(os.fsencode(partial_path(target).name)) > _LONGEST_NAME:
        return [Problem("output_place", str(target)[:80] + "…", "is too long a name for a file system")]
    problems: list[Problem] = []
    partial = partial_path(target)
    there = 0
    try:
        if system.calls.exists(target) and not mending:
            message = "exists, and nothing is replaced; choose another name or move it away"
            problems.append(Problem("output_exists", str(target), message))
        if system.calls.exists(partial):
            if obstacle := _obstacle(partial):
                problems.append(Problem("output_exists", str(partial), obstacle))
            else:
                there = _bytes_in(partial / "model")
        if not stat.S_ISDIR(system.calls.stat(target.parent).st_mode):
            what = f"cannot be made: {target.parent} is not a directory"
            return [*problems, Problem("output_place", str(target), what)]
        free = system.calls.free_bytes(target.parent)
    except OSError as error:
        reason = error.strerror or "unknown"
        message = f"cannot hold the output ({reason}); make the directory first, or choose another place"
        problems.append(Problem("output_place", str(target.parent), message))
        return problems
    if free + there < needed_bytes:
        message = (
            f"has {free / 1e9:,.2f} GB free, the output needs {(needed_bytes - there) / 1e9:,.2f} GB; "
            "make room, or choose another place"
        )
        problems.append(Problem("disk_space", str(target.parent), message))
    return problems


def place_problems(target: Path, inputs: Iterable[Path]) -> list[Problem]:
    """The findings that an input lies where a directory grows: it would be taken for what an ended run has left.

    Raises:
        CheckpointError: the system cannot list an input.
    """
    if target.name in ("", ".."):
        return []  # which `output_problems` tells
    partial = partial_path(target)
    message = f"lies in {partial}, where the output grows and which is emptied; move it away"
    problems: list[Problem] = []
    for path in inputs:
        files = [path / name for name in list_directory(path)] if is_directory(path) else []
        if any(is_inside(file, partial) for file in (path, *files)):
            problems.append(Problem("output_place", str(path), message))
    return problems


def room_problems(target: Path, sizes: Sequence[int]) -> list[Problem]:
    """What keeps weight files of these sizes from being made where a directory will be, its free space aside."""
    if target.name in ("", ".."):
        return []  # which `output_problems` tells
    where = str(target.parent)
    try:
        files = system.calls.free_files(target.parent)
        largest = system.calls.largest_file(target.parent)
    except OSError:
        return []  # which it tells as well
    problems: list[Problem] = []
    needed = len(sizes) + _OTHER_FILES
    model = partial_path(target) / "model"
    with suppress(CheckpointError):
        if is_directory(model):
            needed -= len(list_directory(model))
    if files is not None and files < needed:
        message = f"has room for {files:,} more files (inodes), the output needs {needed:,}"
        problems.append(Problem("disk_space", where, f"{message}; remove some, or choose another place"))
    if largest is not None and largest < max(sizes, default=0):
        message = (
            f"can have files of {largest:,} bytes at most, by its file system or the limits of this process, and the "
            f"output would have one of {max(sizes):,}; --max-shard-size makes them smaller"
        )
        problems.append(Problem("disk_space", where, message))
    return problems


def _bytes_in(model: Path) -> int:
    """What is written already of an unfinished output, as far as the system says."""
    with suppress(CheckpointError):
        if is_directory(model):
            return sum(file_size(model / name) or 0 for name in list_directory(model))
    return 0


def _obstacle(partial: Path) -> str | None:
    """Why what lies in the place of an unfinished output cannot be taken up; None if it can. Changes nothing."""
    try:
        if stranger := _stranger(partial):
            return stranger
        if not system.calls.exists(partial / "lock"):
            return None
        handle = system.calls.open_update(partial / "lock")
        try:
            return None if system.calls.lock(handle) else _busy(partial)
        finally:
            system.close_safely(handle)
    except OSError as error:
        return f"cannot be taken up ({error.strerror or 'unknown'}); {_ELSEWHERE}"


def _stranger(partial: Path) -> str | None:
    """Why this is no directory of ours, as far as the system says; None if it is one, or empty."""
    try:
        ours = _is_ours(partial)
    except CheckpointError as error:
        return f"{error.problems[0].message}; {_ELSEWHERE}"
    return None if ours else f"exists, and is not an unfinished output of this program for this user; {_ELSEWHERE}"


def _is_ours(partial: Path) -> bool:
    """Whether a directory has nothing in it but what this program makes there for this user."""
    if not _is_own(partial, directory=True):
        return False
    names = set(list_directory(partial))
    if not names <= _OWN or (names and "lock" not in names):
        return False
    files = [partial / name for name in names - {"model"}]
    if "model" in names:
        if not _is_own(partial / "model", directory=True):
            return False
        files += [partial / "model" / name for name in list_directory(partial / "model")]
    return all(_is_own(path, directory=False) for path in files)


def _is_own(path: Path, *, directory: bool) -> bool:
    """Whether it is this user's, and no link: what is written through one would change something elsewhere.

    What is gone by now was another run's.
    """
    if link_target(path):
        return False
    status = file_status(path)
    if status is None:
        return True
    if directory:
        return stat.S_ISDIR(status.st_mode) and system.is_mine(status)
    return stat.S_ISREG(status.st_mode) and system.is_mine(status) and status.st_nlink <= 1


def _busy(partial: Path) -> str:
    """Who holds the lock, as far as is known."""
    who = "another run"
    with suppress(CheckpointError, ValueError, OverflowError, KeyError, TypeError):
        owner = load_strict(read_file(partial / "lock", _OWNER_CAP))
        who += f", process {int(owner['pid'])}, since {str(owner['started'])[:40]}"
    return f"is being written by {who}; wait for it, or choose another output"


@contextmanager
def staged_directory(target: Path, *, resume: bool = True) -> Iterator[Staging]:
    """Yield the place where a directory grows; it becomes ``target`` if the body succeeds.

    What an ended run left there is there still, unless ``resume`` is false. If the body fails, all is removed, unless
    ``keep`` is set.

    Raises:
        OutputError: it cannot be made, ``target`` exists, or another run or something else is in the place.
    """
    partial = partial_path(target)
    handle = _acquire(partial)
    staging = Staging(partial, keep=resume)
    renaming = False
    try:
        try:
            if not resume:
                _remove(partial, but_the_lock=True)
            with reported(partial):
                staging.keep = resume and system.calls.exists(staging.journal)
            with reported(target):
                if system.calls.exists(target):  # the run that held the lock until now has made it
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            with reported(partial), suppress(FileExistsError):
                system.calls.make_directory(staging.model)
            yield staging
            with reported(target):
                system.calls.sync_directory(staging.model)
                renaming = True
                system.calls.rename_new(staging.model, target)
                staging.named = True
                system.calls.sync_directory(target.parent)
        finally:
            if renaming and not staging.named:  # a signal may have come when it was done, and not yet known here
                with suppress(OSError):
                    staging.named = not system.calls.exists(staging.model)
            staging.keep &= not staging.named
            if not staging.keep:
                _remove(partial)
            system.close_safely(handle)
    except RunEndedError as error:
        error.hint = error.hint or _left_behind(staging, target, error)
        raise


def _left_behind(staging: Staging, target: Path, error: RunEndedError) -> str | None:
    """What there is of a directory when a run ends before its end."""
    if staging.named:
        return f"{target} is whole, and has its name"
    if not staging.keep or any(problem.kind == "unfinished" for problem in error.problems):  # it says what to do
        return None
    first = f"move {target} away, then " if any(problem.kind == "output_exists" for problem in error.problems) else ""
    return f"what is finished is in {staging.directory}: {first}run the command again to go on"


@contextmanager
def staged_files(target: Path) -> Iterator[Staging]:
    """Yield a place beside a directory where files for it grow; in the end it is removed.

    Raises:
        OutputError: it cannot be made, or another run, what one has finished, or something else is in the place.
    """
    partial = partial_path(target)
    remove_remnant(target)
    with reported(partial):
        if system.calls.exists(partial / "journal"):
            message = f"has what 'apply' has finished of another output of this name in it; {_ELSEWHERE}"
            raise OutputError(Problem("output_exists", str(partial), message))
    handle = _acquire(partial)
    try:
        _remove(partial, but_the_lock=True)
        with reported(partial):
            system.calls.make_directory(partial / "model")
        yield Staging(partial)
    finally:
        _remove(partial)
        system.close_safely(handle)


def remove_remnant(target: Path) -> None:
    """Remove what a run left that was ended between its last two steps: it had given the output its name."""
    if target.name in ("", ".."):
        return
    partial = partial_path(target)
    with suppress(OSError, OutputError):
        if not (system.calls.exists(target) and system.calls.exists(partial)):
            return
        if not system.calls.exists(partial / "model"):
            handle = _acquire(partial)
            _remove(partial)
            system.close_safely(handle)


def _acquire(partial: Path) -> int:
    """Make the directory, or take over what an ended run left, and hold its lock; the lock goes with the process."""
    made = False
    handle: int | None = None
    try:
        with reported(partial):
            with suppress(FileExistsError):
                system.calls.make_directory(partial)
                made = True
            if not made and (stranger := _stranger(partial)):
                raise OutputError(Problem("output_exists", str(partial), stranger))
            path = partial / "lock"
            try:
                handle = system.calls.open_write(path, direct=False)
            except FileExistsError:
                made = False
                handle = system.calls.open_update(path)
            if not _locked(handle, partial):
                made = False
                raise OutputError(Problem("output_exists", str(partial), _busy(partial)))
            mine = system.calls.stat_handle(handle)
            now = system.calls.stat(path)
            if (mine.st_dev, mine.st_ino) != (now.st_dev, now.st_ino):  # the run that had it has just removed it
                raise OutputError(Problem("output_exists", str(partial), "was being finished just now; run again"))
            owner = {"pid": os.getpid(), "started": datetime.now(timezone.utc).isoformat(timespec="seconds")}
            system.calls.truncate(handle, 0)
            write_all(handle, json.dumps(owner).encode(), 0)
            system.calls.sync_directory(partial)  # the lock before all else, by which it is known as ours
            system.calls.sync_directory(partial.parent)
    except BaseException:
        if made:  # and nobody else has it
            _remove(partial)
        if handle is not None:
            system.close_safely(handle)
        raise
    return handle


def _locked(handle: int, partial: Path) -> bool:
    """Lock a file; False if another run has it. One that only looks whether it is locked has it for a moment."""
    for _ in range(_LOCK_TRIES):
        try:
            if system.calls.lock(handle):
                return True
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            message = f"is on a file system without locks ({error.strerror}); choose an output on another one"
            raise OutputError(Problem("output_place", str(partial), message)) from error
        time.sleep(_LOCK_SECONDS / _LOCK_TRIES)
    return False


def _remove(partial: Path, *, but_the_lock: bool = False) -> None:
    """Remove what runs made, and only that: two levels of files of their own, the lock last.

    Where the system refuses to remove something, the lock stays too: without one, no later run would know that the
    directory is ours.
    """
    model = partial / "model"
    with suppress(OSError):
        for name in system.calls.list_directory(model):
            with suppress(OSError):
                system.calls.remove_file(model / name)
        system.calls.remove_directory(model)
    for name in ("journal.new", "journal"):
        with suppress(OSError):
            system.calls.remove_file(partial / name)
    with suppress(OSError):
        if not but_the_lock and set(system.calls.list_directory(partial)) <= {"lock"}:
            with suppress(FileNotFoundError):
                system.calls.remove_file(partial / "lock")
    if not but_the_lock:
        with suppress(OSError):
            system.calls.remove_directory(partial)
