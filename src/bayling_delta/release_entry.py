"""One entry of the registry of releases: what it can say, and the strict reading of one.

An entry is a JSON document, `bayling-delta/release/1`; docs/releases.md describes it, and the classes here have
its fields under the same names. A fact carries its source: the key of a citation in the entry's ``sources``.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Final, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from bayling_delta.recipes import RECIPES
from bayling_delta.tensors import DTYPES

__all__ = [
    "SCHEMA",
    "Architecture",
    "Form",
    "Generation",
    "Licence",
    "Memory",
    "Note",
    "Prompt",
    "RecordedFile",
    "Release",
    "Tokenizer",
    "Weights",
    "as_json",
    "entry_document",
    "is_release_name",
    "read_entry",
]

SCHEMA: Final = "bayling-delta/release/1"


# what a text must be


class _Rule(NamedTuple):
    pattern: str
    what: str
    """What a text of that pattern is, for people."""


_NAME: Final = r"[a-z0-9][a-z0-9._-]{0,99}"
_HUB_ID: Final = "[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"

Name = Annotated[str, _Rule(_NAME, "a name of lower-case letters, digits, '.', '_' and '-'")]
HubId = Annotated[str, _Rule(_HUB_ID, "an id of the Hub, OWNER/NAME")]
Alias = Annotated[str, _Rule(f"{_NAME}|{_HUB_ID}", "a name, or an id of the Hub")]
Line = Annotated[str, _Rule(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,2000}", "a line of text")]
Text = Annotated[str, _Rule(r"(?s:[^\x00\ud800-\udfff]{1,100000})", "a text")]
FileName = Annotated[str, _Rule(r"(?!\.{1,2}$)[^/\\:\x00-\x1f\x7f\ud800-\udfff]{1,255}", "the name of a file")]
Sha256 = Annotated[str, _Rule("[0-9a-f]{64}", "a SHA-256 of 64 hexadecimal digits in lower case")]
Md5 = Annotated[str, _Rule("[0-9a-f]{32}", "an MD5 of 32 hexadecimal digits in lower case")]
WeightsDigest = Annotated[str, _Rule("sha256:[0-9a-f]{64}", "a weights digest, sha256:<hex>")]
Dtype = Annotated[str, _Rule("|".join(DTYPES), f"one of {', '.join(DTYPES)}")]
Key = Annotated[str, _Rule(r"[a-z0-9][a-z0-9-]{0,39}", "a key of 'sources'")]


# what an entry says


@dataclass(frozen=True, slots=True)
class RecordedFile:
    """One file of a form of a release, and what somebody recorded of it.

    A file may have several records, in one row or in several: any of their digests is good.
    """

    name: FileName
    size: int | None
    """Bytes, exactly; None where nobody told."""
    sha256: tuple[Sha256, ...]
    """Empty where nobody has published one."""
    md5: tuple[Md5, ...] = ()
    about: Line | None = None
    """The size as it was shown, where it was shown rounded (``9.98 GB``); never to be compared with."""
    source: tuple[Key, ...] = ()
    """Empty where it is the form's."""

    @property
    def is_weights(self) -> bool:
        """Whether it holds weights: only these identify a release, as other files are shared between models."""
        return self.name.endswith((".bin", ".safetensors", ".pth"))


@dataclass(frozen=True, slots=True)
class Form:
    """One way in which a release is found: a container, a sharding, a conversion."""

    title: Line
    container: Literal["safetensors", "torch", "meta", "other"]
    """``torch``: PyTorch's ``.bin``; ``meta``: Meta's own ``.pth`` in Meta's layout; ``other``: no checkpoint."""
    source: tuple[Key, ...]
    hub: tuple[HubId, ...] = ()
    """Repositories of the Hub that hold it."""
    files: tuple[RecordedFile, ...] = ()
    """All of its weight files, and others as far as something is recorded of them."""

    @property
    def weight_files(self) -> frozenset[str]:
        """The names of all its weight files."""
        return frozenset(file.name for file in self.files if file.is_weights)

    @property
    def recorded_files(self) -> frozenset[str]:
        """The names of the weight files of which a digest is on record."""
        return frozenset(file.name for file in self.files if file.is_weights and (file.sha256 or file.md5))


