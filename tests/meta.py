"""Folders in Meta's own format, written by `torch.save`, and Meta's own arithmetic."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.pairs import StateDict


class Size(NamedTuple):
    """A LLaMA small enough for any test, that can be cut into eight parts."""

    dim: int = 64
    layers: int = 2
    heads: int = 16
    kv_heads: int = 16
    inner: int = 96
    words: int = 160

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def params(self) -> dict[str, Any]:
        """params.json, as Meta wrote them: LLaMA-1's say nothing of heads of k and v."""
        table = {
            "dim": self.dim, "multiple_of": 32, "n_heads": self.heads, "n_layers": self.layers, "norm_eps": 1e-06,
            "vocab_size": -1, "ffn_dim_multiplier": self.inner / (self.dim * 8 / 3),
        }  # fmt: skip
        return table if self.kv_heads == self.heads else {**table, "n_kv_heads": self.kv_heads}

    @property
    def config(self) -> dict[str, Any]:
        """config.json, as transformers writes it."""
        return {
            "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": self.dim,
            "intermediate_size": self.inner, "max_position_embeddings": 128, "model_type": "llama",
            "num_attention_heads": self.heads, "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads, "rms_norm_eps": 1e-06, "tie_word_embeddings": False,
            "torch_dtype": "float16", "vocab_size": self.words,
        }  # fmt: skip


PLAIN = Size()
GROUPED = Size(kv_heads=8)


def random_model(size: Size, seed: int = 0, dtype: torch.dtype = torch.float16, scale: float = 0.05) -> StateDict:
    """A whole model in Meta's names and layout, in the order in which Meta's files have them."""
    random = torch.Generator().manual_seed(seed)
    kv = size.kv_heads * size.head_dim

    def normal(*shape: int, centre: float = 0.0) -> torch.Tensor:
        return (centre + torch.randn(shape, generator=random) * scale).to(dtype)

    state = {
        "tok_embeddings.weight": normal(size.words, size.dim),
        "norm.weight": normal(size.dim, centre=1.0),
        "output.weight": normal(size.words, size.dim),
    }
    for layer in range(size.layers):
        for name, shape in {
            "attention.wq": (size.dim, size.dim),
            "attention.wk": (kv, size.dim),
            "attention.wv": (kv, size.dim),
            "attention.wo": (size.dim, size.dim),
            "feed_forward.w1": (size.inner, size.dim),
            "feed_forward.w2": (size.dim, size.inner),
            "feed_forward.w3": (size.inner, size.dim),
        }.items():
            state[f"layers.{layer}.{name}.weight"] = normal(*shape)
        for name in ("attention_norm", "ffn_norm"):
            state[f"layers.{layer}.{name}.weight"] = normal(size.dim, centre=1.0)
    return state


COLUMNS = ("tok_embeddings", "attention.wo", "feed_forward.w2")
"""What Meta cuts by columns; norms are not cut, and all else is cut by rows."""


def cut(state: Mapping[str, torch.Tensor], parts: int, columns: Sequence[str] = COLUMNS) -> list[StateDict]:
    """The state dict of each part; a rotary table in each, as files of 2023 have it."""
    states: list[StateDict] = []
    for part in range(parts):
        own: StateDict = {}
        for name, tensor in state.items():
            axis = 1 if any(which in name for which in columns) else 0
            own[name] = tensor.clone() if tensor.ndim == 1 else tensor.chunk(parts, axis)[part].contiguous()
        states.append({**own, "rope.freqs": torch.arange(2).to(own["norm.weight"].dtype)})
    return states


def in_shared_storages(state: Mapping[str, torch.Tensor], storages: int = 2) -> StateDict:
    """The same tensors as views into a few storages, as in Meta's files of more than one part."""
    names = list(state)
    share = -(-len(names) // storages)
    views: StateDict = {}
    for first in range(0, len(names), share):
        here = names[first : first + share]
        storage = torch.cat([state[name].reshape(-1) for name in here])
        start = 0
        for name in here:
            views[name] = storage[start : start + state[name].numel()].view(state[name].shape)
            start += state[name].numel()
    return views


def save_meta(
    directory: Path,
    state: Mapping[str, torch.Tensor],
    size: Size,
    parts: int,
    *,
    shared: bool = False,
    columns: Sequence[str] = COLUMNS,
) -> Path:
    """Write a model's folder as Meta published them."""
    directory.mkdir(parents=True)
    (directory / "params.json").write_text(json.dumps(size.params))
    for number, part in enumerate(cut(state, parts, columns)):
        torch.save(in_shared_storages(part) if shared else part, directory / f"consolidated.{number:02}.pth")
    return directory


_HALVES = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def converted(state: Mapping[str, torch.Tensor], size: Size) -> StateDict:
    """The model as transformers' convert_llama_weights_to_hf.py makes it, with the same ``permute``."""

    def permute(w: torch.Tensor, n_heads: int) -> torch.Tensor:
        rows, columns = w.shape
        return w.view(n_heads, rows // n_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)

    whole: StateDict = {}
    for name, tensor in state.items():
        stem = name.removesuffix(".weight")
        prefix = ""
        if stem.startswith("layers."):
            _, layer, stem = stem.split(".", 2)
            prefix = f"model.layers.{layer}."
        heads = {"attention.wq": size.heads, "attention.wk": size.kv_heads}.get(stem)
        whole[f"{prefix}{_HALVES[stem]}.weight"] = permute(tensor, heads) if heads else tensor
    return whole


def logits(state: Mapping[str, torch.Tensor], size: Size, words: torch.Tensor) -> torch.Tensor:
    """Meta's forward pass over one sequence, in float32: after llama/model.py of Meta's release."""
    positions = torch.arange(len(words)).float()
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, size.head_dim, 2).float() / size.head_dim)
    turns = torch.outer(positions, frequencies)
    turn = torch.polar(torch.ones_like(turns), turns)[:, None, :]  # (sequence, 1, head_dim / 2), complex

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-06) * weight

    def rotate(x: torch.Tensor) -> torch.Tensor:
        """Neighbours are the two halves of a complex number, which is turned."""
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn).flatten(2)

    x = state["tok_embeddings.weight"][words]
    mask = torch.full((len(words), len(words)), float("-inf")).triu(1)
    for layer in range(size.layers):
        own = {name.removeprefix(f"layers.{layer}."): t for name, t in state.items() if f"layers.{layer}." in name}
        h = norm(x, own["attention_norm.weight"])
        q, k, v = (
            (h @ own[f"attention.{which}.weight"].T).view(len(words), -1, size.head_dim) for which in ("wq", "wk", "wv")
        )
        q, k = rotate(q), rotate(k)
        k, v = (each.repeat_interleave(size.heads // size.kv_heads, dim=1) for each in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / size.head_dim**0.5 + mask
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(len(words), -1)
        x = x + attended @ own["attention.wo.weight"].T
        h = norm(x, own["ffn_norm.weight"])
        gate = torch.nn.functional.silu(h @ own["feed_forward.w1.weight"].T)
        x = x + (gate * (h @ own["feed_forward.w3.weight"].T)) @ own["feed_forward.w2.weight"].T
    return norm(x, state["norm.weight"]) @ state["output.weight"].T
