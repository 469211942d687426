"""Checkpoints of the Hub: an id is looked up, what is needed of it is fetched into the Hub's cache, and its place there
is returned; everything else works with that directory.

The one module that uses the network, and only by way of huggingface_hub: its cache, tokens, mirrors (HF_ENDPOINT),
offline mode (HF_HUB_OFFLINE), retries and progress bars. The cache is written by huggingface_hub alone. A revision is
resolved to a commit once, and everything is fetched from that commit.
"""

import errno
import re
import shlex
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from bayling_delta.checkpoint import LAYOUTS, read_index, stays_in_directory
from bayling_delta.companions import COPIED
from bayling_delta.downloads import download_again, expected_sha256, origin
from bayling_delta.errors import KINDS, CheckpointError, Problem, refuse
from bayling_delta.files import free_bytes, is_inside
from bayling_delta.manifest import MANIFEST_NAME, SUMS_NAME
from bayling_delta.sources import exists, file_size, is_directory, list_directory, read_file

__all__ = ["HubId", "is_in_cache", "local_copies", "parse_id"]

Tell = Callable[[str], None]
"""Given what a user should know of a download, a sentence at a time."""

_ID: Final = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)"
    r"(?:@(?P<revision>\w[\w.+-]*(?:/\w[\w.+-]*)*?))?"
    r"(?:/(?P<file>[\w.-]+\.(?:safetensors|bin|index\.json)))?",
    re.ASCII,
)
_FILE_SUFFIXES: Final = (".safetensors", ".bin", ".json", ".pth", ".pt", ".gguf")
"""Endings of a file's name: ``base/pytorch_model.bin`` is a file that is not there, and no repository."""
_RECORDS: Final = (MANIFEST_NAME, SUMS_NAME)
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LATER: Final = "; run again later"
_LOGIN: Final = "run 'hf auth login', or set HF_TOKEN"


@dataclass(frozen=True, slots=True)
class HubId:
    """A repository of the Hub, or one of its files, as a user names it: ``owner/name[@revision][/file]``."""

    text: str
    repo: str
    """``owner/name``."""
    revision: str
    """A branch, a tag, ``refs/pr/N`` or a commit."""
    file: str | None
    """A weights file or a shard index."""


@dataclass(frozen=True, slots=True)
class _File:
    """What the Hub says of a file."""

    size: int | None
    """Bytes."""
    sha256: str | None
    """None for a file that is not stored with Git LFS."""


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """One commit of a repository, and the files at its top."""

    hub_id: HubId
    commit: str
    files: dict[str, _File]
    folder: Path
    """The repository's place in the cache."""
    unreachable: str | None = None
    """Why the Hub could not be asked, and `files` are those in the cache."""

    def path(self, name: str) -> Path:
        return self.folder / "snapshots" / self.commit / name

    def has(self, name: str) -> bool:
        """Whether the file is in the cache as the Hub says it is, as far as can be told without reading it."""
        file, size = self.files[name], file_size(self.path(name))
        if size is None or file.size not in (None, size):
            return False
        return file.sha256 is None or expected_sha256(self.path(name)) in (None, file.sha256)


def parse_id(path: Path) -> HubId | None:
    """Read a path as an id of the Hub; None if it cannot be one.

    ``owner/name``, ``owner/name@revision``, and either with the name of a weights file or an index after it.
    """
    found = _ID.fullmatch(path.as_posix())
    if not found or found["repo"].endswith(_FILE_SUFFIXES) or "--" in found["repo"] or ".." in found[0]:
        return None
    return HubId(found[0], found["repo"], found["revision"] or "main", found["file"])


