"""Safetensors headers: read and written as the reference library does, or refused."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor

from bayling_delta.errors import CheckpointError, Problem
from bayling_delta.safetensors_format import lay_out, parse
from bayling_delta.sources import open_source, read_bytes
from bayling_delta.tensors import DTYPES, TensorRef
from tests.strategies import NAMES, TORCH_DTYPES, random_elements, row_major_bytes

Specs = dict[str, tuple[str, tuple[int, ...]]]

ALL_DTYPES = TORCH_DTYPES | {"U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64}
WRITERS_ORDER = "U64 I64 F64 F32 U32 I32 BF16 F16 U16 I16 I8 U8 BOOL".split()
"""In which the reference library writes them (its enum Dtype, from the end)."""

SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
SPECS = st.dictionaries(
    NAMES.filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(ALL_DTYPES)), SHAPES),
    max_size=6,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("safetensors_format") / "model.safetensors"


def parsed(path: Path) -> dict[str, TensorRef]:
    with open_source(path) as source:
        return parse(source)


def problem(path: Path) -> Problem:
    with pytest.raises(CheckpointError) as caught:
        parsed(path)
    (found,) = caught.value.problems
    assert found.where == str(path)
    return found


def tensors(specs: Specs) -> dict[str, Tensor]:
    return {
        name: random_elements(ALL_DTYPES[dtype], math.prod(shape), seed).view(shape)
        for seed, (name, (dtype, shape)) in enumerate(specs.items())
    }


def assert_reads_as_the_reference_does(path: Path) -> None:
    """Names, dtypes, shapes and bytes."""
    deserialize: Any = safetensors.deserialize
    expected = {
        name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for name, entry in deserialize(path.read_bytes())
    }
    with open_source(path) as source:
        refs = parse(source)
        found = {name: (r.dtype, r.shape, read_bytes(source, r.views[0].offset, r.nbytes)) for name, r in refs.items()}
    assert found == expected


# what the reference library writes


@settings(max_examples=200)
@given(SPECS, st.one_of(st.none(), st.dictionaries(NAMES, NAMES, min_size=1, max_size=2)))
def test_a_file_is_what_the_reference_library_wrote(path: Path, specs: Specs, metadata: dict[str, str] | None) -> None:
    state = tensors(specs)
    save_file(state, path, metadata)
    assert_reads_as_the_reference_does(path)
    with open_source(path) as source:
        for name, ref in parse(source).items():
            assert ALL_DTYPES[ref.dtype] == state[name].dtype
            assert ref.in_order
            assert read_bytes(source, ref.views[0].offset, ref.nbytes) == row_major_bytes(state[name])


def test_every_dtype_is_known_by_its_name_and_size(path: Path) -> None:
    save_file({name: torch.zeros(3, dtype=dtype) for name, dtype in ALL_DTYPES.items()}, path)
    assert {name: (ref.dtype, ref.nbytes) for name, ref in parsed(path).items()} == {
        name: (name, 3 * dtype.itemsize) for name, dtype in ALL_DTYPES.items()
    }
    assert DTYPES.keys() == ALL_DTYPES.keys()


@pytest.mark.parametrize(
    "name",
    "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2 complex64".split(),
)
def test_a_dtype_that_no_recipe_adds_is_unsupported(path: Path, name: str) -> None:
    save_file({"fine": torch.zeros(2), "w": torch.zeros(8, dtype=torch.uint8).view(getattr(torch, name))}, path)
    found = problem(path)
    assert found.kind == "unsupported"
    assert "w has dtype" in found.message


# what it reads, though it would not write it


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    """A file with any header: bytes as they are, anything else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def entry(start: int, end: int, dtype: str = "U8", shape: list[int] | None = None, **more: object) -> dict[str, object]:
    """A tensor in a header; of bytes, where nothing else is said."""
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end], **more}


