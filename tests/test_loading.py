"""What comes out, loaded as its users will load it: by transformers, with no option given."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from bayling_delta import apply
from tests.pairs import CONFIG, llama, published_sum, save


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
    loaded: Any
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert not [record for record in loud.records if record.levelno >= logging.WARNING]
    assert loaded.dtype == torch.float16

    expected = LlamaForCausalLM(LlamaConfig(**config)).half().eval()  # type: ignore[no-untyped-call,unused-ignore]
    total = published_sum(base, delta)
    expected.load_state_dict(total, strict=True)
    words = torch.arange(20).reshape(1, 20)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(words).logits, expected(words).logits)
