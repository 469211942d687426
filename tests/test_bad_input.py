"""Bad input, as tables: what a user can give that is wrong, and what the program must say to it.

Every row runs a command in this process, in a directory of its own, and is held to the contract: the exit code, one
JSON document on stdout, the kind of problem and its place, words that help, and nothing written or changed.

- `HEADERS`: what shows before weights are read; the run ends when it reads weights or changes the disk.
- `PASSES`: what only the pass over all bytes can show.
- `MODELS`: damage to a rebuilt model, which ``verify`` must find and place.
"""

import errno
import json
import math
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from bayling_delta import apply, record
from bayling_delta.errors import BaylingDeltaError
from bayling_delta.system import System
from tests.pairs import StateDict, llama, save, shuffled
from tests.running import Run
from tests.strategies import Storage
from tests.wrong_input import (
    APPLY,
    BIN,
    BIN_INDEX,
    EMBEDDING,
    HEAD,
    LARGE,
    LARGE_ELEMENTS,
    LFS,
    NORM,
    READ_LIMIT,
    TIED,
    Evil,
    HeadersOnly,
    Make,
    Row,
    assert_refused,
    assert_refused_by_headers,
    both,
    but,
    copy,
    cut,
    described,
    edit,
    entry,
    exchange,
    flip,
    folder,
    link,
    nothing,
    other_digit,
    pipe,
    place_tensor,
    rebuilt_base,
    remove,
    rows,
    safe,
    save_with_large,
    saved,
    snapshot,
    state,
    swap,
    weights,
    write,
    write_bin,
    zipped,
)

SECOND_BIN = "base/pytorch_model-00002-of-00003.bin"
DELTA_SHARD = "delta/model-00001-of-00003.safetensors"
LARGE_SHARD = "delta/model-00003-of-00003.safetensors"
SAFE_INDEX = "delta/model.safetensors.index.json"
QUERY = "model.layers.0.self_attn.q_proj.weight"
KEY = "model.layers.0.self_attn.k_proj.weight"


# states that do not fit


def longer_vocabulary() -> StateDict:
    old = llama(2, 0.01)
    return old | {name: torch.cat([old[name], old[name][:1]]) for name in (EMBEDDING, HEAD)}


def wider() -> StateDict:
    return {name: torch.zeros([2 * size for size in tensor.shape]).half() for name, tensor in llama(1).items()}


def quantised() -> StateDict:
    return {name: tensor.mul(99).to(torch.int8) if tensor.ndim == 2 else tensor for name, tensor in llama(1).items()}


def buffers_alone() -> StateDict:
    return {name: tensor for name, tensor in llama(1).items() if "inv_freq" in name}


def transposed_query() -> StateDict:
    tensors = llama(1, rotary=False)
    return tensors | {QUERY: tensors[QUERY].t()}


def windowed_query() -> StateDict:
    """The query weights are a view into the middle of a far larger storage."""
    tensors = llama(1, rotary=False)
    storage = torch.zeros(100_000).half()
    storage[9000 : 9000 + tensors[QUERY].numel()] = tensors[QUERY].flatten()
    return tensors | {QUERY: storage[9000 : 9000 + tensors[QUERY].numel()].view(tensors[QUERY].shape)}


def shared_storage() -> StateDict:
    """Two tensors in one storage, the later first."""
    tensors = llama(1, rotary=False)
    storage = torch.cat([tensors[KEY].flatten(), tensors[QUERY].flatten()])
    half = storage.numel() // 2
    return tensors | {QUERY: storage[half:].view(64, 64), KEY: storage[:half].view(64, 64)}


