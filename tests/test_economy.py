"""What a run costs, counted instead of timed: passes over the bytes, copies, system calls, buffers."""

import hashlib
import mmap
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bayling_delta import arithmetic, engine, system, windows
from bayling_delta.checkpoint import open_checkpoint
from bayling_delta.files import direct_writes_pay
from bayling_delta.plan import Plan, make_plan
from bayling_delta.sinks import DirectorySink
from bayling_delta.sources import open_fastest, open_source
from bayling_delta.system import ALIGNMENT, System
from tests.pairs import save, shuffled

TENSORS = {f"model.layers.{number}.mlp.up_proj.weight": (700 + number, 1024) for number in range(12)}
"""Some 17 MB, at phases that differ from shard to shard."""


def address(buffer: Any) -> int:
    """Where a buffer begins in memory."""
    return int(np.frombuffer(buffer, np.uint8).__array_interface__["data"][0])


class Census(System):
    """Notes every call that moves bytes: (address, how many), and counts all others by name."""

    def __init__(self) -> None:
        self.reads: dict[Path, list[tuple[int, int, int]]] = {}
        self.writes: dict[Path, list[tuple[int, int, int]]] = {}
        self.others: Counter[str] = Counter()
        self._paths: dict[int, Path] = {}

    def open_read(self, path: Path, *, direct: bool) -> int:
        handle = super().open_read(path, direct=direct)
        self._paths[handle] = path
        self.others["open"] += 1
        return handle

    def open_write(self, path: Path, *, direct: bool) -> int:
        handle = super().open_write(path, direct=direct)
        self._paths[handle] = path
        self.others["open"] += 1
        return handle

    def read_into(self, handle: int, view: memoryview, offset: int) -> int:
        count = super().read_into(handle, view, offset)
        self.reads.setdefault(self._paths[handle], []).append((offset, count, address(view)))
        return count

    def write_from(self, handle: int, view: memoryview, offset: int) -> int:
        count = super().write_from(handle, view, offset)
        self.writes.setdefault(self._paths[handle], []).append((offset, count, address(view)))
        return count

    def stat_handle(self, handle: int) -> Any:
        self.others["stat"] += 1
        return super().stat_handle(handle)

    def sync(self, handle: int) -> None:
        self.others["sync"] += 1
        super().sync(handle)

    def truncate(self, handle: int, size: int) -> None:
        self.others["truncate"] += 1
        super().truncate(handle, size)

    def drop_cached(self, handle: int, offset: int, length: int) -> None:
        self.others["drop_cached"] += 1
        super().drop_cached(handle, offset, length)


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    random = torch.Generator().manual_seed(1)
    sides = []
    for side in ("base", "delta"):
        state = {name: torch.randn(shape, generator=random).half() for name, shape in TENSORS.items()}
        sides.append(save(tmp_path / side, state, shards=3, config=None))
    return sides[0], sides[1]


def planned(base: Path, delta: Path) -> Plan:
    return make_plan(open_checkpoint(base), open_checkpoint(delta), max_shard_size=7_000_000)


def carried_out(plan: Plan, out: Path, **options: Any) -> tuple[Census, engine.Outcome]:
    """Run a plan, and return what it asked of the system."""
    out.mkdir()
    with system.using(Census()) as census:
        outcome = engine.run(plan, DirectorySink(out, plan.output_bytes), **options)
    assert isinstance(census, Census)
    return census, outcome


def moved(calls: dict[Path, list[tuple[int, int, int]]]) -> dict[Path, int]:
    return {path: sum(count for _, count, _ in entries) for path, entries in calls.items()}


def test_every_byte_is_read_once_and_written_once(places: tuple[Path, Path], tmp_path: Path) -> None:
    plan = planned(*places)
    census, _ = carried_out(plan, tmp_path / "out")
    inputs = [file for side in places for file in sorted(side.glob("*.bin"))]
    # Windows begin at whole blocks, and nothing else is read again; reads at the end of a file come back short.
    assert moved(census.reads) == {file: file.stat().st_size for file in inputs}
    for path, count in moved(census.writes).items():
        assert 0 <= count - path.stat().st_size < ALIGNMENT
    assert {path.name for path in census.writes} == {file.name for file in plan.files}


def test_a_base_in_another_order_is_read_once_too(places: tuple[Path, Path], tmp_path: Path) -> None:
    base, delta = places
    state = {name: tensor for file in sorted(base.glob("*.bin")) for name, tensor in torch.load(file).items()}
    other = save(tmp_path / "sorted", state, container="safetensors", order=shuffled(state), config=None)
    plan = planned(other, delta)
    census, _ = carried_out(plan, tmp_path / "out")
    (read,) = (count for path, count in moved(census.reads).items() if path.suffix == ".safetensors")
    weights = sum(tensor.base.nbytes for tensor in plan.tensors if tensor.base)
    assert weights <= read <= weights + 2 * ALIGNMENT * len(plan.base_reads.steps)


def test_system_calls_grow_with_windows_and_files_alone(places: tuple[Path, Path], tmp_path: Path) -> None:
    plan = planned(*places)
    census, _ = carried_out(plan, tmp_path / "out")
    chunk = plan.budget.chunk_bytes
    assert chunk > 5 << 20  # below 200 reads and 200 writes a gigabyte of each file
    for path, entries in (*census.reads.items(), *census.writes.items()):
        assert len(entries) <= path.stat().st_size // chunk + 2, path
    files = len(census.reads) + len(census.writes)
    assert census.others["open"] == files
    assert census.others["sync"] == census.others["truncate"] == len(census.writes)
    assert sum(census.others.values()) <= 5 * files


