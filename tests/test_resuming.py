"""Runs that end before their end, and those that take up what they left."""

import errno
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from bayling_delta import apply, plan_apply, system, verify
from bayling_delta.checkpoint import open_weights
from bayling_delta.errors import BaylingDeltaError, CheckpointError, IntegrityError, OutputError
from bayling_delta.sources import Source, open_source, read_bytes
from bayling_delta.staging import partial_path
from bayling_delta.system import System
from bayling_delta.tensors import TensorRef
from tests.failing import facts
from tests.journals import documents_of, journal_of, signed
from tests.meta import Size, random_model, save_meta
from tests.pairs import assert_same, llama, load, published_sum, save, shuffled

Pair = tuple[Path, Path]
SHARD = 40_000
"""Bytes of tensors in a file, so that the small models become several files."""


class FullAt(System):
    """A disk that has no room for a file of this name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.read_bytes = 0
        self.written: set[str] = set()

    def open_write(self, path: Path, *, direct: bool) -> int:
        if path.name == self.name:
            self.wait_for_the_journal(path.parent)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.written.add(path.name)
        return super().open_write(path, direct=direct)

    def wait_for_the_journal(self, model: Path) -> None:
        """Let the other threads finish what they have of the files before: the journal is synced file by file."""
        before = len(list(model.iterdir()))
        deadline = time.monotonic() + 2  # one thread alone cannot wait for itself
        while time.monotonic() < deadline:
            if (model.parent / "journal").read_bytes().count(b' {"finished":"file"') == before:
                return
            time.sleep(0.002)

    def read_into(self, handle: int, view: memoryview, offset: int) -> int:
        count = super().read_into(handle, view, offset)
        self.read_bytes += count
        return count


def names_of(pair: Pair, out: Path, **options: Any) -> list[str]:
    return [file.name for file in plan_apply(*pair, out, max_shard_size=SHARD, **options).files]


def end_before(place: int, pair: Pair, out: Path, **options: Any) -> BaylingDeltaError:
    """Have a run end before the file of this number is begun."""
    name = names_of(pair, out, **options)[place]
    with system.using(FullAt(name)), pytest.raises(OutputError, match="No space left") as ended:
        apply(*pair, out, max_shard_size=SHARD, **options)
    assert not out.exists()
    return ended.value


def in_order(place: Path) -> Pair:
    return save(place / "base", llama(1), shards=3), save(place / "delta", llama(2, 0.01), shards=2)


def out_of_order(place: Path) -> Pair:
    base = llama(1)
    return save(place / "base", base, shards=3, order=shuffled(base)), save(place / "delta", llama(2, 0.01), shards=2)


def listed(place: Path) -> Pair:
    """An out-of-order base with a list of digests beside it, for which it is read once more."""
    base, delta = out_of_order(place)
    names = sorted(path.name for path in base.glob("*.bin"))
    sums = subprocess.run(["sha256sum", *names], cwd=base, check=True, capture_output=True, text=True).stdout
    (base / "SHA256SUMS").write_text(sums)
    md5 = subprocess.run(["md5sum", *names], cwd=base, check=True, capture_output=True, text=True).stdout
    (base / "checklist.chk").write_text(md5)
    return base, delta


def from_safetensors(place: Path) -> Pair:
    return save(place / "base", llama(1), container="safetensors"), save(place / "delta", llama(2, 0.01), shards=4)


KINDS = [in_order, out_of_order, listed, from_safetensors]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return in_order(tmp_path)


# the same comes out


@pytest.mark.parametrize("make", KINDS)
def test_a_run_that_is_taken_up_makes_the_same(tmp_path: Path, make: Callable[[Path], Pair]) -> None:
    pair = make(tmp_path)
    apply(*pair, tmp_path / "whole", max_shard_size=SHARD)
    count = len(names_of(pair, tmp_path / "out"))
    assert count > 3
    for place in range(1, count):
        out = tmp_path / f"out-{place}"
        ended = end_before(place, pair, out)
        assert ended.hint == (
            f"{place} of {count} weight files are finished, in {partial_path(out)}: run the command again to go on"
        )
        kept = {path.name: path.stat() for path in (partial_path(out) / "model").iterdir()}
        assert len(kept) == place
        told: list[str] = []
        world = FullAt("")
        with system.using(world):
            apply(*pair, out, max_shard_size=SHARD, tell=told.append)
        assert any(f"{place} of {count} weight files were finished by an earlier run" in text for text in told)
        assert not world.written & kept.keys()
        assert {name: (out / name).stat().st_mtime_ns for name in kept} == {
            name: status.st_mtime_ns for name, status in kept.items()
        }
        assert facts(out) == facts(tmp_path / "whole")
        assert_same(load(out), published_sum(llama(1), llama(2, 0.01)))
        assert not partial_path(out).exists()
        verify(out)


def test_a_run_on_meta_parts_is_taken_up(tmp_path: Path) -> None:
    size = Size()
    base = save_meta(tmp_path / "base", random_model(size), size, parts=2)
    delta = save(tmp_path / "delta", llama(2, 0.01, rotary=False), config=size.config)
    apply(base, delta, tmp_path / "whole", max_shard_size=SHARD)
    end_before(2, (base, delta), tmp_path / "out")
    apply(base, delta, tmp_path / "out", max_shard_size=SHARD)
    assert facts(tmp_path / "out") == facts(tmp_path / "whole")


def test_a_run_ends_twice(tmp_path: Path, pair: Pair) -> None:
    apply(*pair, tmp_path / "whole", max_shard_size=SHARD)
    end_before(1, pair, tmp_path / "out")
    end_before(3, pair, tmp_path / "out")
    end_before(3, pair, tmp_path / "out")  # nothing new is finished, and nothing is lost
    apply(*pair, tmp_path / "out", max_shard_size=SHARD)
    assert facts(tmp_path / "out") == facts(tmp_path / "whole")


def test_inputs_that_were_read_to_their_end_and_are_done_with_are_not_read_again(tmp_path: Path, pair: Pair) -> None:
    names = names_of(pair, tmp_path / "out")
    whole = FullAt("")
    with system.using(whole):
        apply(*pair, tmp_path / "whole", max_shard_size=SHARD)
    end_before(len(names) - 1, pair, tmp_path / "out")
    rest = FullAt("")
    with system.using(rest):
        apply(*pair, tmp_path / "out", max_shard_size=SHARD)
    finished = sum((tmp_path / "out" / name).stat().st_size for name in names[:-1])
    inputs = sum(path.stat().st_size for side in pair for path in side.glob("*.bin"))
    assert rest.read_bytes - finished < whole.read_bytes - inputs / 3


def test_a_result_that_only_lacks_its_name_is_not_made_again(tmp_path: Path, pair: Pair) -> None:
    with pytest.raises(IntegrityError, match="expected was") as ended:
        apply(*pair, tmp_path / "out", max_shard_size=SHARD, expect="0" * 64)
    count = len(names_of(pair, tmp_path / "out"))
    assert ended.value.hint is not None
    assert f"{count} of {count} weight files" in ended.value.hint
    world = FullAt("")
    with system.using(world):
        apply(*pair, tmp_path / "out", max_shard_size=SHARD)
    assert not [name for name in world.written if name.startswith("model") and name.endswith(".safetensors")]
    assert_same(load(tmp_path / "out"), published_sum(llama(1), llama(2, 0.01)))


def test_start_over(tmp_path: Path, pair: Pair) -> None:
    end_before(2, pair, tmp_path / "out")
    world = FullAt("")
    with system.using(world):
        apply(*pair, tmp_path / "out", max_shard_size=SHARD, resume=False)
    assert set(names_of(pair, tmp_path / "other")) <= world.written


# what must be as it was


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


CHANGES: list[tuple[str, Callable[[Path], None], dict[str, Any], str]] = [
    ("another base", lambda place: touch(place / "base" / "pytorch_model-00002-of-00003.bin"), {},
        "the base has changed: pytorch_model-00002-of-00003.bin"),
    ("another delta", lambda place: touch(place / "delta" / "pytorch_model-00001-of-00002.bin"), {},
        "the delta has changed: pytorch_model-00001-of-00002.bin"),
    ("other shards", lambda _: None, {"max_shard_size": 2 * SHARD}, "the result's files are others now"),
    ("another dtype", lambda _: None, {"dtype": "F32"}, "the result's files are others now"),
    ("another recipe", lambda _: None, {"recipe": "vicuna-v0", "allow": ["vocabulary"]},
        "the recipe was plain, and is vicuna-v0"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "options", "words"), [row[1:] for row in CHANGES], ids=[row[0] for row in CHANGES])
def test_a_change_is_told_and_nothing_is_lost(
    tmp_path: Path, pair: Pair, change: Callable[[Path], None], options: dict[str, Any], words: str
) -> None:
    end_before(2, pair, tmp_path / "out")
    partial = partial_path(tmp_path / "out")
    before = {path: path.read_bytes() for path in partial.rglob("*") if path.is_file() and path.name != "lock"}
    change(tmp_path)
    with pytest.raises(OutputError) as refused:
        apply(*pair, tmp_path / "out", **({"max_shard_size": SHARD} | options))
    (problem,) = refused.value.problems
    assert problem.kind == "unfinished"
    assert problem.where == str(partial)
    assert words in problem.message
    assert "--no-resume starts over" in problem.message
    assert refused.value.hint is None  # as the same command would end in the same way
    assert {path: path.read_bytes() for path in before} == before
    apply(*pair, tmp_path / "out", **({"max_shard_size": SHARD} | options), resume=False)


def test_options_that_decide_no_bytes_may_change(tmp_path: Path, pair: Pair) -> None:
    apply(*pair, tmp_path / "whole", max_shard_size=SHARD)
    end_before(2, pair, tmp_path / "out", threads=1, memory_limit=1 << 18)
    apply(*pair, tmp_path / "out", max_shard_size=SHARD, direct=False)
    assert facts(tmp_path / "out") == facts(tmp_path / "whole")


# what is not trusted


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "spoil",
    [lambda path: flip(path, -1), lambda path: flip(path, 20), lambda path: flip(path, 0), cut, Path.unlink],
    ids=["tensor", "header", "length", "short", "absent"],
)
def test_a_finished_file_that_is_not_as_it_was_is_made_again(
    tmp_path: Path, pair: Pair, spoil: Callable[[Path], None]
) -> None:
    apply(*pair, tmp_path / "whole", max_shard_size=SHARD)
    end_before(3, pair, tmp_path / "out")
    name = names_of(pair, tmp_path / "other")[1]
    spoil(partial_path(tmp_path / "out") / "model" / name)
    world = FullAt("")
    with system.using(world):
        apply(*pair, tmp_path / "out", max_shard_size=SHARD)
    assert name in world.written
    assert names_of(pair, tmp_path / "other")[0] not in world.written
    assert facts(tmp_path / "out") == facts(tmp_path / "whole")
    verify(tmp_path / "out")


@pytest.mark.parametrize("name", ["../../victim", "/etc/passwd", "lock", "model.safetensors", "", 7, None])
def test_a_journal_is_read_as_if_anybody_had_written_it(tmp_path: Path, pair: Pair, name: object) -> None:
    apply(*pair, tmp_path / "whole", max_shard_size=SHARD)
    end_before(2, pair, tmp_path / "out")
    journal = partial_path(tmp_path / "out") / "journal"
    head, *entries = documents_of(journal.read_bytes())
    entry = next(entry for entry in entries if entry["finished"] == "file") | {"name": name}
    journal.write_bytes(journal_of([head, entry, *entries]))
    (tmp_path / "victim").write_text("mine")
    apply(*pair, tmp_path / "out", max_shard_size=SHARD)
    assert (tmp_path / "victim").read_text() == "mine"
    assert facts(tmp_path / "out") == facts(tmp_path / "whole")


@pytest.mark.parametrize("role", ["result", None, [], {"base": 1}])
def test_a_journal_with_a_role_that_is_none(tmp_path: Path, pair: Pair, role: object) -> None:
    apply(*pair, tmp_path / "whole", max_shard_size=SHARD)
    end_before(2, pair, tmp_path / "out")
    entry = {"finished": "input", "role": role, "name": "a.bin", "sha256": "0" * 64, "md5": None, "parts": {}}
    with (partial_path(tmp_path / "out") / "journal").open("ab") as journal:
        journal.write(journal_of([entry]))
    apply(*pair, tmp_path / "out", max_shard_size=SHARD)
    assert facts(tmp_path / "out") == facts(tmp_path / "whole")


def test_digests_in_a_journal_are_not_believed(tmp_path: Path, pair: Pair) -> None:
    """Those of tensors, which no file's digest would contradict."""
    apply(*pair, tmp_path / "whole", max_shard_size=SHARD)
    end_before(2, pair, tmp_path / "out")
    journal = partial_path(tmp_path / "out") / "journal"
    lines = documents_of(journal.read_bytes())
    entry = next(line for line in lines if line.get("finished") == "file")
    entry["tensors"][next(iter(entry["tensors"]))] = "0" * 64
    journal.write_bytes(journal_of(lines))
    apply(*pair, tmp_path / "out", max_shard_size=SHARD)
    assert facts(tmp_path / "out") == facts(tmp_path / "whole")


