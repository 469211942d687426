"""A directory or file of weights, opened as a table of tensor references.

The containers are told apart by their first bytes, an index is checked against every shard's own header,
and no weights are read.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final
from unicodedata import normalize

from bayling_delta import meta_format, safetensors_format, torch_format
from bayling_delta.downloads import mended
from bayling_delta.errors import CheckpointError, IntegrityError, Problem, refuse, shown
from bayling_delta.sources import (
    exists,
    file_size,
    is_directory,
    list_directory,
    open_source,
    read_bytes,
    read_file,
)
from bayling_delta.strict_json import load_strict
from bayling_delta.tensors import TensorRef
from bayling_delta.zip_records import Record

__all__ = [
    "EMBEDDING",
    "HEAD",
    "LAYOUTS",
    "Checkpoint",
    "WeightFile",
    "directory_of",
    "is_plain_name",
    "is_rotary_buffer",
    "loadable_files",
    "look_alikes",
    "open_checkpoint",
    "open_weights",
    "read_index",
    "read_table",
    "stays_in_directory",
    "survey",
    "what_instead",
]

EMBEDDING: Final = "model.embed_tokens.weight"
HEAD: Final = "lm_head.weight"
_ROTARY: Final = ".rotary_emb.inv_freq"
JSON_CAP: Final = 100_000_000
"""Bytes of an index, manifest or journal that are read: an index of a million tensors, a manifest of 400,000."""
COMPANION_CAP: Final = 64_000_000
"""Bytes of a tokenizer, and of any file that is taken over into a result."""
_CAPS: Final = {
    **dict.fromkeys(
        ("config.json", "generation_config.json", "special_tokens_map.json", meta_format.PARAMS_NAME), 4_000_000
    ),
    **dict.fromkeys(("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json"), COMPANION_CAP),
}
"""Bytes of other files, by name; twice those of the largest known, of 260,000 tokens, and far more than most have."""


_RENAME: Final = "rename it: it is no name on every system, and would be printed and written down"
_MOST_TOLD: Final = 1000
"""Problems of one kind and file."""


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One file of weights."""

    path: Path
    size: int
    """Bytes."""
    modified_ns: int
    records: tuple[Record, ...] = ()
    """A ``.bin`` file's zip records by offset, where it has their CRC-32."""

    @property
    def stamp(self) -> tuple[int, int]:
        """What would differ if the file were changed: its size and time of change."""
        return self.size, self.modified_ns


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state dict on disk, whatever its container and sharding."""

    path: Path
    """As the user named it."""
    directory: Path
    """Where configuration and tokenizer lie."""
    container: str
    """``safetensors``, ``torch`` or ``meta``; ``mixed`` only in a `survey`."""
    files: tuple[WeightFile, ...]
    """In the order of the index, or of their names."""
    tensors: dict[str, TensorRef]
    """Everything that the files hold."""
    config: dict[str, Any] | None
    """config.json, where there is one; for Meta's format what one would say, derived from params.json."""
    notes: tuple[str, ...] = ()
    """What a user should know of how this was opened."""
    config_name: str = "config.json"
    """The file that ``config`` comes from."""
    copies: Mapping[str, tuple[TensorRef, ...]] = field(default_factory=dict)
    """Of the tensors that each of several parts has whole, and should have alike: that of every part."""

    @property
    def tied(self) -> bool:
        """Whether lm_head.weight is the embedding under another name, by config.json or by sharing its bytes."""
        said = (self.config or {}).get("tie_word_embeddings")
        if isinstance(said, bool):
            return said
        return HEAD in self.tensors and self.tensors[HEAD] == self.tensors.get(EMBEDDING)

    @property
    def weights(self) -> dict[str, TensorRef]:
        """The tensors that count: without rotary buffers, and without a tied lm_head.weight."""
        weights = {name: ref for name, ref in self.tensors.items() if not name.endswith(_ROTARY)}
        if self.tied and EMBEDDING in weights:
            weights.pop(HEAD, None)
        return weights


