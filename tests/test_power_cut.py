"""The power goes at any moment: the record of a run is cut anywhere, and what was not synced is lost, or part of it."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

import bayling_delta
from bayling_delta import apply, repair, system, verify
from tests.journals import documents_of, have_made_here
from tests.pairs import llama, save
from tests.power import Disk, Recorder, Step, Tree, lay_down, tree_of

Pair = tuple[Path, Path]
SHARD = 40_000
VIEWS: list[Callable[[Disk], Tree]] = [Disk.dropped, Disk.names_ahead, Disk.zeros, Disk.kept]


@dataclass(frozen=True)
class Record:
    """What a run changed in a directory, step by step."""

    root: Path
    before: Tree
    steps: list[Step]

    def states(self) -> Iterator[tuple[Step, Disk]]:
        """What is on the disk, and on its way there, after each step."""
        disk = Disk(self.root, self.before)
        for step in self.steps:
            disk.take(step)
            yield step, disk

    def cuts(self, chances: int = 0) -> Iterator[tuple[Step, Tree]]:
        """What may be left if the power goes after each step, by the ways to lose what was not synced."""
        random = Random(1)
        for step, disk in self.states():
            for tree in (*(view(disk) for view in VIEWS), *(disk.some(random) for _ in range(chances))):
                yield step, tree


def record(root: Path, run: Callable[[], object]) -> Record:
    """Carry out ``run``, which changes ``root`` alone."""
    before, world = tree_of(root), Recorder()
    with system.using(world):
        run()
    return Record(root, before, world.steps)


def below(tree: Tree, name: str) -> Tree:
    """What a directory holds, itself included; empty where there is none."""
    return {path: content for path, content in tree.items() if path.split("/")[0] == name}


@pytest.fixture(autouse=True)
def at_one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have manifests that differ in nothing, not even their time."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    place = tmp_path_factory.mktemp("inputs")
    delta = save(place / "delta", llama(2, 0.01), shards=2)
    (delta / "tokenizer.model").write_bytes(b"\x0a\x00not really")
    return save(place / "base", llama(1), shards=3), delta


@pytest.fixture(scope="module")
def applied(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Record:
    """A run from nothing to ``out``, whose windows together are smaller than any of its files."""
    place = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as then:
        then.setenv("SOURCE_DATE_EPOCH", "1700000000")
        return record(place, lambda: apply(*pair, place / "out", max_shard_size=SHARD, memory_limit=96 << 10))


@pytest.fixture(scope="module")
def whole(applied: Record) -> Tree:
    """``out``, as it is in the end."""
    return below(tree_of(applied.root), "out")


def test_all_that_a_run_leaves_is_synced(applied: Record, whole: Tree) -> None:
    *_, (_, disk) = applied.states()
    assert disk.kept() == {"": None} | whole
    assert below(disk.dropped(), "out") == whole
    assert {step.call for step in applied.steps} > {"create", "write", "sync", "sync directory", "rename", "remove"}


def test_there_is_never_an_output_that_is_not_whole(
    applied: Record, whole: Tree, record_property: Callable[[str, object], None]
) -> None:
    seen = {"nothing": 0, "whole": 0}
    for step, tree in applied.cuts(chances=8):
        out = below(tree, "out")
        assert out in ({}, whole), step
        seen["whole" if out else "nothing"] += 1
    record_property("power cuts", seen)
    assert min(seen.values()) > 10


def test_the_model_shows_a_rename_before_the_sync(tmp_path: Path) -> None:
    """Were a run to rename what it had not synced, there would be outputs of the right names and other bytes."""
    steps = [
        Step("make directory", 1, tmp_path / "new"),
        Step("create", 2, tmp_path / "new" / "file"),
        Step("write", 2, data=b"all of it"),
        Step("rename", path=tmp_path / "new", other=tmp_path / "out"),
        Step("sync directory", path=tmp_path),
    ]
    trees = [tree for _, tree in Record(tmp_path, {"": None}, steps).cuts()]
    assert {tree["out/file"] for tree in trees if "out/file" in tree} == {b"", bytes(9), b"all of it"}
    assert {"out": None} in [below(tree, "out") for tree in trees]


def finished(tree: Tree) -> set[str]:
    """The weight files that the journal calls finished."""
    entries = documents_of(tree.get("out.partial/journal") or b"")[1:]
    return {entry["name"] for entry in entries if entry["finished"] == "file"}


class Writes(system.System):
    """Notes the names of the weight files that are made."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def open_write(self, path: Path, *, direct: bool) -> int:
        if path.suffix == ".safetensors":
            self.names.add(path.name)
        return super().open_write(path, direct=direct)


