"""Where tensors lie on disk, whatever kind of file holds them."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DTYPES", "FLOATS", "TORCH_NAMES", "TensorRef", "natural_key", "row_major"]

DTYPES: dict[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes per element, by the names safetensors uses (its README, "Format")."""

FLOATS = ("F16", "BF16", "F32")
"""What a recipe adds and a result may have."""

TORCH_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
"""What torch, config.json and the command line call the dtypes that have fractions."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One tensor's elements: a strided, little-endian view of a file's bytes.

    A tensor in a safetensors file and a view into a storage of a ``.bin`` file both come down to this,
    so nothing behind the format modules asks what kind of file it reads.
    """

    file: Path
    offset: int
    """Byte of the first element, from the start of the file."""
    dtype: str
    """A key of `DTYPES`."""
    shape: tuple[int, ...]
    """Empty for a scalar."""
    strides: tuple[int, ...] | None = None
    """Elements from one index to the next, per dimension; None where the elements lie in row-major order."""

    @property
    def elements(self) -> int:
        """How many the shape says."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor itself, which a strided view's extent in the file may exceed."""
        return math.prod(self.shape) * DTYPES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


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
