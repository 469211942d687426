"""Mend a rebuilt model: make anew the files that are damaged, and those alone, from the inputs it was made of."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from bayling_delta import companions, engine
from bayling_delta.applying import additions_on
from bayling_delta.checkpoint import JSON_CAP, Checkpoint, WeightFile, open_checkpoint, read_table
from bayling_delta.describing import small_files
from bayling_delta.engine import DEFAULT_THREADS, Progress
from bayling_delta.errors import Problem, refuse
from bayling_delta.expectations import Expectation, read_manifest, read_sums
from bayling_delta.files import copy_file, write_file
from bayling_delta.hub import local_copies
from bayling_delta.manifest import MANIFEST_NAME, SUMS_NAME, is_of_apply, small_file_entry, sums_text
from bayling_delta.plan import DEFAULT_MEMORY_LIMIT, Plan, make_budget, make_plan
from bayling_delta.reads import read_files, read_in_order_of
from bayling_delta.recipes import RECIPES
from bayling_delta.recording import digest_model
from bayling_delta.release_entry import Release
from bayling_delta.releases import load_releases
from bayling_delta.remaking import Means, content_of, doubt, manifest_anew
from bayling_delta.sinks import DirectorySink
from bayling_delta.sources import exists, is_directory, link_target, open_source, read_file, real_path
from bayling_delta.staging import Staging, output_problems, place_problems, staged_files
from bayling_delta.verifying import stray_files, verify

__all__ = ["repair"]


def repair(
    model: Path,
    *,
    base: Path,
    delta: Path,
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
    threads: int = DEFAULT_THREADS,
    direct: bool = True,
    device: str = "cpu",
    registry: Sequence[Path] = (),
    tell: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make the damaged and the missing files of a model anew, and return the document ``bayling-delta/repair/1``.

    What is damaged is what has not the digest that the manifest beside the model says. New files grow beside the
    model, in ``MODEL.partial``; each is put in its place only if it has, read back from the disk, the manifest's
    digest, and none is before all have. Of the manifest and SHA256SUMS, one that is damaged is written anew where the
    other vouches for every other file. In the end the whole model is verified. ``base`` and ``delta`` may be ids of
    the Hub; ``registry`` names files with releases of one's own. The other options are those of `apply`.

    Raises:
        IntegrityError: the sum does not give the files that are missing, or the model has something that is not its.
            Nothing was touched then.
        NoRecordError: there is no manifest of a rebuilt model.
        BaylingDeltaError: an input cannot be read or does not fit, or the output cannot be written.
    """
    means = Means(
        base, delta, memory_limit, threads, direct, device, registry, tell if tell else lambda _: None, progress
    )
    if not is_directory(model):
        refuse([Problem("not_found", str(model), "is no directory with a model in it")])
    refuse(place_problems(real_path(model), [base, delta]))
    repaired, notes = _mend_manifest(model, reason, means) if (reason := doubt(model)) else _mend_files(model, means)
    document = verify(model, memory_limit=memory_limit, threads=threads, progress=progress)
    return {
        "schema": "bayling-delta/repair/1",
        "ok": True,
        "weights_digest": document["weights_digest"],
        "repaired": repaired,
        "notes": notes,
        "compared": document["compared"],
    }


def _mend_manifest(model: Path, reason: str, means: Means) -> tuple[list[str], list[str]]:
    """Write a damaged manifest anew; the names of what was written, and what to say of it."""
    means.tell(f"{model / MANIFEST_NAME}: {reason}; it is made anew, for which base and delta are added once more")
    place = real_path(model)
    refuse([*output_problems(place, 0, mending=True), *_obstacles(model, [MANIFEST_NAME, SUMS_NAME])])
    with staged_files(place) as staging:
        manifest = manifest_anew(model, reason, means)
        digests = {name: file.sha256 or "" for name, file in read_sums(model / SUMS_NAME).files.items()}
        wanted, digests[MANIFEST_NAME] = digests[MANIFEST_NAME], hashlib.sha256(manifest).hexdigest()
        write_file(staging.model / MANIFEST_NAME, manifest)
        if wanted != digests[MANIFEST_NAME]:
            write_file(staging.model / SUMS_NAME, sums_text(digests).encode())
        repaired = sorted(staging.files(), key=[MANIFEST_NAME, SUMS_NAME].index)  # the list last, as always
        for name in repaired:
            staging.put(name, model)
    vouched = f"{SUMS_NAME} vouches for every other file"
    if SUMS_NAME in repaired:
        message = f"{MANIFEST_NAME} is written anew: {vouched}; what nothing else says of it, as its time, is new"
    else:
        message = f"{MANIFEST_NAME} is, byte for byte, what it was: {vouched}, and for this one"
    return repaired, [message]


