"""What a checkpoint shows: its architecture, its tokenizer, whether it looks like a delta or a full model, oddities.

Whether it is a delta or a full model is read off signs. They are told with their figures, and prove nothing.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import numpy as np

from bayling_delta.checkpoint import EMBEDDING, Checkpoint
from bayling_delta.errors import Problem
from bayling_delta.oddities import Facts, Odd, Sizes, find_oddities
from bayling_delta.sampling import Sample, by_kind, is_norm, take_samples
from bayling_delta.tensors import FLOATS, TensorRef
from bayling_delta.tokenizer_files import TokenizerFiles, read_tokenizer

__all__ = ["Look", "look_at"]

_SIZES: Final = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_NORMS_ADD_ONE: Final = ("gemma", "qwen3_next")
"""Architectures whose norms multiply by 1 + weight: a full model's weights may lie around zero."""


@dataclass(frozen=True, slots=True)
class Look:
    """What a checkpoint shows, short of the tables that only a description needs."""

    looks_like: str
    """``delta``, ``full model`` or ``unknown``."""
    reasons: tuple[str, ...]
    norms: Mapping[str, Any] | None
    """Figures of the norm weights; None where there are none."""
    rows: Mapping[str, Any] | None
    """Figures of the sampled rows of large tensors."""
    architecture: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    kinds: Mapping[str, Sequence[str]]
    """The names of the tensors by kind."""
    small_digests: Mapping[str, str]
    """Tensor digests of the small tensors that were read whole, in hex, by name; not of zeros, which tell nothing."""
    sampled_bytes: int
    odd: Sequence[Odd]


def look_at(checkpoint: Checkpoint, problems: list[Problem], *, tokenizer: bool = True) -> Look:
    """Read the tokenizer's files, the small tensors and rows of large ones, and judge them.

    ``problems`` are those of what could not be opened; what cannot be read of the rest is added to them. Without
    ``tokenizer`` its files are left alone.

    Raises:
        CheckpointError: the system cannot read a file.
    """
    complete = not problems and not re.search(r"-of-\d+\.", checkpoint.path.name)
    tensors = checkpoint.tensors
    beside = read_tokenizer(checkpoint, problems) if tokenizer else TokenizerFiles()
    kinds = by_kind(tensors)
    architecture = _architecture(checkpoint, kinds)
    small, rows = take_samples(tensors, kinds)
    norms = _norm_figures([sample for sample in small if is_norm(sample.name, tensors[sample.name])])
    magnitudes = _row_figures(rows)
    looks_like, reasons = _verdict(norms, magnitudes, architecture["model_type"] or "")
    facts = Facts(
        checkpoint,
        problems,
        complete,
        architecture["model_type"],
        architecture["config"],
        architecture["shapes"],
        beside,
        small,
        rows,
    )
    return Look(
        looks_like,
        reasons,
        norms,
        magnitudes,
        architecture,
        _tokenizer(beside),
        kinds,
        _digests(small, tensors),
        sum(sample.bits.nbytes for sample in (*small, *rows)),
        find_oddities(facts),
    )


def _digests(small: Sequence[Sample], tensors: Mapping[str, TensorRef]) -> dict[str, str]:
    return {
        sample.name: hashlib.sha256(sample.bits.tobytes()).hexdigest()
        for sample in small
        if sample.bits.size == tensors[sample.name].elements and sample.bits.any()
    }


# the architecture


