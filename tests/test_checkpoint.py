"""Directories and files of weights: opened as one table of tensors, or refused with every reason at once."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bayling_delta import system
from bayling_delta.checkpoint import open_checkpoint, stays_in_directory
from bayling_delta.errors import CheckpointError, Problem
from bayling_delta.sources import open_source
from bayling_delta.tensors import TensorRef
from tests.pairs import llama, save
from tests.strategies import read_tensor, row_major_bytes

STATE = {
    "model.embed_tokens.weight": torch.arange(12).half().view(4, 3),
    "model.layers.0.mlp.up_proj.weight": torch.arange(6.0).view(3, 2).bfloat16(),
    "model.layers.0.input_layernorm.weight": torch.arange(3.0),
    "model.norm.weight": torch.arange(3).half(),
    "lm_head.weight": torch.arange(12, 24).half().view(4, 3),
}
CONTAINERS = pytest.mark.parametrize("container", ["torch", "safetensors"])
SINGLE = {"torch": "pytorch_model.bin", "safetensors": "model.safetensors"}
INDEX = {container: f"{file}.index.json" for container, file in SINGLE.items()}


def shard(container: str, number: int, count: int) -> str:
    stem, suffix = SINGLE[container].split(".")
    return f"{stem}-{number:05}-of-{count:05}.{suffix}"


def assert_holds(tensors: Mapping[str, TensorRef], state: Mapping[str, Tensor]) -> None:
    """The references lead to the state dict's bytes."""
    assert tensors.keys() == state.keys()
    for name, ref in tensors.items():
        with open_source(ref.views[0].file) as source:
            assert read_tensor(source, ref, 1 << 20) == row_major_bytes(state[name])


def problems(path: Path) -> list[Problem]:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return list(caught.value.problems)


def problem(path: Path) -> Problem:
    (found,) = problems(path)
    return found


def rewrite_index(directory: Path, container: str, changes: Mapping[str, Any]) -> Path:
    """Put other files, or none, for some tensors of the weight map."""
    index = directory / INDEX[container]
    document = json.loads(index.read_text())
    weight_map = document["weight_map"] | dict(changes)
    document["weight_map"] = {name: file for name, file in weight_map.items() if file is not None}
    index.write_text(json.dumps(document))
    return index


# what is opened


@CONTAINERS
@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("index", [True, False])
def test_a_directory_is_opened(tmp_path: Path, container: str, shards: int, index: bool) -> None:
    directory = save(tmp_path / "model", STATE, container=container, shards=shards, index=index, config={"a": 1})
    checkpoint = open_checkpoint(directory)
    assert_holds(checkpoint.tensors, STATE)
    assert (checkpoint.path, checkpoint.directory, checkpoint.container) == (directory, directory, container)
    assert checkpoint.config == {"a": 1}
    assert checkpoint.notes == ()
    names = [SINGLE[container]] if shards == 1 else [shard(container, n + 1, shards) for n in range(shards)]
    assert [file.path.name for file in checkpoint.files] == names
    for file in checkpoint.files:
        status = file.path.stat()
        assert file.stamp == (status.st_size, status.st_mtime_ns)


@CONTAINERS
def test_an_index_can_be_named(tmp_path: Path, container: str) -> None:
    directory = save(tmp_path / "model", STATE, container=container, shards=3)
    checkpoint = open_checkpoint(directory / INDEX[container])
    assert_holds(checkpoint.tensors, STATE)
    assert (checkpoint.path, checkpoint.directory) == (directory / INDEX[container], directory)
    assert len(checkpoint.files) == 3


@CONTAINERS
def test_a_file_can_be_named(tmp_path: Path, container: str) -> None:
    """Whatever it is called: its first bytes tell what it is."""
    directory = save(tmp_path / "model", STATE, container=container)
    path = (directory / SINGLE[container]).rename(directory / "weights")
    checkpoint = open_checkpoint(path)
    assert_holds(checkpoint.tensors, STATE)
    assert (checkpoint.path, checkpoint.directory, checkpoint.container) == (path, directory, container)
    assert checkpoint.config is not None


