"""The files beside the weights: which of the delta's go into the result, and what is changed in them.

What is changed is what transformers could not load, or would read otherwise than the release meant it. Each change
is told, with its reason; docs/decisions/0009-tokenizer-and-prompt.md has the measurements behind them.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Final

from bayling_delta.checkpoint import COMPANION_CAP, EMBEDDING, HEAD, Checkpoint, read_table, what_instead
from bayling_delta.downloads import mended
from bayling_delta.errors import CheckpointError, Problem
from bayling_delta.manifest import to_json
from bayling_delta.release_entry import Prompt, Release
from bayling_delta.sources import exists, file_stamp, link_target, list_directory, open_source, read_bytes, real_path
from bayling_delta.tensors import TORCH_NAMES
from bayling_delta.tokenizer_files import TOKENIZER_TABLES, read_tokenizer, too_many_tokens

__all__ = ["CHAT_TEMPLATE", "COPIED", "Companion", "check", "collect", "foreign_files", "stamps"]

CHAT_TEMPLATE: Final = "chat_template.jinja"
COPIED: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    CHAT_TEMPLATE,
)
"""The files beside a model's weights that are understood, and that a result takes over from its delta."""
_KNOWN: Final = re.compile(
    r"README\.md|LICENSE.*|\.gitattributes|\.cache|.*\.index\.json|bayling-delta\.json|SHA256SUMS"
    r"|pytorch_model.*\.bin|model.*\.safetensors"
)
"""Understood, and not copied: the result has its own, or needs none."""
_METAS: Final = ("params.json", "checklist.chk")
"""The same, beside weights in Meta's own format."""
_FITTED: Final = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
"""The tables that may be changed, besides config.json, which an open checkpoint has."""
_MISNAMED: Final = "LLaMATokenizer"
"""A name in conversions from before transformers had the class."""
_LLAMA_CLASSES: Final = ("LlamaTokenizer", "LlamaTokenizerFast", _MISNAMED)
_SIZES: Final = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_LLAMA_TOKENS: Final = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@dataclass(frozen=True, slots=True)
class Companion:
    """One file of the result that is not weights."""

    name: str
    content: Path | bytes
    """The delta's file, which is taken over byte for byte; or the bytes that are written instead."""
    changes: tuple[str, ...] = ()
    """What differs from the delta's file, in words, and why."""


def foreign_files(checkpoint: Checkpoint) -> list[str]:
    """Names beside the weights that are not understood here, and therefore not copied."""
    weights = {file.path.name for file in checkpoint.files}
    return [
        name
        for name in list_directory(checkpoint.directory)
        if name not in COPIED
        and name not in weights
        and not _KNOWN.fullmatch(name)
        and not (checkpoint.container == "meta" and name in _METAS)
    ]


def _config(delta: Checkpoint) -> dict[str, Any]:
    """What a delta's config.json says, which beside Meta's format is not what it was opened by; empty without one.

    Raises:
        CheckpointError: it cannot be read, or is no table.
    """
    if delta.config_name == "config.json":
        return delta.config or {}
    path = delta.directory / "config.json"
    return read_table(path) if exists(path) else {}


# before the run


