"""The files beside the weights: which of the delta's go into the result, and what is changed in them."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from bayling_delta.checkpoint import Checkpoint, read_table, what_instead
from bayling_delta.downloads import mended
from bayling_delta.errors import CheckpointError, Problem, refuse
from bayling_delta.manifest import to_json
from bayling_delta.sources import exists, list_directory, open_source, read_bytes
from bayling_delta.tensors import TORCH_NAMES

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
_METAS: Final = ("params.json", "checklist.chk")
"""The same, beside weights in Meta's own format."""


@dataclass(frozen=True, slots=True)
class Companion:
    """One file of the result that is not weights."""

    name: str
    path: Path
    """The delta's file."""
    data: bytes | None = None
    """What is written instead of that file's bytes; None where it is taken over as it is."""
    changes: tuple[str, ...] = ()
    """What differs from the delta's file, in words."""


def collect(delta: Checkpoint, dtype: str) -> list[Companion]:
    """The delta's configuration and tokenizer; config.json fitted to a result of ``dtype``.

    Source: BayLing, apply_delta.py, which saves the delta's configuration and tokenizer with the sum.

    Raises:
        CheckpointError: with everything that cannot be read, or is not what its name says.
    """
    companions = [Companion(name, delta.directory / name) for name in COPIED if exists(delta.directory / name)]
    problems: list[Problem] = []
    for companion in companions:
        try:
            _check(companion.path)
        except CheckpointError as error:
            problems += error.problems
    refuse(problems)
    return [
        _fit_config(companion, delta.config, dtype)
        if companion.name == delta.config_name and delta.config
        else companion
        for companion in companions
    ]


def _check(path: Path) -> None:
    """Refuse what would keep a loader from reading the result: a download that failed, text that is not JSON."""
    if path.suffix == ".json":
        read_table(path)
        return
    with open_source(path) as source:
        found = what_instead(read_bytes(source, 0, 512), source.size)
    if found:
        problem = mended(Problem(found[0], str(path), found[1].replace("weights", "this file")), path)
        raise CheckpointError(replace(problem, kind="not_weights"))


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


def _fit_config(companion: Companion, config: dict[str, Any], dtype: str) -> Companion:
    """Change what would be wrong of the result: its dtype, and a path of the publisher's machine."""
    fitted = dict(config)
    changes: list[str] = []
    for key in ("dtype", "torch_dtype"):  # transformers 5 writes the first, older ones the second
        if key in fitted and fitted[key] != TORCH_NAMES[dtype]:
            changes.append(f"{key}: {json.dumps(fitted[key])} became {json.dumps(TORCH_NAMES[dtype])}")
            fitted[key] = TORCH_NAMES[dtype]
    origin = fitted.get("_name_or_path")
    if isinstance(origin, str) and re.match(r"[/\\~.]|[A-Za-z]:", origin):
        del fitted["_name_or_path"]
        changes.append("_name_or_path: left out, it was a path of the publisher's machine")
    if not changes:
        return companion
    return replace(companion, data=to_json(fitted).encode(), changes=tuple(changes))
