"""Make a model's manifest anew from its inputs, where SHA256SUMS vouches for every other file."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Final

from bayling_delta import engine
from bayling_delta.applying import additions_on, look_up_inputs, result_problems
from bayling_delta.checkpoint import JSON_CAP
from bayling_delta.describing import result_digests, small_files, written_manifest
from bayling_delta.engine import Outcome, Progress
from bayling_delta.errors import BaylingDeltaError, CheckpointError, IntegrityError, MismatchError, Problem, refuse
from bayling_delta.expectations import Expectation, differences, read_sums
from bayling_delta.hub import local_copies
from bayling_delta.manifest import MANIFEST_NAME, SUMS_NAME, file_entry, manifest_head, to_json, weights_digest
from bayling_delta.plan import DEFAULT_SHARD_SIZE, Plan
from bayling_delta.preparing import Prepared, prepare
from bayling_delta.recipes import RECIPES
from bayling_delta.recording import Found, digest_model
from bayling_delta.releases import load_releases
from bayling_delta.sources import exists, open_source, read_bytes, read_file
from bayling_delta.tensors import DTYPES, FLOATS
from bayling_delta.verifying import stray_files

__all__ = ["Means", "content_of", "doubt", "manifest_anew"]

_MARKS: Final = {
    "created": rb'"created": "(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ)"',
    "recipe": rb'"recipe": "([a-z0-9-]{1,40})"',
    "dtype": rb'"dtype": "(F16|BF16|F32)",\s*"max_shard_size"',
    "max_shard_size": rb'"max_shard_size": ([1-9]\d{0,17})\b',
    "allow": rb'"allow": \[([a-z_",\s]{0,1000})\]',
    "expected": rb'"against": "(--expect)"',
}
"""How those entries of a manifest look that nothing but itself says."""
_ALIKE: Final = 48
"""So many digits of 64 that agree are no chance: it is the listed digest that was damaged, and not what it is of."""


def doubt(model: Path) -> str | None:
    """Why a model's manifest is not believed, though SHA256SUMS may vouch for the rest; None if nothing speaks so."""
    if not exists(model / SUMS_NAME):
        return None
    try:
        wanted = read_sums(model / SUMS_NAME).files.get(MANIFEST_NAME)
    except CheckpointError:
        return None  # it vouches for nothing
    if wanted is None:
        return None
    if not exists(model / MANIFEST_NAME):
        return f"is not there, and {SUMS_NAME} lists it"
    content = content_of(model / MANIFEST_NAME)
    if content is None:
        return "cannot be read"
    found = hashlib.sha256(content).hexdigest()
    alike = sum(1 for mine, listed in zip(found, wanted.sha256 or "", strict=False) if mine == listed)
    return None if alike >= _ALIKE else f"its SHA-256 is {found}; {SUMS_NAME} says {wanted.sha256}"


def content_of(path: Path, limit: int = JSON_CAP) -> bytes | None:
    """The bytes of a file that may be damaged; None where it cannot be read, or has more than ``limit``."""
    try:
        return read_file(path, limit)
    except CheckpointError:
        return None


@dataclass(frozen=True, slots=True)
class Means:
    """What a model is mended from, and how; the options are those of `apply`, and decide no byte."""

    base: Path
    delta: Path
    memory_limit: int
    threads: int
    direct: bool
    device: str
    registry: Sequence[Path]
    tell: Callable[[str], None]
    progress: Progress | None


def manifest_anew(model: Path, reason: str, means: Means) -> bytes:
    """The manifest of a model, from the inputs it was made of; its other files are what SHA256SUMS says.

    ``reason`` is what is wrong with the one that there is.

    What nothing but the manifest says (the time, the options) is taken of what is left of it, if it then is, byte for
    byte, what SHA256SUMS says; else the time is now, and the options are some that make the same files.

    Raises:
        IntegrityError: another file is not what SHA256SUMS says, or the sum of base and delta is not.
        BaylingDeltaError: an input cannot be read or does not fit.
    """
    sums = read_sums(model / SUMS_NAME)
    others = replace(sums, files={name: file for name, file in sums.files.items() if name != MANIFEST_NAME})
    found = digest_model(
        model,
        list(others.files),
        memory_limit=means.memory_limit,
        threads=means.threads,
        progress=means.progress,
        strict=False,
    )
    damage = [*found.problems, *differences(others, model, None, {}, found.files)]
    if damage := [*damage, *stray_files(found.checkpoint, [others])]:
        error = IntegrityError([Problem("model", str(model / MANIFEST_NAME), reason), *damage])
        error.hint = (
            "with the manifest damaged too, nothing says how to mend the rest; 'apply' makes the model elsewhere"
        )
        raise error

    old = content_of(model / MANIFEST_NAME) or b""
    left = {key: mark[1].decode() for key, pattern in _MARKS.items() if (mark := re.search(pattern, old))}
    allow = re.findall("[a-z_]+", left.get("allow", ""))
    prepared, head = _prepared_alike(means, left, allow, found, sums)
    plan = prepared.plan
    outcome = engine.run(
        plan,
        None,
        threads=means.threads,
        direct=means.direct,
        additions=additions_on(means.device),
        progress=means.progress,
    )
    records = look_up_inputs(prepared, outcome)
    refuse(result_problems(prepared, outcome, records, model, None, require_recorded=False), allow)
    refuse(_sum_problems(model, outcome, others))

    wanted = weights_digest(result_digests(plan, outcome)) if "expected" in left else None
    manifest, beside = written_manifest(plan, outcome, records, prepared.registry, wanted, head)
    names = [name for name, _ in small_files(plan, manifest, beside, records["delta"].release)]
    refuse(_name_problems(model, {*names, *outcome.result.files}, others))
    manifest["result"]["files"] += [
        file_entry(name, found.files[name].size, found.files[name].sha256) for name in names
    ]
    if "created" in left:
        then = to_json({**manifest, "created": left["created"]}).encode()
        if hashlib.sha256(then).hexdigest() == sums.files[MANIFEST_NAME].sha256:
            return then
    return to_json(manifest).encode()