def test_a_file_named_as_the_other_container_is_opened(tmp_path: Path) -> None:
    directory = save(tmp_path / "model", STATE, container="safetensors")
    (directory / SINGLE["safetensors"]).rename(directory / SINGLE["torch"])
    checkpoint = open_checkpoint(directory)
    assert_holds(checkpoint.tensors, STATE)
    assert checkpoint.container == "safetensors"


@pytest.mark.parametrize("shards", [1, 2])
def test_of_both_containers_safetensors_is_taken_and_said(tmp_path: Path, shards: int) -> None:
    directory = save(tmp_path / "model", STATE, container="safetensors", shards=shards)
    other = save(tmp_path / "other", {"stale": torch.zeros(1)}, container="torch", shards=1)
    (other / SINGLE["torch"]).rename(directory / SINGLE["torch"])
    checkpoint = open_checkpoint(directory)
    assert_holds(checkpoint.tensors, STATE)
    assert checkpoint.container == "safetensors"
    (note,) = checkpoint.notes
    assert note.startswith(f"{directory}: has both containers")


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    """As in transformers."""
    directory = save(tmp_path / "model", {"stale": torch.zeros(2), "old": torch.zeros(1)}, container="torch", shards=2)
    torch.save(STATE, directory / SINGLE["torch"])
    assert_holds(open_checkpoint(directory).tensors, STATE)


@pytest.mark.parametrize("count", [2, 12])
def test_shards_are_numbered_in_any_way(tmp_path: Path, count: int) -> None:
    """From zero, as decapoda's; without padding, as the converter's; without a count, as FastChat's."""
    for number, name in enumerate([f"pytorch_model-{number:05}-of-{count:05}.bin" for number in range(count)]):
        torch.save({f"w{number}": torch.tensor(number)}, tmp_path / name)
    assert open_checkpoint(tmp_path).tensors.keys() == {f"w{number}" for number in range(count)}
    for number in range(count):
        (tmp_path / f"pytorch_model-{number:05}-of-{count:05}.bin").rename(tmp_path / f"pytorch_model-{number}.bin")
    assert open_checkpoint(tmp_path).tensors.keys() == {f"w{number}" for number in range(count)}


@CONTAINERS
def test_a_snapshot_of_the_hubs_cache_is_opened(tmp_path: Path, container: str) -> None:
    """Names are links to blobs, which are named by digests."""
    saved = save(tmp_path / "saved", STATE, container=container, shards=2)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(saved.iterdir())):
        path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", f"{number:064x}"))
    for path in (snapshot, snapshot / INDEX[container]):
        checkpoint = open_checkpoint(path)
        assert_holds(checkpoint.tensors, STATE)
        assert checkpoint.directory == snapshot
        assert checkpoint.config is not None
    linked = tmp_path / "link"
    linked.symlink_to(snapshot, target_is_directory=True)
    assert_holds(open_checkpoint(linked).tensors, STATE)


@pytest.mark.parametrize("length", [*range(120, 137), 0x180, 0x280, 0x380, 0x480, 0x580, 0x3C3C, 0x2020, 0x10080])
def test_a_safetensors_header_may_have_any_length(tmp_path: Path, length: int) -> None:
    """Its length comes first in the file, and must not be taken for the mark of something else."""
    header = b'{"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'.ljust(length)
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"abcd")
    assert_holds(open_checkpoint(tmp_path).tensors, load_file(path))


# an index that is wrong


@CONTAINERS
def test_a_shard_that_is_not_there(tmp_path: Path, container: str) -> None:
    directory = save(tmp_path / "model", STATE, container=container, shards=3)
    gone = directory / shard(container, 2, 3)
    gone.unlink()
    found = problem(directory)
    assert (found.kind, found.where) == ("incomplete", str(gone))
    assert "download the missing shard" in found.message


@CONTAINERS
def test_a_shard_that_is_not_there_and_no_index(tmp_path: Path, container: str) -> None:
    """The names of the others say how many there should be."""
    directory = save(tmp_path / "model", STATE, container=container, shards=3, index=False)
    (directory / shard(container, 2, 3)).unlink()
    assert {found.kind for found in problems(directory)} == {"incomplete"}