# what headers show


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair that can be added: a base in ``.bin`` and a delta in safetensors, three shards each, one of them large."""
    place = tmp_path_factory.mktemp("pristine")
    save_with_large(place / "base", llama(1))
    save_with_large(place / "delta", llama(2, 0.01), container="safetensors")
    return place


HEADERS: list[Row] = [
    # places
    Row("base absent", remove("base"), 3, "not_found", ("base: ", "No such file")),
    Row("delta absent", remove("delta"), 3, "not_found", ("delta: ", "No such file")),
    Row("base empty", both(remove("base"), folder("base")), 3, "not_found", ("name the directory that holds",)),
    Row("Meta folder, not downloaded", weights(b"", "consolidated.00.pth"), 3, "incomplete",
        ("consolidated.00.pth: is empty", "params.json: is not here")),
    Row("Meta folder, params alone", weights(b"{}", "params.json"), 3, "not_found", ("none of the consolidated.NN",)),
    Row("only GGUF", weights(b"GGUF", "ggml-model-q4_0.gguf"), 3, "not_found", ("base: has ",)),
    Row("only a leftover", weights(b"x", "model.safetensors.part"), 3, "not_found",
        ("no model*.safetensors", "model.safetensors.part: let the download finish")),
    Row("config for weights", nothing, 3, "index", ("weight_map",),
        "apply --base base/config.json --delta delta --out out"),
    Row("weights are a pipe", pipe(BIN), 3, "", (BIN,)),
    Row("single weights are a pipe", both(weights(b""), pipe("base/model.safetensors")), 3, "unreadable",
        ("not a reg",)),
    Row("weights are a folder", both(weights(b""), folder("base/model.safetensors")), 3, "unreadable", ("not a reg",)),
    Row("weights are a device", both(weights(b""), link("base/model.safetensors", "/dev/zero")), 3, "unreadable",
        ("not a",)),
    Row("weights link nowhere", both(weights(b""), link("base/model.safetensors", "no")), 3, "not_found", ("No such",)),
    Row("base is a loop", both(remove("base"), link("base", "base")), 3, "unreadable", ("base: ", "symbolic links")),
    Row("base is a pipe", both(remove("base"), pipe("base")), 3, "unreadable", ("base: ", "regular file")),
    Row("base is a device", nothing, 3, "unreadable", ("regular file",),
        "apply --base /dev/zero --delta delta --out out"),
    Row("a Hub id", nothing, 3, "network", ("ICTNLP/bayling-7b-diff: ", "HF_HUB_OFFLINE"),
        "apply --base base --delta ICTNLP/bayling-7b-diff --out out"),
    # files that are no weights
    Row("empty file", weights(b""), 3, "incomplete", ("model.safetensors: is empty", "download it again")),
    Row("one byte", weights(b"x"), 3, "damaged", ("too few",)),
    Row("seven bytes", weights(b"1234567"), 3, "damaged", ("too few",)),
    Row("zeros", weights(bytes(5000)), 3, "not_weights", ("never finished", "download it again")),
    Row("git-lfs pointer", weights(LFS), 3, "not_weights", ("git-lfs pointer", "git lfs pull")),
    Row("git-lfs pointer for a shard", write(BIN, LFS), 3, "not_weights",
        (BIN, "git lfs pull", "hf download OWNER/NAME pytorch_model-00001-of-00003.bin --local-dir base")),
    Row("web page", weights(b"\n<!DOCTYPE html><html></html>"), 3, "not_weights", ("web page", "download it again")),
    Row("HTML in lower case", weights(b"<html><body>404"), 3, "not_weights", ("web page",)),
    Row("JSON error", weights(b'{"error":"Repository not found"}'), 3, "not_weights", ("error message",)),
    Row("XML error", weights(b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>'), 3, "not_weights",
        ("download",)),
    Row("text error", weights(b"Entry not found"), 3, "not_weights", ("download",)),
    Row("JSON error on two lines", weights(b'{\n  "error": "Gated"\n}'), 3, "not_weights", ("download",)),
    Row("web page with BOM", weights(b"\xef\xbb\xbf<!DOCTYPE html>"), 3, "not_weights", ("download",)),
    Row("GGUF", weights(b"GGUF\x03\0\0\0" + bytes(99)), 3, "unsupported", ("llama.cpp", "original weights")),
    Row("GGML", weights(b"tjgg\x03\0\0\0" + bytes(99)), 3, "unsupported", ("llama.cpp",)),
    Row("bare pickle", weights(pickle.dumps({"a": 1}, 2), "pytorch_model.bin"), 3, "unsupported", ("bare pickle",)),
    Row("legacy torch", saved({"w": torch.zeros(2)}, _use_new_zipfile_serialization=False), 3, "unsupported",
        ("before 1.6", "torch.save(torch.load(")),
    # safetensors headers
    Row("header past the cap", weights(safe({}, length=100_000_001)), 3, "damaged", ("100,000,001", "100,000,000")),
    Row("header of 2^63", weights(safe({}, length=1 << 63)), 3, "damaged", ("the format allows",)),
    Row("header past the file", weights(safe({}, length=5000)), 3, "incomplete", ("needs 5,008", "download it again")),
    Row("header a list", weights(safe(b"[]")), 3, "damaged", ("does not begin with",)),
    Row("header not JSON", weights(safe(b"{'a':1}")), 3, "damaged", ("is not JSON",)),
    Row("header not UTF-8", weights(safe(b'{"\xe9":1}')), 3, "damaged", ("is not JSON",)),
    Row("header nested", weights(safe(b'{"a":' * 100_000)), 3, "damaged", ("is not JSON",)),
    Row("no tensors", weights(safe({"__metadata__": {"format": "pt"}})), 3, "not_found", ("no tensors",)),
    Row("metadata a number", weights(safe({"__metadata__": {"a": 1}})), 3, "damaged", ("__metadata__",)),
    Row("tensor twice", weights(safe(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(2))), 3,
        "damaged", ("'a' twice",)),
    Row("dtype twice", weights(safe(b'{"a":{"dtype":"F16","dtype":"F16","shape":[1],"data_offsets":[0,2]}}', bytes(2))),
        3, "damaged", ("'dtype' twice",)),
    Row("hole", weights(safe({"a": entry(), "b": entry(4, 6)}, bytes(6))), 3, "damaged", ("b leaves a hole",)),
    Row("hole at the start", weights(safe({"a": entry(2, 4)}, bytes(4))), 3, "damaged", ("a leaves a hole",)),
    Row("overlap", weights(safe({"a": entry(0, 4, [2]), "b": entry(2, 4)}, bytes(4))), 3, "damaged", ("b overlaps",)),
    Row("bytes after", weights(safe({"a": entry()}, bytes(3))), 3, "damaged", ("after its last tensor",)),
    Row("cut short", weights(safe({"a": entry()}, bytes(1))), 3, "incomplete", ("download it again",)),
    Row("size and shape differ", weights(safe({"a": entry(shape=[2])}, bytes(2))), 3, "damaged", ("a is F16 [2]",)),
    Row("negative offset", weights(safe({"a": entry(-2, 0)})), 3, "damaged", ("not a range",)),
    Row("negative size", weights(safe({"a": entry(shape=[-1, -1])}, bytes(2))), 3, "damaged", ("not a list of sizes",)),
    Row("fractional size", weights(safe({"a": entry(shape=[1.0])}, bytes(2))), 3, "damaged", ("not a list of sizes",)),
    Row("true for a size", weights(safe({"a": entry(shape=[True])}, bytes(2))), 3, "damaged", ("not a list of sizes",)),
    Row("size of 2^64", weights(safe({"a": entry(0, 0, [1 << 64, 0])})), 3, "damaged", ("not a list of sizes",)),
    Row("sizes that overflow", weights(safe({"a": entry(shape=[1 << 62] * 9)}, bytes(2))), 3, "damaged",
        ("but has 2",)),
    Row("5000 digits", weights(safe(b'{"a":%s}' % (b"9" * 5000))), 3, "damaged", ("is not JSON",)),
    Row("65 dimensions", weights(safe({"a": entry(shape=[1] * 65)}, bytes(2))), 3, "damaged", ("not a list of sizes",)),
    Row("unknown dtype", weights(safe({"a": entry(dtype="f16")}, bytes(2))), 3, "damaged", ("unknown dtype 'f16'",)),
    Row("dtype a table", weights(safe({"a": entry(dtype={})}, bytes(2))), 3, "damaged", ("unknown dtype",)),
    Row("float8", weights(safe({"a": entry(dtype="F8_E4M3", shape=[2])}, bytes(2))), 3, "unsupported", ("quantised",)),
    Row("entry a list", weights(safe({"a": []})), 3, "damaged", ("lacks one of",)),
    Row("tensor without name", weights(safe({"": entry()}, bytes(2))), 3, "unsafe_name", ("the name ''",)),
    Row("NUL in a name", weights(safe({"a\0": entry()}, bytes(2))), 3, "unsafe_name", ("a\\x00",)),
    Row("newline in a name", weights(safe({"a\nerror: b": entry()}, bytes(2))), 3, "unsafe_name", ("a\\nerror",)),
    Row("escape code in a name", weights(safe({"a\x1b[2J": entry()}, bytes(2))), 3, "unsafe_name", ("a\\x1b[2J",)),
    Row("direction mark in a name", weights(safe({"a\u202eb": entry()}, bytes(2))), 3, "unsafe_name", ("a\\u202eb",)),
    Row("half a character in a name", weights(safe({"a\ud800": entry()}, bytes(2))), 3, "unsafe_name", ("a\\ud800",)),
    Row("a forged line", weights(safe({"a\nerror: b": entry(2, 4)}, bytes(4))), 3, "", ("a\\nerror",)),
    Row("half a character and a hole", weights(safe({"a\ud800": entry(2, 4)}, bytes(4))), 3, "", ("hole",)),
    Row("large shard cut short",
        both(remove(LARGE_SHARD), write(LARGE_SHARD, safe({LARGE: entry(0, 2 * LARGE_ELEMENTS, [LARGE_ELEMENTS])}))), 3,
        "incomplete", ("model-00003-of-00003.safetensors: has", "83,886,", "download it again")),
    # .bin
    Row("bin cut in a record", cut(BIN, 30_000), 3, "incomplete", (BIN, "cut short", "download it again")),
    Row("bin cut in its directory", cut(BIN, -300), 3, "incomplete", ("cut short",)),
    Row("bin without its last byte", cut(BIN, -1), 3, "incomplete", ("cut short",)),
    Row("bin cut after its first record", cut(BIN, 64), 3, "incomplete", ("cut short",)),
    Row("bin with bytes after", cut(BIN, 300_000), 3, "", (BIN,)),
    Row("zip of something else", zipped({"notes.txt": b"x"}), 3, "unsupported", ("not one of PyTorch's",)),
    Row("TorchScript", zipped({"m/data.pkl": b"\x80\x02}.", "m/constants.pkl": b"", "m/code/x.py": b""}), 3,
        "unsupported", ("TorchScript",)),
    Row("big-endian", zipped({"m/data.pkl": b"\x80\x02}.", "m/byteorder": b"big"}), 3, "unsupported", ("big-endian",)),
    Row("compressed", zipped({"m/data.pkl": b"\x80\x02}." + bytes(99)}, zipfile.ZIP_DEFLATED), 3, "damaged",
        ("compressed",)),
    Row("pickle runs a command", zipped({"m/data.pkl": pickle.dumps({"a": Evil()}, 2)}), 3, "unsafe_pickle",
        ("system", "nothing was run")),
    Row("pickle of protocol 4", zipped({"m/data.pkl": pickle.dumps({}, 4)}), 3, "unsupported", ("protocol 2",)),
    Row("pickle cut short", zipped({"m/data.pkl": b"\x80\x02}("}), 3, "damaged", ("in the middle",)),
    Row("pickle with bytes after", zipped({"m/data.pkl": b"\x80\x02}.x"}), 3, "damaged", ("end with one object",)),
    Row("pickle that nests", zipped({"m/data.pkl": b"\x80\x02)" + b"\x85" * 200_000 + b"."}), 3, "unsupported",
        ("tuple",)),
    Row("training state", saved({"model": {"w": torch.zeros(2)}, "step": 1}), 3, "unsupported",
        ("'model' is a table",)),
    Row("complex numbers", saved({"w": torch.zeros(2, dtype=torch.complex64)}), 3, "unsupported",
        ("ComplexFloatStorage",)),
    Row("storage elsewhere", described(storage=Storage(key="../data.pkl")), 3, "damaged",
        ("which the archive does not have",)),
    Row("storage of another size", described(storage=Storage(elements=25)), 3, "damaged", ("its record has 96 bytes",)),
    Row("view past its storage", described((25,)), 3, "damaged", ("reaches to element",)),
    Row("view of negative size", described((-4,)), 3, "damaged", ("negative",)),
    Row("view with a stride missing", described((2, 2)), 3, "damaged", ("strides",)),
    Row("a view of 2^120 times one element", described((1 << 60, 1 << 60), (0, 0)), 3, "damaged",
        ("pytorch_model.bin",)),
    Row("a view of 2^42 times one element", described((1 << 42,), (0,)), 3, "unsupported", ("pytorch_model.bin",)),
    Row("a view of 2^42 elements, recorded", described((1 << 42,), (0,)), 3, "unsupported", ("pytorch_model.bin",),
        "record base --memory-limit 128KiB"),
    # indexes
    Row("index empty", write(BIN_INDEX, b""), 3, "index", ("weight_map",)),
    Row("index a list", write(BIN_INDEX, b"[]"), 3, "index", ("weight_map",)),
    Row("index without map", write(BIN_INDEX, b"{}"), 3, "index", ("weight_map",)),
    Row("index map a list", write(BIN_INDEX, b'{"weight_map":[]}'), 3, "index", ("weight_map",)),
    Row("index of nothing", write(BIN_INDEX, b'{"weight_map":{}}'), 3, "index", ("names no tensors",)),
    Row("index nested", write(BIN_INDEX, b'{"weight_map":' + b'{"a":' * 100_000), 3, "index", ("weight_map",)),
    Row("index a git-lfs pointer", write(BIN_INDEX, LFS), 3, "", (BIN_INDEX, "git-lfs")),
    Row("file above", place_tensor(NORM, "../x.bin"), 3, "unsafe_name", (NORM, "'../x.bin'", "outside its directory")),
    Row("file of the system", place_tensor(NORM, "/etc/passwd"), 3, "unsafe_name", ("'/etc/passwd'",)),
    Row("file above, for Windows", place_tensor(NORM, "..\\x.bin"), 3, "unsafe_name", ("outside its directory",)),
    Row("file is the directory", place_tensor(NORM, "."), 3, "unsafe_name", ("'.'",)),
    Row("file is a device of Windows", place_tensor(NORM, "nul.bin"), 3, "unsafe_name", ("'nul.bin'",)),
    Row("file ends with a dot", place_tensor(NORM, f"{BIN[5:]}."), 3, "unsafe_name", ("-00003.bin.'",)),
    Row("two files that differ by case", place_tensor(NORM, BIN[5:].upper()), 3, "unsafe_name",
        (f"'{BIN[5:]}' and '{BIN[5:].upper()}'", "one file on a disk where case")),
    Row("NUL in a file", place_tensor(NORM, "a\0.bin"), 3, "unsafe_name", ("a\\x00.bin",)),
    Row("newline in a file", place_tensor(NORM, "a\nerror: b"), 3, "unsafe_name", ("a\\nerror: b",)),
    Row("escape code in a file", place_tensor(NORM, "\x1b[2J"), 3, "unsafe_name", ("\\x1b[2J",)),
    Row("half a character in a file", place_tensor(NORM, "\ud800"), 3, "unsafe_name", ("\\ud800",)),
    Row("a number for a file", place_tensor(NORM, 3), 3, "unsafe_name", ("places",)),
    Row("a file of 300 letters", place_tensor(NORM, "x" * 300), 3, "unsafe_name", ("xxx",)),
    Row("a shard is absent", remove(SECOND_BIN), 3, "incomplete", (SECOND_BIN, "download the missing shard")),
    Row("two shards are absent", both(remove(BIN), remove(DELTA_SHARD)), 3, "incomplete", (BIN, DELTA_SHARD)),
    Row("the index is named", remove(SECOND_BIN), 3, "incomplete", (BIN_INDEX,)),
    Row("a shard is a folder", folder(SECOND_BIN), 3, "", ("not a regular file",)),
    Row("index is stale", place_tensor("model.gone.weight", BIN[5:]), 3, "index", ("lacks model.gone.weight", "stale")),
    Row("index lacks a tensor", edit(BIN_INDEX, lambda i: i["weight_map"].pop(NORM)), 3, "index", (f"has {NORM}",)),
    Row("index with a forged line", place_tensor("a\nerror: b", BIN[5:]), 3, "", ("a\\nerror: b",)),
    Row("index with half a character", place_tensor("a\ud800", BIN[5:]), 3, "", ("a\\ud800",)),
    Row("a tensor in two shards", both(remove(SAFE_INDEX), copy(DELTA_SHARD, "delta/model-00002-of-00003.safetensors")),
        3, "index", ("is also in",)),
    Row("two containers in one index",
        both(write_bin("delta/x.bin", {NORM: torch.zeros(64).half()}), place_tensor(NORM, "x.bin", SAFE_INDEX)), 3,
        "index", ("mixes",)),
    Row("no index, and not all", both(remove(BIN_INDEX), remove(SECOND_BIN)), 3, "incomplete", ("2 of 3 shards",),
        "record base"),
    # configuration and tokenizer
    Row("config a list", write("delta/config.json", b"[]"), 3, "damaged", ("delta/config.json", "JSON object")),
    Row("base config a list", write("base/config.json", b"[]"), 3, "damaged", ("base/config.json", "JSON object")),
    Row("config not JSON", write("delta/config.json", b"{,}"), 3, "damaged", ("delta/config.json: is not JSON",)),
    Row("config empty", write("delta/config.json", b""), 3, "damaged", ("is empty",)),
    Row("config nested", write("delta/config.json", b"[" * 100_000), 3, "damaged", ("is not JSON",)),
    Row("config of 4 MB", cut("delta/config.json", 4_000_001), 3, "unsupported", ("at most 4,000,000",)),
    Row("config a git-lfs pointer", write("delta/config.json", LFS), 3, "", ("git-lfs",)),
    Row("config a folder", folder("delta/config.json"), 3, "unreadable", ("config.json", "regular file")),
    Row("generation config of 4 MB",
        both(write("delta/generation_config.json", b"{}"), cut("delta/generation_config.json", 4_000_001)), 3,
        "unsupported", ("generation_config.json", "at most 4,000,000")),
    Row("tokenizer of many values", write("delta/tokenizer.json", b'{"a":[' + b"1," * 4_000_000 + b"1]}"), 3, "damaged",
        ("tokenizer.json", "more than 4,000,000 values")),
    Row("generation config nested", write("delta/generation_config.json", b'{"a":' * 101 + b"1" + b"}" * 101), 3,
        "damaged", ("generation_config.json", "nests too deep")),
    Row("config links nowhere", link("delta/config.json", "no"), 3, "", ("config.json",)),
    Row("tokenizer a git-lfs pointer", write("delta/tokenizer.model", LFS), 3, "", ("tokenizer.model", "git-lfs")),
    Row("tokenizer of 64 MB", both(write("delta/tokenizer.json", b""), cut("delta/tokenizer.json", 64_000_001)), 3,
        "unsupported", ("tokenizer.json", "at most 64,000,000")),
    # pairs
    Row("delta lacks a tensor", state("delta", but({NORM: None})), 4, "missing_tensor", (f"lacks {NORM}",)),
    Row("delta has one more", state("delta", but({"x": torch.zeros(2).half()})), 4, "missing_tensor",
        ("base: lacks x",)),
    Row("a vocabulary of one more", state("delta", longer_vocabulary), 4, "shape", (HEAD, "[160, 64]", "[161, 64]")),
    Row("7B on 13B", state("base", wider), 4, "size", ("has 2 layers of 128", "the delta has 2 layers of 64")),
    Row("transposed", state("delta", but({"model.layers.0.mlp.down_proj.weight": torch.zeros(96, 64).half()})), 4,
        "shape", ("down_proj",)),
    Row("shapes that broadcast", state("delta", but({NORM: torch.zeros(1).half()})), 4, "shape", ("F16 [1]",)),
    Row("quantised to int8", state("base", quantised), 4, "quantised",
        ("base: has ", "quantised weights", "need the original ones")),
    Row("doubles", state("delta", but({NORM: torch.zeros(64).double()})), 4, "dtype", ("is F64 in the delta",)),
    Row("names with a prefix", state("delta", lambda: {f"base_model.{n}": t for n, t in llama(2, 0.01).items()}), 4,
        "missing_tensor", ("lacks base_model.",)),
    Row("config lies: tied", edit("base/config.json", lambda c: c.update(tie_word_embeddings=True)), 4, "tied",
        ("base: config.json ties", "tie_word_embeddings to false")),
    Row("config says tied in words", edit("delta/config.json", lambda c: c.update(tie_word_embeddings="no")), 3,
        "damaged", ("delta/config.json", "tie_word_embeddings")),
    Row("config says twice", swap("delta/config.json", b"{", b'{"tie_word_embeddings": true, '), 3, "damaged",
        ("'tie_word_embeddings' twice",)),
    Row("tied on one side", state("delta", but({HEAD: None}), config=TIED), 4, "missing_tensor", (f"lacks {HEAD}",)),
    Row("rotary buffers alone",
        both(remove("base"), remove("delta"), state("base", buffers_alone), state("delta", buffers_alone)), 3, "",
        ("base: ",)),
    Row("base and delta are one", nothing, 4, "looks_like_model", ("base: looks like a full model",),
        "apply --base base --delta base --out out"),
    Row("swapped", nothing, 4, "looks_like_delta", ("delta: looks like a delta", "base: looks like a full model"),
        "apply --base delta --delta base --out out"),
    Row("applied twice", rebuilt_base, 4, "already_rebuilt", ("base: is itself the result", "original base"), APPLY),
    Row("a full model for a delta", state("delta", lambda: llama(3)), 4, "looks_like_model",
        ("delta: looks like a full",)),
    # outputs
    Row("output exists", folder("out-2"), 6, "output_exists", ("out-2", "nothing is replaced"), f"{APPLY}-2"),
    Row("output is a file", write("out-2", b"mine"), 6, "output_exists", ("choose another name",), f"{APPLY}-2"),
    Row("output links nowhere", link("out-2", "no"), 6, "output_exists", ("out-2",), f"{APPLY}-2"),
    Row("output is a loop", link("out-2", "out-2"), 6, "output_exists", ("out-2",), f"{APPLY}-2"),
    Row("output through a loop", link("out-2", "out-2"), 6, "output_place", ("out-2",), f"{APPLY}-2/out"),
    Row("partial output is another's", both(folder("out-2.partial"), write("out-2.partial/mine", b"")), 6,
        "output_exists", ("out-2.partial",), f"{APPLY}-2"),
    Row("partial output is a pipe", pipe("out-2.partial"), 6, "output_exists", ("out-2.partial",), f"{APPLY}-2"),
    Row("no parent", nothing, 6, "output_place", ("no: ", "make the directory first"),
        f"{APPLY.replace(' out', ' no/out')}"),
    Row("parent is a file", write("file", b""), 6, "", ("file/out",), f"{APPLY.replace(' out', ' file/out')}"),
    Row("parent is a file, planned", write("file", b""), 6, "output_place", ("file",),
        f"{APPLY.replace(' out', ' file/out')} --dry-run"),
    Row("inside the base", nothing, 6, "output_place", ("base/out", "inside the base"),
        f"{APPLY.replace(' out', ' base/out')}"),
    Row("inside the delta", nothing, 6, "output_place", ("inside the delta",),
        f"{APPLY.replace(' out', ' delta/out')}"),
    Row("inside by a link", link("other", "base"), 6, "output_place", ("inside the base",),
        f"{APPLY.replace(' out', ' other/out')}"),
    Row("inside a base that is a file", nothing, 6, "output_place", ("base/out",),
        f"apply --base {BIN_INDEX} --delta delta --out base/out"),
    Row("is the base", nothing, 6, "output_exists", ("base: exists",), "apply --base base --delta delta --out base/"),
    Row("is this directory", nothing, 6, "output_exists", ("exists",), "apply --base base --delta delta --out ."),
    Row("is the root", nothing, 6, "output_exists", ("exists",), "apply --base base --delta delta --out /"),
    Row("is the directory above", nothing, 6, "output_exists", ("exists",), "apply --base base --delta delta --out .."),
    Row("a name of 300 letters", nothing, 6, "", ("too long",), f"apply --base base --delta delta --out {'x' * 300}"),
    Row("a name of 300 letters, planned", nothing, 6, "", ("too long",),
        f"apply --base base --delta delta --out {'x' * 300} --dry-run"),
    Row("all at once", both(remove(BIN), write(DELTA_SHARD, LFS), folder("out-2")), 3, "output_exists",
        (BIN, DELTA_SHARD, "out-2", "3 problems"), f"{APPLY}-2"),
    # options
    Row("too little memory", nothing, 2, "memory_limit", ("the least that works is 96KiB",),
        f"{APPLY} --memory-limit 9KB"),
    Row("memory of nothing", nothing, 2, "usage", ("not a size above 0",), f"{APPLY} --memory-limit 0"),
    Row("memory below nothing", nothing, 2, "usage", ("'-5' is not a size",), f"{APPLY} --memory-limit -5"),
    Row("shards of nothing", nothing, 2, "usage", ("not a size above 0",), f"{APPLY} --max-shard-size 0.4"),
    Row("shards in words", nothing, 2, "usage", ("not a size such as",), f"{APPLY} --max-shard-size large"),
    Row("a digest cut short", nothing, 2, "usage", ("is not a SHA-256",), f"{APPLY} --expect {'0' * 63}"),
    Row("a digest of nothing", nothing, 2, "usage", ("is not a SHA-256",), f"{APPLY} --expect ''"),
    Row("what cannot be allowed", nothing, 2, "usage", ("'crc' is not",), f"{APPLY} --allow crc"),
    Row("a dtype that is not added", nothing, 2, "usage", ("'float64' is not",), f"{APPLY} --dtype float64"),
    Row("no threads", nothing, 2, "usage", ("0 is not in the range",), f"{APPLY} --threads 0"),
    Row("an option twice misspelt", nothing, 2, "usage", ("No such option '--bse'",), "apply --bse base --delta delta"),
    Row("an argument too many", nothing, 2, "usage", ("unexpected extra argument",), f"{APPLY} more"),
    Row("no such command", nothing, 2, "usage", ("No such command 'aply'",), "aply"),
    Row("a base without its delta", nothing, 2, "usage", ("go together",), "verify base --base base"),
    # record
    Row("record over a file", write("mine", b"mine"), 6, "output_exists", ("mine: exists",), "record base -o mine"),
    Row("record into the model", nothing, 6, "output_place", ("base/out.json",), "record base -o base/out.json"),
    Row("record into no directory", nothing, 6, "", ("no/out.json",), "record base -o no/out.json"),
    Row("record nothing", nothing, 3, "not_found", ("no: ",), "record no"),
    # verify, before anything is compared
    Row("nothing recorded", nothing, 5, "no_record", ("base: ", "--against", "--base and --delta"), "verify base"),
    Row("nothing to verify", nothing, 3, "not_found", ("no: ",), "verify no"),
    Row("against nothing that is", nothing, 3, "not_found", ("no",), "verify base --against no"),
    Row("against no record", nothing, 3, "", ("is not a manifest",), "verify base --against base/config.json"),
    Row("against weights", nothing, 3, "", ("is not a manifest",), f"verify base --against {BIN}"),
]  # fmt: skip


@rows(HEADERS)
def test_what_headers_show_is_refused_before_weights_are_read(place: Path, run: Run, row: Row) -> None:
    assert_refused_by_headers(place, run, row, HeadersOnly())


def test_the_pair_itself_is_good(place: Path, run: Run) -> None:
    """Else the rows would prove nothing: they fail for what was done to it."""
    world = HeadersOnly()
    before = snapshot(place)
    done = run(f"{APPLY} --dry-run", world)
    assert (done.code, done.document["ok"]) == (0, True)
    assert snapshot(place) == before
    assert world.bytes_read < READ_LIMIT
    assert not world.changes


def test_a_hostile_pickle_takes_memory_like_its_size(tmp_path: Path) -> None:
    """A tuple that is made once and named by many tensors is not copied for each."""
    import tracemalloc

    from bayling_delta.checkpoint import open_checkpoint

    text = b"X\x01\0\0\0w"
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x18tQ"
    sizes = b"(" + b"K\x01" * 20_000 + b"tq\x02"
    first = text + b"ctorch._utils\n_rebuild_tensor_v2\nq\x00(" + storage + b"q\x01K\x00" + sizes + b"h\x02\x89N}tR"
    again = b"".join(b"M" + struct.pack("<H", number) + b"h\x00(h\x01K\x00h\x02h\x02\x89N}tR" for number in range(300))
    zipped({"m/data.pkl": b"\x80\x02}(" + first + again + b"u.", "m/data/0": bytes(96)})(make_base(tmp_path))
    tracemalloc.start()
    try:
        with pytest.raises(BaylingDeltaError):
            open_checkpoint(tmp_path / "base")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def make_base(place: Path) -> Path:
    (place / "base").mkdir()
    return place


# what must be said, though it is not refused


def with_both_containers(place: Path) -> None:
    state("base", lambda: llama(1), container="safetensors")(place)
    torch.save(llama(3), place / "base" / "pytorch_model.bin")


ODD = {
    "both containers": (with_both_containers, "both containers"),
    "a base in bfloat16": (
        state("base", lambda: {name: tensor.bfloat16() for name, tensor in llama(1).items()}),
        "BF16",
    ),
}


@pytest.mark.parametrize(("make", "words"), ODD.values(), ids=ODD)
def test_what_is_odd_is_said(small: Path, run: Run, make: Make, words: str) -> None:
    make(small)
    done = run(APPLY)
    assert done.code == 0
    assert words in done.errors


def test_a_delta_without_configuration_is_refused_or_told(small: Path, run: Run) -> None:
    (small / "delta" / "config.json").unlink()
    assert "config.json" in run(APPLY).errors


# whatever the answer is, it is no fault of ours

FAULTS = {
    "a time far away": (APPLY, "9" * 14),
    "a time beyond all": (APPLY, "9" * 40),
    "an output without a name": ("apply --base base --delta delta --out ''", "0"),
}


@pytest.mark.parametrize(("command", "epoch"), FAULTS.values(), ids=FAULTS)
def test_no_fault_of_ours(small: Path, run: Run, monkeypatch: pytest.MonkeyPatch, command: str, epoch: str) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    before = snapshot(small)
    assert run(command).code in (0, 2, 6)
    assert snapshot(small).items() >= before.items()


def test_a_name_that_is_not_utf8_can_still_be_shown(small: Path, run: Run) -> None:
    before = snapshot(small)
    assert_refused(run("record '\udcff'"), Row("", nothing, 3, "not_found", ("\\udcff",)))
    assert snapshot(small) == before


# what only the pass shows


@pytest.fixture(scope="module")
def small_pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair in ``.bin``, the base's in order, and one that is out of order."""
    place = tmp_path_factory.mktemp("small")
    tensors = llama(1, rotary=False)
    save(place / "base", tensors)
    save(place / "mixed", tensors, order=shuffled(tensors))
    save(place / "delta", llama(2, 0.01, rotary=False))
    return place


