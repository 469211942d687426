"""Wrong input: rows of tables that say what a user does wrong and what is to be said, and how they are carried out.

A row runs a command in this process, in a directory of its own, and is held to the contract: the exit code, one JSON
document on stdout, the kind of problem and its place, words that help, and nothing written or changed.
"""

import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bayling_delta import apply
from bayling_delta.system import System
from tests.pairs import CONFIG, StateDict, llama, save, shuffled
from tests.running import Finished, Run
from tests.strategies import TORCH_DTYPES, Described, Storage, pickled, write_archive

Make = Callable[[Path], object]
"""Puts something bad into a directory that holds ``base``, ``delta`` and, for `MODELS`, ``model``."""

READ_LIMIT = 64 << 20
"""Bytes of input that a refusal may read."""
CALL_LIMIT = 20_000
"""Reads that a refusal may make; more is a hang."""
LARGE = "model.large.weight"
LARGE_ELEMENTS = 40 << 20
"""80 MiB of float16 on each side, none of it on the disk: whoever reads weights is found out."""
BIN = "base/pytorch_model-00001-of-00003.bin"
BIN_INDEX = "base/pytorch_model.bin.index.json"
NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 9976599374\n"
APPLY = "apply --base base --delta delta --out out"
TIED = CONFIG | {"tie_word_embeddings": True}


@dataclass(frozen=True)
class Row:
    """One bad input, and what is to be said of it."""

    name: str
    make: Make
    code: int
    kind: str
    """The kind of one of the problems; ``usage`` where options are wrong; empty where several would do."""
    words: tuple[str, ...] = ()
    """What stderr must contain, the place and the next step among it."""
    command: str = APPLY
    world: Callable[[], System] = System
    """The system that it runs on, where that is the trouble."""


def rows(table: Sequence[Row]) -> pytest.MarkDecorator:
    """The table as pytest's parameters."""
    return pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in table])


# judging


CATEGORIES = {2: {"usage"}, 3: {"checkpoint"}, 4: {"mismatch"}, 5: {"integrity", "no_record"}, 6: {"output"}}


def assert_refused(done: Finished, row: Row) -> None:
    """The row's code, kind and words; one document; a place for every problem; short, and no word of ours."""
    assert done.code == row.code, done.errors
    error = done.document["error"]
    assert done.document["schema"].startswith("bayling-delta/")
    assert not done.document["ok"]
    assert error["kind"] in CATEGORIES[row.code]
    if row.kind == "usage":
        assert not error["problems"]
    else:
        assert row.kind in ("", *done.kinds)
        assert all(problem["where"] and problem["message"] for problem in error["problems"])
        assert len({str(problem) for problem in error["problems"]}) == len(error["problems"]), "told twice"
    for words in row.words:
        assert words in done.errors
    assert done.errors.startswith("error: ")
    assert "\nerror: " not in done.errors, "a name from a file forges a line"
    assert "Traceback" not in done.errors
    assert len(done.errors) < 10_000, "whole files are not messages"
    assert done.errors.isascii() or done.errors.replace("\n", "").isprintable()


def snapshot(place: Path) -> dict[str, object]:
    """What a directory holds: links by their targets, small files by their bytes, large ones by size and time."""
    return {str(path.relative_to(place)): content(path) for path in sorted(place.rglob("*"))}


def content(path: Path) -> object:
    status = path.lstat()
    if path.is_symlink():
        return str(path.readlink())
    if path.is_file() and status.st_size < 1 << 20:
        return path.read_bytes()
    return status.st_mode, (status.st_size, status.st_mtime_ns) if path.is_file() else None


# making bad input: each function returns a `Make`


def nothing(place: Path) -> None:
    """The input is good; the command is not."""


def both(*makes: Make) -> Make:
    def make(place: Path) -> None:
        for each in makes:
            each(place)

    return make


def instead(name: str, put: Callable[[Path], object]) -> Make:
    """Have ``put`` make something in the place of a file that may be there."""

    def make(place: Path) -> None:
        (place / name).unlink(missing_ok=True)
        put(place / name)

    return make


def write(name: str, data: bytes) -> Make:
    return instead(name, lambda path: path.write_bytes(data))