UNUSUAL: dict[str, tuple[object, bytes]] = {
    "nothing": ({}, b""),
    "metadata alone": ({"__metadata__": {"format": "pt"}}, b""),
    "empty metadata": ({"__metadata__": {}, "w": entry(0, 4)}, b"abcd"),
    "metadata last": ({"w": entry(0, 4), "__metadata__": {"a": "b"}}, b"abcd"),
    "another order": ({"b": entry(4, 6), "a": entry(0, 4), "c": entry(6, 7)}, b"abcdefg"),
    "a header without padding": (b'{"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', b"abcd"),
    "a header of odd length": (b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}} ', b"abcd"),
    "a header with much padding": (json.dumps({"w": entry(0, 4)}).encode() + b" " * 5000, b"abcd"),
    "a header on several lines": (json.dumps({"w": entry(0, 4)}, indent=2).encode(), b"abcd"),
    "tensors that are not aligned": ({"a": entry(0, 1), "b": entry(1, 9, "F64", [1])}, b"abcdefghi"),
    "more about a tensor": ({"w": entry(0, 4, note=[1, {"a": None}])}, b"abcd"),
    "scalars": ({"a": entry(0, 2, "F16", []), "b": entry(2, 4, "BF16", [])}, b"abcd"),
    "empty tensors between others": (
        {"d": entry(4, 4), "c": entry(0, 4), "b": entry(0, 0, "F32", [7, 0]), "a": entry(0, 0), "e": entry(4, 4)},
        b"abcd",
    ),
    "names in escapes": (b'{"\\u4e2d\\ud83d\\ude00\\n\\"":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', b"abcd"),
    "no name": ({"": entry(0, 4)}, b"abcd"),
    "a name that is nearly metadata": ({"__metadata__ ": entry(0, 4)}, b"abcd"),
}


@pytest.mark.parametrize(("header", "data"), UNUSUAL.values(), ids=UNUSUAL)
def test_what_is_unusual_is_read(path: Path, header: object, data: bytes) -> None:
    write(path, header, data)
    assert_reads_as_the_reference_does(path)


# what is refused

HUGE = 1 << 62
GOOD = b'{"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'


def said(dtype: str = '"U8"', shape: str = "[4]", offsets: str = "[0,4]") -> bytes:
    """The good header, but with something else in it."""
    return f'{{"w":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}'.encode()