@CONTAINERS
def test_a_tensor_that_the_index_places_elsewhere(tmp_path: Path, container: str) -> None:
    directory = save(tmp_path / "model", STATE, container=container, shards=2)
    first, second = (directory / shard(container, number, 2) for number in (1, 2))
    rewrite_index(directory, container, {"lm_head.weight": first.name})
    found = problems(directory)
    assert {(p.kind, p.where) for p in found} == {("index", str(first)), ("index", str(second))}
    assert all("lm_head.weight" in p.message and "stale?" in p.message for p in found)


@CONTAINERS
def test_a_tensor_that_the_index_names_and_no_shard_has(tmp_path: Path, container: str) -> None:
    directory = save(tmp_path / "model", STATE, container=container, shards=2)
    rewrite_index(directory, container, {"extra.weight": shard(container, 1, 2)})
    found = problem(directory)
    assert (found.kind, found.where) == ("index", str(directory / shard(container, 1, 2)))
    assert found.message == "lacks extra.weight, which the index places here; is one of them stale? Download both again"


@CONTAINERS
def test_a_tensor_that_the_index_does_not_name(tmp_path: Path, container: str) -> None:
    directory = save(tmp_path / "model", STATE, container=container, shards=2)
    rewrite_index(directory, container, {"model.norm.weight": None})
    found = problem(directory)
    assert (found.kind, found.where) == ("index", str(directory / shard(container, 2, 2)))
    assert (
        found.message
        == "has model.norm.weight, which the index does not place here; is one of them stale? Download both again"
    )


def test_a_rotary_buffer_may_be_in_the_index_or_the_shards_alone(tmp_path: Path) -> None:
    """Some writers dropped it from one of the two."""
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    directory = save(tmp_path / "model", STATE | buffer, shards=2)
    rewrite_index(directory, "torch", dict.fromkeys(buffer))
    rewrite_index(directory, "torch", {"model.layers.1.self_attn.rotary_emb.inv_freq": shard("torch", 1, 2)})
    assert open_checkpoint(directory).weights.keys() == STATE.keys()


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    """Two splits of one model in a directory, say."""
    torch.save({"w": torch.zeros(2)}, tmp_path / "pytorch_model-1.bin")
    torch.save({"w": torch.zeros(2)}, tmp_path / "pytorch_model-2.bin")
    assert problem(tmp_path) == Problem(
        "index", str(tmp_path / "pytorch_model-2.bin"), "w is also in pytorch_model-1.bin"
    )


def test_shards_of_both_containers(tmp_path: Path) -> None:
    torch.save({"v": torch.zeros(2)}, tmp_path / "pytorch_model-1.bin")
    save_file({"w": torch.zeros(2)}, tmp_path / "pytorch_model-2.bin")
    assert problem(tmp_path) == Problem("index", str(tmp_path), "mixes safetensors and .bin shards")


NO_INDEX = {
    "nothing": b"",
    "a list": b"[]",
    "a string": b'"weight_map"',
    "null": b"null",
    "no weight map": b'{"metadata": {}}',
    "a weight map that is a list": b'{"weight_map": ["w"]}',
    "a weight map that is null": b'{"weight_map": null}',
    "cut short": b'{"weight_map": {"w": "model',
    "not UTF-8": b'{"weight_map": {"\xff": "model.safetensors"}}',
    "nested deeply": b'{"weight_map": ' + b"[" * 100_000,
    "a number of 5000 digits": b'{"weight_map": ' + b"1" * 5000 + b"}",
    "empty": b'{"weight_map": {}}',
}


@pytest.mark.parametrize("text", NO_INDEX.values(), ids=NO_INDEX)
def test_an_index_that_is_none(tmp_path: Path, text: bytes) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(text)
    for path in (tmp_path, index):
        found = problems(path)[0]
        assert (found.kind, found.where) == ("index", str(index))