def test_nothing_is_copied_between_kernel_addition_digests_and_kernel(
    places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them are given the windows themselves, whose memory is what the budget says."""
    buffers: list[tuple[int, int]] = []
    digested: Counter[str] = Counter()
    strangers: Counter[str] = Counter()

    def inside(what: str, buffer: Any) -> None:
        start, size = address(buffer), memoryview(buffer).nbytes
        if not any(first <= start and start + size <= last for first, last in buffers):
            strangers[what] += 1

    def allocate(chunk_bytes: int, count: int) -> list[memoryview]:
        made = windows.allocate(chunk_bytes, count)
        buffers.extend((address(buffer), address(buffer) + len(buffer)) for buffer in made)
        return made

    class Sha256:
        def __init__(self, data: bytes = b"") -> None:
            self._digest = real(data)

        def update(self, data: memoryview) -> None:
            inside("digest", data)
            digested["bytes"] += len(data)
            self._digest.update(data)

        def hexdigest(self) -> str:
            return self._digest.hexdigest()

        def copy(self) -> "Any":
            return self._digest.copy()

    def additions(*dtypes: str) -> Callable[..., int]:
        add = arithmetic.make_addition(*dtypes)

        def spied(result: Any, base: Any, delta: Any) -> int:
            for operand in (result, base, delta):
                inside("addition", operand)
            return add(result, base, delta)

        return spied

    plan = planned(*places)
    real = hashlib.sha256
    monkeypatch.setattr(engine, "allocate", allocate)
    monkeypatch.setattr(engine, "Digester", lambda sizes, new=Sha256, **more: windows.Digester(sizes, new, **more))
    census, outcome = carried_out(plan, tmp_path / "out", additions=additions)
    for entries in (*census.reads.values(), *census.writes.values()):
        assert all(any(first <= where < last for first, last in buffers) for _, _, where in entries)
    assert not strangers
    # The inputs' files, the result's files, and the result's tensors: each once.
    weights = sum(tensor.nbytes for tensor in plan.tensors)
    inputs = sum(file.size for side in (plan.base, plan.delta) for file in side.files)
    assert digested["bytes"] == inputs + plan.output_bytes + weights
    assert sum(last - first for first, last in buffers) == plan.budget.total_bytes <= 64 << 20
    for file in plan.files:  # and the spy has not kept anything from happening
        assert outcome.result.files[file.name] == real((tmp_path / "out" / file.name).read_bytes()).hexdigest()


class Refusing(windows.Digester):
    """A digester that nothing must be given to."""

    def update(self, buffer: memoryview, pieces: Sequence[windows.Piece]) -> None:
        assert not pieces, f"{len(buffer)} bytes were digested"


def test_a_run_without_digests_computes_none(
    places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(*places)
    _, with_digests = carried_out(plan, tmp_path / "with")
    monkeypatch.setattr(engine, "Digester", Refusing)
    _, without = carried_out(plan, tmp_path / "without", digests=False)
    assert without.result == without.base == without.delta == engine.Digests({}, {})
    assert with_digests.result.files.keys() == {file.name for file in plan.files}
    for file in plan.files:
        assert (tmp_path / "with" / file.name).read_bytes() == (tmp_path / "without" / file.name).read_bytes()


# direct I/O or the page cache


class Lame(System):
    """A file system on which one way is slow."""

    def __init__(self, *, direct: bool) -> None:
        self._slow = direct

    def _limp(self, handle: int) -> None:
        import fcntl

        if bool(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT) == self._slow:
            time.sleep(0.05)

    def read_into(self, handle: int, view: memoryview, offset: int) -> int:
        self._limp(handle)
        return super().read_into(handle, view, offset)

    def write_from(self, handle: int, view: memoryview, offset: int) -> int:
        self._limp(handle)
        return super().write_from(handle, view, offset)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A file that is worth trials, and takes no room; skips where there is no direct I/O."""
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 28)
    with open_source(path, direct=True) as source:
        if not source.direct:
            pytest.skip("the temporary directory is on a file system without direct I/O")
    return path


@pytest.mark.parametrize("slow", ["direct I/O", "the page cache"])
def test_the_way_that_is_clearly_slower_is_not_taken(large: Path, slow: str) -> None:
    scratch = memoryview(mmap.mmap(-1, 1 << 20))
    with system.using(Lame(direct=slow == "direct I/O")):
        with open_fastest(large, scratch) as source:
            assert source.direct == (slow == "the page cache")
            assert source.read_into(scratch, 0) == len(scratch)
        assert direct_writes_pay(large.parent, 1 << 40) == (slow == "the page cache")
    assert [path.name for path in large.parent.iterdir()] == ["large"]


def test_small_files_are_not_tried(large: Path) -> None:
    os.truncate(large, (1 << 28) - 1)
    scratch = memoryview(mmap.mmap(-1, 1 << 20))
    with system.using(Census()) as census, open_fastest(large, scratch) as source:
        assert source.direct
        assert direct_writes_pay(large.parent, 1 << 30)
    assert isinstance(census, Census)
    assert not census.reads
    assert not census.writes
