"""What is odd about a checkpoint: nothing that keeps it from being described, all of it worth knowing.

Each check yields what it finds. The oddities are those that the conversions and releases of 2023 are known for;
the source of each stands beside it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from bayling_delta.checkpoint import EMBEDDING, HEAD, Checkpoint, loadable_files
from bayling_delta.companions import foreign_files
from bayling_delta.copies import copy_problems
from bayling_delta.errors import Problem
from bayling_delta.sampling import Sample
from bayling_delta.sources import file_size
from bayling_delta.tensors import TORCH_NAMES
from bayling_delta.tokenizer_files import TokenizerFiles, too_many_tokens

__all__ = ["Facts", "Odd", "Sizes", "find_oddities"]

_QUANTISED: Final = tuple(".qweight .qzeros .scales .g_idx .SCB .absmax .quant_map".split())
"""How the names of GPTQ, AWQ and bitsandbytes end."""
_LEAST_NORMALS: Final = 512
"""Normal float16 numbers from which low bits that are all zero are no accident: one number in eight has them."""

Sizes = Mapping[str, int | None]
"""Sizes of an architecture by their keys in config.json; None where unknown."""
Odd = dict[str, str]
"""One finding: ``kind``, ``where``, ``message``."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found out of a checkpoint."""

    checkpoint: Checkpoint
    problems: Sequence[Problem]
    """What is wrong with the parts that could not be read."""
    complete: bool
    """Whether these are all tensors of the model, as far as can be told."""
    model_type: str | None
    by_config: Sizes
    by_shapes: Sizes
    tokenizer: TokenizerFiles
    small: Sequence[Sample]
    rows: Sequence[Sample]

    @property
    def dtype(self) -> str:
        """That of most bytes."""
        sizes: Counter[str] = Counter()
        for ref in self.checkpoint.tensors.values():
            sizes[ref.dtype] += ref.nbytes
        return min(sizes, key=lambda dtype: (-sizes[dtype], dtype))

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json, or nothing."""
        return self.checkpoint.config or {}

    @property
    def config_path(self) -> str:
        """Where config.json is, or should be; for Meta's format, params.json."""
        return str(self.checkpoint.directory / self.checkpoint.config_name)


def find_oddities(facts: Facts) -> list[Odd]:
    """List everything odd, what could not be read first."""
    found = [_odd(problem.kind, problem.where, problem.message) for problem in facts.problems]
    return found + [odd for check in _CHECKS for odd in check(facts)]


def _odd(kind: str, where: Path | str, message: str) -> Odd:
    return {"kind": kind, "where": str(where), "message": message}


# files


def _files(facts: Facts) -> Iterator[Odd]:
    checkpoint, directory = facts.checkpoint, facts.checkpoint.directory
    if checkpoint.path != directory and checkpoint.path.suffix != ".json":
        return  # of a single file: what lies beside it says nothing
    known = {str(file.path) for file in checkpoint.files} | {problem.where for problem in facts.problems}
    stray = [
        name
        for name in loadable_files(directory)
        if str(directory / name) not in known and not name.endswith(".index.json")
    ]
    own_suffix = {"torch": ".bin", "meta": ".pth"}.get(checkpoint.container, ".safetensors")
    if any(not name.endswith(own_suffix) for name in stray):
        what = (
            f"has safetensors and .bin weights: loaders take safetensors, and {checkpoint.container} is described here"
        )
        yield _odd("both_containers", directory, what)
    if own := [name for name in stray if name.endswith(own_suffix)]:
        yield _odd("stray_weights", directory, f"has weights that are not part of this model: {_listed(own)}")
    if foreign := foreign_files(checkpoint):
        yield _odd("extra_files", directory, f"has files that are not understood here: {_listed(foreign)}")