def is_rotary_buffer(name: str) -> bool:
    """Whether a tensor is a rotary frequency table: computed on loading, stored until transformers 4.31."""
    return name.endswith(_ROTARY)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a directory, a single weights file or a shard index, reading only headers.

    Raises:
        CheckpointError: with every problem found in it.
        IntegrityError: where all that is wrong is a checksum.
    """
    checkpoint, problems = survey(path)
    refuse(problems)
    if checkpoint is None:
        raise RuntimeError(f"{path} was not opened, and nothing is wrong with it")
    return checkpoint


def survey(path: Path) -> tuple[Checkpoint | None, list[Problem]]:
    """Open what can be opened, and list what is wrong with the rest; None where no tensor can be described."""
    try:
        if (folder := _meta_folder(path)) is not None:
            return _open_meta(path, folder)
        directory, index, files, notes, problems = _find_files(path)
    except CheckpointError as error:
        return None, list(error.problems)
    return _open_shards(path, directory, index, files, notes, problems)


_Files = dict[str, list[str] | None]
"""Weight files by name, in order, each with the tensors that an index places in it; None where there is no index."""


def _find_files(path: Path) -> tuple[Path, Path, _Files, tuple[str, ...], list[Problem]]:
    """Where a checkpoint's files lie, its index, which they are, what to say of that, and what is wrong with it."""
    if file_size(path) is not None:
        if path.name == meta_format.PARAMS_NAME:
            what = f"goes with weights, and is none; name the folder that has them, {path.parent}"
            raise CheckpointError(Problem("not_weights", str(path), what))
        if path.suffix == ".json":
            placed, problems = read_index(path)
            return path.parent, path, placed, (), problems
        return path.parent, path, {path.name: None}, (), [*_lone_shard(path), *_unprintable(path)]
    if not is_directory(path):
        raise CheckpointError(_no_directory(path))
    names = list_directory(path)
    for container, single, index, pattern in LAYOUTS:
        shards: _Files = dict.fromkeys(name for name in names if re.fullmatch(pattern, name))
        problems = []
        if single in names:
            shards = {single: None}
        elif index in names:
            placed, problems = read_index(path / index)
            shards = placed or shards
        elif not shards:
            continue
        else:
            problems = _absent_shards(path, shards)
        notes: tuple[str, ...] = ()
        if container == "safetensors" and any(re.fullmatch(LAYOUTS[1][3], name) for name in names):
            notes = (f"{path}: has both containers; the safetensors files are taken, as transformers does",)
        problems += [
            Problem("unsafe_name", str(path), f"has a file named {shown(name)!r}; {_RENAME}")
            for name in shards
            if not stays_in_directory(name)
        ]
        return path, path / index, shards, notes, problems
    raise CheckpointError(Problem("not_found", str(path), _no_weights(names)))


LAYOUTS: Final = (
    # container, one file, index, shards; in the order in which transformers looks for them
    ("safetensors", "model.safetensors", "model.safetensors.index.json", r"model.*\.safetensors"),
    ("torch", "pytorch_model.bin", "pytorch_model.bin.index.json", r"pytorch_model.*\.bin"),
)


def _no_directory(path: Path) -> Problem:
    """What to say of a path that is neither a regular file nor a directory."""
    if exists(path):
        what = "is neither a regular file nor a directory that can be read; symbolic links that lead nowhere?"
        return Problem("unreadable", str(path), what)
    return Problem("not_found", str(path), "cannot be read (No such file or directory); is it spelled right?")


def _no_weights(names: list[str]) -> str:
    if meta_format.PARAMS_NAME in names:
        return "has Meta's params.json, and none of the consolidated.NN.pth that go with it; download them"
    if {"lock", "model"} <= set(names):
        return "is what an unfinished run of 'bayling-delta apply' left, and no model"
    if {"blobs", "snapshots"} <= set(names):
        return "is a repository in the Hub's cache; name one of the directories in its snapshots/"
    if any(name.lower().endswith((".gguf", ".ggml")) for name in names):
        return "has llama.cpp files (GGUF or GGML) and no other weights; the delta needs the original ones"
    if unfinished := [name for name in names if name.endswith((".incomplete", ".part", ".crdownload", ".aria2"))]:
        return f"has no model*.safetensors and no pytorch_model*.bin, only {unfinished[0]}: let the download finish"
    return "has no model*.safetensors and no pytorch_model*.bin; name the directory that holds the weights"


def read_index(path: Path) -> tuple[_Files, list[Problem]]:
    """The files that an index names, in its order, each with the tensors it should hold; and what is wrong with it."""
    try:
        weight_map = read_table(path).get("weight_map")
    except CheckpointError as error:
        return {}, [
            replace(problem, kind="index", message=f"is no shard index with a weight_map: it {problem.message}")
            if problem.kind == "damaged"
            else problem
            for problem in error.problems
        ]
    if not isinstance(weight_map, dict):
        return {}, [Problem("index", str(path), "is not a shard index: it has no weight_map")]
    placed: dict[str, list[str]] = {}
    strange: list[tuple[str, object]] = []
    for tensor, name in weight_map.items():
        if isinstance(name, str):
            placed.setdefault(name, []).append(tensor)
        else:
            strange.append((tensor, name))
    plain: _Files = {name: tensors for name, tensors in placed.items() if stays_in_directory(name)}
    strange += [(tensors[0], name) for name, tensors in placed.items() if name not in plain]
    outside = (f"places {shown(tensor)!r} in {shown(str(name))!r}, outside its directory" for tensor, name in strange)
    problems = _first("unsafe_name", path, outside)
    problems += _first("unsafe_name", path, (f"names {two}" for two in look_alikes(plain)))
    if not weight_map:
        problems.append(Problem("index", str(path), "names no tensors"))
    return plain, problems


