"""Records of what a model should be, and what of it is not so: manifests, SHA256SUMS, digests."""

import hashlib
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from bayling_delta.checkpoint import is_plain_name, look_alikes, read_table, stays_in_directory
from bayling_delta.downloads import download_again, expected_sha256, record_source
from bayling_delta.errors import CheckpointError, Problem, refuse, shown
from bayling_delta.manifest import (
    CHECKLIST_NAME,
    MANIFEST_NAME,
    SUMS_NAME,
    TensorDigest,
    parse_digest,
    sums_text,
    weights_digest,
)
from bayling_delta.sources import Source, exists, is_directory, list_directory, open_source, read_bytes, read_file
from bayling_delta.tensors import DTYPES, FLOATS, RANK_CAP

__all__ = [
    "Expectation",
    "ExpectedFile",
    "FoundFile",
    "differences",
    "download_problems",
    "downloaded_files",
    "listed_files",
    "listed_problems",
    "own_expectations",
    "read_manifest",
    "read_sums",
    "sums_problems",
    "usable_expectations",
]


_LIST_CAP: Final = 10_000_000
"""Bytes of a list of digests that are read: 100,000 files."""


@dataclass(frozen=True, slots=True)
class ExpectedFile:
    """What a file should be."""

    sha256: str | None = None
    size: int | None = None
    md5: str | None = None
    or_sha256: frozenset[str] = frozenset()
    """Other SHA-256 that are as good."""


@dataclass(frozen=True, slots=True)
class FoundFile:
    """What a file is."""

    size: int
    sha256: str
    md5: str | None = None
    """Only where a list has it."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a model should be, as far as somebody wrote it down."""

    source: str
    """Where it is written, as the user would name it."""
    weights_digest: str | None = None
    """``sha256:<hex>``."""
    tensors: dict[str, TensorDigest] | None = None
    files: dict[str, ExpectedFile] = field(default_factory=dict)
    dtype: str | None = None
    """What a result was cast to, where it was."""
    operation: str | None = None
    """What the manifest was written by."""
    recipe: str | None = None
    """How the sum was made, where it was."""
    forms: tuple[Mapping[str, frozenset[str]], ...] = ()
    """Where files are recorded in several forms: the digests of each, by name. All files must be of one form."""
    downloaded: bool = False
    """Whether it is what the Hub said of the files: one that differs can be had again."""


