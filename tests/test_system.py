"""What room the system says there is."""

import ctypes
import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest

from bayling_delta import system
from bayling_delta.system import PortableSystem, System

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")

FIELDS: Final = "bytes_hard bytes_soft bytes_used files_hard files_soft files_used bytes_time files_time".split()
HERE: Final = Path(__file__).parent


def room(calls: System) -> tuple[int, int | None]:
    return calls.free_bytes(HERE), calls.free_files(HERE)


def give_quota(monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]) -> None:
    """Have the kernel answer as quotactl(2) says: for the user, with ``struct if_dqblk``; the group has none."""

    def syscall(number: int, handle: int, command: int, owner: int, address: Any) -> int:
        assert number == 443
        assert os.path.samestat(os.fstat(handle), HERE.stat())
        if command != 0x80000700:  # QCMD(Q_GETQUOTA, USRQUOTA)
            assert command == 0x80000701
            return -1
        assert owner == 1000
        words = (ctypes.c_uint64 * len(FIELDS)).from_address(ctypes.addressof(address._obj))
        words[:] = [limits.get(name, 0) for name in FIELDS]
        return 0

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(syscall=syscall))


@pytest.mark.parametrize(
    ("limits", "nbytes", "files"),
    [
        ({"bytes_hard": 100, "bytes_used": 2400}, 100 * 1024 - 2400, None),
        ({"bytes_hard": 1, "bytes_used": 2400, "files_hard": 7, "files_used": 5}, 0, 2),
        ({"files_hard": 7, "files_used": 9}, None, 0),
        ({"bytes_soft": 1, "files_soft": 1, "bytes_used": 5000, "files_used": 50}, None, None),
    ],
)
def test_a_quota_is_part_of_the_room(
    monkeypatch: pytest.MonkeyPatch, limits: dict[str, int], nbytes: int | None, files: int | None
) -> None:
    """Its limits are in units of 1,024 bytes, what is used in bytes; 0 is no limit; None here is the disk's room."""
    monkeypatch.setattr(
        os, "statvfs", lambda _: SimpleNamespace(f_bavail=99, f_frsize=4096, f_files=1000, f_favail=500)
    )
    give_quota(monkeypatch, limits)
    assert room(System()) == (99 * 4096 if nbytes is None else nbytes, 500 if files is None else files)


def test_no_quota_binds_root(monkeypatch: pytest.MonkeyPatch) -> None:
    give_quota(monkeypatch, {"bytes_hard": 1, "files_hard": 1})
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert room(System())[0] > 1024


def test_a_file_system_that_counts_no_files_has_room_for_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=99, f_frsize=4096, f_files=0, f_favail=0))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert room(System()) == (99 * 4096, None)
    assert PortableSystem().free_files(HERE) is None


@pytest.mark.parametrize(
    ("kind", "limit", "largest"),
    [
        ("ext4", resource.RLIM_INFINITY, None),
        ("vfat", resource.RLIM_INFINITY, 4294967295),
        ("ext4", 7_000_000, 7_000_000),
        ("vfat", 7_000_000, 7_000_000),
        ("vfat", 1 << 40, 4294967295),
    ],
)
def test_how_large_a_file_may_be(monkeypatch: pytest.MonkeyPatch, kind: str, limit: int, largest: int | None) -> None:
    monkeypatch.setattr(system, "_file_system", lambda _: kind)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, resource.RLIM_INFINITY))
    assert System().largest_file(HERE) == largest


def test_the_kind_of_a_file_system_is_known() -> None:
    assert system._file_system(Path("/proc")) == "proc"
    assert system._file_system(Path("/dev/shm")) in ("tmpfs", "")
