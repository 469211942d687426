"""Which releases the inputs are, by name or small tensors before the run and by digests in it, and what follows.

A release is recognised by the id of the Hub that a directory was fetched from, by the digests of its norm weights,
or by the digest of a weight file. Shapes, sizes and names recognise nothing: they are shared by models that differ.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayling_delta.checkpoint import Checkpoint, directory_of
from bayling_delta.downloads import expected_sha256, origin, record_source
from bayling_delta.engine import Digests
from bayling_delta.errors import NoRecordError, Problem
from bayling_delta.expectations import Expectation, ExpectedFile
from bayling_delta.hub import is_in_cache, parse_id
from bayling_delta.looking import Look
from bayling_delta.manifest import OF_THE_HUB
from bayling_delta.recipes import Recipe
from bayling_delta.release_entry import Form, Release
from bayling_delta.releases import Record, Registry, accepted_sha256
from bayling_delta.sources import exists

__all__ = [
    "FileRecords",
    "Identity",
    "expectation_of",
    "files_worth_a_digest",
    "identify",
    "identify_by_name",
    "look_up",
    "pairing_notes",
    "pairing_problems",
    "recipe_problems",
    "sign_problems",
]


@dataclass(frozen=True, slots=True)
class Identity:
    """The release that a checkpoint was recognised as."""

    release: Release
    forms: tuple[Form, ...]
    """The forms of it that this can be."""
    by: str
    """What it was recognised by, in words."""

    def __str__(self) -> str:
        return f"{self.release.title} (by {self.by})"


# before the run


def identify_by_name(path: Path, registry: Registry) -> Identity | None:
    """Recognise an id of the Hub, or a place in its cache, before anything is fetched or opened."""
    if found := origin(directory_of(path)):
        repo, by = found.repo, f"its place in the Hub's cache, {found.repo}"
    elif not exists(path) and (hub_id := parse_id(path)):
        repo, by = hub_id.repo, f"its id on the Hub, {hub_id.repo}"
    else:
        return None
    release = registry.find(repo)
    if release is None:
        return None
    forms = tuple(form for form in release.forms if repo.lower() in map(str.lower, form.hub))
    return Identity(release, forms or release.forms, by)


def identify(checkpoint: Checkpoint, look: Look, registry: Registry) -> Identity | None:
    """Recognise a checkpoint without reading more of it than ``look`` has."""
    if named := identify_by_name(checkpoint.directory, registry):
        return named
    return _by_small_tensors(look, registry)


def _by_small_tensors(look: Look, registry: Registry) -> Identity | None:
    """The release that has most small tensors in common with what was looked at, all of them equal.

    One tensor alone proves nothing where more are on record, nor do tensors that two models share.
    """
    found: dict[int, list[Release]] = {}
    for release in registry.releases:
        known = release.weights.small_tensors if release.weights else {}
        common = known.keys() & look.small_digests.keys()
        equal = all(known[name] == look.small_digests[name] for name in common)
        if equal and (len(common) > 1 or len(common) == len(known) == 1):
            found.setdefault(len(common), []).append(release)
    if not found:
        return None
    count = max(found)
    best, *others = found[count]
    if any(other.weights_of != best.weights_of for other in others):
        return None
    by = f"the digests of {count} small tensors" if count > 1 else "the digest of 1 small tensor"
    return Identity(best, best.forms, by)


def files_worth_a_digest(checkpoint: Checkpoint, identity: Identity | None, registry: Registry) -> set[Path]:
    """The weight files whose digest somebody may have recorded: by their exact size, by name, or on the Hub."""
    named = {file.name for form in identity.forms for file in form.files if file.sha256} if identity else set()
    return {
        file.path
        for file in checkpoint.files
        if file.path.name in named or registry.of_size(file.size) or expected_sha256(file.path)
    }


def pairing_problems(
    base: Path, base_identity: Identity | None, delta: Path, delta_identity: Identity | None, registry: Registry
) -> list[Problem]:
    """What recognised inputs, of which the paths are told, say against their being added."""
    problems: list[Problem] = []
    if base_identity and base_identity.release.kind == "delta":
        message = f"is {base_identity}, which is a delta, and a base is a whole model"
        if base_identity.release.bases:
            message += f"; give {_bases(base_identity, registry)} instead, and this as the delta"
        problems.append(Problem("looks_like_delta", str(base), message))
    if delta_identity and delta_identity.release.kind in ("full", "base"):
        message = f"is {delta_identity}: full weights already, with nothing to apply; use them as they are"
        problems.append(Problem("looks_like_model", str(delta), message))
    if delta_identity and (
        delta_identity.release.kind in ("xor", "other")
        or (delta_identity.release.kind == "delta" and delta_identity.release.recipe is None)
    ):
        why = "for which there is no rule here"
        if delta_identity.release.kind == "xor":
            why = "whose files are combined with the base's byte by byte (XOR), which only the publisher's script does"
        message = f"is {delta_identity}, {why}; see 'bayling-delta releases {delta_identity.release.name}'"
        problems.append(Problem("no_recipe", str(delta), message))
    if (
        base_identity
        and delta_identity
        and base_identity.release.kind != "delta"
        and delta_identity.release.bases
        and not registry.fits(base_identity.release, delta_identity.release)
    ):
        message = f"is {base_identity}; {_made_against(delta_identity, registry)}; give that as the base"
        problems.append(Problem("wrong_base", str(base), message))
    return problems


def pairing_notes(base: Checkpoint, base_identity: Identity | None, delta: Identity | None) -> list[str]:
    """What to tell of a base that is a whole model, where nobody knows which base the delta was made against."""
    kind = base_identity.release.kind if base_identity else None
    if kind not in ("full", "xor") or (delta and delta.release.bases):
        return []
    what = "a full model" if kind == "full" else "a model's files to be combined by XOR"
    return [f"{base.path}: {base_identity} is {what}, not a known base; is it the one that you mean?"]


def _made_against(delta: Identity, registry: Registry) -> str:
    return f"{delta.release.title} was made against {_bases(delta, registry)}"


def _bases(delta: Identity, registry: Registry) -> str:
    known = (registry.find(name) for name in delta.release.bases)
    return " or ".join(release.title for release in known if release)


def recipe_problems(delta: Checkpoint, identity: Identity | None, recipe: Recipe) -> list[Problem]:
    """The finding that the release that a delta is has another recipe than the sum is made by."""
    wanted = identity.release.recipe if identity else None
    if wanted in (None, recipe.name):
        return []
    message = f"is {identity}, whose recipe is {wanted}, and the sum is made by {recipe.name}; give it with --recipe"
    return [Problem("recipe", str(delta.path), message)]


def sign_problems(base: Checkpoint, look: Look, delta: Identity | None, registry: Registry) -> list[Problem]:
    """Signs that a base is not the one that a known delta was made against; they can be overruled."""
    known = [release for name in delta.release.bases if (release := registry.find(name))] if delta else []
    if delta is None or not known:
        return []
    made = _made_against(delta, registry)
    problems = [
        Problem("wrong_base", odd["where"], f"{odd['message']}. {made}; give that as the base")
        for odd in look.odd
        if odd["kind"] == "generation"
    ]
    if all(release.weights and release.weights.dtype == "F16" for release in known):
        rounded = [(odd["where"], odd["message"]) for odd in look.odd if odd["kind"] == "bfloat16"]
        if not rounded and any(ref.dtype == "BF16" for ref in base.weights.values()):
            rounded = [(str(base.path), "has weights that are stored as BF16, which has 3 bits less than float16")]
        advice = f"{made}, in float16; give Meta's own files, or a conversion that kept them so"
        problems += [Problem("bfloat16", where, f"{message}. {advice}") for where, message in rounded]
    return problems


# in the run


@dataclass(frozen=True, slots=True)
class FileRecords:
    """What is on record of a checkpoint's weight files, once they have been digested."""

    identity: Identity | None
    """What the files are, if that is known by now."""
    verification: tuple[dict[str, Any], ...]
    """As the manifest has it: an entry for each file."""
    problems: tuple[Problem, ...]
    """Files that should be on record with another digest."""
    unrecorded: tuple[str, ...]
    """The names of files that match no record."""

    @property
    def release(self) -> Release | None:
        """The release that the files are of, if that is known."""
        return self.identity.release if self.identity else None