def local_copies(
    paths: Sequence[Path], *, fetch: bool = True, also: Sequence[Problem] = (), tell: Tell | None = None
) -> list[Path]:
    """Return the paths, each that is an id of the Hub replaced by its place in the Hub's cache.

    Whatever exists on the disk is no id. What an id needs is fetched: configuration, tokenizer and records, then the
    weight files of one container, chosen as `open_checkpoint` chooses. Without ``fetch``, weights that are not in
    the cache are a problem. ``also`` are problems found elsewhere, which end it before anything is fetched. ``tell``
    is given what a user should know; with it, huggingface_hub shows its progress bars on a terminal.

    Raises:
        CheckpointError: there is no such repository, revision or file; the Hub wants a licence accepted or a token;
            it cannot be reached, and the cache does not have everything.
        OutputError: the cache cannot be written, or its disk is too small.
    """
    ids = {path: found for path in paths if not exists(path) and (found := parse_id(path))}
    if not ids:
        return list(paths)
    with _calm(bars=tell is not None):
        snapshots = _look_up(list(ids.values()), also, tell)
        for snapshot in snapshots:
            _fetch(snapshot, _small_files(snapshot), first=True)
        weights = [_weight_files(snapshot) for snapshot in snapshots]
        wanted = [
            (snapshot, [name for name in names if not snapshot.has(name)])
            for snapshot, names in zip(snapshots, weights, strict=True)
        ]
        refuse([*_unfetched(wanted, fetch=fetch), *_room_problems(wanted)])
        for snapshot, names in wanted:
            if names and tell:
                size, into = _size_text(snapshot, names), snapshot.folder.parent
                tell(f"{_commit_text(snapshot)}: {size} of weights are fetched into {into}")
            for name in names:
                if tell:
                    tell(f"fetching {name}, {_size_text(snapshot, [name])}")
                _fetch(snapshot, [name])
    places = {path: snapshot.path(snapshot.hub_id.file or "") for path, snapshot in zip(ids, snapshots, strict=True)}
    return [places.get(path, path) for path in paths]


def is_in_cache(directory: Path) -> bool:
    """Whether a directory is a snapshot in this user's cache of the Hub, which huggingface_hub alone writes.

    One elsewhere that is named like it may have been made by anybody, and so may the metadata of downloads.
    """
    if origin(directory) is None:
        return False
    from huggingface_hub import constants

    return is_inside(directory, Path(constants.HF_HUB_CACHE))


# looking up


def _look_up(ids: Sequence[HubId], also: Sequence[Problem], tell: Tell | None) -> list[_Snapshot]:
    """The commit that each id names, with its files; by the cache where the Hub cannot be reached."""
    problems = list(also)
    snapshots: list[_Snapshot] = []
    for hub_id in ids:
        try:
            snapshots.append(_ask(hub_id))
        except CheckpointError as error:
            problem = error.problems[0]
            if problem.kind != "network":
                problems.append(problem)
            elif cached := _cached(hub_id, problem.message):
                snapshots.append(cached)
                if tell:
                    why = problem.message.removesuffix(_LATER)
                    tell(f"{_commit_text(cached)} is taken from the Hub's cache: {why}")
            else:
                what = (
                    "is no file or directory here: is it spelled right? As an id of the Hub it is not in the cache, "
                    f"and {problem.message}"
                )
                problems.append(replace(problem, message=what))
    refuse(problems)
    return snapshots


def _ask(hub_id: HubId) -> _Snapshot:
    from huggingface_hub import HfApi, constants

    with _reported(hub_id):
        info = HfApi().model_info(
            hub_id.repo, revision=hub_id.revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        )
    files = {
        file.rfilename: _File(file.size, file.lfs.sha256 if file.lfs else None)
        for file in info.siblings or []
        if stays_in_directory(file.rfilename)
    }
    if not _COMMIT.fullmatch(info.sha or ""):
        raise CheckpointError(Problem("network", hub_id.text, f"{_host()} does not say which commit this is"))
    return _Snapshot(hub_id, info.sha or "", files, _folder(hub_id))


def _cached(hub_id: HubId, unreachable: str) -> _Snapshot | None:
    """What the cache has of a revision; None if nothing."""
    folder = _folder(hub_id)
    commit, reference = hub_id.revision, folder / "refs" / hub_id.revision
    if file_size(reference) is not None:
        commit = read_file(reference, 4096).decode("ascii", "replace").strip()
    directory = folder / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not is_directory(directory):
        return None
    files = {name: _File(None, None) for name in list_directory(directory)}
    return _Snapshot(hub_id, commit, files, folder, unreachable)


def _folder(hub_id: HubId) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=hub_id.repo, repo_type="model")


# choosing


def _small_files(snapshot: _Snapshot) -> list[str]:
    """Configuration, tokenizer, and records of the publisher with the model card, which these list."""
    recorded = not snapshot.files.keys().isdisjoint(_RECORDS)
    names = (*COPIED, *_RECORDS, *(["README.md"] if recorded else []))
    return [name for name in names if name in snapshot.files]


