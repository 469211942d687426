"""What a run will do, decided in full before a byte is written: pairs, output files, reads, memory.

Everything here is a function of headers; nothing is written, and weights are read only to see whether
two tensors that should be one are (`tied_problem`).
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Final

import numpy as np

from bayling_delta.checkpoint import EMBEDDING, HEAD, Checkpoint
from bayling_delta.errors import Problem, refuse
from bayling_delta.gathering import tiles
from bayling_delta.pairing import StandIn, pair_problems, stand_in
from bayling_delta.reads import ReadList, in_stored_order, read_in_order_of
from bayling_delta.recipes import PLAIN, Recipe
from bayling_delta.safetensors_format import lay_out
from bayling_delta.sources import open_source
from bayling_delta.system import ALIGNMENT
from bayling_delta.tensors import DTYPES, TensorRef

__all__ = [
    "DEFAULT_MEMORY_LIMIT",
    "DEFAULT_SHARD_SIZE",
    "Budget",
    "OutputFile",
    "OutputTensor",
    "Plan",
    "counted_weights",
    "make_budget",
    "make_plan",
]

DEFAULT_SHARD_SIZE: Final = 5 * 10**9
"""Bytes of tensors in an output file: the ecosystem's default since transformers 4.35."""
DEFAULT_MEMORY_LIMIT: Final = 64 << 20
"""Bytes of buffers."""
_LARGEST_CHUNK: Final = 2 << 20
_SMALLEST_CHUNK: Final = 16 << 10
_COMPARED: Final = 1 << 20
"""Bytes of two tensors that are held against each other at once."""


