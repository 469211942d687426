"""Rebuild a model: open base and delta, plan their sum, run it, write down what came out."""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from bayling_delta import companions, engine
from bayling_delta.adding import Additions
from bayling_delta.arithmetic import make_addition
from bayling_delta.checkpoint import Checkpoint, directory_of, open_checkpoint
from bayling_delta.downloads import origin
from bayling_delta.engine import DEFAULT_THREADS, Digests, Outcome, Progress
from bayling_delta.errors import BaylingDeltaError, CheckpointError, Problem, refuse
from bayling_delta.expectations import (
    Expectation,
    FoundFile,
    differences,
    download_problems,
    own_expectations,
    read_manifest,
)
from bayling_delta.files import copy_file, is_inside, write_file
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
    recipe_problems,
    sign_problems,
)
from bayling_delta.looking import look_at
from bayling_delta.manifest import (
    MANIFEST_NAME,
    RESULT,
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
from bayling_delta.plan import DEFAULT_MEMORY_LIMIT, DEFAULT_SHARD_SIZE, Plan, make_budget, make_plan
from bayling_delta.reads import ReadList, read_files
from bayling_delta.recipes import PLAIN, RECIPES, Recipe
from bayling_delta.release_entry import Release
from bayling_delta.releases import Registry, load_releases
from bayling_delta.resuming import journalled, merged, rest_of, take_up
from bayling_delta.sinks import DirectorySink
from bayling_delta.sources import changed, exists, open_source
from bayling_delta.staging import output_problems, remove_remnant, staged_directory
from bayling_delta.suspicions import suspect
from bayling_delta.tensors import DTYPES

__all__ = [
    "additions_on",
    "apply",
    "input_problems",
    "plan_apply",
    "plan_document",
    "recipe_of",
    "result_digests",
    "small_files",
]

_SMALL_FILES_BYTES: Final = 16 << 20
"""What configuration, tokenizer, index and manifest may need on the disk, generously."""


@dataclass(frozen=True, slots=True)
class _Prepared:
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
    base: Path, delta: Path, out: Path, *, registry: Sequence[Path] = (), allow: Collection[str] = (), **options: Any
) -> Plan:
    """Open both checkpoints and plan their sum into the new directory ``out``; write nothing.

    The options are those of `apply` that decide what the plan is. Of an id of the Hub, weights that are not in its
    cache are a problem.

    Raises:
        BaylingDeltaError: with everything that can be seen to be wrong.
    """
    known = load_releases(registry)
    _refuse_by_name(base, delta, out, known, allow)
    base, delta = local_copies([base, delta], fetch=False)
    return _prepare(base, delta, out, known, allow=allow, **options).plan


def _refuse_by_name(base: Path, delta: Path, out: Path, registry: Registry, allow: Collection[str]) -> None:
    """Refuse what ids of the Hub and places in its cache say enough of, before a fetch of many gigabytes."""
    by_name = [identify_by_name(path, registry) for path in (base, delta)]
    if problems := pairing_problems(base, by_name[0], delta, by_name[1], registry):
        refuse([*problems, *output_problems(out, 0)], allow)


