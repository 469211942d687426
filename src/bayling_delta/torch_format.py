"""PyTorch's zip checkpoints (``.bin``, ``.pt``, ``.pth`` since 1.6): from the archive to tensor references.

Layout: ``ROOT/data.pkl`` describes the tensors, ``ROOT/data/KEY`` are their storages, stored as they are;
several tensors may view one storage. Nothing in the file is executed: see `state_pickle`.
Source: torch/serialization.py, and files written by PyTorch 1.6 to 2.13.
"""

import math
import zlib
from operator import attrgetter
from pathlib import Path

from bayling_delta.downloads import download_again
from bayling_delta.errors import CheckpointError, IntegrityError, Problem, shown
from bayling_delta.sources import Source, read_bytes
from bayling_delta.state_pickle import PickleError, TensorSpec, read_state_dict
from bayling_delta.tensors import DTYPES, RANK_CAP, TensorRef, one_view, row_major
from bayling_delta.zip_records import Record, read_records

__all__ = ["parse", "record_damage"]

_PICKLE_CAP = 100_000_000
"""Bytes; a model of 100,000 tensors needs some 25 million."""
_EXPANDED_CAP = 64 << 20
"""Bytes of a tensor that repeats its storage's elements; more would be a small file that takes forever."""
_FEW_ELEMENTS = 1024
_MOST_ALIASES = 8
"""How many times over all storages may be in tensors: tied weights are in two."""


