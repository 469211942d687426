"""Strided tensors against torch's own row-major copy of them."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayling_delta import system
from bayling_delta.errors import CheckpointError
from bayling_delta.gathering import tiles
from bayling_delta.sources import open_source
from bayling_delta.tensors import DTYPES, TensorRef
from tests.strategies import TORCH_DTYPES, random_elements, read_tensor, row_major_bytes


class View(NamedTuple):
    """A strided view of random elements."""

    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def write(self, path: Path) -> tuple[TensorRef, bytes]:
        """Put its storage into a file; return its reference there, and the bytes that torch makes of it."""
        end = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)) + 1
        storage = random_elements(TORCH_DTYPES[self.dtype], end, seed=end)
        path.write_bytes(row_major_bytes(storage))
        ref = TensorRef(path, self.offset * DTYPES[self.dtype], self.dtype, self.shape, self.strides)
        return ref, row_major_bytes(storage.as_strided(self.shape, self.strides, self.offset))


@st.composite
def views(draw: st.DrawFn) -> View:
    sizes_and_strides = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 40)), max_size=5))
    return View(
        draw(st.sampled_from(sorted(TORCH_DTYPES))),
        draw(st.integers(0, 9)),
        tuple(size for size, _ in sizes_and_strides),
        tuple(stride for _, stride in sizes_and_strides),
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gathering") / "weights"


@settings(max_examples=200)
@given(view=views(), tile_bytes=st.one_of(st.integers(0, 64), st.integers(65, 30_000)))
def test_tiles_in_turn_are_the_row_major_tensor(path: Path, view: View, tile_bytes: int) -> None:
    """Whatever the strides: overlapping, repeating, in no order; and whatever fits a tile, one element at least."""
    ref, expected = view.write(path)
    with open_source(path) as source:
        assert read_tensor(source, ref, tile_bytes) == expected


@settings(max_examples=100)
@given(view=views(), tile_bytes=st.integers(0, 3000))
def test_a_tile_fits_the_memory_given(path: Path, view: View, tile_bytes: int) -> None:
    ref, _ = view.write(path)
    with open_source(path) as source:
        assert all(0 < tile.nbytes <= max(tile_bytes, DTYPES[ref.dtype]) for tile in tiles(source, ref, tile_bytes))


@settings(max_examples=150)
@given(view=views(), tile_bytes=st.integers(8, 3000), data=st.data())
def test_any_range_of_a_tile_can_be_copied(path: Path, view: View, tile_bytes: int, data: st.DataObject) -> None:
    ref, expected = view.write(path)
    item_bytes = DTYPES[ref.dtype]
    with open_source(path) as source:
        for tile in tiles(source, ref, tile_bytes):
            cuts = st.integers(0, tile.nbytes // item_bytes)
            first, last = sorted((data.draw(cuts), data.draw(cuts)))
            part = bytearray((last - first) * item_bytes)
            tile.copy(memoryview(part), first * item_bytes)
            assert part == expected[tile.start :][first * item_bytes : last * item_bytes]


@pytest.mark.parametrize("tile_bytes", [1, 10, 1000])
def test_a_tensor_that_lies_in_row_major_order_is_gathered_too(path: Path, tile_bytes: int) -> None:
    path.write_bytes(bytes(range(24)))
    ref = TensorRef(path, 4, "U8", (4, 5))
    with open_source(path) as source:
        assert b"".join(tile.values.tobytes() for tile in tiles(source, ref, tile_bytes)) == bytes(range(4, 24))


@pytest.mark.parametrize("tile_bytes", [4, 64, 4096])
def test_a_tensor_of_many_dimensions(path: Path, tile_bytes: int) -> None:
    shape = (1,) * 14 + (2, 1, 3)
    view = View("F32", 0, shape, (0,) * 14 + (1, 7, 2))
    ref, expected = view.write(path)
    with open_source(path) as source:
        assert read_tensor(source, ref, tile_bytes) == expected


def test_memory_does_not_depend_on_the_number_of_rows(path: Path) -> None:
    """One element, said to be four terabytes: the first tile comes all the same."""
    path.write_bytes(b"\x07")
    with open_source(path) as source:
        first = next(tiles(source, TensorRef(path, 0, "U8", (1 << 40, 4), (0, 0)), 2))
    assert first.values.tolist() == [[7, 7]]


class CountingSystem(system.PortableSystem):
    """Adds up what is read."""

    read_bytes = 0

    def read_into(self, handle: int, view: memoryview, offset: int) -> int:
        count = super().read_into(handle, view, offset)
        self.read_bytes += count
        return count


def test_an_expanded_element_is_read_once(path: Path) -> None:
    ref, _ = View("F32", 0, (1000, 4), (0, 1)).write(path)
    with system.using(CountingSystem()) as counting, open_source(path) as source:
        (tile,) = tiles(source, ref, 1 << 20)
    assert tile.nbytes == 16_000
    assert isinstance(counting, CountingSystem)
    assert counting.read_bytes == 16


@settings(max_examples=50)
@given(view=views(), tile_bytes=st.integers(0, 300))
def test_a_file_that_ends_too_early_is_told(path: Path, view: View, tile_bytes: int) -> None:
    ref, _ = view.write(path)
    path.write_bytes(path.read_bytes()[:-1])
    with open_source(path) as source, pytest.raises(CheckpointError) as caught:
        read_tensor(source, ref, tile_bytes)
    assert caught.value.problems[0].kind == "incomplete"
    assert caught.value.problems[0].where == str(path)


def test_the_oracle_is_not_ours() -> None:
    """`row_major_bytes` is what the other tests stand on: a case worked out by hand."""
    assert row_major_bytes(torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.uint8).t()) == bytes([1, 4, 2, 5, 3, 6])


CLOSE = [((100_003,), (3,)), ((700, 90), (200, 2)), ((90, 700), (2, 200)), ((5, 4001, 3), (1, 50, 7))]


@pytest.mark.parametrize(("shape", "strides"), CLOSE)
def test_runs_that_lie_close_together_are_read_together(
    tmp_path: Path, shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    """A stepped slice costs a call for a piece of the file, not one for each element."""

    class Counting(system.System):
        reads = 0

        def read_into(self, handle: int, view: memoryview, offset: int) -> int:
            self.reads += 1
            return super().read_into(handle, view, offset)

    ref, expected = View("F16", 11, shape, strides).write(tmp_path / "data")
    counting = Counting()
    with system.using(counting), open_source(ref.file) as source:
        assert read_tensor(source, ref, 1 << 20) == expected
    assert counting.reads <= 1 + ref.elements // 10