def _unprintable(path: Path) -> list[Problem]:
    """The finding that a file that the user names has a name that cannot be written down."""
    return [] if path.name.isprintable() else [Problem("unsafe_name", str(path), f"has a name that is none; {_RENAME}")]


def _lone_shard(path: Path) -> list[Problem]:
    """The finding that a single file is, by its name, one shard of several."""
    found = re.search(r"-([0-9]{1,9})-of-([0-9]{1,9})\.", path.name)
    if not found or int(found[2]) < 2:
        return []
    message = f"is one of {int(found[2])} shards by its name; name its directory, or its index"
    return [Problem("incomplete", str(path), message)]


def _absent_shards(path: Path, shards: _Files) -> list[Problem]:
    """What the numbers in the names of shards say is missing, where there is no index to say it."""
    counts = {int(found[1]) for name in shards if (found := re.search(r"-of-([0-9]{1,9})\.", name))}
    if len(counts) == 1 and len(shards) < (count := counts.pop()):
        return [
            Problem("incomplete", str(path), f"has {len(shards)} of {count} shards and no index; download the rest")
        ]
    return []


def directory_of(path: Path) -> Path:
    """Where the files beside the weights are: a directory itself, or that of a single file."""
    return path.parent if file_size(path) is not None else path


def loadable_files(directory: Path) -> list[str]:
    """The names in a directory that a loader would take for weights or for their index."""
    patterns = (
        "|".join(f"{re.escape(index)}|{pattern}" for _, _, index, pattern in LAYOUTS) + r"|adapter_(model|config).*"
    )
    return [name for name in list_directory(directory) if re.fullmatch(patterns, name)]


_NO_PLAIN_LETTER: Final = re.compile(r"[/\\:\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What parts a path, names a drive or a stream, has no encoding, or moves a cursor."""
_DEVICE: Final = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\xb9\xb2\xb3]) *(\..*)?", re.IGNORECASE)
"""A device of Windows, in every directory. Source: Microsoft, "Naming Files, Paths, and Namespaces"."""


_LONGEST_NAME: Final = 255
"""Letters; no file system has longer ones."""


def stays_in_directory(name: str) -> bool:
    """Whether a name from a file names a file of the same directory, on any system."""
    if not name or name.endswith((".", " ")):  # which Windows leaves out at the end of a name
        return False
    if len(name) > _LONGEST_NAME:
        return False
    return not _NO_PLAIN_LETTER.search(name) and not _DEVICE.fullmatch(name)


def look_alikes(names: Iterable[str]) -> list[str]:
    """Names that some disks, macOS's and Windows's among them, take for one another; each two in words."""
    first: dict[str, str] = {}
    pairs = ((first.setdefault(_folded(name), name), name) for name in names)
    same = "which are one file on a disk where case, or how a letter is composed, does not count"
    return [f"{shown(one)!r} and {shown(other)!r}, {same}" for one, other in pairs if one != other]


def _folded(name: str) -> str:
    """The same for names that differ in nothing else (Unicode, section 3.13, canonical caseless matching)."""
    return normalize("NFD", normalize("NFD", name).casefold())