UNSAFE = [
    "../elsewhere.safetensors",
    "..",
    ".",
    "",
    "/etc/passwd",
    "sub/model.safetensors",
    "./model.safetensors",
    "..\\elsewhere.safetensors",
    "C:\\model.safetensors",
    "C:model.safetensors",
    "model.safetensors:stream",
    "\\\\host\\share\\model.safetensors",
    "model.safetensors\0.txt",
    "model\n.safetensors",
    "\ud800.safetensors",
    "model.safetensors\x7f",
    "\x9b2Jmodel.safetensors",
    "\u202esrotcnysefas.ledom",
    "model\u2028.safetensors",
    "model.safetensors.",
    "model.safetensors ",
    "...",
    "NUL",
    "con.safetensors",
    "Aux .safetensors",
    "COM1.index.json",
    "lpt9.bin",
    "com\xb2.bin",
    "CONIN$",
    7,
    None,
    ["model.safetensors"],
    {"file": "model.safetensors"},
]


@pytest.mark.parametrize("name", UNSAFE, ids=ascii)
def test_an_index_that_leaves_its_directory(tmp_path: Path, name: object) -> None:
    """What it names exists, as far as that can be: it is refused by name."""
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    for path in (
        tmp_path / "elsewhere.safetensors",
        directory / "sub" / "model.safetensors",
        directory / "m.safetensors",
    ):
        save_file({"w": torch.zeros(1)}, path)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"v": "m.safetensors", "w": name}}))
    found = next(found for found in problems(directory) if found.kind == "unsafe_name")
    assert found.where == str(index)
    assert "'w'" in found.message
    assert found.message.isprintable()


PLAIN = (
    """
model.safetensors|model-00001-of-00002.safetensors|pytorch_model.bin|consolidated.00.pth|checklist.chk|.gitattributes
SHA256SUMS|README.md|config.json|Console.bin|conin|com.bin|com10.bin|lpt.txt|nullable.json|nul-1.bin|aux_model.bin|prn1
com1-adapter.bin|model..bin|模型.bin|modèle.bin|a(1).bin|~$a.bin|-rf|a&b.bin|CON-FIG.json
a b.bin|modell für\u3000alle.bin
""".strip()
    .replace("\n", "|")
    .split("|")
)


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_name_stays_in_its_directory(name: str) -> None:
    assert stays_in_directory(name)


ALIKE = [
    ("m.safetensors", "M.safetensors"),
    ("straße.safetensors", "STRASSE.safetensors"),
    ("mod\xe8le.safetensors", "mode\u0300le.safetensors"),
    ("MOD\xc8LE.safetensors", "mode\u0300le.safetensors"),
    ("\u03a3.safetensors", "\u03c2.safetensors"),
]


@pytest.mark.parametrize("names", ALIKE, ids=ascii)
def test_an_index_with_names_that_some_disks_take_for_one(tmp_path: Path, names: tuple[str, str]) -> None:
    """Both files are there, where the disk can hold both."""
    for tensor, name in zip("vw", names, strict=True):
        save_file({tensor: torch.zeros(1)}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip("vw", names, strict=True))}))
    found = problem(index)
    assert (found.kind, found.where) == ("unsafe_name", str(index))
    assert all(repr(name) in found.message for name in names)


def test_tensors_may_differ_by_case_alone(tmp_path: Path) -> None:
    """Their names are no files'."""
    directory = save(tmp_path / "model", {"w": torch.zeros(1), "W": torch.ones(1)}, config=None)
    assert list(open_checkpoint(directory).tensors) == ["w", "W"]


@pytest.mark.parametrize("name", ["", "a\nb", "a\x1b[2Jb", "a\u202eb", "\0", "a\u2028b"], ids=ascii)
@CONTAINERS
def test_a_tensor_with_a_name_that_cannot_be_shown(tmp_path: Path, container: str, name: str) -> None:
    directory = save(tmp_path / "model", STATE | {name: torch.zeros(1)}, container=container)
    found = problem(directory)
    assert (found.kind, found.where) == ("unsafe_name", str(directory / SINGLE[container]))
    assert found.message.isprintable()


def test_a_tensor_called_metadata(tmp_path: Path) -> None:
    """A .bin file can hold it, a safetensors file cannot."""
    directory = save(tmp_path / "model", {"__metadata__": torch.zeros(1)})
    assert problem(directory).kind == "unsafe_name"


def test_a_tensor_called_by_half_a_surrogate_pair(tmp_path: Path) -> None:
    header = b'{"\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"abcd")
    assert problem(tmp_path).kind == "unsafe_name"


