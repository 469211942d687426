"""What `inspect` says of a checkpoint: held against torch, and against checkpoints that are odd in one way each."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bayling_delta import inspect_checkpoint, open_checkpoint, report
from bayling_delta.checkpoint import survey
from bayling_delta.errors import CheckpointError
from bayling_delta.safetensors_format import lay_out
from bayling_delta.system import System, using
from tests.meta import PLAIN, random_model, save_meta
from tests.pairs import CONFIG, StateDict, llama, save
from tests.test_schemas import check
from tests.test_startup import HEAVY, modules_after

MIB = 1 << 20
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROTARY = "model.layers.0.self_attn.rotary_emb.inv_freq"
GATE = "model.layers.1.mlp.gate_proj.weight"
FORMATS = Path(__file__).parent.parent / "docs" / "formats.md"


def is_norm(name: str) -> bool:
    return name.endswith("norm.weight")


def full(dtype: torch.dtype = torch.float16, scale: float = 0.02, *, rotary: bool = False) -> StateDict:
    """A full model: norms around one, projections of LLaMA's magnitude."""
    state = llama(1, scale, dtype, rotary=rotary)
    random = torch.Generator().manual_seed(1)
    for name in filter(is_norm, state):
        state[name] = (1 + 0.1 * torch.randn(state[name].shape, generator=random)).to(dtype)
    return state


def delta() -> StateDict:
    return llama(2, 0.002, rotary=False)


def with_norms(state: StateDict, value: float) -> StateDict:
    return {name: torch.full_like(tensor, value) if is_norm(name) else tensor for name, tensor in state.items()}


def model(place: Path, state: StateDict | None = None, container: str = "torch", **config: Any) -> Path:
    return save(place / "model", state or full(), container=container, config=CONFIG | config)


def kinds(document: dict[str, Any]) -> list[str]:
    return [odd["kind"] for odd in document["odd"]]


# what it is


