"""Damaged models, made anew where they are damaged and nowhere else."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bayling_delta import apply, repair, system, verify
from bayling_delta.errors import (
    BaylingDeltaError,
    CheckpointError,
    IntegrityError,
    MismatchError,
    NoRecordError,
    OutputError,
)
from bayling_delta.staging import partial_path
from bayling_delta.system import System
from tests.pairs import CONFIG, llama, save

SHARD = 40_000


class Census(System):
    """Counts what is read of each file, and notes what is put in place of what."""

    def __init__(self) -> None:
        self.read: dict[str, int] = {}
        self.replaced: list[str] = []
        self._paths: dict[int, Path] = {}

    def open_read(self, path: Path, *, direct: bool) -> int:
        handle = super().open_read(path, direct=direct)
        self._paths[handle] = path
        return handle

    def read_into(self, handle: int, view: memoryview, offset: int) -> int:
        count = super().read_into(handle, view, offset)
        name = str(self._paths[handle])
        self.read[name] = self.read.get(name, 0) + count
        return count

    def replace(self, old: Path, new: Path) -> None:
        self.replaced.append(new.name)
        super().replace(old, new)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, a delta with a tokenizer, and their sum in several files, made some years ago."""
    save(tmp_path / "base", llama(1), shards=3)
    delta = save(tmp_path / "delta", llama(2, 0.01), shards=2)
    (delta / "tokenizer.model").write_bytes(b"\x0a\x00not really")
    (delta / "generation_config.json").write_text('{"bos_token_id": 1}')
    with monkeypatch.context() as then:
        then.setenv("SOURCE_DATE_EPOCH", "1700000000")
        apply(tmp_path / "base", delta, tmp_path / "model", max_shard_size=SHARD)
    return tmp_path


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def mend(place: Path, **options: Any) -> dict[str, Any]:
    return repair(place / "model", base=place / "base", delta=place / "delta", **options)


def flip(path: Path, offset: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def shard(model: Path, number: int) -> Path:
    return sorted(model.glob("model-*.safetensors"))[number]


WRONG: list[tuple[str, Callable[[Path], Path]]] = [
    ("a tensor", lambda model: changed(shard(model, 1))),
    ("a header", lambda model: changed(shard(model, 2), 30)),
    ("a length", lambda model: changed(shard(model, 0), 0)),
    ("cut off", lambda model: cut(shard(model, 1))),
    ("longer", lambda model: longer(shard(model, 1))),
    ("no weights", lambda model: absent(shard(model, 3))),
    ("empty", lambda model: emptied(shard(model, 3))),
    ("index", lambda model: changed(model / "model.safetensors.index.json", 40)),
    ("no index", lambda model: absent(model / "model.safetensors.index.json")),
    ("configuration", lambda model: changed(model / "config.json", 10)),
    ("tokenizer", lambda model: changed(model / "tokenizer.model")),
    ("card", lambda model: absent(model / "README.md")),
    ("list", lambda model: changed(model / "SHA256SUMS", 3)),
    ("no list", lambda model: absent(model / "SHA256SUMS")),
]


def changed(path: Path, offset: int = -1) -> Path:
    flip(path, offset)
    return path


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-100])
    return path


def longer(path: Path) -> Path:
    path.write_bytes(path.read_bytes() + b"\0")
    return path


def absent(path: Path) -> Path:
    path.unlink()
    return path


def emptied(path: Path) -> Path:
    path.write_bytes(b"")
    return path


@pytest.mark.parametrize("spoil", [row[1] for row in WRONG], ids=[row[0] for row in WRONG])
def test_what_is_damaged_is_made_anew(place: Path, spoil: Callable[[Path], Path]) -> None:
    good = contents(place / "model")
    times = {path.name: path.stat().st_mtime_ns for path in (place / "model").iterdir()}
    spoilt = spoil(place / "model")
    if spoilt.name != "SHA256SUMS" or spoilt.exists():  # a model without that list is as good as its manifest
        with pytest.raises(BaylingDeltaError):
            verify(place / "model")
    world = Census()
    with system.using(world):
        document = mend(place)
    assert document["repaired"] == [spoilt.name]
    assert world.replaced == [spoilt.name]
    assert contents(place / "model") == good
    for path in (place / "model").iterdir():
        assert path == spoilt or path.stat().st_mtime_ns == times[path.name]
    assert not partial_path(place / "model").exists()
    assert document["weights_digest"] == verify(place / "model")["weights_digest"]


