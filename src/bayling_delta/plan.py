"""What a run will do, decided in full before a byte is written: pairs, output files, reads, memory.

Everything here is a function of headers, of the small files beside the weights, and of the room that there is; nothing
is written, and weights are read only to see whether two tensors that should be one are (`tied_problem`).
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Final

from bayling_delta.checkpoint import EMBEDDING, HEAD, Checkpoint
from bayling_delta.companions import stamps
from bayling_delta.copies import copy_problems
from bayling_delta.errors import CheckpointError, Problem, refuse
from bayling_delta.expectations import Expectation, listed_files, listed_problems, own_expectations
from bayling_delta.gathering import elements_digest
from bayling_delta.pairing import StandIn, pair_problems, stand_in
from bayling_delta.reads import ReadList, in_stored_order, read_in_order_of
from bayling_delta.recipes import PLAIN, Recipe
from bayling_delta.safetensors_format import lay_out
from bayling_delta.staging import room_problems
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
_LARGEST_CHUNK: Final = 8 << 20
"""One read or write at a time keeps a disk busy only if it is a large one; docs/benchmarks.md has the trial."""
_SMALLEST_CHUNK: Final = 16 << 10
_LARGEST_TILE: Final = 256 << 20
"""More than this makes gathering no faster."""


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

    def made_of(self, role: str) -> dict[str, int]:
        """Of each file of an input, ``base`` or ``delta``, up to which byte this file is made of it."""
        stops: dict[str, int] = {}
        for tensor in self.tensors:
            ref = tensor.base if role == "base" else tensor.delta
            if ref is None or not ref.elements:
                continue
            for view in ref.views:
                stop = view.offset + view.elements * DTYPES[ref.dtype]
                stops[view.file.name] = max(stop, stops.get(view.file.name, 0))
        return stops


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
    base_records: tuple[Expectation, ...]
    """What lies beside the base of records of its files."""
    delta_records: tuple[Expectation, ...]
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
    out: Path | None = None,
    also: Sequence[Problem] = (),
    allowed: Iterable[str] = (),
) -> Plan:
    """Pair two checkpoints by a recipe and lay out the result.

    ``dtype`` (F16, BF16 or F32) casts the result once more. ``model`` is what the result will be compared with,
    if anything. ``digest_files`` are digested whole even where that takes a read of its own, and so are files that
    are recorded beside base and delta, or on the Hub. ``out`` is where the result will be made, with the files
    beside the delta, if it is. ``also`` are problems found elsewhere, to be told together with those found here.

    Raises:
        BaylingDeltaError: with every problem, unless ``allowed`` overrules it.
    """
    base_weights, delta_weights = base.weights, delta.weights
    problems = [*also, *pair_problems(base, delta, recipe)]
    problems += [problem for side in (base, delta) if (problem := tied_problem(side))]
    problems += [problem for side in (base, delta) for problem in copy_problems(side)]
    base_records, delta_records = _records_beside(base, problems), _records_beside(delta, problems)
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
    files = cut_into_files(tensors, max_shard_size)
    if out:
        problems += room_problems(out, [file.size for file in files])
        problems += listed_problems(delta.directory, stamps(delta.directory), delta_records)
    refuse(problems, allowed)
    if model:
        refuse(model_problems(model, model_weights, tensors))
    needed = [tensor for file in files for tensor in file.tensors]
    base_needed = [(tensor.name, tensor.base) for tensor in needed if tensor.base]
    base_reads = read_in_order_of(base, base_needed, *_listed(base, base_records, digest_files))
    delta_needed = [(tensor.name, tensor.delta) for tensor in needed]
    delta_reads = read_in_order_of(delta, delta_needed, *_listed(delta, delta_records, digest_files))
    base_reads, delta_reads = _with_stops(base_reads, "base", files), _with_stops(delta_reads, "delta", files)
    model_reads: ReadList | None = None
    if model:
        model_reads = read_in_order_of(model, [(tensor.name, tensor.model) for tensor in needed if tensor.model])
    streams = [reads for reads in (base_reads, delta_reads, model_reads) if reads]
    budget = make_budget(memory_limit, streams, outputs=1)
    notes = (*base.notes, *delta.notes, *_read_again(base, base_reads), *_read_again(delta, delta_reads))
    return Plan(
        recipe,
        base,
        delta,
        model,
        base_records,
        delta_records,
        files,
        base_reads,
        delta_reads,
        model_reads,
        budget,
        notes,
    )


def _with_stops(reads: ReadList, role: str, files: Sequence[OutputFile]) -> ReadList:
    """Where an input is digested by file alone: with the digests of what each output file is made of."""
    if reads.tensors:
        return reads
    stops: dict[str, set[int]] = {}
    for file in files:
        for name, stop in file.made_of(role).items():
            stops.setdefault(name, set()).add(stop)
    return replace(reads, stops={name: tuple(sorted(places)) for name, places in stops.items()})


def _records_beside(side: Checkpoint, problems: list[Problem]) -> tuple[Expectation, ...]:
    """What is recorded of an input beside it; a record that cannot be used is a problem, and is told once."""
    try:
        return tuple(own_expectations(side.directory))
    except CheckpointError as error:
        for problem in error.problems:
            if problem not in problems:
                advice = "; mend it, or move it away if it does not belong to these files"
                problems.append(replace(problem, message=problem.message + advice))
        return ()


def _listed(
    side: Checkpoint, records: Sequence[Expectation], digest_files: Collection[Path]
) -> tuple[list[str], list[str]]:
    """The weight files whose digest is recorded or asked for, and those of which it is an MD5."""
    names = [file.path.name for file in side.files]
    listed, md5 = listed_files(records, names)
    asked = [file.path.name for file in side.files if file.path in digest_files]
    return [name for name in names if name in {*listed, *asked}], md5


def _read_again(side: Checkpoint, reads: ReadList) -> list[str]:
    """What to tell where files are read once more, since a digest of them is recorded and their order is another."""
    if not reads.tensors or not reads.files:
        return []
    size = sum(reads.files.values())
    what = "a digest of each may be on record, and the sum meets their bytes in another order"
    return [f"{side.directory}: {', '.join(reads.files)} are read once more ({size:,} bytes): {what}"]


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
    same_form = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    if same_form and elements_digest(head) == elements_digest(embedding):
        return None
    return Problem(
        "tied",
        str(checkpoint.path),
        f"config.json ties {HEAD} to {EMBEDDING}, but they differ; "
        "set tie_word_embeddings to false there if the model has a head of its own",
    )


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
    gathering = sum(read.least_tile > 0 for read in reads)
    least_tile = max((read.least_tile for read in reads), default=0)
    streams = len(reads) + outputs
    least = 2 * streams * _SMALLEST_CHUNK + gathering * least_tile
    if limit < least:
        message = f"{limit:,} bytes are too few for this plan; the least that works is {-(-least >> 10)}KiB"
        refuse([Problem("memory_limit", "--memory-limit", message)])
    tile = max(least_tile, min(_LARGEST_TILE, limit // 4 // gathering)) if gathering else 0
    left = limit - tile * gathering
    chunk = min(_LARGEST_CHUNK, left // (4 * streams) // ALIGNMENT * ALIGNMENT)
    chunk = max(chunk, _SMALLEST_CHUNK)
    windows = min(8, left // (streams * chunk))
    return Budget(chunk, windows, tile, windows * streams * chunk + tile * gathering)
