"""A few elements of a checkpoint: its small tensors, and rows of some large ones, within a fixed number of bytes."""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from bayling_delta.checkpoint import EMBEDDING, HEAD, is_rotary_buffer
from bayling_delta.gathering import read_elements
from bayling_delta.sources import open_source
from bayling_delta.tensors import DTYPES, FLOATS, TensorRef, row_major

__all__ = ["Sample", "by_kind", "is_norm", "take_samples"]

# 512 x 16,384 + 32 x 8 x 512 elements of at most four bytes are below 35 MB.
_NORMS: Final = 384
_OTHER_SMALL: Final = 128
_SMALL_ELEMENTS: Final = 16_384
"""What is read of a small tensor at most: the norm weights of the largest models have as many."""
_LARGE: Final = 30
"""Large tensors, besides the embedding and the head."""
_ROWS: Final = 8
_ROW_ELEMENTS: Final = 512

_Item = TypeVar("_Item")
_Ranges = list[tuple[int, int]]
"""Of a tensor's elements in row-major order: (the first, how many)."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Some elements of one tensor."""

    name: str
    dtype: str
    """One of `FLOATS`."""
    bits: npt.NDArray[Any]
    """The elements as stored, in unsigned integers, one dimension."""

    @property
    def values(self) -> npt.NDArray[np.float32]:
        """The elements as numbers."""
        if self.dtype == "BF16":
            return (self.bits.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(invalid="ignore"):  # a signalling NaN
            return self.bits.view(np.float16 if self.dtype == "F16" else np.float32).astype(np.float32)

    @property
    def finite(self) -> npt.NDArray[np.float64]:
        """The elements that are neither infinite nor NaN."""
        values = self.values
        return values[np.isfinite(values)].astype(np.float64)


def is_norm(name: str, ref: TensorRef) -> bool:
    """Whether a tensor is the weight of a layer's or the model's norm."""
    return len(ref.shape) == 1 and name.endswith("norm.weight")


_NUMBER: Final = re.compile(r"(?<![^.])\d+(?![^.])")
"""A part of a dotted name that is a number."""


def by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    """Names that differ in nothing but numbers, of layers or experts, under that name with ``*`` for the numbers.

    Kinds and names are sorted, as plain strings: there may be 100,000.
    """
    kinds: dict[str, list[str]] = {}
    for name in sorted(names):
        kinds.setdefault(_NUMBER.sub("*", name), []).append(name)
    return dict(sorted(kinds.items()))


def take_samples(
    tensors: Mapping[str, TensorRef], kinds: Mapping[str, Sequence[str]]
) -> tuple[list[Sample], list[Sample]]:
    """Read the small tensors, norms before others, and rows of large ones of every kind; return both.

    ``kinds`` are those of the tensors. What is read depends on names and shapes alone, not on the container.
    Rotary buffers are left out.

    Raises:
        CheckpointError: the system cannot read a file.
    """
    norms: list[str] = []
    others: list[str] = []
    large: list[str] = []
    for names in kinds.values():
        known = [name for name in names if tensors[name].dtype in FLOATS and tensors[name].elements]
        if known and not is_rotary_buffer(known[0]):
            norms += [name for name in known if is_norm(name, tensors[name])]
            others += [name for name in known if len(tensors[name].shape) < 2 and not is_norm(name, tensors[name])]
            large += _spread([name for name in known if len(tensors[name].shape) > 1], 2)  # from different depths
    ends = [name for name in large if name in (EMBEDDING, HEAD)]
    small = [(name, _whole(tensors[name])) for name in (*_spread(norms, _NORMS), *_spread(others, _OTHER_SMALL))]
    rows = [(name, _rows(tensors[name])) for name in dict.fromkeys((*_spread(large, _LARGE), *ends))]
    _begin_reading([(tensors[name], ranges) for name, ranges in (*small, *rows)])
    return (
        [_read(name, tensors[name], ranges) for name, ranges in small],
        [_read(name, tensors[name], ranges) for name, ranges in rows],
    )


def _begin_reading(wanted: Iterable[tuple[TensorRef, _Ranges]]) -> None:
    """Have the system read what will be sampled, as far as it lies as it is indexed, while the first are waited for."""
    places: dict[Path, list[tuple[int, int]]] = {}
    for ref, ranges in wanted:
        if ref.in_order and len(ref.views) == 1:
            (view,), size = ref.views, DTYPES[ref.dtype]
            places.setdefault(view.file, []).extend((view.offset + first * size, n * size) for first, n in ranges)
    for path, here in places.items():
        with open_source(path) as source:
            source.expect(here)


def _spread(items: Sequence[_Item], most: int) -> list[_Item]:
    """All of the items, or ``most`` at even distances."""
    if len(items) <= most:
        return list(items)
    return [items[(2 * place + 1) * len(items) // (2 * most)] for place in range(most)]


def _whole(ref: TensorRef) -> _Ranges:
    """The beginning of a small tensor."""
    return [(0, min(ref.elements, _SMALL_ELEMENTS))]


def _rows(ref: TensorRef) -> _Ranges:
    """The beginnings of some rows."""
    stride = row_major(ref.shape)[0]
    return [(row * stride, min(ref.shape[-1], _ROW_ELEMENTS)) for row in _spread(range(ref.shape[0]), _ROWS)]


def _read(name: str, ref: TensorRef, ranges: _Ranges) -> Sample:
    with ExitStack() as stack:
        sources = {path: stack.enter_context(open_source(path)) for path in {view.file for view in ref.views}}
        return Sample(name, ref.dtype, np.concatenate([read_elements(sources, ref, *part) for part in ranges]))
