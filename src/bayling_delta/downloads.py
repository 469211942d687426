"""What huggingface_hub leaves on the disk beside a file: where it came from, and which SHA-256 it should have.

In the Hub's cache, ``models--OWNER--NAME/snapshots/COMMIT/FILE`` is a link to ``blobs/ETAG``. A directory made with
``hf download --local-dir`` has ``.cache/huggingface/download/FILE.metadata``, whose lines are commit, ETag and time.
The ETag of a file that the Hub stores with Git LFS, as it does all weights, is the file's SHA-256; that of any other
has 40 digits. Source: huggingface_hub, guide "Understand caching", `file_download` and `_local_folder`.
"""

import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from bayling_delta.errors import CheckpointError, Problem
from bayling_delta.sources import exists, link_target, open_source, read_file, real_path

__all__ = ["Origin", "download_again", "expected_sha256", "mended", "origin", "record_source"]

_METADATA: Final = Path(".cache", "huggingface", "download")
_METADATA_CAP: Final = 4096
"""Bytes; three short lines."""
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_OF_RESULTS: Final = "bayling-delta.json"
"""The manifest of what nobody can download: it was made here."""
_MENDABLE: Final = ("incomplete", "not_weights")
"""The kinds of problem that another download of the file ends."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The commit of a repository of the Hub."""

    repo: str
    """``owner/name``."""
    commit: str
    """40 hexadecimal digits."""

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit}"


def origin(directory: Path) -> Origin | None:
    """Which commit a directory is the snapshot of, by its place in the Hub's cache; None elsewhere."""
    place = "/".join(real_path(directory).parts[-3:])
    found = re.fullmatch(r"models--([^/]+)/snapshots/([0-9a-f]{40})", place)
    return Origin(found[1].replace("--", "/", 1), found[2]) if found else None


def expected_sha256(path: Path) -> str | None:
    """The SHA-256 that the Hub had for a file when it was fetched; None where that is not known.

    What a file's metadata says counts only as long as the file is not newer: somebody may have put another there.
    """
    target = link_target(path)
    if target is not None:  # one step only: a blob may itself be a link, whose name is another kind of digest
        return target.name if target.parent.name == "blobs" and _SHA256.fullmatch(target.name) else None
    metadata = path.parent / _METADATA / f"{path.name}.metadata"
    try:
        if not exists(metadata):
            return None
        _, etag, time, *_ = read_file(metadata, _METADATA_CAP).decode("ascii", "replace").split("\n")
        with open_source(path) as source:
            valid = source.modified_ns / 1e9 <= float(time) + 1  # the margin that huggingface_hub allows
    except (CheckpointError, ValueError):  # it is a hint: huggingface_hub drops one that it cannot read
        return None
    return etag if _SHA256.fullmatch(etag) and valid else None


def record_source(directory: Path) -> str:
    """How to name what the Hub said of the files in a directory."""
    found = origin(directory)
    return f"the Hub's record of {found}" if found else f"the Hub's record in {directory / _METADATA.parent}"


def download_again(path: Path) -> str:
    """The command that fetches a file anew."""
    found = origin(path.parent)
    if found:
        words = ["hf", "download", found.repo, path.name, "--revision", found.commit, "--force-download"]
    else:
        words = ["hf", "download", "OWNER/NAME", path.name, "--local-dir", str(path.parent), "--force-download"]
    return shlex.join(words)


def mended(problem: Problem, path: Path) -> Problem:
    """A problem with a file, and, where that ends it, the command that fetches the file again.

    A model that was made here cannot be fetched: what its problems say of that is left out.
    """
    if problem.kind not in _MENDABLE:
        return problem
    if exists(path.parent / _OF_RESULTS) and origin(path.parent) is None and expected_sha256(path) is None:
        return replace(problem, message=re.split("[;,] (and )?download", problem.message, flags=re.IGNORECASE)[0])
    return replace(problem, message=f"{problem.message}: {download_again(path)}")
