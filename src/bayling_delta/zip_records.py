"""The records of a zip archive as PyTorch writes it: where each lies, checked before it is believed.

Not a general zip reader. PyTorch stores every record uncompressed, one after the other, with the central
directory at the end; whatever differs from that is refused. Source: APPNOTE.TXT 6.3.10, sections 4.3 and
4.5; PyTorch's caffe2/serialize/inline_container.cc for what it writes.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

from bayling_delta.errors import CheckpointError, Problem, shown
from bayling_delta.sources import Source, read_bytes

__all__ = ["Record", "read_records"]

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_ENCRYPTED, _DESCRIPTOR_FOLLOWS = 0x0001, 0x0008
_DIRECTORY_CAP = 100_000_000
"""Bytes of central directory that are read; some 100 a record, so a million records pass."""


@dataclass(frozen=True, slots=True)
class Record:
    """One stored file of the archive."""

    name: str
    offset: int
    """Byte of its data's start, from the start of the archive."""
    size: int
    crc32: int
    """As the central directory has it; 0 where the writer was told not to compute it."""


def read_records(source: Source) -> dict[str, Record]:
    """Return the archive's records by name, in the order of the central directory.

    Reads the directory and each record's local header, no data.

    Raises:
        CheckpointError: the archive is cut short, or is not as PyTorch writes one.
    """
    path = source.path
    count, start, size = _find_directory(source)
    if size > _DIRECTORY_CAP:
        raise _damaged(path, f"its zip directory claims {size:,} bytes; at most {_DIRECTORY_CAP:,} are read")
    directory = read_bytes(source, start, size)
    if len(directory) < size or count * _CENTRAL.size > size:
        raise _damaged(path, "its zip directory does not fit the file")
    claimed: dict[str, tuple[int, Record]] = {}
    position = 0
    for _ in range(count):
        header_offset, record, position = _central_entry(path, directory, position)
        if record.name in claimed:
            raise _damaged(path, f"its zip directory has {shown(record.name)!r} twice")
        claimed[record.name] = header_offset, record
    if position != size:
        raise _damaged(path, "its zip directory has bytes after its last entry")
    source.expect((offset, _local_bytes(name)) for name, (offset, _) in claimed.items() if offset < start)
    records = {name: _place(source, offset, record, limit=start) for name, (offset, record) in claimed.items()}
    end = 0
    for header_offset, name in sorted((offset, name) for name, (offset, _) in claimed.items()):
        if header_offset < end:
            raise _damaged(path, f"record {shown(name)!r} overlaps the record before it")
        end = records[name].offset + records[name].size
    return records


def _find_directory(source: Source) -> tuple[int, int, int]:
    """The number of records, and the directory's start and size in bytes."""
    path = source.path
    tail_start = max(0, source.size - (_END.size + 0xFFFF))
    tail = read_bytes(source, tail_start, source.size - tail_start)
    place = tail.rfind(b"PK\x05\x06")
    if place < 0 or len(tail) - place < _END.size:
        raise CheckpointError(
            Problem(
                "incomplete",
                str(path),
                f"has {source.size:,} bytes and no zip directory at its end: the download was cut short; "
                "download it again",
            )
        )
    _, disk, start_disk, here, count, size, start, comment = _END.unpack_from(tail, place)
    if disk or start_disk or here != count:
        raise _damaged(path, "is one part of a zip archive of several")
    if place + _END.size + comment != len(tail):
        raise _damaged(path, "has bytes after its zip directory")
    end = tail_start + place
    locator = read_bytes(source, end - _END64_LOCATOR.size, _END64_LOCATOR.size) if end >= _END64_LOCATOR.size else b""
    if locator.startswith(b"PK\x06\x07"):
        _, _, end64, _ = _END64_LOCATOR.unpack(locator)
        if not end64 <= end - _END64_LOCATOR.size - _END64.size:
            raise _damaged(path, "its zip64 end record lies outside the file")
        fields = _END64.unpack(read_bytes(source, end64, _END64.size))
        if fields[0] != b"PK\x06\x06" or fields[4] or fields[5] or fields[6] != fields[7]:
            raise _damaged(path, "its zip64 end record is not one")
        count64, size64, start64 = fields[7], fields[8], fields[9]
        for small, large, full in ((count, count64, 0xFFFF), (size, size64, 0xFFFFFFFF), (start, start64, 0xFFFFFFFF)):
            if small not in (large, full):
                raise _damaged(path, "its two zip end records contradict each other")
        count, size, start, end = count64, size64, start64, end64
    if start + size != end:
        raise _damaged(path, "its zip directory does not end where its end record begins")
    return count, start, size


