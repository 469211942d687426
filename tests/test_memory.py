"""Memory of the whole process, measured from outside it, against the promise of the README."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bayling_delta.safetensors_format import lay_out
from tests.meta import Size
from tests.pairs import save

MIB = 1 << 20
LAUNCH = """
import os, sys
pid = os.spawnvp(os.P_NOWAIT, sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""A small process that starts the program: a child's peak begins with that of the process it was forked from."""


def peak(*words: str) -> int:
    """The peak resident memory, in bytes, of one run of the program."""
    command = [sys.executable, "-S", "-c", LAUNCH, sys.executable, "-m", "bayling_delta", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1]) * 1024


def bound(limit: int, tensors: int, bytes_each: int = 2048) -> int:
    """What the README promises for the CPU."""
    return limit + 80 * MIB + bytes_each * tensors


def apply_peak(place: Path, limit: int = 64 * MIB) -> int:
    inputs = ["--base", str(place / "base"), "--delta", str(place / "delta"), "--out", str(place / "out")]
    return peak("apply", *inputs, "--memory-limit", str(limit), "--allow", "all_zero", "--quiet")


def save_sparse(directory: Path, tensors: dict[str, tuple[int, ...]], shards: int = 1) -> None:
    """A safetensors checkpoint of float16 zeros that takes no room on the disk."""
    directory.mkdir(parents=True)
    names = list(tensors)
    share = -(-len(names) // shards)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        part = names[number * share : (number + 1) * share]
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        weight_map |= dict.fromkeys(part, file)
        header, starts = lay_out((name, "F16", tensors[name]) for name in part)
        with (directory / file).open("wb") as out:
            out.write(header)
            last = torch.Size(tensors[part[-1]]).numel() * 2
            out.truncate(starts[part[-1]] + last)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def llama_shapes(layers: int, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32000, hidden)}
    for layer in range(layers):
        for which in "qkvo":
            shapes[f"model.layers.{layer}.self_attn.{which}_proj.weight"] = (hidden, hidden)
        for which in ("gate", "up", "down"):
            shapes[f"model.layers.{layer}.mlp.{which}_proj.weight"] = (inner, hidden)
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (hidden,)
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (32000, hidden)}


def both(place: Path, tensors: dict[str, tuple[int, ...]], shards: int = 1) -> int:
    for side in ("base", "delta"):
        save_sparse(place / side, tensors, shards)
    return len(tensors)


def test_one_large_tensor(tmp_path: Path) -> None:
    """256 MB in one tensor, four times the buffers."""
    tensors = both(tmp_path, {"t": (128 * MIB,)})
    assert apply_peak(tmp_path) < bound(64 * MIB, tensors)


@pytest.mark.parametrize("limit", [1 * MIB, 16 * MIB])
def test_a_small_limit(tmp_path: Path, limit: int) -> None:
    tensors = both(tmp_path, {"t": (64 * MIB,)})
    assert apply_peak(tmp_path, limit) < bound(limit, tensors)


def test_many_tensors(tmp_path: Path) -> None:
    tensors = both(tmp_path, {f"model.layers.{n}.weight": (2, 3) for n in range(20_000)}, shards=5)
    assert apply_peak(tmp_path) < bound(64 * MIB, tensors)


def test_many_tensors_in_bin_files(tmp_path: Path) -> None:
    state = {f"model.layers.{n}.weight": torch.full((2, 3), n, dtype=torch.float16) for n in range(20_000)}
    for side in ("base", "delta"):
        save(tmp_path / side, state, shards=5, config=None)
    assert apply_peak(tmp_path) < bound(64 * MIB, len(state), 4096)


def test_a_large_tokenizer(tmp_path: Path) -> None:
    """A tokenizer.json of the size of Llama-3's: 128,000 tokens and 280,000 merges, in both inputs."""
    tensors = both(tmp_path, {"t": (64 * MIB,)})
    vocabulary = {f"{number * 7919:x}": number for number in range(128_000)}
    merges = [f"{number:x} {number * 31:x}" for number in range(280_000)]
    text = json.dumps({"model": {"type": "BPE", "vocab": vocabulary, "merges": merges}}, indent=2)
    for side in ("base", "delta"):
        (tmp_path / side / "tokenizer.json").write_text(text)
    assert apply_peak(tmp_path) < bound(64 * MIB, tensors)


def save_transposed(directory: Path, rows: int, columns: int) -> None:
    directory.mkdir()
    script = f"""
import sys, torch
torch.save({{"t": torch.ones({columns}, {rows}, dtype=torch.float16).t()}}, sys.argv[1])
"""
    subprocess.run([sys.executable, "-c", script, str(directory / "pytorch_model.bin")], check=True)


def test_a_transposed_tensor(tmp_path: Path) -> None:
    save_transposed(tmp_path / "base", 8192, 16384)
    save_sparse(tmp_path / "delta", {"t": (8192, 16384)})
    assert apply_peak(tmp_path) < bound(64 * MIB, 1)


def save_meta_parts(directory: Path, size: Size, parts: int) -> None:
    """A folder in Meta's format, made in a process of its own."""
    script = """
import sys
from pathlib import Path
import torch
from tests.meta import Size, random_model, save_meta
size = Size(*map(int, sys.argv[3:]))
save_meta(Path(sys.argv[1]), random_model(size), size, int(sys.argv[2]), shared=True)
"""
    words = [str(directory), str(parts), *map(str, size)]
    subprocess.run([sys.executable, "-c", script, *words], check=True, cwd=Path(__file__).parent.parent)


def test_a_base_in_metas_format(tmp_path: Path) -> None:
    """Matrices of 33 MB that are joined and permuted; a head has 1 MiB, as in the 7B."""
    size = Size(dim=4096, layers=1, heads=32, kv_heads=32, inner=512, words=64)
    save_meta_parts(tmp_path / "base", size, 2)
    shapes = llama_shapes(1, size.dim, size.inner)
    shapes["model.layers.0.mlp.down_proj.weight"] = (size.dim, size.inner)
    shapes["model.layers.0.post_attention_layernorm.weight"] = (size.dim,)
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (size.words, size.dim))
    save_sparse(tmp_path / "delta", shapes)
    for limit in (4 * MIB, 64 * MIB):
        assert apply_peak(tmp_path, limit) < bound(limit, len(shapes))
        (tmp_path / "out").rename(tmp_path / f"out-{limit}")


# the sizes of real models


@pytest.fixture
def big(tmp_path: Path) -> Iterator[Path]:
    """A place that is emptied at once, since pytest keeps its own for a while."""
    yield tmp_path
    for file in tmp_path.glob("out/*.safetensors"):
        file.unlink()


@pytest.mark.long
def test_a_model_of_1100_million_parameters(big: Path) -> None:
    tensors = both(big, llama_shapes(22, 2048, 5632), shards=3)
    assert apply_peak(big) < bound(64 * MIB, tensors)


@pytest.mark.long
def test_a_tensor_of_1_gb(big: Path) -> None:
    tensors = both(big, {"t": (512 * MIB,)})
    assert apply_peak(big) < bound(64 * MIB, tensors)


@pytest.mark.long
@pytest.mark.parametrize("side", ["base", "delta"])
def test_a_transposed_tensor_of_1_gb(big: Path, side: str) -> None:
    other = {"base": "delta", "delta": "base"}[side]
    save_transposed(big / side, 32768, 16384)
    save_sparse(big / other, {"t": (32768, 16384)})
    assert apply_peak(big) < bound(64 * MIB, 1)
