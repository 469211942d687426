"""The registry: its figures against their sources and against arithmetic, how it is searched, and what it refuses."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import bayling_delta
from bayling_delta import BaylingDeltaError, Registry, Release, load_releases, record
from bayling_delta.cli import main
from bayling_delta.errors import CheckpointError, UsageError
from bayling_delta.recipes import RECIPES
from bayling_delta.registering import entry_from_manifest
from bayling_delta.release_entry import Form, RecordedFile, entry_document, read_entry
from bayling_delta.releases import accepted_sha256
from tests.pairs import llama, save

DATA = Path(bayling_delta.__file__).parent / "data"
FILES = sorted((DATA / "releases").glob("*.json"))
REGISTRY = load_releases()
SCHEMA = Draft202012Validator(json.loads((DATA / "schemas" / "release.json").read_text()))
LLAMAS = ["llama-7b", "llama-13b", "llama-30b", "llama-65b"]

Json = dict[str, Any]


def release(name: str) -> Release:
    return REGISTRY.get(name)


def rows(of: Release) -> Iterator[RecordedFile]:
    return (file for form in of.forms for file in form.files)


# the data


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_entry_keeps_to_the_schema_and_is_named_as_its_file(path: Path) -> None:
    document = json.loads(path.read_text())
    SCHEMA.validate(document)
    assert document["name"] == path.stem
    assert "shared" not in path.read_text()


def figures(value: Any, sourced: bool = False) -> Iterator[tuple[Any, bool]]:
    """Every number and digest in a document, and whether a source stands beside it or around it."""
    if isinstance(value, dict):
        inside = sourced or bool(value.get("source"))
        for key, part in value.items():
            if key not in ("name", "title", "sources", "hub"):
                yield from figures(part, inside)
    elif isinstance(value, list):
        for part in value:
            yield from figures(part, sourced)
    elif isinstance(value, int | float) or (isinstance(value, str) and re.fullmatch("[0-9a-f]{32,64}", value)):
        yield value, sourced


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_figure_has_a_source(path: Path) -> None:
    document = json.loads(path.read_text())
    parts = [part for name, part in document.items() if name not in ("schema", "source", "sources")]
    assert not [figure for part in parts for figure, sourced in figures(part) if not sourced]
    assert all(len(text) > 15 for text in document["sources"].values())


def test_the_digests_are_those_that_were_copied_from_the_sources() -> None:
    """All of them, by count and by their own digest: a slip of the hand in any shows here."""
    digests = {digest for of in REGISTRY.releases for file in rows(of) for digest in (*file.sha256, *file.md5)}
    assert len(digests) == 229
    listed = "".join(f"{digest}\n" for digest in sorted(digests))
    assert hashlib.sha256(listed.encode()).hexdigest() == (
        "6de435c1d9914bbcf743ac87484e1046363fb6d5a57531a4d9085dc88f3da1c1"
    )


def test_nobody_has_published_a_weights_digest_or_a_rebuilt_bayling() -> None:
    assert not [of.name for of in REGISTRY.releases if of.weights and of.weights.digest]
    for name in ("bayling-7b-v1.0", "bayling-13b-v1.0", "bayling-13b-v1.1", "bayling-2-7b", "bayling-2-13b"):
        assert not [file for file in rows(release(name)) if file.sha256 or file.md5]
        assert release(name).unrecorded


def shapes(sizes: Any) -> dict[str, tuple[int, ...]]:
    """The weights of a LLaMA in the order in which transformers 4.28 saved them, rotary buffers among them."""
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    keys_values = hidden * sizes.num_key_value_heads // sizes.num_attention_heads
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes.vocab_size, hidden)}
    for layer in range(sizes.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        found |= {
            f"{prefix}self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}self_attn.k_proj.weight": (keys_values, hidden),
            f"{prefix}self_attn.v_proj.weight": (keys_values, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}self_attn.rotary_emb.inv_freq": (hidden // sizes.num_attention_heads // 2,),
            f"{prefix}mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, inner),
            f"{prefix}mlp.up_proj.weight": (inner, hidden),
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
        }
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (sizes.vocab_size, hidden)}


MEASURED = [of for of in REGISTRY.releases if of.weights]


@pytest.mark.parametrize("of", MEASURED, ids=lambda of: of.name)
def test_parameters_and_bytes_follow_from_the_shapes(of: Release) -> None:
    weights = of.weights
    assert weights is not None
    every = shapes(of.architecture)
    counted = {name: shape for name, shape in every.items() if not name.endswith("inv_freq")}
    parameters = sum(map(math.prod, counted.values()))
    item = {"F16": 2, "F32": 4}[weights.dtype]
    found = (weights.parameters, weights.tensors, weights.rotary_buffers, weights.tensor_bytes)
    assert found == (parameters, len(counted), len(every) - len(counted), parameters * item)


def test_the_sizes_of_bayling_are_the_known_ones() -> None:
    """Counted by hand: 6,738,415,616 and 13,015,864,320 parameters."""
    seven, thirteen = release("bayling-7b-diff").weights, release("bayling-13b-diff").weights
    assert seven
    assert thirteen
    assert (seven.parameters, seven.tensors, seven.tensor_bytes) == (6738415616, 291, 13476831232)
    assert (thirteen.parameters, thirteen.tensors, thirteen.tensor_bytes) == (13015864320, 363, 26031728640)


def test_metas_files_add_up_to_the_total_that_was_stated() -> None:
    forms = [form for name in LLAMAS for form in release(name).forms if form.container == "meta"]
    shared = ("tokenizer.model", "tokenizer_checklist.chk")
    own = [file.size or 0 for form in forms for file in form.files if file.name not in shared]
    once = [file.size or 0 for file in forms[0].files if file.name in shared]
    assert sum(own) + sum(once) == 235164838073


# digests of texts that can be written down again


def assert_recorded(data: str, name: str, of: Release) -> None:
    """A text has the digests that are recorded of a file of this name, and the size."""
    sha256, md5 = hashlib.sha256(data.encode()).hexdigest(), hashlib.md5(data.encode()).hexdigest()
    found = [file for file in rows(of) if file.name == name and sha256 in file.sha256]
    assert found, (of.name, name)
    for file in found:
        assert not file.md5 or md5 in file.md5
        assert file.size in (None, len(data))


def as_transformers_writes(document: Json) -> str:
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


@pytest.mark.parametrize("name", LLAMAS)
def test_an_index_file_written_anew_has_the_recorded_digest(name: str) -> None:
    """As transformers 4.28 cut and wrote it: shards of up to 10 GB, in the order of the state dict."""
    sizes = {
        tensor: math.prod(shape) * (4 if tensor.endswith("inv_freq") else 2)
        for tensor, shape in shapes(release(name).architecture).items()
    }
    shard, used, placed = 1, 0, {}
    for tensor, size in sizes.items():
        if used + size > 10 * 10**9:
            shard, used = shard + 1, 0
        used += size
        placed[tensor] = shard
    weight_map = {tensor: f"pytorch_model-{number:05d}-of-{shard:05d}.bin" for tensor, number in placed.items()}
    text = as_transformers_writes({"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    assert_recorded(text, "pytorch_model.bin.index.json", release(name))
    files = {file.name for form in release(name).forms for file in form.files}
    assert set(weight_map.values()) <= files


def test_the_index_of_vicuna_v1_1_is_that_of_its_base() -> None:
    for size in ("7b", "13b"):
        texts = [
            {file.sha256 for file in rows(release(name)) if file.name == "pytorch_model.bin.index.json"}
            for name in (f"llama-{size}", f"vicuna-{size}-v1.1")
        ]
        assert texts[0] == texts[1] != set()


@pytest.mark.parametrize("name", LLAMAS)
def test_params_json_written_anew_has_the_recorded_digests(name: str) -> None:
    sizes = release(name).architecture
    assert sizes is not None
    text = json.dumps(
        {
            "dim": sizes.hidden_size,
            "multiple_of": 256,
            "n_heads": sizes.num_attention_heads,
            "n_layers": sizes.num_hidden_layers,
            "norm_eps": sizes.rms_norm_eps,
            "vocab_size": -1,
        }
    )
    assert_recorded(text, "params.json", release(name))
    assert sizes.intermediate_size == 256 * math.ceil(int(8 * sizes.hidden_size / 3) / 256)


def special(text: str, **more: str) -> Json:
    return {"content": text, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False, **more}


TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def tokenizer_config(longest: int) -> str:
    return as_transformers_writes(
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": longest,
            "pad_token": None,
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
            **{name: special(text, __type="AddedToken") for name, text in TOKENS.items()},
        }
    )


def generation_config(version: str) -> str:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return as_transformers_writes({"_from_model_config": True, **ids, "transformers_version": version})


UNLIMITED = 1000000000000000019884624838656
SMALL_TEXTS = [
    ("llama-7b", "special_tokens_map.json", as_transformers_writes({n: special(t) for n, t in TOKENS.items()})),
    ("llama-7b", "tokenizer_config.json", tokenizer_config(UNLIMITED)),
    ("llama-7b", "tokenizer_config.json", tokenizer_config(2048)),
    ("vicuna-13b-v1.1", "tokenizer_config.json", tokenizer_config(UNLIMITED)),
    ("llama-13b", "generation_config.json", generation_config("4.29.2")),
    ("llama-13b", "generation_config.json", generation_config("4.28.0.dev0")),
    ("llama-30b", "generation_config.json", generation_config("4.29.0.dev0")),
    ("vicuna-7b-v1.1", "generation_config.json", generation_config("4.28.1")),
]


@pytest.mark.parametrize(("of", "name", "text"), SMALL_TEXTS, ids=[f"{of}-{len(t)}" for of, _, t in SMALL_TEXTS])
def test_small_texts_written_anew_have_the_recorded_digests(of: str, name: str, text: str) -> None:
    assert_recorded(text, name, release(of))


# the recipes, as the published scripts have them: rows, dtype, tensors from the delta alone

RULES = {
    "plain": ("none", None, ()),
    "vicuna-v0": ("zero", None, ()),
    "alpaca": ("mean", "F32", ()),
    "wizardlm": ("mean", "F32", ()),
    "llava": ("overlap", None, ("model.mm_projector.weight", "model.mm_projector.bias")),
}
FAMILIES = {
    "bayling-7b-diff": "plain",
    "bayling-13b-diff": "plain",
    "vicuna-7b-delta-v0": "vicuna-v0",
    "vicuna-13b-delta-v0": "vicuna-v0",
    "vicuna-7b-delta-v1.1": "plain",
    "vicuna-13b-delta-v1.1": "plain",
    "alpaca-7b-wdiff": "alpaca",
    "wizardlm-7b-delta": "wizardlm",
    "wizardlm-13b-v1.0-delta": "wizardlm",
    "wizardlm-30b-v1.0-delta": "wizardlm",
    "llava-7b-delta-v0": "llava",
    "llava-13b-delta-v0": "llava",
    "llava-7b-delta-v1-1": "llava",
    "llava-13b-delta-v1-1": "llava",
    "llava-lightning-7b-delta-v1-1": "llava",
    "llavar-13b-delta": "llava",
}


def test_recipes() -> None:
    assert {name: (each.rows, each.dtype, each.copied) for name, each in RECIPES.items()} == RULES
    assert {of.name: of.recipe for of in REGISTRY.releases if of.recipe} == FAMILIES


def test_the_recipe_fits_the_rows_of_base_and_delta() -> None:
    for name, recipe in FAMILIES.items():
        delta = release(name)
        (base,) = delta.bases
        grown = delta.architecture and delta.architecture.vocab_size > 32000
        assert release(base).kind == "base"
        assert grown is None or grown == (RECIPES[recipe].rows != "none"), name


# looking things up


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("bayling-7b-diff", "bayling-7b-diff"),
        ("BayLing-7B", "bayling-7b-v1.0"),
        ("ictnlp/bayling-13b-diff", "bayling-13b-diff"),
        ("ICTNLP/bayling-llama-3-8b", "bayling-2-llama-3-8b"),
        ("huggyllama/llama-7b", "llama-7b"),
        ("decapoda-research/llama-7b-hf", "llama-7b"),
        ("lmsys/vicuna-7b-v1.1", "vicuna-7b-v1.1"),
    ],
)
def test_a_release_is_found_by_its_names(text: str, name: str) -> None:
    assert release(text).name == name


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("baylin-7b-dif", "bayling-7b-diff"),
        ("ICTNLP/bayling-13b-dif", "bayling-13b-diff"),
        ("alpaca", "alpaca-7b-wdiff"),
    ],
)
def test_what_was_meant_is_suggested(text: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean .*{re.escape(meant)}"):
        REGISTRY.get(text)


def test_a_name_like_no_other_is_told_plainly() -> None:
    with pytest.raises(UsageError, match="'bayling-delta releases' lists them"):
        REGISTRY.get("%%%")


def test_weight_files_identify() -> None:
    """The chain of Vicuna 7B v1.1: base, delta, and what they add up to."""
    chain = {
        "0087155d6df07106c1d910bfeb6aab1be8e612dfbf2b56ddfb4ccbde7dbd50d0": "llama-7b",
        "7F161FB09B19B1CEF6AE3807B154F18E7A4973CC8C200E2508C6D6958CAAD2F0": "vicuna-7b-delta-v1.1",
        "5ed572be140240b212049a3e791271eed8a04c40bc732c91a4da4b1469db23b1": "vicuna-7b-v1.1",
    }
    for digest, name in chain.items():
        (found,) = REGISTRY.identify(digest)
        assert (found.release.name, found.file.name) == (name, "pytorch_model-00001-of-00002.bin")
    (meta,) = REGISTRY.identify("6efc8dab194ab59e49cd24be5574d85e", "md5")
    assert (meta.release.name, meta.form.container) == ("llama-7b", "meta")
    assert REGISTRY.identify("0" * 64) == REGISTRY.identify("0087155d", "md5") == ()


def test_no_weight_file_belongs_to_two_releases() -> None:
    for of in REGISTRY.releases:
        for file in rows(of):
            for digest in file.sha256 if file.is_weights else ():
                assert {found.release.name for found in REGISTRY.identify(digest)} == {of.name}


def test_other_files_are_on_record_and_identify_nothing() -> None:
    tokenizer = "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"
    assert len({found.release.name for found in REGISTRY.recorded(tokenizer)}) > 3
    assert REGISTRY.identify(tokenizer) == ()


def test_sizes_lead_to_candidates() -> None:
    assert {(found.release.name, found.file.name) for found in REGISTRY.of_size(9976642750)} == {
        ("vicuna-7b-delta-v0", "pytorch_model-00001-of-00002.bin"),
        ("vicuna-7b-v0", "pytorch_model-00001-of-00002.bin"),
    }
    assert REGISTRY.of_size(101) == ()  # params.json is no weight file
    assert REGISTRY.of_size(9_980_000_000) == ()  # a rounded size is no size


def test_several_digests_of_a_file_can_be_good() -> None:
    third = accepted_sha256(release("llama-13b").forms, "pytorch_model-00003-of-00003.bin")
    assert third is not None
    assert {digest[:8] for digest in third} == {"2efc56cd", "eac58861"}


def test_a_file_of_which_one_form_has_no_record_is_not_known() -> None:
    """The second shard of huggyllama's 30B is on no record: another conversion's digest must not be demanded of it."""
    forms = release("llama-30b").forms
    assert accepted_sha256(forms, "pytorch_model-00002-of-00007.bin") is None
    assert accepted_sha256(forms[1:2], "pytorch_model-00002-of-00007.bin") is not None
    assert accepted_sha256(forms, "pytorch_model-00001-of-00007.bin") is not None
    assert accepted_sha256(forms, "model.safetensors") is None
    assert accepted_sha256(release("bayling-7b-diff").forms, "pytorch_model-00002-of-00002.bin") is None


def test_which_base_fits() -> None:
    delta = release("bayling-7b-diff")
    fitting = [of.name for of in REGISTRY.releases if REGISTRY.fits(of, delta)]
    assert fitting == ["llama-7b"]


# the prompt, against the published code written out


def published_prompt(messages: list[Json], system: str) -> str:
    """ictnlp/BayLing, Conversation.get_prompt for the template BayLing, its turns ended by the turn to come."""
    text = system + "\n"
    for message in messages:
        if message["role"] == "user":
            text += "### Instruction:\n" + message["content"] + "\n"
        else:
            text += "### Response:\n" + message["content"] + "</s>" + "\n"
    return text + "### Response:\n"


SYSTEM = (
    "I am an intelligent language assistant developed by the NLP Group of ICT/CAS.\n"
    "Below is a dialog consisting of instructions and responses. Write a response that completes the request.\n"
)
TALKS = [
    ["你好"],
    ["Translate.\n  keep  spaces ", "Fine.\n", "And {{ this }} {% too %}?"],
    ["a", "b", "c", "d", "e"],
]


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of letters that begins every text with <s>, as LLaMA's does."""
    letters = {character: place for place, character in enumerate(["<s>", "</s>", "<unk>", *map(chr, range(10, 127))])}
    made = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    load: Any = transformers.PreTrainedTokenizerFast
    wrapped: transformers.PreTrainedTokenizerFast = load(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    prompt = release("bayling-7b-diff").prompt
    assert prompt is not None
    wrapped.chat_template = prompt.chat_template
    return wrapped


@pytest.mark.parametrize("talk", TALKS, ids=["one turn", "two turns", "three turns"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_chat_template_renders_the_published_prompt(
    tokenizer: transformers.PreTrainedTokenizerFast, talk: list[str], system: str | None
) -> None:
    turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(talk)]
    messages = [{"role": "system", "content": system}, *turns] if system else turns
    expected = published_prompt(turns, system or SYSTEM)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s>" + expected  # the published code leaves the first token to the tokenizer
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer(expected).input_ids


def test_the_chat_template_without_a_turn_to_come(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == f"<s>{SYSTEM}\n### Instruction:\na\n### Response:\nb</s>\n"


def test_the_chat_template_refuses_other_roles(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    with pytest.raises(Exception, match="turns of user and assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_the_prompt_says_how_the_publisher_samples() -> None:
    for name in ("bayling-7b-diff", "bayling-13b-diff", "bayling-13b-v1.0"):
        prompt = release(name).prompt
        assert prompt
        assert prompt.generation
        assert (prompt.system, prompt.stop_token_ids, prompt.context) == (SYSTEM, (2,), 2048)
        sampling = prompt.generation
        assert (sampling.temperature, sampling.top_p, sampling.repetition_penalty) == (0.7, 1.0, 1.0)
        assert prompt.placeholders["[NAME]"] == "BayLing"
        assert len(prompt.placeholders) == 6


# entries of one's own


def minimal(**changes: Any) -> Json:
    """The least that an entry can be, changed."""
    entry = {
        "schema": "bayling-delta/release/1",
        "name": "mine",
        "title": "My model",
        "kind": "full",
        "source": ["me"],
        "sources": {"me": "I made it"},
    }
    return {key: value for key, value in (entry | changes).items() if value is not ...}


def with_file(**changes: Any) -> Json:
    file = {"name": "model.safetensors", "size": 5, "sha256": ["0" * 64]} | changes
    return minimal(forms=[{"title": "as made", "container": "safetensors", "source": ["me"], "files": [file]}])


@pytest.mark.parametrize("of", REGISTRY.releases, ids=lambda of: of.name)
def test_an_entry_is_read_back_as_it_was(of: Release) -> None:
    document = entry_document(of)
    SCHEMA.validate(document)
    assert read_entry(json.loads(json.dumps(document))) == (of, [])


def own(tmp_path: Path, *entries: Any) -> list[Path]:
    paths = [tmp_path / f"{place}.json" for place in range(len(entries))]
    for path, entry in zip(paths, entries, strict=True):
        path.write_text(entry if isinstance(entry, str) else json.dumps(entry))
    return paths


def test_an_entry_of_ones_own_is_found(tmp_path: Path) -> None:
    conversion = with_file() | {"name": "my-llama", "kind": "base", "equals": "llama-7b"}
    delta = minimal(name="my-delta", kind="delta", bases=["llama-7b"], recipe="vicuna-v0", prompt="bayling")
    registry = load_releases(own(tmp_path, conversion, delta))
    assert registry.own == {"my-llama", "my-delta"}
    (found,) = registry.identify("0" * 64)
    assert found.release is registry.find("MY-LLAMA") is registry.releases[-1]
    assert registry.fits(found.release, registry.get("bayling-7b-diff"))
    assert registry.fits(found.release, registry.get("my-delta"))
    assert registry.get("my-delta").prompt == release("bayling-7b-diff").prompt


REFUSED: dict[str, tuple[Json | str, str]] = {
    "not JSON": ("{", "is not JSON"),
    "a web page": ("<!DOCTYPE html>", "is a web page"),
    "a list": ("[]", "is not a JSON object"),
    "a key twice": ('{"schema": 1, "schema": 1}', "it has 'schema' twice"),
    "too deep": ('{"a": ' + "[" * 90_000 + "]" * 90_000 + "}", "it nests too deep"),
    "another schema": (minimal(schema="bayling-delta/release/2"), "schema: is 'bayling-delta/release/2'"),
    "a manifest": ({"schema": "bayling-delta/manifest/1"}, "not 'bayling-delta/release/1'"),
    "a failure": (minimal(ok=False), "ok: is not true"),
    "no kind": (minimal(kind=...), "kind: is missing"),
    "another kind": (minimal(kind="lora"), "kind: is 'lora', not one of base, delta"),
    "an unknown field": (minimal(weight={}), "weight: is no field"),
    "a name with a path": (minimal(name="../x"), "name: is '../x', not a name"),
    "a name with a newline": (minimal(name="mine\n"), "name: is 'mine\\n', not a name"),
    "no source": (minimal(source=[]), "the entry.source: names no source"),
    "an unknown source": (minimal(source=["me", "you"]), "the entry.source: 'you' is no key of 'sources'"),
    "a source of nothing": (minimal(sources={"me": "x", "you": "y"}), "sources.you: no fact names it"),
    "a name of the program's": (minimal(name="llama-7b"), "has the name 'llama-7b', which another entry has"),
    "an alias of the program's": (minimal(aliases=["BayLing-7B", "x"]), "aliases[0]: is 'BayLing-7B'"),
    "a Hub id of the program's": (minimal(aliases=["ictnlp/BayLing-7b-diff"]), "which another entry has (BayLing 7B"),
    "an alias twice": (minimal(aliases=["x", "y", "x"]), "aliases: has one of them twice"),
    "its own base": (minimal(kind="delta", bases=["mine"], recipe="plain"), "bases: 'mine' is the entry itself"),
    "its own result": (minimal(result="mine"), "result: 'mine' is the entry itself"),
    "its own equal": (minimal(equals="mine"), "equals: 'mine' is the entry itself; leave it out"),
    "an empty file": ("", "is empty"),
    "a number of 4,000 digits": ('{"schema": ' + "9" * 4000 + "}", "is not JSON (it has a number of 4,000 digits)"),
    "a name of 5,000 letters": (minimal(name="x" * 5000), f"name: is '{'x' * 60}', not a name"),
    "an unknown base": (minimal(kind="delta", bases=["no-such"]), "bases: there is no release 'no-such'"),
    "an unknown result": (minimal(result="no-such"), "result: there is no release 'no-such'"),
    "an unknown recipe": (minimal(kind="delta", bases=["llama-7b"], recipe="magic"), "recipe: is 'magic', not one of"),
    "a recipe without a base": (minimal(kind="delta", recipe="plain"), "recipe: is for a delta that names its bases"),
    "a recipe of a full model": (minimal(bases=["llama-7b"], recipe="plain"), "recipe: is for a delta"),
    "an unknown prompt": (minimal(prompt="chatty"), "prompt: is 'chatty', not a table"),
    "a short digest": (with_file(sha256=["ab"]), "forms[0].files[0].sha256[0]: is 'ab', not a SHA-256"),
    "a digest in capitals": (with_file(sha256=["A" * 64]), "forms[0].files[0].sha256[0]"),
    "one digest, no list": (with_file(sha256="0" * 64), "forms[0].files[0].sha256: is '0000"),
    "an MD5 for a SHA-256": (with_file(sha256=["0" * 32]), "not a SHA-256"),
    "a rounded size": (with_file(size="9.98 GB"), "forms[0].files[0].size: is '9.98 GB', not a whole number"),
    "a size below 0": (with_file(size=-1), "size: is -1"),
    "a size with a fraction": (with_file(size=1.0), "size: is 1.0"),
    "a size that is true": (with_file(size=True), "size: is True"),
    "a file elsewhere": (with_file(name="a/b.bin"), "name: is 'a/b.bin', not the name of a file"),
    "a file above": (with_file(name=".."), "name: is '..'"),
    "an escape": (minimal(title="\x1b[31mred"), "title: is '\\x1b[31mred', not a line of text"),
    "a list for a table": (minimal(weights=[]), "weights: is a list, not a table"),
    "NaN": ('{"schema": "bayling-delta/release/1", "memory": {"eight_bit_gb": NaN}}', "memory.eight_bit_gb: is nan"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_an_entry_is_refused(tmp_path: Path, case: str) -> None:
    entry, words = REFUSED[case]
    (path,) = own(tmp_path, entry)
    with pytest.raises(CheckpointError) as refused:
        load_releases([path])
    assert {problem.kind for problem in refused.value.problems} == {"registry"}
    assert {problem.where for problem in refused.value.problems} == {str(path)}
    assert words in str(refused.value)
    assert "download" not in str(refused.value)
    assert all(len(problem.message) < 200 for problem in refused.value.problems)


def test_everything_wrong_with_every_entry_is_told_at_once(tmp_path: Path) -> None:
    first = with_file(size="big", sha256=["x", "0" * 64, "y"]) | {"kind": "lora", "name": "A"}
    with pytest.raises(CheckpointError) as refused:
        load_releases([*own(tmp_path, first, minimal(title=1)), tmp_path / "absent.json"])
    places = [str(problem).partition(": is")[0].removeprefix(f"{tmp_path}/") for problem in refused.value.problems]
    assert sorted(places) == [
        "0.json: forms[0].files[0].sha256[0]",
        "0.json: forms[0].files[0].sha256[2]",
        "0.json: forms[0].files[0].size",
        "0.json: kind",
        "0.json: name",
        "1.json: title",
        "absent.json: cannot be read (No such file or directory)",
    ]


def test_two_entries_of_ones_own_cannot_share_a_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"1\.json: has the name 'mine', which another entry has"):
        load_releases(own(tmp_path, minimal(), minimal(title="Another")))


def test_an_entry_that_has_a_conversions_weights_must_name_the_release(tmp_path: Path) -> None:
    second = minimal(name="b", equals="a")
    with pytest.raises(CheckpointError, match="equals: 'a' has another's weights itself"):
        load_releases(own(tmp_path, minimal(name="a", equals="llama-7b"), second))


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="at most 1,048,576 are read here"):
        load_releases([path])


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=5)  # to a schema, "a\n" ends with "a"
FLOATS = st.floats(allow_nan=False, allow_infinity=False).filter(lambda number: not number.is_integer())
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | TEXTS | st.sampled_from(["0" * 64, "me"]),
    lambda parts: st.lists(parts, max_size=2) | st.dictionaries(TEXTS, parts, max_size=2),
    max_leaves=4,
)
"""Any JSON, but for what JSON Schema does not tell from other JSON."""


def places(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield (*at, key)
        yield from places(part, (*at, key))


def changed(value: Any, at: tuple[str | int, ...], new: Any) -> Any:
    """The same JSON with something else at one place, or nothing where ``new`` is `...`."""
    if not at:
        return new
    copy: Any = value.copy()
    if len(at) == 1 and new is ...:
        del copy[at[0]]
    else:
        copy[at[0]] = changed(copy[at[0]], at[1:], new)
    return copy


@settings(max_examples=150)
@given(st.data())
def test_reader_and_schema_agree(data: st.DataObject) -> None:
    """With anything at any place of an entry: what one refuses, the other does."""
    name = data.draw(st.sampled_from(["bayling-7b-diff", "vicuna-7b-v1.1", "alpaca-7b-wdiff", "bayling-2-llama-3-8b"]))
    document: Json = entry_document(release(name))
    at = data.draw(st.sampled_from(list(places(document))))
    document = changed(document, at, data.draw(JSON | st.just(...)))
    found, faults = read_entry(document)
    assert (found is None) == bool(faults)
    if SCHEMA.is_valid(document):  # a schema cannot say that sources and names lead somewhere
        assert all(re.search(r"source|recipe: is for", fault) for fault in faults), faults
    else:
        assert faults, list(SCHEMA.iter_errors(document))


# a manifest as an entry


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    model = save(tmp_path / "conversion", llama(1), shards=2)
    path = tmp_path / "my-llama.json"
    record(model, output=path)
    return path


def test_a_manifest_becomes_an_entry_that_identifies_its_files(tmp_path: Path, manifest: Path) -> None:
    entry = entry_from_manifest(manifest, REGISTRY, equals="llama-7b")
    SCHEMA.validate(entry)
    registry = load_releases(own(tmp_path, entry))
    mine = registry.get("my-llama")
    said = json.loads(manifest.read_text())["result"]
    assert mine.weights
    assert mine.weights.digest == said["weights_digest"]
    assert (mine.kind, mine.weights_of) == ("base", "llama-7b")
    assert registry.with_weights(said["weights_digest"]) == (mine,)
    assert registry.fits(mine, registry.get("bayling-7b-diff"))
    for file in sorted((tmp_path / "conversion").glob("*.bin")):
        (found,) = registry.identify(hashlib.sha256(file.read_bytes()).hexdigest())
        assert (found.release, found.file.name, found.file.size) == (mine, file.name, file.stat().st_size)
    norm = said["tensors"]["model.norm.weight"]["sha256"]
    assert mine.weights.small_tensors["model.norm.weight"] == norm
    assert str(tmp_path) not in json.dumps(entry)


def test_the_entry_of_a_delta_has_the_recipe_of_the_one_that_it_equals(manifest: Path) -> None:
    entry = entry_from_manifest(manifest, REGISTRY, name="my-alpaca", equals="tatsu-lab/alpaca-7b-wdiff")
    assert (entry["kind"], entry["recipe"], entry["bases"]) == ("delta", "alpaca", ["llama-7b"])
    assert entry["equals"] == "alpaca-7b-wdiff"


def test_without_a_name_the_entry_has_that_of_the_file_or_its_directory(tmp_path: Path, manifest: Path) -> None:
    model = tmp_path / "My-Model"
    model.mkdir()
    manifest.rename(model / "bayling-delta.json")
    for path in (model, model / "bayling-delta.json"):
        entry = entry_from_manifest(path, REGISTRY)
        assert (entry["name"], entry["kind"], entry["equals"]) == ("my-model", "full", None)


@pytest.mark.parametrize(
    ("change", "options", "error", "words"),
    [
        (lambda text: text, {"name": "Two Words"}, UsageError, "'Two Words' is no name for a release"),
        (lambda text: text, {"name": "llama-7b"}, UsageError, "'llama-7b' is taken (LLaMA-1 7B)"),
        (lambda text: text, {"equals": "lama-7b"}, UsageError, "did you mean llama-7b"),
        (lambda text: text.replace("manifest/1", "manifest/2"), {}, CheckpointError, "not a manifest of this version"),
        (lambda text: text.replace('"size"', '"sized"'), {}, CheckpointError, "is not a manifest"),
        (lambda text: re.sub('"created": "[^"]*"', '"created": "\\\\u001b"', text), {}, CheckpointError, "not a line"),
        (lambda text: re.sub('"created": "[^"]*"', '"created": [1]', text), {}, CheckpointError, "when it was made"),
        (lambda text: text.replace('"created"', '"make"'), {}, CheckpointError, "is not a manifest"),
        (lambda text: text.replace('"record"', "{}"), {}, CheckpointError, "its operation is no name"),
        (lambda text: text.replace('"dtype": "F16",\n    "files"', '"files"'), {}, CheckpointError, "('dtype')"),
        (
            lambda text: text.replace('"dtype": "F16",\n    "files"', '"dtype": [],\n"files"'),
            {},
            CheckpointError,
            "dtype",
        ),
        (lambda text: text, {"name": "x" * 5000}, UsageError, f"'{'x' * 80}' is no name for a release"),
    ],
)
def test_what_cannot_become_an_entry_is_refused(
    manifest: Path, change: Callable[[str], str], options: Json, error: type[BaylingDeltaError], words: str
) -> None:
    manifest.write_text(change(manifest.read_text()))
    with pytest.raises(error) as refused:
        entry_from_manifest(manifest, REGISTRY, **options)
    assert words in str(refused.value)


# the command


def printed(capsys: pytest.CaptureFixture[str], *words: str | Path, code: int = 0) -> str:
    with pytest.raises(SystemExit) as done:
        main(["releases", *map(str, words)])
    out, err = capsys.readouterr()
    assert done.value.code == code, err
    return out if code == 0 else err


def test_every_release_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys).splitlines()
    names = [line.split()[0] for line in lines[1 : len(FILES) + 1]]
    assert sorted(names) == sorted(path.stem for path in FILES)
    assert names.index("llama-7b") < names.index("llama-13b")
    assert "bayling-7b-diff                delta  llama-7b   plain      1 of 2" in lines
    assert max(map(len, lines)) <= 100
    document = json.loads(printed(capsys, "--json"))
    assert [entry["name"] for entry in document["releases"]] == names


@pytest.mark.parametrize("of", REGISTRY.releases, ids=lambda of: of.name)
def test_a_release_is_told_with_its_sources(capsys: pytest.CaptureFixture[str], of: Release) -> None:
    text = printed(capsys, of.name)
    flat = " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 100
    for words in (of.title, *of.sources.values(), *of.unrecorded, *(note.text for note in of.notes)):
        assert " ".join(words.split()) in flat
    if of.recipe:
        assert RECIPES[of.recipe].summary in flat


def test_what_is_on_no_record_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "ICTNLP/bayling-7b-diff")
    assert "sha256 ce9f02b545b7ec92…" in text
    assert "no digest is on record of pytorch_model-00002-of-00002.bin 3.5 GB" in text
    assert "weights digest not on record" in text


def test_a_user_goes_from_a_manifest_to_an_entry_that_is_known(
    tmp_path: Path, manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = tmp_path / "entry.json"
    entry.write_text(printed(capsys, "--from-manifest", manifest, "--name", "mine", "--equals", "llama-7b"))
    assert "LLaMA-1 7B, as recorded in a manifest" in printed(capsys, "mine", "--registry", entry)
    document = json.loads(printed(capsys, "--registry", entry, "--json"))
    (own_entry,) = [each for each in document["releases"] if each["own"]]
    assert (own_entry["name"], own_entry["recorded"]) == ("mine", {"files": 2, "of": 2})


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["baylin-7b-diff"], 2, "did you mean bayling-7b-diff"),
        (["--name", "x"], 2, "--name and --equals go with --from-manifest"),
        (["llama-7b", "--from-manifest", "x"], 2, "NAME and --from-manifest do not go together"),
        (["--registry", "absent.json"], 3, "absent.json: cannot be read"),
        (["--from-manifest", "absent.json"], 3, "cannot be read (No such file"),
    ],
)
def test_the_command_fails_with_a_reason(
    capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    assert message in printed(capsys, *words, code=code)


def test_a_title_cannot_move_the_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = own(tmp_path, minimal(title="a\u202eb\u0085c"))
    assert "a\\u202eb\\x85c" in printed(capsys, "mine", "--registry", path)


def test_the_registry_is_a_value() -> None:
    """Read again it is equal, and nothing in it can be set."""
    assert load_releases() == REGISTRY
    with pytest.raises(AttributeError):
        REGISTRY.own = frozenset()  # type: ignore[misc]
    assert isinstance(REGISTRY, Registry)
    assert isinstance(release("llama-7b").forms[0], Form)