def _central_entry(path: Path, directory: bytes, position: int) -> tuple[int, Record, int]:
    """Parse one entry; return its local header's offset, the record as claimed, and where the next one starts."""
    if position + _CENTRAL.size > len(directory) or directory[position : position + 4] != b"PK\x01\x02":
        raise _damaged(path, "its zip directory ends in the middle of an entry")
    fields = _CENTRAL.unpack_from(directory, position)
    flags, method, crc32, packed, size = fields[3], fields[4], fields[7], fields[8], fields[9]
    name_bytes, extra_bytes, comment_bytes, header_offset = fields[10], fields[11], fields[12], fields[16]
    name_start = position + _CENTRAL.size
    extra_start = name_start + name_bytes
    after = extra_start + extra_bytes + comment_bytes
    if after > len(directory):
        raise _damaged(path, "its zip directory ends in the middle of an entry")
    try:
        name = directory[name_start:extra_start].decode("utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(path, "a record's name is not UTF-8") from error
    if 0xFFFFFFFF in (packed, size, header_offset):
        extra = directory[extra_start : extra_start + extra_bytes]
        size, packed, header_offset = _zip64(path, name, extra, (size, packed, header_offset))
    if flags & _ENCRYPTED:
        raise _damaged(path, f"record {shown(name)!r} is encrypted; PyTorch does not do that")
    if method and "/code/" in name:
        raise CheckpointError(
            Problem("unsupported", str(path), "is a TorchScript archive, a program and not a state dict")
        )
    if method or packed != size:
        raise _damaged(path, f"record {shown(name)!r} is compressed; PyTorch stores its records as they are")
    return header_offset, Record(name, 0, size, crc32), after


def _zip64(path: Path, name: str, extra: bytes, values: tuple[int, int, int]) -> tuple[int, int, int]:
    """Replace each value of 0xFFFFFFFF by the next number of the zip64 extra field (id 1)."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            needed = values.count(0xFFFFFFFF)
            if length < 8 * needed or position + 4 + length > len(extra):
                break
            numbers = iter(struct.unpack_from(f"<{needed}Q", extra, position + 4))
            first, second, third = (next(numbers) if value == 0xFFFFFFFF else value for value in values)
            return first, second, third
        position += 4 + length
    raise _damaged(path, f"record {shown(name)!r} lacks its zip64 sizes")


def _local_bytes(name: str) -> int:
    """Enough for a record's local header and what is looked at after it."""
    return _LOCAL.size + 2 * len(name.encode()) + 64


def _place(source: Source, header_offset: int, record: Record, limit: int) -> Record:
    """Check the record's local header, which alone says where its data starts, and return the record placed."""
    path, name = source.path, record.name
    head = read_bytes(source, header_offset, _local_bytes(name))
    if len(head) < _LOCAL.size or not head.startswith(b"PK\x03\x04"):
        raise _damaged(path, f"record {shown(name)!r} is not where the zip directory says")
    _, _, flags, method, _, _, _, packed, size, name_bytes, extra_bytes = _LOCAL.unpack_from(head)
    if head[_LOCAL.size : _LOCAL.size + name_bytes] != name.encode():
        raise _damaged(path, f"record {shown(name)!r} has another name in its local header")
    if method or flags & _ENCRYPTED:
        raise _damaged(path, f"record {shown(name)!r} is compressed or encrypted, its local header says")
    sizes = (record.size, 0xFFFFFFFF, 0) if flags & _DESCRIPTOR_FOLLOWS else (record.size, 0xFFFFFFFF)
    if packed not in sizes or size not in sizes:
        raise _damaged(path, f"record {shown(name)!r} has another size in its local header")
    offset = header_offset + _LOCAL.size + name_bytes + extra_bytes
    if offset + record.size > limit:
        raise _damaged(path, f"record {shown(name)!r} reaches into the zip directory")
    return Record(name, offset, record.size, record.crc32)


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(Problem("damaged", str(path), what))
