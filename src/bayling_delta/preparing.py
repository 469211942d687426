"""Open base and delta, recognise and judge them, and plan their sum; nothing is written."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from bayling_delta import companions, engine
from bayling_delta.checkpoint import Checkpoint, directory_of, open_checkpoint
from bayling_delta.engine import DEFAULT_THREADS, Digests, Progress
from bayling_delta.errors import BaylingDeltaError, CheckpointError, Problem, refuse
from bayling_delta.expectations import Expectation, FoundFile, differences, own_expectations, read_manifest
from bayling_delta.files import is_inside
from bayling_delta.hub import local_copies
from bayling_delta.identifying import (
    FileRecords,
    Identity,
    files_worth_a_digest,
    identify,
    identify_by_name,
    look_up,
    pairing_notes,
    pairing_problems,
    sign_problems,
)
from bayling_delta.looking import look_at
from bayling_delta.manifest import MANIFEST_NAME
from bayling_delta.plan import DEFAULT_MEMORY_LIMIT, DEFAULT_SHARD_SIZE, Plan, make_budget, make_plan
from bayling_delta.reads import read_files
from bayling_delta.recipes import PLAIN, RECIPES, Recipe
from bayling_delta.releases import Registry, load_releases
from bayling_delta.resuming import look_back
from bayling_delta.sources import exists
from bayling_delta.staging import output_problems, place_problems
from bayling_delta.suspicions import suspect
from bayling_delta.tensors import DTYPES

__all__ = [
    "Prepared",
    "of_weights",
    "plan_apply",
    "prepare",
    "recipe_of",
    "record_problems",
    "refuse_by_name",
    "unrecorded_problems",
]

_SMALL_FILES_BYTES: Final = 16 << 20
"""What configuration, tokenizer, index and manifest may need on the disk, generously."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan, and what is known of its inputs before it is carried out."""

    plan: Plan
    registry: Registry
    identities: dict[str, Identity | None]
    """By role, ``base`` and ``delta``."""
    recipe_named: bool
    """Whether the user chose the recipe."""
    beside: Mapping[str, tuple[int, int]]
    """The files beside the delta that go into the result, as they were when they were checked."""


def plan_apply(
    base: Path,
    delta: Path,
    out: Path,
    *,
    registry: Sequence[Path] = (),
    allow: Collection[str] = (),
    resume: bool = True,
    **options: Any,
) -> Plan:
    """Open both checkpoints and plan their sum into the new directory ``out``; write nothing.

    With ``resume`` a note says what an earlier run has left of it. The other options are those of `apply` that decide
    what the plan is. Of an id of the Hub, weights that are not in its cache are a problem.

    Raises:
        BaylingDeltaError: with everything that can be seen to be wrong; what was left is of other inputs or options.
    """
    known = load_releases(registry)
    refuse_by_name(base, delta, out, known, allow)
    base, delta = local_copies([base, delta], fetch=False)
    plan = prepare(base, delta, out, known, allow=allow, **options).plan
    left = look_back(out, plan) if resume else None
    return replace(plan, notes=(*plan.notes, left)) if left else plan


def refuse_by_name(base: Path, delta: Path, out: Path, registry: Registry, allow: Collection[str]) -> None:
    """Refuse what ids of the Hub and places in its cache say enough of, before a fetch of many gigabytes."""
    by_name = [identify_by_name(path, registry) for path in (base, delta)]
    if problems := pairing_problems(base, by_name[0], delta, by_name[1], registry):
        refuse([*problems, *output_problems(out, 0)], allow)