def test_several_at_once(place: Path) -> None:
    good = contents(place / "model")
    spoilt = [
        changed(shard(place / "model", 0)),
        absent(shard(place / "model", 2)),
        changed(place / "model/config.json", 9),
    ]
    assert set(mend(place)["repaired"]) == {path.name for path in spoilt}
    assert contents(place / "model") == good


def test_a_sound_model_is_left_alone(place: Path) -> None:
    world = Census()
    with system.using(world):
        document = mend(place)
    assert document["repaired"] == []
    assert world.replaced == []
    assert not any("base" in name for name in world.read), "nothing of the inputs is needed"


def test_no_more_of_the_inputs_is_read_than_is_needed(place: Path) -> None:
    flip(shard(place / "model", 0))
    mending, making = Census(), Census()
    with system.using(mending):
        mend(place)
    with system.using(making):
        apply(place / "base", place / "delta", place / "again", max_shard_size=SHARD)
    last = place / "base" / "pytorch_model-00003-of-00003.bin"
    assert mending.read[str(last)] < making.read[str(last)] - last.stat().st_size / 2


# the records themselves

MANIFEST = "bayling-delta.json"
SUMS = "SHA256SUMS"


def without_time(place: Path) -> dict[str, Any]:
    manifest = json.loads((place / "model" / MANIFEST).read_text())
    del manifest["created"]
    return dict(manifest)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.9999])
@pytest.mark.parametrize("name", [MANIFEST, SUMS])
def test_a_flipped_bit_in_a_record_is_mended(place: Path, name: str, share: float) -> None:
    good = contents(place / "model")
    flip(place / "model" / name, int(share * len(good[name])))
    with pytest.raises(BaylingDeltaError):
        verify(place / "model")
    document = mend(place)
    assert document["repaired"] == [name]
    assert len(document["notes"]) == 1
    assert contents(place / "model") == good


def flip_in(path: Path, text: bytes, place: int = 0) -> None:
    data = path.read_bytes()
    flip(path, data.index(text) + place)


@pytest.mark.parametrize("text", [b'"2', b'"apply"', b'"plain"', b'"max_shard_size": 40', b'"bayling-delta"'])
def test_what_only_the_manifest_says_is_of_now_where_it_is_lost(place: Path, text: bytes) -> None:
    before = without_time(place)
    flip_in(place / "model" / MANIFEST, text, 1)
    document = mend(place)
    assert document["repaired"][0] == MANIFEST
    verify(place / "model")
    before["options"]["max_shard_size"] = after_size = without_time(place)["options"]["max_shard_size"]
    assert after_size <= SHARD
    assert without_time(place) == before


def test_a_digest_of_the_manifest_that_is_wrong_in_the_list(place: Path) -> None:
    """Both are well formed, and each vouches for every other file."""
    good = contents(place / "model")
    line = next(row for row in good[SUMS].splitlines() if row.endswith(MANIFEST.encode()))
    other = line.translate(bytes.maketrans(b"01", b"10"), b"")
    (place / "model" / SUMS).write_bytes(good[SUMS].replace(line, other))
    document = mend(place)
    assert document["repaired"] == [SUMS]
    assert document["notes"] == [f"{SUMS} is written anew: {MANIFEST} vouches for every other file"]
    assert contents(place / "model") == good