HOSTILE: dict[str, tuple[object, str]] = {
    # not a header
    "no text": (b"", "does not begin with '{'"),
    "a list": ([entry(0, 4)], "does not begin with '{'"),
    "a string": (b'"w"', "does not begin with '{'"),
    "a space first": (b" " + GOOD, "does not begin with '{'"),
    "a byte order mark first": (b"\xef\xbb\xbf" + GOOD, "does not begin with '{'"),
    "UTF-16": (GOOD.decode().encode("utf-16-le"), "is not JSON"),
    "not UTF-8": (GOOD.replace(b"w", b"\xff"), "is not JSON"),
    "half a surrogate pair in UTF-8": (GOOD.replace(b"w", b"\xed\xa0\x80"), "is not JSON"),
    "a brace alone": (b"{", "is not JSON"),
    "cut short": (GOOD[:-1], "is not JSON"),
    "two objects": (GOOD + GOOD, "is not JSON"),
    "padded with NUL": (GOOD + b"\0\0\0", "is not JSON"),
    "a comma too many": (b'{"w":1,}', "is not JSON"),
    "single quotes": (GOOD.replace(b'"', b"'"), "is not JSON"),
    "a line break in a name": (GOOD.replace(b"w", b"\n"), "is not JSON"),
    "a number of 5000 digits": (said(shape=f"[{'1' * 5000}]"), "is not JSON"),
    # names twice
    "a tensor twice": (b'{"w":%b,"w":%b}' % ((json.dumps(entry(0, 4)).encode(),) * 2), "has 'w' twice"),
    "a tensor twice by an escape": (b'{"w":{},"\\u0077":{}}', "has 'w' twice"),
    "a dtype twice": (b'{"w":{"dtype":"F32","dtype":"U8","shape":[4],"data_offsets":[0,4]}}', "has 'dtype' twice"),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', "has '__metadata__' twice"),
    "a metadata name twice": (b'{"__metadata__":{"format":"pt","format":"tf"}}', "has 'format' twice"),
    "a name twice where nobody looks": (b'{"w":{"note":{"a":1,"a":2}}}', "has 'a' twice"),
    # metadata
    "a number in the metadata": ({"__metadata__": {"format": 1}}, "__metadata__ is not a table of strings"),
    "a table in the metadata": ({"__metadata__": {"format": {}}}, "__metadata__ is not a table of strings"),
    "nothing in the metadata": ({"__metadata__": {"format": None}}, "__metadata__ is not a table of strings"),
    "metadata that is a list": ({"__metadata__": ["pt"]}, "__metadata__ is not a table of strings"),
    "metadata that is a string": ({"__metadata__": "pt"}, "__metadata__ is not a table of strings"),
    "metadata that is null": ({"__metadata__": None}, "__metadata__ is not a table of strings"),
    "a tensor called __metadata__": ({"__metadata__": entry(0, 4)}, "__metadata__ is not a table of strings"),
    # entries
    "an entry that is a list": ({"w": []}, "w lacks one of dtype, shape, data_offsets"),
    "an entry that is a string": ({"w": "dtype shape data_offsets"}, "w lacks one of dtype, shape, data_offsets"),
    "an empty entry": ({"w": {}}, "w lacks one of dtype, shape, data_offsets"),
    "no offsets": ({"w": {"dtype": "U8", "shape": [4]}}, "w lacks one of dtype, shape, data_offsets"),
    "an unknown dtype": (said(dtype='"F17"'), "w has the unknown dtype 'F17'"),
    "a dtype in small letters": (said(dtype='"u8"'), "w has the unknown dtype 'u8'"),
    "a number for a dtype": (said(dtype="8"), "w has the unknown dtype 8"),
    "a list for a dtype": (said(dtype='["U8"]'), "w has the unknown dtype ['U8']"),
    "a shape that is a number": (said(shape="4"), "w has the shape 4"),
    "a shape that is null": (said(shape="null"), "w has the shape None"),
    "a shape that is a table": (said(shape='{"0":4}'), "w has the shape {"),
    "a negative size": (said(shape="[-4]"), "w has the shape [-4]"),
    "two negative sizes": (said(shape="[-2,-2]"), "w has the shape [-2, -2]"),
    "a fraction for a size": (said(shape="[4.0]"), "w has the shape [4.0]"),
    "a power for a size": (said(shape="[4e0]"), "w has the shape [4.0]"),
    "infinity for a size": (said(shape="[Infinity]"), "w has the shape [inf]"),
    "a flag for a size": (said(shape="[true,4]"), "w has the shape [True, 4]"),
    "a string for a size": (said(shape='["4"]'), "w has the shape ['4']"),
    "a list for a size": (said(shape="[[4]]"), "w has the shape [[4]]"),
    "a size beyond 63 bits": (said(shape=f"[{1 << 63}]"), "w has the shape [9223372036854775808]"),
    "a shape of 33 dimensions": (said(shape=str([1] * 32 + [4])), "w has the shape [1, 1"),
    "no offset": (said(offsets="[]"), "w has the data_offsets []"),
    "one offset": (said(offsets="[4]"), "w has the data_offsets [4]"),
    "three offsets": (said(offsets="[0,4,8]"), "w has the data_offsets [0, 4, 8]"),
    "offsets in the wrong order": (said(offsets="[4,0]"), "w has the data_offsets [4, 0]"),
    "a negative offset": (said(offsets="[-4,0]"), "w has the data_offsets [-4, 0]"),
    "a fraction for an offset": (said(offsets="[0.0,4.0]"), "w has the data_offsets [0.0, 4.0]"),
    "flags for offsets": (said(shape="[1]", offsets="[false,true]"), "w has the data_offsets [False, True]"),
    "an offset beyond 64 bits": (said(offsets=f"[0,{1 << 64}]"), "w has the data_offsets [0, 18446744073709551616]"),
    "offsets beyond 64 bits, wrapping": (said(offsets=f"[{1 << 64},{(1 << 64) + 4}]"), "w has the data_offsets ["),
    # sizes that contradict each other
    "a shape too large": (said(shape="[5]"), "w is U8 [5], 5 bytes, but has 4"),
    "a shape too small": (said(shape="[3]"), "w is U8 [3], 3 bytes, but has 4"),
    "a dtype too wide": (said(dtype='"F32"'), "w is F32 [4], 16 bytes, but has 4"),
    "a product that wraps to 4": (said(shape=f"[{HUGE + 1},4]"), "but has 4"),
    "a product that wraps to 0": (said(shape=f"[{HUGE},4]", offsets="[0,0]"), "but has 0"),
    "brackets by the million": (b'{"w":[' + b"[]," * 8_000_000 + b"1]}", "more than 16,000,000 values"),
    "32 huge dimensions": (said(shape=str([HUGE] * 32)), "but has 4"),
    "an empty tensor with bytes": (said(shape="[0]"), "w is U8 [0], 0 bytes, but has 4"),
    # places
    "a hole before": (said(offsets="[4,8]"), "w leaves a hole before it"),
    "a hole between": ({"a": entry(0, 1), "b": entry(3, 4)}, "b leaves a hole before it"),
    "an overlap": ({"a": entry(0, 3), "b": entry(2, 4)}, "b overlaps the tensor before it"),
    "the same place": ({"a": entry(0, 4), "b": entry(0, 4)}, "b overlaps the tensor before it"),
    "a tensor in a tensor": ({"a": entry(0, 4), "b": entry(1, 2)}, "b overlaps the tensor before it"),
    "an empty tensor in a tensor": ({"a": entry(0, 4), "b": entry(2, 2)}, "b overlaps the tensor before it"),
    "an empty tensor past the end": ({"a": entry(0, 4), "b": entry(5, 5)}, "b leaves a hole before it"),
    "bytes after the last": (said(shape="[3]", offsets="[0,3]"), "has 1 bytes after its last tensor"),
    "bytes and no tensors": ({}, "has 4 bytes after its last tensor"),
}