@pytest.fixture
def small(tmp_path: Path, small_pristine: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(small_pristine, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Disturbing(System):
    """Does something to an input between the plan and the pass, or when the pass has read some of the inputs."""

    path = Path("base/pytorch_model.bin")

    def __init__(self, *, late: bool = False) -> None:
        self.late = late
        self.begun = self.done = False

    def open_write(self, path: Path, *, direct: bool) -> int:
        self.begun = True  # nothing is written before everything is planned
        if not self.late:
            self.once()
        return super().open_write(path, direct=direct)

    def read_into(self, handle: int, view: memoryview, offset: int) -> int:
        if self.begun and offset > 60_000:
            self.once()
        return super().read_into(handle, view, offset)

    def once(self) -> None:
        if not self.done:
            self.done = True
            self.disturb()

    def disturb(self) -> None:
        """Change an input."""


class Touching(Disturbing):
    def disturb(self) -> None:
        os.utime(self.path, ns=(1, 1))


class Truncating(Disturbing):
    def disturb(self) -> None:
        os.truncate(self.path, 50_000)


class Growing(Disturbing):
    def disturb(self) -> None:
        with self.path.open("ab") as file:
            file.write(b"x")


class Replacing(Disturbing):
    """As a download that finishes does: another file under the same name."""

    def disturb(self) -> None:
        Path("new").write_bytes(self.path.read_bytes()[::-1])
        Path("new").rename(self.path)


class FullDisk(System):
    def write_from(self, handle: int, view: memoryview, offset: int) -> int:
        if offset:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write_from(handle, view, offset)


def weight_bytes(name: str, seed: int = 1, scale: float = 0.05) -> bytes:
    return llama(seed, scale, rotary=False)[name].numpy().tobytes()


def damaged(side: str, name: str, skip: int = 100, seed: int = 1, scale: float = 0.05) -> Make:
    """Flip a bit of a tensor in a ``.bin``; the archive's checksum stays as it was."""
    return flip(f"{side}/pytorch_model.bin", weight_bytes(name, seed, scale)[:64], skip)


LOUD = torch.full((64, 64), 6e4).half()
"""Finite, and yet too large to be added to itself."""


def loud() -> StateDict:
    return llama(1) | {QUERY: LOUD}


def hidden_nan() -> torch.Tensor:
    """One NaN in the middle, where no sample is likely to meet it."""
    values = torch.zeros(64, 96).half()
    values[37, 53] = math.nan
    return values


NAN = {"model.layers.1.mlp.down_proj.weight": hidden_nan()}
STEPS = f"{APPLY} --memory-limit 128KiB --threads 1"
OTHER = "apply --base mixed --delta delta --out out"
SECOND_KEY = b"X\x01\0\0\x002q"
"""Where the pickle says that a tensor lies in storage 2."""

PASSES: list[Row] = [
    Row("weights of the base", damaged("base", QUERY), 5, "crc", ("base/pytorch_model.bin", "download the file again")),
    Row("its first byte", damaged("base", EMBEDDING, 0), 5, "crc", ("CRC-32 is wrong",)),
    Row("its last tensor", damaged("base", HEAD, 20_479), 5, "crc", ("CRC-32 is wrong",)),
    Row("weights of the delta", damaged("delta", QUERY, seed=2, scale=0.01), 5, "crc", ("delta/pytorch_model.bin",)),
    Row("weights out of order", damaged("mixed", QUERY), 5, "crc", ("mixed/",), OTHER),
    Row("both sides", both(damaged("base", NORM), damaged("delta", NORM, seed=2, scale=0.01)), 5, "crc",
        ("2 problems", "base/pytorch_model.bin", "delta/pytorch_model.bin")),
    Row("a storage that two tensors share", both(state("base", shared_storage), damaged("base", QUERY)), 5, "crc",
        ("base/pytorch_model.bin",)),
    Row("the checksum itself", flip("base/pytorch_model.bin", b"PK\x01\x02", 16), 5, "crc", ("data.pkl",)),
    Row("weights that are transposed", both(state("base", transposed_query), damaged("base", QUERY)), 5, "crc",
        ("base/pytorch_model.bin",)),
    Row("weights of a view out of order", both(state("base", windowed_query, mixed=True), damaged("base", QUERY)), 5,
        "crc", ("base/pytorch_model.bin",)),
    Row("the pickle of the base", swap("base/pytorch_model.bin", SECOND_KEY, SECOND_KEY.replace(b"2", b"3")), 5, "crc",
        ("data.pkl",)),
    Row("the pickle of the delta", swap("delta/pytorch_model.bin", SECOND_KEY, SECOND_KEY.replace(b"2", b"3")), 5,
        "crc", ("data.pkl",)),
    Row("recorded, too", damaged("base", QUERY), 5, "crc", ("base/pytorch_model.bin",), "record base"),
    Row("another digest", nothing, 5, "digest", ("weights digest is sha256:", f"expected was sha256:{'1' * 64}"),
        f"{APPLY} --expect {'1' * 64}"),
    Row("sums past the largest", both(state("base", loud), state("delta", but({QUERY: LOUD}))), 4, "non_finite",
        (QUERY, "4,096 elements", "--allow non_finite")),
    Row("a delta with NaN", state("delta", but(NAN)), 4, "non_finite", ("down_proj", "1 elements")),
    Row("both, and another digest", both(state("base", loud), state("delta", but({QUERY: LOUD}))), 4, "digest",
        (QUERY, "expected was"), f"{APPLY} --expect {'1' * 64}"),
    Row("a cast past the largest",
        both(state("base", lambda: {"w": torch.tensor([1e6])}), state("delta", lambda: {"w": torch.tensor([1.0])})), 4,
        "non_finite", ("w: 1 elements",), f"{APPLY} --dtype float16"),
    Row("touched before it is read", nothing, 3, "changed", ("base/pytorch_model.bin", "run again"), world=Touching),
    Row("longer before it is read", nothing, 3, "changed", ("base/pytorch_model.bin",), world=Growing),
    Row("replaced before it is read", nothing, 3, "changed", ("base/pytorch_model.bin",), world=Replacing),
    Row("touched while it is read", nothing, 3, "changed", ("base/pytorch_model.bin",), STEPS,
        world=lambda: Touching(late=True)),
    Row("longer while it is read", nothing, 3, "changed", ("base/pytorch_model.bin",), STEPS,
        world=lambda: Growing(late=True)),
    Row("cut while it is read", nothing, 3, "", ("base/pytorch_model.bin",), STEPS,
        world=lambda: Truncating(late=True)),
    Row("a disk that fills up", nothing, 6, "disk_space", ("No space left",), f"{APPLY} --memory-limit 128KiB",
        world=FullDisk),
]  # fmt: skip


@rows(PASSES)
def test_what_the_pass_shows_leaves_nothing(small: Path, run: Run, row: Row) -> None:
    row.make(small)
    before = snapshot(small)
    world = row.world()
    assert_refused(run(row.command, world), row)
    after = snapshot(small)
    kept = [name for name in after if name.startswith("out")]
    for name in kept:
        del after[name]
    assert isinstance(world, Disturbing) or after == before
    # Nothing is wrong with what was made, if only the expectation was another.
    assert (row.name == "another digest") == bool(kept)
    assert "out" not in kept


# a damaged model


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair, and the model rebuilt from it in four shards, with a tokenizer."""
    place = tmp_path_factory.mktemp("rebuilt")
    save(place / "base", llama(1, rotary=False))
    save(place / "delta", llama(2, 0.01, rotary=False))
    (place / "delta" / "tokenizer.model").write_bytes(bytes(range(200)))
    apply(place / "base", place / "delta", place / "model", max_shard_size=60_000)
    return place


@pytest.fixture
def model(tmp_path: Path, rebuilt: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(rebuilt, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


MANIFEST, SUMS = "model/bayling-delta.json", "model/SHA256SUMS"
FIRST, SECOND = "model/model-00001-of-00004.safetensors", "model/model-00002-of-00004.safetensors"
VERIFY = "verify model"
ANEW = "verify model --base base --delta delta"


def sums(change: Callable[[str], str]) -> Make:
    """Have SHA256SUMS be the only record, and change it."""

    def make(place: Path) -> None:
        (place / MANIFEST).unlink()
        lines = (place / SUMS).read_text().splitlines(keepends=True)
        text = change("".join(line for line in lines if "bayling-delta.json" not in line))
        (place / SUMS).write_bytes(text.encode("utf-8", "surrogateescape"))

    return make


def only(word: str) -> Make:
    """Leave the lines of SHA256SUMS that have a word in them."""
    return sums(lambda text: "".join(line for line in text.splitlines(keepends=True) if word in line))


def manifest(change: Callable[[Any], object]) -> Make:
    """Have the manifest be the only record, and change it."""
    return both(remove(SUMS), edit(MANIFEST, change))


def norm_entry(**values: object) -> Make:
    return manifest(lambda document: document["result"]["tensors"][NORM].update(values))


def file_entry(**values: object) -> Make:
    return manifest(lambda document: document["result"]["files"][0].update(values))


def another_file(name: object) -> Make:
    return manifest(lambda document: document["result"]["files"].append({"name": name, "size": 1, "sha256": "0" * 64}))


def nest(levels: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(levels - 1):
        nested = [nested]
    return nested


def without_records(place: Path) -> None:
    (place / MANIFEST).unlink()
    (place / SUMS).unlink()


def without_tensors(*names: str) -> Make:
    """Write the model's shard anew without some tensors, under a manifest that has them."""

    def make(place: Path) -> None:
        from safetensors.torch import load_file, save_file

        (place / SUMS).unlink()
        edit(MANIFEST, lambda document: document["result"].update(files=[]))(place)
        tensors: StateDict = {}
        for shard in sorted((place / "model").glob("model-*")):
            tensors |= load_file(shard)
            shard.unlink()
        (place / "model/model.safetensors.index.json").unlink()
        kept = {name: tensor for name, tensor in tensors.items() if name not in names}
        save_file(kept, place / "model/model.safetensors", {"format": "pt"})

    return make


def sum_bytes(name: str) -> bytes:
    total = llama(1, rotary=False)[name] + llama(2, 0.01, rotary=False)[name]
    return bytes(total.numpy().tobytes())


@dataclass(frozen=True)
class ModelRow(Row):
    """A row about a model that was good."""

    command: str = VERIFY


class Forbidding(System):
    """A file that may not be read."""

    def open_read(self, path: Path, *, direct: bool) -> int:
        if path.name == "tokenizer.model":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return super().open_read(path, direct=direct)


MODELS: list[Row] = [
    # a bit, by where it is
    ModelRow("length of a header", flip(FIRST, 0), 5, "model", (FIRST,)),
    ModelRow("high byte of that length", flip(FIRST, 7, bit=6), 5, "model", (FIRST,)),
    ModelRow("name in a header", flip(FIRST, b"q_proj"), 5, "model", (FIRST, QUERY)),
    ModelRow("dtype in a header", swap(FIRST, b'"F16"', b'"I16"'), 5, "model", (FIRST,)),
    ModelRow("shape in a header", swap(FIRST, b"[64,64]", b"[64,65]"), 5, "model", (FIRST,)),
    ModelRow("shape in a header, turned", swap(FIRST, b"[160,64]", b"[64,160]"), 5, "model", (EMBEDDING, "[64, 160]")),
    ModelRow("offset in a header", swap(FIRST, b'"data_offsets":[0,', b'"data_offsets":[2,'), 5, "model", (FIRST,)),
    ModelRow("metadata in a header", swap(FIRST, b'"pt"', b'"tf"'), 5, "digest", (FIRST, "SHA-256 is")),
    ModelRow("first byte of a tensor", flip(FIRST, sum_bytes(EMBEDDING)), 5, "digest", (f"{FIRST}: {EMBEDDING}",)),
    ModelRow("last byte of a tensor", flip(FIRST, sum_bytes(EMBEDDING), 20_479, 7), 5, "digest",
        (f"{FIRST}: {EMBEDDING}",)),
    ModelRow("middle of a tensor", flip(FIRST, sum_bytes(QUERY), 4001, 3), 5, "digest", (f"{FIRST}: {QUERY}",)),
    ModelRow("last byte of a file", flip(FIRST, -1), 5, "digest", (f"{FIRST}: ",)),
    ModelRow("configuration", flip("model/config.json", b"hidden"), 5, "digest", ("model/config.json",)),
    ModelRow("tokenizer", flip("model/tokenizer.model", 99), 5, "digest", ("model/tokenizer.model",)),
    ModelRow("model card", flip("model/README.md", 99), 5, "digest", ("model/README.md",)),
    ModelRow("index", flip("model/model.safetensors.index.json", b"total_size", 14), 5, "digest", ("index.json",)),
    ModelRow("index, a file in it", flip("model/model.safetensors.index.json", b"-of-00004", 8), 5, "model",
        ("model-00",)),
    ModelRow("manifest, a digest in it", swap(MANIFEST, b'"sha256:', b'"sha256:0'), 3, "record", (MANIFEST,)),
    ModelRow("manifest, its schema", swap(MANIFEST, b"manifest/1", b"manifest/3"), 3, "record",
        (MANIFEST, "manifest/3")),
    ModelRow("manifest, a date", swap(MANIFEST, b'"created": "2', b'"created": "3'), 5, "digest", (MANIFEST,)),
    ModelRow("list, a digest in it", other_digit(SUMS, 10), 5, "digest", ("README.md",)),
    ModelRow("list, a name in it", flip(SUMS, 67, bit=1), 5, "model", ("not here",)),
    ModelRow("list, a blank in it", flip(SUMS, 64), 3, "record", (SUMS, "line 1")),
    # files
    ModelRow("a shard is missing", remove(SECOND), 5, "model", (SECOND,)),
    ModelRow("two shards are missing", both(remove(FIRST), remove(SECOND)), 5, "model", (FIRST, SECOND)),
    ModelRow("a shard is cut", cut(SECOND, -2), 5, "model", (SECOND, "bayling-delta repair model --base")),
    ModelRow("a shard is empty", cut(SECOND, 0), 5, "model", (SECOND,)),
    ModelRow("a shard is longer", cut(SECOND, 100_000), 5, "model", (SECOND,)),
    ModelRow("a shard is a pointer", write(SECOND, LFS), 5, "model", (SECOND, "git-lfs")),
    ModelRow("two shards are swapped", exchange(FIRST, SECOND), 5, "model", (FIRST, SECOND)),
    ModelRow("a shard more", copy(FIRST, "model/model-00005-of-00005.safetensors"), 5, "model",
        ("model-00005-of-00005.safetensors", "a loader may take it")),
    ModelRow("a .bin besides", write("model/pytorch_model.bin", b"x"), 5, "model", ("model/pytorch_model.bin",)),
    ModelRow("a model that shadows", copy(FIRST, "model/model.safetensors"), 5, "model", ("lacks the tensor",)),
    ModelRow("an adapter besides",
        both(write("model/adapter_config.json", b"{}"), write("model/adapter_model.safetensors", b"")), 5, "model",
        ("adapter",)),
    ModelRow("a shard is renamed", both(copy(SECOND, "model/model-00009-of-00004.safetensors"), remove(SECOND)), 5,
        "model", (SECOND, "model-00009-of-00004.safetensors")),
    ModelRow("no weights", remove("model/model*"), 5, "model", (FIRST,)),
    ModelRow("no index", remove("model/model.safetensors.index.json"), 5, "model", ("index.json",)),
    ModelRow("no configuration", remove("model/config.json"), 5, "model", ("model/config.json",)),
    ModelRow("no manifest", remove(MANIFEST), 5, "model", (MANIFEST, "not here")),
    ModelRow("configuration says tied", edit("model/config.json", lambda c: c.update(tie_word_embeddings=True)), 5, "",
        ("config.json",)),
    ModelRow("two tensors are missing", without_tensors(NORM, QUERY), 5, "model", (NORM, QUERY)),
    ModelRow("a tensor is missing", without_tensors(NORM), 5, "model", (f"lacks the tensor {NORM}",)),
    ModelRow("a file may not be read", nothing, 5, "", ("tokenizer.model", "Permission denied"), world=Forbidding),
    # records that cannot be used
    ModelRow("nothing recorded", without_records, 5, "no_record", ("model: ", "--against", "--base and --delta")),
    ModelRow("list of no weights", only("README"), 5, "no_record", ("model",)),
    ModelRow("list of some weights", only("00001-of"), 5, "", ("model-00002-of-00004.safetensors",)),
    ModelRow("list empty", sums(lambda _: ""), 3, "record", (SUMS,)),
    ModelRow("list of MD5", sums(lambda _: f"{'0' * 32}  README.md\n"), 3, "record", (SUMS, "line 1")),
    ModelRow("list with a comment", sums(lambda text: f"# by hand\n{text}"), 3, "record", ("line 1",)),
    ModelRow("list that says twice", sums(lambda text: text + text), 3, "record", ("line 10",)),
    ModelRow("list that leaves", sums(lambda text: f"{text}{'0' * 64}  ../x\n"), 3, "record", ("line 10",)),
    ModelRow("list of the system's", sums(lambda text: f"{text}{'0' * 64}  /etc/passwd\n"), 3, "record", ("line 10",)),
    ModelRow("list with NUL", sums(lambda text: f"{text}{'0' * 64}  a\0b\n"), 3, "record", ("line 10",)),
    ModelRow("list of a device of Windows", sums(lambda text: f"{text}{'0' * 64}  COM1.txt\n"), 3, "record",
        ("line 10",)),
    ModelRow("list of names that differ by case", sums(lambda text: f"{text}{'0' * 64}  Readme.md\n"), 3, "record",
        ("'README.md' and 'Readme.md'",)),
    ModelRow("list of 10 MB", both(remove(MANIFEST), cut(SUMS, 10_000_001)), 3, "record", ("at most 10,000,000",)),
    ModelRow("list with an escape code", sums(lambda text: f"{text}{'0' * 64}  \x1b[2J\n"), 3, "record", ("line 10",)),
    ModelRow("list of what is not there", sums(lambda text: f"{text}{'0' * 64}  gone.bin\n"), 5, "model",
        ("model/gone.bin",)),
    ModelRow("list of a pipe", both(pipe("model/pipe"), sums(lambda text: f"{text}{'0' * 64}  pipe\n")), 5, "model",
        ("pipe",)),
    ModelRow("list of itself", sums(lambda text: f"{text}{'0' * 64}  SHA256SUMS\n"), 5, "digest", (SUMS,)),
    ModelRow("manifest not JSON", both(remove(SUMS), write(MANIFEST, b"<html>")), 3, "record",
        (MANIFEST, "is not a manifest")),
    ModelRow("manifest a list", both(remove(SUMS), write(MANIFEST, b"[]")), 3, "record", ("is not a manifest",)),
    ModelRow("manifest nested", both(remove(SUMS), write(MANIFEST, b'{"a":' * 100_000)), 3, "record",
        ("is not a manifest",)),
    ModelRow("manifest of version 2", manifest(lambda m: m.update(schema="bayling-delta/manifest/2")), 3, "record",
        ("/2'",)),
    ModelRow("manifest of another kind", manifest(lambda m: m.update(schema="bayling-delta/plan/1")), 3, "record",
        ("plan/1",)),
    ModelRow("manifest's digest is another", manifest(lambda m: m["result"].update(weights_digest="0" * 64)), 3,
        "record", ("contradicts itself",)),
    ModelRow("manifest's tensor is another", norm_entry(sha256="0" * 64), 3, "record", ("contradicts itself",)),
    ModelRow("manifest's shape is negative", norm_entry(shape=[-1]), 3, "record", (NORM,)),
    ModelRow("manifest's shape is text", norm_entry(shape="64"), 3, "record", (NORM,)),
    ModelRow("manifest's shape is absurd", norm_entry(shape=[10**40]), 3, "record",
        ("'model.norm.weight' is not described",)),
    ModelRow("manifest's dtype is half a character", norm_entry(dtype="\ud800"), 3, "record", (MANIFEST,)),
    ModelRow("manifest's file leaves", another_file("../x"), 3, "record", ("../x",)),
    ModelRow("manifest's file is a device of Windows", another_file("aux.json"), 3, "record", ("'aux.json'",)),
    ModelRow("manifest's file has a stream", another_file("config.json:x"), 3, "record", ("'config.json:x'",)),
    ModelRow("manifest's files differ by case", another_file("Config.JSON"), 3, "record",
        ("'config.json' and 'Config.JSON'",)),
    ModelRow("manifest nests 101 levels", manifest(lambda m: m.update(nested=nest(100))), 3, "record", ("too deep",)),
    ModelRow("manifest's file is a number", another_file(3), 3, "record", (MANIFEST,)),
    ModelRow("manifest's file is half a character", another_file("\ud800"), 3, "record", (MANIFEST,)),
    ModelRow("manifest's size is negative", file_entry(size=-1), 5, "model", (FIRST, "says -1")),
    ModelRow("manifest's size is a fraction", file_entry(size=1.5), 3, "record", ("1.5",)),
    ModelRow("manifest's size is absurd", file_entry(size=10**40), 5, "model", (FIRST,)),
    ModelRow("manifest's size fills a page", file_entry(size=10**4000), 3, "record", ("a number of 4,001 digits",)),
    ModelRow("manifest says twice",
        manifest(lambda m: m["result"]["files"].insert(0, {**m["result"]["files"][0], "size": 1})), 3, "record",
        ("bayling-delta.json",)),
    ModelRow("manifest counts wrongly", manifest(lambda m: m["result"].update(parameters=7)), 3, "record", (MANIFEST,)),
    ModelRow("manifest's file of a tensor is not listed", norm_entry(file="gone.safetensors"), 3, "record", (NORM,)),
    ModelRow("manifest of no success", manifest(lambda m: m.update(ok=False)), 3, "record", (MANIFEST,)),
    ModelRow("manifest's cast is absurd", manifest(lambda m: m["options"].update(dtype="F64")), 3, "record",
        (MANIFEST,), ANEW),
    # against something else
    ModelRow("against another digest", nothing, 5, "digest", (f"says sha256:{'0' * 64}",),
        f"{VERIFY} --against {'0' * 64}"),
    ModelRow("against another model",
        lambda place: (place / "other.json").write_text(json.dumps(record(place / "base"))), 5, "digest",
        (f"{FIRST}: model.embed_tokens.weight and 19 more: has other values than other.json",),
        f"{VERIFY} --against other.json"),
    ModelRow("against a digest of nothing", both(remove("model"), state("model", buffers_alone)), 5, "model",
        ("model",), f"{VERIFY} --against e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
    ModelRow("a model that is not there", remove("model"), 5, "", ("model",), f"{VERIFY} --against {'0' * 64}"),
    ModelRow("another base", state("base", lambda: llama(5, rotary=False)), 5, "model",
        (f"{FIRST}: {QUERY}", "elements differ"), ANEW),
    ModelRow("one weight of the model", both(without_records, flip(FIRST, sum_bytes(QUERY), 4000)), 5, "model",
        (f"{FIRST}: {QUERY}", "1 of 4,096 elements differ", "[31, 16]"), ANEW),
    ModelRow("another cast", without_records, 5, "model", (QUERY, "F16", "BF16"), f"{ANEW} --dtype bfloat16"),
    ModelRow("a damaged base", damaged("base", QUERY), 5, "crc", ("base/pytorch_model.bin",), ANEW),
    ModelRow("a base that is not there", remove("base"), 3, "not_found", ("base: ",), ANEW),
    ModelRow("a base that does not fit", state("base", wider), 4, "shape", (QUERY,), ANEW),
    ModelRow("an unreadable model without records", both(without_records, cut(SECOND, 3000)), 3, "incomplete",
        (SECOND,), ANEW),
]  # fmt: skip


@rows(MODELS)
def test_what_is_wrong_with_a_model_is_found_and_placed(model: Path, run: Run, row: Row) -> None:
    row.make(model)
    before = snapshot(model)
    assert_refused(run(row.command, row.world()), row)
    assert snapshot(model) == before


@pytest.mark.parametrize("command", [VERIFY, ANEW])
def test_the_model_itself_is_good(model: Path, run: Run, command: str) -> None:
    before = snapshot(model)
    assert run(command).code == 0
    assert snapshot(model) == before