# files that are something else

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:1f2d4a0fbf3ec4d9c5d2bb7a4c6b2d3a4a5e0b7e0c4a0f5a7c7e3a1a9c2b4d6f\nsize 9976634558\n"
)
NOT_WEIGHTS = {
    "a git-lfs pointer": (POINTER, "not_weights", "is a git-lfs pointer"),
    "a web page": (b"<!DOCTYPE html>\n<html><body>Not found</body></html>", "not_weights", "is a web page"),
    "a web page in capitals, after spaces": (b"\n  <HTML><body></body></HTML>", "not_weights", "is a web page"),
    "an error in JSON": (b'{"error":"Repository not found"}', "not_weights", "is a web page or an error message"),
    "nothing": (b"", "incomplete", "is empty; download it again"),
    "zeros": (bytes(4096), "not_weights", "begins with zeros"),
    "one zero": (b"\0", "not_weights", "begins with zeros"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(100), "unsupported", "is a llama.cpp file"),
    "GGML": (b"lmgg" + bytes(100), "unsupported", "is a llama.cpp file"),
    "a pickle": (b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00}.", "unsupported", "is a bare pickle"),
    "a pickle of protocol 2": (b"\x80\x02}q\x00.", "unsupported", "is a bare pickle"),
    "text": (b"These are not the weights you are looking for.\n", "not_weights", "is text, not weights"),
    "a shell script": (b"#!/bin/sh\nexit 1\n", "not_weights", "is text, not weights"),
    "half a zip archive": (b"PK\x03\x04" + bytes(1000), "incomplete", "no zip directory at its end"),
    "an empty zip archive": (b"PK\x05\x06" + bytes(18), "damaged", ""),
    "four bytes": (b"abcd", "damaged", "has 4 bytes, too few"),
}


@pytest.mark.parametrize(("data", "kind", "words"), NOT_WEIGHTS.values(), ids=NOT_WEIGHTS)
@CONTAINERS
def test_a_file_that_is_something_else(tmp_path: Path, container: str, data: bytes, kind: str, words: str) -> None:
    path = tmp_path / SINGLE[container]
    path.write_bytes(data)
    for named in (tmp_path, path):
        found = problem(named)
        assert (found.kind, found.where) == (kind, str(path))
        assert words in found.message


