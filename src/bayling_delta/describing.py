"""What is written down: a result's manifest, the small files beside its weights, and the document of a plan."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bayling_delta import companions
from bayling_delta.checkpoint import Checkpoint
from bayling_delta.downloads import origin
from bayling_delta.engine import Digests, Outcome
from bayling_delta.expectations import Expectation
from bayling_delta.identifying import FileRecords
from bayling_delta.manifest import RESULT, TensorDigest, file_entry, result_section, weights_digest
from bayling_delta.model_card import model_card
from bayling_delta.plan import Plan
from bayling_delta.preparing import of_weights
from bayling_delta.reads import ReadList
from bayling_delta.release_entry import Release
from bayling_delta.releases import Registry

__all__ = ["plan_document", "result_digests", "small_files", "written_manifest"]


def result_digests(plan: Plan, outcome: Outcome) -> list[TensorDigest]:
    """The digest of each tensor of the sum."""
    return [
        TensorDigest(tensor.name, tensor.dtype, tensor.shape, outcome.result.tensors[tensor.name])
        for tensor in plan.tensors
    ]


def written_manifest(
    plan: Plan,
    outcome: Outcome,
    records: Mapping[str, FileRecords],
    registry: Registry,
    wanted: str | None,
    head: Mapping[str, Any],
) -> tuple[dict[str, Any], list[companions.Companion]]:
    """The manifest of a result, with its weight files alone, and what goes beside them.

    ``records`` are what is known of the inputs by their digests, by role; ``wanted`` is the weights digest that the
    user expects.
    """
    placed = {tensor.name: file.name for file in plan.files for tensor in file.tensors}
    result = result_section(result_digests(plan, outcome), placed)
    result["files"] += [file_entry(file.name, file.size, outcome.result.files[file.name]) for file in plan.files]
    beside = companions.collect(plan.delta, result["dtype"], records["delta"].release)
    manifest = {
        **head,
        "inputs": {
            "base": _input_section(plan.base, outcome.base, records["base"]),
            "delta": _input_section(plan.delta, outcome.delta, records["delta"]),
        },
        "result": result,
        "changes": [{"file": file.name, "change": change} for file in beside for change in file.changes],
        "verification": [
            *_result_verification(result["weights_digest"], wanted, registry),
            *_input_verification("base", plan.base, plan.base_records, records["base"]),
            *_input_verification("delta", plan.delta, plan.delta_records, records["delta"]),
        ],
    }
    return manifest, beside


def small_files(
    plan: Plan, manifest: Mapping[str, Any], beside: Iterable[companions.Companion], release: Release | None
) -> Iterator[tuple[str, Path | bytes]]:
    """What lies beside a result's weights, but for the manifest and SHA256SUMS: names, and a file to copy or bytes."""
    for companion in beside:
        yield companion.name, companion.content
    if len(plan.files) > 1:
        yield "model.safetensors.index.json", _index(plan)
    yield "README.md", model_card(manifest, release).encode("utf-8", "backslashreplace")


def _result_verification(digest: str, wanted: str | None, registry: Registry) -> list[dict[str, Any]]:
    """What the result's weights digest was held against: ``--expect``, and the registry."""
    found: list[tuple[str | None, str | None]] = [(wanted, "--expect")] if wanted else []
    for release in registry.with_weights(digest):
        sources = release.weights.source if release.weights else ()
        found.append((release.title, "; ".join(release.sources[key] for key in sources)))
    return [
        {
            "what": RESULT,
            "against": against,
            "outcome": "match" if against else "no record",
            "source": source,
        }
        for against, source in found or [(None, None)]
    ]


def _input_verification(
    role: str, side: Checkpoint, records: Sequence[Expectation], looked_up: FileRecords
) -> Iterator[dict[str, Any]]:
    """What an input's weight files were held against: lists beside them, the Hub's record, the registry."""
    for expected in records:
        files = of_weights(side, expected).files.values()
        count = sum(1 for file in files if file.sha256 or file.md5)
        if count and not expected.downloaded:
            name = Path(expected.source).name
            what = f"{count} weight {'file' if count == 1 else 'files'} of the {role}"
            yield {"what": what, "against": name, "outcome": "match", "source": f"{name} beside the {role}"}
    yield from looked_up.verification


def _input_section(checkpoint: Checkpoint, digests: Digests, records: FileRecords) -> dict[str, Any]:
    """What the manifest says of an input: digested by file, or by tensor."""
    recognised = records.identity.release.name if records.identity else None
    whole: str | None = None
    if digests.tensors:
        weights = checkpoint.weights
        whole = weights_digest(
            TensorDigest(name, weights[name].dtype, weights[name].shape, digest)
            for name, digest in digests.tensors.items()
        )
    return {
        "name": str(found) if (found := origin(checkpoint.directory)) else recognised,
        "container": checkpoint.container,
        "weights_digest": whole,
        "files": [
            file_entry(file.path.name, file.size, digests.files.get(file.path.name)) for file in checkpoint.files
        ],
    }


def _index(plan: Plan) -> bytes:
    """The shard index, as transformers writes it."""
    placed = {tensor.name: file.name for file in plan.files for tensor in file.tensors}
    total = sum(tensor.nbytes for tensor in plan.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def plan_document(plan: Plan) -> dict[str, Any]:
    """The plan as the document ``bayling-delta/plan/1``: what would be read, written and digested, and the memory."""
    return {
        "schema": "bayling-delta/plan/1",
        "ok": True,
        "operation": "apply",
        "recipe": plan.recipe.name,
        "inputs": {
            "base": _reads_section(plan.base, plan.base_reads),
            "delta": _reads_section(plan.delta, plan.delta_reads),
        },
        "result": {
            "parameters": sum(tensor.delta.elements for tensor in plan.tensors),
            "tensors": sum(1 for _ in plan.tensors),
            "size": plan.output_bytes,
            "files": [{"name": file.name, "size": file.size, "tensors": len(file.tensors)} for file in plan.files],
        },
        "memory": {
            "buffers": plan.budget.total_bytes,
            "chunk": plan.budget.chunk_bytes,
            "windows": plan.budget.windows,
            "tile": plan.budget.tile_bytes,
        },
        "digested": {
            "base": _digested(plan.base_reads),
            "delta": _digested(plan.delta_reads),
            "result": "file and tensor",
        },
        "notes": list(plan.notes),
    }


def _digested(reads: ReadList) -> str:
    return " and ".join(what for what, taken in (("file", reads.files), ("tensor", reads.tensors)) if taken)


def _reads_section(checkpoint: Checkpoint, reads: ReadList) -> dict[str, Any]:
    return {
        "container": checkpoint.container,
        "files": [{"name": file.path.name, "size": file.size} for file in checkpoint.files],
        "tensors": len(checkpoint.weights),
        "reads": reads.nbytes,
    }