def look_up(
    role: str, checkpoint: Checkpoint, digests: Digests, identity: Identity | None, registry: Registry
) -> FileRecords:
    """Look the digests of a checkpoint's weight files up, as far as they were taken.

    A file that is on no record proves nothing, unless the release is known, by name or by a file beside it, and has
    another digest for this very file.
    """
    names = [file.path.name for file in checkpoint.files]
    found = {name: _recorded(name, digests, registry) for name in names}
    identity = _by_digests(found) or identity
    entries: list[dict[str, Any]] = []
    problems: list[Problem] = []
    unrecorded: list[str] = []
    for name in names:
        digest = digests.files.get(name)
        matches = list(_matches(checkpoint, name, digest, found[name]))
        if not found[name] and not (matches and is_in_cache(checkpoint.directory)):
            unrecorded.append(name)
        if not matches:
            matches = [(None, None)]
            accepted = accepted_sha256(identity.forms, name) if identity and digest else None
            if identity and accepted:
                message = f"has the SHA-256 {digest}; {identity} has {' or '.join(sorted(accepted))} on record"
                problems.append(Problem("digest", str(checkpoint.directory / name), message))
        entries += [
            {
                "what": f"{role}: {name}",
                "against": against,
                "outcome": "match" if against else "no record",
                "source": source,
            }
            for against, source in matches
        ]
    return FileRecords(identity, tuple(entries), tuple(problems), tuple(unrecorded))


