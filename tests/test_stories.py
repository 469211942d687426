"""What people got wrong with deltas, as they told it in public, and what the program says to each of them.

Every story runs a command on a pair as large as makes the bound a real one, some 90 MB a side, and is recognised from
headers, small tensors and sampled rows: before 64 MiB, and a small part of the weights, were read.

- `REFUSED`: what must not be added, or cannot be read: code, kind, words and advice, and nothing written.
- `TOLD`: what may be in order, and is said.
- `SOUND`: what other programs failed on, and is right: the sum is that of the published script.
"""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bayling_delta import apply, load_releases, record
from bayling_delta.registering import entry_from_manifest
from tests.meta import PLAIN, Size, converted, random_model, save_meta
from tests.pairs import CONFIG, StateDict, assert_same, llama, load, published_sum, save
from tests.running import Run
from tests.wrong_input import (
    APPLY,
    BIN,
    BIN_INDEX,
    EMBEDDING,
    HEAD,
    LFS,
    NORM,
    Evil,
    HeadersOnly,
    Make,
    Row,
    assert_refused_by_headers,
    both,
    cut,
    edit,
    exchange,
    folder,
    nothing,
    place_tensor,
    remove,
    rows,
    save_with_large,
    saved,
    snapshot,
    state,
    weights,
    write,
    zipped,
)


@dataclass(frozen=True, kw_only=True)
class Story(Row):
    """One person's mistake, or misfortune."""

    thread: str
    """Where it is told in public; of what is known otherwise, from where."""
    world: Callable[[], HeadersOnly] = HeadersOnly


# the pair, and others


WORDS = 32_000
LLAMA = CONFIG | {"vocab_size": WORDS, "max_position_embeddings": 2048}
"""config.json of a LLaMA-1, but for its size."""
LLAMA_2 = LLAMA | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-05}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARD = BIN.removeprefix("base/")


def vocabulary(count: int, seed: int, scale: float) -> torch.Tensor:
    """An embedding or a head of so many words."""
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(count, CONFIG["hidden_size"], generator=random) * scale).half()


@cache
def llama_base() -> StateDict:
    return llama(1) | {EMBEDDING: vocabulary(WORDS, 3, 0.05), HEAD: vocabulary(WORDS, 4, 0.05)}


@cache
def tuned_minus_base() -> StateDict:
    return llama(2, 0.01) | {EMBEDDING: vocabulary(WORDS, 5, 0.01), HEAD: vocabulary(WORDS, 6, 0.01)}


def as_base(change: Callable[[torch.Tensor], torch.Tensor], **config: Any) -> Make:
    """The base with every tensor changed; ``config`` changes config.json."""

    def tensors() -> StateDict:
        return {name: tensor if "inv_freq" in name else change(tensor) for name, tensor in llama_base().items()}

    return state("base", tensors, config=LLAMA | config)


def grown(side: str, rows: int = 1, names: tuple[str, ...] = (EMBEDDING, HEAD), more: StateDict | None = None) -> Make:
    """The base or the delta with rows for new words, and perhaps more tensors."""

    def tensors() -> StateDict:
        old = {"base": llama_base, "delta": tuned_minus_base}[side]()
        return old | {name: torch.cat([old[name], old[name][:rows]]) for name in names} | (more or {})

    return state(side, tensors, config=LLAMA | {"vocab_size": WORDS + rows})


PROJECTOR = {"model.mm_projector.weight": torch.ones(64, 48).half(), "model.mm_projector.bias": torch.ones(64).half()}


def grown_in_float32() -> StateDict:
    """A delta as Alpaca's: a word more, and all in float32."""
    delta = tuned_minus_base() | {name: vocabulary(WORDS + 1, 7, 0.01) for name in (EMBEDDING, HEAD)}
    return {name: tensor.float() for name, tensor in delta.items()}


