"""Creating things on disk so that they are there whole, or not at all. The one module that changes the disk.

A new directory grows as ``NAME.partial/model`` beside its place, under a lock; when all of it is written and
synced it is renamed to ``NAME``. Nothing that exists is ever replaced. An `OSError` becomes an `OutputError`.
"""

import errno
import hashlib
import json
import mmap
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from bayling_delta import system
from bayling_delta.errors import OutputError, Problem
from bayling_delta.sources import CLEARLY, Source, read_bytes
from bayling_delta.system import ALIGNMENT

__all__ = [
    "FileWriter",
    "copy_file",
    "direct_writes_pay",
    "free_bytes",
    "is_inside",
    "new_file_problems",
    "output_problems",
    "partial_path",
    "staged_directory",
    "write_file",
]

_LONGEST_NAME = 255
"""Bytes; what nearly all file systems allow."""
_TRIED_BYTES = 2 << 30
"""Outputs of at least so many bytes are worth trials of how they are written best."""
_TRIALS = 3
_TRIAL_BYTES = 4 << 20
_TRIAL_PIECE = 1 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def partial_path(target: Path) -> Path:
    """Where a directory grows before it has its name."""
    return target.with_name(f"{target.name}.partial")


def output_problems(target: Path, needed_bytes: int) -> list[Problem]:
    """What keeps a directory of this size from being made, as far as can be seen without trying."""
    if target.name in ("", ".."):
        return [Problem("output_exists", str(target), "exists, and nothing is replaced; choose a name for the output")]
    if len(os.fsencode(partial_path(target).name)) > _LONGEST_NAME:
        return [Problem("output_place", str(target)[:80] + "…", "is too long a name for a file system")]
    problems: list[Problem] = []
    if system.calls.exists(target):
        problems.append(
            Problem(
                "output_exists",
                str(target),
                "exists, and nothing is replaced; choose another name or move it away",
            )
        )
    partial = partial_path(target)
    if system.calls.exists(partial):
        problems.append(Problem("output_exists", str(partial), _advice(partial)))
    try:
        if not stat.S_ISDIR(system.calls.stat(target.parent).st_mode):
            what = f"cannot be made: {target.parent} is not a directory"
            return [*problems, Problem("output_place", str(target), what)]
        free = system.calls.free_bytes(target.parent)
    except OSError as error:
        reason = error.strerror or "unknown"
        message = f"cannot hold the output ({reason}); make the directory first, or choose another place"
        problems.append(Problem("output_place", str(target.parent), message))
        return problems
    if free < needed_bytes:
        message = (
            f"has {free / 1e9:,.2f} GB free, the output needs {needed_bytes / 1e9:,.2f} GB; "
            "make room, or choose another place"
        )
        problems.append(Problem("disk_space", str(target.parent), message))
    return problems


def free_bytes(directory: Path) -> int:
    """What may still be written where a directory is, or will be.

    Raises:
        OutputError: the system does not say.
    """
    while not system.calls.exists(directory) and directory != directory.parent:
        directory = directory.parent
    try:
        return system.calls.free_bytes(directory)
    except OSError as error:
        message = f"cannot be written to ({error.strerror or 'unknown'})"
        raise OutputError(Problem("write", str(directory), message)) from error


def new_file_problems(path: Path, not_inside: Path) -> list[Problem]:
    """What keeps a small file from being made, as far as can be seen without trying."""
    if system.calls.exists(path):
        return [Problem("output_exists", str(path), "exists, and nothing is replaced; choose another name")]
    if is_inside(path, not_inside):
        return [
            Problem("output_place", str(path), f"lies inside {not_inside}, which is only read; choose another place")
        ]
    try:
        system.calls.free_bytes(path.parent)
    except OSError as error:
        message = f"cannot be made in {path.parent} ({error.strerror}); make the directory first"
        return [Problem("output_place", str(path), message)]
    return []


def is_inside(path: Path, directory: Path) -> bool:
    """Whether a path lies in a directory, at whatever depth, links followed."""
    return system.calls.real_path(directory) in system.calls.real_path(path).parents


def _advice(partial: Path) -> str:
    """What to say of a partial output that is already there."""
    lock = partial / "lock"
    try:
        handle = system.calls.open_read(lock, direct=False)
    except OSError:
        return "exists, and is not an unfinished output of this program; choose another output or move it away"
    try:
        if system.calls.lock(handle):
            return "is what a run left that was killed; it is not taken up again: remove it, then run again"
        return "is being written by another run; wait for it, or choose another output"
    finally:
        system.calls.close(handle)


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """Yield a new, empty directory; it becomes ``target`` if the body succeeds, and is removed if it fails.

    Raises:
        OutputError: it cannot be made, or ``target`` or its partial form exists.
    """
    partial = partial_path(target)
    model = partial / "model"
    try:
        system.calls.make_directory(partial)
    except FileExistsError as error:
        raise OutputError(Problem("output_exists", str(partial), _advice(partial))) from error
    except OSError as error:
        raise _failed(partial, error) from error
    handle: int | None = None
    try:
        with _reported(partial):
            handle = _lock(partial / "lock")
            system.calls.make_directory(model)
        yield model
        with _reported(target):
            system.calls.sync_directory(model)
            system.calls.rename_new(model, target)
            system.calls.sync_directory(target.parent)
    finally:
        _remove(partial)
        if handle is not None:
            system.calls.close(handle)


