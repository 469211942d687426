"""Digest a checkpoint: what it is, so that it can be recorded and compared."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bayling_delta import companions, engine
from bayling_delta.checkpoint import (
    Checkpoint,
    WeightFile,
    directory_of,
    look_alikes,
    open_checkpoint,
    stays_in_directory,
)
from bayling_delta.copies import copy_problems
from bayling_delta.engine import DEFAULT_THREADS, Progress
from bayling_delta.errors import CheckpointError, IntegrityError, Problem, refuse
from bayling_delta.expectations import FoundFile, download_problems
from bayling_delta.files import new_file_problems, publish_file
from bayling_delta.hub import local_copies
from bayling_delta.manifest import TensorDigest, file_entry, manifest_head, result_section, to_json
from bayling_delta.meta_format import PARAMS_NAME
from bayling_delta.plan import DEFAULT_MEMORY_LIMIT, counted_weights, make_budget
from bayling_delta.reads import read_whole
from bayling_delta.sources import exists, open_source

__all__ = ["Found", "digest_model", "record"]


def record(
    model: Path,
    *,
    output: Path | None = None,
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
    threads: int = DEFAULT_THREADS,
    tell: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Digest every tensor and file of a checkpoint, and return its manifest; write it to ``output``, if given.

    This is how recorded checksums come to be: anyone who has the same weights gets the same weights digest,
    whatever container and sharding they are in. ``model`` may be an id of the Hub; ``tell`` is given what a user
    should know of the download.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        IntegrityError: a record of a ``.bin`` file is damaged, or a file is not what the Hub had.
        OutputError: ``output`` exists, lies inside the model, or cannot be written.
    """
    (model,) = local_copies([model], also=new_file_problems(output, model) if output else (), tell=tell)
    if output is not None:
        refuse(new_file_problems(output, directory_of(model)))
    names = (*companions.COPIED, PARAMS_NAME)
    beside = [name for name in names if exists(directory_of(model) / name)]
    found = digest_model(model, beside, memory_limit=memory_limit, threads=threads, progress=progress)
    names_problems = [
        Problem(
            "unsafe_name", str(found.checkpoint.directory / name), "has a name that no manifest can have; rename it"
        )
        for name in found.files
        if not stays_in_directory(name)
    ]
    names_problems += [
        Problem("unsafe_name", str(found.checkpoint.directory), f"has {two}; rename one")
        for two in look_alikes(found.files)
    ]
    refuse([*found.problems, *names_problems, *download_problems(found.checkpoint.directory, found.files)])
    result = result_section((found.tensors or {}).values(), found.places)
    result["files"] = [file_entry(name, file.size, file.sha256) for name, file in found.files.items()]
    head = manifest_head("record", None, {"dtype": None, "max_shard_size": None, "allow": []})
    manifest = {**head, "result": result, "changes": [], "verification": []}
    if output is not None:
        publish_file(output, to_json(manifest).encode())
    return manifest


@dataclass(frozen=True, slots=True)
class Found:
    """What a model is: its digests."""

    model: Path
    checkpoint: Checkpoint
    """With no tensors where the weights could not be opened."""
    tensors: dict[str, TensorDigest] | None
    """None where the weights could not be opened, or read."""
    files: dict[str, FoundFile]
    """Each file read, by name."""
    problems: tuple[Problem, ...]
    """What kept the weights from being opened, and damage that checksums found."""

    @property
    def places(self) -> dict[str, str]:
        """Which file each tensor is in; the first of its parts."""
        return {name: ref.views[0].file.name for name, ref in self.checkpoint.tensors.items()}


def digest_model(
    model: Path,
    names: Sequence[str] = (),
    *,
    md5: Collection[str] = (),
    memory_limit: int,
    threads: int,
    progress: Progress | None = None,
    strict: bool = True,
) -> Found:
    """Digest a model's weights, tensor by tensor and file by file, and the files ``names`` beside them, in one pass.

    ``md5`` names the files of which the MD5 is taken too. Where the weights cannot be opened, or a file not be read:
    ``strict`` raises, else the other files alone are digested.

    Raises:
        CheckpointError: the model, or a file, cannot be read.
    """
    problems: tuple[Problem, ...] = ()
    try:
        checkpoint = open_checkpoint(model)
    except (CheckpointError, IntegrityError) as error:
        if strict:
            raise
        problems = tuple(replace(problem, kind="model") for problem in error.problems)
        checkpoint = Checkpoint(model, directory_of(model), "unknown", (), {}, None)
    problems += tuple(p if strict else replace(p, kind="model") for p in copy_problems(checkpoint))
    weights = counted_weights(checkpoint)
    known = {file.path.name for file in checkpoint.files}
    beside: list[WeightFile] = []
    for name in dict.fromkeys(names):
        if name in known:
            continue
        try:
            if not exists(checkpoint.directory / name):
                continue
            with open_source(checkpoint.directory / name) as source:
                beside.append(WeightFile(source.path, *source.stamp))
        except CheckpointError as error:
            if strict:
                raise
            problems += tuple(replace(problem, kind="model") for problem in error.problems)
    everything = replace(checkpoint, files=(*checkpoint.files, *beside))
    opened = bool(checkpoint.tensors)
    while True:
        listed = [file.path.name for file in everything.files if file.path.name in md5]
        reads = read_whole(everything, weights, listed)
        budget = make_budget(memory_limit, [reads])
        try:
            digests, damage = engine.digest(everything, reads, budget, threads=threads, progress=progress)
            break
        except CheckpointError as error:
            places = {problem.where for problem in error.problems if problem.kind in ("unreadable", "not_found")}
            bad = {file.path for file in everything.files if str(file.path) in places}
            if strict or not bad:
                raise
            problems += tuple(replace(problem, kind="model") for problem in error.problems)
            everything = replace(everything, files=tuple(file for file in everything.files if file.path not in bad))
            if any(file.path in bad for file in checkpoint.files):
                weights, opened = {}, False  # without one of their files, they are not the model's
    tensors = {name: TensorDigest(name, ref.dtype, ref.shape, digests.tensors[name]) for name, ref in weights.items()}
    return Found(
        model,
        checkpoint,
        tensors if opened else None,
        {
            name: FoundFile(size, digests.files[name], digests.md5.get(name))
            for name, size in ((file.path.name, file.size) for file in everything.files)
        },
        (*problems, *damage),
    )
