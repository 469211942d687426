"""What comes out, loaded as its users will load it: by transformers, with no option given."""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from bayling_delta import apply, verify
from bayling_delta.errors import IntegrityError, UsageError
from tests.pairs import CONFIG, llama, load, published_sum, save


@pytest.fixture
def loud(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Let transformers' own logger reach the test."""
    logging.getLogger("transformers").propagate = True
    caplog.set_level(logging.INFO, logger="transformers")
    return caplog


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("max_shard_size", [20_000, 5 * 10**9])
def test_transformers_loads_the_result(
    tmp_path: Path, loud: pytest.LogCaptureFixture, tied: bool, max_shard_size: int
) -> None:
    """No weight is missing, unexpected or of another shape; nothing is warned of; the logits are the sum's."""
    config = CONFIG | {"tie_word_embeddings": tied}
    base, delta = llama(1), llama(2, 0.01)
    if tied:
        for state in (base, delta):
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
    apply(
        save(tmp_path / "base", base, config=config),
        save(tmp_path / "delta", delta, config=config, shards=2),
        tmp_path / "out",
        max_shard_size=max_shard_size,
    )
    auto: Any = AutoModelForCausalLM
    loaded, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert not [record for record in loud.records if record.levelno >= logging.WARNING]
    assert loaded.dtype == torch.float16

    # In float32, since half() would round the rotary table of this one and not of that.
    expected = LlamaForCausalLM(LlamaConfig(**config)).eval()  # type: ignore[no-untyped-call,unused-ignore]
    expected.load_state_dict({name: tensor.float() for name, tensor in published_sum(base, delta).items()}, strict=True)
    words = torch.arange(20).reshape(1, 20)
    with torch.no_grad():
        assert torch.equal(loaded.float().eval()(words).logits, expected(words).logits)


# verify --load


@pytest.fixture
def rebuilt(tmp_path: Path) -> Path:
    apply(save(tmp_path / "base", llama(1)), save(tmp_path / "delta", llama(2, 0.01)), tmp_path / "out")
    return tmp_path / "out"


def test_load_adds_to_a_comparison(rebuilt: Path) -> None:
    loaded = verify(rebuilt, load=True)["loaded"]
    assert loaded["architecture"] == "LlamaForCausalLM"
    assert "token ids [1, " in loaded["generated"]


def test_a_model_that_is_not_what_its_config_says_does_not_load(rebuilt: Path) -> None:
    """Names and shapes are checked before any weights are loaded, and all of them are told."""
    state = load(rebuilt)
    digest = verify(rebuilt)["weights_digest"]
    broken = save(rebuilt.parent / "broken", state, config=CONFIG | {"num_hidden_layers": 3, "vocab_size": 161})
    with pytest.raises(IntegrityError) as raised:
        verify(broken, against=digest, load=True)
    messages = [problem.message for problem in raised.value.problems]
    assert {problem.kind for problem in raised.value.problems} == {"load"}
    assert "lacks model.layers.2.mlp.up_proj.weight, which LlamaForCausalLM needs" in messages
    assert "lm_head.weight is [160, 64], config.json makes it [161, 64]" in messages


def test_a_model_without_a_config_does_not_load(rebuilt: Path) -> None:
    digest = verify(rebuilt)["weights_digest"]
    bare = save(rebuilt.parent / "bare", load(rebuilt), config=None)
    with pytest.raises(IntegrityError, match="cannot load it"):
        verify(bare, against=digest, load=True)


def test_eight_bit_says_what_it_needs(rebuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(UsageError, match="needs bitsandbytes and accelerate"):
        verify(rebuilt, load=True, eight_bit=True)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_eight_bit_loads_where_the_library_is(rebuilt: Path) -> None:
    assert verify(rebuilt, load=True, eight_bit=True)["loaded"]["eight_bit"]
