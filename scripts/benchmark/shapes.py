"""LLaMA's shapes, from tiny to 13B: the names, shapes and order of their tensors."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["SHAPES", "Shape", "Tensor", "many_tensors"]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a model."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "F16"
    """``F16``, or ``F32`` for the rotary buffers."""

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        return self.elements * {"F16": 2, "F32": 4}[self.dtype]

    @property
    def is_buffer(self) -> bool:
        """A rotary buffer: in the files of 2023, and not a weight."""
        return self.name.endswith("rotary_emb.inv_freq")


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions of a LLaMA model."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000

    @property
    def head(self) -> int:
        """Elements of an attention head."""
        return self.hidden // self.heads

    def tensors(self) -> Iterator[Tensor]:
        """Everything in the state dict, rotary buffers included, in the order of transformers 4.28.

        That is the order in which the deltas of 2023 store their tensors.
        """
        wide, narrow = (self.hidden, self.hidden), (self.kv_heads * self.head, self.hidden)
        yield Tensor("model.embed_tokens.weight", (self.vocabulary, self.hidden))
        for number in range(self.layers):
            layer = f"model.layers.{number}"
            yield Tensor(f"{layer}.self_attn.q_proj.weight", wide)
            yield Tensor(f"{layer}.self_attn.k_proj.weight", narrow)
            yield Tensor(f"{layer}.self_attn.v_proj.weight", narrow)
            yield Tensor(f"{layer}.self_attn.o_proj.weight", wide)
            yield Tensor(f"{layer}.self_attn.rotary_emb.inv_freq", (self.head // 2,), "F32")
            yield Tensor(f"{layer}.mlp.gate_proj.weight", (self.intermediate, self.hidden))
            yield Tensor(f"{layer}.mlp.down_proj.weight", (self.hidden, self.intermediate))
            yield Tensor(f"{layer}.mlp.up_proj.weight", (self.intermediate, self.hidden))
            yield Tensor(f"{layer}.input_layernorm.weight", (self.hidden,))
            yield Tensor(f"{layer}.post_attention_layernorm.weight", (self.hidden,))
        yield Tensor("model.norm.weight", (self.hidden,))
        yield Tensor("lm_head.weight", (self.vocabulary, self.hidden))

    def weights(self) -> Iterator[Tensor]:
        """The tensors that are weights."""
        return (tensor for tensor in self.tensors() if not tensor.is_buffer)

    @property
    def parameters(self) -> int:
        return sum(tensor.elements for tensor in self.weights())

    @property
    def nbytes(self) -> int:
        """Bytes of the state dict in the files, headers apart."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def config(self) -> dict[str, Any]:
        """What config.json of 2023 says of such a model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 2048,
            "model_type": "llama",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-06,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "transformers_version": "4.28.1",
            "use_cache": True,
            "vocab_size": self.vocabulary,
        }


SHAPES: Final = {
    shape.name: shape
    for shape in (
        Shape("tiny", 64, 176, 4, 4, 4, 512),
        Shape("0.1B", 640, 1728, 12, 10, 10),
        Shape("0.3B", 1024, 2816, 18, 16, 16),
        Shape("1.1B", 2048, 5632, 22, 32, 4),  # TinyLlama's
        Shape("3B", 3200, 8640, 26, 32, 32),  # OpenLLaMA's
        Shape("7B", 4096, 11008, 32, 32, 32),
        Shape("13B", 5120, 13824, 40, 40, 40),
    )
}
"""By name, in order of size; 7B and 13B are those of LLaMA."""


def many_tensors(count: int) -> Shape:
    """A model of at least so many weights, each of next to no size."""
    return Shape(f"{count}-tensors", 16, 32, -(-(count - 3) // 9), 4, 4, 64)
