"""verify and record: every damage found and named, and nothing called right that was not compared."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bayling_delta import apply, record, verify
from bayling_delta.errors import CheckpointError, IntegrityError, MismatchError, NoRecordError
from tests.pairs import CONFIG, llama, published_sum, save

KIB = 1 << 10


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair, and the model rebuilt from it: read only."""
    place = tmp_path_factory.mktemp("verify")
    base, delta = llama(1), llama(2, 0.01)
    save(place / "base", base, shards=2)
    save(place / "delta", delta, shards=2)
    (place / "delta" / "tokenizer.model").write_bytes(b"pieces")
    apply(place / "base", place / "delta", place / "model", max_shard_size=60_000)
    save(place / "other-form", published_sum(base, delta), container="torch", shards=3)
    return place


@pytest.fixture
def model(tmp_path: Path, place: Path) -> Path:
    """A copy of the model, to be damaged."""
    return Path(shutil.copytree(place / "model", tmp_path / "model"))


def flip(path: Path, place: int, bit: int = 2) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def shards(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def problems_of(model: Path, **options: Any) -> list[tuple[str, str, str]]:
    with pytest.raises(IntegrityError) as raised:
        verify(model, **options)
    return [(problem.kind, problem.where, problem.message) for problem in raised.value.problems]


# what cannot be recorded


def test_a_model_of_files_that_some_disks_take_for_one_is_not_recorded(tmp_path: Path) -> None:
    """Nobody could verify the manifest: the reader refuses it."""
    for name in ("model-a.safetensors", "model-A.safetensors"):
        save(tmp_path / name, {name: torch.zeros(2)}, container="safetensors", config=None)
        (tmp_path / name / "model.safetensors").rename(tmp_path / f"x{name}")
        (tmp_path / name).rmdir()
        (tmp_path / f"x{name}").rename(tmp_path / name)
    if len(list(tmp_path.iterdir())) < 2:
        pytest.skip("this disk takes them for one")
    with pytest.raises(CheckpointError, match=r"'model-A\.safetensors' and 'model-a\.safetensors'.*rename one"):
        record(tmp_path)


# what matches


def test_a_rebuilt_model_matches_its_own_records(model: Path) -> None:
    document = verify(model)
    assert document["ok"]
    assert [Path(entry["against"]).name for entry in document["compared"]] == ["bayling-delta.json", "SHA256SUMS"]


def test_either_record_alone_is_enough(model: Path) -> None:
    (model / "bayling-delta.json").rename(model.parent / "kept.json")
    with pytest.raises(IntegrityError, match=r"bayling-delta\.json.*is in .*SHA256SUMS, but not here"):
        verify(model)
    (model / "SHA256SUMS").unlink()
    shutil.copy(model.parent / "kept.json", model / "bayling-delta.json")
    assert len(verify(model)["compared"]) == 1


def test_against_another_persons_record(place: Path, model: Path, tmp_path: Path) -> None:
    """A manifest's file, a directory with one, a digest: whatever the container and the sharding."""
    manifest = json.loads((place / "model" / "bayling-delta.json").read_text())
    digest = manifest["result"]["weights_digest"]
    recorded = tmp_path / "recorded.json"
    recorded.write_text(json.dumps(record(place / "other-form")))
    for subject in (model, place / "other-form"):
        for against in (digest, digest.removeprefix("sha256:"), str(place / "model"), str(recorded)):
            assert verify(subject, against=against)["weights_digest"] == digest


@pytest.mark.parametrize("form", ["model", "other-form"])
@pytest.mark.parametrize("memory_limit", [512 * KIB, 64 << 20])
def test_against_the_sum_made_anew(place: Path, form: str, memory_limit: int) -> None:
    document = verify(place / form, base=place / "base", delta=place / "delta", memory_limit=memory_limit, threads=2)
    assert document["compared"][-1]["against"] == "the sum of base and delta"
    assert document["weights_digest"] == record(place / "other-form")["result"]["weights_digest"]


def test_a_cast_result_is_compared_as_its_manifest_says(place: Path, tmp_path: Path) -> None:
    inputs: dict[str, Any] = {"base": place / "base", "delta": place / "delta"}
    apply(**inputs, out=tmp_path / "out", dtype="BF16")
    assert verify(tmp_path / "out", **inputs)["ok"]
    (tmp_path / "out" / "bayling-delta.json").unlink()
    (tmp_path / "out" / "SHA256SUMS").unlink()
    assert problems_of(tmp_path / "out", **inputs)[0][2] == "is BF16 [160, 64] in the model, F16 [160, 64] in the sum"
    assert verify(tmp_path / "out", **inputs, dtype="BF16")["ok"]


# what does not


def header_length(shard: Path) -> int:
    return 8 + int.from_bytes(shard.read_bytes()[:8], "little")


def test_a_flipped_bit_anywhere_in_the_weights_is_found_and_placed(model: Path) -> None:
    """Some bytes of every tensor: the tensor is named, and the file."""
    for shard in shards(model):
        start = header_length(shard)
        header = json.loads(shard.read_bytes()[8:start])
        del header["__metadata__"]
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            for offset in (first, (first + last) // 2, last - 1):
                flip(shard, start + offset)
                found = problems_of(model)
                assert ("digest", f"{shard}: {name}") in [(kind, where) for kind, where, _ in found]
                assert ("digest", str(shard)) in [(kind, where) for kind, where, _ in found]
                flip(shard, start + offset)
    assert verify(model)["ok"]


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_in_any_other_byte_is_found(model: Path, bit: int) -> None:
    """Headers, configuration, tokenizer, index, card, manifest and sums, sampled all over."""
    for path in sorted(model.iterdir()):
        end = header_length(path) if path.suffix == ".safetensors" else path.stat().st_size
        for place in sorted({0, 1, end // 3, end // 2, end - 2, end - 1}):
            flip(path, place, bit)
            with pytest.raises((IntegrityError, CheckpointError)) as raised:
                verify(model)
            if path.name not in ("bayling-delta.json", "SHA256SUMS"):
                assert raised.type is IntegrityError
                assert path.name in str(raised.value)
            flip(path, place, bit)
    assert verify(model)["ok"]


def test_a_missing_a_truncated_and_an_extra_file(model: Path) -> None:
    first, second = shards(model)[:2]
    kept = second.read_bytes()
    second.write_bytes(kept[:-100])
    assert ("model", str(second)) in [(kind, where) for kind, where, _ in problems_of(model)]
    second.unlink()
    assert any("but not here" in message for _, where, message in problems_of(model) if where == str(second))
    second.write_bytes(kept)
    shutil.copy(first, model / "model-old.safetensors")
    assert [where for _, where, _ in problems_of(model)] == [str(model / "model-old.safetensors")]
    (model / "model-old.safetensors").rename(model / "pytorch_model.bin")
    assert "a loader may take it" in problems_of(model)[0][2]


def test_all_damage_is_told_at_once(model: Path) -> None:
    first, second = shards(model)[:2]
    flip(first, first.stat().st_size - 1)
    flip(second, second.stat().st_size - 1)
    (model / "tokenizer.model").write_bytes(b"other!")
    (model / "config.json").unlink()
    named = {Path(where.split(":")[0]).name for _, where, _ in problems_of(model)}
    assert {first.name, second.name, "tokenizer.model", "config.json"} <= named


def test_other_values_of_the_base_are_found_with_the_first_that_differ(place: Path, tmp_path: Path) -> None:
    """A base rounded through bfloat16 gives a model that runs, and that is not the published one."""
    rounded = {
        name: tensor.bfloat16().to(tensor.dtype) if "layers.1.mlp" in name else tensor
        for name, tensor in llama(1).items()
    }
    total = published_sum(rounded, llama(2, 0.01))
    right = published_sum(llama(1), llama(2, 0.01))
    found = problems_of(save(tmp_path / "m", total, shards=2), base=place / "base", delta=place / "delta")
    assert {where.split(": ")[1] for _, where, _ in found} == {
        f"model.layers.1.mlp.{which}_proj.weight" for which in ("gate", "up", "down")
    }
    for _, where, message in found:
        name = where.split(": ")[1]
        places = (total[name] != right[name]).nonzero()
        row, column = places[0].tolist()
        assert message.startswith(f"{len(places):,} of {total[name].numel():,} elements differ: [{row}, {column}]: ")
        assert (
            f"[{row}, {column}]: {float(total[name][row, column])!r}, the sum is {float(right[name][row, column])!r}"
            in message
        )


def test_a_model_of_other_tensors_is_not_the_sum(place: Path, tmp_path: Path) -> None:
    state = published_sum(llama(1), llama(2, 0.01))
    state["model.norm.weight"] = torch.zeros(63).half()
    state["extra.weight"] = state.pop("lm_head.weight")
    messages = [
        message
        for _, _, message in problems_of(save(tmp_path / "m", state), base=place / "base", delta=place / "delta")
    ]
    assert any("lacks lm_head.weight" in message for message in messages)
    assert any("has extra.weight, which the sum does not have" in message for message in messages)
    assert any("is F16 [63] in the model, F16 [64] in the sum" in message for message in messages)


def test_nothing_to_compare_with_is_never_right(place: Path, tmp_path: Path) -> None:
    with pytest.raises(NoRecordError, match="no manifest and no SHA256SUMS"):
        verify(place / "base")
    with pytest.raises(NoRecordError):
        verify(place / "base", load=True)
    with pytest.raises(CheckpointError, match="No such file"):
        verify(tmp_path / "absent")


def test_a_missing_model_against_a_record_is_a_mismatch_of_it(place: Path, tmp_path: Path) -> None:
    assert problems_of(tmp_path / "absent", against=str(place / "model"))[0][0] == "model"


def test_base_and_delta_that_do_not_fit_are_told_so(place: Path, tmp_path: Path) -> None:
    delta = save(tmp_path / "d", {name: tensor for name, tensor in llama(2, 0.01).items() if "norm" not in name})
    with pytest.raises(MismatchError, match="lacks model"):
        verify(place / "other-form", base=place / "base", delta=delta)


def bad_manifest(change: str, text: str) -> str:
    document = json.loads(text)
    if change == "newer":
        document["schema"] = "bayling-delta/manifest/2"
    elif change == "contradiction":
        next(iter(document["result"]["tensors"].values()))["sha256"] = "0" * 64
    elif change == "escape":
        document["result"]["files"][0]["name"] = "../secret"
    elif change == "list":
        return "[]"
    elif change == "deep":
        return "[" * 100_000
    elif change == "lie":
        document["result"]["tensors"] = {}
    return json.dumps(document)


@pytest.mark.parametrize("change", ["newer", "contradiction", "escape", "list", "deep", "lie"])
def test_a_manifest_that_cannot_be_used(model: Path, change: str) -> None:
    path = model / "bayling-delta.json"
    path.write_text(bad_manifest(change, path.read_text()))
    with pytest.raises(CheckpointError, match=r"bayling-delta\.json") as raised:
        verify(model)
    assert raised.value.problems[0].kind == "record"


@pytest.mark.parametrize("text", ["", "nonsense\n", f"{'0' * 64}  ../x\n", f"{'0' * 64}  a\n{'1' * 64}  a\n"])
def test_sums_that_cannot_be_used(model: Path, text: str) -> None:
    (model / "SHA256SUMS").write_text(text)
    with pytest.raises(CheckpointError, match="SHA256SUMS"):
        verify(model)


# record


def test_record_gives_one_digest_for_one_model(tmp_path: Path) -> None:
    """In .bin and safetensors, one shard and many, tied with and without a stored head."""
    config = CONFIG | {"tie_word_embeddings": True}
    state = llama(1)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    headless = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    digests = {
        record(
            save(tmp_path / f"{container}-{shards}-{stored}", which, container=container, shards=shards, config=config)
        )["result"]["weights_digest"]
        for container in ("torch", "safetensors")
        for shards in (1, 2, 5)
        for stored, which in (("head", state), ("none", headless))
    }
    assert len(digests) == 1


def test_record_keeps_a_head_that_is_not_what_it_is_said_to_be(tmp_path: Path) -> None:
    config = CONFIG | {"tie_word_embeddings": True}
    manifest = record(save(tmp_path / "m", llama(1), config=config))
    assert "lm_head.weight" in manifest["result"]["tensors"]


def test_record_of_views_digests_each_tensor_and_each_file(tmp_path: Path) -> None:
    import hashlib

    whole = torch.arange(1000).half()
    state = {"a": whole[:600], "b": whole[300:900].view(20, 30).t(), "c": whole[500:].clone(), "d": whole[::2]}
    directory = save(tmp_path / "m", state, config=None)
    result = record(directory)["result"]
    for name, tensor in state.items():
        assert result["tensors"][name]["sha256"] == hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
    for entry in result["files"]:
        assert entry["sha256"] == hashlib.sha256((directory / entry["name"]).read_bytes()).hexdigest()


def test_a_flipped_bit_in_a_bin_record_is_found_by_its_checksum(place: Path, tmp_path: Path) -> None:
    """Nobody recorded a digest, and yet the archive knows."""
    base = Path(shutil.copytree(place / "base", tmp_path / "base"))
    shard = base / "pytorch_model-00001-of-00002.bin"
    flip(shard, shard.stat().st_size // 2)
    with pytest.raises(IntegrityError, match="CRC-32 is wrong; download the file again") as raised:
        record(base)
    assert raised.value.problems[0].kind == "crc"
    with pytest.raises(IntegrityError, match="CRC-32 is wrong"):
        apply(base, place / "delta", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_checksums_that_were_not_computed_are_not_looked_at(place: Path, tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        save(tmp_path / "m", published_sum(llama(1), llama(2, 0.01)))
    finally:
        torch.serialization.set_crc32_options(True)
    manifest = record(tmp_path / "m")
    assert manifest["result"]["weights_digest"] == verify(place / "model")["weights_digest"]


# what a loader would read, and nobody lists

STRAY = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "consolidated.00.pth",
    "flax_model.msgpack",
    "special_tokens_map.json",
    "tf_model.h5",
    "tokenizer.json",
]


@pytest.mark.parametrize("name", STRAY)
def test_a_file_that_would_change_the_model_is_found(model: Path, name: str) -> None:
    (model / name).write_text("{}")
    said = "does not belong to this model, and a loader may take it; move it away"
    with pytest.raises(IntegrityError) as error:
        verify(model)
    assert [(problem.where, problem.message) for problem in error.value.problems] == [(str(model / name), said)]
    assert error.value.hint is None  # to mend the model would not take it away


def test_other_files_are_the_users(model: Path) -> None:
    for name in ("notes.txt", "LICENSE", ".gitattributes", "model.gguf"):
        (model / name).write_text("mine")
    assert verify(model)["ok"]


def test_weights_in_other_forms_are_no_fault_of_anothers_model(place: Path, tmp_path: Path) -> None:
    """Some releases have them beside those that are read here."""
    model = Path(shutil.copytree(place / "other-form", tmp_path / "other"))
    (model / "consolidated.safetensors").write_text("")
    (model / "tf_model.h5").write_text("")
    assert verify(model, against=record(model)["result"]["weights_digest"])["ok"]


def test_a_list_of_weights_alone_says_nothing_of_other_files(model: Path) -> None:
    (model / "bayling-delta.json").unlink()
    lines = (model / "SHA256SUMS").read_text().splitlines(keepends=True)
    (model / "SHA256SUMS").write_text("".join(line for line in lines if ".safetensors" in line))
    assert verify(model)["ok"]


# what to do about it


def test_how_to_mend_a_model_is_told(model: Path) -> None:
    """It cannot be had from anywhere: that the files be downloaded again is no advice."""
    shards(model)[1].unlink()
    (model / "model.safetensors.index.json").write_bytes(b"")
    with pytest.raises(IntegrityError) as error:
        verify(model)
    assert error.value.hint is not None
    assert f"bayling-delta repair {model} --base BASE --delta DELTA" in error.value.hint
    assert "download" not in str(error.value)


def test_a_list_that_is_gone_is_told(model: Path) -> None:
    (model / "SHA256SUMS").unlink()
    told: list[str] = []
    verify(model, tell=told.append)
    assert [text for text in told if "SHA256SUMS: is not here" in text]


@pytest.mark.parametrize("name", ["bayling-delta.json", "SHA256SUMS"])
def test_the_other_record_finds_damage_where_one_cannot_be_read(model: Path, name: str) -> None:
    (model / name).write_text("nonsense")
    flip(shards(model)[2], -1)
    flip(model / "config.json", 5)
    with pytest.raises(CheckpointError) as error:
        verify(model)
    places = {Path(problem.where).name for problem in error.value.problems}
    assert places >= {name, shards(model)[2].name, "config.json"}