def _weight_files(snapshot: _Snapshot) -> list[str]:
    """The weight files to fetch, once the index that names them is here: those that `open_checkpoint` would open.

    Raises:
        CheckpointError: the repository has none, or not the file that was named.
    """
    named = snapshot.hub_id.file
    if named and named not in snapshot.files:
        raise CheckpointError(_absent(snapshot, named))
    if named:
        return _indexed(snapshot, named) if named.endswith(".json") else [named]
    for _, single, index, pattern in LAYOUTS:
        if single in snapshot.files:
            return [single]
        if index in snapshot.files:
            return _indexed(snapshot, index)
        if shards := [name for name in snapshot.files if re.fullmatch(pattern, name)]:
            return shards
    raise CheckpointError(_absent(snapshot, "model*.safetensors and no pytorch_model*.bin"))


def _indexed(snapshot: _Snapshot, index: str) -> list[str]:
    _fetch(snapshot, [index])
    placed, problems = read_index(snapshot.path(index))
    refuse(problems)
    refuse([_absent(snapshot, f"{name}, which its {index} names") for name in placed if name not in snapshot.files])
    return [index, *placed]


def _absent(snapshot: _Snapshot, what: str) -> Problem:
    """The finding that a repository, or what the cache has of it, lacks something."""
    message = f"{_commit_text(snapshot)} has no {what}"
    if snapshot.unreachable is None:
        return Problem("not_found", snapshot.hub_id.text, message)
    return Problem("network", snapshot.hub_id.text, f"the cache's {message}, and {snapshot.unreachable}")


_Wanted = Sequence[tuple[_Snapshot, Sequence[str]]]
"""Of each snapshot, the weight files that are to be fetched."""


def _unfetched(wanted: _Wanted, *, fetch: bool) -> list[Problem]:
    """The findings that weights are not in the cache, and will not come there."""
    problems: list[Problem] = []
    for snapshot, names in wanted:
        if snapshot.unreachable is not None:
            problems += [_absent(snapshot, name) for name in names]
        elif names and not fetch:
            command = ["hf", "download", snapshot.hub_id.repo, *names, "--revision", snapshot.commit]
            what = (
                f"{_size_text(snapshot, names)} of weights are not in the Hub's cache, and are not fetched for this; "
            )
            message = f"{what}fetch them first: {shlex.join(command)}"
            problems.append(Problem("not_found", snapshot.hub_id.text, message))
    return problems


def _room_problems(wanted: _Wanted) -> list[Problem]:
    """The finding that the cache's disk is too small for what is to be fetched."""
    needed = sum(snapshot.files[name].size or 0 for snapshot, names in wanted for name in names)
    if not needed:
        return []
    cache = wanted[0][0].folder.parent
    free = free_bytes(cache)
    if free >= needed:
        return []
    what = f"has {free / 1e9:,.1f} GB free, the download needs {needed / 1e9:,.1f} GB; HF_HOME names another place"
    return [Problem("disk_space", str(cache), what)]


def _size_text(snapshot: _Snapshot, names: Sequence[str]) -> str:
    size = sum(snapshot.files[name].size or 0 for name in names)
    return f"{size / 1e9:,.2f} GB" if size >= 10**9 else f"{size / 1e6:,.1f} MB"


def _commit_text(snapshot: _Snapshot) -> str:
    return f"{snapshot.hub_id.repo}@{snapshot.commit}"


# fetching


def _fetch(snapshot: _Snapshot, names: Sequence[str], *, first: bool = False) -> None:
    """Bring files into the cache. The first of a repository is asked for by revision, which the cache then remembers.

    Raises:
        CheckpointError: a file cannot be fetched, or is not the one that the Hub described before.
        OutputError: the cache cannot be written.
    """
    if snapshot.unreachable is not None:
        return
    from huggingface_hub import hf_hub_download

    for place, name in enumerate(names):
        by_revision = first and not place
        if snapshot.has(name) and not by_revision:
            continue
        with _reported(snapshot.hub_id, name):
            if by_revision:
                hf_hub_download(snapshot.hub_id.repo, name, revision=snapshot.hub_id.revision)
            if not snapshot.has(name):  # by revision it may have been another commit's, if one came meanwhile
                hf_hub_download(snapshot.hub_id.repo, name, revision=snapshot.commit)
        if not snapshot.has(name):
            path = snapshot.path(name)
            what = f"is not the file that the Hub said it is; download it again: {download_again(path)}"
            raise CheckpointError(Problem("changed", str(path), what))


