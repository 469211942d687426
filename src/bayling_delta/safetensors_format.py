"""The safetensors header: parsed from a file, laid out for one.

The format in a line: eight bytes little-endian N, N bytes of JSON, the data without holes.
Source: safetensors README, "Format"; where the reference library is lenient, this reader is not.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bayling_delta.errors import CheckpointError, Problem, shown
from bayling_delta.sources import Source, read_bytes
from bayling_delta.strict_json import load_strict
from bayling_delta.tensors import DTYPES, RANK_CAP, TensorRef, one_view

__all__ = ["lay_out", "parse"]

_HEADER_CAP = 100_000_000
"""Bytes; the reference library's own limit."""
_VALUES_CAP = 16_000_000
"""Keys, values, tables and lists: some twelve for each of a million tensors."""
_NEWER_DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3", "F6_E3M2", "C64")


def parse(source: Source) -> dict[str, TensorRef]:
    """Return the file's tensors by name, in the order of their bytes, without reading any of them.

    Raises:
        CheckpointError: the header is not one that the format allows, or the file is shorter or longer
            than its header says.
    """
    path = source.path
    head = read_bytes(source, 0, 8)
    length = int.from_bytes(head, "little")
    if len(head) < 8:
        raise _damaged(path, f"has {source.size} bytes, too few for a safetensors header")
    if length > _HEADER_CAP:
        raise _damaged(path, f"its header claims {length:,} bytes; the format allows {_HEADER_CAP:,}")
    text = read_bytes(source, 8, length)
    if len(text) < length:
        raise _short(path, source.size, 8 + length)
    entries = _load_header(path, text)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "__metadata__ is not a table of strings")

    start = 8 + length
    in_order = sorted(_entry(path, start, name, entry) for name, entry in entries.items())
    position = start
    for begin, end, name, _ in in_order:
        if begin != position:
            wrong = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            raise _damaged(path, f"{shown(name)} {wrong}")
        position = end
    if source.size < position:
        raise _short(path, source.size, position)
    if source.size > position:
        raise _damaged(path, f"has {source.size - position:,} bytes after its last tensor")
    return {name: ref for _, _, name, ref in in_order}


def _load_header(path: Path, text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise _damaged(path, "its header does not begin with '{'; this is not a safetensors file")
    try:
        entries: dict[str, Any] = load_strict(text, _VALUES_CAP)
    except ValueError as error:
        raise _damaged(path, f"its header is not JSON ({error})") from error
    return entries


def _entry(path: Path, start: int, name: str, entry: Any) -> tuple[int, int, str, TensorRef]:
    """Where in the file one tensor begins and ends, its name and its reference; ``start`` is where the data begin."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _damaged(path, f"{shown(name)} lacks one of dtype, shape, data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype in _NEWER_DTYPES:
        raise CheckpointError(
            Problem(
                "unsupported", str(path), f"{shown(name)} has dtype {dtype}, which is not read here; quantised weights?"
            )
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _damaged(path, f"{shown(name)} has the unknown dtype {repr(dtype)[:80]}")
    if not _counts(shape) or len(shape) > RANK_CAP:
        raise _damaged(path, f"{shown(name)} has the shape {str(shape)[:80]}, which is not a list of sizes")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"{shown(name)} has the data_offsets {str(offsets)[:80]}, which are not a range")
    begin, end = offsets
    ref = one_view(path, start + begin, dtype, tuple(shape))
    if ref.nbytes != end - begin:
        raise _damaged(path, f"{shown(name)} is {ref}, {ref.nbytes:,} bytes, but has {end - begin:,}")
    return start + begin, start + end, name, ref


def _counts(values: object) -> bool:
    if not isinstance(values, list):
        return False
    for value in values:  # noqa: SIM110  # a generator takes twice as long, and there may be 100,000 tensors
        if type(value) is not int or not 0 <= value < 1 << 63:
            return False
    return True


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(Problem("damaged", str(path), what))


def _short(path: Path, size: int, needed: int) -> CheckpointError:
    return CheckpointError(
        Problem("incomplete", str(path), f"has {size:,} bytes, its header needs {needed:,}; download it again")
    )


def lay_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """Return a file's complete header, and where in that file each tensor starts.

    ``tensors`` are (name, dtype, shape), distinct in name; starts are bytes from the file's beginning.
    Wider dtypes come first, so that every tensor is aligned to its elements; within a width the caller's
    order stays. There are no gaps: the format allows none.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    starts: dict[str, int] = {}
    end = 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: -DTYPES[tensor[1]]):  # a stable sort
        starts[name], end = end, end + math.prod(shape) * DTYPES[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [starts[name], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # readers that map the file want the data 8-aligned
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}