def test_a_manifest_that_says_something_else_in_good_form_is_found_out(place: Path) -> None:
    """No digest of its own contradicts it."""
    good = contents(place / "model")
    text = good[MANIFEST].decode()
    assert '"recipe": "plain"' in text
    (place / "model" / MANIFEST).write_text(text.replace('"recipe": "plain"', '"recipe": "alpaca"'))
    document = mend(place)
    assert document["repaired"] == [MANIFEST]
    (note,) = document["notes"]
    assert note.startswith(f"{MANIFEST} is, byte for byte, what it was: {SUMS} vouches for every other file")
    assert contents(place / "model") == good


@pytest.mark.parametrize("options", [{}, {"dtype": "BF16"}, {"dtype": "F32", "max_shard_size": 5 * 10**9}])
def test_a_manifest_that_is_not_there_is_written_anew(
    place: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(place / "model")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    apply(place / "base", place / "delta", place / "model", **({"max_shard_size": SHARD} | options))
    before, others = without_time(place), contents(place / "model")
    absent(place / "model" / MANIFEST)
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    document = mend(place)
    assert document["repaired"] == [MANIFEST, SUMS]
    (note,) = document["notes"]
    assert "is written anew" in note
    after = without_time(place)
    assert after["options"].pop("max_shard_size") <= before["options"].pop("max_shard_size")
    assert after == before
    assert {name: data for name, data in contents(place / "model").items() if name not in (MANIFEST, SUMS)} == {
        name: data for name, data in others.items() if name not in (MANIFEST, SUMS)
    }
    assert verify(place / "model")["ok"]


def test_a_list_is_written_anew_with_the_files_that_the_manifest_vouches_for(place: Path) -> None:
    good = contents(place / "model")
    flip(shard(place / "model", 1))
    (place / "model" / SUMS).write_bytes(b"")
    assert set(mend(place)["repaired"]) == {shard(place / "model", 1).name, SUMS}
    assert contents(place / "model") == good


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "README.md", "model.safetensors.index.json"])
def test_a_manifest_is_not_written_anew_beside_another_damaged_file(place: Path, name: str) -> None:
    flip(place / "model" / name)
    flip(place / "model" / MANIFEST, 500)
    refused(place, IntegrityError, name)


def test_a_manifest_is_not_made_of_another_base(place: Path) -> None:
    flip(place / "model" / MANIFEST, 500)
    shutil.rmtree(place / "base")
    save(place / "base", llama(7), shards=3)
    refused(place, IntegrityError, "the sum made anew has .*nothing was touched")


# nothing is touched


def refused(place: Path, error: type[BaylingDeltaError], words: str, **options: Any) -> None:
    before = contents(place / "model")
    with pytest.raises(error, match=words):
        mend(place, **options)
    assert contents(place / "model") == before
    assert not partial_path(place / "model").exists()


def test_another_base_mends_nothing(place: Path) -> None:
    flip(shard(place / "model", 1))
    absent(place / "model" / "config.json")
    shutil.rmtree(place / "base")
    save(place / "base", llama(7), shards=3)
    refused(place, IntegrityError, "made anew, its SHA-256 is .*nothing was touched")


def test_a_base_of_another_size_mends_nothing(place: Path) -> None:
    flip(shard(place / "model", 1))
    for side in ("base", "delta"):
        shutil.rmtree(place / side)
        state = {name: tensor for name, tensor in llama(1).items() if "layers.1" not in name}
        save(place / side, state, config=CONFIG | {"num_hidden_layers": 1})
    refused(place, MismatchError, "would have other files than")


def test_without_a_record_nothing_can_be_mended(place: Path) -> None:
    absent(place / "model" / "bayling-delta.json")
    absent(place / "model" / "SHA256SUMS")
    refused(place, NoRecordError, "there is no manifest in it")


def test_a_manifest_of_a_recorded_model_says_nothing_of_how_to_make_it(place: Path) -> None:
    from bayling_delta import record

    (place / "model" / "bayling-delta.json").write_text(json.dumps(record(place / "model")))
    absent(place / "model" / "SHA256SUMS")
    refused(place, NoRecordError, "not of a model that this version rebuilt")


