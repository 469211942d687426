"""One bit is wrong, anywhere: in what is read it is refused or changes nothing, in what was written it is found."""

import shutil
import struct
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from bayling_delta import apply, repair, verify
from bayling_delta.errors import BaylingDeltaError
from bayling_delta.staging import partial_path
from tests.pairs import StateDict, assert_same, llama, load, published_sum, save

SHARD = 120_000
Property = Callable[[str, object], None]
FEW_OR_MANY = pytest.mark.parametrize("count", [2, pytest.param(60, marks=pytest.mark.long)], ids=["few", "many"])
"""Flips of each part of each file."""


def parts(path: Path) -> dict[str, range]:
    """Where in a file its header, or its pickle and directory, and its data are."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        header = 8 + struct.unpack("<Q", data[:8])[0]
        return {"header": range(header), "data": range(header, len(data))}
    if path.suffix == ".bin":
        # torch writes data.pkl first, then the records, then the archive's directory
        pickle, directory = data.index(b"PK\x03\x04", 4), data.index(b"PK\x01\x02")
        return {"pickle": range(pickle), "data": range(pickle, directory), "directory": range(directory, len(data))}
    return {"text": range(len(data))}


def flips(directory: Path, count: int) -> Iterator[tuple[Path, str, bytes]]:
    """Files, their parts, and their contents with one bit wrong."""
    random = Random(count)
    for path in sorted(directory.iterdir()):
        good = path.read_bytes()
        for part, places in parts(path).items():
            for place in random.sample(places, min(count, len(places))):
                spoilt = bytearray(good)
                spoilt[place] ^= 1 << random.randrange(8)
                yield path, part, bytes(spoilt)


class Spoilt:
    """A file with other contents while the body runs."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._path, self._data = path, data

    def __enter__(self) -> None:
        self._good = self._path.read_bytes()
        self._path.write_bytes(self._data)

    def __exit__(self, *_: object) -> None:
        self._path.write_bytes(self._good)


def attempt(place: Path, expected: StateDict) -> BaylingDeltaError | None:
    """What an `apply` raises, if it does; what it makes is the right sum."""
    out = place / "out"
    try:
        apply(place / "base", place / "delta", out, threads=2, resume=False)
    except BaylingDeltaError as error:
        assert not out.exists()
        return error
    assert_same(load(out), expected)
    shutil.rmtree(out)
    assert not partial_path(out).exists()
    return None


def make_pair(place: Path, container: str) -> StateDict:
    """A base and a delta, the delta with a tokenizer; what their sum is."""
    base, delta = llama(1), llama(2, 0.01)
    save(place / "base", base, container=container, shards=2)
    save(place / "delta", delta, container=container, shards=2)
    (place / "delta" / "tokenizer.model").write_bytes(b"\x0a\x00not really")
    return published_sum(base, delta)


def list_digests(directory: Path) -> None:
    names = sorted(path.name for path in directory.iterdir())
    sums = subprocess.run(["sha256sum", *names], cwd=directory, check=True, capture_output=True, text=True).stdout
    (directory / "SHA256SUMS").write_text(sums)


@FEW_OR_MANY
@pytest.mark.parametrize("container", ["torch", "safetensors"])
def test_inputs_whose_digests_are_on_record(
    tmp_path: Path, container: str, count: int, record_property: Property
) -> None:
    """No flip in what a list beside them has goes unnoticed; of the list itself, one in a letter's case may."""
    expected = make_pair(tmp_path, container)
    for side in ("base", "delta"):
        list_digests(tmp_path / side)
    assert attempt(tmp_path, expected) is None
    seen: Counter[str] = Counter()
    for side in ("base", "delta"):
        for path, part, data in flips(tmp_path / side, count):
            with Spoilt(path, data):
                error = attempt(tmp_path, expected)
            seen["refused" if error else "the same"] += 1
            used = side == "delta" or path.name != "config.json"
            if path.name != "SHA256SUMS" and not path.name.endswith("index.json") and used:
                assert error is not None, (path, part)
    record_property("flips", dict(seen))


@FEW_OR_MANY
@pytest.mark.parametrize("container", ["torch", "safetensors"])
def test_inputs_of_which_nothing_is_recorded(
    tmp_path: Path, container: str, count: int, record_property: Property
) -> None:
    """Data of a ``.bin`` have checksums of their own; those of safetensors have none, and nothing could notice."""
    expected = make_pair(tmp_path, container)
    seen: Counter[str] = Counter()
    for side in ("base", "delta"):
        for path, part, data in flips(tmp_path / side, count):
            if (container, part) == ("safetensors", "data") or path.name in ("config.json", "tokenizer.model"):
                continue
            with Spoilt(path, data):
                error = attempt(tmp_path, expected)
            seen[f"{part}: {'refused' if error else 'the same'}"] += 1
    record_property("flips", dict(seen))
    assert sum(number for what, number in seen.items() if what.endswith("refused")) > count


@FEW_OR_MANY
def test_a_model_that_was_made(tmp_path: Path, count: int, record_property: Property) -> None:
    """Every flip is found by ``verify``, and every fourth is mended by ``repair`` here."""
    make_pair(tmp_path, "torch")
    model = tmp_path / "model"
    apply(tmp_path / "base", tmp_path / "delta", model, max_shard_size=SHARD)
    good = {path.name: path.read_bytes() for path in model.iterdir()}
    found = mended = 0
    for path, part, data in flips(model, count):
        path.write_bytes(data)
        with pytest.raises(BaylingDeltaError) as error:
            verify(model, threads=2)
        assert path.name in str(error.value), (path, part)
        found += 1
        if found % 4 == 0:
            document = repair(model, base=tmp_path / "base", delta=tmp_path / "delta", threads=2)
            assert document["repaired"][0] == path.name
            mended += 1
        if path.name == "bayling-delta.json":  # its time may be of now
            path.write_bytes(good[path.name])
            (model / "SHA256SUMS").write_bytes(good["SHA256SUMS"])
        elif found % 4 != 0:
            path.write_bytes(good[path.name])
        assert {file.name: file.read_bytes() for file in model.iterdir()} == good, (path, part)
    record_property("found", found)
    record_property("mended", mended)
    assert mended > 2
    assert verify(model)["ok"]


def test_every_bit_of_a_line_of_the_list_matters(tmp_path: Path) -> None:
    """Other readers of SHA256SUMS take capitals for small letters, and one blank for another."""
    make_pair(tmp_path, "torch")
    model = tmp_path / "model"
    apply(tmp_path / "base", tmp_path / "delta", model)
    good = (model / "SHA256SUMS").read_bytes()
    line = good.splitlines(keepends=True)[0]
    for place in (0, 1, 31, 63, 64, 65, 66, len(line) - 2, len(line) - 1):
        for bit in range(8):
            spoilt = good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :]
            with Spoilt(model / "SHA256SUMS", spoilt), pytest.raises(BaylingDeltaError):
                verify(model, threads=1)
    assert verify(model)["ok"]
