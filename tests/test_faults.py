"""A system that fails, through the seam: what is retried, what has another way, and what ends the run cleanly."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bayling_delta import apply, system
from bayling_delta.crew import Crew, Station
from bayling_delta.errors import BaylingDeltaError, CheckpointError, OutputError
from bayling_delta.files import FileWriter, write_file
from bayling_delta.sources import open_source, read_bytes
from bayling_delta.staging import partial_path, staged_directory
from bayling_delta.system import ALIGNMENT, System
from tests.pairs import assert_same, llama, load, published_sum, save

Pair = tuple[Path, Path]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return save(tmp_path / "base", llama(1), shards=2), save(tmp_path / "delta", llama(2, 0.01), shards=2)


def rebuilt(out: Path) -> None:
    assert_same(load(out), published_sum(llama(1), llama(2, 0.01)))


# what is retried or has another way


class ShortReads(System):
    """Gives at most one block at a time, and is interrupted before each."""

    interrupted = False

    def read_into(self, handle: int, view: memoryview, offset: int) -> int:
        self.interrupted = not self.interrupted
        if self.interrupted:
            raise InterruptedError(errno.EINTR, "interrupted")
        return super().read_into(handle, view[:ALIGNMENT], offset)


class ShortWrites(System):
    """Takes an odd number of bytes at a time where it can, and is interrupted before each."""

    interrupted = False

    def write_from(self, handle: int, view: memoryview, offset: int) -> int:
        self.interrupted = not self.interrupted
        if self.interrupted:
            raise InterruptedError(errno.EINTR, "interrupted")
        taken = view[:ALIGNMENT] if len(view) > ALIGNMENT else view
        return super().write_from(handle, taken, offset)


class NoDirectOpen(System):
    """A file system that refuses the flag."""

    def open_read(self, path: Path, *, direct: bool) -> int:
        if direct:
            raise OSError(errno.EINVAL, "no direct I/O here")
        return super().open_read(path, direct=False)

    def open_write(self, path: Path, *, direct: bool) -> int:
        if direct:
            os.close(super().open_write(path, direct=False))  # some create the file before they refuse
            raise OSError(errno.EINVAL, "no direct I/O here")
        return super().open_write(path, direct=False)


class NoDirectRead(System):
    """A file system that takes the flag, and refuses the reads."""

    def read_into(self, handle: int, view: memoryview, offset: int) -> int:
        if self.is_direct(handle):
            raise OSError(errno.EINVAL, "no direct I/O here")
        return super().read_into(handle, view, offset)

    def is_direct(self, handle: int) -> bool:
        import fcntl

        return bool(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT)


class NoPreallocation(System):
    def preallocate(self, handle: int, size: int) -> None:  # noqa: ARG002
        raise OSError(errno.EOPNOTSUPP, "not here")


@pytest.mark.parametrize("faulty", [ShortReads, ShortWrites, NoDirectOpen, NoDirectRead, NoPreallocation])
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "cached"])
def test_what_can_be_carried_on_is(tmp_path: Path, pair: Pair, faulty: type[System], direct: bool) -> None:
    with system.using(faulty()):
        apply(*pair, tmp_path / "out", direct=direct, memory_limit=1 << 20, max_shard_size=50_000)
    rebuilt(tmp_path / "out")


# what ends the run


class FailingNth(System):
    """The n-th call of one kind fails."""

    def __init__(self, call: str, number: int, code: int) -> None:
        self.left = number
        original = getattr(super(), call)

        def failing(*arguments: object, **options: object) -> object:
            self.left -= 1
            if not self.left:
                raise OSError(code, os.strerror(code))
            return original(*arguments, **options)

        setattr(self, call, failing)


CASES = [
    ("read_into", errno.EIO, CheckpointError, "unreadable"),
    ("open_read", errno.EACCES, CheckpointError, "unreadable"),
    ("stat_handle", errno.ESTALE, CheckpointError, "unreadable"),
    ("write_from", errno.ENOSPC, OutputError, "disk_space"),
    ("write_from", errno.EIO, OutputError, "write"),
    ("open_write", errno.EROFS, OutputError, "write"),
    ("preallocate", errno.ENOSPC, OutputError, "disk_space"),
    ("truncate", errno.EIO, OutputError, "write"),
    ("sync", errno.EIO, OutputError, "write"),
    ("sync_directory", errno.EIO, OutputError, "write"),
    ("make_directory", errno.EACCES, OutputError, "write"),
    ("rename_new", errno.EXDEV, OutputError, "write"),
    ("rename_new", errno.EEXIST, OutputError, "output_exists"),
]


@pytest.mark.parametrize(
    ("call", "code", "error", "kind"), CASES, ids=[f"{c[0]}-{errno.errorcode[c[1]]}" for c in CASES]
)
def test_every_call_fails_once(
    tmp_path: Path, pair: Pair, call: str, code: int, error: type[BaylingDeltaError], kind: str
) -> None:
    """For n = 1, 2, 3 … until a run needs no more: the right error, and no output, or the whole one.

    What is kept is what is finished; the next run goes on with it, and what it makes is the same.
    """
    kept = number = 0
    while True:
        number += 1
        out = tmp_path / f"out-{number}"
        faulty = FailingNth(call, number, code)
        with system.using(faulty):
            raised = attempt(pair, out)
        assert (raised is None) == (faulty.left > 0)
        if raised is not None:
            # What comes first is read of the registry, which is a record and no input.
            kinds = {problem.kind for problem in raised.problems}
            if not raised.problems[0].where.endswith(("lock", "journal", ".partial")):
                assert type(raised) is error, raised
                assert kinds in ({kind}, {"registry"})
        if partial_path(out).exists():
            kept += 1
            assert raised is not None
            assert raised.hint is not None
            assert {path.name for path in partial_path(out).iterdir()} == {"lock", "journal", "model"}
            assert not out.exists()
            apply(*pair, out, memory_limit=1 << 20, max_shard_size=70_000)
        if raised is None or out.exists():
            rebuilt(out)
            assert not partial_path(out).exists()
        if raised is None:
            break
    assert number > 1
    assert kept or call in ("open_read", "stat_handle", "make_directory")


def attempt(pair: Pair, out: Path) -> BaylingDeltaError | None:
    """What a run in several windows and files raises, if it does."""
    try:
        apply(*pair, out, memory_limit=1 << 20, max_shard_size=70_000)
    except BaylingDeltaError as error:
        return error
    return None


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path, pair: Pair) -> None:
    """Not even an empty directory, which a plain rename would replace."""

    class Racing(System):
        def rename_new(self, old: Path, new: Path) -> None:
            new.mkdir()
            super().rename_new(old, new)

    with system.using(Racing()), pytest.raises(OutputError, match="appeared meanwhile; nothing was replaced"):
        apply(*pair, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("make", [System, system.PortableSystem])
def test_rename_never_replaces(tmp_path: Path, make: Callable[[], System]) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileExistsError):
        make().rename_new(tmp_path / "new", tmp_path / "taken")
    make().rename_new(tmp_path / "new", tmp_path / "free")
    assert (tmp_path / "free").is_dir()


# the parts


def test_direct_reads_are_really_direct(tmp_path: Path) -> None:
    """The file layer holds callers to the grid, on every file system, so that no test passes by luck."""
    file = tmp_path / "file"
    file.write_bytes(bytes(3 * ALIGNMENT))
    with open_source(file, direct=True) as source:
        if not source.direct:
            pytest.skip("the file system of the temporary directory has no direct I/O")
        for offset, length in ((1, ALIGNMENT), (0, ALIGNMENT - 1)):
            with pytest.raises(ValueError, match="not aligned"):
                source.read_into(memoryview(bytearray(length)), offset)


def test_reading_past_the_end_gives_what_there_is(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")
    with open_source(file) as source:
        assert read_bytes(source, 8, 100) == b"89"
        assert read_bytes(source, 10, 5) == b""
        assert read_bytes(source, 11, 5) == b""


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for calls in (System(), system.PortableSystem()):
        with (
            system.using(calls),
            pytest.raises(CheckpointError, match="not a regular file"),
            open_source(tmp_path / "pipe"),
        ):
            pass


def test_a_directory_is_staged_and_renamed(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "new") as staging:
        write_file(staging.model / "a", b"text")
        assert not (tmp_path / "new").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]
    assert (tmp_path / "new" / "a").read_bytes() == b"text"


def test_a_body_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with staged_directory(tmp_path / "new") as staging:
            write_file(staging.model / "a", b"text")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 100_000])
@pytest.mark.parametrize("direct", [True, False])
def test_a_file_has_its_size_whatever_the_blocks(tmp_path: Path, size: int, direct: bool) -> None:
    import mmap

    data = os.urandom(size)
    writer = FileWriter(tmp_path / "file", size, direct=direct)
    buffer = memoryview(mmap.mmap(-1, 8192))
    for offset in range(0, size, 8192):
        part = data[offset : offset + 8192]
        buffer[: len(part)] = part
        writer.write(buffer, offset, len(part))
    writer.finish()
    writer.close()
    assert (tmp_path / "file").read_bytes() == data


def test_a_station_handles_its_messages_in_order() -> None:
    seen: list[int] = []
    with Crew(4) as crew:
        station = Station(seen.append)
        for number in range(1000):
            crew.post(station, number)
        assert crew.wait_until_idle(60)
    assert seen == list(range(1000))


def test_what_a_station_raises_is_raised_where_it_is_waited_for() -> None:
    def fail(message: object) -> None:
        raise KeyError(message)

    with Crew(2) as crew:
        crew.post(Station(fail), "x")
        with pytest.raises(KeyError):
            crew.wait_until_idle(60)
