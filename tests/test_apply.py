"""The rebuilt model against the published script's arithmetic, whatever the containers, sharding and options."""

import hashlib
import itertools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from bayling_delta import apply, system
from bayling_delta.errors import (
    BaylingDeltaError,
    CheckpointError,
    IntegrityError,
    MismatchError,
    OutputError,
    UsageError,
)
from bayling_delta.staging import partial_path
from tests.pairs import CONFIG, StateDict, assert_same, llama, load, published_sum, save, shuffled

Pair = tuple[Path, Path]
KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(scope="module")
def states() -> tuple[StateDict, StateDict]:
    return llama(1), llama(2, scale=0.01)


@pytest.fixture
def pair(tmp_path: Path, states: tuple[StateDict, StateDict]) -> Pair:
    """Base and delta as .bin shards, as published in 2023."""
    base, delta = states
    return save(tmp_path / "base", base, shards=2), save(tmp_path / "delta", delta, shards=2)


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory, states: tuple[StateDict, StateDict]) -> str:
    """The weights digest that every way of adding the pair must give."""
    place = tmp_path_factory.mktemp("digest")
    base, delta = states
    manifest = apply(save(place / "base", base), save(place / "delta", delta), place / "out")
    assert_same(load(place / "out"), published_sum(base, delta))
    digest: str = manifest["result"]["weights_digest"]
    return digest


CONTAINERS = ["torch", "safetensors"]
LAYOUTS: dict[str, dict[str, Any]] = {
    "one-file": {"shards": 1},
    "two-shards": {"shards": 2},
    "seven-shards": {"shards": 7},
    "no-index": {"shards": 3, "index": False},
    "another-order": {"shards": 4, "order": shuffled(llama(0))},
}


@pytest.mark.parametrize("base_container", CONTAINERS)
@pytest.mark.parametrize("delta_container", CONTAINERS)
@pytest.mark.parametrize("base_layout", LAYOUTS)
@pytest.mark.parametrize("delta_layout", LAYOUTS)
def test_parity_in_every_container_and_sharding(
    tmp_path: Path,
    states: tuple[StateDict, StateDict],
    digest: str,
    base_container: str,
    delta_container: str,
    base_layout: str,
    delta_layout: str,
) -> None:
    base = save(tmp_path / "base", states[0], container=base_container, **LAYOUTS[base_layout])
    delta = save(tmp_path / "delta", states[1], container=delta_container, **LAYOUTS[delta_layout])
    manifest = apply(base, delta, tmp_path / "out", memory_limit=MIB)
    assert manifest["result"]["weights_digest"] == digest
    assert_same(load(tmp_path / "out"), published_sum(*states))


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "cached"])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("memory_limit", [256 * KIB, MIB, 64 * MIB])
@pytest.mark.parametrize("max_shard_size", [1, 10_000, 50_000, 5 * 10**9])
def test_parity_whatever_the_options(
    tmp_path: Path, pair: Pair, digest: str, direct: bool, threads: int, memory_limit: int, max_shard_size: int
) -> None:
    manifest = apply(
        *pair,
        tmp_path / "out",
        direct=direct,
        threads=threads,
        memory_limit=memory_limit,
        max_shard_size=max_shard_size,
        expect=digest,
    )
    assert manifest["result"]["weights_digest"] == digest


def test_the_portable_way_gives_the_same_files(tmp_path: Path, pair: Pair) -> None:
    """No direct I/O, no positioned reads: what macOS and Windows get."""
    apply(*pair, tmp_path / "linux", max_shard_size=50_000)
    with system.using(system.PortableSystem()):
        apply(*pair, tmp_path / "portable", max_shard_size=50_000)
    for name in sums(tmp_path / "linux"):
        if name != "bayling-delta.json":
            assert (tmp_path / "linux" / name).read_bytes() == (tmp_path / "portable" / name).read_bytes(), name


DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@pytest.mark.parametrize(("base_dtype", "delta_dtype", "out"), list(itertools.product(DTYPES, DTYPES, [None, *DTYPES])))
def test_dtypes(tmp_path: Path, base_dtype: str, delta_dtype: str, out: str | None) -> None:
    """The sum is made in the delta's dtype, and cast once where it is asked."""
    base, delta = llama(1, dtype=DTYPES[base_dtype]), llama(2, 0.01, DTYPES[delta_dtype])
    manifest = apply(save(tmp_path / "b", base), save(tmp_path / "d", delta), tmp_path / "out", dtype=out)
    total = published_sum(base, delta)
    if out:
        total = {name: tensor.to(DTYPES[out]) for name, tensor in total.items()}
    assert_same(load(tmp_path / "out"), total)
    assert manifest["result"]["dtype"] == (out or delta_dtype)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    assert config["torch_dtype"] == names[out or delta_dtype]
    assert config | {"torch_dtype": "float16"} == CONFIG


def test_mixed_widths_in_one_delta(tmp_path: Path) -> None:
    """A norm kept in float32 among float16 weights: added in float32, and stored before them."""
    base, delta = llama(1), llama(2, 0.01)
    delta["model.norm.weight"] = delta["model.norm.weight"].float() + 2**-20
    apply(save(tmp_path / "b", base), save(tmp_path / "d", delta), tmp_path / "out")
    assert_same(load(tmp_path / "out"), published_sum(base, delta))


def views(state: StateDict) -> StateDict:
    """The same values, lying otherwise: transposed, in one shared storage, behind an offset, with gaps."""
    result: StateDict = {}
    shared = torch.cat([tensor.flatten() for tensor in state.values() if tensor.dtype == torch.float16])
    place = 0
    for number, (name, tensor) in enumerate(state.items()):
        if tensor.dtype != torch.float16:
            result[name] = tensor
        elif number % 3 == 0:
            result[name] = shared[place : place + tensor.numel()].view(tensor.shape)
        elif number % 3 == 1:
            result[name] = tensor.t().contiguous().t() if tensor.dim() == 2 else tensor.repeat_interleave(3)[::3]
        else:
            wide = torch.zeros((*tensor.shape[:-1], tensor.shape[-1] + 5), dtype=tensor.dtype)
            wide[..., 2:-3] = tensor
            result[name] = wide[..., 2:-3]
        if tensor.dtype == torch.float16:
            place += tensor.numel()
    return result


@pytest.mark.parametrize("memory_limit", [256 * KIB, MIB, 64 * MIB])
@pytest.mark.parametrize("which", ["base", "delta", "both"])
def test_views_and_shared_storages(
    tmp_path: Path, states: tuple[StateDict, StateDict], digest: str, which: str, memory_limit: int
) -> None:
    base = save(tmp_path / "base", views(states[0]) if which != "delta" else states[0])
    delta = save(tmp_path / "delta", views(states[1]) if which != "base" else states[1], shards=2)
    manifest = apply(base, delta, tmp_path / "out", memory_limit=memory_limit)
    assert manifest["result"]["weights_digest"] == digest


@pytest.mark.parametrize("padding", range(8))
def test_tensors_at_odd_addresses(
    tmp_path: Path, states: tuple[StateDict, StateDict], digest: str, padding: int
) -> None:
    """A safetensors header of any length is legal, and puts every element across the grid."""
    for side, state in zip(("base", "delta"), states, strict=True):
        directory = save(tmp_path / side, state, container="safetensors")
        file = directory / "model.safetensors"
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + length].rstrip()
        header += b" " * ((padding if side == "base" else 2 * padding + 1) - len(header) % 16 + 16)
        file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    for limit in (256 * KIB, MIB):
        manifest = apply(tmp_path / "base", tmp_path / "delta", tmp_path / f"out-{limit}", memory_limit=limit)
        assert manifest["result"]["weights_digest"] == digest


def test_tensors_larger_than_every_buffer(tmp_path: Path) -> None:
    base = {"a": torch.randn(700_001).half(), "b": torch.randn(3, 250_001).half(), "c": torch.randn(()).half()}
    delta = {name: (tensor / 100).half() for name, tensor in base.items()}
    base["b"] = base["b"].t().contiguous().t()
    apply(save(tmp_path / "b", base), save(tmp_path / "d", delta), tmp_path / "out", memory_limit=MIB)
    assert_same(load(tmp_path / "out"), published_sum(base, delta))


def test_empty_and_scalar_tensors(tmp_path: Path) -> None:
    base = {"none": torch.zeros(0, 4).half(), "one": torch.ones(()).half(), "last": torch.zeros(2, 0).half()}
    for container in CONTAINERS:
        place = tmp_path / container
        manifest = apply(
            save(place / "b", base, container=container), save(place / "d", base, container=container), place / "out"
        )
        assert_same(load(place / "out"), published_sum(base, base))
        assert manifest["result"]["tensors"]["none"]["sha256"] == hashlib.sha256().hexdigest()


