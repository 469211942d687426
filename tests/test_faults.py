"""A system that fails, through the seam: what is retried, what has another way, and what ends the run cleanly."""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bayling_delta import apply, system
from bayling_delta.crew import Crew, Station
from bayling_delta.errors import CheckpointError, OutputError
from bayling_delta.files import FileWriter, write_file
from bayling_delta.sources import open_source, read_bytes
from bayling_delta.staging import partial_path, staged_directory
from bayling_delta.system import ALIGNMENT, System
from tests.failing import (
    COMMANDS,
    METHODS,
    Call,
    FailingNth,
    Fault,
    Stage,
    Watched,
    contents,
    error,
    nothing,
    short,
)
from tests.pairs import assert_same, llama, load, published_sum, save
from tests.running import Run

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


class NoDirectWrite(NoDirectRead):
    """The same, and the writes."""

    def write_from(self, handle: int, view: memoryview, offset: int) -> int:
        if self.is_direct(handle):
            raise OSError(errno.EINVAL, "no direct I/O here")
        return super().write_from(handle, view, offset)


class NoPreallocation(System):
    def preallocate(self, handle: int, size: int) -> None:  # noqa: ARG002
        raise OSError(errno.EOPNOTSUPP, "not here")


@pytest.mark.parametrize(
    "faulty", [ShortReads, ShortWrites, NoDirectOpen, NoDirectRead, NoDirectWrite, NoPreallocation]
)
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "cached"])
def test_what_can_be_carried_on_is(tmp_path: Path, pair: Pair, faulty: type[System], direct: bool) -> None:
    with system.using(faulty()):
        apply(*pair, tmp_path / "out", direct=direct, memory_limit=1 << 20, max_shard_size=50_000)
    rebuilt(tmp_path / "out")


# every call fails once


@dataclass(frozen=True)
class Row:
    """A fault, and how a run ends that meets it."""

    name: str
    fault: Fault
    outcome: str
    """``fine``, ``ends``, or ``either``: of what is asked more than once, or as a hint, or to clean up."""
    direct: bool = False
    """Whether it is met by calls alone that pass by the page cache."""


def fails(*codes: int, outcome: str = "ends", direct: bool = False) -> list[Row]:
    return [Row(errno.errorcode[code], error(code), outcome, direct) for code in codes]


