"""A few elements of a checkpoint: its small tensors, and rows of some large ones, within a fixed number of bytes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from bayling_delta.checkpoint import EMBEDDING, HEAD, is_rotary_buffer
from bayling_delta.gathering import tiles
from bayling_delta.sources import open_source
from bayling_delta.tensors import DTYPES, FLOATS, TensorRef, natural_key, row_major

__all__ = ["Sample", "is_norm", "kind_of", "take_samples"]

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


def kind_of(name: str) -> str:
    """A tensor's name with the number of its layer, and of its expert, replaced by ``*``."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def take_samples(tensors: Mapping[str, TensorRef]) -> tuple[list[Sample], list[Sample]]:
    """Read the small tensors, norms before others, and rows of large ones of every kind; return both.

    What is read depends on names and shapes alone, not on the container. Rotary buffers are left out.

    Raises:
        CheckpointError: the system cannot read a file.
    """
    known = {
        name: ref
        for name, ref in sorted(tensors.items(), key=lambda item: natural_key(item[0]))
        if ref.dtype in FLOATS and ref.elements and not is_rotary_buffer(name)
    }
    norms = [name for name, ref in known.items() if is_norm(name, ref)]
    others = [name for name, ref in known.items() if len(ref.shape) < 2 and not is_norm(name, ref)]
    small = [*_spread(norms, _NORMS), *_spread(others, _OTHER_SMALL)]
    large = [*_large(known), *(name for name in (EMBEDDING, HEAD) if name in known and len(known[name].shape) > 1)]
    return (
        [_read(name, known[name], [_whole(known[name])]) for name in small],
        [_read(name, known[name], _rows(known[name])) for name in dict.fromkeys(large)],
    )


def _large(known: Mapping[str, TensorRef]) -> list[str]:
    """Two tensors of every kind, from different depths, as far as the number goes."""
    kinds: dict[str, list[str]] = {}
    for name, ref in known.items():
        if len(ref.shape) > 1:
            kinds.setdefault(kind_of(name), []).append(name)
    return _spread([name for names in kinds.values() for name in _spread(names, 2)], _LARGE)


def _spread(items: Sequence[_Item], most: int) -> list[_Item]:
    """All of the items, or ``most`` at even distances."""
    if len(items) <= most:
        return list(items)
    return [items[(2 * place + 1) * len(items) // (2 * most)] for place in range(most)]


def _whole(ref: TensorRef) -> TensorRef:
    return TensorRef(
        ref.file, ref.offset, ref.dtype, tuple(min(size, _SMALL_ELEMENTS) for size in ref.shape), ref.strides
    )


def _rows(ref: TensorRef) -> list[TensorRef]:
    """The beginnings of some rows, each a view of its own."""
    strides = ref.strides or row_major(ref.shape)
    shape = (min(ref.shape[-1], _ROW_ELEMENTS),)
    return [
        TensorRef(ref.file, ref.offset + row * strides[0] * DTYPES[ref.dtype], ref.dtype, shape, strides[-1:])
        for row in _spread(range(ref.shape[0]), _ROWS)
    ]


def _read(name: str, ref: TensorRef, parts: Iterable[TensorRef]) -> Sample:
    with open_source(ref.file) as source:
        pieces = [tile.values.reshape(-1).copy() for part in parts for tile in tiles(source, part, part.nbytes)]
    return Sample(name, ref.dtype, np.concatenate(pieces))
