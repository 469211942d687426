"""The seam to the operating system: every call that reads or changes the disk goes through `calls`.

`sources` makes the reads and `files` makes the changes; nothing else touches the disk. Tests replace
`calls` to count calls, to make one fail, or to take the portable way on Linux. The methods raise
`OSError`; its meaning is the caller's business. A call that a signal interrupted is made again, by Python
(PEP 475) or, where Python does not, here.
"""

import ctypes
import errno
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

__all__ = ["ABSENT", "ALIGNMENT", "PortableSystem", "System", "calls", "close_safely", "is_mine", "using"]

ALIGNMENT = 4096
"""Bytes: what direct I/O wants offsets, lengths and buffers to be multiples of."""

ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)
"""What the system answers where nothing has a name, or, with the last three, where nothing can have it."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _again(call: Callable[_P, _T], *arguments: _P.args, **options: _P.kwargs) -> _T:
    """Make a call as often as it is interrupted: one of those that Python does not make again."""
    while True:
        with suppress(InterruptedError):
            return call(*arguments, **options)


class System:
    """The calls as Linux has them."""

    direct_io = hasattr(os, "O_DIRECT")
    """Whether files can be opened past the page cache."""

    # reading

    def open_read(self, path: Path, *, direct: bool) -> int:
        """Open for reading only. Never blocks on a FIFO: the caller checks that it got a regular file."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_DIRECT if direct else 0))

    def read_into(self, handle: int, view: memoryview, offset: int) -> int:
        """Read at ``offset`` into ``view``; may return less, and 0 only at the end of the file."""
        return os.preadv(handle, [view], offset)

    def stat_handle(self, handle: int) -> os.stat_result:
        return os.fstat(handle)

    def stat(self, path: Path) -> os.stat_result:
        return _again(os.stat, path)

    def list_directory(self, path: Path) -> list[str]:
        return _again(os.listdir, path)

    def exists(self, path: Path) -> bool:
        """Whether anything has this name, a dangling link included; raise where the system does not say."""
        try:
            _again(os.lstat, path)
        except OSError as error:
            if error.errno in ABSENT:
                return False
            raise
        except ValueError:  # no name has a null character
            return False
        return True

    def read_link(self, path: Path) -> Path:
        """What a symbolic link has in it."""
        return Path(_again(os.readlink, path))

    def real_path(self, path: Path) -> Path:
        """The path without links, as far as they lead anywhere."""
        try:
            return Path(os.path.realpath(path))
        except OSError:  # there is no current directory any more
            return path

    def free_bytes(self, path: Path) -> int:
        """What an unprivileged user may still write to the file system of ``path``, by its space and their quota."""
        usage = _again(os.statvfs, path)
        return min([usage.f_bavail * usage.f_frsize, *(nbytes for nbytes, _ in _quotas(path) if nbytes is not None)])

    def free_files(self, path: Path) -> int | None:
        """How many files they may still make there; None where that has no limit."""
        usage = _again(os.statvfs, path)
        limits = [files for _, files in _quotas(path) if files is not None]
        return min([usage.f_favail, *limits] if usage.f_files else limits, default=None)

    def largest_file(self, path: Path) -> int | None:
        """Bytes that a file may have there, by the file system and the limits of the process; None if without end."""
        import resource

        of_process, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        of_system = _LARGEST_FILE.get(_file_system(path))
        limits = [of_system] if of_system else []
        return min(limits if of_process == resource.RLIM_INFINITY else [*limits, of_process], default=None)

    def advise_soon(self, handle: int, offset: int, length: int) -> None:
        """Tell the page cache to begin reading these bytes; does not wait for them."""
        os.posix_fadvise(handle, offset, length, os.POSIX_FADV_WILLNEED)

    def drop_cached(self, handle: int, offset: int, length: int) -> None:
        """Tell the page cache that these bytes will not be needed again."""
        os.posix_fadvise(handle, offset, length, os.POSIX_FADV_DONTNEED)

    # changing

    def open_write(self, path: Path, *, direct: bool) -> int:
        """Create a file that must not exist yet, for writing."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
        return os.open(path, flags, 0o666)

    def open_update(self, path: Path) -> int:
        """Open a file that exists, and is no link, to read and write it."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)

    def write_from(self, handle: int, view: memoryview, offset: int) -> int:
        """Write ``view`` at ``offset``; may write less."""
        return os.pwrite(handle, view, offset)

    def preallocate(self, handle: int, size: int) -> None:
        os.posix_fallocate(handle, 0, size)

    def truncate(self, handle: int, size: int) -> None:
        os.ftruncate(handle, size)

    def sync(self, handle: int) -> None:
        os.fsync(handle)

    def sync_directory(self, path: Path) -> None:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that has no such thing
                raise
        finally:
            with suppress(OSError):  # it is synced, or that has failed
                os.close(handle)

    def close(self, handle: int) -> None:
        """Close; whatever it raises, the handle is gone."""
        os.close(handle)

    def make_directory(self, path: Path) -> None:
        _again(os.mkdir, path)

    def set_mode(self, path: Path, mode: int) -> None:
        """Who may read and write a file, as chmod(2) has it."""
        _again(os.chmod, path, mode)

    def remove_file(self, path: Path) -> None:
        _again(os.unlink, path)

    def remove_directory(self, path: Path) -> None:
        _again(os.rmdir, path)

    def rename_new(self, old: Path, new: Path) -> None:
        """Rename; raise `FileExistsError` rather than replace anything, an empty directory included."""
        while (status := _renameat2(old, new)) == errno.EINTR:
            pass
        if status in (errno.ENOSYS, errno.EINVAL):  # an old kernel, or a file system that cannot promise it
            if self.exists(new):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new))
            _again(os.rename, old, new)
        elif status:
            raise OSError(status, os.strerror(status), str(new))

    def replace(self, old: Path, new: Path) -> None:
        """Rename, in place of a file that may be there."""
        _again(os.replace, old, new)

    def lock(self, handle: int) -> bool:
        """Take an exclusive lock on an open file without waiting; False if another process has it."""
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