def closing_fails(call: Call, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """The system complains, and the handle is gone: as Linux does it."""
    call(*arguments, **options)
    raise OSError(errno.EIO, os.strerror(errno.EIO))


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FAULTS: dict[str, list[Row]] = {
    "open_read": [
        *fails(errno.EIO, errno.EACCES, errno.ENOENT, errno.ESTALE, errno.EMFILE),
        *fails(errno.EINVAL, errno.EOPNOTSUPP, outcome="fine", direct=True),
    ],
    "read_into": [
        *fails(errno.EIO, errno.ESTALE),
        *fails(errno.EINTR, outcome="fine"),
        *fails(errno.EINVAL, errno.EOPNOTSUPP, outcome="fine", direct=True),
        Row("short", short, "fine"),
        Row("short direct", short, "fine", direct=True),
    ],
    "stat_handle": fails(errno.EIO, errno.ESTALE),
    "stat": fails(errno.EIO, errno.EACCES, errno.ESTALE, outcome="either"),
    "list_directory": fails(errno.EIO, errno.EACCES, outcome="either"),
    "exists": fails(errno.EIO, errno.EACCES, outcome="either"),
    "read_link": fails(errno.EIO, errno.EACCES, outcome="either"),
    "real_path": [],  # it tells of no failure: os.path.realpath leaves what it cannot read as it is
    "free_bytes": fails(errno.EIO, errno.ENOSYS, outcome="either"),
    "free_files": fails(errno.EIO, errno.ENOSYS, outcome="fine"),
    "largest_file": fails(errno.EIO, errno.ENOSYS, outcome="fine"),
    "advise_soon": fails(errno.EIO, errno.EINVAL, outcome="fine"),
    "drop_cached": fails(errno.EIO, errno.EINVAL, outcome="fine"),
    "open_write": [
        *fails(errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES),
        *fails(errno.EINVAL, errno.EOPNOTSUPP, outcome="fine", direct=True),
    ],
    "open_update": fails(errno.EIO, errno.EACCES, errno.EROFS, errno.ENOENT, outcome="either"),
    "write_from": [
        *fails(errno.EIO, *NO_ROOM),
        *fails(errno.EINTR, outcome="fine"),
        *fails(errno.EINVAL, errno.EOPNOTSUPP, outcome="fine", direct=True),
        Row("short", short, "fine"),
        Row("short direct", short, "fine", direct=True),
        Row("nothing", nothing, "fine"),
    ],
    "preallocate": [
        *fails(errno.EIO, *NO_ROOM),
        *fails(errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, outcome="fine"),
    ],
    "truncate": fails(errno.EIO, errno.EFBIG),
    "sync": fails(errno.EIO, errno.ENOSPC, errno.EDQUOT),
    "sync_directory": fails(errno.EIO, errno.EACCES),  # what a file system has not is passed over in the seam
    "close": [Row("EIO", closing_fails, "fine")],
    "make_directory": fails(errno.EIO, errno.ENOSPC, errno.EACCES, errno.EROFS),
    "set_mode": fails(errno.EPERM, errno.EROFS, outcome="fine"),
    "remove_file": fails(errno.EIO, errno.EACCES, outcome="either"),
    "remove_directory": fails(errno.EIO, errno.ENOTEMPTY, outcome="either"),
    "rename_new": fails(errno.EIO, errno.ENOSPC, errno.EXDEV, errno.EEXIST, errno.EACCES),
    "replace": fails(errno.EIO, errno.ENOSPC, errno.EACCES),
    "lock": fails(errno.ENOLCK, errno.EIO, outcome="either"),
}
"""EINTR is met by reads and writes alone: of the other calls, Python or the seam makes each again."""


def test_no_call_is_forgotten() -> None:
    assert FAULTS.keys() == set(METHODS)


def places(seen: list[tuple[Path, bool]], most: int | None) -> list[int]:
    """Numbers of calls, counted from 1: all, or so many of those that are the first about a file in their thread.

    The program's own data, many files that are all read in one way, count as one file.
    """
    data = Path(system.__file__).parent / "data"
    found: dict[tuple[Path, bool], int] = {}
    for number, (path, main) in enumerate(seen, 1):
        found.setdefault((data if path.is_relative_to(data) else path, main), number)
    if most is None:
        first = set(found.values())
        others = {number for number, (path, _) in enumerate(seen, 1) if not path.is_relative_to(data)}
        return sorted({*first, *others, len(seen) + 1})  # one more than are made
    numbers = list(found.values()) or [1]
    return sorted({numbers[round(place * (len(numbers) - 1) / max(1, most - 1))] for place in range(most)})


@pytest.mark.parametrize("call", METHODS)
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.long)], ids=["some", "every"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_call_fails_once(
    stage: Stage, run: Run, record_property: Callable[[str, object], None], command: str, call: str, every: bool
) -> None:
    """The n-th call of a kind meets a fault, for each n, or for some; whatever is left, the next run is right."""
    if command not in stage.calls:
        stage.reset(command)
        watched = Watched()
        assert run(stage.command(command), watched).code == 0
        stage.calls[command] = watched.seen
    seen = stage.calls[command][call]
    rows = FAULTS[call] if seen else []
    met = 0
    for row in rows if every or command == "apply" else rows[:1]:
        numbers = places(seen, None if every else (3 if row is rows[0] else 1))
        for number in numbers if command == "apply" else numbers[:: 1 + len(numbers) // 100]:
            met += meets(stage, run, command, FailingNth(call, number, row.fault, direct=row.direct), row)
    record_property("faults met", met)
    assert bool(met) == bool(rows)


def meets(stage: Stage, run: Run, command: str, world: FailingNth, row: Row) -> bool:
    """Run a command in a world with a fault, and again in one without; whether the fault was met."""
    stage.reset(command)
    ended = run(stage.command(command), world)
    stage.check(command, ended)
    assert not world.left_open
    if world.path is None:
        assert ended.code == 0
        return False
    assert ended.code in stage.codes(command, world.path, row.outcome), (world.path, row.name, ended)
    if ended.code:
        assert stage.named(world.path, ended), (world.path, row.name, ended)
        if ended.code == 6 and row.name in ("ENOSPC", "EDQUOT", "EFBIG"):
            assert ended.kinds == ["disk_space"]
    there = stage.out.exists()
    again = run(stage.command(command))
    stage.check(command, again, before=there)
    assert again.code == (6 if there and command in ("apply", "go on", "record") else 0), again
    assert not partial_path(stage.out).exists() or command == "repair"  # it may have had nothing to do
    return True


class Interrupted:
    """The system's calls that Python does not make again: every other one is interrupted."""

    def __init__(self) -> None:
        self.count = 0
        for name in "stat lstat listdir readlink statvfs mkdir unlink rmdir rename replace".split():
            setattr(self, name, self._interrupting(getattr(os, name)))

    def _interrupting(self, call: Call) -> Call:
        def interrupting(*arguments: Any) -> Any:
            self.count += 1
            if self.count % 2:
                raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
            return call(*arguments)

        return interrupting

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


@pytest.mark.parametrize("renameat2", [True, False])
def test_what_is_interrupted_is_done_again(
    stage: Stage, run: Run, monkeypatch: pytest.MonkeyPatch, renameat2: bool
) -> None:
    answers = iter([errno.EINTR, errno.EINTR])
    real = system._renameat2
    interrupted = Interrupted()
    monkeypatch.setattr(system, "os", interrupted)
    monkeypatch.setattr(
        system, "_renameat2", lambda old, new: next(answers, None) or (real(old, new) if renameat2 else errno.ENOSYS)
    )
    for command in COMMANDS:
        stage.reset(command)
        ended = run(stage.command(command))
        stage.check(command, ended)
        assert ended.code == 0
    assert interrupted.count > 100


class NoRoom(System):
    """A disk that takes small files, and no weights."""

    def preallocate(self, handle: int, size: int) -> None:  # noqa: ARG002
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_directory_that_cannot_be_emptied_is_still_known_as_ours(stage: Stage, run: Run) -> None:
    """The lock stays in it, and the next run takes it over."""

    class Sticky(NoRoom):
        def remove_file(self, path: Path) -> None:
            if path.name == "journal":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            super().remove_file(path)

    stage.reset("apply")
    assert run(stage.command("apply"), Sticky()).code == 6
    assert {path.name for path in partial_path(stage.out).iterdir()} == {"lock", "journal"}
    stage.check("apply", run(stage.command("apply")))
    assert not partial_path(stage.out).exists()


def test_what_is_finished_stays_if_its_directory_cannot_be_taken_up(stage: Stage, run: Run) -> None:
    stage.reset("go on")
    world = FailingNth("make_directory", 2, error(errno.EIO))
    assert run(stage.command("go on"), world).code == 6
    assert world.path == partial_path(stage.out) / "model"
    assert contents(stage.place / "begun" / "model") == contents(partial_path(stage.out) / "model")


def test_a_refused_hint_is_passed_over(tmp_path: Path) -> None:
    """Files small enough for the loops above are never given back."""
    with (tmp_path / "file").open("wb") as file:
        file.truncate(1 << 24)
    world = FailingNth("drop_cached", 1, error(errno.EINVAL))
    with system.using(world), open_source(tmp_path / "file") as source:
        source.forget(1 << 24)
    assert world.path == tmp_path / "file"


def test_a_file_that_could_not_be_begun_is_closed(tmp_path: Path) -> None:
    world = FailingNth("preallocate", 1, error(errno.ENOSPC))
    with system.using(world), pytest.raises(OutputError):
        FileWriter(tmp_path / "file", 100, direct=False)
    assert not world.left_open


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.model"])
def test_what_the_system_does_not_tell_of_is_not_taken_for_absent(stage: Stage, run: Run, name: str) -> None:
    """A result would silently lack the file."""

    class Silent(System):
        def exists(self, path: Path) -> bool:
            if path == stage.place / "delta" / name:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().exists(path)

    stage.reset("apply")
    ended = run(stage.command("apply"), Silent())
    assert (ended.code, set(ended.kinds)) == (3, {"unreadable"})
    assert not stage.out.exists()


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