def parse(source: Source) -> tuple[dict[str, TensorRef], tuple[Record, ...]]:
    """Return the tensors of a zip checkpoint by name, in the state dict's order, without reading any.

    With them, the archive's records in the order of their bytes, if the writer computed their CRC-32.

    Raises:
        CheckpointError: the archive or its pickle is damaged, not a plain state dict, or asks for
            something that no state dict needs.
        IntegrityError: the pickle's CRC-32 is wrong.
    """
    path = source.path
    records = read_records(source)
    roots = [name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise _unsupported(path, "is a zip archive, but not one of PyTorch's: it has no single ROOT/data.pkl")
    root = roots[0]
    if f"{root}constants.pkl" in records or any(name.startswith(f"{root}code/") for name in records):
        raise _unsupported(
            path,
            "is a TorchScript archive, a program and not a state dict; where you trust it, load it with "
            "torch.jit.load and save its state_dict() with safetensors.torch.save_file",
        )
    checked = any(record.crc32 for record in records.values())  # all 0 means: not computed
    _check_byte_order(source, records.get(f"{root}byteorder"), checked)
    pickle = records[f"{root}data.pkl"]
    if pickle.size > _PICKLE_CAP:
        raise _unsupported(path, f"its pickle has {pickle.size:,} bytes; at most {_PICKLE_CAP:,} are read")
    try:
        specs = read_state_dict(_read_record(source, pickle, checked))
    except PickleError as error:
        kind = "unsafe_pickle" if error.unsafe else "unsupported" if error.unsupported else "damaged"
        raise CheckpointError(Problem(kind, str(path), str(error))) from error
    dtypes: dict[str, str] = {}
    for name, spec in specs.items():
        if dtypes.setdefault(spec.storage.key, spec.storage.dtype) != spec.storage.dtype:
            raise _damaged(
                path,
                f"{shown(name)} lies in storage {shown(spec.storage.key)!r}, which another tensor gives another dtype",
            )
    refs = {name: _reference(path, root, records, name, spec) for name, spec in specs.items()}
    stored = {spec.storage.key: spec.storage.elements * DTYPES[spec.storage.dtype] for spec in specs.values()}
    if sum(ref.nbytes for ref in refs.values()) > _MOST_ALIASES * sum(stored.values()) + _EXPANDED_CAP:
        raise _unsupported(path, "its tensors repeat their storages over and over; save it after contiguous()")
    return refs, tuple(sorted(records.values(), key=attrgetter("offset"))) if checked else ()


def _read_record(source: Source, record: Record, checked: bool) -> bytes:
    """A small record, held against its CRC-32: one bit of the pickle can give a tensor another's place."""
    data = read_bytes(source, record.offset, record.size)
    if checked and zlib.crc32(data) != record.crc32:
        raise IntegrityError(record_damage(source.path, record.name))
    return data


def record_damage(path: Path, name: str) -> Problem:
    """The finding that a record's bytes are not those that were written."""
    again = f"download the file again: {download_again(path)}"
    return Problem("crc", str(path), f"record {shown(name)} is damaged: its CRC-32 is wrong; {again}")


def _check_byte_order(source: Source, record: Record | None, checked: bool) -> None:
    if record is None:  # writers before 2.1 did not say, and were little-endian
        return
    if record.size > 16:
        raise _damaged(source.path, "does not say in which order its numbers are")
    order = _read_record(source, record, checked)
    if order != b"little":
        raise _unsupported(
            source.path,
            f"its numbers are {order.decode('ascii', 'replace')}-endian; on a machine of that kind load it with "
            "torch.load and save it with safetensors.torch.save_file, which writes little-endian",
        )


def _reference(path: Path, root: str, records: dict[str, Record], name: str, spec: TensorSpec) -> TensorRef:
    storage = spec.storage
    item_bytes = DTYPES[storage.dtype]
    record = records.get(f"{root}data/{storage.key}")
    if record is None:
        raise _damaged(path, f"{shown(name)} lies in storage {shown(storage.key)!r}, which the archive does not have")
    if record.size != storage.elements * item_bytes:
        raise _damaged(
            path,
            f"{shown(name)} lies in a storage of {storage.elements:,} {storage.dtype} elements, "
            f"but its record has {record.size:,} bytes",
        )
    if len(spec.shape) != len(spec.strides) or len(spec.shape) > RANK_CAP:
        raise _damaged(path, f"{shown(name)} has {len(spec.shape)} dimensions and {len(spec.strides)} strides")
    if spec.offset < 0 or min(spec.shape + spec.strides, default=0) < 0:
        raise _damaged(path, f"{shown(name)} has a negative offset, size or stride")
    if math.prod(max(1, size) for size in spec.shape) * item_bytes >= 1 << 63:
        raise _damaged(path, f"{shown(name)} has more elements than can be counted")
    if math.prod(spec.shape) * item_bytes > max(record.size, _EXPANDED_CAP):
        raise _unsupported(
            path, f"{shown(name)} repeats a storage of {record.size:,} bytes; save it after contiguous()"
        )
    if 0 not in spec.shape:
        last = spec.offset + sum((size - 1) * stride for size, stride in zip(spec.shape, spec.strides, strict=True))
        if last >= storage.elements:
            raise _damaged(path, f"{shown(name)} reaches to element {last:,} of a storage of {storage.elements:,}")
    if math.prod(spec.shape) > _FEW_ELEMENTS and _overlaps(spec):
        what = f"{shown(name)} has elements that lie in each other's place"
        raise _unsupported(path, f"{what}; save it after contiguous()")
    contiguous = 0 in spec.shape or all(
        size == 1 or stride == expected
        for size, stride, expected in zip(spec.shape, spec.strides, row_major(spec.shape), strict=True)
    )
    offset = record.offset + spec.offset * item_bytes
    return one_view(path, offset, storage.dtype, spec.shape, None if contiguous else spec.strides)


def _overlaps(spec: TensorSpec) -> bool:
    """Whether elements share a place otherwise than by a stride of 0; such would be read one by one."""
    span = 1  # from the first element to the last, in the dimensions so far
    for stride, size in sorted(zip(spec.strides, spec.shape, strict=True)):
        if size > 1 and 0 < stride < span:
            return True
        span += max(0, size - 1) * stride
    return False


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(Problem("damaged", str(path), what))


def _unsupported(path: Path, what: str) -> CheckpointError:
    return CheckpointError(Problem("unsupported", str(path), what))
