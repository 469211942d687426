"""The files of a tokenizer: their tables, and how many tokens they know. No tokenizer is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bayling_delta.checkpoint import EMBEDDING, Checkpoint, read_table
from bayling_delta.errors import CheckpointError, Problem
from bayling_delta.sources import exists, file_size, read_file

__all__ = ["TOKENIZER_TABLES", "TokenizerFiles", "read_tokenizer", "too_many_tokens"]

_LARGE_TABLE: Final = "tokenizer.json"
"""Megabytes of text, and many times that when it is parsed."""
_SMALL_TABLES: Final = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_TABLES: Final = (_LARGE_TABLE, *_SMALL_TABLES)
"""The files that `read_tokenizer` reads as JSON."""
_MODEL: Final = "tokenizer.model"
_FILES: Final = (_MODEL, *TOKENIZER_TABLES, "vocab.json", "merges.txt", "chat_template.jinja")
_MOST_PIECES: Final = 1_000_000
"""Four times those of the largest known."""
_PIECES_CAP: Final = 16 << 20
"""Bytes of a tokenizer.model; LLaMA's has half a million."""


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What the files of a tokenizer say."""

    names: tuple[str, ...] = ()
    """Which of a tokenizer's files are there."""
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {name: {} for name in _SMALL_TABLES})
    """The small JSON files by name, empty where absent. The large one is not kept."""
    tokens: int | None = None
    """How many tokens it knows; None where no file says it."""


def read_tokenizer(checkpoint: Checkpoint, problems: list[Problem]) -> TokenizerFiles:
    """Read the tables of a tokenizer, each once, and count its tokens; add what is wrong with a table to ``problems``.

    Raises:
        CheckpointError: the system cannot read tokenizer.model.
    """
    directory = checkpoint.directory
    tables = {name: _read(directory / name, problems) for name in _SMALL_TABLES}
    names = tuple(name for name in _FILES if file_size(directory / name) is not None)
    if checkpoint.container == "meta" and _MODEL not in names and file_size(directory.parent / _MODEL) is not None:
        names += (f"../{_MODEL}",)  # one for all sizes
    return TokenizerFiles(
        names,
        tables,
        _listed(_read(directory / _LARGE_TABLE, problems))
        or _last_added(tables["added_tokens.json"])
        or next((_pieces(directory / name) for name in names if name.endswith(_MODEL)), None),
    )


def too_many_tokens(tokens: int, rows: int) -> str:
    """What to say of a tokenizer that has more tokens than the embedding has rows."""
    return f"knows {tokens:,} tokens, {EMBEDDING} has {rows:,} rows: the last cannot be looked up"


def _read(path: Path, problems: list[Problem]) -> dict[str, Any]:
    """A file's table; empty where there is no file, or where it is not one, which is a problem."""
    if not exists(path):
        return {}
    try:
        return read_table(path)
    except CheckpointError as error:
        problems += error.problems
        return {}


def _listed(tokenizer: Mapping[str, Any]) -> int | None:
    """How many different tokens a tokenizer.json lists."""
    model, extra = tokenizer.get("model"), tokenizer.get("added_tokens")
    pieces = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(pieces, dict | list):
        return None
    # A Unigram model has a list of [piece, score].
    tokens = {str(piece[0]) if isinstance(piece, list) and piece else str(piece) for piece in pieces}
    if isinstance(extra, list):
        tokens.update(str(token.get("content")) for token in extra if isinstance(token, dict))
    return len(tokens)


def _last_added(added: Mapping[str, Any]) -> int | None:
    """How many tokens there are where the last one is that of added_tokens.json with the highest number."""
    numbers = [number for number in added.values() if type(number) is int]
    return max(numbers) + 1 if numbers else None


def _pieces(path: Path) -> int | None:
    """How many pieces a SentencePiece model has; None where there is none, or where it is not one.

    They are field 1 of the protobuf message ModelProto, once for each. Source: sentencepiece_model.proto.
    """
    if (file_size(path) or _PIECES_CAP + 1) > _PIECES_CAP:
        return None
    data = read_file(path, _PIECES_CAP)
    count = position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        if tag & 7 != 2:  # all of its fields are messages, each with its length before it
            return None
        length, position = _varint(data, position)
        count += tag >> 3 == 1
        if count > _MOST_PIECES:
            return None
        position += length
    return count if count and position == len(data) else None


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A protobuf number, seven bits a byte, and where the next one begins; past the end, nonsense."""
    value = 0
    for place, byte in enumerate(data[position : position + 5]):
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, position + place + 1
    return 7, len(data)