@pytest.fixture(params=[system.System, system.PortableSystem], ids=["linux", "portable"])
def any_system(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param is system.System and not hasattr(os, "preadv"):
        pytest.skip("not on this platform")
    with system.using(request.param()):
        yield


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.usefixtures("any_system")
@CONTAINERS
def test_a_fifo_in_place_of_weights_does_not_hang(tmp_path: Path, container: str) -> None:
    path = tmp_path / SINGLE[container]
    os.mkfifo(path)
    assert (problem(tmp_path).kind, problem(tmp_path).where) == ("unreadable", str(path))
    assert problem(path).kind == "unreadable"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.usefixtures("any_system")
def test_a_fifo_in_place_of_a_shard_or_an_index_does_not_hang(tmp_path: Path) -> None:
    directory = save(tmp_path / "model", STATE, shards=2)
    (directory / shard("torch", 1, 2)).unlink()
    os.mkfifo(directory / shard("torch", 1, 2))
    assert problem(directory).where == str(directory / shard("torch", 1, 2))
    (directory / INDEX["torch"]).unlink()
    os.mkfifo(directory / INDEX["torch"])
    assert str(directory / INDEX["torch"]) in {found.where for found in problems(directory)}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.usefixtures("any_system")
def test_a_fifo_in_place_of_the_configuration_does_not_hang(tmp_path: Path) -> None:
    directory = save(tmp_path / "model", STATE, config=None)
    os.mkfifo(directory / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: is not a regular file|config\.json: cannot be read"):
        open_checkpoint(directory)


@pytest.mark.usefixtures("any_system")
def test_a_directory_in_place_of_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    found = problem(tmp_path)
    assert (found.kind, found.where) == ("unreadable", str(tmp_path / "model.safetensors"))


def test_a_link_to_nothing(tmp_path: Path) -> None:
    """A snapshot whose blob was removed."""
    (tmp_path / "model.safetensors").symlink_to("blob")
    found = problem(tmp_path)
    assert (found.kind, found.where) == ("not_found", str(tmp_path / "model.safetensors"))


def test_a_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    found = problem(tmp_path)
    assert (found.kind, found.where) == ("unreadable", str(tmp_path / "model.safetensors"))


def test_nothing_there(tmp_path: Path) -> None:
    found = problem(tmp_path / "model")
    assert (found.kind, found.where) == ("not_found", str(tmp_path / "model"))


@pytest.mark.parametrize("files", [[], ["config.json", "tokenizer.model"], ["adapter_model.bin", "model.txt"]])
def test_a_directory_without_weights(tmp_path: Path, files: list[str]) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"{}")
    found = problem(tmp_path)
    assert (found.kind, found.where) == ("not_found", str(tmp_path))
    assert "has no model*.safetensors and no pytorch_model*.bin" in found.message


def test_a_folder_in_metas_format_without_weights(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_bytes(b"{}")
    found = problem(tmp_path)
    assert (found.kind, found.where) == ("not_found", str(tmp_path))
    assert "has Meta's params.json, and none of the consolidated.NN.pth that go with it" in found.message


@CONTAINERS
def test_weights_without_tensors(tmp_path: Path, container: str) -> None:
    directory = save(tmp_path / "model", {}, container=container)
    assert problem(directory) == Problem("not_found", str(directory), "has no tensors in it")


# configuration


@pytest.mark.parametrize("text", [b"{", b"\xff", b"[" * 100_000, b"1" * 5000, b'{"a": 1}{}'], ids=lambda t: t[:9])
def test_a_configuration_that_is_not_json(tmp_path: Path, text: bytes) -> None:
    directory = save(tmp_path / "model", STATE, config=None)
    (directory / "config.json").write_bytes(text)
    found = problem(directory)
    assert (found.kind, found.where) == ("damaged", str(directory / "config.json"))
    assert "is not JSON" in found.message


@pytest.mark.parametrize("text", ["[]", "null", '"llama"', "1"])
def test_a_configuration_that_is_not_a_table(tmp_path: Path, text: str) -> None:
    directory = save(tmp_path / "model", STATE, config=None)
    (directory / "config.json").write_text(text)
    assert problem(directory) == Problem("damaged", str(directory / "config.json"), "is not a JSON object")


def test_no_configuration(tmp_path: Path) -> None:
    assert open_checkpoint(save(tmp_path / "model", STATE, config=None)).config is None


def test_a_configuration_too_large_to_be_one_is_not_read(tmp_path: Path) -> None:
    directory = save(tmp_path / "model", STATE, config=None)
    with (directory / "config.json").open("wb") as file:
        file.truncate(1 << 32)
    found = problem(directory)
    assert (found.kind, found.where) == ("unsupported", str(directory / "config.json"))


# everything at once


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    directory = save(tmp_path / "model", STATE, shards=5)
    names = [directory / shard("torch", number + 1, 5) for number in range(5)]
    names[0].unlink()
    names[1].write_bytes(POINTER)
    names[2].write_bytes(names[2].read_bytes()[:-1])
    rewrite_index(directory, "torch", {"extra": names[3].name})
    (directory / "config.json").write_text("{")
    assert [(found.kind, found.where) for found in problems(directory)] == [
        ("incomplete", str(names[0])),
        ("not_weights", str(names[1])),
        ("incomplete", str(names[2])),
        ("index", str(names[3])),
        ("damaged", str(directory / "config.json")),
    ]


def test_every_unsafe_name_of_an_index_is_told(tmp_path: Path) -> None:
    directory = save(tmp_path / "model", STATE, shards=2)
    rewrite_index(directory, "torch", {"v": "../v", "w": "/w"})
    found = [found.message for found in problems(directory) if found.kind == "unsafe_name"]
    assert len(found) == 2
    assert "'v'" in found[0]
    assert "'w'" in found[1]


# what counts as a weight

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
HEADLESS = {name: tensor for name, tensor in STATE.items() if name != HEAD}
SHARED = STATE | {HEAD: STATE[EMBEDDING]}


@pytest.mark.parametrize(
    ("state", "said", "tied"),
    [
        pytest.param(STATE, None, False, id="apart"),
        pytest.param(STATE, False, False, id="apart, as the configuration says"),
        pytest.param(STATE, True, True, id="apart, though the configuration says otherwise"),
        pytest.param(HEADLESS, None, False, id="no head"),
        pytest.param(HEADLESS, True, True, id="no head, as the configuration says"),
        pytest.param(SHARED, None, True, id="shared"),
        pytest.param(SHARED, True, True, id="shared, as the configuration says"),
        pytest.param(SHARED, False, False, id="shared, though the configuration says otherwise"),
    ],
)
def test_a_tied_head_is_left_out_of_the_weights(
    tmp_path: Path, state: dict[str, Tensor], said: bool | None, tied: bool
) -> None:
    config = {} if said is None else {"tie_word_embeddings": said}
    checkpoint = open_checkpoint(save(tmp_path / "model", state, config=config))
    assert checkpoint.tied is tied
    assert checkpoint.tensors.keys() == state.keys()
    assert checkpoint.weights.keys() == (HEADLESS if tied else state).keys()


def test_equal_bytes_apart_are_not_tied(tmp_path: Path) -> None:
    """In safetensors nothing is shared: only the configuration can say it."""
    state = STATE | {HEAD: STATE[EMBEDDING].clone()}
    assert not open_checkpoint(save(tmp_path / "model", state, container="safetensors", config=None)).tied


def test_a_part_of_the_embedding_is_not_tied(tmp_path: Path) -> None:
    state = STATE | {HEAD: STATE[EMBEDDING][1:]}
    assert not open_checkpoint(save(tmp_path / "model", state, config=None)).tied


def test_a_tied_head_without_an_embedding_is_a_weight(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path / "model", {HEAD: STATE[HEAD]}, config={"tie_word_embeddings": True}))
    assert checkpoint.tied
    assert checkpoint.weights.keys() == {HEAD}


@CONTAINERS
def test_rotary_buffers_are_not_weights(tmp_path: Path, container: str) -> None:
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(2) for layer in range(2)}
    near = {"rotary_emb.inv_freq.weight": torch.ones(2), "model.inv_freq": torch.ones(2)}
    checkpoint = open_checkpoint(save(tmp_path / "model", STATE | buffers | near, container=container))
    assert checkpoint.tensors.keys() == (STATE | buffers | near).keys()
    assert checkpoint.weights.keys() == (STATE | near).keys()


