"""Zip archives as PyTorch and Python write them are read; those that lie about themselves are refused."""

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayling_delta.errors import CheckpointError, Problem
from bayling_delta.sources import open_source, read_bytes
from bayling_delta.zip_records import Record, read_records

ENCRYPTED, DESCRIPTOR_FOLLOWS = 0x0001, 0x0008
FULL = 0xFFFFFFFF


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zip_records") / "weights.bin"


def contents(path: Path) -> dict[str, tuple[int, bytes]]:
    """Each record's CRC-32 and bytes, by name, as we find them."""
    with open_source(path) as source:
        records = read_records(source)
        assert all(record.name == name for name, record in records.items())
        return {name: (r.crc32, read_bytes(source, r.offset, r.size)) for name, r in records.items()}


def contents_by_zipfile(path: Path) -> dict[str, tuple[int, bytes]]:
    """The same, as Python's zipfile finds them."""
    with zipfile.ZipFile(path) as archive:
        return {entry.filename: (entry.CRC, archive.read(entry)) for entry in archive.infolist()}


def problem(path: Path) -> Problem:
    """What our reader refuses the file for."""
    with open_source(path) as source, pytest.raises(CheckpointError) as caught:
        read_records(source)
    (found,) = caught.value.problems
    assert found.where == str(path)
    return found


# what is read

RECORD_NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\\"), min_size=1, max_size=9)
RECORDS = st.dictionaries(RECORD_NAMES, st.binary(max_size=40), max_size=6)