def stamps(directory: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of the files that would be taken over, by name: to see that they stay as they were."""
    found = {name: file_stamp(directory / name) for name in COPIED}
    return {name: stamp for name, stamp in found.items() if stamp}


def check(delta: Checkpoint, release: Release | None = None) -> tuple[list[Problem], list[str]]:
    """What is wrong with the files beside a delta's weights: unreadable, something else, a tokenizer that is too large.

    Also what is only to be told: a tokenizer that is too large as the release's is. ``release`` is what the delta
    is, where that is known. config.json was read when the delta was opened.

    Raises:
        CheckpointError: the system cannot read a file.
    """
    problems: list[Problem] = []
    tokens = read_tokenizer(delta, problems).tokens
    for name in COPIED:
        if name != "config.json" and name not in TOKENIZER_TABLES and exists(delta.directory / name):
            try:
                _check_file(delta.directory / name)
            except CheckpointError as error:
                problems += error.problems
    problems += [problem for problem in _table_problems(delta) if problem not in problems]
    told = [
        f"{delta.directory / name}: is a link; what is copied into the result is {real_path(delta.directory / name)}"
        for name in COPIED
        if _leads_elsewhere(delta.directory / name)
    ]
    embedding = delta.tensors.get(EMBEDDING)
    if tokens is None or embedding is None or len(embedding.shape) != 2 or tokens <= embedding.shape[0]:
        return problems, told
    too_many = f"its tokenizer {too_many_tokens(tokens, embedding.shape[0])}"
    if release and release.tokenizer and release.tokenizer.tokens == tokens:
        return problems, [*told, f"{delta.path}: {too_many}; {_published_so(release, embedding.shape[0])}"]
    return [*problems, Problem("tokenizer", str(delta.directory), too_many)], told


def _leads_elsewhere(path: Path) -> bool:
    """Whether it is a link out of its directory, and not to a blob of the Hub's cache."""
    target = link_target(path)
    return target is not None and target.parent.name != "blobs" and real_path(path).parent != real_path(path.parent)


def _table_problems(delta: Checkpoint) -> Iterator[Problem]:
    """What is wrong with tables that may be written anew, config.json among them."""
    where = str(delta.directory / "config.json")
    try:
        config = _config(delta)
    except CheckpointError as error:
        yield from error.problems
        return
    if delta.config_name != "config.json":
        for key, value in (delta.config or {}).items():
            if key in _SIZES and config and config.get(key) not in (None, value):
                said = str(config[key])[:80]
                yield Problem("architecture", where, f"says {key} {said}; {delta.config_name} says {value}")
    for path in (delta.directory / name for name in _FITTED if exists(delta.directory / name)):
        try:
            read_table(path)
        except CheckpointError as error:
            yield from error.problems


def _check_file(path: Path) -> None:
    """Refuse what would keep a loader from reading the result: a download that failed, text that is not JSON."""
    if path.suffix == ".json":
        read_table(path)
        return
    with open_source(path) as source:
        if source.size > COMPANION_CAP:
            message = f"has {source.size:,} bytes; at most {COMPANION_CAP:,} are taken over"
            raise CheckpointError(Problem("unsupported", str(path), message))
        found = what_instead(read_bytes(source, 0, 512), source.size)
    if found:
        problem = mended(Problem(found[0], str(path), found[1].replace("weights", "this file")), path)
        raise CheckpointError(replace(problem, kind="not_weights"))


def _published_so(release: Release, rows: int) -> str:
    added = release.tokenizer.added if release.tokenizer else {}
    names = ", ".join(token for token, number in added.items() if number >= rows)
    which = f" ({names})" if names else ""
    return f"{release.title}, was published so{which}, and works as long as no text has such a token"


# when the result is written


def collect(delta: Checkpoint, dtype: str, release: Release | None = None) -> list[Companion]:
    """The delta's configuration and tokenizer, fitted to a result of ``dtype``, in the order of `COPIED`.

    ``release`` is what the delta is, where that is known: its prompt, its sampling and its special tokens are then
    set right. Source: BayLing, apply_delta.py, which saves the delta's configuration and tokenizer with the sum.

    Raises:
        CheckpointError: a file cannot be read, or is not what its name says.
    """
    paths = {name: delta.directory / name for name in COPIED if exists(delta.directory / name)}
    tables = {name: read_table(paths[name]) if name in paths else {} for name in _FITTED}
    config = tables["config.json"] = _config(delta)
    tokenizer, special = tables["tokenizer_config.json"], tables["special_tokens_map.json"]
    prompt = release.prompt if release else None
    llama = _llama_file(tokenizer, config, paths)
    edits = {
        "config.json": chain(_config_edits(config, dtype), _shape_edits(config, delta)) if config else (),
        "generation_config.json": _generation_edits(tables["generation_config.json"], config, prompt),
        "tokenizer_config.json": chain(_class_edits(tokenizer, llama), _token_edits(tokenizer, llama, release)),
        "special_tokens_map.json": _token_edits(special, llama, release),
    }
    found = {name: Companion(name, path) for name, path in paths.items()}
    for name, changes in edits.items():
        if edited := _edited(name, tables[name], changes):
            found[name] = edited
    template = prompt.chat_template if prompt else None
    if prompt and template and CHAT_TEMPLATE not in paths and "chat_template" not in tables["tokenizer_config.json"]:
        change = f"added: the prompt {prompt.name!r} as it was published, which the delta has no file of"
        found[CHAT_TEMPLATE] = Companion(CHAT_TEMPLATE, template.encode(), (change,))
    return [found[name] for name in COPIED if name in found]


@dataclass(frozen=True, slots=True)
class _Edit:
    """A key of a table that gets another value."""

    key: str
    value: Any
    """None where the key is left out."""
    why: str


def _edited(name: str, table: Mapping[str, Any], edits: Iterable[_Edit]) -> Companion | None:
    """A table with keys changed in place, new ones at its end, and each change in words; None if none is changed."""
    result = dict(table)
    changes: list[str] = []
    for edit in edits:
        if edit.value is None:
            del result[edit.key]
            changes.append(f"{edit.key}: left out, {edit.why}")
            continue
        before = f"{_shown(table[edit.key])} became " if edit.key in table else "added, "
        changes.append(f"{edit.key}: {before}{_shown(edit.value)}, {edit.why}")
        result[edit.key] = edit.value
    return Companion(name, to_json(result).encode(), tuple(changes)) if changes else None


def _shown(value: Any) -> str:
    """A value in a sentence; a token that has properties by its text."""
    return json.dumps(_text_of(value))[:80]


def _config_edits(config: Mapping[str, Any], dtype: str) -> Iterator[_Edit]:
    """What would be wrong of the result: its dtype, and a path of the publisher's machine."""
    for key in ("dtype", "torch_dtype"):  # transformers 5 writes the first, older ones the second
        if key in config and config[key] != TORCH_NAMES[dtype]:
            yield _Edit(key, TORCH_NAMES[dtype], "which the weights are now")
    origin = config.get("_name_or_path")
    if isinstance(origin, str) and re.match(r"[/\\~.]|[A-Za-z]:", origin):
        yield _Edit("_name_or_path", None, "it was a path of the publisher's machine")


def _shape_edits(config: Mapping[str, Any], delta: Checkpoint) -> Iterator[_Edit]:
    """What the weights say otherwise, and a loader would take from the configuration."""
    embedding = delta.tensors.get(EMBEDDING)
    rows = embedding.shape[0] if embedding is not None and len(embedding.shape) == 2 else None
    if rows and type(config.get("vocab_size")) is int and config["vocab_size"] != rows:
        yield _Edit("vocab_size", rows, "which is what the embedding has")
    if embedding and HEAD in delta.tensors and delta.tied and config.get("tie_word_embeddings") is not True:
        yield _Edit("tie_word_embeddings", True, "as the delta stores the head and the embedding as one")


def _generation_edits(table: Mapping[str, Any], config: Mapping[str, Any], prompt: Prompt | None) -> Iterator[_Edit]:
    """Sampling as the publisher's code does it, which no file of the release says."""
    if prompt is None or prompt.generation is None:
        return
    if "_from_model_config" in table:
        yield _Edit("_from_model_config", None, "it says that nothing is set here but what config.json has")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if key not in table and type(config.get(key)) is int:
            yield _Edit(key, config[key], "as in config.json")
    for key, value in asdict(prompt.generation).items():
        if table.get(key) != value:
            yield _Edit(key, value, "as the publisher samples")


def _llama_file(table: Mapping[str, Any], config: Mapping[str, Any], names: Collection[str]) -> str | None:
    """The file of which a loader makes LLaMA's tokenizer; None where it is another's, or there is none.

    It is known by its class; without one, transformers took it from the model's type until version 5.
    """
    name = table.get("tokenizer_class")
    if name not in _LLAMA_CLASSES and (name is not None or config.get("model_type") != "llama"):
        return None
    return next((file for file in ("tokenizer.json", "tokenizer.model") if file in names), None)


def _class_edits(table: Mapping[str, Any], llama: str | None) -> Iterator[_Edit]:
    """The class's right name; and what LLaMA's tokenizer took for granted in 2023, where transformers 5 does not.

    Source: transformers 4.28.1 and 5.23, given the same files and texts.
    """
    name = table.get("tokenizer_class")
    if llama == "tokenizer.model":
        if name in (None, _MISNAMED):
            yield _Edit("tokenizer_class", "LlamaTokenizer", "without which transformers 5 encodes otherwise")
        if table.get("add_bos_token") is None:
            yield _Edit("add_bos_token", True, "which was the default; in transformers 5 it is not")
        if table.get("legacy") is None:
            yield _Edit("legacy", True, "which was the default; transformers 5 encodes otherwise what follows a </s>")
    elif llama and name == _MISNAMED:
        yield _Edit("tokenizer_class", "PreTrainedTokenizerFast", "which takes tokenizer.json as it is")


def _token_edits(table: Mapping[str, Any], llama: str | None, release: Release | None) -> Iterator[_Edit]:
    """Special tokens as the release means them; where that is not known, LLaMA's in the place of empty ones."""
    meant = release.tokenizer.special_tokens if release and release.tokenizer else {}
    for key, token in meant.items():
        if key in table and _text_of(table[key]) != token:
            yield _Edit(key, _with_text(table[key], token), "as the release means it")
    for key, token in _LLAMA_TOKENS.items():
        if llama == "tokenizer.model" and key not in meant and _text_of(table.get(key)) == "":
            yield _Edit(key, _with_text(table[key], token), "as transformers 5 does not load an empty one")


def _text_of(token: Any) -> Any:
    """The text of a special token, which stands alone or in a table with its properties."""
    return token.get("content", token) if isinstance(token, dict) else token


def _with_text(token: Any, text: str) -> Any:
    return {**token, "content": text} if isinstance(token, dict) else text
