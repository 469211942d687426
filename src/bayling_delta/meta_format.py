"""Meta's own checkpoints, ``consolidated.NN.pth`` and ``params.json``: HuggingFace's names and layout for them.

A model is cut into parts, one for each GPU that it was made for. Each part is a state dict of the same names: of
every matrix it has a range of rows or of columns, and of every norm a copy. Meta rotates neighbouring rows of a
head's q and k together, HuggingFace the rows of its two halves, so that their rows lie in another order.
Sources: Meta's llama/model.py; transformers' convert_llama_weights_to_hf.py, which writes what this describes.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bayling_delta.errors import Problem
from bayling_delta.tensors import TensorRef, View

__all__ = ["PARAMS_NAME", "Assembly", "Params", "assemble", "is_part", "read_params"]

PARAMS_NAME: Final = "params.json"
_PART: Final = re.compile(r"consolidated\.[0-9]{2}\.pth")
_MOST_PARTS: Final = 100
"""As many as two digits can number; Meta's largest model has 16."""


def is_part(name: str) -> bool:
    """Whether a file is, by its name, one part of a model in Meta's format."""
    return _PART.fullmatch(name) is not None


# params.json


@dataclass(frozen=True, slots=True)
class Params:
    """What params.json says of a model."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    table: Mapping[str, Any]
    """All of it."""

    @property
    def head_dim(self) -> int:
        """Rows of one head of q, k or v."""
        return self.dim // self.heads

    @property
    def config(self) -> dict[str, Any]:
        """What a config.json of the same model says, as far as it follows."""
        config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.dim,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
        }
        if type(self.table.get("norm_eps")) is float:
            config["rms_norm_eps"] = self.table["norm_eps"]
        if _count(self.table.get("vocab_size")):  # LLaMA's and Llama-2's say -1: ask the tokenizer
            config["vocab_size"] = self.table["vocab_size"]
        if inner := self._intermediate_size():
            config["intermediate_size"] = inner
        return config

    def _intermediate_size(self) -> int | None:
        """Rows of w1, as Meta's FeedForward computes them."""
        multiple, factor = self.table.get("multiple_of"), self.table.get("ffn_dim_multiplier")
        if type(multiple) is not int or multiple < 1:
            return None
        inner = int(8 * self.dim / 3)
        if isinstance(factor, int | float) and 0 < factor < 1000:
            inner = int(factor * inner)
        return multiple * -(-inner // multiple)


def read_params(path: Path, table: Mapping[str, Any]) -> tuple[Params | None, list[Problem]]:
    """What the table in params.json says, and what is wrong with it; None where that is too much to go on."""
    sizes = {key: table.get(key) for key in ("dim", "n_layers", "n_heads")}
    kv_heads = table.get("n_kv_heads")
    sizes["n_kv_heads"] = sizes["n_heads"] if kv_heads is None else kv_heads  # as in every LLaMA-1
    problems = [
        Problem("damaged", str(path), f"says {key} {str(size)[:40]}, which is no number of them")
        for key, size in sizes.items()
        if not _count(size)
    ]
    if problems:
        return None, problems
    dim, layers, heads, kv_heads = (int(size or 0) for size in sizes.values())
    if dim % (2 * heads) or heads % kv_heads:
        what = f"says dim {dim:,}, n_heads {heads:,} and n_kv_heads {kv_heads:,}, which do not divide each other"
        return None, [Problem("damaged", str(path), what)]
    return Params(dim, layers, heads, kv_heads, table), []


def _count(value: object) -> bool:
    return type(value) is int and 0 < value < 1 << 31


# tensors


@dataclass(frozen=True, slots=True)
class _Place:
    """What becomes of one of Meta's tensors."""

    name: str
    """HuggingFace's, with ``{}`` for the layer."""
    axis: int | None
    """Along which the parts are joined; None where each part has a copy of the whole."""
    rows: str = ""
    """Of the whole: ``dim``, ``kv`` (heads of k and v), ``inner``, ``words``; norms have no more dimensions."""
    columns: str = ""
    rotated: bool = False
    """Whether the rows of a head have to be put into another order."""


_LAYER = "model.layers.{}."
_PLACES: Final = {
    "tok_embeddings.weight": _Place("model.embed_tokens.weight", 1, "words", "dim"),
    "norm.weight": _Place("model.norm.weight", None, "dim"),
    "output.weight": _Place("lm_head.weight", 0, "words", "dim"),
    "attention.wq.weight": _Place(f"{_LAYER}self_attn.q_proj.weight", 0, "dim", "dim", rotated=True),
    "attention.wk.weight": _Place(f"{_LAYER}self_attn.k_proj.weight", 0, "kv", "dim", rotated=True),
    "attention.wv.weight": _Place(f"{_LAYER}self_attn.v_proj.weight", 0, "kv", "dim"),
    "attention.wo.weight": _Place(f"{_LAYER}self_attn.o_proj.weight", 1, "dim", "dim"),
    "feed_forward.w1.weight": _Place(f"{_LAYER}mlp.gate_proj.weight", 0, "inner", "dim"),
    "feed_forward.w2.weight": _Place(f"{_LAYER}mlp.down_proj.weight", 1, "dim", "inner"),
    "feed_forward.w3.weight": _Place(f"{_LAYER}mlp.up_proj.weight", 0, "inner", "dim"),
    "attention_norm.weight": _Place(f"{_LAYER}input_layernorm.weight", None, "dim"),
    "ffn_norm.weight": _Place(f"{_LAYER}post_attention_layernorm.weight", None, "dim"),
}
"""By Meta's names, without ``layers.N.``."""
_ROTARY: Final = "rope.freqs"
"""A table of frequencies that is computed on loading; in files of 2023 it is stored too."""


@dataclass(frozen=True, slots=True)
class Assembly:
    """The model that some parts make together."""

    tensors: dict[str, TensorRef]
    """By HuggingFace's names, in the order of the first part."""
    copies: dict[str, tuple[TensorRef, ...]]
    """Of the tensors that every part has whole: each part's."""


def assemble(
    directory: Path, parts: Mapping[int, Mapping[str, TensorRef]], params: Params
) -> tuple[Assembly | None, list[Problem]]:
    """Join the parts of a model, which are given by their numbers; None, and what is wrong, where they make none.

    Nothing is read: a tensor of which each part has a piece becomes a reference of several views.
    """
    problems = _absent_parts(directory, parts, params)
    if problems:
        return None, problems
    states = [
        {name: ref for name, ref in parts[number].items() if not name.endswith(_ROTARY)} for number in sorted(parts)
    ]
    paths = [directory / _part_name(number) for number in sorted(parts)]
    places, problems = _places(paths, states, params)
    if problems:
        return None, problems
    sizes = {"dim": params.dim, "kv": params.kv_heads * params.head_dim}
    tensors: dict[str, TensorRef] = {}
    copies: dict[str, tuple[TensorRef, ...]] = {}
    for name, (place, new_name) in places.items():
        refs = [state[name] for state in states]
        if len({(ref.dtype, ref.shape) for ref in refs}) > 1:
            shown = ", ".join(f"{ref} in {path.name}" for ref, path in zip(refs, paths, strict=True))
            problems.append(Problem("damaged", str(directory), f"{name} is not alike in all parts: {shown}"))
            continue
        axis = _axis(place, refs, params)
        shape = _joined_shape(refs, axis)
        if (wrong := _check_shape(place, shape, sizes)) is not None:
            what = f"{name} is {refs[0]} in each of {len(refs)} parts, {list(shape)} in all; {wrong}"
            problems.append(Problem("damaged", str(directory), what))
            continue
        if axis is None:
            copies[new_name] = tuple(refs)
            tensors[new_name] = refs[0]
            continue
        views = [ref.views[0] for ref in refs]
        if place.rotated:
            if any(view.shape[0] % params.head_dim for view in views):
                what = f"{name} is {refs[0]} in each part, which are no whole heads of {params.head_dim} rows"
                problems.append(Problem("damaged", str(directory), what))
                continue
            views = [_rotated(view, params.head_dim) for view in views]
        tensors[new_name] = TensorRef(refs[0].dtype, shape, tuple(views), axis if len(views) > 1 else 0)
    return (None if problems else Assembly(tensors, copies)), problems


def _part_name(number: int) -> str:
    return f"consolidated.{number:02}.pth"


def _absent_parts(directory: Path, parts: Mapping[int, Mapping[str, TensorRef]], params: Params) -> list[Problem]:
    """The parts that should be there, by how many rows of q each has, and by the numbers of the others."""
    count = max(parts) + 1
    for state in parts.values():
        query = state.get("layers.0.attention.wq.weight")
        rows, *columns = query.shape if query is not None and query.shape else (0,)
        if rows and columns == [params.dim] and not params.dim % rows:
            count = params.dim // rows
            break
    if count <= max(parts):
        what = f"has parts up to {_part_name(max(parts))}; by its shapes the model has {count}"
        return [Problem("damaged", str(directory), what)]
    return [
        Problem(
            "incomplete",
            str(directory / _part_name(number)),
            f"is not here; the model has {count} parts. Download the missing one",
        )
        for number in range(min(count, _MOST_PARTS))
        if number not in parts
    ]


def _places(
    paths: Sequence[Path], states: Sequence[Mapping[str, TensorRef]], params: Params
) -> tuple[dict[str, tuple[_Place, str]], list[Problem]]:
    """What becomes of each tensor, and its new name, in the order of the first part; and what is missing or strange."""
    places: dict[str, tuple[_Place, str]] = {}
    problems: list[Problem] = []
    names = dict.fromkeys(name for state in states for name in state)
    layers: dict[int, set[str]] = {}
    for name in names:
        found = re.fullmatch(r"layers\.(0|[1-9][0-9]{0,2})\.(.+)", name)
        place = _PLACES.get(found[2] if found else name)
        if place is None or (found is None) != ("{}" not in place.name):
            what = f"has {name[:80]!r}, which no LLaMA of Meta's has; is it another kind of model?"
            problems.append(Problem("unsupported", str(paths[0].parent), what))
            continue
        if found:
            layers.setdefault(int(found[1]), set()).add(found[2])
        places[name] = place, place.name.format(found[1] if found else "")
    if len(layers) != params.layers or max(layers, default=-1) >= params.layers:
        what = f"has {len(layers):,} layers; {PARAMS_NAME} says n_layers {params.layers:,}"
        problems.append(Problem("incomplete", str(paths[0].parent), what))
    wanted = [name for name, place in _PLACES.items() if "{}" not in place.name]
    wanted += [
        f"layers.{layer}.{name}" for layer in sorted(layers) for name, place in _PLACES.items() if "{}" in place.name
    ]
    problems += [
        Problem("incomplete", str(path), f"lacks {name}; download it again")
        for path, state in zip(paths, states, strict=True)
        for name in wanted
        if name not in state
    ]
    return places, problems


def _axis(place: _Place, refs: Sequence[TensorRef], params: Params) -> int | None:
    """Along which axis a tensor's parts are joined: Llama-3 cut the embedding by words, those before by columns."""
    if place.axis == 1 and place.rows == "words" and refs[0].shape[1:] == (params.dim,):
        return 0
    return place.axis


def _joined_shape(refs: Sequence[TensorRef], axis: int | None) -> tuple[int, ...]:
    shape = refs[0].shape
    if axis is None or axis >= len(shape):
        return shape
    return (*shape[:axis], shape[axis] * len(refs), *shape[axis + 1 :])


def _check_shape(place: _Place, shape: tuple[int, ...], sizes: dict[str, int]) -> str | None:
    """What a joined tensor's shape should be instead; what is still unknown of the sizes is taken from it."""
    wanted = [size for size in (place.rows, place.columns) if size]
    if len(shape) != len(wanted):
        return f"it should have {len(wanted)} dimensions"
    for size, found in zip(wanted, shape, strict=True):
        sizes.setdefault(size, found)
    expected = [sizes[size] for size in wanted]
    return None if list(shape) == expected else f"it should be {expected}"


def _rotated(view: View, head_dim: int) -> View:
    """A part of q or k, a whole number of heads, with the rows of each head in HuggingFace's order.

    Row ``j * head_dim / 2 + i`` of a head, with j 0 or 1, is Meta's row ``2 * i + j``.
    """
    rows, columns = view.shape
    row, column = view.steps
    shape = (rows // head_dim, 2, head_dim // 2, columns)
    return View(view.file, view.offset, shape, (head_dim * row, row, 2 * row, column))