def prepare(
    base: Path,
    delta: Path,
    out: Path | None,
    known: Registry,
    *,
    recipe: str | None = None,
    dtype: str | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
    check_inputs: bool = False,
    require_recorded: bool = False,
    allow: Collection[str] = (),
    threads: int = DEFAULT_THREADS,
    progress: Progress | None = None,
) -> Prepared:
    """Open, recognise and judge both inputs, choose the recipe, and plan their sum, for ``out`` if it is to be made.

    The options are those of `apply`.

    Raises:
        BaylingDeltaError: with everything that can be seen to be wrong.
    """
    paths = {"base": base, "delta": delta}
    beside_delta = companions.stamps(directory_of(delta))
    problems: list[Problem] = []
    inputs: dict[str, Checkpoint] = {}
    for role, path in paths.items():
        with _collected(problems):
            inputs[role] = open_checkpoint(path)
    needed = _SMALL_FILES_BYTES + sum(size for size, _ in beside_delta.values())
    if len(inputs) == len(paths):
        needed += sum(ref.elements * DTYPES[dtype or ref.dtype] for ref in inputs["delta"].weights.values())
    if out is not None:
        problems += output_problems(out, needed)
        problems += [
            Problem("output_place", str(out), f"lies inside the {role}; choose a place outside the inputs")
            for role, path in paths.items()
            if is_inside(out, directory_of(path))
        ]
        with _collected(problems):
            problems += place_problems(out, paths.values())
    if len(inputs) < len(paths):
        refuse(problems, allow)
    looks = {role: look_at(checkpoint, [], tokenizer=False) for role, checkpoint in inputs.items()}
    identities = {role: identify(checkpoint, looks[role], known) for role, checkpoint in inputs.items()}
    if check_inputs:
        refuse(problems, allow)  # before a long read
        for role, records in _check_inputs(inputs, identities, known, memory_limit, threads, progress).items():
            identities[role] = records.identity
            problems += records.problems
            problems += unrecorded_problems(inputs[role], records) if require_recorded else []
    problems += pairing_problems(base, identities["base"], delta, identities["delta"], known)
    problems += sign_problems(inputs["base"], looks["base"], identities["delta"], known)
    chosen = PLAIN
    with _collected(problems):
        chosen = _choose_recipe(recipe, identities["delta"], delta)
    suspicions, notes = suspect(inputs["base"], looks["base"], inputs["delta"], looks["delta"])
    problems += suspicions
    with _collected(problems):
        beside, told = companions.check(inputs["delta"], identities["delta"].release if identities["delta"] else None)
        problems += beside
        notes += told
    if any(problem.kind in ("size", "quantised") for problem in problems):
        refuse(problems, allow)  # every tensor differs, for this one reason
    plan = make_plan(
        inputs["base"],
        inputs["delta"],
        recipe=chosen,
        dtype=dtype,
        max_shard_size=max_shard_size,
        memory_limit=memory_limit,
        digest_files={
            path
            for role, checkpoint in inputs.items()
            for path in (
                {file.path for file in checkpoint.files}
                if require_recorded and not check_inputs
                else files_worth_a_digest(checkpoint, identities[role], known)
            )
        },
        out=out,
        also=problems,
        allowed=allow,
    )
    known_as = [f"{checkpoint.path}: is {identities[role]}" for role, checkpoint in inputs.items() if identities[role]]
    known_as += pairing_notes(inputs["base"], identities["base"], identities["delta"])
    return Prepared(
        replace(plan, notes=(*known_as, *plan.notes, *notes)), known, identities, recipe is not None, beside_delta
    )


def _check_inputs(
    inputs: Mapping[str, Checkpoint],
    identities: Mapping[str, Identity | None],
    registry: Registry,
    memory_limit: int,
    threads: int,
    progress: Progress | None,
) -> dict[str, FileRecords]:
    """Digest the weight files of both inputs, and look them up.

    Raises:
        CheckpointError: a file cannot be read, or changes meanwhile.
        IntegrityError: a record of a ``.bin`` file is damaged, or a file is not what the Hub had.
    """
    found: dict[str, FileRecords] = {}
    problems: list[Problem] = []
    for role, checkpoint in inputs.items():
        reads = read_files(checkpoint)
        budget = make_budget(memory_limit, [reads])
        digests, damage = engine.digest(checkpoint, reads, budget, threads=threads, progress=progress)
        problems += damage
        problems += record_problems(checkpoint, own_expectations(checkpoint.directory), digests)
        found[role] = look_up(role, checkpoint, digests, identities[role], registry)
    refuse(problems)
    return found


def unrecorded_problems(checkpoint: Checkpoint, records: FileRecords) -> list[Problem]:
    """The weight files that --require-recorded refuses."""
    message = (
        "is on no record, neither in the registry nor of what is in this user's cache of the Hub, "
        "and --require-recorded asks for one"
    )
    return [Problem("no_record", str(checkpoint.directory / name), message) for name in records.unrecorded]


def _choose_recipe(name: str | None, delta: Identity | None, path: Path) -> Recipe:
    """The recipe named, else that of the release that the delta is, else that of its own manifest, else ``plain``."""
    if name is None and delta is not None and delta.release.recipe:
        name = delta.release.recipe
    return recipe_of(name, path)


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


def record_problems(side: Checkpoint, records: Sequence[Expectation], digests: Digests) -> list[Problem]:
    """The weight files of an input that are not what is recorded of them beside it, or by the Hub."""
    found = {
        file.path.name: FoundFile(file.size, digests.files[file.path.name], digests.md5.get(file.path.name))
        for file in side.files
        if file.path.name in digests.files
    }
    return [
        problem
        for expected in records
        for problem in differences(of_weights(side, expected), side.directory, None, {}, found)
    ]


def of_weights(side: Checkpoint, expected: Expectation) -> Expectation:
    """What is recorded of an input's weight files alone."""
    names = {file.path.name for file in side.files}
    files = {name: file for name, file in expected.files.items() if name in names}
    return replace(expected, weights_digest=None, tensors=None, files=files)
