"""The registry: every release that is known, found by name, by the digest of a file, or by its exact size.

What is known is data, one file a release in ``data/releases``; docs/releases.md says how to add one's own.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bayling_delta.checkpoint import read_table
from bayling_delta.errors import CheckpointError, Problem, UsageError, refuse
from bayling_delta.release_entry import Form, RecordedFile, Release, read_entry
from bayling_delta.sources import exists, list_directory, read_file
from bayling_delta.tensors import natural_key

__all__ = ["Record", "Registry", "accepted_sha256", "load_releases"]

_DATA: Final = Path(__file__).parent / "data"
_CAP: Final = 1 << 20
"""Bytes of an entry; the largest that comes with the program has a thirtieth."""


@dataclass(frozen=True, slots=True)
class Record:
    """A file of which something is recorded, and the place in the registry."""

    release: Release
    form: Form
    file: RecordedFile


@dataclass(frozen=True, slots=True)
class Registry:
    """All releases that are known."""

    releases: tuple[Release, ...]
    """Sorted by name, numbers as numbers; those that come with the program before a user's own."""
    own: frozenset[str]
    """The names of a user's own."""
    _names: Mapping[str, Release]
    """By every name, alias and id of the Hub, in lower case."""
    _digests: Mapping[tuple[str, str], tuple[Record, ...]]
    """By algorithm and hexadecimal digest."""
    _sizes: Mapping[int, tuple[Record, ...]]
    """Weight files by exact size."""

    def find(self, text: str) -> Release | None:
        """The release of this name, alias or id of the Hub, upper and lower case alike."""
        return self._names.get(text.lower())

    def get(self, text: str) -> Release:
        """The same, for a name that a user gave.

        Raises:
            UsageError: it is not known; with the names that are most like it.
        """
        release = self.find(text)
        if release is None:
            alike = self.suggestions(text)
            advice = f"did you mean {' or '.join(alike)}?" if alike else "'bayling-delta releases' lists them"
            raise UsageError(Problem("option", text[:80], f"is no release that is known; {advice}"))
        return release

    def suggestions(self, text: str) -> tuple[str, ...]:
        """The names of up to three releases that may have been meant."""
        from difflib import get_close_matches

        known: dict[str, str] = {}
        for name, release in self._names.items():
            known.setdefault(name.rpartition("/")[2], release.name)
        wanted = text.lower().rpartition("/")[2]
        alike = get_close_matches(wanted, known, n=6, cutoff=0.6)
        alike += [name for name in known if len(wanted) > 2 and (wanted in name or name in wanted)]
        return tuple(dict.fromkeys(known[name] for name in alike))[:3]

    def recorded(self, digest: str, algorithm: str = "sha256") -> tuple[Record, ...]:
        """Every record of a file with this digest, in hexadecimal; ``algorithm`` is ``sha256`` or ``md5``."""
        return self._digests.get((algorithm, digest.lower()), ())

    def identify(self, digest: str, algorithm: str = "sha256") -> tuple[Record, ...]:
        """The same of weight files alone: what a file is. Other files are shared by models that differ."""
        return tuple(record for record in self.recorded(digest, algorithm) if record.file.is_weights)

    def of_size(self, size: int) -> tuple[Record, ...]:
        """The weight files that have exactly so many bytes. That proves nothing: it is a reason to take a digest."""
        return self._sizes.get(size, ())

    def with_weights(self, digest: str) -> tuple[Release, ...]:
        """The releases whose weights digest, ``sha256:<hex>``, this is."""
        return tuple(each for each in self.releases if each.weights and each.weights.digest == digest)

    def fits(self, base: Release, delta: Release) -> bool:
        """Whether a delta, or files to be combined by XOR, were made against this base."""
        return base.weights_of in delta.bases


def accepted_sha256(forms: Iterable[Form], name: str) -> frozenset[str] | None:
    """What the SHA-256 of a file of this name can be in one of these forms of a release.

    None where that is not known: a form has the file, and nobody recorded its digest; or no form has it.
    """
    accepted: set[str] = set()
    for form in forms:
        rows = [file for file in form.files if file.name == name]
        digests = {digest for file in rows for digest in file.sha256}
        if rows and not digests:
            return None
        accepted |= digests
    return frozenset(accepted) if accepted else None