def test_a_bit_of_a_journal_that_is_wrong_is_noticed(tmp_path: Path, pair: Pair) -> None:
    """Also in what nothing on the disk could be held against, as an input's digest: it would be in the manifest."""
    apply(*pair, tmp_path / "whole", max_shard_size=SHARD)
    end_before(5, pair, tmp_path / "out")
    journal = partial_path(tmp_path / "out") / "journal"
    data = journal.read_bytes()
    (entry, *_) = [entry for entry in documents_of(data) if entry.get("finished") == "input"]
    flip(journal, data.index(entry["sha256"].encode()) + 7)
    apply(*pair, tmp_path / "out", max_shard_size=SHARD)
    assert facts(tmp_path / "out") == facts(tmp_path / "whole")


def test_an_unfinished_output_that_comes_from_elsewhere_is_made_again(tmp_path: Path, pair: Pair) -> None:
    """An archive of inputs may have one beside them, with another's weights and a journal that calls them right."""
    apply(*pair, tmp_path / "whole", max_shard_size=SHARD)
    end_before(5, pair, tmp_path / "out")
    partial = partial_path(tmp_path / "out")
    shard = sorted((partial / "model").iterdir())[1]
    flip(shard, -1)
    _, _, refs = open_weights(shard)
    with open_source(shard) as source:
        tensors = {name: elements_digest_of(source, ref) for name, ref in refs.items()}
    lines = documents_of((partial / "journal").read_bytes())
    for entry in lines[1:]:
        if entry["name"] == shard.name:
            entry |= {"sha256": hashlib.sha256(shard.read_bytes()).hexdigest(), "tensors": tensors}
        if entry["finished"] == "input":
            entry |= {"sha256": "a" * 64, "changed_ns": entry["changed_ns"] + 1}
    lines[0]["inputs"] = {role: dict.fromkeys(files) for role, files in lines[0]["inputs"].items()}
    (partial / "journal").write_bytes(journal_of(lines))
    told: list[str] = []
    apply(*pair, tmp_path / "out", max_shard_size=SHARD, tell=told.append)
    assert [text for text in told if f"is not as it was, and is made again: {shard.name}" in text]
    assert facts(tmp_path / "out") == facts(tmp_path / "whole")
    verify(tmp_path / "out", base=pair[0], delta=pair[1])