@given(RECORDS)
def test_what_python_stores_is_read(path: Path, records: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    assert contents(path) == contents_by_zipfile(path)
    assert {name: data for name, (_, data) in contents(path).items()} == records


@given(RECORDS, st.integers(0, 300))
def test_what_python_stores_in_the_64_bit_form_is_read(path: Path, records: dict[str, bytes], limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile, "ZIP64_LIMIT", limit)
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in records.items():
                archive.writestr(name, data)
    assert contents(path) == contents_by_zipfile(path)


@pytest.mark.parametrize("count", [0, 1, 300])
def test_what_torch_writes_is_read(path: Path, count: int) -> None:
    torch.save({f"layer.{number}": torch.full((number,), 1.0) for number in range(count)}, path)
    assert contents(path) == contents_by_zipfile(path)


def test_what_is_written_to_a_stream_is_read(path: Path) -> None:
    """Python then leaves the sizes to a descriptor behind the data, as PyTorch does."""

    class Stream(io.BytesIO):
        def tell(self) -> int:
            raise OSError

    stream = Stream()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", b"12345678")
        archive.writestr("archive/version", b"3\n")
    path.write_bytes(stream.getvalue())
    assert contents(path) == contents_by_zipfile(path)


@pytest.mark.parametrize("comment", [b"a comment", b"c" * 0xFFFF])
def test_an_archive_with_a_comment_is_read(path: Path, comment: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"12345678")
        archive.comment = comment
    assert contents(path) == contents_by_zipfile(path)


# archives made by hand, whose headers can say anything (APPNOTE.TXT 4.3)


@dataclass(frozen=True)
class Entry:
    """A record, and what its two headers say instead of the truth."""

    name: str = "archive/data.pkl"
    data: bytes = b"12345678"
    local: Mapping[str, Any] = field(default_factory=dict)
    central: Mapping[str, Any] = field(default_factory=dict)

    def _fields(self, said: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        size = len(self.data)
        true = {"flags": 0, "method": 0, "crc": zlib.crc32(self.data), "packed": size, "size": size, "extra": b""}
        fields = true | {"name": self.name.encode()} | more
        assert said.keys() <= fields.keys()
        return fields | dict(said)

    def stored(self) -> bytes:
        """The local header and the data."""
        f = self._fields(self.local, signature=b"PK\x03\x04")
        numbers = (20, f["flags"], f["method"], 0, 0, f["crc"], f["packed"], f["size"], len(f["name"]), len(f["extra"]))
        header = struct.pack("<4s5H3I2H", f["signature"], *numbers)
        return b"".join((header, f["name"], f["extra"], self.data))

    def listed(self, offset: int) -> bytes:
        """The entry of the central directory."""
        f = self._fields(self.central, signature=b"PK\x01\x02", offset=offset, comment=b"")
        numbers = (20, 20, f["flags"], f["method"], 0, 0, f["crc"], f["packed"], f["size"])
        lengths = (len(f["name"]), len(f["extra"]), len(f["comment"]))
        header = struct.pack("<4s6H3I5H2I", f["signature"], *numbers, *lengths, 0, 0, 0, f["offset"])
        return b"".join((header, f["name"], f["extra"], f["comment"]))


def archive(*entries: Entry, zip64: Mapping[str, Any] | None = None, **end: int) -> bytes:
    """An archive, with zip64 end records if ``zip64`` is given; it and ``end`` say what those say instead."""
    body, directory = b"", b""
    for entry in entries:
        directory += entry.listed(len(body))
        body += entry.stored()
    true = {"disk": 0, "start_disk": 0, "here": len(entries), "count": len(entries)}
    true |= {"size": len(directory), "start": len(body), "comment": 0}
    whole = body + directory
    if zip64 is not None:
        f = true | {"signature": b"PK\x06\x06", "place": len(whole)} | dict(zip64)
        numbers = (f["disk"], f["start_disk"], f["here"], f["count"], f["size"], f["start"])
        whole += struct.pack("<4sQ2H2I4Q", f["signature"], 44, 45, 45, *numbers)
        whole += struct.pack("<4sIQI", b"PK\x06\x07", 0, f["place"], 1)
        true |= {"here": 0xFFFF, "count": 0xFFFF, "size": FULL, "start": FULL}
    assert end.keys() <= true.keys()
    return whole + struct.pack("<4s4H2IH", b"PK\x05\x06", *(true | end).values())


def extra(*numbers: int, kind: int = 1, length: int | None = None) -> bytes:
    """A zip64 extra field."""
    return struct.pack(f"<2H{len(numbers)}Q", kind, 8 * len(numbers) if length is None else length, *numbers)


DESCRIBED = {"flags": DESCRIPTOR_FOLLOWS, "crc": 0, "packed": 0, "size": 0}
"""What PyTorch's local headers say."""
LONG = {"packed": FULL, "size": FULL}

GOOD = {
    "plain": archive(Entry(), Entry("archive/version", b"3\n")),
    "nothing in it": archive(),
    "empty records": archive(Entry(data=b""), Entry("archive/data/0", b""), Entry("archive/data/1", b"")),
    "sizes after the data": archive(Entry(local=DESCRIBED)),
    "zip64 end": archive(Entry(), zip64={}),
    "zip64 end, and a plain one that says the same": archive(Entry(), zip64={}, count=1, here=1, start=54, size=62),
    "zip64 sizes": archive(Entry(local=LONG, central=LONG | {"extra": extra(8, 8)}), zip64={}),
    "zip64 offset alone": archive(Entry(central={"offset": FULL, "extra": extra(0)}), zip64={}),
    "zip64 size alone": archive(Entry(central={"size": FULL, "extra": extra(8)}), zip64={}),
    "zip64 everything": archive(Entry(central=LONG | {"offset": FULL, "extra": extra(8, 8, 0)}), zip64={}),
    "zip64 behind another field": archive(Entry(central=LONG | {"extra": extra(7, kind=9) + extra(8, 8)}), zip64={}),
    "padding in the local header": archive(Entry(local={"extra": b"FB\x05\x00ZZZZZ"})),
    "comments in the directory": archive(Entry(central={"comment": b"PK\x01\x02"}), Entry("archive/version")),
}


@pytest.mark.parametrize("data", GOOD.values(), ids=GOOD)
def test_what_is_made_by_hand_is_read_as_python_reads_it(path: Path, data: bytes) -> None:
    """The hostile archives below differ from these by their lie alone."""
    path.write_bytes(data)
    assert contents(path) == contents_by_zipfile(path)


INNER = Entry("archive/data/1", b"abcd")
OUTER = Entry("archive/data/0", b"...." + INNER.stored() + b"....")
"""A record that has another in its data: read by the directory, they overlap."""
INNER_OFFSET = 30 + len(OUTER.name) + 4

HOSTILE: dict[str, tuple[bytes, str]] = {
    # the end records
    "a directory past the end": (archive(Entry(), start=1 << 20), "does not end where its end record begins"),
    "a directory that starts early": (archive(Entry(), start=53), "does not end where its end record begins"),
    "a directory longer than the file": (archive(Entry(), size=1 << 30), "does not end where its end record begins"),
    "a directory that begins early": (archive(Entry(), start=53, size=63), "ends in the middle of an entry"),
    "a directory of 4 GB": (archive(Entry(), zip64={"size": 1 << 32, "start": 0}), "does not end where"),
    "a directory that wraps around": (
        archive(Entry(), zip64={"start": (1 << 64) - 1, "size": 117}),
        "does not end where its end record begins",
    ),
    "one record fewer": (archive(Entry(), INNER, here=1, count=1), "has bytes after its last entry"),
    "no record of one": (archive(Entry(), here=0, count=0), "has bytes after its last entry"),
    "one record more": (archive(Entry(), here=2, count=2), "does not fit the file"),
    "2 to the 63 records": (archive(Entry(), zip64={"here": 1 << 63, "count": 1 << 63}), "does not fit the file"),
    "another count here": (archive(Entry(), here=0), "one part of a zip archive of several"),
    "another disk": (archive(Entry(), disk=1), "one part of a zip archive of several"),
    "a directory on another disk": (archive(Entry(), start_disk=1), "one part of a zip archive of several"),
    "a byte after the end": (archive(Entry()) + b"\0", "has bytes after its zip directory"),
    "a comment that is not there": (archive(Entry(), comment=1), "has bytes after its zip directory"),
    "an archive after the archive": (archive(Entry()) + archive(INNER), "does not end where its end record begins"),
    "bytes before the archive": (b"#!/bin/sh\n" + archive(Entry()), "does not end where its end record begins"),
    "a zip64 record past the end": (archive(Entry(), zip64={"place": 1 << 20}), "lies outside the file"),
    "a zip64 record at 2 to the 64": (archive(Entry(), zip64={"place": (1 << 64) - 1}), "lies outside the file"),
    "a zip64 record that is the locator": (archive(Entry(), zip64={"place": 116 + 56}), "lies outside the file"),
    "a zip64 record that is a record": (archive(Entry(), zip64={"place": 0}), "zip64 end record is not one"),
    "a zip64 record of another kind": (archive(Entry(), zip64={"signature": b"PK\x06\x09"}), "is not one"),
    "a zip64 record of another disk": (archive(Entry(), zip64={"disk": 1}), "zip64 end record is not one"),
    "a zip64 record of another count": (archive(Entry(), zip64={"here": 2}), "zip64 end record is not one"),
    "two counts": (archive(Entry(), zip64={}, here=2, count=2), "two zip end records contradict each other"),
    "two starts": (archive(Entry(), zip64={}, start=0), "two zip end records contradict each other"),
    "two sizes": (archive(Entry(), zip64={}, size=0), "two zip end records contradict each other"),
    # the directory
    "no entry": (archive(Entry(central={"signature": b"PK\x01\x03"})), "ends in the middle of an entry"),
    "compressed": (archive(Entry(central={"method": 8}, local={"method": 8})), "is compressed"),
    "compressed by one size": (archive(Entry(central={"size": 9})), "is compressed"),
    "encrypted": (archive(Entry(central={"flags": ENCRYPTED}, local={"flags": ENCRYPTED})), "is encrypted"),
    "a name twice": (archive(Entry(), Entry()), "'archive/data.pkl' twice"),
    "one record under one name twice": (archive(Entry(), Entry(central={"offset": 0})), "'archive/data.pkl' twice"),
    "a name that is not UTF-8": (archive(Entry(central={"name": b"\xff"}, local={"name": b"\xff"})), "is not UTF-8"),
    "no zip64 field": (archive(Entry(central=LONG)), "lacks its zip64 sizes"),
    "another field": (archive(Entry(central=LONG | {"extra": extra(8, 8, kind=2)})), "lacks its zip64 sizes"),
    "half a zip64 field": (archive(Entry(central=LONG | {"extra": extra(8)})), "lacks its zip64 sizes"),
    "a zip64 field cut short": (
        archive(Entry(central=LONG | {"extra": extra(8, 8, length=24)})),
        "lacks its zip64 sizes",
    ),
    "a field without an end": (archive(Entry(central=LONG | {"extra": b"\x07\x00\xff\xff"})), "lacks its zip64 sizes"),
    # the records
    "a record past the end": (archive(Entry(central={"offset": 1 << 20})), "is not where the zip directory says"),
    "a record at 2 to the 63": (
        archive(Entry(central={"offset": FULL, "extra": extra(1 << 63)})),
        "is not where the zip directory says",
    ),
    "a record somewhere else": (archive(Entry(central={"offset": 1})), "is not where the zip directory says"),
    "a record that is the directory": (archive(Entry(central={"offset": 54})), "is not where the zip directory says"),
    "another record": (archive(Entry(), Entry("archive/version", central={"offset": 0})), "has another name"),
    "another name": (archive(Entry(local={"name": b"archive/data.pk_"})), "has another name in its local header"),
    "a longer name": (archive(Entry(local={"name": b"archive/data.pkl2"})), "has another name in its local header"),
    "a name that folds to another": (archive(Entry(local={"name": b"ARCHIVE/data.pkl"})), "has another name"),
    "compressed, its local header says": (archive(Entry(local={"method": 8})), "is compressed or encrypted, its local"),
    "encrypted, its local header says": (archive(Entry(local={"flags": ENCRYPTED})), "is compressed or encrypted"),
    "larger, its local header says": (archive(Entry(local={"size": 9})), "has another size in its local header"),
    "packed larger, its local header says": (archive(Entry(local={"packed": 9})), "has another size in its local"),
    "empty, its local header says": (archive(Entry(local={"packed": 0, "size": 0})), "has another size in its local"),
    "into the directory": (
        archive(Entry(local=DESCRIBED, central={"packed": 9, "size": 9})),
        "reaches into the zip directory",
    ),
    "two gigabytes into the directory": (
        archive(Entry(local=DESCRIBED, central={"packed": 1 << 31, "size": 1 << 31})),
        "reaches into the zip directory",
    ),
    "2 to the 63 bytes": (
        archive(Entry(local=DESCRIBED, central=LONG | {"extra": extra(1 << 63, 1 << 63)})),
        "reaches into the zip directory",
    ),
    "a record in a record": (
        archive(OUTER, Entry(INNER.name, INNER.data, central={"offset": INNER_OFFSET})),
        "'archive/data/1' overlaps the record before it",
    ),
    "an empty record in a record": (
        archive(
            Entry(OUTER.name, b"...." + Entry(INNER.name, b"").stored()),
            Entry(INNER.name, b"", central={"offset": INNER_OFFSET}),
        ),
        "'archive/data/1' overlaps the record before it",
    ),
    "a record that runs into the next": (
        archive(Entry(local=DESCRIBED, central={"packed": 90, "size": 90}), OUTER),
        "'archive/data/0' overlaps the record before it",
    ),
}


@pytest.mark.parametrize(("data", "words"), HOSTILE.values(), ids=HOSTILE)
def test_an_archive_that_lies_is_refused(path: Path, data: bytes, words: str) -> None:
    path.write_bytes(data)
    found = problem(path)
    assert found.kind == "damaged"
    assert words in found.message


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_what_python_compresses_is_refused(path: Path, method: int) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", bytes(1000))
    assert problem(path) == Problem(
        "damaged", str(path), "record 'archive/data.pkl' is compressed; PyTorch stores its records as they are"
    )


WITHOUT_END = {
    "nothing": b"",
    "the last byte cut off": archive(Entry())[:-1],
    "the end record cut off": archive(Entry())[:-22],
    "too much after it": archive(Entry()) + bytes(70_000),
}


@pytest.mark.parametrize("data", WITHOUT_END.values(), ids=WITHOUT_END)
def test_an_archive_without_its_end_is_incomplete(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    found = problem(path)
    assert found.kind == "incomplete"
    assert "download it again" in found.message


@pytest.mark.parametrize("data", GOOD.values(), ids=GOOD)
def test_an_archive_cut_short_anywhere_is_refused(path: Path, data: bytes) -> None:
    for size in range(len(data)):
        path.write_bytes(data[:size])
        problem(path)


def test_a_large_directory_is_not_read(path: Path) -> None:
    """A sparse file that claims a directory of a gigabyte."""
    size = 1 << 30
    end = archive(here=0, count=0, start=0, size=size)
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(size)
        file.write(end)
    assert "claims 1,073,741,824 bytes" in problem(path).message
    path.unlink()


# damage


def assert_records_are_apart(path: Path, records: Mapping[str, Record]) -> None:
    """Every record lies within the file, and none in another."""
    end = 0
    for record in sorted((record for record in records.values() if record.size), key=lambda record: record.offset):
        assert record.offset >= end
        end = record.offset + record.size
    assert end <= path.stat().st_size


@settings(max_examples=350)
@given(data=st.data())
def test_damage_is_refused_or_leaves_records_apart(path: Path, data: st.DataObject) -> None:
    damaged = bytearray(data.draw(st.sampled_from(list(GOOD.values()))))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    with open_source(path) as source:
        try:
            records = read_records(source)
        except CheckpointError:
            return
    assert_records_are_apart(path, records)


@given(st.binary(max_size=100))
def test_any_bytes_are_refused_for_a_directory(path: Path, data: bytes) -> None:
    path.write_bytes(data + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, len(data), 0, 0))
    problem(path)