def assert_taken_up(tree: Tree, whole: Tree, pair: Pair, place: Path) -> None:
    """After a power cut the same command makes the same, and nothing again that is finished."""
    lay_down(tree, place)
    have_made_here(place / "out.partial")
    if "out" in tree:
        verify(place / "out")
        return
    world = Writes()
    with system.using(world):
        apply(*pair, place / "out", max_shard_size=SHARD)
    assert tree_of(place) == {"": None} | whole
    assert not world.names & finished(tree)


@pytest.mark.parametrize("every", [37, pytest.param(1, marks=pytest.mark.long)])
def test_what_is_left_is_taken_up(
    applied: Record,
    whole: Tree,
    pair: Pair,
    tmp_path: Path,
    every: int,
    record_property: Callable[[str, object], None],
) -> None:
    count = 0
    for number, (_, tree) in enumerate(applied.cuts(chances=4)):
        if number % every == 0:
            count += 1
            assert_taken_up(tree, whole, pair, tmp_path / f"cut-{number}")
            shutil.rmtree(tmp_path / f"cut-{number}")
    record_property("power cuts that were gone on from", count)


def test_at_most_the_file_that_it_was_at_is_lost(applied: Record) -> None:
    """When a file is begun, all before it are in the journal, on the disk."""
    begun: list[str] = []
    for step, disk in applied.states():
        if step.call == "create" and step.path.suffix == ".safetensors":
            begun.append(step.path.name)
        tree = disk.dropped()
        if "out" not in tree:
            assert finished(tree) >= set(begun[:-1]), step
            assert {f"out.partial/model/{name}" for name in finished(tree)} <= tree.keys(), step


def test_a_manifest_that_is_recorded_is_whole_or_not_there(tmp_path: Path, pair: Pair) -> None:
    (tmp_path / "place").mkdir()
    written = record(tmp_path / "place", lambda: bayling_delta.record(pair[1], output=tmp_path / "place" / "m.json"))
    whole = (tmp_path / "place" / "m.json").read_bytes()
    seen = [tree.get("m.json") for _, tree in written.cuts(chances=8)]
    assert {content for content in seen if content is not None} == {whole}
    assert None in seen


@pytest.mark.parametrize("name", ["shard", "config.json", "bayling-delta.json", "SHA256SUMS"])
def test_a_repair_leaves_each_file_old_or_right(tmp_path: Path, pair: Pair, name: str) -> None:
    place = tmp_path / "place"
    place.mkdir()
    apply(*pair, place / "out", max_shard_size=SHARD)
    good = below(tree_of(place), "out")
    shards = sorted(path for path in good if path.endswith(".safetensors"))
    spoilt = shards[1] if name == "shard" else f"out/{name}"
    data = bytearray((place / spoilt).read_bytes())
    data[len(data) // 2] ^= 1
    (place / spoilt).write_bytes(data)
    repaired = record(place, lambda: repair(place / "out", base=pair[0], delta=pair[1]))
    assert tree_of(place) == {"": None} | good
    mended = 0
    for step, tree in repaired.cuts(chances=8):
        out = below(tree, "out")
        assert out in (good, good | {spoilt: bytes(data)}), step
        mended += out[spoilt] == good[spoilt]
    assert mended