def elements_digest_of(source: Source, ref: TensorRef) -> str:
    return hashlib.sha256(read_bytes(source, ref.views[0].offset, ref.nbytes)).hexdigest()


def test_a_copy_of_an_unfinished_output_is_made_again(tmp_path: Path, pair: Pair) -> None:
    apply(*pair, tmp_path / "whole", max_shard_size=SHARD)
    end_before(3, pair, tmp_path / "out")
    partial = partial_path(tmp_path / "out")
    shutil.copytree(partial, tmp_path / "copy")
    shutil.rmtree(partial)
    (tmp_path / "copy").rename(partial)
    world = FullAt("")
    with system.using(world):
        apply(*pair, tmp_path / "out", max_shard_size=SHARD)
    assert set(names_of(pair, tmp_path / "other")) <= world.written
    assert facts(tmp_path / "out") == facts(tmp_path / "whole")


def test_a_finished_file_that_cannot_be_read_is_made_again(tmp_path: Path, pair: Pair) -> None:
    end_before(3, pair, tmp_path / "out")
    bad = partial_path(tmp_path / "out") / "model" / names_of(pair, tmp_path / "other")[1]

    class BadSector(FullAt):
        def read_into(self, handle: int, view: memoryview, offset: int) -> int:
            if offset and os.fstat(handle).st_ino == inode:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().read_into(handle, view, offset)

    inode = bad.stat().st_ino
    world = BadSector("")
    with system.using(world):
        apply(*pair, tmp_path / "out", max_shard_size=SHARD)
    assert bad.name in world.written
    verify(tmp_path / "out")


