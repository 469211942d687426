"""The files beside the weights: the result encodes, prompts and samples as its release, and says what was changed."""

import io
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from bayling_delta import Release, apply, load_releases, preparing, system, verify
from bayling_delta.checkpoint import EMBEDDING, HEAD, Checkpoint, open_checkpoint
from bayling_delta.companions import COPIED, Companion, check, collect
from bayling_delta.errors import CheckpointError, MismatchError
from bayling_delta.identifying import Identity
from bayling_delta.manifest import to_json
from bayling_delta.model_card import model_card
from bayling_delta.system import System
from tests.meta import PLAIN, random_model, save_meta
from tests.pairs import CONFIG, StateDict, llama, load, save
from tests.test_releases import SYSTEM, TALKS, minimal, published_prompt

WORDS = 600
LLAMA = CONFIG | {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
REGISTRY = load_releases()
BAYLING = REGISTRY.get("bayling-7b-diff")

Json = dict[str, Any]
Known = Callable[[Release], None]


# a tokenizer as LLaMA's, and how the releases of 2023 were encoded


@pytest.fixture(scope="module")
def pieces() -> bytes:
    """A SentencePiece model with the settings of LLaMA's: BPE with bytes to fall back on, no normalisation."""
    text = [*SYSTEM.split(), *(turn for talk in TALKS for turn in talk), "### Instruction: ### Response: Hello world"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 20),
        model_writer=model,
        vocab_size=WORDS,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


def as_in_2023(pieces: bytes, text: str) -> list[int]:
    """What LlamaTokenizer of transformers 4.28.1 made of a text: SentencePiece, between the special tokens."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    special = {"<unk>": 0, "<s>": 1, "</s>": 2}
    ids = [1]
    for part in re.split(f"({'|'.join(special)})", text):
        ids += [special[part]] if part in special else processor.encode(part)
    return ids


TEXTS = ["Hello world", "Hello</s>\n### Instruction:\nworld", "你好", "<s>Hello", "a\nb", "", SYSTEM]
"""Without a space at the end of a part or two in a row, which transformers 5 encodes otherwise, whatever is set."""


def added(text: str) -> Json:
    """A special token as transformers 4.28.1 saved it."""
    return {
        "__type": "AddedToken",
        "content": text,
        "lstrip": False,
        "normalized": True,
        "rstrip": False,
        "single_word": False,
    }


SAVED: Json = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": added("<s>"),
    "clean_up_tokenization_spaces": False,
    "eos_token": added("</s>"),
    "model_max_length": 2048,
    "pad_token": None,
    "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": added("<unk>"),
}
"""tokenizer_config.json as transformers 4.28.1 wrote it."""
EMPTY = {"bos_token": "", "eos_token": "", "unk_token": ""}
SWAPPED = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "</s>"}
"""special_tokens_map.json of BayLing-7B."""

TOKENIZERS: dict[str, tuple[dict[str, Json], Release | None, list[str]]] = {
    # the delta's files, what is known of it, and the keys that are changed
    "as saved in 2023": ({"tokenizer_config.json": SAVED}, None, ["legacy"]),
    "nothing said of legacy": ({"tokenizer_config.json": SAVED | {"legacy": None}}, None, ["legacy"]),
    "the class of early conversions": (
        {"tokenizer_config.json": SAVED | {"tokenizer_class": "LLaMATokenizer"}},
        None,
        ["tokenizer_class", "legacy"],
    ),
    "a fast class": ({"tokenizer_config.json": SAVED | {"tokenizer_class": "LlamaTokenizerFast"}}, None, ["legacy"]),
    "no class": (
        {"tokenizer_config.json": {key: SAVED[key] for key in SAVED if key != "tokenizer_class"}},
        None,
        ["tokenizer_class", "legacy"],
    ),
    "no configuration": ({}, None, ["tokenizer_class", "add_bos_token", "legacy"]),
    "empty tokens": (
        {"tokenizer_config.json": EMPTY | {"tokenizer_class": "LLaMATokenizer"}},
        None,
        ["tokenizer_class", "add_bos_token", "legacy", *EMPTY],
    ),
    "BayLing-7B": (
        {"tokenizer_config.json": SAVED, "special_tokens_map.json": SWAPPED},
        BAYLING,
        ["legacy", "bos_token", "unk_token"],
    ),
    "BayLing-7B with tokens as tables": (
        {"tokenizer_config.json": SAVED, "special_tokens_map.json": {key: added(SWAPPED[key]) for key in SWAPPED}},
        BAYLING,
        ["legacy", "bos_token", "unk_token"],
    ),
}

RIGHT_AS_THEY_ARE: dict[str, set[str]] = {
    "5.23.0": set(),
    "5.24.0": {"the class of early conversions", "no class"},
}
"""By the version of transformers, as measured: which of the deltas encode as in 2023 without any change."""


def delta_with(place: Path, files: dict[str, Any], config: Json = LLAMA) -> Checkpoint:
    """A delta of one small tensor, with files beside it: tables as JSON, bytes as they are."""
    directory = save(place, {"model.norm.weight": torch.zeros(2).half()}, config=config)
    write(directory, files)
    return open_checkpoint(directory)


def write(directory: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (directory / name).write_bytes(data)


def written(place: Path, companions: list[Companion]) -> Path:
    """The companions as a directory."""
    place.mkdir()
    for companion in companions:
        content = companion.content
        (place / companion.name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return place


def changes(companions: list[Companion], *names: str) -> list[str]:
    """The keys that were changed in some of the files, in all if none is named."""
    return [
        change.partition(":")[0] for each in companions for change in each.changes if not names or each.name in names
    ]


def encoded(directory: Path) -> list[list[int]]:
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory)
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_result_encodes_as_in_2023(tmp_path: Path, pieces: bytes, case: str) -> None:
    """Which most deltas' own files do not, in those versions of transformers 5 that were measured."""
    files, release, changed = TOKENIZERS[case]
    delta = delta_with(tmp_path / "delta", {**files, "tokenizer.model": pieces})
    companions = collect(delta, "F16", release)
    assert changes(companions, "tokenizer_config.json", "special_tokens_map.json") == changed
    result = written(tmp_path / "result", companions)
    assert (result / "tokenizer.model").read_bytes() == pieces
    expected = [as_in_2023(pieces, text) for text in TEXTS]
    assert encoded(result) == expected
    tokenizer = transformers.AutoTokenizer.from_pretrained(result)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    if transformers.__version__ in RIGHT_AS_THEY_ARE:
        try:
            right = encoded(delta.directory) == expected
        except RecursionError:
            right = False
        assert right == (case in RIGHT_AS_THEY_ARE[transformers.__version__])


def test_special_tokens_of_an_unknown_release_are_left_alone(tmp_path: Path, pieces: bytes) -> None:
    """A model may have been trained with them; what transformers makes of them is said by `inspect`."""
    files = {"tokenizer.model": pieces, "tokenizer_config.json": SAVED, "special_tokens_map.json": SWAPPED}
    companions = collect(delta_with(tmp_path / "delta", files), "F16")
    assert changes(companions, "special_tokens_map.json") == []
    assert encoded(written(tmp_path / "result", companions))[0][0] == 2


def test_a_tokenizer_json_is_what_counts(tmp_path: Path, pieces: bytes) -> None:
    """Under the class of early conversions too, which transformers before 5 refuses; byte for byte."""
    made = collect(delta_with(tmp_path / "made", {"tokenizer.model": pieces, "tokenizer_config.json": SAVED}), "F16")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(written(tmp_path / "by model", made))
    table = tokenizer.backend_tokenizer.to_str().encode()
    files = {"tokenizer.json": table, "tokenizer_config.json": SAVED | {"tokenizer_class": "LLaMATokenizer"}}
    companions = collect(delta_with(tmp_path / "delta", files), "F16")
    assert changes(companions) == ["tokenizer_class"]
    result = written(tmp_path / "result", companions)
    assert (result / "tokenizer.json").read_bytes() == table
    assert encoded(result) == [as_in_2023(pieces, text) for text in TEXTS]


def test_another_tokenizer_is_left_alone(tmp_path: Path) -> None:
    files = {
        "tokenizer.json": {"model": {"vocab": {}}},
        "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "bos_token": ""},
        "special_tokens_map.json": {"bos_token": ""},
    }
    delta = delta_with(tmp_path / "delta", files)
    assert collect(delta, "F16") == [Companion(name, delta.directory / name) for name in ("config.json", *files)]


# a whole result of a known release


@pytest.fixture(scope="module")
def states() -> tuple[StateDict, StateDict]:
    """A base and a delta with a row for each piece."""
    random = torch.Generator().manual_seed(7)
    grown = []
    for seed, scale in ((1, 0.05), (2, 0.01)):
        rows = {name: (torch.randn(WORDS, 64, generator=random) * scale).half() for name in (EMBEDDING, HEAD)}
        grown.append(llama(seed, scale) | rows)
    return grown[0], grown[1]


@pytest.fixture
def pair(tmp_path: Path, states: tuple[StateDict, StateDict], pieces: bytes) -> tuple[Path, Path]:
    """A base, and a delta as BayLing-7B is published."""
    base, delta = (save(tmp_path / side, states[place], config=LLAMA) for place, side in enumerate(("base", "delta")))
    files = {
        "tokenizer.model": pieces,
        "tokenizer_config.json": SAVED,
        "special_tokens_map.json": SWAPPED,
        "generation_config.json": {
            "_from_model_config": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "transformers_version": "4.28.1",
        },
    }
    write(delta, files)
    return base, delta


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Known:
    """Says of which release the deltas are."""

    def be(release: Release) -> None:
        def identify(checkpoint: Checkpoint, *_: object) -> Identity | None:
            return Identity(release, release.forms, "a test") if checkpoint.directory.name == "delta" else None

        monkeypatch.setattr(preparing, "identify", identify)

    return be


@contextmanager
def silent() -> Iterator[None]:
    """Fails if transformers has anything to say."""
    said: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, listening = logging.getLogger("transformers"), Listening(logging.WARNING)
    logger.addHandler(listening)
    try:
        yield
    finally:
        logger.removeHandler(listening)
    assert said == []


def test_a_result_prompts_and_samples_as_its_release(
    tmp_path: Path, pair: tuple[Path, Path], known: Known, pieces: bytes
) -> None:
    known(BAYLING)
    manifest = apply(*pair, tmp_path / "out")
    out = tmp_path / "out"
    with silent():
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(out)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(out)
    for talk in TALKS:
        messages = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(talk)]
        expected = published_prompt(messages, SYSTEM)
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == "<s>" + expected  # the published code leaves the first token to the tokenizer
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == tokenizer(expected)["input_ids"]
    short = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
    ]
    ids = tokenizer.apply_chat_template(short, add_generation_prompt=True, return_dict=False)
    assert ids == as_in_2023(pieces, published_prompt(short, SYSTEM))
    sampling = model.generation_config
    assert (sampling.do_sample, sampling.temperature, sampling.top_p, sampling.top_k) == (True, 0.7, 1.0, 0)
    assert (sampling.repetition_penalty, sampling.max_new_tokens) == (1.0, 1024)
    assert (sampling.bos_token_id, sampling.eos_token_id, sampling.pad_token_id) == (1, 2, 0)
    with silent():
        model.generate(torch.tensor([ids[:9]]), attention_mask=torch.ones(1, 9), max_new_tokens=2)
    assert {change["file"] for change in manifest["changes"]} == {
        "generation_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    }
    listed = {entry["name"] for entry in manifest["result"]["files"]}
    assert listed == {path.name for path in out.iterdir()} - {"bayling-delta.json", "SHA256SUMS"}
    assert "  chat_template.jinja\n" in (out / "SHA256SUMS").read_text()


def test_the_same_inputs_give_the_same_files(tmp_path: Path, pair: tuple[Path, Path], known: Known) -> None:
    known(BAYLING)
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        apply(*pair, tmp_path / place / "out")
    for path in (tmp_path / "here" / "out").iterdir():
        data = path.read_bytes()
        assert str(tmp_path).encode() not in data
        if path.name not in ("bayling-delta.json", "SHA256SUMS"):  # these have the time
            assert data == (tmp_path / "there" / "out" / path.name).read_bytes(), path.name


def test_a_users_own_entry_gives_its_prompt(tmp_path: Path, pair: tuple[Path, Path], known: Known) -> None:
    prompt = {
        "name": "mine",
        "system": "Hi.",
        "chat_template": "{{ messages[0]['content'] }}!",
        "source": ["I made it"],
    }
    entry = minimal(kind="delta", bases=["llama-7b"], recipe="plain", prompt=prompt)
    (tmp_path / "entry.json").write_text(json.dumps(entry))
    known(load_releases([tmp_path / "entry.json"]).get("mine"))
    manifest = apply(*pair, tmp_path / "out")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a!"
    assert {change["file"] for change in manifest["changes"]} == {"chat_template.jinja", "tokenizer_config.json"}


@pytest.mark.parametrize("own", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_template_of_the_deltas_own_is_kept(tmp_path: Path, own: str) -> None:
    files: dict[str, Any] = {own: b"mine"} if own == "chat_template.jinja" else {own: SAVED | {"chat_template": "mine"}}
    delta = delta_with(tmp_path / "delta", files)
    found = {each.name: each.content for each in collect(delta, "F16", BAYLING)}
    assert found.get("chat_template.jinja") == (delta.directory / own if own == "chat_template.jinja" else None)


def test_a_generation_config_is_made_where_there_is_none(tmp_path: Path) -> None:
    companions = collect(delta_with(tmp_path / "delta", {}), "F16", BAYLING)
    result = written(tmp_path / "result", companions)
    assert json.loads((result / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "max_new_tokens": 1024,
    }
    with silent():
        transformers.GenerationConfig.from_pretrained(result)


VALUES = (
    st.none() | st.booleans() | st.integers(-1, 3) | st.floats(allow_nan=False) | st.sampled_from(["", "<s>", "</s>"])
)
KEYS = {
    "config.json": ["model_type", "_name_or_path", "torch_dtype", "bos_token_id"],
    "generation_config.json": ["_from_model_config", "temperature", "eos_token_id"],
    "tokenizer_config.json": ["tokenizer_class", "add_bos_token", "legacy", "bos_token", "unk_token", "chat_template"],
    "special_tokens_map.json": ["bos_token", "eos_token", "pad_token"],
}
STRINGS = st.sampled_from(["llama", "LLaMATokenizer", "LlamaTokenizer", "/home/someone/x", "float16", "bfloat16"])
ANY = VALUES | STRINGS | st.lists(VALUES, max_size=2) | st.dictionaries(st.sampled_from(["content", "x"]), VALUES)


@settings(max_examples=60)
@given(
    st.fixed_dictionaries(
        {}, optional={name: st.dictionaries(st.sampled_from(keys), ANY) for name, keys in KEYS.items()}
    ),
    st.sampled_from([None, BAYLING, REGISTRY.get("alpaca-7b-wdiff")]),
    st.sets(st.sampled_from(["tokenizer.model", "tokenizer.json"])),
)
def test_what_is_fitted_fits_and_every_change_is_told(
    tmp_path_factory: pytest.TempPathFactory, tables: dict[str, Json], release: Release | None, also: set[str]
) -> None:
    """What no change names is as it was, files without a change are the delta's, and a second run changes nothing."""
    place = tmp_path_factory.mktemp("any")
    delta = delta_with(place / "delta", tables | {name: {} for name in also}, config=tables.get("config.json", {}))
    companions = collect(delta, "F16", release)
    assert [each.name for each in companions] == [name for name in COPIED if name in {each.name for each in companions}]
    for each in companions:
        if isinstance(each.content, Path):
            assert each.content == delta.directory / each.name
            assert each.changes == ()
            continue
        assert each.changes
        if each.name.endswith(".json"):
            before, after = tables.get(each.name, {}), json.loads(each.content)
            differing = {key for key in {*before, *after} if before.get(key, ...) != after.get(key, ...)}
            assert differing == set(changes([each]))
            assert each.content == to_json(after).encode()
    result = written(place / "result", companions)
    save(place / "weights", {"model.norm.weight": torch.zeros(2).half()}, config=None)
    (place / "weights" / "pytorch_model.bin").rename(result / "pytorch_model.bin")
    assert changes(collect(open_checkpoint(result), "F16", release)) == []


# before the run


def test_a_release_with_a_token_too_many_is_explained(tmp_path: Path) -> None:
    """LLaVA v0: its [PAD] has a number one past the last row."""
    llava = REGISTRY.get("llava-7b-delta-v0")
    directory = save(tmp_path / "delta", {EMBEDDING: torch.zeros(32003, 1).half()})
    write(directory, {"added_tokens.json": {"[PAD]": 32003}, "tokenizer.model": b"\n\0"})
    delta = open_checkpoint(directory)
    problems, (told,) = check(delta, llava)
    assert problems == []
    assert "LLaVA 7B v0, the delta, was published so ([PAD]), and works as long as no text has such a token" in told
    (problem,), notes = check(delta, BAYLING)
    assert (problem.kind, problem.allow, notes) == ("tokenizer", True, [])
    assert problem.message == (
        "its tokenizer knows 32,004 tokens, model.embed_tokens.weight has 32,003 rows: the last cannot be looked up"
    )
    assert check(delta) == ([problem], [])


def test_everything_wrong_beside_the_weights_is_told_at_once(tmp_path: Path) -> None:
    files = {
        "tokenizer.json": b"{",
        "tokenizer_config.json": b'{"a": 1, "a": 2}',
        "generation_config.json": b"[]",
        "merges.txt": b"version https://git-lfs.github.com/spec/v1\n",
    }
    problems, _ = check(delta_with(tmp_path / "delta", files))
    assert [Path(problem.where).name for problem in problems] == [
        "tokenizer_config.json",
        "tokenizer.json",
        "generation_config.json",
        "merges.txt",
    ]


def test_a_tokenizer_json_is_read_once_to_check_it_and_once_to_copy_it(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    for directory in pair:
        write(directory, {"tokenizer.json": {"model": {"vocab": {"a": 0}}}})
    opened: Counter[str] = Counter()

    class Counting(system.System):
        def open_read(self, path: Path, *, direct: bool) -> int:
            opened[f"{path.parent.name}/{path.name}"] += 1
            return super().open_read(path, direct=direct)

    with system.using(Counting()):
        apply(*pair, tmp_path / "out")
    assert {name: count for name, count in opened.items() if "tokenizer.json" in name} == {"delta/tokenizer.json": 2}


def test_a_file_that_was_damaged_during_the_run_is_not_taken(tmp_path: Path) -> None:
    delta = delta_with(tmp_path / "delta", {"tokenizer_config.json": b"{"})
    with pytest.raises(CheckpointError, match="is not JSON"):
        collect(delta, "F16")


# the model card


def card_of(parameters: int, dtype: str = "F16", release: Release | None = None, recipe: str = "plain") -> str:
    files = [{"name": name, "size": 1, "sha256": None} for name in ("chat_template.jinja", "model.safetensors")]
    result = {"weights_digest": "sha256:0", "parameters": parameters, "dtype": dtype, "files": files}
    manifest = {"recipe": recipe, "result": result, "inputs": {}, "verification": [], "changes": []}
    return model_card(manifest, release)


SIZES = {
    # parameters: what the card says of them
    134_515_008: 'dtype="float16"',
    6_738_415_616: 'dtype="float16"',
    13_015_864_320: "load_in_8bit=True",
    32_528_943_616: "several share them",
}


@pytest.mark.parametrize("parameters", SIZES)
def test_a_card_says_how_a_gpu_of_16_gb_holds_the_model(parameters: int) -> None:
    for dtype in ("F16", "F32"):
        assert SIZES[parameters] in card_of(parameters, dtype)
    assert ("--quantization bnb-8bit" in card_of(parameters, release=BAYLING)) == (parameters == 13_015_864_320)
    assert 'dtype="bfloat16"' in card_of(1, "BF16")


def test_a_card_says_how_the_sum_was_made() -> None:
    assert "by the recipe `plain`: each tensor is added in the delta's dtype" in card_of(1)
    assert "by the recipe `alpaca`: each tensor is added in float32" in card_of(1, recipe="alpaca")


def test_a_card_explains_the_placeholders_and_the_licence(
    tmp_path: Path, pair: tuple[Path, Path], known: Known
) -> None:
    known(BAYLING)
    manifest = apply(*pair, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert BAYLING.prompt
    assert BAYLING.licence
    for says, means in BAYLING.prompt.placeholders.items():
        assert f"| `{says}` | {means} |" in card
    assert BAYLING.licence.text in card
    assert "may not be redistributed" in card
    for change in manifest["changes"]:
        assert f"    {change['file']}: {change['change']}\n" in card
    assert BAYLING.title in card


def test_a_card_of_an_unknown_release_promises_no_chat(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    apply(*pair, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "How to chat" not in card
    assert "placeholders" not in card
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


@pytest.mark.parametrize("parameters", [6_738_415_616, 13_015_864_320])
def test_the_code_of_a_card_runs(
    tmp_path: Path,
    pair: tuple[Path, Path],
    known: Known,
    monkeypatch: pytest.MonkeyPatch,
    parameters: int,
) -> None:
    """On the small model, whatever the size that the card is for."""
    pytest.importorskip("accelerate")
    if parameters > 7_000_000_000:
        pytest.importorskip("bitsandbytes")
    known(BAYLING)
    apply(*pair, tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    blocks = re.findall(r"```python\n(.*?)```", card_of(parameters, release=BAYLING), re.DOTALL)
    assert len(blocks) == 2
    run = "\n".join(blocks).replace("model.generate(", "model.generate(max_new_tokens=3, ")
    said: Json = {}
    exec(run, said)
    assert isinstance(said["answer"], str)


# what a delta's weights and configuration say of each other


def test_a_head_that_is_tied_by_storage_alone_is_said_to_be(tmp_path: Path) -> None:
    """Without the key transformers would make a LLaMA's head of random numbers."""
    config = {key: value for key, value in CONFIG.items() if key != "tie_word_embeddings"}
    for side, scale in (("base", 0.05), ("delta", 0.01)):
        state = llama(1, scale)
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        save(tmp_path / side, state, config=config)
    manifest = apply(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    assert "lm_head.weight" not in load(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    assert any("tie_word_embeddings: added, true" in entry["change"] for entry in manifest["changes"])
    verify(tmp_path / "out", load=True)


def test_a_vocabulary_of_another_size_than_the_embedding_is_set_right(tmp_path: Path) -> None:
    save(tmp_path / "base", llama(1))
    save(tmp_path / "delta", llama(2, 0.01), config=CONFIG | {"vocab_size": 32000})
    manifest = apply(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    assert any("vocab_size: 32000 became 160" in entry["change"] for entry in manifest["changes"])
    verify(tmp_path / "out", load=True)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("change", ["changed", "absent", "new"])
def test_a_file_beside_the_delta_that_changes_during_the_run_is_noticed(tmp_path: Path, name: str, change: str) -> None:
    save(tmp_path / "base", llama(1))
    delta = save(tmp_path / "delta", llama(2, 0.01))
    if change != "new" and name != "config.json":
        (delta / name).write_text("{}")
    if (name, change) == ("config.json", "new"):
        (delta / name).unlink()

    class Changing(System):
        def rename_new(self, old: Path, new: Path) -> None:  # noqa: ARG002
            raise AssertionError("it was not noticed")

        def truncate(self, handle: int, size: int) -> None:  # at the end of a weight file
            if change == "absent":
                (delta / name).unlink(missing_ok=True)
            else:
                (delta / name).write_text('{"some": "thing else"}')
            super().truncate(handle, size)

    with system.using(Changing()), pytest.raises(CheckpointError, match="changed while it was being read") as error:
        apply(tmp_path / "base", delta, tmp_path / "out")
    assert [problem.where for problem in error.value.problems] == [str(delta / name)]


def test_a_config_beside_a_delta_in_metas_format_is_held_against_it(tmp_path: Path) -> None:
    base = save_meta(tmp_path / "base", random_model(PLAIN, 1), PLAIN, 1)
    small = {name: tensor - 1 if tensor.ndim == 1 else tensor for name, tensor in random_model(PLAIN, 2).items()}
    delta = save_meta(tmp_path / "delta", small, PLAIN, 1)
    (delta / "config.json").write_text(json.dumps({**PLAIN.config, "num_attention_heads": 4}))
    with pytest.raises(MismatchError, match=r"says num_attention_heads 4; params.json says 16"):
        apply(base, delta, tmp_path / "out")
    (delta / "config.json").write_text("garbage")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        apply(base, delta, tmp_path / "out")
    (delta / "config.json").write_text(json.dumps({**PLAIN.config, "torch_dtype": "bfloat16"}))
    apply(base, delta, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float16"