def _open_shards(
    path: Path, directory: Path, index: Path, files: _Files, notes: tuple[str, ...], problems: list[Problem]
) -> tuple[Checkpoint | None, list[Problem]]:
    """Read every shard's header and hold it against what the index says of it, if there is one."""
    problems = list(problems)
    opened: list[WeightFile] = []
    tensors: dict[str, TensorRef] = {}
    containers: set[str] = set()
    lacking = 0
    for name, expected in files.items():
        shard = directory / name
        try:
            if expected is not None and not exists(shard):
                lacking += 1
                if lacking > _MOST_TOLD:
                    continue
                raise CheckpointError(
                    Problem("incomplete", str(shard), f"is in {index}, but not here; download the missing shard")
                )
            container, file, refs = open_weights(shard)
        except (CheckpointError, IntegrityError) as error:
            problems += (mended(problem, shard) for problem in error.problems)
            continue
        containers.add(container)
        opened.append(file)
        problems += _check_index(shard, expected, refs)
        for tensor, ref in refs.items():
            if not is_plain_name(tensor):
                problems.append(Problem("unsafe_name", str(shard), f"has a tensor with the name {shown(tensor)!r}"))
            if tensor in tensors:
                other = tensors[tensor].views[0].file.name
                problems.append(Problem("index", str(shard), f"{shown(tensor)} is also in {other}"))
            tensors[tensor] = ref
    if lacking > _MOST_TOLD:
        what = f"names {lacking - _MOST_TOLD:,} more files that are not here"
        problems.append(Problem("incomplete", str(index), what))
    config: dict[str, Any] | None = None
    try:
        config = _read_config(directory)
    except CheckpointError as error:
        problems += error.problems
    if len(containers) > 1:
        problems.append(Problem("index", str(path), "mixes safetensors and .bin shards"))
    if not problems and all(map(is_rotary_buffer, tensors)):
        what = "has no weights in it, only rotary buffers" if tensors else "has no tensors in it"
        problems.append(Problem("not_found", str(path), what))
    if not tensors:
        return None, problems
    container = containers.pop() if len(containers) == 1 else "mixed"
    return Checkpoint(path, directory, container, tuple(opened), tensors, config, notes), problems


def _check_index(shard: Path, expected: list[str] | None, refs: dict[str, TensorRef]) -> list[Problem]:
    if expected is None:
        return []
    absent = sorted(name for name in set(expected) - refs.keys() if not is_rotary_buffer(name))
    stray = sorted(name for name in refs.keys() - set(expected) if not is_rotary_buffer(name))
    advice = "is one of them stale? Download both again"
    return [
        *_first("index", shard, (f"lacks {shown(name)}, which the index places here; {advice}" for name in absent)),
        *_first(
            "index", shard, (f"has {shown(name)}, which the index does not place here; {advice}" for name in stray)
        ),
    ]


def _first(kind: str, path: Path, messages: Iterable[str]) -> list[Problem]:
    """The first of what is wrong with a file, and how much more there is: a few bytes of an index make one of each."""
    told: list[Problem] = []
    left = 0
    for message in messages:
        if len(told) < _MOST_TOLD:
            told.append(Problem(kind, str(path), message))
        else:
            left += 1
    return [*told, Problem(kind, str(path), f"has {left:,} more problems of this kind")] if left else told


def _meta_folder(path: Path) -> Path | None:
    """The folder in Meta's own format that a path is, or has the first part of; None where it is something else.

    Where there are weights in HuggingFace's format too, as in its conversions of later models, these are taken.
    """
    if file_size(path) is not None:
        return path.parent if meta_format.is_part(path.name) else None
    names = list_directory(path) if is_directory(path) else []
    converted = any(name == single or re.fullmatch(shards, name) for name in names for _, single, _, shards in LAYOUTS)
    return path if not converted and any(map(meta_format.is_part, names)) else None


def _open_meta(path: Path, folder: Path) -> tuple[Checkpoint | None, list[Problem]]:
    """Open every part of a model in Meta's format, and join them; they are told apart by their numbers."""
    names = [name for name in list_directory(folder) if meta_format.is_part(name)]
    if path != folder and len(names) > 1:
        what = f"is one of {len(names)} parts; name the folder that has them"
        return None, [Problem("incomplete", str(path), what)]
    problems: list[Problem] = []
    opened: list[WeightFile] = []
    parts: dict[int, dict[str, TensorRef]] = {}
    for name in names:
        try:
            container, file, refs = open_weights(folder / name)
        except (CheckpointError, IntegrityError) as error:
            problems += error.problems
            continue
        if container != "torch":
            what = "is a safetensors file, which Meta's are not; name it .safetensors if it has a model's weights"
            problems.append(Problem("unsupported", str(folder / name), what))
            continue
        opened.append(file)
        parts[int(name.split(".")[1])] = refs
    params, table_problems = _read_params(folder / meta_format.PARAMS_NAME)
    problems += table_problems
    if params is None or not parts or len(parts) < len(names):
        return None, problems
    assembly, found = meta_format.assemble(folder, parts, params)
    problems += found
    if assembly is None:
        return None, problems
    checkpoint = Checkpoint(
        path,
        folder,
        "meta",
        tuple(opened),
        assembly.tensors,
        params.config,
        config_name=meta_format.PARAMS_NAME,
        copies=assembly.copies,
    )
    return checkpoint, problems