def test_counts_are_torchs(tmp_path: Path) -> None:
    state = full(rotary=True)
    document = inspect_checkpoint(save(tmp_path / "model", state, shards=3))
    assert (document["schema"], document["ok"]) == ("bayling-delta/inspect/1", True)
    assert document["tensors"] == len(state)
    weights = {name: tensor for name, tensor in state.items() if tensor.dtype == torch.float16}
    assert document["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert document["rotary_buffers"] == len(state) - len(weights) == 2
    for entry, name in zip(document["dtypes"], ("F16", "F32"), strict=True):
        tensors = [t for t in state.values() if (t.dtype == torch.float16) == (name == "F16")]
        sums = {"parameters": sum(t.numel() for t in tensors), "bytes": sum(t.nbytes for t in tensors)}
        assert entry == {"dtype": name, "tensors": len(tensors), **sums}
    files = sorted((tmp_path / "model").glob("*.bin"))
    assert document["files"] == [
        {"name": file.name, "size": file.stat().st_size, "tensors": len(torch.load(file))} for file in files
    ]
    assert [kind for kind in document["kinds"] if "gate" in kind["name"]] == [
        {"name": GATE.replace("1", "*"), "count": 2, "dtype": "F16", "shape": [96, 64], "parameters": 2 * 96 * 64}
    ]
    assert sum(kind["count"] for kind in document["kinds"]) == len(state)


def test_architecture_from_config_and_from_shapes(tmp_path: Path) -> None:
    sizes = {key: CONFIG[key] for key in ("num_hidden_layers", "hidden_size", "intermediate_size")}
    sizes |= {key: CONFIG[key] for key in ("num_attention_heads", "num_key_value_heads", "vocab_size")}
    document = inspect_checkpoint(model(tmp_path, full(rotary=True)))
    named = {"source": "config.json", "class": "LlamaForCausalLM", "model_type": "llama"}
    assert document["architecture"] == {**named, "config": sizes, "shapes": sizes}
    alone = inspect_checkpoint(save(tmp_path / "alone", full(rotary=True), config=None))
    nothing = dict.fromkeys(sizes)
    unnamed = {"source": "config.json", "class": None, "model_type": None}
    assert alone["architecture"] == {**unnamed, "config": nothing, "shapes": sizes}


def test_grouped_queries(tmp_path: Path) -> None:
    state = full()
    for name in [name for name in state if "k_proj" in name or "v_proj" in name]:
        state[name] = state[name][:32].clone()
    document = inspect_checkpoint(model(tmp_path, state, num_key_value_heads=2))
    assert document["architecture"]["shapes"]["num_key_value_heads"] == 2
    assert document["odd"] == []


@pytest.mark.parametrize("container", ["torch", "safetensors"])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_clean_model_is_full_and_not_odd(tmp_path: Path, container: str, shards: int) -> None:
    document = inspect_checkpoint(save(tmp_path / "model", full(), container=container, shards=shards))
    assert (document["container"], document["looks_like"], document["odd"]) == (container, "full model", [])


def test_the_description_does_not_depend_on_the_container(tmp_path: Path) -> None:
    """Nor on the shards, the order, or how the elements lie."""
    state = full()
    transposed = {name: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor for name, tensor in state.items()}
    directories = [
        save(tmp_path / "bin", state, shards=2),
        save(tmp_path / "safetensors", state, container="safetensors"),
        save(tmp_path / "views", transposed, order=sorted(state, reverse=True)),
    ]
    one, *others = (inspect_checkpoint(directory) for directory in directories)
    for other in others:
        assert {key: other[key] for key in one if key not in ("container", "files")} == {
            key: one[key] for key in one if key not in ("container", "files")
        }


def mostly_positive() -> StateDict:
    """As many elements negative as neither a full model nor a delta should have."""
    norms = torch.cat([torch.full((272,), 1.0), torch.full((48,), -3.0)]).half().reshape(64, 5).t().contiguous()
    names = filter(is_norm, full())
    return full() | {name: norm.clone() for name, norm in zip(names, norms, strict=True)}


VERDICTS: dict[str, tuple[Callable[[], StateDict], str, str]] = {
    "full": (full, "full model", "100.0% of 320 elements are positive"),
    "bfloat16": (lambda: full(torch.bfloat16), "full model", "clearly positive"),
    "float32": (lambda: full(torch.float32), "full model", "clearly positive"),
    "delta": (delta, "delta", "a delta's lie around zero"),
    "large delta": (
        lambda: {name: 100 * tensor for name, tensor in delta().items()},
        "delta",
        "a delta's lie around zero",
    ),
    "delta that moved one way": (lambda: with_norms(delta(), 0.001), "delta", "mean 0.001"),
    "delta with frozen norms": (lambda: with_norms(delta(), 0.0), "delta", "the norms were not trained"),
    "zeros": (lambda: {name: torch.zeros_like(t) for name, t in full().items()}, "unknown", "so is all else"),
    "mostly positive norms": (mostly_positive, "unknown", "85.0% of 320 elements are positive"),
    "negative norms": (lambda: with_norms(full(), -1.0), "unknown", "these are neither"),
    "no norms": (lambda: {name: t for name, t in full().items() if not is_norm(name)}, "unknown", "no RMS-norm"),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_delta_or_full_model(tmp_path: Path, case: str) -> None:
    make, verdict, words = VERDICTS[case]
    document = inspect_checkpoint(save(tmp_path / "model", make()))
    check(document, "inspect")
    assert document["looks_like"] == verdict
    assert words in document["reasons"][0]


def test_norms_that_add_one_are_no_sign(tmp_path: Path) -> None:
    document = inspect_checkpoint(model(tmp_path, delta(), model_type="gemma2"))
    assert document["looks_like"] == "unknown"
    assert "gemma2" in document["reasons"][0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_figures_are_torchs(tmp_path: Path, dtype: torch.dtype) -> None:
    state = full(dtype)
    signs = inspect_checkpoint(save(tmp_path / "model", state))["signs"]
    norms = torch.cat([tensor for name, tensor in state.items() if is_norm(name)]).double()
    assert signs["norms"]["elements"] == norms.numel()
    assert signs["norms"]["positive"] == (norms > 0).double().mean().item()
    assert signs["norms"]["mean"] == pytest.approx(norms.mean().item())
    assert signs["norms"]["standard_deviation"] == pytest.approx(norms.std(correction=0).item())
    assert signs["rows"]["magnitude"] == pytest.approx(0.02, rel=0.05)


# what is odd: the checkpoint's change, the kind, and words of the message; a clean model has none of them


def rounded_float16(scale: float = 0.02) -> StateDict:
    return {name: tensor.to(torch.float16) for name, tensor in full(torch.bfloat16, scale).items()}


def nine_bits() -> StateDict:
    return {name: (tensor.view(torch.int16) & ~3).view(torch.float16) for name, tensor in full().items()}


def changed(name: str, place: int, value: float) -> StateDict:
    state = full()
    state[name].view(-1)[place] = value
    return state


def grown(rows: int, names: Iterable[str] = (EMBEDDING, HEAD)) -> StateDict:
    return full() | {name: torch.full((rows, 64), 0.02).half() for name in names}


def tied(*, equal: bool) -> StateDict:
    state = full()
    return state | {HEAD: state[EMBEDDING].clone()} if equal else state


def beside(directory: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def int8_embeddings() -> StateDict:
    return full() | {name: torch.ones((160, 64), dtype=torch.int8) for name in (EMBEDDING, HEAD)}


def vast_tokenizer(place: Path) -> Path:
    directory = model(place)
    with (directory / "tokenizer.json").open("wb") as file:
        file.truncate(100_000_001)
    return directory


def both_containers(place: Path) -> Path:
    directory = model(place)
    save_file(full(), directory / "model.safetensors")
    return directory


def stray_shard(place: Path) -> Path:
    directory = save(place / "model", full(), shards=2)
    torch.save(full(), directory / "pytorch_model-00003-of-00003.bin")
    return directory


def tokens(words: int) -> dict[str, Any]:
    """A tokenizer.json with this many tokens, of which the last two are added."""
    vocabulary = {str(number): number for number in range(words - 2)}
    return {"model": {"vocab": vocabulary}, "added_tokens": [{"content": "<a>"}, {"content": "<b>"}, {"content": "0"}]}


def parts_of_two_models(place: Path) -> Path:
    directory = save_meta(place / "model", random_model(PLAIN), PLAIN, 2)
    other = save_meta(place / "other", random_model(PLAIN, seed=1), PLAIN, 2)
    (other / "consolidated.01.pth").rename(directory / "consolidated.01.pth")
    return directory


QUANTISED = full() | {"model.layers.0.self_attn.q_proj.qweight": torch.zeros((8, 8), dtype=torch.int32)}
LLAMA_WORDS = grown(32000)
SWAPPED = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": {"content": "</s>"}}
ODD: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "bfloat16 as float16": (lambda p: model(p, full(torch.bfloat16)), "bfloat16", "stored as BF16"),
    "rounded": (lambda p: model(p, rounded_float16()), "bfloat16", "have their low 3 bits zero"),
    "rounded, subnormals": (lambda p: model(p, rounded_float16(2e-4)), "bfloat16", "have their low 3 bits zero"),
    "other dtype": (lambda p: model(p, full(torch.float32)), "dtype", "says float16; most weights are stored as F32"),
    "infinite norm": (lambda p: model(p, changed("model.norm.weight", 9, torch.inf)), "non_finite", "1 of the 64"),
    "NaN in a row": (lambda p: model(p, changed(HEAD, 64 * 10 + 3, torch.nan)), "non_finite", "1 of the 512"),
    "tied twice": (lambda p: model(p, tied(equal=True), tie_word_embeddings=True), "tied", "20,480 bytes"),
    "tied, unequal": (lambda p: model(p, tied(equal=False), tie_word_embeddings=True), "tied", "the two differ"),
    "rows": (lambda p: model(p, grown(192)), "vocabulary", "192 rows; config.json says vocab_size 160"),
    "head": (lambda p: model(p, grown(192, [HEAD])), "vocabulary", "192 rows; model.embed_tokens.weight has 160"),
    "32001": (lambda p: model(p, grown(32001), vocab_size=32001), "vocabulary", "[PAD], as in Vicuna v0"),
    "32003": (lambda p: model(p, grown(32003), vocab_size=32003), "vocabulary", "as in LLaVA"),
    "tokens": (lambda p: beside(model(p), {"tokenizer.json": tokens(161)}), "vocabulary", "knows 161 tokens"),
    "GPTQ": (lambda p: model(p, QUANTISED), "quantised", "q_proj.qweight"),
    "int8": (lambda p: model(p, full() | {GATE: torch.ones((96, 64), dtype=torch.int8)}), "quantised", GATE),
    "int8 and tied": (lambda p: model(p, int8_embeddings(), tie_word_embeddings=True), "quantised", "2 tensors"),
    "parts of two models": (parts_of_two_models, "copies", "has other values than consolidated.00.pth in 5 of"),
    "both containers": (both_containers, "both_containers", "and safetensors is described here"),
    "another shard": (stray_shard, "stray_weights", "pytorch_model-00003-of-00003.bin"),
    "other files": (lambda p: beside(model(p), {"modeling.py": ""}), "extra_files", "modeling.py"),
    "no config": (lambda p: save(p / "model", full(), config=None), "config", "is not there"),
    "broken config": (lambda p: beside(model(p), {"config.json": "{"}), "damaged", "is not JSON"),
    "broken tokenizer": (lambda p: beside(model(p), {"tokenizer.json": "{"}), "damaged", "is not JSON"),
    "strange tokenizer": (lambda p: beside(model(p), {"tokenizer.json": "[]"}), "damaged", "is not a JSON object"),
    "vast tokenizer": (vast_tokenizer, "unsupported", "at most 64,000,000 are read"),
    "other sizes": (lambda p: model(p, hidden_size=128), "architecture", "says hidden_size 128; the shapes say 64"),
    "other layers": (lambda p: model(p, num_hidden_layers=3), "architecture", "says num_hidden_layers 3"),
    "decapoda": (
        lambda p: model(p, bos_token_id=0, eos_token_id=1, pad_token_id=-1),
        "special_tokens",
        "bos 0 and eos 1",
    ),
    "early tokens": (lambda p: beside(model(p), {"special_tokens_map.json": SWAPPED}), "special_tokens", "bos and unk"),
    "class": (
        lambda p: beside(model(p), {"tokenizer_config.json": {"tokenizer_class": "LLaMATokenizer"}}),
        "tokenizer_class",
        "LlamaTokenizer is meant",
    ),
    "Llama-2": (
        lambda p: model(p, LLAMA_WORDS, vocab_size=32000, max_position_embeddings=4096, rms_norm_eps=1e-5),
        "generation",
        "max_position_embeddings 4,096 and rms_norm_eps 1e-05",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_what_is_odd_is_said_and_nothing_else(tmp_path: Path, case: str) -> None:
    make, kind, words = ODD[case]
    document = inspect_checkpoint(make(tmp_path))
    check(document, "inspect")
    assert kinds(document) == [kind]
    assert words in document["odd"][0]["message"]


def test_every_oddity_is_documented() -> None:
    section = (
        FORMATS.read_text(encoding="utf-8")
        .partition("### Inspect")[2]
        .partition("`odd` has what")[2]
        .partition("\n## ")[0]
    )
    documented = set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))
    problems = {"damaged", "unsupported"}  # those have the kinds of refusals
    assert {kind for _, kind, _ in ODD.values()} - problems == documented


NOT_ODD: dict[str, Callable[[Path], Path]] = {
    "LLaMA-1's vocabulary": lambda p: model(p, LLAMA_WORDS, vocab_size=32000),
    "a head that shares the embedding": lambda p: model(
        p, (state := full()) | {HEAD: state[EMBEDDING]}, tie_word_embeddings=True
    ),
    "no head": lambda p: model(
        p, {name: t for name, t in full().items() if name != HEAD}, "safetensors", tie_word_embeddings=True
    ),
    "bfloat16 that says so": lambda p: model(p, full(torch.bfloat16), torch_dtype="bfloat16"),
    "the newer key": lambda p: model(p, full(torch.float32), torch_dtype=None, dtype="float32"),
    "a tokenizer that fits": lambda p: beside(
        model(p),
        {
            "tokenizer.json": tokens(160),
            "tokenizer.model": "",
            "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"},
            "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        },
    ),
    "LLaMA-1 65B's epsilon": lambda p: save(
        p / "model",
        {HEAD: torch.ones((32000, 8)).half()},
        config={"model_type": "llama", "vocab_size": 32000, "hidden_size": 8192, "rms_norm_eps": 1e-5},
    ),
    "float16 with one bit more than bfloat16": lambda p: model(p, nine_bits()),
    "another vocabulary with 4096 positions": lambda p: model(p, max_position_embeddings=4096),
    "a vocabulary of two": lambda p: model(p, grown(2), vocab_size=2),
    "a strange rotary buffer": lambda p: model(p, full(rotary=True) | {ROTARY: torch.full((8,), torch.nan)}),
    "few numbers": lambda p: save(
        p / "model", {name: torch.ones((15, 17)).half() for name in ("a.weight", "b.weight")}, config={}
    ),
}


@pytest.mark.parametrize("case", NOT_ODD)
def test_what_is_not_odd(tmp_path: Path, case: str) -> None:
    assert inspect_checkpoint(NOT_ODD[case](tmp_path))["odd"] == []


def test_subnormals_of_rounded_weights_do_have_low_bits() -> None:
    """Else the case above would not show that they are left out."""
    stored = rounded_float16(2e-4)[GATE].view(torch.int16)
    assert ((stored & 0x7C00 == 0) & (stored & 7 != 0)).any()


TOKENIZERS: dict[str, tuple[dict[str, Any], int | None]] = {
    "BPE": ({"tokenizer.json": tokens(100)}, 100),
    "Unigram": ({"tokenizer.json": {"model": {"vocab": [["a", 0.5], ["b", 1.0]]}}}, 2),
    "added": ({"tokenizer.model": "", "added_tokens.json": {"[PAD]": 99}}, 100),
    "sentencepiece alone": ({"tokenizer.model": ""}, None),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers(tmp_path: Path, case: str) -> None:
    files, vocabulary = TOKENIZERS[case]
    tokenizer = inspect_checkpoint(beside(model(tmp_path), files))["tokenizer"]
    assert tokenizer == {"files": list(files), "class": None, "vocabulary": vocabulary}


# what can be read of a checkpoint that is not whole


def lacks_shard(place: Path) -> Path:
    directory = save(place / "model", full(), shards=3)
    (directory / "pytorch_model-00002-of-00003.bin").unlink()
    return directory


def truncated_shard(place: Path) -> Path:
    directory = save(place / "model", full(), container="safetensors", shards=2)
    shard = directory / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    return directory


def stale_index(place: Path) -> Path:
    directory = save(place / "model", full(), shards=2)
    index = directory / "pytorch_model.bin.index.json"
    index.write_text(index.read_text().replace("model.norm.weight", "model.other.weight"))
    return directory


def broken_index(place: Path) -> Path:
    return beside(save(place / "model", full(), shards=2), {"pytorch_model.bin.index.json": "{"})


def escaping_index(place: Path) -> Path:
    directory = save(place / "model", full(), shards=2)
    index = directory / "pytorch_model.bin.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["evil"] = "../evil.bin"
    index.write_text(json.dumps(document))
    return directory


def mixed_shards(place: Path) -> Path:
    directory = save(place / "model", full(), shards=2)
    shard = directory / "pytorch_model-00001-of-00002.bin"
    state = torch.load(shard)
    shard.unlink()
    save_file(state, shard)
    return directory


INCOMPLETE: dict[str, tuple[Callable[[Path], Path], list[str], int]] = {
    # the change, the kinds of problem, tensors that can still be described
    "missing shard": (lacks_shard, ["incomplete"], 14),
    "truncated shard": (truncated_shard, ["incomplete"], 11),
    "stale index": (stale_index, ["index", "index"], 21),
    "broken index": (broken_index, ["index"], 21),
    "escaping index": (escaping_index, ["unsafe_name"], 21),
    "mixed containers": (mixed_shards, ["index"], 21),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_what_can_be_read_is_described(tmp_path: Path, case: str) -> None:
    make, problems, tensors = INCOMPLETE[case]
    directory = make(tmp_path)
    document = inspect_checkpoint(directory)
    assert (document["tensors"], kinds(document)) == (tensors, problems)
    assert (document["container"] == "mixed") == (case == "mixed containers")
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(directory)
    assert list(refused.value.problems) == survey(directory)[1]


def other_format(content: bytes) -> Callable[[Path], Path]:
    def write(place: Path) -> Path:
        (place / "pytorch_model.bin").write_bytes(content)
        return place / "pytorch_model.bin"

    return write


def legacy(place: Path) -> Path:
    torch.save(full(), place / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return place


NOTHING: dict[str, tuple[Callable[[Path], Path], str]] = {
    "legacy": (legacy, "PyTorch's format from before 1.6"),
    "LFS": (other_format(b"version https://git-lfs.github.com/spec/v1\n"), "git-lfs pointer"),
    "HTML": (other_format(b"<!DOCTYPE html><html>"), "web page"),
    "GGUF": (other_format(b"GGUF\x03\0\0\0" + bytes(64)), "llama.cpp file"),
    "empty": (other_format(b""), "is empty"),
    "absent": (lambda p: p / "absent", "No such file"),
    "no weights": (lambda p: beside(p, {"config.json": "{}"}), "has no model*.safetensors"),
}


@pytest.mark.parametrize("case", NOTHING)
def test_where_nothing_can_be_read_it_says_what_it_is(tmp_path: Path, case: str) -> None:
    make, words = NOTHING[case]
    with pytest.raises(CheckpointError, match=re.escape(words)):
        inspect_checkpoint(make(tmp_path))


# where it looks


def test_a_snapshot_of_the_hubs_cache(tmp_path: Path) -> None:
    plain = save(tmp_path / "plain", full(), container="safetensors", shards=2)
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(plain.iterdir())):
        (blobs / f"{number:064x}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    assert inspect_checkpoint(snapshot) == inspect_checkpoint(plain)


def test_a_single_file_and_an_index(tmp_path: Path) -> None:
    directory = beside(save(tmp_path / "model", full(), shards=3), {"notes.odt": ""})
    index = inspect_checkpoint(directory / "pytorch_model.bin.index.json")
    assert index == inspect_checkpoint(directory)
    shard = inspect_checkpoint(directory / "pytorch_model-00001-of-00003.bin")
    assert [file["name"] for file in shard["files"]] == ["pytorch_model-00001-of-00003.bin"]
    assert shard["tensors"] == 7
    assert [(odd["kind"], odd["message"]) for odd in shard["odd"]] == [
        ("incomplete", "is one of 3 shards by its name; name its directory, or its index")
    ]


class CountingSystem(System):
    """Counts the bytes read past the header of a large file."""

    def __init__(self, size: int, header_bytes: int) -> None:
        self.size = size
        self.header_bytes = header_bytes
        self.data_bytes = 0

    def read_into(self, handle: int, view: memoryview, offset: int) -> int:
        count = super().read_into(handle, view, offset)
        if os.fstat(handle).st_size == self.size:
            self.data_bytes += max(0, min(count, offset + count - self.header_bytes))
        return count


def sparse(path: Path, tensors: list[tuple[str, str, tuple[int, ...]]]) -> CountingSystem:
    """Write a safetensors file of zeros that takes no room on the disk, and return a system that counts its reads."""
    header, starts = lay_out(tensors)
    name, dtype, shape = max(tensors, key=lambda tensor: starts[tensor[0]])
    with path.open("wb") as file:
        file.write(header)
        file.truncate(starts[name] + torch.Size(shape).numel() * {"F16": 2, "F32": 4}[dtype])
    return CountingSystem(path.stat().st_size, len(header))


LARGE: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {
    "1 GB in few tensors": [(f"model.layers.{n}.mlp.up_proj.weight", "F16", (11008, 4096)) for n in range(12)],
    "the most that is sampled": [
        *((f"model.layers.{n}.norm.weight", "F32", (1 << 16,)) for n in range(1000)),
        *((f"model.layers.{n}.proj.bias", "F32", (1 << 16,)) for n in range(1000)),
        *((f"kind{n}.weight", "F32", (1 << 10, 1 << 12)) for n in range(100)),
    ],
}


@pytest.mark.parametrize("case", LARGE)
def test_little_is_read_of_a_large_file(tmp_path: Path, case: str) -> None:
    path = tmp_path / "model.safetensors"
    counting = sparse(path, LARGE[case])
    assert path.stat().st_size > 10**9
    with using(counting):
        document = inspect_checkpoint(path)
    assert 0 < counting.data_bytes == document["sampled_bytes"] <= 64 * MIB


def test_a_hundred_thousand_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    names = [f"model.layers.{n}.{which}" for n in range(25_000) for which in ("a.weight", "b.weight", "norm.weight")]
    counting = sparse(path, [(name, "F16", (4,)) for name in [*names, *(f"own{n}.weight" for n in range(25_000))]])
    with using(counting):
        document = inspect_checkpoint(path)
    assert document["tensors"] == 100_000
    assert len(document["kinds"]) == 25_003
    assert document["kinds"][0]["count"] == 25_000
    assert counting.data_bytes == document["sampled_bytes"]
    assert "and 24,964 more" in report.inspected_text(document, path)


# as a user meets it


def inspect(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bayling_delta", "inspect", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_text(tmp_path: Path) -> None:
    done = inspect(model(tmp_path, LLAMA_WORDS, vocab_size=32000, max_position_embeddings=4096))
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert max(map(len, lines[1:])) <= 100  # the first has the path
    for words in ("full model", "2,048,000", "model.layers.*.self_attn.q_proj.weight", "[generation]"):
        assert words in done.stdout


def test_json_and_quiet(tmp_path: Path) -> None:
    directory = model(tmp_path)
    done = inspect(directory, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == inspect_checkpoint(directory)
    quiet = inspect(directory, "-q")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


def test_oddities_are_no_failure_and_unreadable_files_are(tmp_path: Path) -> None:
    done = inspect(lacks_shard(tmp_path))
    assert done.returncode == 0
    assert "download the missing shard" in " ".join(done.stdout.split())
    refused = inspect(legacy(tmp_path), "--json")
    assert refused.returncode == 3
    document = json.loads(refused.stdout)
    check(document, "failure")
    assert (document["schema"], document["error"]["kind"]) == ("bayling-delta/inspect/1", "checkpoint")


def test_names_from_files_cannot_command_the_terminal(tmp_path: Path) -> None:
    done = inspect(model(tmp_path, full() | {"evil\x1b[2J\nodd  nothing": torch.zeros(1)}))
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert not re.search(r"^odd  nothing", done.stdout, re.MULTILINE)
    assert "[unsafe_name]" in done.stdout


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    assert not modules_after("inspect", str(model(tmp_path))) & {*HEAVY, "numkong", "huggingface_hub"}


ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 1 << 40) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
TABLES = {
    "config.json": [*CONFIG, "dtype", "head_dim", "pad_token_id"],
    "tokenizer.json": ["model", "added_tokens"],
    "tokenizer_config.json": ["tokenizer_class"],
    "special_tokens_map.json": ["bos_token", "unk_token"],
    "added_tokens.json": ["[PAD]"],
}


@settings(max_examples=50)
@given(st.fixed_dictionaries({name: st.dictionaries(st.sampled_from(keys), ANY) for name, keys in TABLES.items()}))
def test_json_files_may_hold_anything(tmp_path_factory: pytest.TempPathFactory, tables: dict[str, Any]) -> None:
    tables["config.json"] = {**CONFIG, **tables["config.json"]}
    directory = beside(save(tmp_path_factory.mktemp("any") / "model", full(), config=None), tables)
    document = inspect_checkpoint(directory)
    check(json.loads(json.dumps(document, allow_nan=False)), "inspect")
    report.inspected_text(document, directory)