def _architecture(checkpoint: Checkpoint, kinds: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Class and sizes, as config.json has them and as the shapes show them; None where either does not tell."""
    config = checkpoint.config or {}
    classes = config.get("architectures")
    return {
        "source": checkpoint.config_name,
        "class": _text(classes[0]) if isinstance(classes, list) and classes else None,
        "model_type": _text(config.get("model_type")),
        "config": _sizes_by_config(config),
        "shapes": _sizes_by_shapes(checkpoint.tensors, kinds, config),
    }


def _sizes_by_config(config: Mapping[str, Any]) -> Sizes:
    sizes = {size: _number(config.get(size)) for size in _SIZES}
    if "num_key_value_heads" not in config:  # as in every configuration of LLaMA-1
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return sizes


def _sizes_by_shapes(
    tensors: Mapping[str, TensorRef], kinds: Mapping[str, Sequence[str]], config: Mapping[str, Any]
) -> Sizes:
    """The sizes of a model with LLaMA's names.

    Heads can be counted only where their dimension is known: from a rotary buffer, or from config.json.
    """
    layers = {
        name.split(".", 3)[2] for kind, names in kinds.items() if kind.startswith("model.layers.*.") for name in names
    }

    def size(kind: str, axis: int = 0, rank: int = 2) -> int | None:
        refs = (tensors[name] for name in kinds.get(kind, ()))
        shape = next((ref.shape for ref in refs if ref.dtype in FLOATS), ())
        return shape[axis] if len(shape) == rank else None

    layer = "model.layers.*."
    queries, keys = size(f"{layer}self_attn.q_proj.weight"), size(f"{layer}self_attn.k_proj.weight")
    hidden = size(EMBEDDING, 1) or size(f"{layer}self_attn.q_proj.weight", 1)
    head = 2 * (size(f"{layer}self_attn.rotary_emb.inv_freq", rank=1) or 0) or _number(config.get("head_dim"))
    if not head and hidden and (heads := _number(config.get("num_attention_heads"))):
        head = hidden // heads
    return {
        "num_hidden_layers": len(layers) or None,
        "hidden_size": hidden,
        "intermediate_size": size(f"{layer}mlp.gate_proj.weight"),
        "num_attention_heads": queries // head if queries and head else None,
        "num_key_value_heads": keys // head if keys and head else None,
        "vocab_size": size(EMBEDDING),
    }


def _number(value: object) -> int | None:
    return value if type(value) is int else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


# the tokenizer


def _tokenizer(files: TokenizerFiles) -> dict[str, Any]:
    return {
        "files": list(files.names),
        "class": _text(files.tables["tokenizer_config.json"].get("tokenizer_class")),
        "vocabulary": files.tokens,
    }


# delta or full model


def _norm_figures(norms: Sequence[Sample]) -> dict[str, Any] | None:
    values = np.concatenate([np.empty(0), *(sample.finite for sample in norms)])
    if not values.size:
        return None
    return {
        "tensors": len(norms),
        "elements": values.size,
        "positive": float(np.mean(values > 0)),
        "mean": float(values.mean()),
        "standard_deviation": float(values.std()),
    }


def _row_figures(rows: Sequence[Sample]) -> dict[str, Any] | None:
    """The typical magnitude: of each tensor's sampled elements the root mean square, of these the median."""
    squares = [float(np.sqrt(np.mean(sample.finite**2))) for sample in rows if sample.finite.size]
    if not squares:
        return None
    return {
        "tensors": len(rows),
        "elements": sum(sample.bits.size for sample in rows),
        "magnitude": median(squares),
    }


def _verdict(
    norms: Mapping[str, Any] | None, rows: Mapping[str, Any] | None, model_type: str
) -> tuple[str, tuple[str, ...]]:
    """What the norms show, which decides, and how large the weights are, which does not."""
    looks_like, reasons = "unknown", []
    if norms is None:
        reasons.append("what can be read has no RMS-norm weights, which are what tells")
    elif model_type.startswith(_NORMS_ADD_ONE):
        reasons.append(f"RMS-norm weights, which are what tells, may lie around zero in any model of type {model_type}")
    else:
        looks_like, meaning = _norm_sign(norms, others_zero=rows is None or not rows["magnitude"])
        reasons.append(
            f"RMS-norm weights: {norms['positive']:.1%} of {norms['elements']:,} elements are positive, mean "
            f"{norms['mean']:.3g}, standard deviation {norms['standard_deviation']:.3g}; {meaning}"
        )
    if rows is not None:
        reasons.append(
            f"rows of {rows['tensors']} large tensors: typical magnitude {rows['magnitude']:.2g} "
            "(a full LLaMA has 0.01 to 0.05, deltas to it far less)"
        )
    return looks_like, tuple(reasons)


def _norm_sign(norms: Mapping[str, Any], *, others_zero: bool) -> tuple[str, str]:
    """What the norm weights look like, and what they are held against."""
    positive, mean, deviation = norms["positive"], norms["mean"], norms["standard_deviation"]
    if not mean and not deviation:
        if others_zero:
            return "unknown", "all are zero, and so is all else that was read"
        return "delta", "all are zero, and other weights are not: the norms were not trained"
    if positive >= 0.9 and mean >= 0.05:
        return "full model", "a full model's are clearly positive, a delta's lie around zero"
    if math.hypot(mean, deviation) <= 0.02 or (positive <= 0.75 and abs(mean) <= deviation):
        return "delta", "a delta's lie around zero, a full model's are clearly positive"
    return "unknown", "a full model's are clearly positive, a delta's lie around zero; these are neither"
