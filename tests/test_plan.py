"""The plan: order, sharding, reads and memory, against huggingface_hub and recorded files."""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given
from hypothesis import strategies as st

from bayling_delta.errors import UsageError
from bayling_delta.plan import OutputTensor, cut_into_files, make_budget
from bayling_delta.reads import Gather, ReadList, Span, in_stored_order
from bayling_delta.tensors import natural_key, one_view

HERE = Path("model.bin")


def output_tensor(name: str, shape: tuple[int, ...], offset: int = 0, dtype: str = "F16") -> OutputTensor:
    ref = one_view(HERE, offset, dtype, shape)
    return OutputTensor(name, dtype, shape, ref, ref)


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(SIZES, st.integers(1, 120))
def test_shards_are_cut_as_huggingface_hub_cuts_them(sizes: list[int], limit: int) -> None:
    """The same names in the same files, tensors above the limit included; empty ones share a storage in its eyes."""
    state = {f"t{number}": torch.zeros(size, dtype=torch.float16) for number, size in enumerate(sizes)}
    split = split_torch_state_dict_into_shards(state, max_shard_size=limit)
    files = cut_into_files([output_tensor(name, tuple(tensor.shape)) for name, tensor in state.items()], limit)
    assert {file.name: [tensor.name for tensor in file.tensors] for file in files} == split.filename_to_tensors


def llama_tensors(layers: int, hidden: int, inner: int) -> Iterator[tuple[str, int]]:
    """(name, bytes) of a LLaMA-1 with rotary buffers, as transformers 4.28 saved it (see docs/formats.md)."""
    yield "model.embed_tokens.weight", 32000 * hidden * 2
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for which in "qkvo":
            yield f"{prefix}self_attn.{which}_proj.weight", hidden * hidden * 2
        yield f"{prefix}self_attn.rotary_emb.inv_freq", 64 * 4
        for which in ("gate", "down", "up"):
            yield f"{prefix}mlp.{which}_proj.weight", hidden * inner * 2
        yield f"{prefix}input_layernorm.weight", hidden * 2
        yield f"{prefix}post_attention_layernorm.weight", hidden * 2
    yield "model.norm.weight", hidden * 2
    yield "lm_head.weight", 32000 * hidden * 2


RECORDED_INDEXES = {
    # SHA-256 of pytorch_model.bin.index.json of LLaMA-1 conversions, recorded by susumuota/local-llm-setup
    "7B": (32, 4096, 11008, 2, "aca3c1facc89d12311a667c32e85ac86e625990992ea8a189e3b036ba371b931"),
    "13B": (40, 5120, 13824, 3, "92c31ad5e853e9a6660e248871f9bd0cd273518de7ec12ca893e1b1078c10898"),
    "30B": (60, 6656, 17920, 7, "132d90ebefb682313eb66bf40238fbe1eb0a18225f75b569cfadcb533ff4e0b6"),
    "65B": (80, 8192, 22016, 14, "27f5af68d3629d0306d8a164c187286ad7d802020a3c33244f9ee7b0d79b749f"),
}


@pytest.mark.parametrize("model", RECORDED_INDEXES)
def test_the_recorded_index_of_a_llama_conversion_comes_out_again(model: str) -> None:
    """Cut at 10 GB, the real models fall into the shards that the published index files name."""
    layers, hidden, inner, shards, recorded = RECORDED_INDEXES[model]
    sizes = dict(llama_tensors(layers, hidden, inner))
    files = cut_into_files([output_tensor(name, (size // 2,)) for name, size in sizes.items()], 10 * 10**9)
    assert len(files) == shards
    placed = {
        tensor.name: file.name.replace("model-", "pytorch_model-").replace("safetensors", "bin")
        for file in files
        for tensor in file.tensors
    }
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": placed}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    assert hashlib.sha256(text.encode()).hexdigest() == recorded


def test_stored_order_counts_numbers_as_numbers() -> None:
    refs = {
        "b": one_view(Path("model-10.bin"), 0, "F16", ()),
        "a": one_view(Path("model-9.bin"), 64, "F16", ()),
        "z": one_view(Path("model-9.bin"), 0, "F16", ()),
        "y": one_view(Path("model-9.bin"), 0, "F16", ()),
    }
    assert [name for name, _ in in_stored_order(refs)] == ["y", "z", "a", "b"]


@given(st.text(max_size=20), st.text(max_size=20))
def test_natural_keys_can_always_be_compared(one: str, other: str) -> None:
    assert (natural_key(one) < natural_key(other)) + (natural_key(other) < natural_key(one)) <= 1


def reads(gathers: int) -> ReadList:
    ref = one_view(HERE, 0, "F16", (4, 4), (1, 4))
    return ReadList((Span(HERE, 0, 10, False, ()), *([Gather(ref, "t")] * gathers)), {}, {}, {})


@given(st.integers(0, 1 << 32), st.integers(0, 1), st.integers(0, 1))
def test_the_budget_keeps_to_the_limit(limit: int, base_gathers: int, delta_gathers: int) -> None:
    """It is never above the limit; windows are whole blocks; and what is refused names a limit that works."""
    lists = (reads(base_gathers), reads(delta_gathers))
    try:
        budget = make_budget(limit, lists, outputs=1)
    except UsageError as error:
        least = int(str(error).rsplit(" ", 1)[1].removesuffix("KiB")) << 10
        assert limit < least
        budget = make_budget(least, lists, outputs=1)
        limit = least
    assert budget.total_bytes <= limit
    assert budget.chunk_bytes % 4096 == 0
    assert budget.windows >= 2
    assert bool(budget.tile_bytes) == bool(base_gathers or delta_gathers)
    assert math.prod((budget.windows, budget.chunk_bytes, 3)) <= budget.total_bytes