def test_a_finished_file_that_has_become_huge_is_not_read(tmp_path: Path, pair: Pair) -> None:
    end_before(3, pair, tmp_path / "out")
    os.truncate(partial_path(tmp_path / "out") / "model" / names_of(pair, tmp_path / "other")[1], 1 << 40)
    apply(*pair, tmp_path / "out", max_shard_size=SHARD)
    verify(tmp_path / "out")


@pytest.mark.parametrize("size", [-1, -30, -400])
def test_a_journal_that_was_cut_short(tmp_path: Path, pair: Pair, size: int) -> None:
    end_before(3, pair, tmp_path / "out")
    journal = partial_path(tmp_path / "out") / "journal"
    journal.write_bytes(journal.read_bytes()[:size])
    apply(*pair, tmp_path / "out", max_shard_size=SHARD)
    assert_same(load(tmp_path / "out"), published_sum(llama(1), llama(2, 0.01)))


@pytest.mark.parametrize(
    "text",
    [b"", b"{", signed(b"[]"), signed(b'{"schema": 1, "schema": 2}'), bytes(5000) + b"\n", signed(b"{}"), b"{}\n"],
)
def test_a_journal_without_a_head_is_refused(tmp_path: Path, pair: Pair, text: bytes) -> None:
    end_before(2, pair, tmp_path / "out")
    (partial_path(tmp_path / "out") / "journal").write_bytes(text)
    with pytest.raises(OutputError, match="--no-resume starts over") as refused:
        apply(*pair, tmp_path / "out", max_shard_size=SHARD)
    assert [problem.kind for problem in refused.value.problems] == ["unfinished"]
    apply(*pair, tmp_path / "out", max_shard_size=SHARD, resume=False)


