"""What the tests are fed with: state dicts as PyTorch code makes them, and checkpoints that say what no one saved."""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from bayling_delta.gathering import tile_memory, tiles
from bayling_delta.sources import Source, read_bytes
from bayling_delta.tensors import DTYPES, TensorRef

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}
"""What a ``.bin`` file can hold and we read."""

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
"""Anything that UTF-8 can write."""


# state dicts


def random_elements(dtype: torch.dtype, count: int, seed: int) -> Tensor:
    """Elements of any bits: all the NaNs, infinities and subnormals that a dtype has."""
    values = 2 if dtype == torch.bool else 256
    random = torch.Generator().manual_seed(seed)
    return torch.randint(values, (count * dtype.itemsize,), generator=random, dtype=torch.uint8).view(dtype)


def _permuted(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    return tensor.permute(draw(st.permutations(range(tensor.ndim))))


def _stepped(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    if not tensor.ndim:
        return tensor
    axis = draw(st.integers(0, tensor.ndim - 1))
    start = draw(st.integers(0, tensor.shape[axis]))
    return tensor[(slice(None),) * axis + (slice(start, None, draw(st.integers(1, 3))),)]


def _narrowed(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    if not tensor.ndim:
        return tensor
    axis = draw(st.integers(0, tensor.ndim - 1))
    start = draw(st.integers(0, tensor.shape[axis]))
    return tensor.narrow(axis, start, draw(st.integers(0, tensor.shape[axis] - start)))


def _expanded(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    axis = draw(st.integers(0, tensor.ndim))
    return tensor.unsqueeze(axis).expand(*tensor.shape[:axis], draw(st.integers(0, 3)), *tensor.shape[axis:])


def _windowed(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    """Windows that overlap: an element has several places in the view."""
    if not tensor.ndim or not tensor.shape[-1]:
        return tensor
    return tensor.unfold(-1, draw(st.integers(1, tensor.shape[-1])), draw(st.integers(1, 2)))


_CHANGES: tuple[Callable[[st.DrawFn, Tensor], Tensor], ...] = (_permuted, _stepped, _narrowed, _expanded, _windowed)


@st.composite
def views(draw: st.DrawFn, storage: Tensor) -> Tensor:
    """A view of a flat tensor's storage, as slicing, transposing and expanding make it; row-major ones among them."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    if math.prod(shape) > storage.numel():
        shape = [storage.numel()]
    offset = draw(st.integers(0, storage.numel() - math.prod(shape)))
    view = storage[offset : offset + math.prod(shape)].view(shape)
    for change in draw(st.lists(st.sampled_from(_CHANGES), max_size=3)):
        view = change(draw, view)
    return view


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, Tensor]:
    """Tensors and parameters of every dtype, several in one storage, some of them twice."""
    storages = [
        random_elements(
            TORCH_DTYPES[draw(st.sampled_from(sorted(TORCH_DTYPES)))], draw(st.sampled_from([0, 1, 700])), seed
        )
        for seed in range(draw(st.integers(1, 3)))
    ]
    state: dict[str, Tensor] = {}
    for name in draw(st.lists(NAMES, unique=True, max_size=5)):
        if state and draw(st.integers(0, 4)) == 0:
            state[name] = next(iter(state.values()))
            continue
        tensor = draw(views(storages[draw(st.integers(0, len(storages) - 1))]))
        if draw(st.booleans()):
            tensor = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        state[name] = tensor
    if draw(st.booleans()):
        return state
    ordered = OrderedDict(state)
    if draw(st.booleans()):
        vars(ordered)["_metadata"] = OrderedDict({"": {"version": 1}, "layer": {}})  # as module.state_dict() has it
    return ordered


def row_major_bytes(tensor: Tensor) -> bytes:
    """What torch says a tensor's elements are, in row-major order, bit for bit."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().view(integers).contiguous().numpy().tobytes()


def read_tensor(source: Source, ref: TensorRef, tile_bytes: int) -> bytes:
    """What we say they are: from the file as they lie, or in tiles."""
    if ref.in_order:
        return read_bytes(source, ref.views[0].offset, ref.nbytes)
    whole = bytearray()
    for tile in tiles({source.path: source}, ref, tile_memory(max(tile_bytes, DTYPES[ref.dtype]))):
        assert tile.start == len(whole)
        part = bytearray(tile.nbytes)
        tile.copy(memoryview(part), 0)
        whole += part
    return bytes(whole)


# crafted checkpoints


@dataclass(frozen=True)
class Storage:
    """A storage as a pickle refers to it."""

    kind: Any = torch.FloatStorage
    key: Any = "0"
    elements: Any = 24


@dataclass(frozen=True)
class Described:
    """A tensor that is nothing but what a pickle says of it, true or not."""

    shape: tuple[Any, ...]
    strides: tuple[Any, ...]
    offset: Any = 0
    storage: Storage = field(default_factory=Storage)

    def __reduce__(self) -> tuple[Any, ...]:
        hooks: OrderedDict[str, Any] = OrderedDict()
        return torch._utils._rebuild_tensor_v2, (self.storage, self.offset, self.shape, self.strides, False, hooks)


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> Any:
        if isinstance(value, Storage):
            return "storage", value.kind, value.key, "cpu", value.elements
        return None


def pickled(value: object) -> bytes:
    """The pickle that `torch.save` would write of it."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def write_archive(path: Path, pickle_bytes: bytes, storages: Mapping[str, bytes], **others: bytes) -> Path:
    """Write a zip checkpoint of these records with Python's zipfile."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle_bytes)
        archive.writestr("archive/version", "3\n")
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
        for name, data in others.items():
            archive.writestr(f"archive/{name}", data)
    return path