@pytest.mark.parametrize(
    "said",
    [
        {"inputs": []},
        {"inputs": {"base": {}, "delta": {}}},
        {"changes": ["config.json"]},
        {"verification": None},
        {"options": {"dtype": None}},
        {"options": {"dtype": None, "max_shard_size": [], "allow": []}},
        {"options": {"dtype": None, "max_shard_size": 40_000, "allow": ["everything"]}},
    ],
    ids=str,
)
def test_a_manifest_that_says_nothing_usable_of_how_it_was_made(place: Path, said: dict[str, Any]) -> None:
    path = place / "model" / "bayling-delta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    absent(place / "model" / SUMS)
    refused(place, NoRecordError, "not of a model that this version rebuilt")


def test_a_stray_weight_file_is_the_users_to_remove(place: Path) -> None:
    flip(shard(place / "model", 1))
    torch.save({}, place / "model" / "pytorch_model.bin")
    refused(place, IntegrityError, "does not belong to this model")


def test_a_companion_that_the_delta_no_longer_has(place: Path) -> None:
    absent(place / "model" / "tokenizer.model")
    absent(place / "delta" / "tokenizer.model")
    refused(place, IntegrityError, r"tokenizer.model: is not made from base and delta")


def test_a_damaged_input_mends_nothing(place: Path) -> None:
    flip(shard(place / "model", 0))
    embedding = llama(1)["model.embed_tokens.weight"].numpy().tobytes()
    file = place / "base" / "pytorch_model-00001-of-00003.bin"
    flip(file, file.read_bytes().index(embedding) + 3)
    refused(place, IntegrityError, "CRC-32 is wrong")


def test_a_full_disk_mends_nothing(place: Path) -> None:
    class Full(System):
        def write_from(self, handle: int, view: memoryview, offset: int) -> int:
            if len(view) > 4096:
                raise OSError(28, "No space left on device")
            return super().write_from(handle, view, offset)

    flip(shard(place / "model", 0))
    with system.using(Full()):
        refused(place, OutputError, "No space left on device")


def test_one_repair_at_a_time(place: Path) -> None:
    from bayling_delta.staging import staged_files

    flip(shard(place / "model", 0))
    before = contents(place / "model")
    with staged_files(place / "model"), pytest.raises(OutputError, match="is being written by another run"):
        mend(place)
    assert contents(place / "model") == before