def _lock(path: Path) -> int:
    """Create the lock file, hold its lock, and write down whose it is; the lock goes with the process."""
    handle = system.calls.open_write(path, direct=False)
    try:
        system.calls.lock(handle)
        owner = {"pid": os.getpid(), "started": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        _write_all(handle, json.dumps(owner).encode(), 0)
    except BaseException:
        system.calls.close(handle)
        raise
    return handle


def _remove(partial: Path) -> None:
    """Remove what this run made, and only that: two levels of files of its own."""
    for directory in (partial / "model", partial):
        with suppress(OSError):
            for name in system.calls.list_directory(directory):
                with suppress(OSError):
                    system.calls.remove_file(directory / name)
            system.calls.remove_directory(directory)


def write_file(path: Path, data: bytes) -> None:
    """Create a small file with these bytes, synced.

    Raises:
        OutputError: it exists, or cannot be written.
    """
    with _reported(path):
        handle = system.calls.open_write(path, direct=False)
        try:
            _write_all(handle, data, 0)
            system.calls.sync(handle)
        except BaseException:
            with suppress(OSError):
                system.calls.remove_file(path)  # which this run has made
            raise
        finally:
            system.calls.close(handle)


def copy_file(source: Source, path: Path) -> tuple[int, str]:
    """Create a file with the bytes of another, synced; return its size and SHA-256 in hex.

    Raises:
        OutputError: it exists, or cannot be written.
        CheckpointError: the source cannot be read, or changes.
    """
    digest, done = hashlib.sha256(), 0
    with _reported(path):
        handle = system.calls.open_write(path, direct=False)
        try:
            while data := read_bytes(source, done, 1 << 20):
                _write_all(handle, data, done)
                digest.update(data)
                done += len(data)
            system.calls.sync(handle)
        finally:
            system.calls.close(handle)
    source.check_unchanged()
    return done, digest.hexdigest()


def direct_writes_pay(directory: Path, output_bytes: int) -> bool:
    """Whether a large output is best written past the page cache: unless trials show that through it is clearly faster.

    The trials write a few MiB both ways into a file of their own, which is removed.

    Raises:
        OutputError: the system refuses to write here.
    """
    if not system.calls.direct_io or output_bytes < _TRIED_BYTES:
        return system.calls.direct_io
    data = memoryview(mmap.mmap(-1, _TRIAL_BYTES))
    data[:] = os.urandom(_TRIAL_BYTES)  # zeros are special to some file systems
    path = directory / "trial"
    return not all(
        _write_seconds(path, data, direct=False) * CLEARLY < _write_seconds(path, data, direct=True)
        for _ in range(_TRIALS)
    )


def _write_seconds(path: Path, data: memoryview, *, direct: bool) -> float:
    writer = FileWriter(path, len(data), direct=direct)
    try:
        start = time.perf_counter()
        for offset in range(0, len(data), _TRIAL_PIECE):
            writer.write(data[offset : offset + _TRIAL_PIECE], offset, _TRIAL_PIECE)
        writer.finish()
        return time.perf_counter() - start
    finally:
        writer.close()
        with _reported(path):
            system.calls.remove_file(path)


class FileWriter:
    """A new file of known size, written forward in aligned buffers, past the page cache where it can be."""

    def __init__(self, path: Path, size: int, *, direct: bool) -> None:
        """Create the file and reserve its space.

        Raises:
            OutputError: the file exists, the disk is full, or the system refuses.
        """
        self.path = path
        self._size = size
        self._direct = direct and system.calls.direct_io
        with _reported(path):
            self._handle = self._open()
            with _optional():
                system.calls.preallocate(self._handle, size)

    def _open(self) -> int:
        if self._direct:
            try:
                return system.calls.open_write(self.path, direct=True)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                self._direct = False
                with suppress(FileNotFoundError):  # some systems create it before they refuse the flag
                    system.calls.remove_file(self.path)
        return system.calls.open_write(self.path, direct=False)

    def write(self, buffer: memoryview, offset: int, count: int) -> None:
        """Write the first ``count`` bytes of an aligned buffer; a direct write rounds up to whole blocks.

        Raises:
            OutputError: the system refuses.
        """
        with _reported(self.path):
            rounded = -(-count // ALIGNMENT) * ALIGNMENT
            if self._direct:
                buffer[count:rounded] = bytes(rounded - count)
                _write_all(self._handle, buffer[:rounded], offset, aligned=True)
            else:
                _write_all(self._handle, buffer[:count], offset)

    def finish(self) -> None:
        """Cut off what rounding added, and sync. Close afterwards."""
        with _reported(self.path):
            system.calls.truncate(self._handle, self._size)
            system.calls.sync(self._handle)

    def close(self) -> None:
        """Close the file, whatever state it is in."""
        system.calls.close(self._handle)


def _write_all(handle: int, data: bytes | memoryview, offset: int, *, aligned: bool = False) -> None:
    view = memoryview(data)
    done = 0
    while done < len(view):
        try:
            count = system.calls.write_from(handle, view[done:], offset + done)
        except InterruptedError:
            continue
        if aligned:  # what a short write left of a block is written again
            count -= count % ALIGNMENT
        if count <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done += count


@contextmanager
def _optional() -> Iterator[None]:
    """Pass over what a file system does not have and can be done without."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _failed(path, error) from error


def _failed(path: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    if error.errno == errno.EEXIST:
        return OutputError(Problem("output_exists", str(path), "appeared meanwhile; nothing was replaced"))
    kind = "disk_space" if error.errno in _NO_ROOM else "write"
    return OutputError(Problem(kind, str(path), f"cannot be written ({reason})"))
