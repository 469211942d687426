"""Pairs of checkpoints for tests, written with the reference writers, and the published script's arithmetic."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

StateDict = dict[str, torch.Tensor]

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 160,
}
"""A LLaMA small enough for any test."""


def llama(seed: int, scale: float = 0.05, dtype: torch.dtype = torch.float16, *, rotary: bool = True) -> StateDict:
    """A state dict of CONFIG's shapes, in the order in which transformers 4.28 saved them.

    A scale of a full model, 0.05, gives norm weights around 1; a delta's smaller scale gives some around 0.
    """
    centre = 1.0 if scale >= 0.05 else 0.0
    random = torch.Generator().manual_seed(seed)
    hidden, inner, words = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=random) * scale).to(dtype)

    state: StateDict = {"model.embed_tokens.weight": normal(words, hidden)}
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for which in "qkvo":
            state[f"{prefix}self_attn.{which}_proj.weight"] = normal(hidden, hidden)
        if rotary:
            state[f"{prefix}self_attn.rotary_emb.inv_freq"] = torch.rand(8, generator=random)
        state[f"{prefix}mlp.gate_proj.weight"] = normal(inner, hidden)
        state[f"{prefix}mlp.down_proj.weight"] = normal(hidden, inner)
        state[f"{prefix}mlp.up_proj.weight"] = normal(inner, hidden)
        state[f"{prefix}input_layernorm.weight"] = normal(hidden) + centre
        state[f"{prefix}post_attention_layernorm.weight"] = normal(hidden) + centre
    state["model.norm.weight"] = normal(hidden) + centre
    state["lm_head.weight"] = normal(words, hidden)
    return state


def published_sum(base: Mapping[str, torch.Tensor], delta: Mapping[str, torch.Tensor]) -> StateDict:
    """What the published script computes: both loaded in the delta's dtype, ``delta += base`` on the CPU."""
    total: StateDict = {}
    for name, tensor in delta.items():
        if not name.endswith("inv_freq"):
            total[name] = tensor.clone()
            total[name] += base[name].to(tensor.dtype)
    return total


def save(
    directory: Path,
    state: Mapping[str, torch.Tensor],
    *,
    container: str = "torch",
    shards: int = 1,
    order: Sequence[str] | None = None,
    config: Mapping[str, Any] | None = CONFIG,
    index: bool = True,
) -> Path:
    """Write a state dict as a HuggingFace directory with the container's own writer, cut into equal shares."""
    directory.mkdir(parents=True)
    names = list(order or state)
    share = -(-len(names) // shards)
    stem, suffix = {"torch": ("pytorch_model", "bin"), "safetensors": ("model", "safetensors")}[container]
    weight_map: dict[str, str] = {}
    for number in range(shards):
        part = {name: state[name] for name in names[number * share : (number + 1) * share]}
        file = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{number + 1:05}-of-{shards:05}.{suffix}"
        weight_map |= dict.fromkeys(part, file)
        if container == "torch":
            torch.save(part, directory / file)
        else:
            save_file({name: tensor.contiguous() for name, tensor in part.items()}, directory / file, {"format": "pt"})
    if shards > 1 and index:
        document = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(document))
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def load(directory: Path) -> StateDict:
    """Every tensor of a directory of safetensors files, by the reference reader."""
    state: StateDict = {}
    for file in sorted(directory.glob("*.safetensors")):
        state |= load_file(file)
    return state


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bits as integers, every NaN made the same, so that equality means the same bytes."""
    kinds = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
    values = torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor)
    return values.contiguous().view(kinds[tensor.dtype])


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Two state dicts have the same names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        assert found[name].shape == expected[name].shape, name
        assert torch.equal(bits(found[name]), bits(expected[name])), name


def shuffled(names: Iterable[str], seed: int = 0) -> list[str]:
    """The names in another order, the same each time."""
    order = list(names)
    return [order[place] for place in torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))]