@pytest.mark.parametrize(
    "what",
    ["link to a directory", "link in it", "directory in it", "pipe in it", "no lock", "lock elsewhere", "another's"],
)
def test_a_directory_that_is_not_ours_is_neither_taken_up_nor_removed(tmp_path: Path, pair: Pair, what: str) -> None:
    partial = partial_path(tmp_path / "out")
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "mine").write_text("mine")
    if what == "link to a directory":
        partial.symlink_to("victim")
    else:
        (partial / "model").mkdir(parents=True)
        (partial / "lock").touch()
        name = "model.safetensors"
        if what == "link in it":
            (partial / "model" / name).symlink_to(tmp_path / "victim" / "mine")
        elif what == "directory in it":
            (partial / "model" / name).mkdir()
        elif what == "pipe in it":
            os.mkfifo(partial / "model" / name)
        elif what == "lock elsewhere":
            (partial / "lock").unlink()
            os.link(tmp_path / "victim" / "mine", partial / "lock")
        elif what == "another's":
            if os.geteuid():
                pytest.skip("only root can give a file away")
            os.chown(partial / "lock", 12345, 12345)
        else:
            (partial / "lock").unlink()
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    for resume in (True, False):
        with pytest.raises(OutputError, match="is not an unfinished output of this program"):
            apply(*pair, tmp_path / "out", resume=resume)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    assert (tmp_path / "victim" / "mine").read_text() == "mine"


def test_a_dry_run_says_what_is_finished(tmp_path: Path, pair: Pair) -> None:
    end_before(2, pair, tmp_path / "out")
    partial = partial_path(tmp_path / "out")
    before = sorted((path, path.stat().st_mtime_ns) for path in partial.rglob("*"))
    count = len(names_of(pair, tmp_path / "other"))
    notes = plan_apply(*pair, tmp_path / "out", max_shard_size=SHARD).notes
    assert [note for note in notes if f"2 of {count} weight files were finished by an earlier run" in note]
    with pytest.raises(OutputError, match="was begun otherwise, and cannot be gone on with"):
        plan_apply(*pair, tmp_path / "out")
    assert not [note for note in plan_apply(*pair, tmp_path / "out", resume=False).notes if "earlier run" in note]
    assert sorted((path, path.stat().st_mtime_ns) for path in partial.rglob("*")) == before


def test_who_must_change_something_is_not_told_to_run_the_same_again(tmp_path: Path, pair: Pair) -> None:
    with pytest.raises(IntegrityError) as ended:
        apply(*pair, tmp_path / "out", max_shard_size=SHARD, expect="0" * 64)
    assert ended.value.hint is not None
    assert ended.value.hint.endswith("; the next run takes them up")


class OfAnother(System):
    """A disk that gives files an owner of its own, as memory sticks and some network disks do."""

    def stat(self, path: Path) -> os.stat_result:
        fields = list(super().stat(path))
        fields[stat.ST_UID] += 1
        return os.stat_result(fields)