def _listed(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


# config.json


def _config(facts: Facts) -> Iterator[Odd]:
    if facts.checkpoint.config is None:
        if file_size(Path(facts.config_path)) is None:
            yield _odd("config", facts.config_path, "is not there; a loader takes the architecture from it")
        return
    for key, shown in facts.by_shapes.items():
        said = facts.by_config[key]
        if key == "vocab_size" or (key == "num_hidden_layers" and not facts.complete):
            continue
        if said is not None and shown is not None and said != shown:
            yield _odd("architecture", facts.config_path, f"says {key} {said:,}; the shapes say {shown:,}")


def _dtype(facts: Facts) -> Iterator[Odd]:
    said = facts.config.get("dtype") or facts.config.get("torch_dtype")  # transformers 5, and older ones
    dtype = facts.dtype
    stored = TORCH_NAMES.get(dtype)
    if stored is None or said not in TORCH_NAMES.values() or said == stored:
        return
    if (stored, said) == ("bfloat16", "float16"):
        # convert_llama_weights_to_hf.py of transformers 4.33 and later loads in bfloat16, then writes float16 into
        # config.json (huggingface/transformers#25446).
        what = f"says float16, but the weights are stored as BF16. {_ROUNDED}"
        yield _odd("bfloat16", facts.config_path, what)
    else:
        yield _odd("dtype", facts.config_path, f"says {said}; most weights are stored as {dtype}")


def _llama(facts: Facts) -> Iterator[Odd]:
    if facts.model_type != "llama":
        return
    config = facts.config
    bos, eos, pad = (config.get(f"{which}_token_id") for which in ("bos", "eos", "pad"))
    if (bos, eos) == (0, 1) and pad in (-1, None):
        what = "says bos 0 and eos 1, as the decapoda conversions of 2023 wrongly do; LLaMA's are bos 1 and eos 2"
        yield _odd("special_tokens", facts.config_path, what)
    signs = []
    if config.get("max_position_embeddings") == 4096:
        signs.append("max_position_embeddings 4,096")
    if config.get("rms_norm_eps") == 1e-5 and config.get("hidden_size") != 8192:  # LLaMA-1 65B has it too
        signs.append("rms_norm_eps 1e-05")
    words = facts.by_config["vocab_size"] or facts.by_shapes["vocab_size"]  # Meta's params.json does not say it
    if signs and words in range(32000, 32064):
        what = f"says {' and '.join(signs)}, which suggests Llama-2; LLaMA-1, which the deltas of 2023 add to, has"
        yield _odd("generation", facts.config_path, f"{what} 2,048 and 1e-06")


# vocabulary and tokenizer


def _embeddings(facts: Facts) -> Iterator[Odd]:
    rows, said = facts.by_shapes["vocab_size"], facts.by_config["vocab_size"]
    head = facts.checkpoint.tensors.get(HEAD)
    if rows is None:
        return
    if said not in (None, rows):
        file = facts.checkpoint.config_name
        yield _odd("vocabulary", EMBEDDING, f"has {rows:,} rows; {file} says vocab_size {said:,}")
    if head is not None and head.shape and head.shape[0] != rows:
        yield _odd("vocabulary", HEAD, f"has {head.shape[0]:,} rows; {EMBEDDING} has {rows:,}")
    added = rows % 64
    if 1 <= added <= 4 and rows > 64:
        # Vocabularies are padded to such multiples; LLaMA's is 32,000. Sources: the scripts that apply the deltas.
        likely = {32001: " ([PAD], as in Vicuna v0, Alpaca and WizardLM)", 32003: " (images, as in LLaVA)"}
        what = f"has {rows:,} rows, {added} more than a multiple of 64: probably tokens added to a vocabulary of"
        yield _odd("vocabulary", EMBEDDING, f"{what} {rows - added:,}{likely.get(rows, '')}")
    if facts.tokenizer.tokens is not None and facts.tokenizer.tokens > rows:
        yield _odd("vocabulary", "tokenizer", too_many_tokens(facts.tokenizer.tokens, rows))


def _tokenizer(facts: Facts) -> Iterator[Odd]:
    directory, tables = facts.checkpoint.directory, facts.tokenizer.tables
    if tables["tokenizer_config.json"].get("tokenizer_class") == "LLaMATokenizer":
        # huggingface/transformers#22222: transformers 4.28 did not load it; 5.23 does, and encodes otherwise.
        what = "names the class LLaMATokenizer, which no transformers has had; LlamaTokenizer is meant"
        yield _odd("tokenizer_class", directory / "tokenizer_config.json", what)
    special = tables["special_tokens_map.json"]
    if facts.model_type == "llama" and _token(special, "bos_token") == _token(special, "unk_token") == "</s>":
        # Loaders take this file over tokenizer_config.json: measured with transformers 4.28.1 and 5.23.
        what = 'has "</s>" for bos and unk, a mistake of early 2023; LLaMA\'s are "<s>" and "<unk>"'
        yield _odd("special_tokens", directory / "special_tokens_map.json", what)


def _token(table: Mapping[str, Any], key: str) -> Any:
    token = table.get(key)
    return token.get("content") if isinstance(token, dict) else token


# weights


def _quantised(facts: Facts) -> Iterator[Odd]:
    names = [
        name
        for name, ref in facts.checkpoint.tensors.items()
        if name.endswith(_QUANTISED) or (ref.dtype in ("I8", "U8") and len(ref.shape) == 2)
    ]
    if names:
        what = f"has {len(names):,} tensors of quantised weights ({_listed(names, 2)}); deltas need the original ones"
        yield _odd("quantised", facts.checkpoint.path, what)


def _non_finite(facts: Facts) -> Iterator[Odd]:
    for sample in (*facts.small, *facts.rows):
        if count := sample.bits.size - sample.finite.size:
            what = f"{count:,} of the {sample.bits.size:,} elements that were read are infinite or NaN"
            yield _odd("non_finite", sample.name, what)


def _low_bits(facts: Facts) -> Iterator[Odd]:
    """Float16 that was bfloat16 once: that has 3 bits less, so the low 3 are zero in all but subnormal numbers."""
    tensors = normals = 0
    for sample in facts.rows:
        if sample.dtype != "F16":
            continue
        exponent = sample.bits & 0x7C00
        low = sample.bits[(exponent != 0) & (exponent != 0x7C00)] & 7
        if low.any():
            return
        tensors += bool(low.size)
        normals += low.size
    if normals >= _LEAST_NORMALS and tensors > 1:
        what = f"all {normals:,} normal float16 numbers sampled, in {tensors} tensors, have their low 3 bits zero"
        yield _odd("bfloat16", facts.checkpoint.path, f"{what}: they were bfloat16 once. {_ROUNDED}")


_ROUNDED: Final = (
    "LLaMA-1, which is float16, loses precision that way, and a delta made against it gives another model; "
    "Llama-2 is bfloat16 by origin"
)


def _tied(facts: Facts) -> Iterator[Odd]:
    head, embedding = (facts.checkpoint.tensors.get(name) for name in (HEAD, EMBEDDING))
    if not facts.checkpoint.tied or head is None or embedding is None or head == embedding:
        return
    bits = {sample.name: sample.bits for sample in facts.rows}
    same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    if same and HEAD in bits and np.array_equal(bits[HEAD], bits[EMBEDDING]):
        what = f"config.json ties it to {EMBEDDING}, yet it is stored too, {head.nbytes:,} bytes that no loader needs"
    elif same and HEAD not in bits:
        return
    else:
        what = f"config.json ties it to {EMBEDDING}, but the two differ; the model may have a head of its own"
    yield _odd("tied", HEAD, what)


def _copies(facts: Facts) -> Iterator[Odd]:
    for problem in copy_problems(facts.checkpoint):
        yield _odd(problem.kind, problem.where, problem.message)


_CHECKS: Final[tuple[Callable[[Facts], Iterator[Odd]], ...]] = (
    _files,
    _config,
    _dtype,
    _llama,
    _embeddings,
    _tokenizer,
    _quantised,
    _non_finite,
    _low_bits,
    _tied,
    _copies,
)