def remove(pattern: str) -> Make:
    """Remove a directory, or all files that match."""

    def make(place: Path) -> None:
        for path in list(place.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return make


def cut(name: str, size: int) -> Make:
    """Leave the first ``size`` bytes; counted from the end where negative, past it where larger."""

    def make(place: Path) -> None:
        os.truncate(place / name, size if size >= 0 else (place / name).stat().st_size + size)

    return make


def swap(name: str, old: bytes, new: bytes) -> Make:
    """Replace the first ``old``, which must be there, in the file that matches ``name``."""

    def make(place: Path) -> None:
        (path,) = place.glob(name)
        data = path.read_bytes()
        assert old in data
        path.write_bytes(data.replace(old, new, 1))

    return make


def flip(name: str, needle: bytes | int = 0, skip: int = 0, bit: int = 0) -> Make:
    """Flip one bit: ``skip`` bytes after ``needle``, which is bytes to find or a place."""

    def make(place: Path) -> None:
        path = next(iter(sorted(place.glob(name))))
        data = bytearray(path.read_bytes())
        data[(needle if isinstance(needle, int) else data.index(needle)) + skip] ^= 1 << bit
        path.write_bytes(data)

    return make


def other_digit(name: str, place_in_file: int) -> Make:
    """Put another hexadecimal digit where one stands."""

    def make(place: Path) -> None:
        path = place / name
        data = bytearray(path.read_bytes())
        data[place_in_file] = ord("0") if data[place_in_file] != ord("0") else ord("1")
        path.write_bytes(data)

    return make


def edit(name: str, change: Callable[[Any], object]) -> Make:
    """Change a JSON document in place."""

    def make(place: Path) -> None:
        document = json.loads((place / name).read_text())
        change(document)
        (place / name).write_text(json.dumps(document))

    return make


def link(name: str, target: str) -> Make:
    return instead(name, lambda path: path.symlink_to(target))


def pipe(name: str) -> Make:
    return instead(name, os.mkfifo)


def folder(name: str) -> Make:
    return instead(name, Path.mkdir)


def state(side: str, tensors: Callable[[], StateDict], *, mixed: bool = False, **options: Any) -> Make:
    """Put another checkpoint in the place of one, in ``mixed`` order; with the large tensor where the other has it."""

    def make(place: Path) -> None:
        shutil.rmtree(place / side, ignore_errors=True)
        large = any(place.glob("*/*-00003-of-00003*"))
        order = shuffled(tensors()) if mixed else None
        (save_with_large if large else save)(place / side, tensors(), order=order, **options)

    return make


def exchange(one: str, other: str) -> Make:
    def make(place: Path) -> None:
        (place / one).rename(place / "x")
        (place / other).rename(place / one)
        (place / "x").rename(place / other)

    return make


def copy(name: str, new: str) -> Make:
    def make(place: Path) -> None:
        shutil.copy(place / name, place / new)

    return make


def weights(data: bytes, name: str = "model.safetensors") -> Make:
    """Have the base be one file of weights with these bytes."""

    def make(place: Path) -> None:
        shutil.rmtree(place / "base")
        (place / "base").mkdir()
        (place / "base" / name).write_bytes(data)

    return make


def saved(value: Any, **options: Any) -> Make:
    """Have the base be one file as `torch.save` writes it."""

    def make(place: Path) -> None:
        weights(b"", "pytorch_model.bin")(place)
        torch.save(value, place / "base" / "pytorch_model.bin", **options)

    return make


def zipped(records: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> Make:
    """Have the base be one file that Python's zipfile writes."""

    def make(place: Path) -> None:
        weights(b"", "pytorch_model.bin")(place)
        with zipfile.ZipFile(place / "base" / "pytorch_model.bin", "w", compression) as archive:
            for name, data in records.items():
                archive.writestr(name, data)

    return make


def safe(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header, as an object or as text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int = 0, end: int = 2, shape: Sequence[object] = (1,), dtype: object = "F16") -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def place_tensor(name: str, file: object, index_name: str = BIN_INDEX) -> Make:
    """Have an index place a tensor in a file."""
    return edit(index_name, lambda index: index["weight_map"].update({name: file}))


def write_bin(name: str, tensors: StateDict) -> Make:
    def make(place: Path) -> None:
        torch.save(tensors, place / name)

    return make


def rebuilt_base(place: Path) -> None:
    """Have the base be a sum already."""
    both(remove("base"), remove("delta"), state("first", lambda: llama(1)), state("delta", but({})))(place)
    apply(place / "first", place / "delta", place / "base")


class Evil:
    """Leaves a file in the current directory, if it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch was-here",)


def described(shape: tuple[int, ...] = (24,), strides: tuple[int, ...] = (1,), storage: Storage | None = None) -> Make:
    """Have the base be a ``.bin`` whose head is described so, truly or not, and an embedding like it elsewhere."""
    head = Described(shape, strides, 0, storage or Storage())
    embedding = replace(head, storage=Storage(key="1"))

    def make(place: Path) -> None:
        weights(b"", "pytorch_model.bin")(place)
        path = place / "base" / "pytorch_model.bin"
        write_archive(path, pickled({HEAD: head, EMBEDDING: embedding}), {"0": bytes(96), "1": bytes(96)})
        write("base/config.json", json.dumps(TIED).encode())(place)

    return make


def but(changes: Mapping[str, torch.Tensor | None], seed: int = 2) -> Callable[[], StateDict]:
    """A delta with other tensors for some, or without them."""

    def make() -> StateDict:
        changed = {**llama(seed, 0.01), **changes}
        return {name: tensor for name, tensor in changed.items() if tensor is not None}

    return make


# what headers show


class HeadersOnly(System):
    """Ends a run that reads weights, or changes anything, and counts what it read and changed."""

    def __init__(self) -> None:
        self.bytes_read = self.reads = self.changes = 0

    def read_into(self, handle: int, view: memoryview, offset: int) -> int:
        count = super().read_into(handle, view, offset)
        self.bytes_read += count
        self.reads += 1
        if self.bytes_read > READ_LIMIT or self.reads > CALL_LIMIT:
            raise AssertionError("weights are read")
        return count

    def open_write(self, path: Path, *, direct: bool) -> int:  # noqa: ARG002
        self.changes += 1
        raise AssertionError(f"{path} is written")

    def make_directory(self, path: Path) -> None:
        super().make_directory(path)
        self.changes += 1
        raise AssertionError(f"{path} is made")


def save_with_large(directory: Path, tensors: StateDict, **options: Any) -> None:
    """Write a checkpoint in three shards, the last of which has `LARGE_ELEMENTS` zeros and takes no room.

    They have the dtype of the first weights.
    """
    known = {TORCH_DTYPES[name]: name for name in ("F16", "BF16", "F32")}
    dtype = next(known[tensor.dtype] for tensor in tensors.values() if tensor.dtype in known)
    save(directory, tensors, shards=2, **options)
    for file in directory.glob("*-of-00002*"):
        file.rename(file.with_name(file.name.replace("-of-00002", "-of-00003")))
    (index,) = directory.glob("*.index.json")
    stem, suffix = index.name.removesuffix(".index.json").split(".")
    file = directory / f"{stem}-00003-of-00003.{suffix}"
    if suffix == "bin":
        with torch.serialization.skip_data():
            torch.save({LARGE: torch.empty(LARGE_ELEMENTS, dtype=TORCH_DTYPES[dtype])}, file)
    else:
        nbytes = LARGE_ELEMENTS * TORCH_DTYPES[dtype].itemsize
        file.write_bytes(safe({LARGE: entry(0, nbytes, [LARGE_ELEMENTS], dtype)}))
        os.truncate(file, file.stat().st_size + nbytes)
    document = json.loads(index.read_text().replace("-of-00002", "-of-00003"))
    document["weight_map"][LARGE] = file.name
    index.write_text(json.dumps(document))


def copy_linked(source: Path, target: Path) -> None:
    """Copy a base and a delta; their large shards, which nobody changes, are shared with the source."""

    def copy(old: str, new: str) -> None:
        (os.link if "-00003-of-" in old else shutil.copyfile)(old, new)

    for side in ("base", "delta"):
        shutil.copytree(source / side, target / side, copy_function=copy)


def assert_refused_by_headers(place: Path, run: Run, row: Row, world: HeadersOnly) -> None:
    """The row is refused as it should be, before weights were read, and with nothing written or changed."""
    row.make(place)
    before = snapshot(place)
    assert_refused(run(row.command, world), row)
    assert snapshot(place) == before
    assert world.bytes_read < READ_LIMIT
    assert not world.changes
