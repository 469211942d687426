"""PyTorch's zip checkpoints: read as torch.load reads them, or refused."""

import io
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.serialization import config

from bayling_delta.checkpoint import open_checkpoint
from bayling_delta.errors import CheckpointError, IntegrityError
from bayling_delta.sources import open_source
from bayling_delta.tensors import TensorRef
from bayling_delta.torch_format import parse
from tests.strategies import (
    TORCH_DTYPES,
    Described,
    Storage,
    pickled,
    read_tensor,
    row_major_bytes,
    state_dicts,
    write_archive,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("torch_format") / "pytorch_model.bin"


def parsed(path: Path) -> dict[str, TensorRef]:
    with open_source(path) as source:
        return parse(source)[0]


def assert_reads_as_torch_does(path: Path, tile_bytes: int = 1 << 20) -> None:
    """Names, their order, dtypes, shapes and bits."""
    expected = torch.load(path, weights_only=True)
    with open_source(path) as source:
        refs, _ = parse(source)
        assert list(refs) == list(expected)
        for name, ref in refs.items():
            tensor = expected[name]
            assert TORCH_DTYPES[ref.dtype] == tensor.dtype
            assert ref.shape == tuple(tensor.shape)
            assert read_tensor(source, ref, tile_bytes) == row_major_bytes(tensor), name


# what torch.save writes


@settings(max_examples=250)
@given(state=state_dicts(), tile_bytes=st.one_of(st.integers(0, 40), st.integers(41, 4000)))
def test_a_state_dict_is_what_torch_loads(path: Path, state: dict[str, Tensor], tile_bytes: int) -> None:
    torch.save(state, path)
    assert_reads_as_torch_does(path, tile_bytes)


@settings(max_examples=100)
@given(state=state_dicts())
def test_strides_are_kept_only_where_they_are_needed(path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, path)
    for name, ref in parsed(path).items():
        assert ref.in_order == state[name].is_contiguous()


def small() -> dict[str, Tensor]:
    """A matrix, its transposed, and a view into the middle of it."""
    whole = torch.arange(24.0).reshape(4, 6)
    return {"whole": whole, "transposed": whole.t(), "middle": whole[1:3, 2:4], "half": torch.arange(5).half()}


def test_a_renamed_file(tmp_path: Path) -> None:
    """The records keep the name under which the file was saved."""
    torch.save(small(), tmp_path / "pytorch_model-00001-of-00002.bin")
    (tmp_path / "pytorch_model-00001-of-00002.bin").rename(tmp_path / "other.name.pth")
    assert_reads_as_torch_does(tmp_path / "other.name.pth")


@pytest.mark.parametrize("name", ["模型.bin", "no suffix", "a.b.c.bin", "data.pkl"])
def test_a_file_of_any_name(tmp_path: Path, name: str) -> None:
    torch.save(small(), tmp_path / name)
    assert_reads_as_torch_does(tmp_path / name)


def test_a_file_saved_to_a_buffer(path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(small(), buffer)
    path.write_bytes(buffer.getvalue())
    assert_reads_as_torch_does(path)


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096, 1 << 15])
def test_a_file_of_any_alignment(path: Path, alignment: int) -> None:
    options: Any = config
    with options.patch({"save.storage_alignment": alignment}):
        torch.save(small(), path)
    assert_reads_as_torch_does(path)
    assert parsed(path)["whole"].views[0].offset % alignment == 0


def test_a_file_without_checksums(path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(small(), path)
    finally:
        torch.serialization.set_crc32_options(before)
    assert_reads_as_torch_does(path)
    with open_source(path) as source:
        assert parse(source)[1] == ()


def test_the_records_come_with_their_checksums(path: Path) -> None:
    torch.save(small(), path)
    with open_source(path) as source:
        _, records = parse(source)
    with zipfile.ZipFile(path) as archive:
        by_place = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    assert [(r.name, r.size, r.crc32) for r in records] == [(e.filename, e.file_size, e.CRC) for e in by_place]


def test_a_modules_state_dict(path: Path) -> None:
    module = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False), nn.BatchNorm1d(7), nn.LayerNorm(7).half())
    module[1].weight = module[0].weight
    torch.save(module.state_dict(), path)
    assert_reads_as_torch_does(path)
    refs = parsed(path)
    assert refs["0.weight"] == refs["1.weight"]


def test_parameters_that_a_module_holds(path: Path) -> None:
    torch.save(dict(nn.Linear(3, 2).named_parameters()), path)
    assert_reads_as_torch_does(path)