# tied embeddings


def tied(state: StateDict, form: str) -> StateDict:
    """The state with its head tied to its embedding, stored in one of the ways in which that is done."""
    state = dict(state)
    if form == "absent":
        del state["lm_head.weight"]
    elif form == "shared":
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    elif form == "copied":
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    return state


@pytest.mark.parametrize("base_form", ["absent", "shared", "copied"])
@pytest.mark.parametrize("delta_form", ["absent", "shared", "copied"])
def test_a_tied_head_is_left_out(tmp_path: Path, base_form: str, delta_form: str) -> None:
    config = CONFIG | {"tie_word_embeddings": True}
    base, delta = tied(llama(1), base_form), tied(llama(2, 0.01), delta_form)
    apply(save(tmp_path / "b", base, config=config), save(tmp_path / "d", delta, config=config), tmp_path / "out")
    expected = published_sum(llama(1), llama(2, 0.01))
    del expected["lm_head.weight"]
    assert_same(load(tmp_path / "out"), expected)


def test_a_head_that_is_said_to_be_tied_and_differs_is_refused(tmp_path: Path) -> None:
    config = CONFIG | {"tie_word_embeddings": True}
    base, delta = save(tmp_path / "b", llama(1), config=config), save(tmp_path / "d", llama(2, 0.01), config=config)
    with pytest.raises(MismatchError, match=r"ties lm_head.* to .*, but they differ") as e:
        apply(base, delta, tmp_path / "out")
    assert [problem.kind for problem in e.value.problems] == ["tied", "tied"]
    assert nothing_left(tmp_path / "out")


# the directory


def sums(directory: Path) -> dict[str, str]:
    lines = (directory / "SHA256SUMS").read_text().splitlines()
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def nothing_left(out: Path) -> bool:
    return not out.exists() and not partial_path(out).exists()


@pytest.fixture
def complete(pair: Pair) -> Pair:
    """The pair with what else a release has, one file of which is not known to us."""
    delta = pair[1]
    (delta / "config.json").write_text(json.dumps(CONFIG | {"_name_or_path": "/home/someone/secret/step-3"}))
    (delta / "generation_config.json").write_text('{"bos_token_id": 1}')
    (delta / "tokenizer.model").write_bytes(b"\x0a\x00not really")
    (delta / "special_tokens_map.json").write_text("{}")
    (delta / "training_args.bin").write_bytes(b"something")
    return pair