def test_a_disk_that_gives_files_another_owner(tmp_path: Path, pair: Pair) -> None:
    with system.using(OfAnother()):
        apply(*pair, tmp_path / "out", max_shard_size=SHARD)
        verify(tmp_path / "out")
    assert not partial_path(tmp_path / "out").exists()
    end_before(2, pair, tmp_path / "other")
    with system.using(OfAnother()), pytest.raises(OutputError, match="of this program for this user"):
        apply(*pair, tmp_path / "other", max_shard_size=SHARD)
    assert (partial_path(tmp_path / "other") / "journal").exists()


def test_a_disk_that_keeps_no_times_loses_what_was_finished_and_nothing_else(tmp_path: Path, pair: Pair) -> None:
    class Timeless(FullAt):
        def stat(self, path: Path) -> os.stat_result:
            found = super().stat(path)
            fields = {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}
            return os.stat_result(tuple(found), fields | {"st_ctime_ns": 0})

    end_before(2, pair, tmp_path / "out")
    partial = partial_path(tmp_path / "out")
    lines = documents_of((partial / "journal").read_bytes())
    for entry in lines[1:]:
        entry["changed_ns"] = 0
    (partial / "journal").write_bytes(journal_of(lines))
    world = Timeless("")
    with system.using(world):
        apply(*pair, tmp_path / "out", max_shard_size=SHARD)
    assert set(names_of(pair, tmp_path / "other")) <= world.written
    verify(tmp_path / "out")


def test_an_input_where_the_output_grows_is_not_removed(tmp_path: Path, pair: Pair) -> None:
    partial = partial_path(tmp_path / "out")
    partial.mkdir()
    (partial / "lock").touch()
    shutil.copytree(pair[0], partial / "model")
    before = {path.name: path.read_bytes() for path in (partial / "model").iterdir()}
    for resume in (True, False):
        with pytest.raises(OutputError, match="where the output grows and which is emptied"):
            apply(partial / "model", pair[1], tmp_path / "out", resume=resume)
    assert {path.name: path.read_bytes() for path in (partial / "model").iterdir()} == before


def test_an_output_that_another_run_finished_meanwhile_is_not_made_again(tmp_path: Path, pair: Pair) -> None:
    """A run that waited, or planned for long, begins when the other has just ended."""

    class Late(FullAt):
        def lock(self, handle: int) -> bool:
            (tmp_path / "out").mkdir(exist_ok=True)
            return super().lock(handle)

    world = Late("")
    with system.using(world), pytest.raises(OutputError, match="appeared meanwhile; nothing was replaced"):
        apply(*pair, tmp_path / "out")
    assert world.written == {"lock"}
    assert not partial_path(tmp_path / "out").exists()


def test_a_run_that_only_looks_does_not_keep_another_from_beginning(tmp_path: Path, pair: Pair) -> None:
    """A dry run takes the lock for a moment, to see whether anybody has it."""

    class Looked(System):
        tries = 0

        def lock(self, handle: int) -> bool:
            self.tries += 1
            return self.tries > 2 and super().lock(handle)

    with system.using(Looked()):
        apply(*pair, tmp_path / "out")
    verify(tmp_path / "out")


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path: Path, pair: Pair, code: int) -> None:
    class Lockless(System):
        def lock(self, handle: int) -> bool:  # noqa: ARG002
            raise OSError(code, os.strerror(code))

    with system.using(Lockless()), pytest.raises(OutputError, match="is on a file system without locks"):
        apply(*pair, tmp_path / "out")
    assert not partial_path(tmp_path / "out").exists()


# inputs that prove to be wrong


def test_what_was_made_from_a_damaged_file_is_dropped_and_the_rest_is_kept(tmp_path: Path, pair: Pair) -> None:
    """The last shard of the base has one wrong bit; when it has been fetched again, only its part is made again."""
    good = tmp_path / "good"
    good.mkdir()
    apply(*pair, good / "out", max_shard_size=SHARD)
    last = pair[0] / "pytorch_model-00003-of-00003.bin"
    data = last.read_bytes()
    place = data.index(llama(1)["lm_head.weight"].numpy().tobytes()) + 5
    flip(last, place)
    with pytest.raises(IntegrityError, match="CRC-32") as ended:
        apply(*pair, tmp_path / "out", max_shard_size=SHARD)
    assert ended.value.hint is not None
    kept = {path.name for path in (partial_path(tmp_path / "out") / "model").iterdir()}
    assert kept
    spoilt = {
        file.name
        for file in plan_apply(*pair, tmp_path / "other", max_shard_size=SHARD).files
        for tensor in file.tensors
        if tensor.base is not None and tensor.base.views[0].file == last
    }
    assert not kept & spoilt
    last.write_bytes(data)
    world = FullAt("")
    with system.using(world):
        apply(*pair, tmp_path / "out", max_shard_size=SHARD)
    assert not world.written & kept
    assert facts(tmp_path / "out") == facts(good / "out")