# reading it


def load_releases(extra: Sequence[Path] = ()) -> Registry:
    """Read the releases that come with the program, and entries of a user's own.

    Raises:
        CheckpointError: with everything that is wrong with a user's entries, each with the place of its field.
    """
    prompts = _read_prompts()
    folder = _DATA / "releases"
    problems: list[Problem] = []
    entries = [
        (path, release)
        for path in (*(folder / name for name in list_directory(folder)), *extra)
        if (release := _read_file(path, prompts, problems))
    ]
    own = frozenset(release.name for path, release in entries if path.parent != folder)
    names = _name(entries, problems)
    problems += _dangling(entries)
    refuse(problems)
    order = sorted((release for _, release in entries), key=lambda each: (each.name in own, natural_key(each.name)))
    return Registry(tuple(order), own, names, *_index(order))


def _read_prompts() -> dict[str, dict[str, Any]]:
    """The prompts that entries name rather than hold, as several releases share them."""
    folder = _DATA / "prompts"
    prompts = {
        name.removesuffix(".json"): read_table(folder / name)
        for name in list_directory(folder)
        if name.endswith(".json")
    }
    for name, prompt in prompts.items():
        template = folder / f"{name}.jinja"
        if exists(template):
            prompt["chat_template"] = read_file(template, _CAP).decode()
    return prompts


def _read_file(path: Path, prompts: Mapping[str, Any], problems: list[Problem]) -> Release | None:
    try:
        document = read_table(path, _CAP)
    except CheckpointError as error:
        for problem in error.problems:
            what = problem.message.partition("; download it again")[0]  # an entry is nobody's download
            problems.append(problem if problem.kind == "not_found" else Problem("registry", str(path), what))
        return None
    named = document.get("prompt")
    if isinstance(named, str) and named in prompts:
        document["prompt"] = prompts[named]
    release, faults = read_entry(document)
    problems += [Problem("registry", str(path), fault) for fault in faults]
    return release


def _name(entries: Sequence[tuple[Path, Release]], problems: list[Problem]) -> dict[str, Release]:
    """Every release by all its names; two that share one are a problem, as no entry hides another."""
    names: dict[str, Release] = {}
    for path, release in entries:
        for name in (release.name, *release.aliases, *release.hub):
            other = names.setdefault(name.lower(), release)
            if other is not release:
                message = f"has the name {name!r}, which another entry has ({other.title}); choose another"
                problems.append(Problem("registry", str(path), message))
    return names


def _dangling(entries: Sequence[tuple[Path, Release]]) -> Iterator[Problem]:
    """Names of releases that no entry has, or that cannot stand where they do."""
    known = {release.name: release for _, release in entries}
    for path, release in entries:
        for where, names in (
            ("bases", release.bases),
            ("result", (release.result,)),
            ("equals", (release.equals,)),
            ("related", release.related),
        ):
            for name in names:
                if name is not None and name not in known:
                    yield Problem("registry", str(path), f"{where}: there is no release {name!r}")
                elif name == release.name:
                    yield Problem("registry", str(path), f"{where}: {name!r} is the entry itself; leave it out")
        if release.equals in known.keys() - {release.name} and known[release.equals].equals:
            yield Problem("registry", str(path), f"equals: {release.equals!r} has another's weights itself; name that")


def _index(
    releases: Sequence[Release],
) -> tuple[dict[tuple[str, str], tuple[Record, ...]], dict[int, tuple[Record, ...]]]:
    """Every recorded file by its digests, and every weight file by its size."""
    digests: dict[tuple[str, str], tuple[Record, ...]] = {}
    sizes: dict[int, tuple[Record, ...]] = {}
    for release in releases:
        for form in release.forms:
            for file in form.files:
                record = Record(release, form, file)
                for algorithm, values in (("sha256", file.sha256), ("md5", file.md5)):
                    for digest in values:
                        digests[algorithm, digest] = (*digests.get((algorithm, digest), ()), record)
                if file.is_weights and file.size is not None:
                    sizes[file.size] = (*sizes.get(file.size, ()), record)
    return digests, sizes