class Unreadable(System):
    """A disk with a bad sector in one file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handles: set[int] = set()

    def open_read(self, path: Path, *, direct: bool) -> int:
        handle = super().open_read(path, direct=direct)
        (self._handles.add if path == self._path else self._handles.discard)(handle)
        return handle

    def read_into(self, handle: int, view: memoryview, offset: int) -> int:
        if handle in self._handles and offset + len(view) > 60:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read_into(handle, view, offset)

    def replace(self, old: Path, new: Path) -> None:
        super().replace(old, new)
        if new == self._path:
            self._path = Path()


@pytest.mark.parametrize("name", ["shard", "config.json", "tokenizer.model", "bayling-delta.json", "SHA256SUMS"])
def test_a_file_that_cannot_be_read_is_made_anew(place: Path, name: str) -> None:
    before = contents(place / "model")
    path = shard(place / "model", 1) if name == "shard" else place / "model" / name
    with system.using(Unreadable(path)):
        with pytest.raises(BaylingDeltaError, match="cannot be read"):
            verify(place / "model")
        if name == "bayling-delta.json":  # its time is lost with it
            assert mend(place)["repaired"] == ["bayling-delta.json", "SHA256SUMS"]
            return
        assert mend(place)["repaired"] == [path.name]
    assert contents(place / "model") == before


def test_a_file_made_anew_is_for_whom_it_was(place: Path) -> None:
    file = shard(place / "model", 1)
    flip(file)
    file.chmod(0o600)
    mend(place)
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_directory_where_a_file_belongs_is_seen_before_anything_is_touched(place: Path) -> None:
    flip(shard(place / "model", 1))
    absent(place / "model" / "config.json").mkdir()
    before = shard(place / "model", 1).read_bytes()
    with pytest.raises(BaylingDeltaError, match="is a directory, where a file belongs"):
        mend(place)
    assert shard(place / "model", 1).read_bytes() == before
    assert (place / "model" / "config.json").is_dir()


def test_what_apply_has_finished_of_another_model_is_left_alone(place: Path) -> None:
    flip(shard(place / "model", 1))
    partial = partial_path(place / "model")
    (partial / "model").mkdir(parents=True)
    for name in ("lock", "journal", "model/model.safetensors"):
        (partial / name).touch()
    with pytest.raises(OutputError, match="has what 'apply' has finished of another output"):
        mend(place)
    assert (partial / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("what", ["base", "linked base"])
def test_an_input_where_files_would_grow_is_not_removed(place: Path, what: str) -> None:
    flip(shard(place / "model", 1))
    partial = partial_path(place / "model")
    partial.mkdir()
    (partial / "lock").touch()
    (place / "base").rename(partial / "model")
    base = partial / "model"
    if what == "linked base":
        base = place / "base"
        base.mkdir()
        for file in (partial / "model").iterdir():
            (base / file.name).symlink_to(file)
    before = contents(partial / "model")
    for model in (place / "model", place / "model" / "..", place / "link"):
        if model.name == "link":
            model.symlink_to("model")
        with pytest.raises(BaylingDeltaError):
            repair(model, base=base, delta=place / "delta")
    assert contents(partial / "model") == before


@pytest.mark.parametrize("way", ["by a link", "from inside"])
def test_a_model_is_mended_however_it_is_named(place: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    before = contents(place / "model")
    flip(shard(place / "model", 1))
    name = Path()
    if way == "by a link":
        (place / "elsewhere").mkdir()
        name = place / "elsewhere" / "link"
        name.symlink_to(place / "model")
    else:
        monkeypatch.chdir(place / "model")
    repair(name, base=place / "base", delta=place / "delta")
    assert contents(place / "model") == before
    assert not list(place.glob("**/*.partial"))


def test_a_manifest_without_a_digest_vouches_for_nothing(place: Path) -> None:
    path = place / "model" / "bayling-delta.json"
    manifest = json.loads(path.read_text())
    manifest["result"]["files"][0]["sha256"] = None
    path.write_text(json.dumps(manifest))
    absent(place / "model" / SUMS)
    refused(place, NoRecordError, "has no SHA-256 of")


@pytest.mark.parametrize("size", [1, 3_000, 20_000, SHARD, 57_344, 70_000, 10**6])
def test_how_a_model_was_cut_is_seen_by_its_files(place: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Where no manifest says it; also where a tensor alone is larger than a file should be."""
    shutil.rmtree(place / "model")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    apply(place / "base", place / "delta", place / "model", max_shard_size=size)
    before = contents(place / "model")
    absent(place / "model" / "bayling-delta.json")
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert mend(place)["repaired"] == ["bayling-delta.json", SUMS]
    after = contents(place / "model")
    for name in ("bayling-delta.json", SUMS):
        del before[name], after[name]
    assert before == after


def test_what_to_do_is_told_where_nothing_can_be_mended(place: Path) -> None:
    absent(place / "model" / "bayling-delta.json")
    flip(shard(place / "model", 1))
    with pytest.raises(IntegrityError) as error:
        mend(place)
    assert error.value.hint is not None
    assert "'apply' makes the model elsewhere" in error.value.hint


def test_a_model_that_is_not_there(place: Path) -> None:
    with pytest.raises(CheckpointError, match="is no directory with a model in it"):
        repair(place / "nothing", base=place / "base", delta=place / "delta")


def test_a_directory_in_the_place_of_the_manifest_is_seen_before_the_sum(place: Path) -> None:
    absent(place / "model" / "bayling-delta.json").mkdir()
    world = Census()
    with system.using(world), pytest.raises(BaylingDeltaError, match="is a directory, where a file belongs"):
        mend(place)
    assert not [name for name in world.read if name.endswith(".bin")]