def _prepare(
    base: Path,
    delta: Path,
    out: Path,
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
) -> _Prepared:
    """Open, recognise and judge both inputs, choose the recipe, and plan their sum."""
    paths = {"base": base, "delta": delta}
    beside_delta = companions.stamps(directory_of(delta))
    problems: list[Problem] = []
    inputs: dict[str, Checkpoint] = {}
    for role, path in paths.items():
        with _collected(problems):
            inputs[role] = open_checkpoint(path)
    needed = _SMALL_FILES_BYTES
    if len(inputs) == len(paths):
        needed += sum(ref.elements * DTYPES[dtype or ref.dtype] for ref in inputs["delta"].weights.values())
    problems += output_problems(out, needed)
    problems += [
        Problem("output_place", str(out), f"lies inside the {role}; choose a place outside the inputs")
        for role, path in paths.items()
        if is_inside(out, directory_of(path))
    ]
    if len(inputs) < len(paths):
        refuse(problems, allow)
    looks = {role: look_at(checkpoint, [], tokenizer=False) for role, checkpoint in inputs.items()}
    identities = {role: identify(checkpoint, looks[role], known) for role, checkpoint in inputs.items()}
    if check_inputs:
        refuse(problems, allow)  # before a long read
        for role, records in _check_inputs(inputs, identities, known, memory_limit, threads, progress).items():
            identities[role] = records.identity
            problems += records.problems
            problems += _unrecorded_problems(inputs[role], records) if require_recorded else []
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
    return _Prepared(
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
        problems += _differences(checkpoint, own_expectations(checkpoint.directory), digests)
        found[role] = look_up(role, checkpoint, digests, identities[role], registry)
    refuse(problems)
    return found


def _unrecorded_problems(checkpoint: Checkpoint, records: FileRecords) -> list[Problem]:
    message = "is on no record, neither in the registry nor of the Hub, and --require-recorded asks for one"
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
    registry: Sequence[Path] = (),
    check_inputs: bool = False,
    require_recorded: bool = False,
    allow: Collection[str] = (),
    resume: bool = True,
    tell: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write ``base + delta`` as a HuggingFace directory, and return its manifest.

    ``base`` and ``delta`` may be ids of the Hub; what is needed of them is fetched into its cache.

    ``recipe`` is the name of one of `RECIPES`; None takes that of the release that the delta is recognised as, else
    that of the delta's own manifest, else ``plain``. ``dtype`` is F16, BF16 or F32 to cast the result, None to keep
    the delta's. ``expect`` is the weights digest that the result must have. What comes out depends on none of these:
    ``memory_limit``, ``threads``, ``direct`` (past the page cache, where that is faster), ``device`` (``cpu``,
    ``cuda`` or ``cuda:N``). Sizes are in bytes.

    ``registry`` names files with releases of one's own. ``check_inputs`` has both inputs digested and looked up
    before anything is written; ``require_recorded`` refuses weight files that are on no record. ``allow`` names the
    kinds of problem to overrule. ``tell`` is given what a user should know of the inputs, a sentence at a time.

    ``out`` appears when it is complete and synced; if anything fails, it does not appear. What a run finished that was
    ended is in ``OUT.partial``, and is taken up by the next one with the same inputs and options; without ``resume``
    it is removed instead.

    Raises:
        BaylingDeltaError: everything that can be seen to be wrong before the run; an input that fails, changes or
            proves to be another in it; a result with non-finite elements or another digest than expected; an output
            that cannot be written.
        ValueError: ``expect`` is not a SHA-256.
    """
    wanted = parse_digest(expect) if expect is not None else None
    remove_remnant(out)
    known = load_releases(registry)
    _refuse_by_name(base, delta, out, known, allow)
    base, delta = local_copies([base, delta], also=output_problems(out, 0), tell=tell)
    prepared = _prepare(
        base,
        delta,
        out,
        known,
        recipe=recipe,
        dtype=dtype,
        max_shard_size=max_shard_size,
        memory_limit=memory_limit,
        check_inputs=check_inputs,
        require_recorded=require_recorded,
        allow=allow,
        threads=threads,
        progress=progress,
    )
    plan = prepared.plan
    for note in plan.notes:
        if tell is not None:
            tell(note)
    additions = additions_on(device)
    head = manifest_head(
        "apply", plan.recipe.name, {"dtype": dtype, "max_shard_size": max_shard_size, "allow": sorted(set(allow))}
    )
    with staged_directory(out, resume=resume) as staging:
        earlier = take_up(staging, plan, threads=threads, direct=direct, progress=progress, tell=tell)
        with journalled(staging, plan, earlier) as journal:
            outcome: Outcome | None = None
            if rest := rest_of(plan, earlier):
                with closing(DirectorySink(staging.model, rest.output_bytes, direct=direct)) as sink:
                    outcome = engine.run(
                        rest,
                        sink,
                        threads=threads,
                        direct=direct,
                        additions=additions,
                        progress=_from(earlier.nbytes, progress),
                        report=journal.add,
                    )
            outcome = merged(plan, earlier, outcome)
            records = _look_up_inputs(prepared, outcome)
            refuse(_result_problems(prepared, outcome, records, out, wanted, require_recorded=require_recorded), allow)
            return _write_down(prepared, outcome, records, staging.model, wanted, head)


def _from(start: int, progress: Progress | None) -> Progress | None:
    """The progress of what comes after so many bytes of a whole."""
    return (lambda done, total: progress(start + done, start + total)) if progress else None


def additions_on(device: str) -> Additions:
    """What adds on a device; torch is imported for a GPU alone.

    Raises:
        UsageError: there is no such device here.
    """
    if device == "cpu":
        return make_addition
    from bayling_delta.gpu import make_additions

    return make_additions(device)


def _look_up_inputs(prepared: _Prepared, outcome: Outcome) -> dict[str, FileRecords]:
    plan = prepared.plan
    return {
        role: look_up(role, checkpoint, digests, prepared.identities[role], prepared.registry)
        for role, checkpoint, digests in (("base", plan.base, outcome.base), ("delta", plan.delta, outcome.delta))
    }


def _result_problems(
    prepared: _Prepared,
    outcome: Outcome,
    records: Mapping[str, FileRecords],
    out: Path,
    wanted: str | None,
    *,
    require_recorded: bool,
) -> list[Problem]:
    """What only the finished run can show."""
    plan, base, delta = prepared.plan, records["base"], records["delta"]
    problems = [*outcome.damage, *input_problems(plan, outcome), *base.problems, *delta.problems]
    problems += pairing_problems(plan.base.path, base.identity, plan.delta.path, delta.identity, prepared.registry)
    if not prepared.recipe_named:
        problems += recipe_problems(plan.delta, delta.identity, plan.recipe)
    if require_recorded:
        problems += [*_unrecorded_problems(plan.base, base), *_unrecorded_problems(plan.delta, delta)]
    problems += [
        Problem("non_finite", name, f"{count:,} elements of the sum are infinite or NaN; is this the right base?")
        for name, count in outcome.non_finite.items()
    ]
    digest = weights_digest(result_digests(plan, outcome))
    if wanted not in (None, digest):
        advice = "are base, delta and --dtype the right ones? A run without --expect takes up what is finished"
        problems.append(
            Problem("digest", str(out), f"the result's weights digest is {digest}, expected was {wanted}; {advice}")
        )
    return problems


def input_problems(plan: Plan, outcome: Outcome) -> list[Problem]:
    """The weight files of the inputs that are not what is recorded of them, beside them or on the Hub."""
    return [
        *_differences(plan.base, plan.base_records, outcome.base),
        *_differences(plan.delta, plan.delta_records, outcome.delta),
    ]


def _differences(side: Checkpoint, records: Sequence[Expectation], digests: Digests) -> list[Problem]:
    found = {
        file.path.name: FoundFile(file.size, digests.files[file.path.name], digests.md5.get(file.path.name))
        for file in side.files
        if file.path.name in digests.files
    }
    return [
        problem
        for expected in records
        for problem in differences(_of_weights(side, expected), side.directory, None, {}, found)
    ]


def _of_weights(side: Checkpoint, expected: Expectation) -> Expectation:
    """What is recorded of an input's weight files alone."""
    names = {file.path.name for file in side.files}
    files = {name: file for name, file in expected.files.items() if name in names}
    return replace(expected, weights_digest=None, tensors=None, files=files)


def result_digests(plan: Plan, outcome: Outcome) -> list[TensorDigest]:
    """The digest of each tensor of the sum."""
    return [
        TensorDigest(tensor.name, tensor.dtype, tensor.shape, outcome.result.tensors[tensor.name])
        for tensor in plan.tensors
    ]


def _write_down(
    prepared: _Prepared,
    outcome: Outcome,
    records: Mapping[str, FileRecords],
    directory: Path,
    wanted: str | None,
    head: dict[str, Any],
) -> dict[str, Any]:
    """Write everything but the weights beside them, SHA256SUMS last, and return the manifest."""
    plan, delta = prepared.plan, records["delta"].identity
    release = delta.release if delta else None
    placed = {tensor.name: file.name for file in plan.files for tensor in file.tensors}
    result = result_section(result_digests(plan, outcome), placed)
    beside = companions.collect(plan.delta, result["dtype"], release)
    manifest: dict[str, Any] = {
        **head,
        "inputs": {
            "base": _input_section(plan.base, outcome.base, records["base"]),
            "delta": _input_section(plan.delta, outcome.delta, records["delta"]),
        },
        "result": result,
        "changes": [{"file": file.name, "change": change} for file in beside for change in file.changes],
        "verification": [
            *_result_verification(result["weights_digest"], wanted, prepared.registry),
            *_input_verification("base", plan.base, plan.base_records, records["base"]),
            *_input_verification("delta", plan.delta, plan.delta_records, records["delta"]),
        ],
    }

    def write(name: str, data: bytes) -> dict[str, Any]:
        write_file(directory / name, data)
        return small_file_entry(name, data)

    files = result["files"]
    files += [file_entry(file.name, file.size, outcome.result.files[file.name]) for file in plan.files]
    for name, content in small_files(plan, manifest, beside, release):
        if isinstance(content, bytes):
            files.append(write(name, content))
            continue
        with open_source(content) as source:
            size, sha256 = copy_file(source, directory / name)
        refuse(download_problems(plan.delta.directory, {name: FoundFile(size, sha256)}))
        files.append(file_entry(name, size, sha256))
    others = prepared.beside.items() ^ companions.stamps(plan.delta.directory).items()
    refuse([changed(plan.delta.directory / name) for name in sorted({name for name, _ in others})])
    listed = [*files, write(MANIFEST_NAME, to_json(manifest).encode())]
    write(SUMS_NAME, sums_text({entry["name"]: entry["sha256"] for entry in listed}).encode())
    return manifest


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
        files = _of_weights(side, expected).files.values()
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