def test_nothing_is_kept_open(tmp_path: Path) -> None:
    """A directory can be removed, on Windows too, as soon as it is opened; and no handle leaks on a refusal."""
    descriptors = Path("/proc/self/fd")
    directory = save(tmp_path / "model", STATE, shards=2)
    (directory / "pytorch_model-00001-of-00002.bin").write_bytes(b"PK\x03\x04")
    before = len(list(descriptors.iterdir())) if descriptors.exists() else 0
    problems(directory)
    open_checkpoint(save(tmp_path / "other", STATE))
    assert (len(list(descriptors.iterdir())) if descriptors.exists() else 0) == before
    shutil.rmtree(tmp_path / "other")


def test_a_tensor_that_an_index_places_twice_is_refused(tmp_path: Path) -> None:
    """JSON readers take one of the two and say nothing; which one, differs."""
    directory = save(tmp_path / "model", llama(1), shards=2)
    index = directory / "pytorch_model.bin.index.json"
    text = index.read_text().replace('"weight_map": {', '"weight_map": {"lm_head.weight": "elsewhere.bin", ')
    index.write_text(text)
    with pytest.raises(CheckpointError, match=r"it has 'lm_head\.weight' twice"):
        open_checkpoint(directory)


def test_a_file_that_is_named_by_its_path_may_have_any_name_that_can_be_printed(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "m:7b.safetensors")
    assert open_checkpoint(tmp_path / "m:7b.safetensors").tensors.keys() == {"w"}
    (tmp_path / "m:7b.safetensors").rename(tmp_path / "m\x1b[2J.safetensors")
    with pytest.raises(CheckpointError, match="has a name that is none"):
        open_checkpoint(tmp_path / "m\x1b[2J.safetensors")