def test_an_input_that_was_digested_and_has_changed_unseen_is_noticed(tmp_path: Path) -> None:
    """Where something is still to be made of it, it is read again."""
    pair = (
        save(tmp_path / "base", llama(1), container="safetensors"),
        save(tmp_path / "delta", llama(2, 0.01), container="safetensors"),
    )
    with pytest.raises(IntegrityError):
        apply(*pair, tmp_path / "out", max_shard_size=SHARD, expect="0" * 64)
    name = names_of(pair, tmp_path / "other")[0]
    (partial_path(tmp_path / "out") / "model" / name).unlink()
    file = pair[0] / "model.safetensors"
    status = file.stat()
    flip(file, -1)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        apply(*pair, tmp_path / "out", max_shard_size=SHARD)
    assert not (tmp_path / "out").exists()


# dying at any moment

DYING = """
import hashlib, json, os, signal, sys
from pathlib import Path
from bayling_delta import apply, system
from bayling_delta.errors import BaylingDeltaError
import bayling_delta.resuming, bayling_delta.hub, huggingface_hub, numkong  # once, before the forks

CHANGES = ("open_write open_update write_from preallocate truncate sync sync_directory close make_directory "
           "remove_file remove_directory rename_new replace").split()

class Dying(system.System):
    def __init__(self, number):
        self.left = number
        for name in CHANGES:
            setattr(self, name, self.counted(getattr(super(), name)))

    def counted(self, call):
        def counting(*arguments, **options):
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)
        return counting

base, delta, place = map(Path, sys.argv[1:4])

def run(number, out):
    child = os.fork()
    if not child:
        with system.using(Dying(number)):
            apply(base, delta, out, max_shard_size=90_000, memory_limit=1 << 20)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def finished(out):
    # the weight files that the journal calls finished, and which they are on the disk; no more than one other was begun
    partial = out.with_name(out.name + ".partial")
    journal = partial / "journal"
    lines = journal.read_bytes().split(b"\\n")[1:-1] if journal.exists() else []  # the last may be cut short
    entries = [json.loads(line.partition(b" ")[2]) for line in lines]
    names = {entry["name"] for entry in entries if entry["finished"] == "file"}
    begun = {path.name: path.stat().st_ino for path in partial.glob("model/model*.safetensors")}
    assert len(begun.keys() - names) <= 1, (begun, names)
    return {name: number for name, number in begun.items() if name in names}

def state(out):
    manifest = json.loads((out / "bayling-delta.json").read_text())
    for line in (out / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest, name
    del manifest["created"]
    return manifest

run(0, place / "whole")
wanted = state(place / "whole")
number, step = int(sys.argv[4]), int(sys.argv[5])
deaths = 0
while True:
    out = place / f"out-{number}"
    code = run(number, out)
    if out.exists():
        assert state(out) == wanted
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    deaths += 1
    kept = finished(out)
    if out.exists():
        try:
            apply(base, delta, out)
        except BaylingDeltaError:
            pass
    else:
        if number % 3 == 0:
            run(1 + number % 11, out)  # it dies once more, soon
        if not out.exists():
            assert run(0, out) == 0
    assert state(out) == wanted
    assert kept.items() <= {path.name: path.stat().st_ino for path in out.iterdir()}.items(), kept
    assert [path.name for path in place.iterdir() if path.name.startswith(out.name)] == [out.name]
    number += step
print(deaths)
"""
"""A run dies at its n-th change of the disk, for every n until one needs no more; it is taken up, and may die again."""