def _recorded(name: str, digests: Digests, registry: Registry) -> tuple[Record, ...]:
    """What is on record with a file's digests."""
    found = registry.identify(digests.files.get(name, ""))
    return found or registry.identify(digests.md5.get(name, ""), "md5")


def _by_digests(found: Mapping[str, Sequence[Record]]) -> Identity | None:
    """The release that has most of the files on record, in the forms that have them; the first of several."""
    files: dict[str, set[str]] = {}
    for name, records in found.items():
        for record in records:
            files.setdefault(record.release.name, set()).add(name)
    if not files:
        return None
    best = max(files, key=lambda release: len(files[release]))
    matched = [record for records in found.values() for record in records if record.release.name == best]
    forms = {record.form.title: record.form for record in matched}
    return Identity(matched[0].release, tuple(forms.values()), f"the digest of {min(files[best])}")


def _matches(
    checkpoint: Checkpoint, name: str, sha256: str | None, records: Sequence[Record]
) -> Iterator[tuple[str | None, str | None]]:
    """What a file's digest was held against and found the same: (what it is, where that is recorded)."""
    if sha256 is not None and expected_sha256(checkpoint.directory / name) == sha256:
        yield OF_THE_HUB, record_source(checkpoint.directory)
    for record in records:
        cited = "; ".join(record.release.sources[key] for key in record.file.source or record.form.source)
        yield f"{record.release.title}: {record.file.name}", cited


# a release as what a model should be


def expectation_of(release: Release, model: Checkpoint) -> Expectation:
    """What is on record of a release, for a model that claims to be it.

    Its weights digest, which holds in any container; else the digests of the weight files, of all of them, in the
    forms whose files have these names.

    Raises:
        NoRecordError: nobody has recorded either.
    """
    source = f"the registry's record of {release.title}"
    if release.weights and release.weights.digest:
        return Expectation(source, release.weights.digest)
    names = frozenset(file.path.name for file in model.files)
    forms = [form for form in release.forms if form.weight_files == names]
    files = {name: _expected_file(forms, name) for name in names}
    missing = sorted(name for name, file in files.items() if file is None)
    if missing:
        unrecorded = f"; not published: {'; '.join(release.unrecorded)}" if release.unrecorded else ""
        message = f"nobody has recorded a digest of {', '.join(missing)} of {release.title}{unrecorded}"
        raise NoRecordError(Problem("no_record", str(model.path), message))
    return Expectation(
        source, files={name: file for name, file in files.items() if file}, forms=tuple(map(_digests_by_name, forms))
    )


def _digests_by_name(form: Form) -> dict[str, frozenset[str]]:
    """What the SHA-256 or the MD5 of each weight file of a form can be."""
    rows = [file for file in form.files if file.is_weights]
    return {
        name: frozenset(digest for file in rows if file.name == name for digest in (*file.sha256, *file.md5))
        for name in form.weight_files
    }


def _expected_file(forms: Sequence[Form], name: str) -> ExpectedFile | None:
    accepted = sorted(accepted_sha256(forms, name) or ())
    if accepted:
        return ExpectedFile(accepted[0], or_sha256=frozenset(accepted))
    md5 = {digest for form in forms for file in form.files if file.name == name for digest in file.md5}
    return ExpectedFile(md5=md5.pop()) if len(md5) == 1 else None
