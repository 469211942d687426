"""What is this? A checkpoint described from its headers, its small tensors and rows of some large ones."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bayling_delta.checkpoint import Checkpoint, is_rotary_buffer, survey
from bayling_delta.errors import CheckpointError, Problem
from bayling_delta.hub import local_copies
from bayling_delta.identifying import identify
from bayling_delta.looking import Look, look_at
from bayling_delta.releases import Registry, load_releases
from bayling_delta.tensors import TensorRef, natural_key

__all__ = ["inspect_checkpoint"]


def inspect_checkpoint(path: Path, *, registry: Sequence[Path] = ()) -> dict[str, Any]:
    """Describe a directory, a weights file or a shard index: the document ``bayling-delta/inspect/1``.

    What can be read is described, and what is wrong with the rest is listed as odd. At most 64 MiB of weights
    are read, whatever the size of the model. Of an id of the Hub, what is in its cache is described. ``registry``
    names files with releases of one's own.

    Raises:
        CheckpointError: no tensor can be described; the message says what the path is instead.
    """
    known = load_releases(registry)
    (path,) = local_copies([path], fetch=False)
    checkpoint, problems = survey(path)
    if checkpoint is None:
        raise CheckpointError(problems)
    return _describe(checkpoint, problems, known)


def _describe(checkpoint: Checkpoint, problems: list[Problem], registry: Registry) -> dict[str, Any]:
    look = look_at(checkpoint, problems)
    tensors = checkpoint.tensors
    return {
        "schema": "bayling-delta/inspect/1",
        "ok": True,
        "looks_like": look.looks_like,
        "reasons": list(look.reasons),
        "signs": {"norms": look.norms, "rows": look.rows},
        "release": _release(checkpoint, look, registry),
        "container": checkpoint.container,
        "files": _files(checkpoint),
        "tensors": len(tensors),
        "parameters": sum(ref.elements for ref in checkpoint.weights.values()),
        "dtypes": _dtypes(tensors),
        "architecture": look.architecture,
        "tied_embeddings": checkpoint.tied,
        "rotary_buffers": sum(map(is_rotary_buffer, tensors)),
        "kinds": _kinds(tensors, look.kinds),
        "tokenizer": look.tokenizer,
        "sampled_bytes": look.sampled_bytes,
        "odd": look.odd,
    }


def _release(checkpoint: Checkpoint, look: Look, registry: Registry) -> dict[str, Any]:
    """What it is recognised as, and what has files of the same sizes, which is a hint and no more."""
    identity = identify(checkpoint, look, registry)
    records = [registry.of_size(file.size) for file in checkpoint.files]
    titles = [{record.release.title for record in found} for found in records]
    return {
        "name": identity.release.name if identity else None,
        "title": identity.release.title if identity else None,
        "by": identity.by if identity else None,
        "sizes_of": sorted(set.intersection(*titles)) if titles else [],
    }


# what the headers say


def _files(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    tensors = Counter(path for ref in checkpoint.tensors.values() for path in {view.file for view in ref.views})
    return [{"name": file.path.name, "size": file.size, "tensors": tensors[file.path]} for file in checkpoint.files]


def _dtypes(tensors: Mapping[str, TensorRef]) -> list[dict[str, Any]]:
    """How much there is of each dtype, that of most bytes first."""
    table: dict[str, dict[str, Any]] = {}
    for ref in tensors.values():
        entry = table.setdefault(ref.dtype, {"dtype": ref.dtype, "tensors": 0, "parameters": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["parameters"] += ref.elements
        entry["bytes"] += ref.nbytes
    return sorted(table.values(), key=lambda entry: (-entry["bytes"], entry["dtype"]))


def _kinds(tensors: Mapping[str, TensorRef], kinds: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Tensors that differ in nothing but the numbers in their names, counted."""
    # by their text: who writes a file can have the hashes of numbers collide, and not those of text
    counts = Counter(
        (kind, tensors[name].dtype, str(tensors[name].shape)) for kind, names in kinds.items() for name in names
    )
    shapes = {str(ref.shape): ref.shape for ref in tensors.values()}
    found = [(name, dtype, shapes[shape], count) for (name, dtype, shape), count in counts.items()]
    return [
        {"name": name, "count": count, "dtype": dtype, "shape": list(shape), "parameters": count * math.prod(shape)}
        for name, dtype, shape, count in sorted(found, key=lambda row: (natural_key(row[0]), row))
    ]