def _mend_files(model: Path, means: Means) -> tuple[list[str], list[str]]:
    """Make the files anew that are not what the manifest says; their names, and what to say of them."""
    manifest_path = model / MANIFEST_NAME
    if not exists(manifest_path):
        message = f"there is no manifest in it, and no {SUMS_NAME} that has one; nobody knows what its files should be"
        refuse([Problem("no_record", str(model), message)])
    expected, manifest = read_manifest(manifest_path), read_table(manifest_path)
    if expected.operation != "apply" or expected.recipe not in RECIPES or not is_of_apply(manifest):
        message = "is not of a model that this version rebuilt from a base and a delta"
        refuse([Problem("no_record", str(manifest_path), message)])
    nameless = [name for name, file in expected.files.items() if file.sha256 is None]
    if nameless:
        message = f"has no SHA-256 of {', '.join(nameless)}; what cannot be compared is not replaced"
        refuse([Problem("no_record", str(manifest_path), message)])
    damaged = _damaged(model, expected, manifest, means)
    if not damaged:
        return [], []
    means.tell(f"{model}: to be made anew: {', '.join(damaged)}")
    base, delta = local_copies([means.base, means.delta], tell=means.tell)
    whole = _plan(base, delta, expected, manifest, means.memory_limit)
    plan = _only(whole, damaged)
    place = real_path(model)
    refuse([*output_problems(place, plan.output_bytes, mending=True), *_obstacles(model, damaged)])
    release = load_releases(means.registry).find(str(manifest["inputs"]["delta"]["name"]))
    with staged_files(place) as staging:
        if plan.files:
            with closing(DirectorySink(staging.model, plan.output_bytes, direct=means.direct)) as sink:
                outcome = engine.run(
                    plan,
                    sink,
                    threads=means.threads,
                    direct=means.direct,
                    additions=additions_on(means.device),
                    progress=means.progress,
                )
            refuse(outcome.damage)
        _write_small_files(staging, model, whole, manifest, release, damaged)
        refuse(_differences(staging, model, expected, damaged, means))
        for name in damaged:
            staging.put(name, model)
    if SUMS_NAME not in damaged:
        return damaged, []
    return damaged, [f"{SUMS_NAME} is written anew: {MANIFEST_NAME} vouches for every other file"]


def _damaged(model: Path, expected: Expectation, manifest: Mapping[str, Any], means: Means) -> list[str]:
    """The names of the files that are not what the manifest says, or not there.

    Raises:
        IntegrityError: there are weights that do not belong to the model; they would be loaded with it.
        CheckpointError: a file cannot be read.
    """
    found = digest_model(
        model,
        list(expected.files),
        memory_limit=means.memory_limit,
        threads=means.threads,
        progress=means.progress,
        strict=False,
    )
    refuse(stray_files(found.checkpoint, [expected]))
    damaged = [
        name
        for name, file in expected.files.items()
        if name not in found.files or (found.files[name].size, found.files[name].sha256) != (file.size, file.sha256)
    ]
    sums = _sums(model, manifest)
    if content_of(model / SUMS_NAME, len(sums)) != sums:
        damaged.append(SUMS_NAME)
    return damaged


def _obstacles(model: Path, names: Iterable[str]) -> list[Problem]:
    """The findings that something is where a file belongs that no file can take the place of."""
    return [
        Problem("output_exists", str(model / name), "is a directory, where a file belongs; move it away")
        for name in names
        if is_directory(model / name) and not link_target(model / name)
    ]