@contextmanager
def _calm(*, bars: bool) -> Iterator[None]:
    """Let huggingface_hub say nothing but what its progress bars show, and these only where asked."""
    import logging

    from huggingface_hub.utils import logging as its_logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    level, shown = its_logging.get_verbosity(), not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        its_logging.set_verbosity(logging.ERROR)  # what it warns of has addresses with signatures in it
        if not bars:
            disable_progress_bars()
        try:
            yield
        finally:
            its_logging.set_verbosity(level)
            if shown and not bars:
                enable_progress_bars()


# what goes wrong


@contextmanager
def _reported(hub_id: HubId, name: str = "") -> Iterator[None]:
    """Turn what huggingface_hub raises into a problem.

    Its texts are not passed on: they can have addresses with signatures, or a token with a stray newline, in them.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, _http_error()) as error:
        problem = _problem(hub_id, error)
        if name:
            lacking = "is not in the Hub's cache, and " if problem.kind == "network" else ""
            problem = replace(problem, message=f"{name} {lacking}{problem.message}")
        raise KINDS[problem.kind].error(problem) from error


def _http_error() -> type[Exception]:
    """What the HTTP library raises; which library that is depends on the version of huggingface_hub."""
    from huggingface_hub.errors import HfHubHTTPError

    base: type[Exception] = HfHubHTTPError.__bases__[0]
    return base


def _problem(hub_id: HubId, error: BaseException) -> Problem:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # why it could not be fetched; that it is not in the cache is known
    page = f"https://huggingface.co/{hub_id.repo}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        kind, message = "network", "HF_HUB_OFFLINE forbids asking the Hub"
    elif isinstance(error, errors.GatedRepoError):
        kind, message = "access", f"is gated: accept its conditions at {page}, then {_LOGIN}"
    elif isinstance(error, errors.RevisionNotFoundError):
        kind, message = "not_found", f"{hub_id.repo} has no revision {hub_id.revision}{_revisions(hub_id.repo)}"
    elif isinstance(error, errors.RepositoryNotFoundError):
        kind = "not_found"
        message = f"is no file or directory here, and no repository of the Hub; if it is a private one, {_LOGIN}"
    elif isinstance(error, errors.DisabledRepoError):
        kind, message = "access", "is not given out: the Hub has disabled the repository"
    elif isinstance(error, errors.HFValidationError):
        kind, message = "not_found", "is no file or directory here, and no id that the Hub could have"
    elif status == 401:
        kind, message = "access", f"is refused: {_host()} does not know the token that was sent; {_LOGIN}"
    elif status == 403:
        kind, message = "access", f"is refused: see {page} for who may have it, then {_LOGIN}"
    elif status == 404:
        kind, message = "changed", f"is not there, though {_host()} listed it a moment ago; run again"
    elif status is not None:
        what = "asks to come back later" if status == 429 else "has a fault"
        kind, message = "network", f"{_host()} {what} (HTTP {status}){_LATER}"
    elif isinstance(error, OSError) and (error.filename is not None or error.errno in (*_NO_ROOM, errno.EIO)):
        kind = "disk_space" if error.errno in _NO_ROOM else "write"
        reason = error.strerror or "unknown"
        message = f"cannot be written to the Hub's cache ({reason}); HF_HOME names another place for it"
    elif type(error) is OSError:  # huggingface_hub's own, of a download that it found too short or too long
        kind, message = "incomplete", f"came with another size than {_host()} said; run again"
    else:
        kind, message = "network", f"{_host()} cannot be reached as a Hub ({type(error).__name__}){_LATER}"
    return Problem(kind, hub_id.text, message)


def _revisions(repo: str) -> str:
    """The branches and tags that there are, in words; nothing where even that cannot be had."""
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(repo)
    except (OSError, ValueError, KeyError, TypeError, _http_error()):
        return ""
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    return f"; it has {', '.join(names[:8])}" + (", …" if len(names) > 8 else "")


def _host() -> str:
    """The Hub, or the mirror that stands for it, without what else its address may have in it."""
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).hostname or "the Hub"