@dataclass(frozen=True, slots=True)
class Architecture:
    """The sizes of a LLaMA, by the names of config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    """Rows of the embeddings."""
    rms_norm_eps: float
    max_position_embeddings: int
    source: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class Weights:
    """What is known of the state dict, whatever form holds it."""

    dtype: Dtype
    """That of most parameters. Here and below, rotary buffers do not count."""
    tensors: int
    parameters: int
    tensor_bytes: int
    source: tuple[Key, ...]
    rotary_buffers: int | None = None
    """How many ``*.rotary_emb.inv_freq`` old saves also have; None where that was not recorded."""
    digest: WeightsDigest | None = None
    """The weights digest; None where nobody has published one."""
    small_tensors: dict[Line, Sha256] = field(default_factory=dict)
    """Tensor digests of small tensors by name, by which a model is known before its large ones are read."""


@dataclass(frozen=True, slots=True)
class Licence:
    """What licences apply. This is information, and grants nothing."""

    names: tuple[Line, ...]
    text: Line
    source: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """What the tokenizer should be."""

    tokens: int
    """How many it has, added ones included; it may have more or fewer than the embeddings have rows."""
    source: tuple[Key, ...]
    tokenizer_class: Line | None = None
    special_tokens: dict[Line, Line] = field(default_factory=dict)
    """By the names of special_tokens_map.json."""
    added: dict[Line, int] = field(default_factory=dict)
    """Tokens beyond LLaMA's 32000, and their ids."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What it takes to run the model."""

    eight_bit_gb: float
    """GPU memory, in GB, with the weights loaded in 8 bit."""
    source: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class Generation:
    """How the publisher's code samples, by the names of generation_config.json."""

    do_sample: bool
    temperature: float
    top_p: float
    top_k: int
    """0 for no such limit."""
    repetition_penalty: float
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """How one talks to the model."""

    name: Line
    """As the publisher calls it."""
    system: Text
    """The system text where a conversation brings none."""
    source: tuple[Line, ...]
    """Citations in full, as several entries share a prompt."""
    chat_template: Text | None = None
    """Jinja, as chat_template.jinja holds it; the token that begins a text is in it, as tools expect."""
    context: int | None = None
    """Tokens, the answer included."""
    stop_strings: tuple[Line, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    generation: Generation | None = None
    placeholders: dict[Line, Line] = field(default_factory=dict)
    """What an anonymised model says, and what the publisher's code puts in its place."""


@dataclass(frozen=True, slots=True)
class Note:
    """Something else that is known."""

    about: Literal["files", "weights", "tokenizer", "prompt", "memory", "licence", "use", "recipe"]
    text: Line
    source: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """One release: a set of weights, or a delta, that somebody published."""

    name: Name
    title: Line
    kind: Literal["base", "delta", "full", "xor", "other"]
    """``base``: a model that deltas are made against; ``delta``: a difference of weights; ``full``: a whole model;
    ``xor``: files to be combined with the base's files byte by byte; ``other``: named for what it uses."""
    sources: dict[Key, Line]
    """Citations, by the keys that facts name."""
    source: tuple[Key, ...]
    """Of the kind, the bases, the recipe and the names."""
    aliases: tuple[Alias, ...] = ()
    """Other names, and ids of the Hub, that mean this release."""
    bases: tuple[Name, ...] = ()
    """What it must be combined with, any of these."""
    recipe: Name | None = None
    """How; None where this program has no rule for it, or none is needed."""
    result: Name | None = None
    """The entry of what comes out."""
    equals: Name | None = None
    """The release whose weights these are, where this entry has another form of them."""
    related: tuple[Name, ...] = ()
    """Releases that it uses."""
    architecture: Architecture | None = None
    weights: Weights | None = None
    forms: tuple[Form, ...] = ()
    licence: Licence | None = None
    tokenizer: Tokenizer | None = None
    memory: Memory | None = None
    prompt: Prompt | None = None
    notes: tuple[Note, ...] = ()
    unrecorded: tuple[Line, ...] = ()
    """What nobody has published, in words."""

    @property
    def weights_of(self) -> str:
        """The name of the release whose weights these are: its own, unless it has another's in another form."""
        return self.equals or self.name

    @property
    def hub(self) -> tuple[str, ...]:
        """Every repository of the Hub that holds it, the first one first."""
        return tuple(dict.fromkeys(hub for form in self.forms for hub in form.hub))


def entry_document(release: Release) -> dict[str, Any]:
    """An entry as JSON has it, with every field; `read_entry` gives the same release again."""
    return {"schema": SCHEMA, "ok": True, **as_json(release)}


def as_json(value: Any) -> Any:
    """A value of these classes as JSON has it."""
    if is_dataclass(value):
        return {each.name: as_json(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, tuple):
        return [as_json(part) for part in value]
    return dict(value) if isinstance(value, dict) else value


def is_release_name(text: str) -> bool:
    """Whether a release can have this name."""
    return re.fullmatch(_NAME, text) is not None


# reading one


def read_entry(document: Mapping[str, Any]) -> tuple[Release | None, list[str]]:
    """The release that a JSON document describes, and what is wrong with it; None where anything is.

    Each fault begins with the place of a field, such as ``forms[0].files[2].size``.
    """
    if document.get("schema") != SCHEMA:
        return None, [f"schema: is {_shown(document.get('schema'))}, not {SCHEMA!r}"]
    faults: list[str] = []
    body = {key: value for key, value in document.items() if key != "schema"}
    if body.pop("ok", True) is not True:  # as in every document that a command prints; a file may go without
        faults.append("ok: is not true")
    release: Release = _reader(Release)(body, "", faults)
    if not faults:
        faults += _contradictions(release)
    return (None if faults else release), faults


def _contradictions(release: Release) -> Iterator[str]:
    """What no single field shows to be wrong."""
    cited: set[str] = set()
    for where, keys in _citations(release):
        cited |= set(keys)
        yield from (f"{where}.source: {key!r} is no key of 'sources'" for key in keys if key not in release.sources)
        if not keys:
            yield f"{where}.source: names no source"
    if len(set(release.aliases)) < len(release.aliases):
        yield "aliases: has one of them twice"
    if release.prompt and not release.prompt.source:
        yield "prompt.source: names no source"
    yield from (f"sources.{key}: no fact names it" for key in release.sources if key not in cited)
    if release.recipe is not None and release.recipe not in RECIPES:
        yield f"recipe: is {release.recipe!r}, not one of {', '.join(RECIPES)}"
    if release.recipe is not None and (release.kind != "delta" or not release.bases):
        yield "recipe: is for a delta that names its bases"


def _citations(release: Release) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every place that names its sources, and the keys that it names."""
    yield "the entry", release.source
    for name in ("architecture", "weights", "licence", "tokenizer", "memory"):
        if fact := getattr(release, name):
            yield name, fact.source
    for place, note in enumerate(release.notes):
        yield f"notes[{place}]", note.source
    for place, form in enumerate(release.forms):
        yield f"forms[{place}]", form.source
        for row, file in enumerate(form.files):
            if file.source:  # else the form's
                yield f"forms[{place}].files[{row}]", file.source


# JSON as the values of types

_Reader = Callable[[Any, str, list[str]], Any]
"""Takes a JSON value, the place where it stands, and the faults so far. A value that is not of the type adds a fault;
what is returned for it is then of no use."""
_LARGEST: Final = 1 << 53
"""From here on, readers of JSON disagree about whole numbers."""


@cache
def _reader(kind: Any) -> _Reader:
    """The function that reads JSON as a value of a type: one of those that the classes above have."""
    origin, parts = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _table_reader(kind)
    if origin is Annotated:
        return _text_reader(parts[1])
    if origin is Literal:
        return _choice_reader(parts)
    if origin in (Union, UnionType):  # with None, and nothing else
        return _optional_reader(_reader(parts[0]))
    if origin is tuple:
        return _list_reader(_reader(parts[0]))
    if origin is dict:
        return _map_reader(_reader(parts[0]), _reader(parts[1]))
    return {int: _read_integer, float: _read_number, bool: _read_boolean}[kind]


def _table_reader(kind: Any) -> _Reader:
    hints = get_type_hints(kind, include_extras=True)
    readers = {each.name: _reader(hints[each.name]) for each in fields(kind)}
    needed = [each.name for each in fields(kind) if each.default is MISSING and each.default_factory is MISSING]

    def read(value: Any, where: str, faults: list[str]) -> Any:
        if not isinstance(value, dict):
            faults.append(f"{where}: is {_shown(value)}, not a table")
            return None
        prefix = f"{where}." if where else ""
        before = len(faults)
        faults += [f"{prefix}{name}: is missing" for name in needed if name not in value]
        found = {}
        for name, part in value.items():
            if name in readers:
                found[name] = readers[name](part, prefix + name, faults)
            else:
                faults.append(f"{prefix}{name[:80]}: is no field that an entry has there")
        return kind(**found) if len(faults) == before else None

    return read


def _text_reader(rule: _Rule) -> _Reader:
    pattern = re.compile(rule.pattern)

    def read(value: Any, where: str, faults: list[str]) -> Any:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            faults.append(f"{where}: is {_shown(value)}, not {rule.what}")
        return value

    return read


def _choice_reader(choices: tuple[str, ...]) -> _Reader:
    def read(value: Any, where: str, faults: list[str]) -> Any:
        if value not in choices:
            faults.append(f"{where}: is {_shown(value)}, not one of {', '.join(choices)}")
        return value

    return read


def _optional_reader(reader: _Reader) -> _Reader:
    def read(value: Any, where: str, faults: list[str]) -> Any:
        return None if value is None else reader(value, where, faults)

    return read


def _list_reader(reader: _Reader) -> _Reader:
    def read(value: Any, where: str, faults: list[str]) -> Any:
        if not isinstance(value, list):
            faults.append(f"{where}: is {_shown(value)}, not a list")
            return ()
        return tuple([reader(part, f"{where}[{place}]", faults) for place, part in enumerate(value)])

    return read


def _map_reader(key_reader: _Reader, reader: _Reader) -> _Reader:
    def read(value: Any, where: str, faults: list[str]) -> Any:
        if not isinstance(value, dict):
            faults.append(f"{where}: is {_shown(value)}, not a table")
            return {}
        return {
            key_reader(key, f"a key of {where}", faults): reader(part, f"{where}.{key[:80]}", faults)
            for key, part in value.items()
        }

    return read


def _read_integer(value: Any, where: str, faults: list[str]) -> Any:
    if type(value) is not int or not 0 <= value < _LARGEST:
        faults.append(f"{where}: is {_shown(value)}, not a whole number from 0 on")
    return value


def _read_number(value: Any, where: str, faults: list[str]) -> Any:
    if type(value) not in (int, float) or not 0 <= value < _LARGEST:  # neither NaN nor infinite
        faults.append(f"{where}: is {_shown(value)}, not a number from 0 on")
    return value


def _read_boolean(value: Any, where: str, faults: list[str]) -> Any:
    if type(value) is not bool:
        faults.append(f"{where}: is {_shown(value)}, neither true nor false")
    return value


def _shown(value: Any) -> str:
    """A value in a message, whatever its size."""
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    return repr(value[:60]) if isinstance(value, str) else repr(value)[:60]