def read_manifest(path: Path) -> Expectation:
    """Read a manifest that this program, or another that keeps to docs/formats.md, wrote.

    Raises:
        CheckpointError: it cannot be read, is of a newer major version, or contradicts itself.
    """
    try:
        document = read_table(path)
    except CheckpointError as error:
        message = f"is not a manifest of bayling-delta: it {error.problems[0].message}"
        raise CheckpointError(Problem("record", str(path), message)) from error
    schema = document.get("schema")
    if schema != "bayling-delta/manifest/1":
        message = f"has the schema {str(schema)[:80]!r}, and is not a manifest of this version"
        raise CheckpointError(Problem("record", str(path), message))
    try:
        result = document["result"]
        tensors = {name: _tensor(name, entry) for name, entry in result["tensors"].items()}
        names = [_name(entry["name"]) for entry in result["files"]]
        files = {entry["name"]: ExpectedFile(*_file(entry)) for entry in result["files"]}
        recorded = parse_digest(result["weights_digest"])
        dtype, operation, recipe = document["options"]["dtype"], document["operation"], document.get("recipe")
        wrong = [
            (document["ok"] is not True, "it does not say that all went well"),
            (weights_digest(tensors.values()) != recorded, "its tensors' digests do not add up to its weights digest"),
            (len(files) != len(names), "it has a file twice"),
            *((True, f"it has {two}") for two in look_alikes(files)),
            (dtype not in (None, *FLOATS), "it names a dtype that no result has"),
            (not isinstance(recipe, str | None), "its recipe is no name"),
            (not isinstance(operation, str), "its operation is no name"),
            (not isinstance(document["created"], str), "it does not say when it was made"),
            (result["dtype"] not in (None, *DTYPES), "its result's dtype is none"),
            (
                result["parameters"] != sum(math.prod(tensor.shape) for tensor in tensors.values()),
                "its tensors' shapes do not add up to its parameters",
            ),
            (
                bool(files) and not {entry["file"] for entry in result["tensors"].values()} <= files.keys(),
                f"it has {_unplaced(result, files)} in a file that it does not list",
            ),
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        message = f"is not a manifest of bayling-delta ({str(error)[:200]})"
        raise CheckpointError(Problem("record", str(path), message)) from error
    for is_wrong, what in wrong:
        if is_wrong:
            raise CheckpointError(Problem("record", str(path), f"contradicts itself: {what}"))
    return Expectation(str(path), recorded, tensors, files, dtype, operation, recipe)


def _unplaced(result: Mapping[str, Any], files: Mapping[str, ExpectedFile]) -> str:
    return next((name for name, entry in result["tensors"].items() if entry["file"] not in files), "")


def _tensor(name: str, entry: Mapping[str, Any]) -> TensorDigest:
    shape, dtype = entry["shape"], entry["dtype"]
    sizes = (
        isinstance(shape, list) and len(shape) <= RANK_CAP and all(type(n) is int and 0 <= n < 1 << 63 for n in shape)
    )
    if not is_plain_name(name) or not sizes or dtype not in DTYPES:
        raise ValueError(f"its tensor {name[:80]!r} is not described as one")
    return TensorDigest(name, dtype, tuple(shape), parse_digest(entry["sha256"]).removeprefix("sha256:"))


def _file(entry: Mapping[str, Any]) -> tuple[str | None, int]:
    size, sha256 = entry["size"], entry["sha256"]
    if type(size) is not int:
        raise ValueError(f"a file of size {str(size)[:80]}")
    return (None if sha256 is None else parse_digest(sha256).removeprefix("sha256:")), size


def _name(name: str) -> str:
    if not stays_in_directory(name):
        raise ValueError(f"a file {shown(str(name))!r}")
    return name


def read_sums(path: Path) -> Expectation:
    """Read a list as ``sha256sum`` prints it.

    Raises:
        CheckpointError: it cannot be read, or a line is not of that form.
    """
    files = {name: ExpectedFile(sha256=digest) for name, digest in _read_list(path, 64).items()}
    return Expectation(str(path), files=files)


def _read_checklist(path: Path) -> Expectation:
    """Read a list as ``md5sum`` prints it; Meta's releases have one."""
    files = {name: ExpectedFile(md5=digest) for name, digest in _read_list(path, 32).items()}
    return Expectation(str(path), files=files)


def _read_list(path: Path, digits: int) -> dict[str, str]:
    """Digests of so many hexadecimal digits, by the names of files."""
    digests: dict[str, str] = {}
    text = read_file(path, _LIST_CAP).decode("utf-8-sig", "surrogateescape").replace("\r\n", "\n")  # as from Windows
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        found = re.fullmatch(rf"([0-9a-fA-F]{{{digits}}}) [ *](.+)", line)
        if not found or not stays_in_directory(found[2]) or found[2] in digests:
            raise CheckpointError(Problem("record", str(path), f"line {number} is not 'DIGEST  NAME' of a file here"))
        digests[found[2]] = found[1].lower()
    refuse([Problem("record", str(path), f"has {two}") for two in look_alikes(digests)])
    return digests


def own_expectations(directory: Path) -> list[Expectation]:
    """What lies beside a model's weights of records of it.

    Raises:
        CheckpointError: a record cannot be used.
    """
    written, problems = usable_expectations(directory)
    refuse(problems)
    return written


def usable_expectations(directory: Path) -> tuple[list[Expectation], list[Problem]]:
    """The records that lie beside a model's weights, and what is wrong with those that cannot be used."""
    readers = ((MANIFEST_NAME, read_manifest), (SUMS_NAME, read_sums), (CHECKLIST_NAME, _read_checklist))
    written: list[Expectation] = []
    problems: list[Problem] = []
    for name, read in readers:
        try:
            if exists(directory / name):
                written.append(read(directory / name))
        except CheckpointError as error:  # whatever is wrong with it, it is the record that is
            problems += [replace(problem, kind="record") for problem in error.problems]
    names = list_directory(directory) if is_directory(directory) else []
    if files := downloaded_files(directory, names):
        written.append(_as_downloaded(directory, files))
    return written, problems


def downloaded_files(directory: Path, names: Iterable[str]) -> dict[str, ExpectedFile]:
    """Those of the files ``names`` of which it is known what SHA-256 the Hub had for them."""
    known = ((name, expected_sha256(directory / name)) for name in names)
    return {name: ExpectedFile(sha256) for name, sha256 in known if sha256 is not None}


def _as_downloaded(directory: Path, files: dict[str, ExpectedFile]) -> Expectation:
    return Expectation(record_source(directory), files=files, downloaded=True)


def download_problems(directory: Path, files: Mapping[str, FoundFile]) -> list[Problem]:
    """Files, given by name, that are not what the Hub had when they were fetched."""
    expected = _as_downloaded(directory, downloaded_files(directory, files))
    return list(_file_differences(expected, directory, files))


def listed_files(expectations: Iterable[Expectation], names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Those of the named files of which a list has a digest, and those of which it has the MD5."""
    known = {name: [expected.files[name] for expected in expectations if name in expected.files] for name in names}
    return (
        [name for name, files in known.items() if any(file.sha256 or file.md5 for file in files)],
        [name for name, files in known.items() if any(file.md5 for file in files)],
    )


def sums_problems(directory: Path, expectations: Sequence[Expectation]) -> list[Problem]:
    """The finding that a model with a manifest has a SHA256SUMS that is not, byte for byte, as it was written."""
    path = directory / SUMS_NAME
    by_source = {expected.source: expected for expected in expectations}
    if not {str(directory / MANIFEST_NAME), str(path)} <= by_source.keys():
        return []  # a list by itself may be anybody's, in whatever form
    files = {name: file.sha256 or "" for name, file in by_source[str(path)].files.items()}
    if read_file(path, _LIST_CAP) == sums_text(files).encode("utf-8", "surrogateescape"):
        return []
    return [
        Problem(
            "model",
            str(path),
            "is not, byte for byte, what was written, though it lists the same files; was it made again?",
        )
    ]


# comparing


def differences(
    expected: Expectation,
    model: Path,
    tensors: Mapping[str, TensorDigest] | None,
    places: Mapping[str, str],
    files: Mapping[str, FoundFile],
) -> list[Problem]:
    """Everything in which a model is not what it is expected to be.

    ``tensors`` are the digests found, None where the weights cannot be opened; ``places`` says which file each
    tensor is in; ``files`` are the files found, by name.
    """
    problems = list(_file_differences(expected, model, files)) or _mixture(expected, model, files)
    if tensors is not None and expected.weights_digest not in (None, found := weights_digest(tensors.values())):
        what = f"its weights digest is {found}; {expected.source} says {expected.weights_digest}"
        problems.append(Problem("digest", str(model), what))
    if tensors is not None and expected.tensors is not None:
        problems += _tensor_differences(expected, expected.tensors, model, tensors, places)
    return problems


def listed_problems(directory: Path, names: Collection[str], expectations: Iterable[Expectation]) -> list[Problem]:
    """The files of these names that are there and are not what is recorded of them; reads those that are recorded."""
    of_names = [
        replace(expected, files={name: file for name, file in expected.files.items() if name in names})
        for expected in expectations
    ]
    listed, md5 = listed_files(of_names, names)
    found: dict[str, FoundFile] = {}
    for name in listed:
        with open_source(directory / name) as source:
            found[name] = _digested(source, md5=name in md5)
    return [problem for expected in of_names for problem in _file_differences(expected, directory, found)]


def _digested(source: Source, *, md5: bool) -> FoundFile:
    sha256, other, done = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
    while data := read_bytes(source, done, 1 << 20):
        sha256.update(data)
        if md5:
            other.update(data)
        done += len(data)
    return FoundFile(done, sha256.hexdigest(), other.hexdigest() if md5 else None)


def _mixture(expected: Expectation, model: Path, files: Mapping[str, FoundFile]) -> list[Problem]:
    """The finding that files, each as recorded, are of different forms of a release."""
    found = {name: {files[name].sha256, files[name].md5} for name in expected.files.keys() & files.keys()}
    if not expected.forms or any(all(found[name] & form[name] for name in found) for form in expected.forms):
        return []
    what = f"has files of different forms of the model: each is in {expected.source}, and no form has all of them"
    return [Problem("digest", str(model), what)]


def _file_differences(expected: Expectation, model: Path, files: Mapping[str, FoundFile]) -> Iterator[Problem]:
    for name, file in expected.files.items():
        where = str(model / name)
        if name not in files:
            if not exists(model / name):  # else why it cannot be read is told already
                yield Problem("model", where, f"is in {expected.source}, but not here")
            continue
        found = files[name]
        again = f"; download it again: {download_again(model / name)}" if expected.downloaded else ""
        if file.size not in (None, found.size):
            yield Problem("model", where, f"has {found.size:,} bytes; {expected.source} says {file.size:,}")
        elif file.sha256 not in (None, found.sha256) and found.sha256 not in file.or_sha256:
            what = f"its SHA-256 is {found.sha256}; {expected.source} says {file.sha256}{again}"
            yield Problem("digest", where, what)
        elif file.md5 not in (None, found.md5):
            yield Problem("digest", where, f"its MD5 is {found.md5}; {expected.source} says {file.md5}")


def _tensor_differences(
    expected: Expectation,
    wanted: Mapping[str, TensorDigest],
    model: Path,
    found: Mapping[str, TensorDigest],
    places: Mapping[str, str],
) -> Iterator[Problem]:
    source = expected.source
    for name in sorted(wanted.keys() - found.keys()):
        yield Problem("model", str(model), f"lacks the tensor {shown(name)}, which {source} has")
    for name in sorted(found.keys() - wanted.keys()):
        yield Problem("model", str(model / places[name]), f"has the tensor {name}, which {source} does not have")
    for name, digest in found.items():
        other = wanted.get(name)
        if other is None or digest == other:
            continue
        where = f"{model / places[name]}: {name}"
        if (digest.dtype, digest.shape) != (other.dtype, other.shape):
            what = f"is {digest.dtype} {list(digest.shape)}; {source} says {other.dtype} {list(other.shape)}"
            yield Problem("model", where, what)
        else:
            yield Problem("digest", where, f"has other values than {source} says")
