"""The registry shown, and a manifest made into an entry of it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

from bayling_delta.checkpoint import read_table
from bayling_delta.errors import CheckpointError, Problem, UsageError
from bayling_delta.expectations import Expectation, read_manifest
from bayling_delta.manifest import MANIFEST_NAME
from bayling_delta.recipes import RECIPES
from bayling_delta.release_entry import (
    Form,
    RecordedFile,
    Release,
    Weights,
    as_json,
    entry_document,
    is_release_name,
    read_entry,
)
from bayling_delta.releases import Registry
from bayling_delta.sources import is_directory
from bayling_delta.tensors import DTYPES

__all__ = ["entry_from_manifest", "release_document", "releases_document"]

_SMALL: Final = 64 << 10
"""Bytes of a tensor that is worth a record of its own: the norms of the largest LLaMA have 16 KiB."""


def releases_document(registry: Registry) -> dict[str, Any]:
    """Every release in a line, `bayling-delta/releases/1`."""
    return {
        "schema": "bayling-delta/releases/1",
        "ok": True,
        "releases": [
            {
                "name": release.name,
                "title": release.title,
                "kind": release.kind,
                "bases": list(release.bases),
                "recipe": release.recipe,
                "hub": list(release.hub),
                "recorded": _recorded(release),
                "own": release.name in registry.own,
            }
            for release in registry.releases
        ],
    }


def release_document(registry: Registry, release: Release) -> dict[str, Any]:
    """All that is known of one release, `bayling-delta/releases/1`."""
    return {
        "schema": "bayling-delta/releases/1",
        "ok": True,
        "release": entry_document(release),
        "recipe": as_json(RECIPES[release.recipe]) if release.recipe else None,
        "recorded": _recorded(release),
        "own": release.name in registry.own,
    }


def _recorded(release: Release) -> dict[str, int]:
    """Of how many of its weight files a digest is on record, in the form of which most is."""
    counts = [(len(form.recorded_files), len(form.weight_files)) for form in release.forms if form.weight_files]
    files, of = max(counts, key=lambda count: (count[0] / count[1], count[1]), default=(0, 0))
    return {"files": files, "of": of}


# a manifest as an entry


def entry_from_manifest(
    path: Path, registry: Registry, *, name: str | None = None, equals: str | None = None
) -> dict[str, Any]:
    """The entry that records what a manifest, or the one in a directory, says of a model.

    Without ``name``, that of the file is taken, or of the directory where the file is called as manifests are.
    ``equals`` names the release whose weights these are; without it they are a full model of their own.

    Raises:
        CheckpointError: the manifest cannot be used.
        UsageError: the name cannot be used, or is taken; or there is no such release.
    """
    if is_directory(path):
        path = path / MANIFEST_NAME
    expected = read_manifest(path)
    if name is None:
        name = (path.absolute().parent.name if path.name == MANIFEST_NAME else path.stem).lower()
    if not is_release_name(name):
        message = f"{name[:80]!r} is no name for a release: lower-case letters, digits, '.', '_' and '-'"
        raise UsageError(Problem("option", "--name", message))
    if other := registry.find(name):
        message = f"{name!r} is taken ({other.title}), and no entry hides another; choose another name"
        raise UsageError(Problem("option", "--name", message))
    same = registry.get(equals) if equals else None
    document = entry_document(_release(expected, read_table(path), name, same))
    _, faults = read_entry(document)
    if faults:  # what a manifest may have and an entry may not, such as a file's name of 300 characters
        raise CheckpointError(Problem("record", str(path), fault) for fault in faults)
    return document


def _release(expected: Expectation, manifest: dict[str, Any], name: str, same: Release | None) -> Release:
    tensors = expected.tensors or {}
    sizes = {each.name: math.prod(each.shape) * DTYPES[each.dtype] for each in tensors.values()}
    source = ("manifest",)
    weights = Weights(
        dtype=manifest["result"]["dtype"],
        tensors=len(tensors),
        parameters=manifest["result"]["parameters"],
        tensor_bytes=sum(sizes.values()),
        source=source,
        digest=expected.weights_digest,
        small_tensors={each.name: each.sha256 for each in tensors.values() if sizes[each.name] <= _SMALL},
    )
    files = tuple(
        RecordedFile(each, file.size, (file.sha256,) if file.sha256 else ()) for each, file in expected.files.items()
    )
    return Release(
        name=name,
        title=f"{same.title if same else name}, as recorded in a manifest",
        kind=same.kind if same else "full",
        sources={"manifest": f"a manifest of 'bayling-delta {expected.operation}', made {manifest.get('created')}"},
        source=source,
        bases=same.bases if same else (),
        recipe=same.recipe if same else None,
        result=same.result if same else None,
        equals=same.weights_of if same else None,
        weights=weights,
        forms=(Form("as recorded", _container(files), source, files=files),),
    )


def _container(files: Sequence[RecordedFile]) -> Literal["safetensors", "torch", "meta", "other"]:
    if any(file.name.endswith(".safetensors") for file in files):
        return "safetensors"
    if any(file.name.endswith(".bin") for file in files):
        return "torch"
    return "meta" if any(file.name.endswith(".pth") for file in files) else "other"