class PortableSystem(System):
    """The same with nothing but what every platform's Python has; for macOS and Windows, and for tests."""

    direct_io = False

    def __init__(self) -> None:
        self._seek = threading.Lock()  # a position is shared by all users of a handle

    def open_read(self, path: Path, *, direct: bool) -> int:  # noqa: ARG002
        if not stat.S_ISREG(os.stat(path).st_mode):  # there is no O_NONBLOCK to make opening a FIFO safe
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def read_into(self, handle: int, view: memoryview, offset: int) -> int:
        with self._seek:
            os.lseek(handle, offset, os.SEEK_SET)
            data = os.read(handle, len(view))
        view[: len(data)] = data
        return len(data)

    def free_bytes(self, path: Path) -> int:
        import shutil

        return shutil.disk_usage(path).free

    def free_files(self, path: Path) -> int | None:  # noqa: ARG002
        return None

    def largest_file(self, path: Path) -> int | None:  # noqa: ARG002
        return None

    def advise_soon(self, handle: int, offset: int, length: int) -> None:
        pass

    def drop_cached(self, handle: int, offset: int, length: int) -> None:
        pass

    def open_write(self, path: Path, *, direct: bool) -> int:  # noqa: ARG002
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)

    def open_update(self, path: Path) -> int:
        return os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))

    def write_from(self, handle: int, view: memoryview, offset: int) -> int:
        with self._seek:
            os.lseek(handle, offset, os.SEEK_SET)
            return os.write(handle, view)

    def preallocate(self, handle: int, size: int) -> None:
        pass

    def sync_directory(self, path: Path) -> None:
        if os.name != "nt":  # Windows has no handle to a directory that could be synced
            super().sync_directory(path)

    def rename_new(self, old: Path, new: Path) -> None:
        if self.exists(new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new))
        _again(os.rename, old, new)

    def lock(self, handle: int) -> bool:
        if os.name != "nt":
            return super().lock(handle)
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        except OSError:
            return False
        return True


def _renameat2(old: Path, new: Path) -> int:
    """Linux renameat2(2) with RENAME_NOREPLACE; return 0 or the errno."""
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return errno.ENOSYS
    here, no_replace = -100, 1  # AT_FDCWD, RENAME_NOREPLACE
    if function(here, os.fsencode(old), here, os.fsencode(new), no_replace) == 0:
        return 0
    return ctypes.get_errno()


_LARGEST_FILE: Final = {"msdos": (4 << 30) - 1, "vfat": (4 << 30) - 1}
"""Bytes; by the kind of file system, those that memory cards and sticks have."""


def _file_system(path: Path) -> str:
    """The kind of file system that ``path`` is on, as /proc/self/mountinfo (proc(5)) names it; empty if unknown."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            mounts = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    kinds = (mount.partition(" - ")[2].split(" ")[0] for mount in mounts if mount.split(" ")[2] == number)
    return next(kinds, "")


class _Quota(ctypes.Structure):
    """``struct if_dqblk`` of quotactl(2)."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("bytes_hard", "bytes_soft", "bytes_used")),
        *((name, ctypes.c_uint64) for name in ("files_hard", "files_soft", "files_used", "bytes_time", "files_time")),
        ("valid", ctypes.c_uint32),
    )


_QUOTACTL_FD: Final = 443
"""The number of the system call quotactl_fd(2), Linux 5.14 and later, the same on every architecture but Alpha."""
_GET_QUOTA: Final = 0x800007
_QUOTA_BLOCK: Final = 1024
"""Bytes: the unit of the limits, but not of what is used."""


def _quotas(path: Path) -> list[tuple[int | None, int | None]]:
    """Bytes and files that the quotas of this user and group leave on the file system of ``path``.

    None is without limit. Empty where there are none, where the system does not say, and for root, whom none binds.
    """
    if os.geteuid() == 0:
        return []
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    found: list[tuple[int | None, int | None]] = []
    try:
        call = ctypes.CDLL(None, use_errno=True).syscall
        for kind, owner in enumerate((os.geteuid(), os.getegid())):
            quota = _Quota()
            if call(_QUOTACTL_FD, handle, _GET_QUOTA << 8 | kind, owner, ctypes.byref(quota)) == 0:
                nbytes = max(0, quota.bytes_hard * _QUOTA_BLOCK - quota.bytes_used) if quota.bytes_hard else None
                files = max(0, quota.files_hard - quota.files_used) if quota.files_hard else None
                found.append((nbytes, files))
    finally:
        os.close(handle)
    return found


calls: System = System() if sys.platform == "linux" else PortableSystem()
"""What is in use. Read it as ``system.calls`` at each use, so that `using` has its effect."""


def is_mine(status: os.stat_result) -> bool:
    """Whether a file belongs to the user whose rights this process has; True where files belong to nobody."""
    return not hasattr(os, "geteuid") or status.st_uid == os.geteuid()


def close_safely(handle: int) -> None:
    """Close a file whose bytes are read, or synced, or given up: that the system complains then changes nothing."""
    with suppress(OSError):
        calls.close(handle)


@contextmanager
def using(replacement: System) -> Iterator[System]:
    """Let every call go to ``replacement`` while the body runs."""
    global calls
    previous, calls = calls, replacement
    try:
        yield replacement
    finally:
        calls = previous
