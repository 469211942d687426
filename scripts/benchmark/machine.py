"""What a measurement needs of the system: the machine's description, and a cold cache."""

import ctypes
import mmap
import os
import platform
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

__all__ = ["available_bytes", "cached_share", "chill", "cores", "describe", "files_of"]

_LOWEST_BIT: Final = bytes(value & 1 for value in range(256))
"""What mincore(2) says of a page; the other bits mean nothing."""
_PACKAGES: Final = ("bayling-delta", "numpy", "numkong", "isal", "torch")


def cores() -> int:
    """Hardware threads that this process may use."""
    return len(os.sched_getaffinity(0))


def describe(directory: Path) -> dict[str, Any]:
    """The machine, its software, and the file system of a directory; no host name and no path."""
    info = _pairs(Path("/proc/cpuinfo"))
    return {
        "cpu": info.get("model name", platform.machine()),
        "hardware_threads": cores(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": f"{platform.system()} {platform.release()}",
        "file_system": _file_system(directory),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in _PACKAGES if _is_installed(name)},
    }


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except ImportError:
        return False
    return True


def _pairs(path: Path) -> dict[str, str]:
    """The last value of each key of a file of ``key : value`` lines."""
    lines = (line.partition(":") for line in path.read_text().splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def _file_system(directory: Path) -> str:
    """The type of the file system that holds a directory."""
    here = directory.stat().st_dev
    device = f"{os.major(here)}:{os.minor(here)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == device:
            return fields[fields.index("-") + 1]
    return "unknown"


def available_bytes() -> int:
    """Memory that could be had without swapping."""
    return int(_pairs(Path("/proc/meminfo"))["MemAvailable"].split()[0]) * 1024


def files_of(directories: Iterable[Path]) -> list[Path]:
    """The regular files in some directories."""
    return [path for directory in directories for path in sorted(directory.iterdir()) if path.is_file()]


# the page cache


def chill(inputs: Iterable[Path], how: str) -> str:
    """Make the cache cold as far as is asked and allowed; return in words what was done.

    ``how`` is ``none``, ``inputs`` (the pages of these files are dropped) or ``all`` (the whole page cache too,
    programs included, where the user may).
    """
    os.sync()
    if how == "none":
        return "not cold"
    for path in inputs:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    if how == "all":
        try:
            Path("/proc/sys/vm/drop_caches").write_text("3\n")
        except OSError:
            return "inputs dropped; the system does not allow to drop more"
        return "inputs and programs dropped"
    return "inputs dropped"


def cached_share(paths: Iterable[Path]) -> float | None:
    """The share of some files' pages that is in the page cache; None where the system does not tell.

    mincore(2) looks without touching; reads with RWF_NOWAIT would set off read-ahead.
    """
    pages = cached = 0
    for path in paths:
        resident = _resident_pages(path)
        if resident is None:
            return None
        pages, cached = pages + len(resident), cached + resident.count(1)
    return cached / pages if pages else None


def _resident_pages(path: Path) -> bytes | None:
    """A byte for each page of a file: 1 if it is cached, else 0."""
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    size = path.stat().st_size
    if not size:
        return b""
    found = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
    length = ctypes.c_size_t(size)
    with path.open("rb") as file:
        start = library.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), ctypes.c_long(0))
    if start == ctypes.c_void_p(-1).value:
        return None
    try:
        failed = library.mincore(ctypes.c_void_p(start), length, found)
    finally:
        library.munmap(ctypes.c_void_p(start), length)
    return None if failed else bytes(found.raw).translate(_LOWEST_BIT)


if sys.platform != "linux":
    raise SystemExit("bench: measures with /proc, and so runs on Linux alone")
