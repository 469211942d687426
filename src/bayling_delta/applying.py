"""Rebuild a model: open base and delta, plan their sum, run it, write down what came out."""

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from bayling_delta import companions, engine
from bayling_delta.adding import Additions
from bayling_delta.arithmetic import make_addition
from bayling_delta.checkpoint import Checkpoint, directory_of, open_checkpoint
from bayling_delta.downloads import origin
from bayling_delta.engine import DEFAULT_THREADS, Digests, Outcome, Progress
from bayling_delta.errors import BaylingDeltaError, CheckpointError, Problem, refuse
from bayling_delta.expectations import download_problems, read_manifest
from bayling_delta.files import copy_file, is_inside, output_problems, staged_directory, write_file
from bayling_delta.hub import local_copies
from bayling_delta.manifest import (
    MANIFEST_NAME,
    SUMS_NAME,
    TensorDigest,
    file_entry,
    manifest_head,
    parse_digest,
    result_section,
    small_file_entry,
    sums_text,
    to_json,
    weights_digest,
)
from bayling_delta.model_card import model_card
from bayling_delta.plan import DEFAULT_MEMORY_LIMIT, DEFAULT_SHARD_SIZE, Plan, make_plan
from bayling_delta.reads import ReadList
from bayling_delta.recipes import PLAIN, RECIPES, Recipe
from bayling_delta.sinks import DirectorySink
from bayling_delta.sources import exists, open_source
from bayling_delta.suspicions import suspect
from bayling_delta.tensors import DTYPES

__all__ = ["additions_on", "apply", "input_problems", "plan_apply", "plan_document", "recipe_of", "result_digests"]

_SMALL_FILES_BYTES: Final = 16 << 20
"""What configuration, tokenizer, index and manifest may need on the disk, generously."""


def plan_apply(
    base: Path,
    delta: Path,
    out: Path,
    *,
    recipe: str | None = None,
    dtype: str | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
    allow: Collection[str] = (),
) -> Plan:
    """Open both checkpoints and plan their sum into the new directory ``out``; write nothing.

    ``recipe`` is the name of one of `RECIPES`, None to take that of the delta's own manifest, or else ``plain``.
    ``dtype`` is F16, BF16 or F32 to cast the result, None to keep the delta's; sizes are in bytes; ``allow``
    names the kinds of problem to overrule. Of an id of the Hub, weights that are not in its cache are a problem.

    Raises:
        BaylingDeltaError: with everything that can be seen to be wrong.
    """
    base, delta = local_copies([base, delta], fetch=False)
    problems: list[Problem] = []
    chosen = PLAIN
    with _collected(problems):
        chosen = recipe_of(recipe, delta)
    with _collected(problems):
        base_checkpoint = open_checkpoint(base)
    with _collected(problems):
        delta_checkpoint = open_checkpoint(delta)
    readable = not problems
    needed = _SMALL_FILES_BYTES
    if readable:
        needed += sum(ref.elements * DTYPES[dtype or ref.dtype] for ref in delta_checkpoint.weights.values())
    problems += output_problems(out, needed)
    problems += [
        Problem("output_place", str(out), f"lies inside the {side}; choose a place outside the inputs")
        for side, path in (("base", base), ("delta", delta))
        if is_inside(out, directory_of(path))
    ]
    if not readable:
        refuse(problems, allow)
    suspicions, notes = suspect(base_checkpoint, delta_checkpoint)
    problems += suspicions
    with _collected(problems):
        companions.collect(delta_checkpoint, dtype or "F16")
    plan = make_plan(
        base_checkpoint,
        delta_checkpoint,
        recipe=chosen,
        dtype=dtype,
        max_shard_size=max_shard_size,
        memory_limit=memory_limit,
        also=problems,
        allowed=allow,
    )
    return replace(plan, notes=(*plan.notes, *notes))


def recipe_of(name: str | None, made: Path) -> Recipe:
    """The recipe named, else that of the manifest beside ``made``, a delta or a result; else ``plain``.

    Raises:
        CheckpointError: the manifest cannot be read, or names a recipe that is not known here.
    """
    if name is not None:
        return RECIPES[name]
    manifest = directory_of(made) / MANIFEST_NAME
    if not exists(manifest):
        return PLAIN
    written = read_manifest(manifest).recipe
    if written is not None and written not in RECIPES:
        message = f"names the recipe {written[:80]!r}, and this version knows {', '.join(RECIPES)}"
        raise CheckpointError(Problem("record", str(manifest), message))
    return RECIPES[written] if written else PLAIN


@contextmanager
def _collected(problems: list[Problem]) -> Iterator[None]:
    """Add to ``problems`` what the body refuses, and go on."""
    try:
        yield
    except BaylingDeltaError as error:
        problems += error.problems


