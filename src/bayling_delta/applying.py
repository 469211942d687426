"""Rebuild a model: open base and delta, plan their sum, run it, write down what came out."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from bayling_delta import companions, engine
from bayling_delta.adding import Additions
from bayling_delta.arithmetic import make_addition
from bayling_delta.describing import result_digests, small_files, written_manifest
from bayling_delta.engine import DEFAULT_THREADS, Outcome, Progress
from bayling_delta.errors import Problem, refuse
from bayling_delta.expectations import FoundFile, download_problems
from bayling_delta.files import copy_file, write_file
from bayling_delta.hub import local_copies
from bayling_delta.identifying import FileRecords, look_up, pairing_problems, recipe_problems
from bayling_delta.manifest import (
    MANIFEST_NAME,
    SUMS_NAME,
    file_entry,
    manifest_head,
    parse_digest,
    small_file_entry,
    sums_text,
    to_json,
    weights_digest,
)
from bayling_delta.plan import DEFAULT_MEMORY_LIMIT, DEFAULT_SHARD_SIZE, Plan
from bayling_delta.preparing import Prepared, prepare, record_problems, refuse_by_name, unrecorded_problems
from bayling_delta.releases import load_releases
from bayling_delta.resuming import journalled, merged, rest_of, take_up
from bayling_delta.sinks import DirectorySink
from bayling_delta.sources import changed, open_source
from bayling_delta.staging import output_problems, remove_remnant, staged_directory

__all__ = ["additions_on", "apply", "input_problems", "look_up_inputs", "result_problems"]


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
    before anything is written; ``require_recorded`` refuses weight files that are on no record, of the registry or of
    this user's cache of the Hub. ``allow`` names the kinds of problem to overrule. ``tell`` is given what a user should
    know of the inputs, a sentence at a time.

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
    refuse_by_name(base, delta, out, known, allow)
    base, delta = local_copies([base, delta], also=output_problems(out, 0), tell=tell)
    prepared = prepare(
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
        with journalled(staging, plan, earlier) as report:
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
                        report=report,
                    )
            outcome = merged(plan, earlier, outcome)
            records = look_up_inputs(prepared, outcome)
            refuse(result_problems(prepared, outcome, records, out, wanted, require_recorded=require_recorded), allow)
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


def look_up_inputs(prepared: Prepared, outcome: Outcome) -> dict[str, FileRecords]:
    """What is on record of both inputs, by role."""
    plan = prepared.plan
    return {
        role: look_up(role, checkpoint, digests, prepared.identities[role], prepared.registry)
        for role, checkpoint, digests in (("base", plan.base, outcome.base), ("delta", plan.delta, outcome.delta))
    }


def result_problems(
    prepared: Prepared,
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
        problems += [*unrecorded_problems(plan.base, base), *unrecorded_problems(plan.delta, delta)]
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
        *record_problems(plan.base, plan.base_records, outcome.base),
        *record_problems(plan.delta, plan.delta_records, outcome.delta),
    ]


def _write_down(
    prepared: Prepared,
    outcome: Outcome,
    records: Mapping[str, FileRecords],
    directory: Path,
    wanted: str | None,
    head: Mapping[str, Any],
) -> dict[str, Any]:
    """Write everything but the weights beside them, SHA256SUMS last, and return the manifest."""
    plan = prepared.plan
    manifest, beside = written_manifest(plan, outcome, records, prepared.registry, wanted, head)
    files = manifest["result"]["files"]

    def write(name: str, data: bytes) -> dict[str, Any]:
        write_file(directory / name, data)
        return small_file_entry(name, data)

    for name, content in small_files(plan, manifest, beside, records["delta"].release):
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