@pytest.mark.parametrize(("header", "words"), HOSTILE.values(), ids=HOSTILE)
def test_a_header_that_lies_is_refused(path: Path, header: object, words: str) -> None:
    """The data has four bytes, as the good header says."""
    write(path, header, b"abcd")
    found = problem(path)
    assert found.kind == "damaged"
    assert words in found.message
    assert len(found.message) < 4000


def test_the_good_header_is_good(path: Path) -> None:
    """The hostile headers differ from this one by their lie alone."""
    assert said() == GOOD
    write(path, GOOD, b"abcd")
    assert_reads_as_the_reference_does(path)


DEEP = 100_000


@pytest.mark.parametrize("left", [b"[", b'{"a":'])
@pytest.mark.parametrize(
    "around", ["%s", '{"w":%s}', '{"__metadata__":%s}', said(dtype="%s"), said(shape="%s"), said(offsets="%s")], ids=str
)
@pytest.mark.parametrize("depth", [50, 900, 950, 1000, DEEP])
def test_a_deeply_nested_header_is_refused(path: Path, around: str | bytes, left: bytes, depth: int) -> None:
    nested = left * depth + b"0" + (b"]" if left == b"[" else b"}") * depth
    whole = around if isinstance(around, bytes) else around.encode()
    write(path, whole.replace(b"%s", nested), b"abcd")
    assert problem(path).kind == "damaged"


@pytest.mark.parametrize("length", [100_000_001, 1 << 32, 1 << 63, (1 << 64) - 1])
def test_a_header_too_long_is_not_read(path: Path, length: int) -> None:
    write(path, GOOD, b"abcd", length)
    found = problem(path)
    assert found.kind == "damaged"
    assert f"claims {length:,} bytes; the format allows 100,000,000" in found.message


@pytest.mark.parametrize("size", range(8))
def test_a_file_too_short_for_a_header_is_refused(path: Path, size: int) -> None:
    path.write_bytes(bytes(size))
    assert problem(path).kind == "damaged"