def _prepared_alike(
    means: Means, left: Mapping[str, str], allow: Sequence[str], found: Found, sums: Expectation
) -> tuple[Prepared, dict[str, Any]]:
    """The sum whose weight files are laid out as those that there are, and how its manifest begins.

    The options are tried as the manifest says, as is usual, and as the files are.

    Raises:
        BaylingDeltaError: there is none; what kept the first from being one.
    """
    weights: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    for ref in found.checkpoint.tensors.values():
        weights[ref.views[0].file.name] += ref.elements * DTYPES[ref.dtype]
        tensors[ref.views[0].file.name] += 1
    # A tensor that is alone in its file may be larger than a file should be.
    as_it_is = max((size for name, size in weights.items() if tensors[name] > 1), default=1)
    sizes = [int(left.get("max_shard_size", DEFAULT_SHARD_SIZE)), DEFAULT_SHARD_SIZE, as_it_is]
    dtypes = [left.get("dtype"), None, *({ref.dtype for ref in found.checkpoint.tensors.values()} & {*FLOATS})]
    base, delta = local_copies([means.base, means.delta], tell=means.tell)
    known = load_releases(means.registry)
    message = f"the sum with {delta} would have other files than {sums.source} lists; is it another model's?"
    reasons: list[BaylingDeltaError] = []
    for recipe in dict.fromkeys([left["recipe"] if left.get("recipe") in RECIPES else None, None]):
        try:
            for dtype, size in product(dict.fromkeys(dtypes), dict.fromkeys(sizes)):
                options: dict[str, Any] = {"dtype": dtype, "max_shard_size": size, "allow": allow}
                prepared = prepare(base, delta, None, known, recipe=recipe, memory_limit=means.memory_limit, **options)
                if _is_laid_out(prepared.plan, found):
                    return prepared, manifest_head("apply", prepared.plan.recipe.name, options)
        except BaylingDeltaError as error:
            reasons.append(error)
    raise next(iter(reasons), MismatchError(Problem("shape", str(base), message)))


def _is_laid_out(plan: Plan, found: Found) -> bool:
    """Whether a result's weight files would have the names, sizes and headers of those that there are."""
    sizes = {file.path.name: file.size for file in found.checkpoint.files}
    if sizes != {file.name: file.size for file in plan.files}:
        return False
    for file in plan.files:
        with open_source(found.checkpoint.directory / file.name) as source:
            if read_bytes(source, 0, len(file.header)) != file.header:
                return False
    return True


def _sum_problems(model: Path, outcome: Outcome, sums: Expectation) -> list[Problem]:
    """The weight files that the sum made anew is not."""
    return [
        Problem(
            "digest",
            str(model / name),
            f"the sum made anew has the SHA-256 {digest}, {sums.source} says {sums.files[name].sha256}; "
            "nothing was touched: are these the base and the delta that it was made of?",
        )
        for name, digest in outcome.result.files.items()
        if digest != sums.files[name].sha256
    ]


def _name_problems(model: Path, names: set[str], sums: Expectation) -> list[Problem]:
    """The files beside the weights that the sum made anew would have, and SHA256SUMS does not list, and the reverse."""
    return [
        Problem("model", str(model / name), f"{what}; nothing was touched")
        for what, others in (
            (f"is in {sums.source}, and does not come of this base and delta", sums.files.keys() - names),
            (f"comes of this base and delta, and is not in {sums.source}", names - sums.files.keys()),
        )
        for name in sorted(others)
    ]
