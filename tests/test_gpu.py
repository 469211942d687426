"""The addition with torch: its arithmetic on the CPU device everywhere, on CUDA where there is a GPU."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from bayling_delta import apply
from bayling_delta.arithmetic import STORED, make_addition
from bayling_delta.errors import UsageError
from bayling_delta.gpu import make_additions
from tests.pairs import llama, save
from tests.test_arithmetic import hard_values

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtypes", list(itertools.product(STORED, repeat=3)), ids="-".join)
def test_the_same_bytes_as_the_cpu(device: str, dtypes: tuple[str, str, str]) -> None:
    """NaN included: every hard value of each dtype, in more elements than one block has."""
    base, delta = hard_values(dtypes[0]), hard_values(dtypes[1])
    size = 300_001
    base, delta = np.resize(base, size), np.roll(np.resize(delta, size), 12_345)
    ours, theirs = np.empty(size, STORED[dtypes[2]]), np.empty(size, STORED[dtypes[2]])
    found = make_addition(*dtypes)(ours, base, delta)
    assert make_additions(device)(*dtypes)(theirs, base, delta) == found
    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    base, delta = save(tmp_path / "b", llama(1)), save(tmp_path / "d", llama(2, 0.01))
    with pytest.raises(UsageError, match=r"finds no CUDA device here; leave --device out"):
        apply(base, delta, tmp_path / "out", device="cuda")
    assert {path.name for path in tmp_path.iterdir()} == {"b", "d"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_model_rebuilt_on_a_gpu_is_the_same_and_takes_little_of_it(tmp_path: Path) -> None:
    base, delta = save(tmp_path / "b", llama(1)), save(tmp_path / "d", llama(2, 0.01))
    on_cpu = apply(base, delta, tmp_path / "cpu")
    on_gpu = apply(base, delta, tmp_path / "gpu", device="cuda")
    assert on_cpu["result"]["weights_digest"] == on_gpu["result"]["weights_digest"]
    assert torch.cuda.max_memory_reserved() < 64 << 20