def _sums(model: Path, manifest: Mapping[str, Any]) -> bytes:
    """SHA256SUMS as it was written: it lists what the manifest lists, and the manifest."""
    listed = [*manifest["result"]["files"], small_file_entry(MANIFEST_NAME, read_file(model / MANIFEST_NAME, JSON_CAP))]
    return sums_text({entry["name"]: entry["sha256"] for entry in listed}).encode()


def _plan(base: Path, delta: Path, expected: Expectation, manifest: Mapping[str, Any], memory_limit: int) -> Plan:
    """The plan by which the model was made.

    Raises:
        MismatchError: the sum of these inputs would have other files.
    """
    plan = make_plan(
        open_checkpoint(base),
        open_checkpoint(delta),
        recipe=RECIPES[str(expected.recipe)],
        dtype=expected.dtype,
        max_shard_size=manifest["options"]["max_shard_size"],
        memory_limit=memory_limit,
        allowed=manifest["options"]["allow"],
    )
    sizes = {name: file.size for name, file in expected.files.items() if name.endswith(".safetensors")}
    if {file.name: file.size for file in plan.files} != sizes:
        message = f"the sum with {delta} would have other files than {expected.source} lists; is it another model's?"
        refuse([Problem("shape", str(base), message)])
    return plan


def _only(plan: Plan, damaged: Collection[str]) -> Plan:
    """The plan of the damaged weight files alone; no more of the inputs is read than they are made of."""
    files = tuple(file for file in plan.files if file.name in damaged)
    tensors = [tensor for file in files for tensor in file.tensors]
    base_needed = [(tensor.name, tensor.base) for tensor in tensors if tensor.base]
    delta_needed = [(tensor.name, tensor.delta) for tensor in tensors]
    return replace(
        plan,
        files=files,
        base_reads=read_in_order_of(plan.base, base_needed, by_tensor=True),
        delta_reads=read_in_order_of(plan.delta, delta_needed, by_tensor=True),
    )


def _write_small_files(
    staging: Staging,
    model: Path,
    plan: Plan,
    manifest: Mapping[str, Any],
    release: Release | None,
    damaged: Collection[str],
) -> None:
    """Write those of the damaged files that are not weights, as `apply` writes them."""
    beside = companions.collect(plan.delta, manifest["result"]["dtype"], release)
    contents: dict[str, Path | bytes] = dict(small_files(plan, manifest, beside, release))
    contents[SUMS_NAME] = _sums(model, manifest)
    for name in contents.keys() & set(damaged):
        content = contents[name]
        if isinstance(content, bytes):
            write_file(staging.model / name, content)
        else:
            with open_source(content) as source:
                copy_file(source, staging.model / name)


def _differences(
    staging: Staging,
    model: Path,
    expected: Expectation,
    damaged: Sequence[str],
    means: Means,
) -> list[Problem]:
    """The files that are not, read back from the disk, what the manifest says."""
    made = staging.files()
    files: list[WeightFile] = []
    for name in made:
        with open_source(staging.model / name) as source:
            files.append(WeightFile(source.path, *source.stamp))
    checkpoint = Checkpoint(model, staging.model, "safetensors", tuple(files), {}, None)
    reads = read_files(checkpoint)
    digests, _ = engine.digest(checkpoint, reads, make_budget(means.memory_limit, [reads]), threads=means.threads)
    problems: list[Problem] = []
    for name in damaged:
        wanted = expected.files.get(name)
        if name not in made:
            message = "is not made from base and delta; put back a copy of it, as the manifest describes it"
            problems.append(Problem("digest", str(model / name), message))
        elif wanted is not None and digests.files[name] != wanted.sha256:
            message = (
                f"made anew, its SHA-256 is {digests.files[name]}; the manifest says {wanted.sha256}; "
                "nothing was touched: are these the base and the delta that it was made of?"
            )
            problems.append(Problem("digest", str(model / name), message))
    return problems
