"""Pairs of base and delta that look like real ones, written in bounded memory and kept between runs."""

import json
import pickle
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from benchmark.shapes import SHAPES, Shape, Tensor

__all__ = ["Pair", "Wanted", "is_made", "make_pair", "missing_bytes"]

_VERSION: Final = 1
"""Of the way pairs are made: pairs of another are made again."""
_BIN_SHARD_BYTES: Final = 10_000_000_000
"""What transformers cut ``.bin`` files at in 2023."""
_SAFETENSORS_SHARD_BYTES: Final = 5_000_000_000
"""What it cut safetensors files at for years after."""
_BESIDE_BYTES: Final = 32 << 20
"""More than the files beside the weights, and what containers add."""
_PERIOD: Final = (1 << 24) - 3
"""Elements before random values repeat: odd, so that no two rows of a matrix begin alike."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a pair is to be."""

    shape: Shape
    container: str = "bin"
    """``bin``, in the order of 2023; ``safetensors``, each file sorted by name; ``sparse``, the same of holes."""
    shards: int = 0
    """Files of a side; 0 for as many as there would have been, but two at least.

    FastChat's low-memory mode takes files by a pattern that the name of a lone file does not fit.
    """


@dataclass(frozen=True, slots=True)
class Pair:
    """A base and a delta on the disk."""

    shape: Shape
    base: Path
    """In the order and container of the delta."""
    sorted_base: Path
    """The same weights as safetensors, sorted by name; absent unless asked for."""
    delta: Path


def make_pair(wanted: Wanted, directory: Path, *, with_sorted_base: bool = False) -> Pair:
    """Return the pair in ``directory``, made now or in an earlier run."""
    for path, side, what in _sides(wanted, directory, with_sorted_base):
        if not _is_made(path, side, what):
            _make(path, side, what)
    return Pair(wanted.shape, directory / "base", directory / "base-sorted", directory / "delta")


def missing_bytes(wanted: Wanted, directory: Path, *, with_sorted_base: bool = False) -> int:
    """What `make_pair` would yet write, generously."""
    missing = [
        what for path, side, what in _sides(wanted, directory, with_sorted_base) if not _is_made(path, side, what)
    ]
    return sum(what.shape.nbytes + _BESIDE_BYTES for what in missing if what.container != "sparse")


def is_made(wanted: Wanted, directory: Path) -> bool:
    """Whether `make_pair` would find base and delta there."""
    return all(_is_made(*side) for side in _sides(wanted, directory, with_sorted_base=False))


def _sides(wanted: Wanted, directory: Path, with_sorted_base: bool) -> list[tuple[Path, str, Wanted]]:
    """What a pair is made of: where, which side, and what it is to be."""
    sides = [(directory / "base", "base", wanted), (directory / "delta", "delta", wanted)]
    if with_sorted_base:
        sides.append((directory / "base-sorted", "base", Wanted(wanted.shape, "safetensors")))
    return sides


# a side


def _spec_file(path: Path) -> Path:
    """Says what was made: beside the directory, since what lies inside would be taken for part of it."""
    return path.with_name(f"{path.name}.json")


def _spec(side: str, wanted: Wanted) -> dict[str, Any]:
    return {"version": _VERSION, "side": side, **asdict(wanted)}


def _is_made(path: Path, side: str, wanted: Wanted) -> bool:
    file = _spec_file(path)
    return path.is_dir() and file.is_file() and json.loads(file.read_text(encoding="utf-8")) == _spec(side, wanted)


def _make(path: Path, side: str, wanted: Wanted) -> None:
    """Make a base or a delta."""
    _spec_file(path).unlink(missing_ok=True)
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    write: Mapping[str, Callable[[Path, Wanted, str], None]] = {
        "bin": _write_bins,
        "safetensors": _write_safetensors,
        "sparse": _write_sparse,
    }
    write[wanted.container](path, wanted, side)
    _write_companions(path, wanted.shape)
    _write_json(_spec_file(path), _spec(side, wanted))


