"""Check a model against what is recorded of it, or against the sum of a base and a delta made anew."""

import re
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from bayling_delta import engine
from bayling_delta.adding import Difference
from bayling_delta.applying import additions_on, input_problems
from bayling_delta.checkpoint import Checkpoint, directory_of, loadable_files, open_checkpoint
from bayling_delta.companions import COPIED
from bayling_delta.describing import result_digests
from bayling_delta.downloads import expected_sha256, origin
from bayling_delta.engine import DEFAULT_THREADS, Progress
from bayling_delta.errors import CheckpointError, IntegrityError, Problem, refuse
from bayling_delta.expectations import (
    Expectation,
    ExpectedFile,
    differences,
    listed_files,
    read_manifest,
    sums_problems,
    usable_expectations,
)
from bayling_delta.hub import local_copies
from bayling_delta.identifying import expectation_of
from bayling_delta.manifest import MANIFEST_NAME, SUMS_NAME, parse_digest, weights_digest
from bayling_delta.plan import DEFAULT_MEMORY_LIMIT, Plan, make_plan
from bayling_delta.preparing import recipe_of
from bayling_delta.recording import Found, digest_model
from bayling_delta.releases import Registry, load_releases
from bayling_delta.sources import exists, is_directory, list_directory

__all__ = ["verify"]

_OTHER_WEIGHTS: Final = r"consolidated.*\.(pth|safetensors)|tf_model.*\.h5|flax_model.*\.msgpack"
"""Weights in forms that are not read here, and that no result has."""


