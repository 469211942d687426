"""The benchmark measures what it says: pairs are what torch reads, guards end what they should, ratios hold."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark.measure import Guard, Job, measure
from benchmark.pairs import Pair, Wanted, make_pair
from benchmark.report import limit, rows
from benchmark.shapes import SHAPES
from safetensors.torch import load_file

from bayling_delta import apply
from tests.pairs import StateDict, assert_same, load, published_sum


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(Wanted(SHAPES["tiny"]), tmp_path_factory.mktemp("pair"), with_sorted_base=True)


def torch_state(directory: Path) -> StateDict:
    state: StateDict = {}
    for file in sorted(directory.glob("*.bin")):
        state |= torch.load(file)
    return state


def test_a_pair_is_what_torch_and_safetensors_read(pair: Pair) -> None:
    base, delta = torch_state(pair.base), torch_state(pair.delta)
    assert sum(tensor.numel() for name, tensor in delta.items() if "inv_freq" not in name) == pair.shape.parameters
    assert base.keys() == delta.keys()
    by_name: StateDict = {}
    for file in sorted(pair.sorted_base.glob("*.safetensors")):
        by_name |= load_file(file)
    assert_same(by_name, {name: tensor for name, tensor in base.items() if "inv_freq" not in name})


def test_a_pair_looks_like_a_base_and_its_delta(pair: Pair, tmp_path: Path) -> None:
    """Nothing has to be overruled, and every checksum holds."""
    apply(pair.base, pair.delta, tmp_path / "out")
    assert_same(load(tmp_path / "out"), published_sum(torch_state(pair.base), torch_state(pair.delta)))


def job(program: str) -> Job:
    return Job([sys.executable, "-c", program], dict(os.environ), None)


def test_what_takes_too_much_memory_is_ended_with_all_it_started(tmp_path: Path) -> None:
    """A child of the child holds 400 MB; both are gone when the guard is done."""
    program = (
        "import subprocess, sys; "
        f"sys.exit(subprocess.call([sys.executable, '-c', \"open({str(tmp_path / 'pid')!r}, 'w')"
        ".write(str(__import__('os').getpid())); held = b'x' * 400_000_000; import time; time.sleep(60)\"]))"
    )
    taken = measure(job(program), Guard(200_000_000, 60), tmp_path / "log")
    assert taken.ended is not None
    assert taken.ended.startswith("ended at 0.")
    assert 200_000_000 < taken.peak_private_bytes < 600_000_000
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or " Z" in Path(f"/proc/{child}/stat").read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child is still there")


def test_a_job_that_fails_is_told_by_its_last_words(tmp_path: Path) -> None:
    taken = measure(job("import sys; sys.exit('no such thing')"), Guard(10**9, 60), tmp_path / "log")
    assert taken.ended == "exit 1: no such thing"


def run(contender: str, seconds: float, **changes: Any) -> dict[str, Any]:
    return {"pair": "7B", "size": "7B", "contender": contender, "seconds": seconds, "ended": None, **changes}


def test_the_limit_is_the_larger_of_the_faster_copy_and_the_digest_floor() -> None:
    copies = [run("copy-cached", 9), run("copy-direct", 7), run("copy-direct", 5), run("copy-direct", 6)]
    assert limit(rows([*copies, run("digest-floor", 4)]), "7B") == 6  # the median of the faster way
    assert limit(rows([*copies, run("digest-floor", 8)]), "7B") == 8
    assert limit(rows(copies), "7B") is None
    failed = [run("copy-direct", 1, ended="exit 1"), run("copy-cached", 9), run("digest-floor", 8)]
    assert limit(rows(failed), "7B") == 9