def test_more_tensors_than_one_byte_counts(path: Path) -> None:
    """The pickle then uses its longer instructions."""
    torch.save({f"layer.{number}": torch.full((300, 1), float(number)) for number in range(700)}, path)
    assert_reads_as_torch_does(path)


def test_an_empty_state_dict(path: Path) -> None:
    torch.save({}, path)
    assert parsed(path) == {}


def test_a_file_of_more_than_four_gigabytes(path: Path) -> None:
    """Sizes and offsets that need zip64; the file is sparse and takes no room."""
    large = torch.empty((1 << 32) + 4096, dtype=torch.uint8)
    state = {"large": large, "far": large[1 << 32 :][:64].view(8, 8).t(), "after": torch.arange(6.0)}
    with torch.serialization.skip_data():
        torch.save(state, path)
    refs = parsed(path)
    with path.open("r+b") as file:
        file.seek(refs["far"].views[0].offset)
        file.write(bytes(range(64)))
        file.seek(refs["after"].views[0].offset)
        file.write(row_major_bytes(state["after"]))
    expected = torch.load(path, weights_only=True, mmap=True)
    with open_source(path) as source:
        for name in ("far", "after"):
            assert read_tensor(source, refs[name], 10) == row_major_bytes(expected[name])
    assert expected["far"][0].tolist() == list(range(0, 64, 8))
    assert refs["large"].nbytes == large.nbytes
    del expected
    path.unlink()


# other writers of the same form