def test_the_directory(tmp_path: Path, complete: Pair) -> None:
    manifest = apply(*complete, tmp_path / "out", max_shard_size=50_000)
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    shards = sorted(name for name in names if name.startswith("model-"))
    assert names - set(shards) == {
        "README.md",
        "SHA256SUMS",
        "bayling-delta.json",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "special_tokens_map.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert shards == [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
    for name in ("generation_config.json", "tokenizer.model", "special_tokens_map.json"):
        assert (out / name).read_bytes() == (complete[1] / name).read_bytes()
    assert json.loads((out / "config.json").read_text()) == CONFIG
    assert {change["file"] for change in manifest["changes"]} == {"config.json", "tokenizer_config.json"}
    assert b"secret" not in b"".join(path.read_bytes() for path in out.iterdir())
    assert str(tmp_path).encode() not in b"".join(path.read_bytes() for path in out.iterdir())
    assert manifest == json.loads((out / "bayling-delta.json").read_text())


def test_sha256sum_agrees(tmp_path: Path, complete: Pair) -> None:
    apply(*complete, tmp_path / "out", max_shard_size=50_000)
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path / "out", capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.count(": OK") == len(list((tmp_path / "out").iterdir())) - 1


def test_the_manifest_says_what_the_files_are(tmp_path: Path, complete: Pair, digest: str) -> None:
    manifest = apply(*complete, tmp_path / "out", max_shard_size=50_000, expect=digest)
    for entry in manifest["result"]["files"]:
        data = (tmp_path / "out" / entry["name"]).read_bytes()
        assert (entry["size"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    for side, directory in zip(("base", "delta"), complete, strict=True):
        for entry in manifest["inputs"][side]["files"]:
            data = (directory / entry["name"]).read_bytes()
            assert (entry["size"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    for name, tensor in load(tmp_path / "out").items():
        entry = manifest["result"]["tensors"][name]
        assert entry["sha256"] == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        with safe_open(tmp_path / "out" / entry["file"], "pt") as file:
            assert name in file.keys()  # noqa: SIM118  # not a mapping
    assert manifest["result"]["parameters"] == sum(tensor.numel() for tensor in load(tmp_path / "out").values())
    assert manifest["verification"][0]["outcome"] == "match"


def test_an_input_out_of_order_is_digested_by_tensor(tmp_path: Path, states: tuple[StateDict, StateDict]) -> None:
    """Its weights digest is then the one that a rebuild of it in order would have."""
    base, delta = states
    zeros = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    sorted_base = save(tmp_path / "sorted", base, container="safetensors")
    manifest = apply(sorted_base, save(tmp_path / "d", delta), tmp_path / "out")
    copied = apply(sorted_base, save(tmp_path / "zeros", zeros), tmp_path / "copy")
    assert manifest["inputs"]["base"]["files"][0]["sha256"] is None
    assert manifest["inputs"]["base"]["weights_digest"] == copied["result"]["weights_digest"]


def test_shards_that_take_turns_are_still_digested_as_files(
    tmp_path: Path, states: tuple[StateDict, StateDict], digest: str
) -> None:
    """Each file's bytes are met in order, though the reading goes back and forth between the files."""
    names = list(states[0])
    base = save(tmp_path / "base", states[0], order=names[::2] + names[1::2], shards=2)
    manifest = apply(base, save(tmp_path / "delta", states[1]), tmp_path / "out", memory_limit=256 * KIB)
    assert manifest["result"]["weights_digest"] == digest
    for entry in manifest["inputs"]["base"]["files"]:
        assert entry["sha256"] == hashlib.sha256((base / entry["name"]).read_bytes()).hexdigest()


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    apply(*pair, tmp_path / "one", threads=1, direct=False, memory_limit=MIB)
    apply(*pair, tmp_path / "two")
    assert (tmp_path / "one" / "SHA256SUMS").read_bytes() == (tmp_path / "two" / "SHA256SUMS").read_bytes()
    assert '"created": "2023-11-14T22:13:20Z"' in (tmp_path / "one" / "bayling-delta.json").read_text()


def test_tensors_lie_in_the_deltas_order(tmp_path: Path, pair: Pair, states: tuple[StateDict, StateDict]) -> None:
    apply(*pair, tmp_path / "out")
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    del header["__metadata__"]
    assert list(header) == [name for name in states[1] if not name.endswith("inv_freq")]


def test_links_are_followed_as_in_a_hub_cache(tmp_path: Path, pair: Pair, digest: str) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in pair[0].iterdir():
        (snapshot / file.name).symlink_to(file)
    assert apply(snapshot, pair[1], tmp_path / "out")["result"]["weights_digest"] == digest


def test_configuration_is_kept_as_it_is_but_for_the_change(tmp_path: Path, pair: Pair) -> None:
    """Letters of any kind, and half a character, which only JSON's escape can carry."""
    text = json.dumps(CONFIG | {"_name_or_path": "C:\\\\runs", "note": "百聆 \ud800"})
    (pair[1] / "config.json").write_text(text)
    apply(*pair, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == CONFIG | {"note": "百聆 \ud800"}


# what is refused


def change(name: str, value: torch.Tensor | None) -> Callable[[StateDict], StateDict]:
    def changed(state: StateDict) -> StateDict:
        state = dict(state)
        del state[name]
        return state if value is None else state | {name: value}

    return changed


NORM = "model.norm.weight"
WRONG_DELTAS = {
    "missing": (change(NORM, None), "missing_tensor", "lacks model.norm.weight, which the base has"),
    "shape": (change(NORM, torch.zeros(63).half()), "shape", "F16 [64] in the base, F16 [63] in the delta"),
    "broadcast": (change(NORM, torch.zeros(1, 64).half()), "shape", "F16 [1, 64] in the delta"),
    "integer": (change(NORM, torch.zeros(64).to(torch.int8)), "dtype", "is I8 in the delta"),
    "double": (change(NORM, torch.zeros(64).double()), "dtype", "is F64 in the delta"),
}


@pytest.mark.parametrize("case", WRONG_DELTAS)
def test_pairs_that_do_not_fit(tmp_path: Path, pair: Pair, states: tuple[StateDict, StateDict], case: str) -> None:
    wrong, kind, words = WRONG_DELTAS[case]
    delta = save(tmp_path / "wrong", wrong(states[1]))
    with pytest.raises(MismatchError, match=words.replace("[", r"\[").replace("]", r"\]")) as error:
        apply(pair[0], delta, tmp_path / "out")
    assert [problem.kind for problem in error.value.problems] == [kind]
    assert nothing_left(tmp_path / "out")


def test_all_problems_are_told_at_once(tmp_path: Path, pair: Pair, states: tuple[StateDict, StateDict]) -> None:
    """Of the pair, of the output; and the earliest of the exit codes decides."""
    delta = change("lm_head.weight", torch.zeros(3).half())(change(NORM, None)(states[1]))
    delta["model.extra.weight"] = torch.zeros(2).half()
    (tmp_path / "out").mkdir()
    with pytest.raises(MismatchError) as error:
        apply(pair[0], save(tmp_path / "wrong", delta), tmp_path / "out")
    kinds = sorted(problem.kind for problem in error.value.problems)
    assert kinds == ["missing_tensor", "missing_tensor", "output_exists", "shape"]


def test_problems_of_both_inputs_are_told_at_once(tmp_path: Path, pair: Pair) -> None:
    (pair[0] / "pytorch_model-00001-of-00002.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (pair[1] / "pytorch_model-00002-of-00002.bin").unlink()
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CheckpointError) as error:
        apply(*pair, tmp_path / "out")
    assert sorted(problem.kind for problem in error.value.problems) == ["incomplete", "not_weights", "output_exists"]
    assert (tmp_path / "out").read_text() == "mine"


def test_an_output_that_exists_is_never_touched(tmp_path: Path, pair: Pair) -> None:
    for name in ("empty", "full", "file", "link"):
        out = tmp_path / name
        if name in ("empty", "full"):
            out.mkdir()
        if name == "full":
            (out / "mine").write_text("mine")
        if name == "file":
            out.write_text("mine")
        if name == "link":
            out.symlink_to("nowhere")
        before = (out.lstat().st_mtime_ns, out.lstat().st_ino)
        with pytest.raises(OutputError, match="exists, and nothing is replaced"):
            apply(*pair, out)
        assert (out.lstat().st_mtime_ns, out.lstat().st_ino) == before


def test_a_directory_in_the_place_of_an_unfinished_output_is_not_touched(tmp_path: Path, pair: Pair) -> None:
    partial = partial_path(tmp_path / "out")
    partial.mkdir()
    (partial / "mine").write_text("mine")
    with pytest.raises(OutputError, match="not an unfinished output of this program"):
        apply(*pair, tmp_path / "out")
    (partial / "lock").write_text("{}")
    with pytest.raises(OutputError, match="not an unfinished output of this program"):
        apply(*pair, tmp_path / "out", resume=False)
    assert (partial / "mine").read_text() == "mine"


def test_an_output_inside_an_input_is_refused(pair: Pair) -> None:
    with pytest.raises(OutputError, match="lies inside the delta"):
        apply(*pair, pair[1] / "out")


def test_an_output_without_a_parent_is_refused(tmp_path: Path, pair: Pair) -> None:
    with pytest.raises(OutputError, match="No such file or directory"):
        apply(*pair, tmp_path / "absent" / "out")


class SmallDisk(system.System):
    def free_bytes(self, path: Path) -> int:  # noqa: ARG002
        return 1 << 20


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path, pair: Pair) -> None:
    with system.using(SmallDisk()), pytest.raises(OutputError, match="GB free, the output needs"):
        apply(*pair, tmp_path / "out")
    assert nothing_left(tmp_path / "out")


class FewFiles(system.System):
    def free_files(self, path: Path) -> int:  # noqa: ARG002
        return 12


class SmallFiles(system.System):
    def largest_file(self, path: Path) -> int:  # noqa: ARG002
        return 60_000


@pytest.mark.parametrize(
    ("disk", "words"),
    [
        (FewFiles, r"has room for 12 more files \(inodes\), the output needs 1\d; remove some"),
        (SmallFiles, "files of 60,000 bytes at most, .* would have one of .*; --max-shard-size makes them smaller"),
    ],
)
def test_a_disk_that_cannot_have_the_files_is_refused(
    tmp_path: Path, pair: Pair, disk: type[system.System], words: str
) -> None:
    with system.using(disk()), pytest.raises(OutputError, match=words) as refused:
        apply(*pair, tmp_path / "out")
    assert [problem.kind for problem in refused.value.problems] == ["disk_space"]
    assert nothing_left(tmp_path / "out")
    with system.using(SmallFiles()):
        apply(*pair, tmp_path / "out", max_shard_size=50_000)


def test_the_room_is_told_with_all_else(tmp_path: Path) -> None:
    state = llama(2, 0.01)
    del state["lm_head.weight"]
    pair = save(tmp_path / "base", llama(1)), save(tmp_path / "delta", state)
    with system.using(SmallFiles()), pytest.raises(BaylingDeltaError) as refused:
        apply(*pair, tmp_path / "out")
    assert {problem.kind for problem in refused.value.problems} == {"disk_space", "missing_tensor"}


def test_another_digest_than_expected_is_no_model(tmp_path: Path, pair: Pair, digest: str) -> None:
    with pytest.raises(IntegrityError, match=f"is {digest}, expected was sha256:{'0' * 64}"):
        apply(*pair, tmp_path / "out", expect="0" * 64)
    assert not (tmp_path / "out").exists()
    apply(*pair, tmp_path / "out", expect=digest)  # what is finished is taken up
    assert nothing_left(tmp_path / "other")


def test_non_finite_sums_are_refused_unless_allowed(tmp_path: Path) -> None:
    """Two finite numbers whose sum is not; only the addition shows it."""
    base = {"big": torch.full((5, 3), 60000.0).half(), "fine": torch.ones(4).half()}
    left, right = save(tmp_path / "b", base), save(tmp_path / "d", base)
    with pytest.raises(MismatchError, match=r"15 elements of the sum are infinite or NaN") as error:
        apply(left, right, tmp_path / "out")
    assert [(problem.kind, problem.where) for problem in error.value.problems] == [("non_finite", "big")]
    assert nothing_left(tmp_path / "out")
    manifest = apply(left, right, tmp_path / "out", allow=["non_finite"])
    assert manifest["options"]["allow"] == ["non_finite"]
    assert_same(load(tmp_path / "out"), published_sum(base, base))


def test_non_finite_inputs_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = {"nan": torch.ones(9).half(), "fine": torch.ones(4).half()}
    delta = {"nan": torch.tensor([1.0, float("nan"), float("inf")] * 3).half(), "fine": torch.ones(4).half()}
    left, right = save(tmp_path / "b", base), save(tmp_path / "d", delta)
    with system.using(ReadOnly()), pytest.raises(MismatchError, match="nan of the delta: 6 of the 9 elements"):
        apply(left, right, tmp_path / "out")
    apply(left, right, tmp_path / "out", allow=["non_finite"])
    assert_same(load(tmp_path / "out"), published_sum(base, delta))


class ReadOnly(system.System):
    """Fails a test that tries to change anything."""

    def make_directory(self, path: Path) -> None:
        raise AssertionError(f"{path} was about to be made")


# what samples show


def test_what_looks_wrong_is_refused_unless_allowed(tmp_path: Path, pair: Pair) -> None:
    """Base and delta swapped, the delta for both, the base for both, the sum added twice."""
    base, delta = pair
    apply(base, delta, tmp_path / "sum")
    cases = {
        "swapped": (delta, base, ["looks_like_delta", "looks_like_model"]),
        "two-deltas": (delta, delta, ["looks_like_delta"]),
        "two-models": (base, base, ["looks_like_model"]),
        "twice": (tmp_path / "sum", delta, ["already_rebuilt"]),
    }
    for name, (left, right, kinds) in cases.items():
        with system.using(ReadOnly()), pytest.raises(MismatchError) as error:
            apply(left, right, tmp_path / name)
        assert [problem.kind for problem in error.value.problems] == kinds
        assert all(problem.allow for problem in error.value.problems)
        apply(left, right, tmp_path / name, allow=kinds)


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tmp_path: Path, pair: Pair) -> None:
    vocabulary = {f"t{number}": number for number in range(161)}
    (pair[1] / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    with pytest.raises(MismatchError, match=r"its tokenizer knows 161 tokens.*has 160 rows") as error:
        apply(*pair, tmp_path / "out")
    assert error.value.problems[0].kind == "tokenizer"


def test_one_shard_of_several_is_not_a_model(tmp_path: Path, pair: Pair) -> None:
    """The same shard of both sides would add up, to a part of a model."""
    first = "pytorch_model-00001-of-00002.bin"
    with pytest.raises(CheckpointError, match="is one of 2 shards by its name") as error:
        apply(pair[0] / first, pair[1] / first, tmp_path / "out")
    assert [problem.kind for problem in error.value.problems] == ["incomplete", "incomplete"]


def test_a_configuration_of_another_size_is_refused(tmp_path: Path, pair: Pair) -> None:
    (pair[1] / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 3}))
    with pytest.raises(MismatchError, match="says num_hidden_layers 3; the shapes say 2") as error:
        apply(*pair, tmp_path / "out")
    assert [(problem.kind, problem.allow) for problem in error.value.problems] == [("architecture", True)]


def test_a_base_of_zeros_is_refused(tmp_path: Path, pair: Pair, states: tuple[StateDict, StateDict]) -> None:
    """A download that reserved its room and never filled it: headers are there, and zeros."""
    zeros = save(tmp_path / "zeros", {name: torch.zeros_like(tensor) for name, tensor in states[0].items()})
    with pytest.raises(MismatchError, match="preallocated, and never finished") as error:
        apply(zeros, pair[1], tmp_path / "out")
    assert error.value.problems[0].kind == "all_zero"
    apply(zeros, pair[1], tmp_path / "out", allow=["all_zero"])


def test_a_sentencepiece_model_is_counted(tmp_path: Path, pair: Pair) -> None:
    """Pieces as the library writes them; those of a file that is not one are not counted."""
    import sentencepiece

    text = tmp_path / "text"
    text.write_text("\n".join(f"word{number} and {number * 7919}" for number in range(400)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "spm"), vocab_size=161, model_type="bpe", minloglevel=2
    )
    (pair[1] / "tokenizer.model").write_bytes((tmp_path / "spm.model").read_bytes())
    with pytest.raises(MismatchError, match="its tokenizer knows 161 tokens"):
        apply(*pair, tmp_path / "out")
    (pair[1] / "tokenizer.model").write_bytes((tmp_path / "spm.model").read_bytes()[:-1])
    apply(*pair, tmp_path / "out")


def test_what_may_be_in_order_is_only_noted(tmp_path: Path, pair: Pair, states: tuple[StateDict, StateDict]) -> None:
    """A base rounded through bfloat16, one of another generation, files that are not copied."""
    rounded = {name: tensor.bfloat16().half() for name, tensor in states[0].items()}
    base = save(tmp_path / "rounded", rounded, config=CONFIG | {"max_position_embeddings": 4096, "vocab_size": 32000})
    (pair[1] / "training_args.bin").write_bytes(b"something")
    notes: list[str] = []
    apply(base, pair[1], tmp_path / "out", tell=notes.append)
    told = "\n".join(notes)
    for words in ("low 3 bits zero", "suggests Llama-2", "not copied: training_args.bin"):
        assert words in told
    assert not (tmp_path / "out" / "training_args.bin").exists()


def test_a_memory_limit_below_the_least_is_refused_and_the_least_works(tmp_path: Path, pair: Pair) -> None:
    with pytest.raises(UsageError, match="the least that works is 96KiB"):
        apply(*pair, tmp_path / "out", memory_limit=10_000)
    apply(*pair, tmp_path / "out", memory_limit=96 * KIB)


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path, pair: Pair) -> None:
    """It is noticed before the output gets its name, though every byte was read."""
    shard = pair[0] / "pytorch_model-00002-of-00002.bin"

    class Touching(system.System):
        done = False  # the first write is the lock's, before any weights are read

        def write_from(self, handle: int, view: memoryview, offset: int) -> int:
            if not self.done:
                self.done = True
                shard.write_bytes(shard.read_bytes())
            return super().write_from(handle, view, offset)

    with system.using(Touching()), pytest.raises(CheckpointError, match="changed while it was being read"):
        apply(*pair, tmp_path / "out")
    assert nothing_left(tmp_path / "out")
