"""Strided and joined tensors against torch's own row-major copy of them."""

import hashlib
import math
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayling_delta import system
from bayling_delta.errors import CheckpointError
from bayling_delta.gathering import block_bytes, elements_digest, read_elements, tile_memory, tiles
from bayling_delta.sources import Source, open_source
from bayling_delta.system import ALIGNMENT
from bayling_delta.tensors import DTYPES, TensorRef, one_view
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
        ref = one_view(path, self.offset * DTYPES[self.dtype], self.dtype, self.shape, self.strides)
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
        sizes = [tile.nbytes for tile in tiles({path: source}, ref, tile_memory(max(tile_bytes, DTYPES[ref.dtype])))]
    assert all(0 < size <= max(tile_bytes, DTYPES[ref.dtype]) for size in sizes)


@settings(max_examples=150)
@given(view=views(), tile_bytes=st.integers(8, 3000), data=st.data())
def test_any_range_of_a_tile_can_be_copied(path: Path, view: View, tile_bytes: int, data: st.DataObject) -> None:
    ref, expected = view.write(path)
    item_bytes = DTYPES[ref.dtype]
    with open_source(path) as source:
        for tile in tiles({path: source}, ref, tile_memory(max(tile_bytes, DTYPES[ref.dtype]))):
            cuts = st.integers(0, tile.nbytes // item_bytes)
            first, last = sorted((data.draw(cuts), data.draw(cuts)))
            part = bytearray((last - first) * item_bytes)
            tile.copy(memoryview(part), first * item_bytes)
            assert part == expected[tile.start :][first * item_bytes : last * item_bytes]


@pytest.mark.parametrize("tile_bytes", [1, 10, 1000])
def test_a_tensor_that_lies_in_row_major_order_is_gathered_too(path: Path, tile_bytes: int) -> None:
    path.write_bytes(bytes(range(24)))
    ref = one_view(path, 4, "U8", (4, 5))
    with open_source(path) as source:
        found = b"".join(
            tile.values[0].tobytes()
            for tile in tiles({path: source}, ref, tile_memory(max(tile_bytes, DTYPES[ref.dtype])))
        )
    assert found == bytes(range(4, 24))


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
        first = next(tiles({path: source}, one_view(path, 0, "U8", (1 << 40, 4), (0, 0)), tile_memory(2)))
    assert first.values[0].tolist() == [[7, 7]]


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
        (tile,) = tiles({path: source}, ref, tile_memory(1 << 20))
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
    with system.using(counting), open_source(ref.views[0].file) as source:
        assert read_tensor(source, ref, 1 << 20) == expected
    assert counting.reads <= 1 + ref.elements // 10


# joined views


class Join(NamedTuple):
    """Views in a file each, joined along an axis."""

    views: tuple[View, ...]
    axis: int

    def write(self, directory: Path) -> tuple[TensorRef, bytes]:
        """Put each view into its file; return the reference to all, and the bytes of what torch makes of them."""
        refs: list[TensorRef] = []
        tensors: list[torch.Tensor] = []
        for number, view in enumerate(self.views):
            ref, data = view.write(directory / str(number))
            refs.append(ref)
            tensors.append(torch.tensor(bytearray(data), dtype=torch.uint8).view(TORCH_DTYPES[view.dtype]))
        whole = torch.cat([t.view(view.shape) for t, view in zip(tensors, self.views, strict=True)], self.axis)
        views = tuple(ref.views[0] for ref in refs)
        return TensorRef(refs[0].dtype, tuple(whole.shape), views, self.axis), row_major_bytes(whole)


def blocks(rows: int, half: int, columns: int, offset: int) -> View:
    """Heads of rows whose halves take turns in the file."""
    return View("F16", offset, (rows, 2, half, columns), (2 * half * columns, columns, 2 * columns, 1))


def matrix(rows: int, columns: int, offset: int, wider: int = 0) -> View:
    """Rows one after the other, or with something between them."""
    return View("F16", offset, (rows, columns), (columns + wider, 1))


@st.composite
def joins(draw: st.DrawFn, *, in_blocks: bool = False) -> Join:
    sizes, offsets = st.integers(1, 6), st.integers(0, 9)
    count, axis = draw(st.integers(1, 4)), draw(st.integers(0, 1))
    if axis:
        rows, wider = draw(sizes), 0 if in_blocks else draw(st.integers(0, 9))
        return Join(tuple(matrix(rows, draw(sizes), draw(offsets), wider) for _ in range(count)), 1)
    half, columns = draw(sizes), draw(sizes)
    return Join(tuple(blocks(draw(sizes), half, columns, draw(offsets)) for _ in range(count)), 0)


def opened(stack: ExitStack, ref: TensorRef, *, direct: bool = False) -> dict[Path, Source]:
    return {view.file: stack.enter_context(open_source(view.file, direct=direct)) for view in ref.views}


@settings(max_examples=150)
@given(join=joins(), tile_bytes=st.integers(0, 300), data=st.data())
def test_joined_views_are_what_torch_joins(path: Path, join: Join, tile_bytes: int, data: st.DataObject) -> None:
    """In tiles of any size, and in any range of them."""
    (path.parent / "parts").mkdir(exist_ok=True)
    ref, expected = join.write(path.parent / "parts")
    whole = b""
    with ExitStack() as stack:
        for tile in tiles(opened(stack, ref), ref, tile_memory(max(tile_bytes, DTYPES[ref.dtype]))):
            assert tile.start == len(whole)
            assert 0 < tile.nbytes <= max(tile_bytes, 2)
            part = bytearray(tile.nbytes)
            tile.copy(memoryview(part), 0)
            whole += part
            first, last = sorted(data.draw(st.integers(0, tile.nbytes // 2)) for _ in range(2))
            piece = bytearray(2 * (last - first))
            tile.copy(memoryview(piece), 2 * first)
            assert piece == part[2 * first : 2 * last]
    assert whole == expected
    assert elements_digest(ref) == hashlib.sha256(expected).digest()


@settings(max_examples=100)
@given(join=joins(), data=st.data())
def test_any_range_of_elements_can_be_read(path: Path, join: Join, data: st.DataObject) -> None:
    (path.parent / "parts").mkdir(exist_ok=True)
    ref, expected = join.write(path.parent / "parts")
    first, last = sorted(data.draw(st.integers(0, ref.elements)) for _ in range(2))
    with ExitStack() as stack:
        found = read_elements(opened(stack, ref), ref, first, last - first)
    assert found.tobytes() == expected[2 * first : 2 * last]


@settings(max_examples=60)
@given(join=joins(in_blocks=True), more=st.integers(0, 300), direct=st.booleans())
def test_what_lies_in_blocks_is_read_in_whole_runs(path: Path, join: Join, more: int, direct: bool) -> None:
    """Past the page cache too, in the least memory that is asked for; and each byte is seen once."""
    (path.parent / "parts").mkdir(exist_ok=True)
    ref, expected = join.write(path.parent / "parts")
    seen: dict[Path, list[tuple[int, bytes]]] = {}

    def see(file: Path, offset: int, data: memoryview) -> None:
        seen.setdefault(file, []).append((offset, bytes(data)))

    block = block_bytes(ref)
    assert block == (len(expected) // ref.views[0].shape[0] if join.axis else 2 * math.prod(ref.views[0].shape[1:]))
    tile_bytes = block + 2 * ALIGNMENT * len(ref.views) + more
    whole = b""
    with ExitStack() as stack:
        for tile in tiles(opened(stack, ref, direct=direct), ref, tile_memory(max(tile_bytes, DTYPES[ref.dtype])), see):
            part = bytearray(tile.nbytes)
            tile.copy(memoryview(part), 0)
            whole += part
    assert whole == expected
    for view in ref.views:
        data = view.file.read_bytes()[view.offset : view.offset + 2 * view.elements]
        pieces = sorted(seen[view.file])
        assert pieces[0][0] == view.offset
        assert b"".join(piece for _, piece in pieces) == data


@pytest.mark.parametrize(
    ("view", "block"),
    [
        (View("F16", 0, (8, 6), (6, 1)), 12),
        (View("F16", 0, (8, 6), (1, 8)), 0),
        (View("F16", 0, (8, 6), (7, 1)), 0),
        (View("F16", 0, (2, 2, 4, 3), (24, 3, 6, 1)), 48),
        (View("F16", 0, (2, 2, 4, 3), (24, 3, 7, 1)), 0),
        (View("F16", 0, (1 << 20, 2, 1 << 21), (1 << 22, 1, 2)), 8 << 20),
        (View("F16", 0, (2, 2, 1 << 22), (1 << 23, 1, 2)), 0),  # a block that is too large
        (View("F16", 0, (4, 3), (0, 1)), 0),
        (View("F16", 0, (5,), (1,)), 2),
        (View("F16", 0, (), ()), 2),
    ],
)
def test_the_size_of_a_block(view: View, block: int) -> None:
    assert block_bytes(one_view(Path("w"), 0, view.dtype, view.shape, view.strides)) == block
