"""Reading bytes at an offset into a buffer: directly from the disk, or through the page cache.

The one module that reads the disk. An `OSError` becomes a `CheckpointError` that names the file.
"""

import errno
import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bayling_delta import system
from bayling_delta.errors import CheckpointError, Problem
from bayling_delta.system import ABSENT, ALIGNMENT

__all__ = [
    "Source",
    "changed",
    "exists",
    "file_size",
    "file_stamp",
    "file_status",
    "is_directory",
    "link_target",
    "list_directory",
    "open_fastest",
    "open_source",
    "read_bytes",
    "read_file",
    "real_path",
]

_CACHED_BYTES = 1 << 24
"""How far a read through the page cache runs before the pages behind it are given back."""
_TRIED_BYTES = 1 << 28
"""Files of at least so many bytes are worth trials of how they are read best."""
_TRIALS = 5
CLEARLY = 1.5
"""How many times faster the page cache must be to be preferred: a trial is short, and machines are noisy."""


@dataclass(slots=True)
class Source:
    """An open regular file."""

    path: Path
    handle: int
    direct: bool
    """Whether reads pass by the page cache; they must then be aligned."""
    size: int
    """Bytes, when it was opened."""
    modified_ns: int
    _dropped: int = 0

    @property
    def stamp(self) -> tuple[int, int]:
        """What would differ if the file were changed: its size and time of change."""
        return self.size, self.modified_ns

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill ``view`` from ``offset`` on, as far as the file goes; return the number of bytes read.

        A direct source wants offset, length and address to be multiples of `ALIGNMENT`.

        Raises:
            CheckpointError: the system cannot read here.
        """
        if self.direct and (offset % ALIGNMENT or len(view) % ALIGNMENT):
            raise ValueError(f"direct read of {len(view)} bytes at {offset} is not aligned")
        done = 0
        while done < len(view):
            try:
                count = system.calls.read_into(self.handle, view[done:], offset + done)
            except InterruptedError:
                continue
            except OSError as error:
                if self.direct and error.errno in (errno.EINVAL, errno.EOPNOTSUPP) and self._leave_direct():
                    continue
                raise _unreadable(self.path, error) from error
            if count == 0:
                break
            done += count
            if self.direct and done % ALIGNMENT:  # off the grid: the end, or a file system that does it badly
                if offset + done >= self.size:
                    break
                self._leave_direct()
        return done

    def _leave_direct(self) -> bool:
        """Some file systems take the flag, and refuse the read or end it anywhere: go on through the page cache."""
        with _reported(self.path):
            before = _identity(system.calls.stat_handle(self.handle))
            other = system.calls.open_read(self.path, direct=False)
            system.close_safely(self.handle)
            self.handle, self.direct = other, False
            now = _identity(system.calls.stat_handle(self.handle))
        if now != before:
            raise CheckpointError(changed(self.path))
        return True

    def expect(self, places: Iterable[tuple[int, int]]) -> None:
        """Begin to read these short ranges, (offset, length), so that the disk need not be waited for at each."""
        with suppress(OSError):  # it is a hint
            for offset, length in places:
                system.calls.advise_soon(self.handle, offset, length)

    def forget(self, offset: int) -> None:
        """Give the page cache's copy of what lies before ``offset`` back, now and then."""
        if not self.direct and offset - self._dropped >= _CACHED_BYTES:
            with suppress(OSError):  # it is a hint
                system.calls.drop_cached(self.handle, self._dropped, offset - self._dropped)
            self._dropped = offset

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` if the file's size or time is not what it was when it was opened."""
        with _reported(self.path):
            now = system.calls.stat_handle(self.handle)
        if (now.st_size, now.st_mtime_ns) != self.stamp:
            raise CheckpointError(changed(self.path))


def changed(path: Path) -> Problem:
    """The finding that an input is not what it was when the plan was made."""
    return Problem("changed", str(path), "changed while it was being read; let the download finish, then run again")


@contextmanager
def open_source(path: Path, *, direct: bool = False) -> Iterator[Source]:
    """Open a regular file, or a link to one, for reading; past the page cache where asked and possible.

    Raises:
        CheckpointError: it is absent, not a regular file, or the system refuses.
    """
    direct = direct and system.calls.direct_io
    with _reported(path):
        try:
            handle = system.calls.open_read(path, direct=direct)
        except OSError as error:
            if not direct or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            direct = False
            handle = system.calls.open_read(path, direct=False)
    source = Source(path, handle, direct, 0, 0)
    try:
        with _reported(path):
            status = system.calls.stat_handle(handle)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(Problem("unreadable", str(path), "is not a regular file"))
        source.size, source.modified_ns = status.st_size, status.st_mtime_ns
        yield source
    finally:
        system.close_safely(source.handle)


@contextmanager
def open_fastest(path: Path, scratch: memoryview) -> Iterator[Source]:
    """Open a file for reading forward, past the page cache unless trials show that it is clearly faster through it.

    It is where the file is in the cache already, or where the file system does direct reads badly. ``scratch`` is
    an aligned buffer, which is overwritten.

    Raises:
        CheckpointError: as `open_source`.
    """
    with open_source(path, direct=True) as direct:
        if direct.direct and direct.size >= _TRIED_BYTES:
            with open_source(path) as cached:
                cache_wins = _cache_wins(direct, cached, scratch)
            if cache_wins:
                direct._leave_direct()
        yield direct


def _cache_wins(direct: Source, cached: Source, scratch: memoryview) -> bool:
    """Whether reads through the page cache are clearly faster in all of some places of a file but one."""
    lost = 0
    for place in range(_TRIALS):
        offset = direct.size * place // _TRIALS // ALIGNMENT * ALIGNMENT
        # The cache reads ahead: it comes second, so that this does not disturb the other.
        past = _seconds(direct, scratch, offset)
        lost += _seconds(cached, scratch, offset + len(scratch)) * CLEARLY > past
        if lost > 1:
            return False
    return True


def _seconds(source: Source, scratch: memoryview, offset: int) -> float:
    start = time.perf_counter()
    source.read_into(scratch, offset)
    return time.perf_counter() - start


def read_bytes(source: Source, offset: int, length: int) -> bytes:
    """Return up to ``length`` bytes from ``offset`` on, fewer only at the end of the file.

    The caller bounds ``length``; the source must not be a direct one.
    """
    buffer = bytearray(max(0, min(length, source.size - offset)))
    return bytes(buffer[: source.read_into(memoryview(buffer), offset)])


def read_file(path: Path, limit: int) -> bytes:
    """Return a small file whole.

    Raises:
        CheckpointError: it cannot be read, or has more than ``limit`` bytes.
    """
    with open_source(path) as source:
        if source.size > limit:
            raise CheckpointError(
                Problem("unsupported", str(path), f"has {source.size:,} bytes; at most {limit:,} are read here")
            )
        return read_bytes(source, 0, source.size)


def file_status(path: Path) -> os.stat_result | None:
    """What the system knows of a file, or of what a link leads to; None if there is none.

    Raises:
        CheckpointError: the system does not say. What it does not say is not taken for absent: a result would lack it.
    """
    with _reported(path):
        try:
            return system.calls.stat(path)
        except OSError as error:
            if error.errno in ABSENT:
                return None
            raise


def file_stamp(path: Path) -> tuple[int, int] | None:
    """Size and time of change of a regular file or a link to one, as `Source.stamp`; None if there is no such file.

    Raises:
        CheckpointError: the system does not say.
    """
    status = file_status(path)
    return (status.st_size, status.st_mtime_ns) if status and stat.S_ISREG(status.st_mode) else None


def file_size(path: Path) -> int | None:
    """The size in bytes of a regular file or a link to one; None if there is no such file.

    Raises:
        CheckpointError: the system does not say.
    """
    stamp = file_stamp(path)
    return stamp[0] if stamp else None


def exists(path: Path) -> bool:
    """Whether anything has this name, a link that leads nowhere included.

    Raises:
        CheckpointError: the system does not say.
    """
    with _reported(path):
        return system.calls.exists(path)


def link_target(path: Path) -> Path | None:
    """What a symbolic link points at, as it is written there; None if it is no link.

    Raises:
        CheckpointError: the system does not say.
    """
    with _reported(path):
        try:
            return system.calls.read_link(path)
        except OSError as error:
            if error.errno in ABSENT:
                return None
            raise


def real_path(path: Path) -> Path:
    """The path without links, as far as they lead anywhere."""
    return system.calls.real_path(path)


def is_directory(path: Path) -> bool:
    """Whether it is a directory, or a link to one.

    Raises:
        CheckpointError: the system does not say.
    """
    status = file_status(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def list_directory(path: Path) -> list[str]:
    """The names in a directory, sorted.

    Raises:
        CheckpointError: it is absent or cannot be listed.
    """
    with _reported(path):
        return sorted(system.calls.list_directory(path))


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    reason = error.strerror or os.strerror(error.errno or 0)
    kind = "not_found" if error.errno == errno.ENOENT else "unreadable"
    return CheckpointError(Problem(kind, str(path), f"cannot be read ({reason})"))