def twice_as_wide() -> StateDict:
    """A base as LLaMA 13B is to 7B."""
    return {
        name: tensor if "inv_freq" in name else tensor.repeat(*[2] * tensor.ndim) for name, tensor in llama(1).items()
    }


def gptq() -> StateDict:
    """What GPTQ makes of a projection: packed numbers, zeros, scales and an order."""
    packed: StateDict = {}
    for name, tensor in llama_base().items():
        if "_proj" not in name:
            packed[name] = tensor
            continue
        stem, (outputs, inputs) = name.removesuffix("weight"), tensor.shape
        packed[f"{stem}qweight"] = torch.ones(inputs // 8, outputs, dtype=torch.int32)
        packed[f"{stem}qzeros"] = torch.ones(1, outputs // 8, dtype=torch.int32)
        packed[f"{stem}scales"] = torch.ones(1, outputs).half()
        packed[f"{stem}g_idx"] = torch.zeros(inputs, dtype=torch.int32)
    return packed


META = Size(words=WORDS)


def in_metas_format(parts: int = 2, **params: object) -> Make:
    """The base in Meta's own format; ``params`` changes params.json."""

    def make(place: Path) -> None:
        shutil.rmtree(place / "base")
        shutil.rmtree(place / "delta")
        save_meta(place / "base", random_model(META), META, parts)
        save(place / "delta", tuned_minus_base(), config=LLAMA)  # without the large tensor, which no LLaMA has
        edit("base/params.json", lambda table: table.update(params))(place)

    return make


def fetched(side: str, repo: str) -> Make:
    """Have a side be what the Hub's cache has of a repository: its place there is what makes it known."""

    def make(place: Path) -> None:
        snapshots = place / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots"
        snapshots.mkdir(parents=True)
        (place / side).rename(snapshots / COMMIT)
        (place / side).symlink_to(snapshots / COMMIT)

    return make


BAYLING = fetched("delta", "ICTNLP/bayling-7b-diff")
VICUNA_V0 = fetched("delta", "lmsys/vicuna-13b-delta-v0")
VICUNA_V1_1 = fetched("delta", "lmsys/vicuna-7b-delta-v1.1")
LLAVA_V0_WORDS = write("delta/added_tokens.json", b'{"<im_patch>": 32000, "<im_end>": 32002, "[PAD]": 32003}')
LLAVA = fetched("delta", "liuhaotian/LLaVA-13b-delta-v0")
LLAVA_7B = fetched("delta", "liuhaotian/LLaVA-Lightning-7B-delta-v1-1")


def vicuna_on_record(place: Path) -> None:
    """An entry of one's own, vicuna.json: the base is on record as Vicuna 7B v1.1."""
    manifest = record(save(place / "vicuna", llama_base()))
    shutil.rmtree(place / "vicuna")
    (place / "vicuna-manifest.json").write_text(json.dumps(manifest))
    entry = entry_from_manifest(
        place / "vicuna-manifest.json", load_releases(), name="my-vicuna", equals="vicuna-7b-v1.1"
    )
    (place / "vicuna.json").write_text(json.dumps(entry))


def rebuilt(place: Path) -> None:
    """Have the base be what the delta made of it already."""
    both(remove("base"), remove("delta"))(place)
    save(place / "original", llama_base(), config=LLAMA)
    save(place / "delta", tuned_minus_base(), config=LLAMA)
    apply(place / "original", place / "delta", place / "base")


def xored(place: Path) -> None:
    """Have each of the delta's files be what it is and the base's file of that name are by XOR."""
    for file in (place / "delta").glob("*-0000[12]-*.bin"):
        pair = [np.frombuffer(path.read_bytes(), np.uint8) for path in (file, place / "base" / file.name)]
        size = min(map(len, pair))
        file.write_bytes((pair[0][:size] ^ pair[1][:size]).tobytes())


def rename(side: str, pattern: str, new: Callable[[int], str]) -> Make:
    """Rename a side's files in their order, in its index too."""

    def make(place: Path) -> None:
        for number, file in enumerate(sorted((place / side).glob(pattern))):
            for index in (place / side).glob("*.index.json"):
                index.write_text(index.read_text().replace(file.name, new(number)))
            file.rename(file.with_name(new(number)))

    return make


class SmallDisk(HeadersOnly):
    """A disk with room for the configuration and no more."""

    def free_bytes(self, path: Path) -> int:  # noqa: ARG002
        return 20_000_000


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a delta in ``.bin``, as in 2023, three shards each, one of them large."""
    place = tmp_path_factory.mktemp("pristine")
    save_with_large(place / "base", llama_base(), config=LLAMA)
    save_with_large(place / "delta", tuned_minus_base(), config=LLAMA)
    return place


def weight_bytes(place: Path) -> int:
    """Bytes of the files of weights."""
    return sum(path.stat().st_size for path in place.rglob("*") if path.suffix in (".bin", ".safetensors", ".pth"))


# what is refused


REFUSED: list[Story] = [
    # vocabularies
    Story("32001 words on 32000", grown("delta"), 4, "shape",
        ("lm_head.weight: F16 [32000, 64] in the base, F16 [32001, 64] in the delta",
            "fit together by vicuna-v0 or llava; if that is the release's, give it with --recipe"),
        thread="lm-sys/FastChat#486"),
    Story("32001 words in float32", state("delta", grown_in_float32, config=LLAMA | {"vocab_size": WORDS + 1}), 4,
        "shape", ("F16 [32000, 64] in the base, F32 [32001, 64] in the delta", "vicuna-v0 or alpaca or wizardlm"),
        thread="tatsu-lab/stanford_alpaca#256"),
    Story("32003 words and a projector", grown("delta", 3, more=PROJECTOR), 4, "shape",
        ("[32003, 64] in the delta", "model.mm_projector.weight, which the delta has", "fit together by llava;"),
        thread="haotian-liu/LLaVA#54"),
    Story("32001 words in the head alone", grown("delta", names=(HEAD,)), 4, "shape",
        ("rows for different vocabularies, 32,000 in model.embed_tokens.weight and 32,001 in lm_head.weight",
            "are its files of one release? Download it again"),
        thread="lm-sys/FastChat#510"),
    Story("a base that was grown before, for v1.1", both(grown("base"), VICUNA_V1_1), 4, "shape",
        ("F16 [32001, 64] in the base, F16 [32000, 64] in the delta", "is this the right base"),
        thread="lm-sys/FastChat#1302"),
    Story("a base that was grown before, for v0", both(grown("base"), grown("delta"), VICUNA_V0), 4, "vocabulary",
        ("has 32,001 rows on both sides", "was one added before? Give the base as it was published"),
        thread="the [-0:] of lm-sys/FastChat 0.1.10, apply_delta.py"),
    Story("a tokenizer with one word more than rows",
        both(grown("delta", 3, more=PROJECTOR), LLAVA_V0_WORDS), 4, "tokenizer",
        ("knows 32,004 tokens", "32,003 rows", "--allow tokenizer"), f"{APPLY} --recipe llava",
        thread="haotian-liu/LLaVA#54, the tokenizer of LLaVA v0"),
    # another base or delta
    Story("Llama-2 for LLaMA-1", both(state("base", llama_base, config=LLAMA_2), BAYLING), 4, "wrong_base",
        ("base/config.json: says max_position_embeddings 4,096 and rms_norm_eps 1e-05, which suggests Llama-2",
            "BayLing 7B v1.0, the delta (15 June 2023) was made against LLaMA-1 7B; give that as the base",
            "--allow wrong_base"),
        thread="OpenGVLab/Ask-Anything#123"),
    Story("Llama-2 in Meta's format", both(in_metas_format(norm_eps=1e-05), BAYLING), 4, "wrong_base",
        ("base/params.json: says rms_norm_eps 1e-05, which suggests Llama-2", "was made against LLaMA-1 7B"),
        thread="OpenGVLab/Ask-Anything#123"),
    Story("Vicuna for LLaMA, from the Hub", both(fetched("base", "lmsys/vicuna-7b-v1.1"), LLAVA_7B), 4, "wrong_base",
        ("base: is Vicuna 7B v1.1, merged (by its place in the Hub's cache, lmsys/vicuna-7b-v1.1)",
            "was made against LLaMA-1 7B; give that as the base"),
        thread="haotian-liu/LLaVA#27"),
    Story("Vicuna for LLaMA, on one's own record", both(vicuna_on_record, LLAVA_7B), 4, "wrong_base",
        ("base: is Vicuna 7B v1.1, merged, as recorded in a manifest (by the digests of 5 small tensors)",
            "was made against LLaMA-1 7B"),
        f"{APPLY} --registry vicuna.json", thread="haotian-liu/LLaVA#225"),
    Story("v0 with the rule of v1.1", both(grown("delta"), VICUNA_V0), 4, "recipe",
        ("[32001, 64] in the delta", "fit together by vicuna-v0"), f"{APPLY} --recipe plain",
        thread="CASIA-LMC-Lab/AnomalyGPT#63"),
    Story("v1.1 with the rule of v0", VICUNA_V1_1, 4, "vocabulary",
        ("has 32,000 rows on both sides, and vicuna-v0 adds rows", "or the release's recipe with --recipe"),
        f"{APPLY} --recipe vicuna-v0", thread="CASIA-LMC-Lab/AnomalyGPT#13"),
    Story("7B on 13B", state("base", twice_as_wide, config=LLAMA), 4, "size",
        ("base: has 2 layers of 128, and the delta has 2 layers of 64", "give the base of the delta's size"),
        thread="xinke-wang/ModaVerse#2"),
    Story("a release with tensors of its own", grown("delta", more={"edit_head.query": torch.ones(64).half()}), 4,
        "missing_tensor", ("base: lacks edit_head.query, which the delta has", "is this the right base"),
        thread="haotian-liu/LLaVA#1832"),
    Story("a projector for a base", saved({name: tensor.clone() for name, tensor in PROJECTOR.items()}), 4,
        "missing_tensor", ("base: lacks model.embed_tokens.weight, which the delta has", "is this the right base"),
        thread="mbzuai-oryx/Video-ChatGPT#13"),
    Story("the delta for a base", both(remove("base"), state("base", tuned_minus_base)), 4, "looks_like_delta",
        ("base: looks like a delta, and a base is a whole model", "positive", "--allow looks_like_delta"),
        thread="lm-sys/FastChat#226"),
    Story("the delta for a base, from the Hub", fetched("base", "lmsys/vicuna-13b-delta-v0"), 4, "looks_like_delta",
        ("which is a delta, and a base is a whole model", "give LLaMA-1 13B instead, and this as the delta"),
        thread="lm-sys/FastChat#226"),
    Story("full weights for a delta", state("delta", llama_base, config=LLAMA), 4, "looks_like_model",
        ("delta: looks like a full model, to which nothing needs to be added",),
        thread="vicuna-tools/vicuna-installation-guide#17"),
    Story("BayLing v1.1 for a delta", fetched("delta", "ICTNLP/bayling-13b-v1.1"), 4, "looks_like_model",
        ("BayLing 13B v1.1 (6 July 2023), full weights", "full weights already, with nothing to apply; use them"),
        thread="ictnlp/BayLing, README: v1.1 is published whole"),
    Story("BayLing v1.1 for a delta, not fetched yet", nothing, 4, "looks_like_model",
        ("(by its id on the Hub, ICTNLP/bayling-13b-v1.1)", "full weights already, with nothing to apply"),
        "apply --base base --delta ICTNLP/bayling-13b-v1.1 --out out",
        thread="ictnlp/BayLing, README: v1.1 is published whole"),
    Story("base and delta swapped", exchange("base", "delta"), 4, "looks_like_delta",
        ("base: looks like a delta", "delta: looks like a full model", "are base and delta swapped?"),
        thread="each of the two options with the other's path"),
    Story("a model that was rebuilt for a base", rebuilt, 4, "already_rebuilt",
        ("base: is itself the result of 'bayling-delta apply'", "give the original base"),
        thread="haotian-liu/LLaVA#51"),
    Story("a release by XOR", both(xored, fetched("delta", "OpenAssistant/oasst-rlhf-2-llama-30b-7k-steps-xor")), 4,
        "no_recipe", ("byte by byte (XOR), which only the publisher's script does",
            "see 'bayling-delta releases openassistant-llama-30b-xor'"),
        thread="LAION-AI/Open-Assistant#2825"),
    # other forms
    Story("Meta's folder without params.json", both(in_metas_format(), remove("base/params.json")), 3, "incomplete",
        ("base/params.json: is not here, and without it nobody knows how many heads the model has; download it",),
        thread="henrywoo/pyllama#25"),
    Story("Meta's folder without a part", both(in_metas_format(4), remove("base/consolidated.02.pth")), 3,
        "incomplete", ("base/consolidated.02.pth: is not here; the model has 4 parts. Download the missing one",),
        thread="meta-llama/llama#40"),
    Story("one of Meta's parts", in_metas_format(2), 3, "incomplete",
        ("consolidated.00.pth: is one of 2 parts; name the folder that has them",),
        "apply --base base/consolidated.00.pth --delta delta --out out", thread="DAMO-NLP-SG/Video-LLaMA#95"),
    Story("GPTQ", both(remove("base"), state("base", gptq, container="safetensors", config=LLAMA)), 4, "quantised",
        ("base: has 56 tensors of quantised weights", "qweight", "deltas need the original ones"),
        thread="lm-sys/FastChat#1383"),
    Story("llama.cpp's format", weights(b"GGUF\3\0\0\0" + bytes(99), "llama-7b.q4_0.gguf"), 3, "not_found",
        ("base: has llama.cpp files (GGUF or GGML)", "the delta needs the original ones"),
        thread="lm-sys/FastChat#325"),
    Story("a folder without weights", both(remove("base/*.bin"), remove(BIN_INDEX)), 3, "not_found",
        ("base: has no model*.safetensors and no pytorch_model*.bin; name the directory that holds the weights",),
        thread="OpenGVLab/Ask-Anything#58"),
    Story("a format from before PyTorch 1.6", saved(llama(1), _use_new_zipfile_serialization=False), 3, "unsupported",
        ("is in PyTorch's format from before 1.6", "torch.save(torch.load(FILE"),
        thread="what torch.save wrote until 1.5"),
    Story("a pickle with code in it", zipped({"archive/data.pkl": pickle.dumps(Evil(), 2)}), 3,
        "unsafe_pickle", ("base/pytorch_model.bin", "system", "nothing was run. Get the weights from their publisher"),
        thread="hiyouga/LlamaFactory#8379"),
    # precision
    Story("bfloat16 under the name of float16", both(as_base(torch.Tensor.bfloat16), BAYLING), 4, "bfloat16",
        ("base/config.json: says float16, but the weights are stored as BF16", "against LLaMA-1 7B, in float16",
            "give Meta's own files, or a conversion that kept them so", "--allow bfloat16"),
        thread="huggingface/transformers#25446"),
    Story("bfloat16 that says so", both(as_base(torch.Tensor.bfloat16, torch_dtype="bfloat16"), BAYLING), 4,
        "bfloat16", ("base: has weights that are stored as BF16", "give Meta's own files"), thread="google/saxml#28"),
    Story("float16 that was bfloat16", both(as_base(lambda tensor: tensor.bfloat16().half()), BAYLING), 4, "bfloat16",
        ("base: all ", "have their low 3 bits zero: they were bfloat16 once", "against LLaMA-1 7B, in float16"),
        thread="meta-llama/llama-cookbook#72"),
    # downloads
    Story("a git-lfs pointer", both(write(BIN, LFS), fetched("base", "huggyllama/llama-7b")), 3, "not_weights",
        (f"{BIN}: is a git-lfs pointer, not the weights; run 'git lfs pull'",
            f"hf download huggyllama/llama-7b {SHARD} --revision {COMMIT} --force-download"),
        thread="vllm-project/vllm#1382"),
    Story("a web page", write(f"delta/{SHARD}", b"<!DOCTYPE html><html><head>"), 3, "not_weights",
        (f"delta/{SHARD}: is a web page or an error message", "download it again", "--local-dir delta"),
        thread="the \"invalid load key, '<'\" of many threads"),
    Story("an error in JSON", write(BIN, b'{"error":"Access to model meta-llama/Llama-7b is restricted"}'), 3,
        "not_weights", ("error message, not weights", "hf download OWNER/NAME"),
        thread="the \"invalid load key, '{'\" of many threads"),
    Story("9.3 of 9.9 GB", both(cut(f"delta/{SHARD}", 9_300_000_000), VICUNA_V0), 3, "incomplete",
        ("has 9,300,000,000 bytes and no zip directory at its end: the download was cut short",
            f"hf download lmsys/vicuna-13b-delta-v0 {SHARD} --revision"),
        thread="lmsys/vicuna-13b-delta-v0 on the Hub, discussion 4"),
    Story("an empty file", write(f"delta/{SHARD}", b""), 3, "incomplete", (f"delta/{SHARD}: is empty", "hf download"),
        thread="Vision-CAIR/MiniGPT-4#37"),
    Story("a download that goes on", both(remove("delta/*.bin"), remove("delta/*.index.json"),
            write(f"delta/{SHARD}.incomplete", bytes(9))), 3, "not_found",
        (f"only {SHARD}.incomplete: let the download finish",), thread="Vision-CAIR/MiniGPT-4#37"),
    Story("a shard that never came", both(remove("delta/*-00002-*"), VICUNA_V0), 3, "incomplete",
        ("is in delta/pytorch_model.bin.index.json, but not here; download the missing shard",
            "hf download lmsys/vicuna-13b-delta-v0 pytorch_model-00002-of-00003.bin"),
        thread="meta-llama/llama#1073"),
    Story("shards missing, and no index", both(remove("base/*-00002-*"), remove(BIN_INDEX)), 3, "incomplete",
        ("base: has 2 of 3 shards and no index; download the rest",), thread="Kent0n-Li/ChatDoctor#48"),
    Story("an index of other files", place_tensor("model.layers.2.mlp.up_proj.weight", SHARD), 3, "index",
        (f"{BIN}: lacks model.layers.2.mlp.up_proj.weight, which the index places here",
            "is one of them stale? Download both again"),
        thread="lm-sys/FastChat#1302, where a stale cache was suspected"),
    Story("paths of Windows in an index", place_tensor(NORM, "D:\\models\\llama-13b\\pytorch_model.bin"), 3,
        "unsafe_name", (BIN_INDEX, "D:\\\\models", "outside its directory"), thread="haotian-liu/LLaVA#55"),
    # outputs
    Story("an empty directory is there", folder("out"), 6, "output_exists",
        ("out: exists, and nothing is replaced; choose another name or move it away",), thread="haotian-liu/LLaVA#98"),
    Story("into the delta", nothing, 6, "output_place",
        ("delta/weight: lies inside the delta; choose a place outside the inputs",),
        "apply --base base --delta delta --out delta/weight", thread="Vision-CAIR/MiniGPT-4#244"),
    Story("a small disk", nothing, 6, "disk_space",
        ("has 0.02 GB free, the output needs 0.11 GB; make room, or choose another place",), world=SmallDisk,
        thread="the 52 GB of temporary files of lm-sys/FastChat's --low-cpu-mem"),
    # commands
    Story("the options of the published script", nothing, 2, "usage",
        ("The published script's --base-model-path is --base here", "--help"),
        "apply --base-model-path base --target-model-path out --delta-path delta",
        thread="ictnlp/BayLing, README: apply_delta"),
]  # fmt: skip


@rows(REFUSED)
def test_it_is_recognised_before_the_weights_are_read(place: Path, run: Run, row: Story) -> None:
    world = row.world()
    assert_refused_by_headers(place, run, row, world)
    assert world.bytes_read < weight_bytes(place) / 4


def test_the_pair_itself_is_good(place: Path, run: Run) -> None:
    world = HeadersOnly()
    done = run(f"{APPLY} --dry-run", world)
    assert (done.code, done.document["notes"]) == (0, [])
    assert world.bytes_read < weight_bytes(place) / 4


# what is told


TOLD: list[Story] = [
    Story("Llama-2, and a delta that is not known", state("base", llama_base, config=LLAMA_2), 0, "",
        ("says max_position_embeddings 4,096 and rms_norm_eps 1e-05, which suggests Llama-2",),
        thread="OpenGVLab/Ask-Anything#123"),
    Story("bfloat16, and a delta that is not known", as_base(lambda tensor: tensor.bfloat16().half()), 0, "",
        ("they were bfloat16 once. LLaMA-1, which is float16, loses precision that way",),
        thread="huggingface/transformers#25446"),
    Story("bfloat16, and all the same", both(as_base(torch.Tensor.bfloat16), BAYLING), 0, "",
        ("is BayLing 7B v1.0, the delta", "stored as BF16"), f"{APPLY} --dry-run --allow bfloat16",
        thread="huggingface/transformers#25446"),
    Story("32001 words, of a release that is known", both(grown("delta"), VICUNA_V0), 0, "",
        ('"recipe": "vicuna-v0"', "(by its place in the Hub's cache, lmsys/vicuna-13b-delta-v0)"),
        thread="Vision-CAIR/MiniGPT-4#132"),
    Story("32003 words and the tokenizer of v0, of a release that is known",
        both(grown("delta", 3, more=PROJECTOR), LLAVA_V0_WORDS, LLAVA), 0, "",
        ('"recipe": "llava"', "knows 32,004 tokens", "was published so ([PAD])"), thread="haotian-liu/LLaVA#54"),
    Story("the delta run as a model", nothing, 0, "",
        ('"looks_like": "delta"', "a delta's lie around zero, a full model's are clearly positive"), "inspect delta",
        thread="lm-sys/FastChat#890, Vision-CAIR/MiniGPT-4#12, #33"),
    Story("the class LLaMATokenizer", write("base/tokenizer_config.json", b'{"tokenizer_class": "LLaMATokenizer"}'), 0,
        "", ("names the class LLaMATokenizer, which no transformers has had; LlamaTokenizer is meant",),
        "inspect base", thread="huggingface/transformers#22222"),
    Story("the special tokens of BayLing-7B", write("delta/special_tokens_map.json",
            b'{"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "</s>"}'), 0, "",
        ('has \\"</s>\\" for bos and unk, a mistake of early 2023; LLaMA\'s are \\"<s>\\" and \\"<unk>\\"',),
        "inspect delta", thread="ICTNLP/bayling-7b-diff on the Hub, special_tokens_map.json"),
    Story("the ids of decapoda", edit("base/config.json",
            lambda config: config.update(bos_token_id=0, eos_token_id=1, pad_token_id=-1)), 0, "",
        ("says bos 0 and eos 1, as the decapoda conversions of 2023 wrongly do",), "inspect base",
        thread="decapoda-research/llama-7b-hf on the Hub, config.json"),
]  # fmt: skip


@rows(TOLD)
def test_what_may_be_in_order_is_told(place: Path, run: Run, row: Story) -> None:
    row.make(place)
    before = snapshot(place)
    world = row.world()
    done = run(row.command if row.command != APPLY else f"{APPLY} --dry-run", world)
    assert done.code == row.code, done.errors
    told = json.dumps(done.document, ensure_ascii=False)
    for words in row.words:
        assert words in told
    assert snapshot(place) == before
    assert not world.changes
    assert world.bytes_read < weight_bytes(place) / 4


# what is right


@cache
def small_base() -> StateDict:
    """The base, as transformers converted it."""
    return converted(random_model(PLAIN), PLAIN)


def small_delta() -> StateDict:
    return llama(2, 0.01)


ROTARY = {name: tensor for name, tensor in llama(1).items() if "inv_freq" in name}


def with_base(tensors: Callable[[], StateDict], *after: Make, **options: Any) -> Make:
    """A pair with this base."""

    def make(place: Path) -> None:
        save(place / "base", tensors(), **options)
        save(place / "delta", small_delta(), shards=2)
        both(*after)(place)

    return make


def metas_folder(place: Path) -> None:
    save_meta(place / "base", random_model(PLAIN), PLAIN, 2)
    delta = {name: tensor for name, tensor in small_delta().items() if name not in ROTARY}
    save(
        place / "delta", delta, config=CONFIG | {"num_attention_heads": PLAIN.heads, "num_key_value_heads": PLAIN.heads}
    )


def with_line_ends_of_windows(place: Path) -> None:
    """As git makes them there."""
    for path in place.glob("*/*.json"):
        path.write_bytes(json.dumps(json.loads(path.read_text()), indent=2).replace("\n", "\r\n").encode())


SOUND: dict[str, tuple[str, Make]] = {
    "Meta's own folder": ("DAMO-NLP-SG/Video-LLaMA#95", metas_folder),
    "shards numbered from zero": (
        "the 33 shards of decapoda-research/llama-7b-hf",
        with_base(small_base, rename("base", "*.bin", "pytorch_model-{:05}-of-00003.bin".format), shards=3),
    ),
    "shards numbered from zero, without an index": (
        "the 33 shards of decapoda-research/llama-7b-hf",
        with_base(
            small_base, rename("base", "*.bin", "pytorch_model-{:05}-of-00003.bin".format), shards=3, index=False
        ),
    ),
    "shard 10 before shard 2": (
        "the glob of lm-sys/FastChat's --low-cpu-mem",
        with_base(
            small_base, rename("base", "*.bin", "pytorch_model-{}-of-12.bin".format), shards=12, index=False
        ),
    ),
    "safetensors for a base": ("lm-sys/FastChat#1383", with_base(small_base, container="safetensors", shards=2)),
    "float32 for a base": (
        "copies of LLaMA-1 7B on the Hub, of 26 GB",
        with_base(lambda: {name: tensor.float() for name, tensor in small_base().items()}),
    ),
    "rotary buffers in the delta alone": ("NExT-GPT/NExT-GPT#31", with_base(small_base)),
    "rotary buffers on both sides": ("lm-sys/FastChat#3036", with_base(lambda: small_base() | ROTARY)),
    "line ends of Windows": (
        "what git makes of text on Windows", with_base(small_base, with_line_ends_of_windows, shards=3)
    ),
}  # fmt: skip


@pytest.mark.parametrize(("thread", "make"), SOUND.values(), ids=SOUND)
def test_the_sum_is_that_of_the_published_script(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, thread: str, make: Make
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    done = run(APPLY)
    assert done.code == 0, (thread, done.errors)
    assert_same(load(tmp_path / "out"), published_sum(small_base(), small_delta()))


def test_stories_have_a_source() -> None:
    threads = [story.thread for story in (*REFUSED, *TOLD)] + [thread for thread, _ in SOUND.values()]
    assert all(threads)
    assert sum("#" in thread for thread in threads) >= 25