def verify(
    model: Path,
    *,
    against: str | None = None,
    base: Path | None = None,
    delta: Path | None = None,
    recipe: str | None = None,
    dtype: str | None = None,
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
    threads: int = DEFAULT_THREADS,
    device: str = "cpu",
    load: bool = False,
    eight_bit: bool = False,
    registry: Sequence[Path] = (),
    tell: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Check a model, and return the document ``bayling-delta/verify/1`` of what was compared and matched.

    Without more, the model is compared with the manifest and SHA256SUMS beside it, and with the Hub's record of it.
    ``against`` is a weights digest, a manifest's file, a directory with one, or a release; ``registry`` names files
    with releases of one's own. ``base`` and ``delta`` together have the sum made anew and compared element by
    element; ``recipe`` is how it was made, and ``dtype`` (F16, BF16 or F32) what the result was cast to, where the
    model's manifest does not say so. ``load`` also loads the model with transformers and generates a few tokens; it
    adds to a comparison and does not replace one. ``device`` is where the sum is made and the model loaded.
    ``model``, ``base`` and ``delta`` may be ids of the Hub; ``tell`` is given what a user should know of a download.

    Raises:
        IntegrityError: with everything in which the model is not what it should be.
        NoRecordError: there is nothing to compare with.
        CheckpointError: a record, base or delta cannot be read.
        MismatchError: base and delta do not belong together.
    """
    given = [path for path in (model, base, delta) if path is not None]
    local = dict(zip(given, local_copies(given, tell=tell), strict=True))
    model, base, delta = local[model], base and local[base], delta and local[delta]
    directory = directory_of(model)
    expectations, problems = _expectations(model, against, registry)
    is_result = _is_result(directory, expectations)
    if not expectations:
        refuse(problems)
    compared: list[dict[str, Any]] = []
    strangers: list[Problem] = []
    digest: str | None = None
    readable = True
    if expectations:
        names = [name for expected in expectations for name in expected.files]
        found = digest_model(
            model,
            names,
            md5=listed_files(expectations, names)[1],
            memory_limit=memory_limit,
            threads=threads,
            progress=progress,
            strict=False,
        )
        problems += against_expectations(found, expectations)
        problems += unlisted_weights(found, expectations)
        strangers = stray_files(found.checkpoint, expectations)
        problems += strangers
        if against is None:
            problems += sums_problems(directory, expectations)
        compared += [_comparison(expected) for expected in expectations]
        readable = found.tensors is not None
        digest = weights_digest(found.tensors.values()) if found.tensors is not None else None
    if base is not None and delta is not None and readable:
        plan = _plan_comparison(model, base, delta, recipe, dtype, memory_limit)
        outcome = engine.run(plan, None, threads=threads, additions=additions_on(device), progress=progress)
        problems += [*outcome.damage, *input_problems(plan, outcome), *against_sum(plan, outcome.differences)]
        compared.append({"what": "every element", "against": "the sum of base and delta", "outcome": "match"})
        digest = weights_digest(result_digests(plan, outcome))
    if not expectations and not compared:
        open_checkpoint(model)
        message = "there is no manifest and no SHA256SUMS in it; give a record with --against, or --base and --delta"
        problems.append(Problem("no_record", str(model), message))
    _refuse(problems, model if is_result and not strangers and origin(directory) is None else None)
    sums = directory / SUMS_NAME
    if tell and against is None and is_result and not exists(sums):
        tell(f"{sums}: is not here, and belongs to what 'apply' makes; 'repair' writes it anew")
    loaded: dict[str, Any] | None = None
    if load:
        from bayling_delta.loading import load_and_generate

        checkpoint = open_checkpoint(model)
        loaded = load_and_generate(checkpoint.directory, checkpoint.weights, device=device, eight_bit=eight_bit)
    return {
        "schema": "bayling-delta/verify/1",
        "ok": True,
        "weights_digest": digest,
        "compared": compared,
        "loaded": loaded,
    }


def _refuse(problems: Sequence[Problem], mendable: Path | None) -> None:
    """Raise the problems, with the way to mend the model where there is one."""
    try:
        refuse(problems)
    except IntegrityError as error:
        if mendable:
            words = ["bayling-delta", "repair", str(mendable), "--base", "BASE", "--delta", "DELTA"]
            error.hint = f"what is damaged can be made anew: {shlex.join(words)}"
        raise


def _is_result(directory: Path, expectations: Sequence[Expectation]) -> bool:
    """Whether the manifest beside a model says that `apply` made it."""
    own = str(directory / MANIFEST_NAME)
    return any(expected.source == own and expected.operation == "apply" for expected in expectations)


def _expectations(
    model: Path, against: str | None, registry: Sequence[Path]
) -> tuple[list[Expectation], list[Problem]]:
    """What the model is to be compared with: what ``against`` names, or what lies beside its weights.

    Also what is wrong with records beside it that cannot be used.
    """
    if against is None:
        return usable_expectations(directory_of(model))
    return [_named_expectation(model, against, registry)], []


def _named_expectation(model: Path, against: str, registry: Sequence[Path]) -> Expectation:
    with suppress(ValueError):
        return Expectation("--against", parse_digest(against))
    path = Path(against)
    manifest = path / MANIFEST_NAME if is_directory(path) else path
    known = load_releases(registry)
    release = known.find(against)
    if release is not None and release.name == against.lower():
        # As a release, even where a directory has its name: that may be the model's own, which proves nothing.
        return expectation_of(release, open_checkpoint(model))
    if exists(manifest):
        return replace(read_manifest(manifest), files={})  # another's files may be cut otherwise
    if release is None:
        raise CheckpointError(Problem("not_found", against[:80], _no_record_named(against, path, known)))
    return expectation_of(release, open_checkpoint(model))


def _no_record_named(against: str, path: Path, known: Registry) -> str:
    """Why there is nothing to compare with, by the likeliest of what was meant."""
    if is_directory(path):
        return f"has no {MANIFEST_NAME}; 'bayling-delta record {against[:80]}' makes one of a model"
    digits = against.lower().removeprefix("sha256:")
    if len(digits) > 8 and re.fullmatch("[0-9a-f]+", digits):
        return f"has {len(digits)} hexadecimal digits; a weights digest has 64"
    if path.suffix == ".json" or len(path.parts) > 1:
        return "is no file or directory here: is it spelled right?"
    alike = known.suggestions(against)
    advice = f"; did you mean the release {' or '.join(alike)}?" if alike else ""
    return f"is neither a weights digest, nor a manifest's file, nor a directory with one, nor a release{advice}"


def _comparison(expected: Expectation) -> dict[str, Any]:
    parts = [f"{len(expected.files)} files"] if expected.files else []
    if expected.tensors is not None:
        parts.append(f"{len(expected.tensors)} tensors")
    if expected.weights_digest is not None:
        parts.append("the weights digest")
    return {"what": ", ".join(parts), "against": expected.source, "outcome": "match"}


def _plan_comparison(
    model: Path, base: Path, delta: Path, recipe: str | None, dtype: str | None, memory_limit: int
) -> Plan:
    """The plan of the sum that a model claims to be."""
    problems: list[Problem] = []
    opened: list[Checkpoint] = []
    for path in (base, delta, model):
        try:
            opened.append(open_checkpoint(path))
        except (CheckpointError, IntegrityError) as error:
            problems += error.problems
    refuse(problems)
    manifest = directory_of(model) / MANIFEST_NAME
    if dtype is None and exists(manifest):
        dtype = read_manifest(manifest).dtype
    chosen = recipe_of(recipe, model)
    return make_plan(
        opened[0],
        opened[1],
        recipe=chosen,
        dtype=dtype,
        memory_limit=memory_limit,
        model=opened[2],
        digest_files={file.path for side in opened[:2] for file in side.files if expected_sha256(file.path)},
    )


def against_expectations(found: Found, expectations: Sequence[Expectation]) -> list[Problem]:
    """Everything in which a model is not what it is expected to be, and what a loader would take besides."""
    problems = list(found.problems)
    told: dict[str, ExpectedFile] = {}
    for expected in expectations:
        # What two lists say of a file alike is held against it once.
        files = {name: file for name, file in expected.files.items() if not _is_told(told.get(name), file)}
        told |= files
        model = found.checkpoint.directory
        problems += differences(replace(expected, files=files), model, found.tensors, found.places, found.files)
    return problems


def _is_told(before: ExpectedFile | None, file: ExpectedFile) -> bool:
    alike = before is not None and (before.sha256, before.md5) == (file.sha256, file.md5)
    return alike and before is not None and file.size in (None, before.size)


def unlisted_weights(found: Found, expectations: Sequence[Expectation]) -> list[Problem]:
    """Weight files that no record vouches for, where there is nothing but a list of files."""
    if any(expected.weights_digest is not None for expected in expectations):
        return []
    listed = {name for expected in expectations for name in expected.files}
    names = [file.path.name for file in found.checkpoint.files]
    unlisted = [name for name in names if name not in listed]
    if names and len(unlisted) == len(names):
        message = f"{expectations[0].source} lists none of its weight files; give a record of them with --against"
        return [Problem("no_record", str(found.model), message)]
    return [
        Problem("model", str(found.checkpoint.directory / name), f"is not in {expectations[0].source}")
        for name in unlisted
    ]


def stray_files(checkpoint: Checkpoint, expectations: Sequence[Expectation]) -> list[Problem]:
    """Files in a model's directory that a loader would read, and that neither it nor a list of its files knows."""
    known = {file.path.name for file in checkpoint.files}
    known.update(name for expected in expectations for name in expected.files)
    if not checkpoint.files and not any(expected.files for expected in expectations):
        return []  # the weights could not be opened, and nobody says which files they are
    if not is_directory(checkpoint.directory):
        return []
    names = [name for name in loadable_files(checkpoint.directory) if not name.endswith(".index.json")]
    if any(expected.source == str(checkpoint.directory / MANIFEST_NAME) for expected in expectations):
        # A manifest lists every file that a loader reads; a list of digests may be of the weights alone.
        names += [name for name in COPIED if exists(checkpoint.directory / name)]
    if _is_result(checkpoint.directory, expectations):
        names += [name for name in list_directory(checkpoint.directory) if re.fullmatch(_OTHER_WEIGHTS, name)]
    message = "does not belong to this model, and a loader may take it; move it away"
    return [Problem("model", str(checkpoint.directory / name), message) for name in names if name not in known]


def against_sum(plan: Plan, found: dict[str, Difference]) -> list[Problem]:
    """Each tensor of a model that differs from the sum made anew, with the first elements that do."""
    shapes = {tensor.name: tensor for tensor in plan.tensors}
    problems: list[Problem] = []
    for name, difference in found.items():
        tensor = shapes[name]
        where = f"{tensor.model.views[0].file}: {name}" if tensor.model else name
        values = "; ".join(
            f"{[int(index) for index in np.unravel_index(place, tensor.shape)]}: {model!r}, the sum is {total!r}"
            for place, total, model in difference.first
        )
        count = f"{difference.count:,} of {tensor.delta.elements:,} elements differ"
        problems.append(Problem("model", where, f"{count}: {values}"))
    return problems
