"""Writing files: created, never replaced but where that is said, and synced. An `OSError` becomes an `OutputError`.

This module and `staging` are the only ones that change the disk.
"""

import errno
import hashlib
import mmap
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bayling_delta import system
from bayling_delta.errors import OutputError, Problem
from bayling_delta.sources import CLEARLY, Source, read_bytes
from bayling_delta.system import ALIGNMENT

__all__ = [
    "Appender",
    "FileWriter",
    "copy_file",
    "direct_writes_pay",
    "free_bytes",
    "is_inside",
    "new_file_problems",
    "publish_file",
    "replace_file",
    "reported",
    "sync_directory",
    "write_all",
    "write_error",
    "write_file",
]

_TRIED_BYTES = 2 << 30
"""Outputs of at least so many bytes are worth trials of how they are written best."""
_TRIALS = 3
_TRIAL_BYTES = 4 << 20
_TRIAL_PIECE = 1 << 20
_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def free_bytes(directory: Path) -> int:
    """What may still be written where a directory is, or will be.

    Raises:
        OutputError: the system does not say.
    """
    try:
        while not system.calls.exists(directory) and directory != directory.parent:
            directory = directory.parent
        return system.calls.free_bytes(directory)
    except OSError as error:
        message = f"cannot be written to ({error.strerror or 'unknown'})"
        raise OutputError(Problem("write", str(directory), message)) from error


def new_file_problems(path: Path, not_inside: Path) -> list[Problem]:
    """What keeps a small file from being made, as far as can be seen without trying."""
    with reported(path):
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


def write_file(path: Path, data: bytes) -> None:
    """Create a small file with these bytes, synced.

    Raises:
        OutputError: it exists, or cannot be written.
    """
    with reported(path):
        handle = system.calls.open_write(path, direct=False)
        try:
            write_all(handle, data, 0)
            system.calls.sync(handle)
        except BaseException:
            with suppress(OSError):
                system.calls.remove_file(path)  # which this run has made
            raise
        finally:
            system.close_safely(handle)


def publish_file(path: Path, data: bytes) -> None:
    """Create a small file that is there whole, synced, or not at all.

    Raises:
        OutputError: it exists, or cannot be written.
    """
    partial = path.with_name(f".bayling-delta-{secrets.token_hex(8)}.partial")  # nobody else's, nor a dead run's
    try:
        write_file(partial, data)
        with reported(path):
            system.calls.rename_new(partial, path)
    except BaseException:
        with suppress(OSError):
            system.calls.remove_file(partial)
        raise
    with reported(path):
        system.calls.sync_directory(path.parent)


def replace_file(path: Path, data: bytes) -> None:
    """Have a small file with these bytes, synced, in place of one that may be there: the old one or the new, whole.

    Raises:
        OutputError: it cannot be written.
    """
    new = path.with_name(path.name + ".new")
    with reported(new), suppress(FileNotFoundError):
        system.calls.remove_file(new)
    write_file(new, data)
    with reported(path):
        system.calls.replace(new, path)
        system.calls.sync_directory(path.parent)


class Appender:
    """A small file that grows; what was appended is on the disk when `append` returns."""

    def __init__(self, path: Path) -> None:
        """Open a file that exists.

        Raises:
            OutputError: it cannot be opened.
        """
        self._path = path
        with reported(path):
            self._handle = system.calls.open_update(path)
            try:
                self._end = system.calls.stat_handle(self._handle).st_size
            except BaseException:
                self.close()
                raise

    def append(self, data: bytes) -> None:
        """Write at the end, and sync.

        Raises:
            OutputError: the system refuses; part of it may be there.
        """
        with reported(self._path):
            write_all(self._handle, data, self._end)
            system.calls.sync(self._handle)
            self._end += len(data)

    def close(self) -> None:
        """Close the file, whatever state it is in."""
        system.close_safely(self._handle)


def sync_directory(directory: Path) -> None:
    """Have the names in a directory on the disk: without it a file that is synced may be lost with its name.

    Raises:
        OutputError: the system refuses.
    """
    with reported(directory):
        system.calls.sync_directory(directory)


def copy_file(source: Source, path: Path) -> tuple[int, str]:
    """Create a file with the bytes of another, synced; return its size and SHA-256 in hex.

    Raises:
        OutputError: it exists, or cannot be written.
        CheckpointError: the source cannot be read, or changes.
    """
    digest, done = hashlib.sha256(), 0
    with reported(path):
        handle = system.calls.open_write(path, direct=False)
        try:
            while data := read_bytes(source, done, 1 << 20):
                write_all(handle, data, done)
                digest.update(data)
                done += len(data)
            system.calls.sync(handle)
        finally:
            system.close_safely(handle)
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
        with reported(path):
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
        with reported(path):
            self._handle = self._open()
            try:
                with _optional():
                    system.calls.preallocate(self._handle, size)
            except BaseException:
                self.close()
                raise

    def _open(self) -> int:
        if self._direct:
            try:
                return system.calls.open_write(self.path, direct=True)
            except OSError as error:
                if error.errno not in _NOT_DIRECT:
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
        with reported(self.path):
            if self._direct:
                rounded = -(-count // ALIGNMENT) * ALIGNMENT
                buffer[count:rounded] = bytes(rounded - count)
                try:
                    write_all(self._handle, buffer[:rounded], offset, aligned=True)
                except OSError as error:
                    if error.errno not in _NOT_DIRECT:
                        raise
                    self._leave_direct()
            if not self._direct:
                write_all(self._handle, buffer[:count], offset)

    def _leave_direct(self) -> None:
        """Some file systems take the flag and refuse the write, or a part of it: go on through the page cache."""
        other = system.calls.open_update(self.path)
        self.close()
        self._handle, self._direct = other, False

    def finish(self) -> None:
        """Cut off what rounding added, and sync. Close afterwards."""
        with reported(self.path):
            system.calls.truncate(self._handle, self._size)
            system.calls.sync(self._handle)

    def close(self) -> None:
        """Close the file, whatever state it is in."""
        system.close_safely(self._handle)


def write_all(handle: int, data: bytes | memoryview, offset: int, *, aligned: bool = False) -> None:
    """Write bytes at ``offset``, however many calls it takes; ``aligned`` buffers in whole blocks.

    Raises:
        OSError: the system refuses.
    """
    view = memoryview(data)
    done, stuck = 0, False
    while done < len(view):
        try:
            count = system.calls.write_from(handle, view[done:], offset + done)
        except InterruptedError:
            continue
        if aligned:  # what a short write left of a block is written again
            count -= count % ALIGNMENT
        if count <= 0 and stuck:  # twice in a row nothing was taken
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        stuck = count <= 0
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
def reported(path: Path) -> Iterator[None]:
    """Let an `OSError` of the body become an `OutputError` about a path."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


def write_error(path: Path, error: OSError) -> OutputError:
    """What to raise where the system refused to change something."""
    reason = error.strerror or str(error)
    if error.errno == errno.EEXIST:
        return OutputError(Problem("output_exists", str(path), "appeared meanwhile; nothing was replaced"))
    kind = "disk_space" if error.errno in _NO_ROOM else "write"
    return OutputError(Problem(kind, str(path), f"cannot be written ({reason})"))