def _read_params(path: Path) -> tuple[meta_format.Params | None, list[Problem]]:
    if not exists(path):
        what = "is not here, and without it nobody knows how many heads the model has; download it"
        return None, [Problem("incomplete", str(path), what)]
    try:
        return meta_format.read_params(path, read_table(path))
    except CheckpointError as error:
        return None, list(error.problems)


def is_plain_name(name: str) -> bool:
    """Whether a tensor's name can stand in a header, a line of digests and on a terminal."""
    return 0 < len(name) <= 1024 and name.isprintable() and name != "__metadata__"


def _read_config(directory: Path) -> dict[str, Any] | None:
    path = directory / "config.json"
    if not exists(path):
        return None
    config = read_table(path)
    tied = config.get("tie_word_embeddings")
    if tied is not None and not isinstance(tied, bool):
        message = f"says tie_word_embeddings {str(tied)[:80]!r}, which is neither true nor false; loaders differ on it"
        raise CheckpointError(Problem("damaged", str(path), message))
    return config


def read_table(path: Path, limit: int | None = None) -> dict[str, Any]:
    """Read a JSON file that holds one table; of up to ``limit`` bytes, or of as many as files of its name may have.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    most = limit or _CAPS.get(path.name, JSON_CAP)
    try:
        table = load_strict(read_file(path, most))  # whose bytes are not kept while they are parsed
    except ValueError as error:
        with open_source(path) as source:
            found = what_instead(read_bytes(source, 0, 512), source.size)
        kind, message = found or ("damaged", f"is not JSON ({error})")
        problem = mended(Problem(kind, str(path), message), path)
        raise CheckpointError(replace(problem, kind="damaged")) from error
    if not isinstance(table, dict):
        raise CheckpointError(Problem("damaged", str(path), "is not a JSON object"))
    return table


def open_weights(path: Path) -> tuple[str, WeightFile, dict[str, TensorRef]]:
    """One file's container, itself, and its tensors."""
    with open_source(path) as source:
        head = read_bytes(source, 0, 512)
        if head.startswith(b"PK\x03\x04"):
            refs, records = torch_format.parse(source)
            return "torch", WeightFile(path, *source.stamp, records), refs
        if reason := what_instead(head, source.size) or _no_header(head):
            kind, message = reason
            raise CheckpointError(Problem(kind, str(path), message))
        return "safetensors", WeightFile(path, *source.stamp), safetensors_format.parse(source)


def _no_header(head: bytes) -> tuple[str, str] | None:
    """The finding that a file is plain text: a safetensors header has a brace after the eight bytes of its length."""
    if (
        head[8:9] != b"{"
        and len(head) > 8
        and head[:64].isascii()
        and head[:64].decode().replace("\n", "").isprintable()
    ):
        return "not_weights", f"is text, not weights: it begins with {head[:40].decode()!r}; {_AGAIN}"
    return None


_LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
_AGAIN = "download it again"


def what_instead(head: bytes, size: int) -> tuple[str, str] | None:
    """What a file is that is not what its name says, by its first bytes and size: (kind of problem, message)."""
    start = re.sub(rb"\s", b"", head.removeprefix(b"\xef\xbb\xbf"))[:16].lower()
    if not size:
        return "incomplete", f"is empty; {_AGAIN}"
    if head.startswith(_LEGACY):
        return "unsupported", (
            "is in PyTorch's format from before 1.6; where you trust it, convert it: "
            "torch.save(torch.load(FILE, map_location='cpu', weights_only=True), NEW)"
        )
    if head.startswith(b"version https://git-lfs"):
        return "not_weights", "is a git-lfs pointer, not the weights; run 'git lfs pull' or download the file itself"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<!--", b'{"error', b"entrynotfound", b"accesstomodel")):
        return "not_weights", f"is a web page or an error message, not weights; {_AGAIN}"
    if (
        head.startswith((b"\x1f\x8b", b"7z\xbc\xaf", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd"))
        or head[257:262] == b"ustar"
    ):
        return "unsupported", "is an archive; unpack it first"
    if head.startswith((b"GGUF", b"ggml", b"lmgg", b"tjgg")):
        return "unsupported", "is a llama.cpp file (GGUF or GGML); the delta needs the original weights"
    if not head.strip(b"\0"):
        return "not_weights", f"begins with zeros: a download that was never finished; {_AGAIN}"
    if head.startswith(b"\x80") and head[8:9] != b"{":
        return "unsupported", "is a bare pickle, not a PyTorch zip checkpoint; it is not read here"
    return None