def test_a_file_cut_short_in_its_header_or_data_is_incomplete(path: Path) -> None:
    """And the message says how much is missing."""
    save_file({"a": torch.zeros(5), "b": torch.zeros(3, dtype=torch.half)}, path)
    whole = path.read_bytes()
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    for size in range(8, len(whole)):
        path.write_bytes(whole[:size])
        needed = header_bytes if size < header_bytes else len(whole)
        assert problem(path) == Problem(
            "incomplete", str(path), f"has {size:,} bytes, its header needs {needed:,}; download it again"
        )


def test_a_name_of_half_a_surrogate_pair_does_not_get_a_tensor_lost(path: Path) -> None:
    """JSON can write it, UTF-8 cannot; whoever shows or writes names refuses it by then."""
    write(path, GOOD.replace(b"w", b"\\ud800"), b"abcd")
    assert list(parsed(path)) == ["\ud800"]


# damage


@settings(max_examples=250)
@given(data=st.data())
def test_damage_is_refused_or_read_as_the_reference_library_reads_it(path: Path, data: st.DataObject) -> None:
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(3).half(), "c": torch.zeros(0, 2)}
    damaged = bytearray(save(state, {"format": "pt"}))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        damaged[place] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'0123456789{}[]",: ')))
    path.write_bytes(damaged)
    try:
        parsed(path)
    except CheckpointError:
        return
    assert_reads_as_the_reference_does(path)


@settings(max_examples=200)
@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(["U8", "F32", "w"])),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(
                st.sampled_from(["w", "__metadata__", "dtype", "shape", "data_offsets"]), inner, max_size=4
            ),
        ),
        max_leaves=12,
    )
)
def test_any_json_is_refused_or_read_as_the_reference_library_reads_it(path: Path, header: Any) -> None:
    write(path, header)
    try:
        parsed(path)
    except CheckpointError:
        return
    assert_reads_as_the_reference_does(path)


# what is written


def in_writers_order(specs: Specs) -> list[tuple[str, str, tuple[int, ...]]]:
    """By dtype, then by name."""
    order = sorted(specs, key=lambda name: (WRITERS_ORDER.index(specs[name][0]), name))
    return [(name, *specs[name]) for name in order]


@settings(max_examples=200)
@given(SPECS)
def test_a_header_is_the_reference_writers(specs: Specs) -> None:
    """Byte for byte, for any names, dtypes and shapes, given in that writer's order."""
    header, starts = lay_out(in_writers_order(specs))
    state = tensors(specs)
    whole = save(state, {"format": "pt"})
    assert whole.startswith(header)
    assert starts.keys() == specs.keys()
    for name, start in starts.items():
        assert whole[start : start + state[name].nbytes] == row_major_bytes(state[name])


@given(SPECS, st.randoms(use_true_random=False))
def test_a_header_in_any_order_is_read_by_the_reference_library(path: Path, specs: Specs, random: Any) -> None:
    state = tensors(specs)
    order = [(name, *spec) for name, spec in specs.items()]
    random.shuffle(order)
    header, starts = lay_out(order)
    whole = bytearray(header) + bytes(sum(tensor.nbytes for tensor in state.values()))
    for name, start in starts.items():
        whole[start : start + state[name].nbytes] = row_major_bytes(state[name])
    path.write_bytes(whole)
    assert_reads_as_the_reference_does(path)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in state.items():
            assert row_major_bytes(file.get_tensor(name)) == row_major_bytes(tensor)


@given(SPECS)
def test_every_tensor_is_aligned_and_each_width_keeps_its_order(specs: Specs) -> None:
    header, starts = lay_out([(name, *spec) for name, spec in specs.items()])
    assert len(header) % 8 == 0
    widths: Mapping[str, int] = {name: ALL_DTYPES[dtype].itemsize for name, (dtype, _) in specs.items()}
    assert all(start % widths[name] == 0 for name, start in starts.items())
    for width in {1, 2, 4, 8}:
        kept = [name for name in specs if widths[name] == width]
        assert [name for name in starts if widths[name] == width] == kept