# the output


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the result, and what it is the sum of."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    base: TensorRef | None
    """None where the delta alone has the tensor. It may have fewer rows than the delta."""
    delta: TensorRef
    stand_in: StandIn = "nothing"
    """What is added where the base has no elements."""
    model: TensorRef | None = None
    """What an existing model has in its place, where the sum is to be compared with one."""

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return self.delta.elements * DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One safetensors file of the result: its header, then its tensors one after the other."""

    name: str
    header: bytes
    tensors: tuple[OutputTensor, ...]
    """In the order in which their bytes lie."""
    size: int
    """Bytes, header included."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How the memory limit is spent, in bytes."""

    chunk_bytes: int
    """One window; a multiple of `ALIGNMENT`."""
    windows: int
    """Windows of each input and output."""
    tile_bytes: int
    """What a gathering input collects at once; 0 where nothing is gathered."""
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A complete description of a run."""

    recipe: Recipe
    base: Checkpoint
    delta: Checkpoint
    model: Checkpoint | None
    """The existing model that the sum is compared with; None where the sum is written."""
    files: tuple[OutputFile, ...]
    base_reads: ReadList
    delta_reads: ReadList
    model_reads: ReadList | None
    budget: Budget
    notes: tuple[str, ...]

    @property
    def output_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file.size for file in self.files)

    @property
    def tensors(self) -> Iterator[OutputTensor]:
        """Every tensor, in the order of the output."""
        return (tensor for file in self.files for tensor in file.tensors)


def make_plan(
    base: Checkpoint,
    delta: Checkpoint,
    *,
    recipe: Recipe = PLAIN,
    dtype: str | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
    model: Checkpoint | None = None,
    digest_files: Collection[Path] = (),
    also: Sequence[Problem] = (),
    allowed: Iterable[str] = (),
) -> Plan:
    """Pair two checkpoints by a recipe and lay out the result.

    ``dtype`` (F16, BF16 or F32) casts the result once more. ``model`` is what the result will be compared with,
    if anything. ``digest_files`` are digested whole even where that takes a read of its own. ``also`` are problems
    found elsewhere, to be told together with those found here.

    Raises:
        BaylingDeltaError: with every problem, unless ``allowed`` overrules it.
    """
    base_weights, delta_weights = base.weights, delta.weights
    problems = [*also, *pair_problems(base, delta, recipe)]
    problems += [problem for side in (base, delta) if (problem := tied_problem(side))]
    refuse(problems, allowed)

    model_weights = counted_weights(model) if model else {}
    tensors = [
        OutputTensor(
            name,
            dtype or ref.dtype,
            ref.shape,
            base_weights.get(name),
            ref,
            stand_in(recipe),
            model_weights.get(name),
        )
        for name, ref in in_stored_order(delta_weights)
    ]
    if model:
        refuse(model_problems(model, model_weights, tensors))
    files = cut_into_files(tensors, max_shard_size)
    needed = [tensor for file in files for tensor in file.tensors]
    base_reads = read_in_order_of(base, [(tensor.name, tensor.base) for tensor in needed if tensor.base], digest_files)
    delta_reads = read_in_order_of(delta, [(tensor.name, tensor.delta) for tensor in needed], digest_files)
    model_reads: ReadList | None = None
    if model:
        model_reads = read_in_order_of(model, [(tensor.name, tensor.model) for tensor in needed if tensor.model])
    streams = [reads for reads in (base_reads, delta_reads, model_reads) if reads]
    budget = make_budget(memory_limit, streams, outputs=1)
    notes = base.notes + delta.notes
    return Plan(recipe, base, delta, model, files, base_reads, delta_reads, model_reads, budget, notes)


# the model to compare with, and tied weights


def model_problems(
    model: Checkpoint, weights: Mapping[str, TensorRef], tensors: Sequence[OutputTensor]
) -> list[Problem]:
    """What shows from headers alone that a model is not the sum of a base and a delta."""
    problems: list[Problem] = []
    for tensor in tensors:
        found = weights.get(tensor.name)
        if found is None:
            problems.append(Problem("model", str(model.path), f"lacks {tensor.name}, which the sum has"))
        elif (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
            what = f"is {found} in the model, {tensor.dtype} {list(tensor.shape)} in the sum"
            problems.append(Problem("model", tensor.name, what))
    extra = weights.keys() - {tensor.name for tensor in tensors}
    problems += [
        Problem("model", str(model.path), f"has {name}, which the sum does not have") for name in sorted(extra)
    ]
    return problems


def counted_weights(checkpoint: Checkpoint) -> dict[str, TensorRef]:
    """The tensors that a digest counts: the weights, and a head that is said to be tied and yet has other values."""
    weights = checkpoint.weights
    return weights | {HEAD: checkpoint.tensors[HEAD]} if tied_problem(checkpoint) else weights


def tied_problem(checkpoint: Checkpoint) -> Problem | None:
    """The finding that a tied lm_head.weight is stored by itself and has other values than the embedding.

    Reads both where they are stored apart; a shared storage needs no look.
    """
    head, embedding = checkpoint.tensors.get(HEAD), checkpoint.tensors.get(EMBEDDING)
    if not checkpoint.tied or head is None or embedding is None or head == embedding:
        return None
    if (head.dtype, head.shape) == (embedding.dtype, embedding.shape) and _same_elements(head, embedding):
        return None
    return Problem(
        "tied",
        str(checkpoint.path),
        f"config.json ties {HEAD} to {EMBEDDING}, but they differ; "
        "set tie_word_embeddings to false there if the model has a head of its own",
    )


def _same_elements(one: TensorRef, other: TensorRef) -> bool:
    with open_source(one.file) as source, open_source(other.file) as second:
        pairs = zip(tiles(source, one, _COMPARED), tiles(second, other, _COMPARED), strict=True)
        return all(np.array_equal(left.values, right.values) for left, right in pairs)


# laying out


def cut_into_files(tensors: Sequence[OutputTensor], max_shard_size: int) -> tuple[OutputFile, ...]:
    """Cut the sequence into files of at most ``max_shard_size`` bytes of tensors, as huggingface_hub does."""
    from huggingface_hub import split_state_dict_into_shards_factory  # some 40 ms

    by_name = {tensor.name: tensor for tensor in tensors}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=attrgetter("nbytes"),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    files: list[OutputFile] = []
    for file_name, names in split.filename_to_tensors.items():
        chosen = [by_name[name] for name in names]
        header, starts = lay_out((tensor.name, tensor.dtype, tensor.shape) for tensor in chosen)
        chosen.sort(key=lambda tensor: starts[tensor.name])  # stable: an empty tensor starts where the next does
        size = len(header) + sum(tensor.nbytes for tensor in chosen)
        files.append(OutputFile(file_name, header, tuple(chosen), size))
    return tuple(files)


# memory


def make_budget(limit: int, reads: Sequence[ReadList], *, outputs: int = 0) -> Budget:
    """Spend ``limit`` bytes on windows for inputs and outputs, and on tiles where an input is gathered.

    Raises:
        UsageError: the limit is too low; the message names the least that works.
    """
    gathering = sum(read.gathers for read in reads)
    streams = len(reads) + outputs
    least = 2 * streams * _SMALLEST_CHUNK + gathering * 4 * _SMALLEST_CHUNK
    if limit < least:
        message = f"{limit:,} bytes are too few for this plan; the least that works is {-(-least >> 10)}KiB"
        refuse([Problem("memory_limit", "--memory-limit", message)])
    tile = limit // 4 // max(1, gathering) if gathering else 0
    left = limit - tile * gathering
    chunk = min(_LARGEST_CHUNK, left // (4 * streams) // ALIGNMENT * ALIGNMENT)
    chunk = max(chunk, _SMALLEST_CHUNK)
    windows = min(8, left // (streams * chunk))
    return Budget(chunk, windows, tile, windows * streams * chunk + tile * gathering)
