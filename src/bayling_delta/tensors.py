"""Where tensors lie on disk, whatever kind of file holds them."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DTYPES", "FLOATS", "RANK_CAP", "TORCH_NAMES", "TensorRef", "View", "natural_key", "one_view", "row_major"]

DTYPES: dict[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes per element, by the names safetensors uses (its README, "Format")."""

RANK_CAP = 32
"""Dimensions that a tensor may have; the limit of numpy 1, and far above any model's."""

FLOATS = ("F16", "BF16", "F32")
"""What a recipe adds and a result may have."""

TORCH_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
"""What torch, config.json and the command line call the dtypes that have fractions."""


@dataclass(frozen=True, slots=True)
class View:
    """Elements that lie at regular distances in one file."""

    file: Path
    offset: int
    """Byte of the first element, from the start of the file."""
    shape: tuple[int, ...]
    """Empty for a scalar."""
    strides: tuple[int, ...] | None = None
    """Elements from one index to the next, per dimension; None where the elements lie in row-major order."""

    @property
    def elements(self) -> int:
        """How many the shape says."""
        return math.prod(self.shape)

    @property
    def steps(self) -> tuple[int, ...]:
        """The strides, whether or not they are those of row-major order."""
        return row_major(self.shape) if self.strides is None else self.strides


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One tensor's elements, little-endian: those of a view of a file, or of a few views joined along an axis.

    In torch's words it is ``cat(views, axis).reshape(shape)``. A tensor in a safetensors file is one view, and so
    is a view into a storage of a ``.bin`` file; one that Meta's releases cut into parts is a view for each part.
    Nothing behind the format modules asks what kind of file it reads.
    """

    dtype: str
    """A key of `DTYPES`."""
    shape: tuple[int, ...]
    """Empty for a scalar. A single view may have another shape of as many elements."""
    views: tuple[View, ...]
    """One at least."""
    axis: int = 0
    """0, where the views follow one another; 1, where they are matrices of which each has a piece of every row."""

    @property
    def elements(self) -> int:
        """How many the shape says."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor itself, which a strided view's extent in the file may exceed."""
        return math.prod(self.shape) * DTYPES[self.dtype]

    @property
    def in_order(self) -> bool:
        """Whether the elements lie in row-major order, view after view."""
        return not self.axis and all(view.strides is None for view in self.views)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def one_view(
    file: Path, offset: int, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...] | None = None
) -> TensorRef:
    """The tensor that is a single view of a file."""
    return TensorRef(dtype, shape, (View(file, offset, shape, strides),))


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a tensor of this shape that lies in row-major order."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def natural_key(name: str) -> tuple[tuple[int, str], ...]:
    """A sort key that compares the numbers in names as numbers, so that shard 10 follows shard 9."""
    parts: list[tuple[int, str]] = []
    for place, part in enumerate(re.split("([0-9]+)", name)):  # text and digits take turns
        digits = part.lstrip("0")
        parts.append((len(digits), digits) if place % 2 else (0, part))
    return tuple(parts)
