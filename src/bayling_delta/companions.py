"""The files beside the weights: which of the delta's go into the result, and what is changed in them."""

import json
import re
from dataclasses import dataclass
from typing import Any, Final

from bayling_delta.checkpoint import JSON_CAP, Checkpoint
from bayling_delta.sources import file_size, list_directory, read_file

__all__ = ["COPIED", "Companion", "collect", "foreign_files"]

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
    "chat_template.jinja",
)
"""The files beside a model's weights that are understood, and that a result takes over from its delta."""
_KNOWN: Final = re.compile(
    r"README\.md|LICENSE.*|\.gitattributes|\.cache|.*\.index\.json|bayling-delta\.json|SHA256SUMS"
    r"|pytorch_model.*\.bin|model.*\.safetensors"
)
"""Understood, and not copied: the result has its own, or needs none."""
_TORCH_NAMES: Final = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


@dataclass(frozen=True, slots=True)
class Companion:
    """One file of the result that is not weights."""

    name: str
    data: bytes
    changes: tuple[str, ...] = ()
    """What differs from the delta's file, in words; empty where it is that file, byte for byte."""


def collect(delta: Checkpoint, dtype: str) -> list[Companion]:
    """The delta's configuration and tokenizer, read into memory; config.json fitted to a result of ``dtype``.

    Source: BayLing, apply_delta.py, which saves the delta's configuration and tokenizer with the sum.

    Raises:
        CheckpointError: a file cannot be read.
    """
    found = [name for name in COPIED if file_size(delta.directory / name) is not None]
    companions: list[Companion] = []
    for name in found:
        data = read_file(delta.directory / name, JSON_CAP)
        if name == "config.json" and delta.config is not None:
            companions.append(_fit_config(delta.config, data, dtype))
        else:
            companions.append(Companion(name, data))
    return companions


def foreign_files(checkpoint: Checkpoint) -> list[str]:
    """Names beside the weights that are not understood here, and therefore not copied."""
    weights = {file.path.name for file in checkpoint.files}
    return [
        name
        for name in list_directory(checkpoint.directory)
        if name not in COPIED and name not in weights and not _KNOWN.fullmatch(name)
    ]


def _fit_config(config: dict[str, Any], data: bytes, dtype: str) -> Companion:
    """Change what would be wrong of the result: its dtype, and a path of the publisher's machine."""
    fitted = dict(config)
    changes: list[str] = []
    for key in ("dtype", "torch_dtype"):  # transformers 5 writes the first, older ones the second
        if key in fitted and fitted[key] != _TORCH_NAMES[dtype]:
            changes.append(f"{key}: {json.dumps(fitted[key])} became {json.dumps(_TORCH_NAMES[dtype])}")
            fitted[key] = _TORCH_NAMES[dtype]
    origin = fitted.get("_name_or_path")
    if isinstance(origin, str) and re.match(r"[/\\~.]|[A-Za-z]:", origin):
        del fitted["_name_or_path"]
        changes.append("_name_or_path: left out, it was a path of the publisher's machine")
    if not changes:
        return Companion("config.json", data)
    return Companion("config.json", (json.dumps(fitted, indent=2, ensure_ascii=False) + "\n").encode(), tuple(changes))