@pytest.mark.parametrize(
    ("make", "first", "step"),
    [
        (in_order, 1, 2),
        (in_order, 2, 2),  # apart, for two processors
        pytest.param(listed, 1, 1, marks=pytest.mark.long),
        pytest.param(from_safetensors, 1, 1, marks=pytest.mark.long),
    ],
)
def test_a_run_dies_at_every_change_of_the_disk(
    tmp_path: Path,
    make: Callable[[Path], Pair],
    first: int,
    step: int,
    record_property: Callable[[str, object], None],
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DYING, *map(str, make(tmp_path)), str(tmp_path), str(first), str(step)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record_property("died", int(done.stdout))
    assert int(done.stdout) * step > 50


@pytest.mark.long
def test_200_runs_are_killed_at_random_moments(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """The program itself, with kill -9, most often while it writes; a second run, or a third, ends the work."""
    pair = in_order(tmp_path)
    inputs = ("--base", str(pair[0]), "--delta", str(pair[1]), "--max-shard-size", "9kB", "--quiet")

    def start(out: Path) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "bayling_delta", "apply", *inputs, "--out", str(out)]
        return subprocess.Popen(words, stderr=subprocess.DEVNULL)

    def begun(out: Path, process: subprocess.Popen[bytes]) -> float:
        """When it begins to write; before that it loads itself, and reads headers."""
        lock = partial_path(out) / "lock"
        while process.poll() is None and not (lock.exists() and f'"pid": {process.pid},' in lock.read_text()):
            time.sleep(0.001)
        return time.monotonic()

    first = start(tmp_path / "whole")
    began = begun(tmp_path / "whole", first)
    assert first.wait() == 0
    usual = time.monotonic() - began
    random = Random(7)
    killed = resumed = 0
    for number in range(200):
        out = tmp_path / f"out-{number}"
        for _ in range(2):
            process = start(out)
            if number % 8:  # the others die before anything is written
                begun(out, process)
                time.sleep(random.uniform(0, 0.9 * usual))
            else:
                time.sleep(random.uniform(0, 0.5))
            process.kill()
            killed += process.wait() != 0
            if out.exists():
                break
            resumed += bool(list(partial_path(out).glob("model/*")))
        if not out.exists():
            assert start(out).wait() == 0
        verify(out)
        assert facts(out) == facts(tmp_path / "whole")
        if partial_path(out).exists():  # killed between the last two steps
            assert not (partial_path(out) / "model").exists()
        shutil.rmtree(out)
    record_property("killed", killed)
    record_property("left something to go on with", resumed)
    assert killed >= 200
    assert resumed >= 100, resumed


def test_what_was_left_when_only_the_last_step_was_missing_is_removed(tmp_path: Path, pair: Pair) -> None:
    apply(*pair, tmp_path / "out")
    partial = partial_path(tmp_path / "out")
    partial.mkdir()
    (partial / "lock").touch()
    (partial / "journal").write_text("{}\n")
    with pytest.raises(OutputError, match="nothing is replaced"):
        apply(*pair, tmp_path / "out")
    assert not partial.exists()


def test_a_lock_that_a_dead_run_left_does_not_block(tmp_path: Path, pair: Pair) -> None:
    partial = partial_path(tmp_path / "out")
    partial.mkdir()
    (partial / "lock").write_text('{"pid": 1, "started": "2026-01-01T00:00:00+00:00"}')
    apply(*pair, tmp_path / "out")
    assert not partial.exists()


@pytest.mark.parametrize("text", ["", "[" * 4000, '{"pid": 1e999, "started": ""}', '{"pid": NaN, "started": ""}'])
def test_a_lock_that_does_not_say_whose_it_is_holds_all_the_same(tmp_path: Path, pair: Pair, text: str) -> None:
    lock = partial_path(tmp_path / "out") / "lock"
    lock.parent.mkdir()
    lock.write_text(text)
    handle = system.calls.open_update(lock)
    assert system.calls.lock(handle)
    with pytest.raises(OutputError, match="is being written by another run; wait for it"):
        apply(*pair, tmp_path / "out")
    system.calls.close(handle)
    apply(*pair, tmp_path / "out")


def test_float32_is_taken_up_too(tmp_path: Path) -> None:
    pair = (
        save(tmp_path / "base", llama(1, dtype=torch.float32)),
        save(tmp_path / "delta", llama(2, 0.01, dtype=torch.float32)),
    )
    apply(*pair, tmp_path / "whole", max_shard_size=SHARD, dtype="BF16")
    end_before(2, pair, tmp_path / "out", dtype="BF16")
    apply(*pair, tmp_path / "out", max_shard_size=SHARD, dtype="BF16")
    assert facts(tmp_path / "out") == facts(tmp_path / "whole")