def rewritten(source: Path, target: Path, changes: Mapping[str, bytes | None]) -> Path:
    """Write an archive again with zipfile; records whose names end so get other bytes, or none and are left out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            ending = next((ending for ending in changes if name.endswith(ending)), None)
            data = old.read(name) if ending is None else changes[ending]
            if data is not None:
                new.writestr(name, data)
    return target


def test_a_file_without_newer_records(tmp_path: Path) -> None:
    """As PyTorch 1.6 to 2.0 wrote it: no byte order, no format version, no alignment, no serialization id."""
    torch.save(small(), tmp_path / "new.bin")
    newer = dict.fromkeys(["byteorder", ".format_version", ".storage_alignment", "serialization_id"])
    assert_reads_as_torch_does(rewritten(tmp_path / "new.bin", tmp_path / "old.bin", newer))


@pytest.mark.parametrize("limit", [0, 30, 100, 500])
def test_a_file_with_zip64_fields_that_it_does_not_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """The zipfile module is made to write sizes, offsets or both in the 64-bit form from ``limit`` on."""
    torch.save(small(), tmp_path / "plain.bin")
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    assert_reads_as_torch_does(rewritten(tmp_path / "plain.bin", tmp_path / "zip64.bin", {}))


def test_a_file_with_zip64_fields_in_the_local_headers_alone(tmp_path: Path) -> None:
    torch.save(small(), tmp_path / "plain.bin")
    with zipfile.ZipFile(tmp_path / "plain.bin") as old, zipfile.ZipFile(tmp_path / "zip64.bin", "w") as new:
        for name in old.namelist():
            with new.open(name, "w", force_zip64=True) as record:
                record.write(old.read(name))
    assert_reads_as_torch_does(tmp_path / "zip64.bin")


# what is refused


def write_torchscript(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


def write_big_endian(path: Path) -> None:
    torch.save(small(), path.with_suffix(".little"))
    rewritten(path.with_suffix(".little"), path, {"byteorder": b"big"})


def write_without_pickle(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "not a checkpoint")


def write_two_roots(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("one/data.pkl", pickled({}))
        archive.writestr("two/data.pkl", pickled({}))


def saving(value: Any, **options: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        torch.save(value, path, **options)

    return write


def parameter_with_an_attribute() -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(2))
    vars(parameter)["partition_dim"] = 1
    return parameter


W = torch.arange(4.0)
REFUSED: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "TorchScript": (write_torchscript, "unsupported", "is a TorchScript archive, a program and not a state dict"),
    "legacy": (saving({"w": W}, _use_new_zipfile_serialization=False), "unsupported", "from before 1.6"),
    "big-endian": (write_big_endian, "unsupported", "its numbers are big-endian"),
    "no data.pkl": (write_without_pickle, "unsupported", "it has no single ROOT/data.pkl"),
    "two roots": (write_two_roots, "unsupported", "it has no single ROOT/data.pkl"),
    "pickle protocol 4": (saving({"w": W}, pickle_protocol=4), "unsupported", "not of protocol 2"),
    "state dict in a table": (saving({"model": {"w": W}}), "unsupported", "'model' is a table in the table"),
    "training state": (saving({"model": OrderedDict(w=W), "epoch": 3}), "unsupported", "'model' is a table in the"),
    "a number": (saving({"w": W, "step": 3}), "unsupported", "'step' is a number, not a tensor"),
    "a flag": (saving({"w": W, "done": True}), "unsupported", "'done' is a flag, not a tensor"),
    "a fraction": (saving({"w": W, "rate": 0.5}), "unsupported", "'rate' is"),
    "a string": (saving({"w": W, "name": "llama"}), "unsupported", "'name' is a string, not a tensor"),
    "nothing": (saving({"w": W, "bias": None}), "unsupported", "'bias' is"),
    "a list": (saving({"w": W, "parts": [W]}), "unsupported", "'parts' is a list, not a tensor"),
    "a tuple": (saving({"w": W, "parts": (W, W)}), "unsupported", "'parts' is a tuple, not a tensor"),
    "an empty table": (saving({"w": W, "state": {}}), "unsupported", "'state' is a table, not a tensor"),
    "numbers for names": (saving({0: W}), "unsupported", "the state dict has a number for a name"),
    "a tensor alone": (saving(W), "unsupported", "the file holds a tensor, not a state dict"),
    "a list alone": (saving([W]), "unsupported", "the file holds a list, not a state dict"),
    "complex": (saving({"w": W.to(torch.complex64)}), "unsupported", "torch.ComplexFloatStorage"),
    "complex double": (saving({"w": W.to(torch.complex128)}), "unsupported", "torch.ComplexDoubleStorage"),
    "float8_e4m3fn": (saving({"w": W.to(torch.float8_e4m3fn)}), "unsupported", "torch._utils._rebuild_tensor_v3"),
    "float8_e5m2": (saving({"w": W.to(torch.float8_e5m2)}), "unsupported", "torch._utils._rebuild_tensor_v3"),
    "uint16": (saving({"w": W.to(torch.uint16)}), "unsupported", "torch._utils._rebuild_tensor_v3"),
    "uint64": (saving({"w": W.to(torch.uint64)}), "unsupported", "torch._utils._rebuild_tensor_v3"),
    "negated by a flag": (saving({"w": torch._neg_view(W)}), "unsupported", ""),
    "a module": (saving(nn.Linear(2, 2)), "unsafe_pickle", "torch.nn.modules.linear.Linear is not something"),
    "a size": (saving({"w": W, "shape": W.shape}), "unsafe_pickle", "torch.Size is not something"),
    "a dtype": (saving({"w": W, "dtype": W.dtype}), "unsafe_pickle", "torch.float32 is not something"),
    "bytes": (saving({"w": W, "raw": b"\0"}), "unsafe_pickle", "_codecs.encode is not something"),
    "a numpy array": (saving({"w": np.zeros(2)}), "unsafe_pickle", "_reconstruct is not something"),
    "a sparse tensor": (saving({"w": W.to_sparse()}), "unsafe_pickle", "_rebuild_sparse_tensor is not something"),
    "a tensor without data": (saving({"w": W.to("meta")}), "unsafe_pickle", "_rebuild_meta_tensor_no_storage is not"),
    "a parameter with attributes": (
        saving({"w": parameter_with_an_attribute()}),
        "unsafe_pickle",
        "torch._utils._rebuild_parameter_with_state is not something",
    ),
}


@pytest.mark.parametrize(("write", "kind", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_a_plain_state_dict_is_refused(
    tmp_path: Path, write: Callable[[Path], None], kind: str, words: str
) -> None:
    write(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "pytorch_model.bin")
    (problem,) = caught.value.problems
    assert problem.kind == kind
    assert problem.where == str(tmp_path / "pytorch_model.bin")
    assert words in problem.message


def test_a_pickle_of_a_hundred_megabytes_is_not_read(path: Path) -> None:
    write_archive(path, bytes(100_000_001), {})
    with pytest.raises(CheckpointError, match="its pickle has 100,000,001 bytes") as caught:
        parsed(path)
    assert caught.value.problems[0].kind == "unsupported"
    path.unlink()


# pickles that describe tensors wrongly; the storage has 24 elements of F32, 96 bytes

HALF, INT = Storage(torch.HalfStorage), Storage(torch.IntStorage)

WRONG = {
    "a storage that is not there": Described((4,), (1,), 0, Storage(key="1")),
    "a key that leaves the folder": Described((4,), (1,), 0, Storage(key="../data.pkl")),
    "more elements than the record": Described((4,), (1,), 0, Storage(elements=25)),
    "fewer elements than the record": Described((4,), (1,), 0, Storage(elements=23)),
    "no elements": Described((0,), (1,), 0, Storage(elements=0)),
    "negative elements": Described((4,), (1,), 0, Storage(elements=-24)),
    "a wider dtype than the record": Described((4,), (1,), 0, Storage(torch.DoubleStorage)),
    "a narrower dtype than the record": Described((4,), (1,), 0, HALF),
    "one element too many": Described((25,), (1,)),
    "one element too far": Described((4, 6), (6, 1), 1),
    "a stride too long": Described((2,), (24,)),
    "an offset past the end": Described((), (), 24),
    "a negative offset": Described((4,), (1,), -1),
    "a negative size": Described((-4,), (1,)),
    "two negative sizes": Described((-2, -2), (1, 1)),
    "a negative stride": Described((4,), (-1,), 3),
    "a stride missing": Described((4, 6), (1,)),
    "a stride too many": Described((4,), (1, 1)),
    "a size beyond 64 bits": Described((1 << 64,), (1,)),
    "a size beyond 64 bits, all one element": Described((1 << 70,), (0,)),
    "more elements than 64 bits count, all one": Described((1 << 40, 1 << 40), (0, 0)),
    "a size of 70 bits times nothing": Described((1 << 70, 0), (0, 0)),
    "sizes whose product wraps around": Described((1 << 32, 1 << 32), (1, 1)),
    "too many dimensions": Described((1,) * 65, (1,) * 65),
    "far more dimensions": Described((1,) * 10_000, (1,) * 10_000),
}


@pytest.mark.parametrize("tensor", WRONG.values(), ids=WRONG)
def test_a_wrong_description_is_refused(path: Path, tensor: Described) -> None:
    write_archive(path, pickled({"fine": Described((4, 6), (6, 1)), "wrong": tensor}), {"0": bytes(96)})
    with pytest.raises(CheckpointError) as caught:
        parsed(path)
    (problem,) = caught.value.problems
    assert problem.kind == "damaged"
    assert problem.where == str(path)


def test_a_storage_cannot_have_two_dtypes(path: Path) -> None:
    """PyTorch takes the first dtype that it meets for both, so that reading the second as it says would differ."""
    tensors = {"integers": Described((24,), (1,), 0, INT), "floats": Described((24,), (1,))}
    write_archive(path, pickled(tensors), {"0": bytes(96)})
    with pytest.raises(CheckpointError, match="storage"):
        parsed(path)


@pytest.mark.parametrize(
    "tensor",
    [
        Described((4, 6), (6, 1)),
        Described((), (), 23),
        Described((2, 12), (12, 1), 0),
        Described((1, 24), (1000, 1)),
        Described((1000, 1000), (0, 0), 23),
        Described((0, 5), (5, 1), 24),
    ],
)
def test_a_description_that_just_fits_is_read(path: Path, tensor: Described) -> None:
    write_archive(path, pickled({"w": tensor}), {"0": struct.pack("<24f", *range(24))})
    assert_reads_as_torch_does(path)


# damage


@pytest.fixture(scope="module")
def saved() -> bytes:
    buffer = io.BytesIO()
    torch.save(small(), buffer)
    return buffer.getvalue()


def test_a_file_cut_short_anywhere_is_refused(path: Path, saved: bytes) -> None:
    for size in range(len(saved)):
        path.write_bytes(saved[:size])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


@settings(max_examples=300)
@given(data=st.data())
def test_damage_is_refused_or_leaves_tensors_that_the_file_holds(path: Path, saved: bytes, data: st.DataObject) -> None:
    """Never another exception, and never a reference to bytes that are not there."""
    damaged = bytearray(saved)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(saved) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        checkpoint = open_checkpoint(path)
    except (CheckpointError, IntegrityError) as error:
        assert {problem.where for problem in error.problems} == {str(path)}  # noqa: PT017
    else:
        with open_source(path) as source:
            for ref in checkpoint.tensors.values():
                assert len(read_tensor(source, ref, 64)) == ref.nbytes


def test_a_tensor_that_repeats_a_few_elements_forever_is_refused(tmp_path: Path) -> None:
    """Legal, and a small file that would take days to digest."""
    torch.save({"w": torch.zeros(1).expand(1 << 24, 1 << 24)}, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match="w repeats a storage of 4 bytes"):
        open_checkpoint(tmp_path / "x.bin")