def apply(
    base: Path,
    delta: Path,
    out: Path,
    *,
    recipe: str | None = None,
    dtype: str | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
    threads: int = DEFAULT_THREADS,
    direct: bool = True,
    device: str = "cpu",
    expect: str | None = None,
    allow: Collection[str] = (),
    tell: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write ``base + delta`` as a HuggingFace directory, and return its manifest.

    ``base`` and ``delta`` may be ids of the Hub; what is needed of them is fetched into its cache. The options are
    those of `plan_apply`. ``expect`` is the weights digest that the result must have. What comes out depends on none
    of the others: ``threads``, ``direct`` (past the page cache, where that is faster), ``device`` (``cpu``, ``cuda``
    or ``cuda:N``). ``out`` appears when it is complete and synced; if anything fails, it does not appear. ``tell``
    is given what a user should know of the inputs, a sentence at a time.

    Raises:
        BaylingDeltaError: what `plan_apply` finds; an input that fails or changes while it is read; a result
            with non-finite elements or another digest than expected; an output that cannot be written.
        ValueError: ``expect`` is not a SHA-256.
    """
    wanted = parse_digest(expect) if expect is not None else None
    base, delta = local_copies([base, delta], also=output_problems(out, 0), tell=tell)
    plan = plan_apply(
        base,
        delta,
        out,
        recipe=recipe,
        dtype=dtype,
        max_shard_size=max_shard_size,
        memory_limit=memory_limit,
        allow=allow,
    )
    for note in plan.notes:
        if tell is not None:
            tell(note)
    additions = additions_on(device)
    head = manifest_head(
        "apply", plan.recipe.name, {"dtype": dtype, "max_shard_size": max_shard_size, "allow": sorted(set(allow))}
    )
    with staged_directory(out) as directory:
        with closing(DirectorySink(directory, plan.output_bytes, direct=direct)) as sink:
            outcome = engine.run(plan, sink, threads=threads, direct=direct, additions=additions, progress=progress)
        refuse(_result_problems(plan, outcome, out, wanted), allow)
        return _write_down(plan, outcome, directory, wanted, head)


def additions_on(device: str) -> Additions:
    """What adds on a device; torch is imported for a GPU alone.

    Raises:
        UsageError: there is no such device here.
    """
    if device == "cpu":
        return make_addition
    from bayling_delta.gpu import make_additions

    return make_additions(device)


def _result_problems(plan: Plan, outcome: Outcome, out: Path, wanted: str | None) -> list[Problem]:
    """What only the finished sum can show."""
    problems = [*outcome.damage, *input_problems(plan, outcome)]
    problems += [
        Problem("non_finite", name, f"{count:,} elements of the sum are infinite or NaN; is this the right base?")
        for name, count in outcome.non_finite.items()
    ]
    digest = weights_digest(result_digests(plan, outcome))
    if wanted not in (None, digest):
        advice = "nothing was kept: are base, delta and --dtype the right ones?"
        problems.append(
            Problem("digest", str(out), f"the result's weights digest is {digest}, expected was {wanted}; {advice}")
        )
    return problems


def input_problems(plan: Plan, outcome: Outcome) -> list[Problem]:
    """The weight files of base and delta that are not what the Hub had when they were fetched."""
    problems: list[Problem] = []
    for checkpoint, found in ((plan.base, outcome.base.files), (plan.delta, outcome.delta.files)):
        sizes = {file.path.name: file.size for file in checkpoint.files}
        files = {name: (sizes[name], sha256) for name, sha256 in found.items()}
        problems += download_problems(checkpoint.directory, files)
    return problems


def result_digests(plan: Plan, outcome: Outcome) -> list[TensorDigest]:
    """The digest of each tensor of the sum."""
    return [
        TensorDigest(tensor.name, tensor.dtype, tensor.shape, outcome.result.tensors[tensor.name])
        for tensor in plan.tensors
    ]


def _write_down(
    plan: Plan, outcome: Outcome, directory: Path, wanted: str | None, head: dict[str, Any]
) -> dict[str, Any]:
    """Write everything but the weights beside them, SHA256SUMS last, and return the manifest."""
    placed = {tensor.name: file.name for file in plan.files for tensor in file.tensors}
    result = result_section(result_digests(plan, outcome), placed)
    beside = companions.collect(plan.delta, result["dtype"])
    manifest: dict[str, Any] = {
        **head,
        "inputs": {
            "base": _input_section(plan.base, outcome.base),
            "delta": _input_section(plan.delta, outcome.delta),
        },
        "result": result,
        "changes": [{"file": file.name, "change": change} for file in beside for change in file.changes],
        "verification": [
            {
                "what": "the result's weights digest",
                "against": wanted,
                "outcome": "match" if wanted else "no record",
                "source": "--expect" if wanted else None,
            }
        ],
    }

    def write(name: str, data: bytes) -> dict[str, Any]:
        write_file(directory / name, data)
        return small_file_entry(name, data)

    files = result["files"]
    files += [file_entry(file.name, file.size, outcome.result.files[file.name]) for file in plan.files]
    for companion in beside:
        if companion.data is not None:
            files.append(write(companion.name, companion.data))
            continue
        with open_source(companion.path) as source:
            size, sha256 = copy_file(source, directory / companion.name)
        refuse(download_problems(plan.delta.directory, {companion.name: (size, sha256)}))
        files.append(file_entry(companion.name, size, sha256))
    if len(plan.files) > 1:
        files.append(write("model.safetensors.index.json", _index(plan, placed)))
    files.append(write("README.md", model_card(manifest).encode()))
    listed = [*files, write(MANIFEST_NAME, to_json(manifest).encode())]
    write(SUMS_NAME, sums_text({entry["name"]: entry["sha256"] for entry in listed}).encode())
    return manifest


def _input_section(checkpoint: Checkpoint, digests: Digests) -> dict[str, Any]:
    """What the manifest says of an input: digested by file, or by tensor."""
    whole: str | None = None
    if digests.tensors:
        weights = checkpoint.weights
        whole = weights_digest(
            TensorDigest(name, weights[name].dtype, weights[name].shape, digest)
            for name, digest in digests.tensors.items()
        )
    return {
        "name": str(found) if (found := origin(checkpoint.directory)) else None,
        "container": checkpoint.container,
        "weights_digest": whole,
        "files": [
            file_entry(file.path.name, file.size, digests.files.get(file.path.name)) for file in checkpoint.files
        ],
    }


def _index(plan: Plan, placed: dict[str, str]) -> bytes:
    """The shard index, as transformers writes it."""
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