def _cut(tensors: Iterable[Tensor], most_bytes: int) -> list[list[Tensor]]:
    """The tensors by file, cut as transformers cuts: a new file where the next tensor would pass the limit."""
    files: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if files[-1] and size + tensor.nbytes > most_bytes:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.nbytes
    return files


def _shards(tensors: Sequence[Tensor], count: int, most_bytes: int) -> list[list[Tensor]]:
    """The tensors by file: ``count`` files of about the same size, or 0 for files of at most so many bytes."""
    if not count:
        return _cut(tensors, most_bytes)
    files: list[list[Tensor]] = [[]]
    left, here = sum(tensor.nbytes for tensor in tensors), 0
    for place, tensor in enumerate(tensors):
        files_left = count - len(files)
        is_full = (here + tensor.nbytes // 2) * (files_left + 1) > left  # without it nearer to an equal share
        if files_left and files[-1] and (is_full or len(tensors) - place == files_left):
            left, here = left - here, 0
            files.append([])
        files[-1].append(tensor)
        here += tensor.nbytes
    return files


def _names(stem: str, suffix: str, count: int) -> list[str]:
    if count == 1:
        return [f"{stem}{suffix}"]
    return [f"{stem}-{number:05d}-of-{count:05d}{suffix}" for number in range(1, count + 1)]


def _write_index(directory: Path, name: str, files: dict[str, list[Tensor]]) -> None:
    if len(files) > 1:
        total = sum(tensor.nbytes for tensor in chain(*files.values()))
        weight_map = {tensor.name: file for file, tensors in files.items() for tensor in tensors}
        _write_json(directory / name, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# values


class _Values:
    """Values for tensors: slices of long random buffers, which start at another place for each tensor."""

    def __init__(self, side: str, largest: int) -> None:
        """``largest``: elements of the largest tensor."""
        seed = {"base": 1, "delta": 2}[side]
        random = np.random.default_rng(seed)
        scale, middle, spread = {"base": (0.02, 1.0, 0.05), "delta": (0.001, 0.0, 0.003)}[side]
        normal = random.standard_normal(min(_PERIOD, 4 * largest), dtype=np.float32)
        self._matrix = np.resize((normal * scale).astype(np.float16), largest + len(normal))
        self._norm = (middle + spread * normal[: 1 << 16]).astype(np.float16)
        self._starts = np.random.default_rng(seed)
        self._period = len(normal)

    def of(self, tensor: Tensor, start: int) -> npt.NDArray[Any]:
        """The elements of a tensor, in one dimension; ``start`` decides which."""
        if tensor.is_buffer:
            exponents = np.arange(tensor.elements, dtype=np.float32) / tensor.elements
            return np.asarray(1 / 10000**exponents, dtype=np.float32)
        if len(tensor.shape) == 1:
            return np.resize(self._norm[start % 256 :], tensor.elements)
        place = start * 1_000_003 % self._period
        return self._matrix[place : place + tensor.elements]


class _Model:
    """The tensors of a side and their values."""

    def __init__(self, shape: Shape, side: str) -> None:
        self._place = {tensor.name: place for place, tensor in enumerate(shape.tensors())}
        self._values = _Values(side, max(tensor.elements for tensor in shape.tensors()))

    def __getitem__(self, tensor: Tensor) -> npt.NDArray[Any]:
        return self._values.of(tensor, self._place[tensor.name])


# .bin


def _write_bins(directory: Path, wanted: Wanted, side: str) -> None:
    tensors = list(wanted.shape.tensors())
    size = wanted.shape.nbytes
    limit = _BIN_SHARD_BYTES if size > _BIN_SHARD_BYTES else size * 2 // 3
    shards = _shards(tensors, wanted.shards, limit)
    files = dict(zip(_names("pytorch_model", ".bin", len(shards)), shards, strict=True))
    model = _Model(wanted.shape, side)
    for name, content in files.items():
        _write_bin(directory / name, content, model)
    _write_index(directory, "pytorch_model.bin.index.json", files)


@dataclass(frozen=True, slots=True)
class _Storage:
    """Stands for a storage in the pickle."""

    key: str
    type: Any
    elements: int


@dataclass(frozen=True, slots=True)
class _Stored:
    """Stands for a tensor in the pickle: rebuilt as `torch.save` of 2023 says."""

    storage: _Storage
    shape: tuple[int, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        from torch._utils import _rebuild_tensor_v2

        strides = tuple(int(np.prod(self.shape[place + 1 :])) for place in range(len(self.shape)))
        return _rebuild_tensor_v2, (self.storage, 0, self.shape, strides, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, thing: object) -> tuple[Any, ...] | None:
        if isinstance(thing, _Storage):
            return ("storage", thing.type, thing.key, "cpu", thing.elements)
        return None


def _write_bin(path: Path, tensors: Sequence[Tensor], model: _Model) -> None:
    """Write what `torch.save` would, one tensor in memory at a time: its pickle, its zip writer, its checksums."""
    import torch

    types = {"F16": torch.HalfStorage, "F32": torch.FloatStorage}
    stored = {
        str(key): _Stored(_Storage(str(key), types[tensor.dtype], tensor.elements), tensor.shape)
        for key, tensor in enumerate(tensors)
    }
    text = BytesIO()
    state_dict = OrderedDict(zip((tensor.name for tensor in tensors), stored.values(), strict=True))
    _Pickler(text, protocol=2).dump(state_dict)
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.write_record("data.pkl", text.getvalue(), len(text.getvalue()))
    for key, tensor in sorted((str(key), tensor) for key, tensor in enumerate(tensors)):  # as text: 0, 1, 10, 100
        storage: Any = torch.from_numpy(
            model[tensor]
        ).untyped_storage()  # torch's own annotation knows typed ones alone
        writer.write_record(f"data/{key}", storage, tensor.nbytes)
    writer.write_end_of_file()


# safetensors


def _write_safetensors(directory: Path, wanted: Wanted, side: str) -> None:
    model = _Model(wanted.shape, side)

    def write(file: IO[bytes], tensor: Tensor) -> None:
        file.write(model[tensor].data)

    _safetensors_files(directory, wanted, write)


def _write_sparse(directory: Path, wanted: Wanted, _side: str) -> None:
    def write(file: IO[bytes], tensor: Tensor) -> None:
        file.truncate(file.seek(tensor.nbytes, 1))

    _safetensors_files(directory, wanted, write)


def _safetensors_files(directory: Path, wanted: Wanted, write: Callable[[IO[bytes], Tensor], None]) -> None:
    """Write a model as transformers does: cut in its order, each file sorted by name."""
    shards = _shards(list(wanted.shape.weights()), wanted.shards, _SAFETENSORS_SHARD_BYTES)
    files = dict(zip(_names("model", ".safetensors", len(shards)), shards, strict=True))
    for name, content in files.items():
        tensors = sorted(content, key=lambda tensor: tensor.name)
        with (directory / name).open("wb") as file:
            file.write(_header(tensors))
            for tensor in tensors:
                write(file, tensor)
    _write_index(directory, "model.safetensors.index.json", files)


def _header(tensors: Sequence[Tensor]) -> bytes:
    """The header of a safetensors file of these tensors, in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# the files beside the weights


def _write_companions(directory: Path, shape: Shape) -> None:
    config = shape.config()
    _write_json(directory / "config.json", config)
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")
    _write_json(
        directory / "generation_config.json", {"_from_model_config": True, **{key: config[key] for key in kept}}
    )
    _write_tokenizer(directory, min(400, shape.vocabulary))


def _write_tokenizer(directory: Path, pieces: int) -> None:
    """A small SentencePiece model in LLaMA's manner, so that tools that insist on a tokenizer run."""
    if pieces < 300:  # 256 of them are bytes
        return
    from sentencepiece import SentencePieceTrainer

    words = [tensor.name.replace(".", " ").replace("_", " ") for tensor in SHAPES["tiny"].tensors()]
    model = BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(words * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=pieces,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    _write_json(
        directory / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "model_max_length": 2048,
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": "<unk>",
        },
    )
    _write_json(directory / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
