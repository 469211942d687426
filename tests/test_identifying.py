"""Releases recognised by name, by small tensors and by digests, and what follows from that."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub._local_folder import write_download_metadata

from bayling_delta import apply, plan_apply, record, verify
from bayling_delta.describing import plan_document
from bayling_delta.errors import IntegrityError, MismatchError, NoRecordError
from bayling_delta.inspecting import inspect_checkpoint
from bayling_delta.registering import entry_from_manifest
from bayling_delta.releases import load_releases
from tests.pairs import CONFIG, StateDict, llama, save, shuffled

Json = dict[str, Any]


def entry(place: Path, name: str, files: Path, **changes: Any) -> Path:
    """A registry entry for the weight files of a directory, with their SHA-256."""
    rows: list[Json] = [
        {"name": file.name, "size": file.stat().st_size, "sha256": [hashlib.sha256(file.read_bytes()).hexdigest()]}
        for file in sorted(files.iterdir())
        if file.suffix in (".bin", ".safetensors")
    ]
    container = "safetensors" if rows[0]["name"].endswith(".safetensors") else "torch"
    document = {
        "schema": "bayling-delta/release/1",
        "name": name,
        "title": f"the {name}",
        "kind": "base",
        "source": ["me"],
        "sources": {"me": "measured by me"},
        "forms": [{"title": "as made", "container": container, "source": ["me"], "files": rows}],
        **changes,
    }
    path = place / f"{name}.json"
    path.write_text(json.dumps(document))
    return path


def in_cache(place: Path, repo: str, files: Path) -> Path:
    """A copy of a directory where the Hub's cache would have it."""
    snapshot = place / f"models--{repo.replace('/', '--')}" / "snapshots" / ("0" * 39 + "1")
    shutil.copytree(files, snapshot)
    return snapshot


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(tmp_path / "base", llama(1), shards=2)


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    return save(tmp_path / "delta", llama(2, 0.01), shards=2)


def without_dates(manifest: Json) -> Json:
    return {**manifest, "created": None}


# digests


def test_files_on_record_are_looked_up_in_the_pass(tmp_path: Path, base: Path, delta: Path) -> None:
    registry = [
        entry(tmp_path, "my-base", base),
        entry(tmp_path, "my-delta", delta, kind="delta", bases=["my-base"], recipe="plain"),
    ]
    manifest = apply(base, delta, tmp_path / "out", registry=registry, require_recorded=True)
    assert [manifest["inputs"][role]["name"] for role in ("base", "delta")] == ["my-base", "my-delta"]
    assert [(item["what"], item["outcome"]) for item in manifest["verification"]] == [
        ("the result's weights digest", "no record"),
        *((f"{role}: pytorch_model-0000{n}-of-00002.bin", "match") for role in ("base", "delta") for n in (1, 2)),
    ]
    assert manifest["verification"][1]["against"] == "the my-base: pytorch_model-00001-of-00002.bin"
    assert manifest["verification"][1]["source"] == "measured by me"
    checked = apply(base, delta, tmp_path / "checked", registry=registry, check_inputs=True)
    assert without_dates(checked) == without_dates(manifest)


@pytest.mark.parametrize("check_inputs", [False, True])
def test_what_must_be_on_record_and_is_not_is_refused(
    tmp_path: Path, base: Path, delta: Path, check_inputs: bool
) -> None:
    registry = [entry(tmp_path, "my-base", base)]
    with pytest.raises(NoRecordError) as caught:
        apply(base, delta, tmp_path / "o", registry=registry, require_recorded=True, check_inputs=check_inputs)
    assert [Path(problem.where).parent for problem in caught.value.problems] == [delta, delta]
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("check_inputs", [False, True])
def test_a_file_beside_a_recognised_one_must_be_on_record_too(
    tmp_path: Path, base: Path, delta: Path, check_inputs: bool
) -> None:
    registry = [entry(tmp_path, "my-base", base)]
    second = base / "pytorch_model-00002-of-00002.bin"
    other = {name: tensor + 1 for name, tensor in torch.load(second).items()}
    torch.save(other, second)
    with pytest.raises(IntegrityError) as caught:
        apply(base, delta, tmp_path / "out", registry=registry, check_inputs=check_inputs)
    (problem,) = caught.value.problems
    assert (problem.kind, problem.where) == ("digest", str(second))
    assert "the my-base (by the digest of pytorch_model-00001-of-00002.bin) has" in problem.message
    assert not (tmp_path / "out").exists()


def test_a_file_of_a_size_on_record_is_digested_though_it_is_out_of_order(tmp_path: Path, delta: Path) -> None:
    state = llama(1)
    base = save(tmp_path / "base", state, container="safetensors", order=shuffled(state))
    registry = [entry(tmp_path, "my-base", base)]
    assert plan_document(plan_apply(base, delta, tmp_path / "out"))["digested"]["base"] == "tensor"
    document = plan_document(plan_apply(base, delta, tmp_path / "out", registry=registry))
    assert document["digested"]["base"] == "file and tensor"
    assert "model.safetensors are read once more" in document["notes"][0]
    manifest = apply(base, delta, tmp_path / "out", registry=registry)
    assert manifest["inputs"]["base"]["name"] == "my-base"


@pytest.mark.parametrize("check_inputs", [False, True])
def test_a_delta_on_record_brings_its_recipe_before_the_run_or_ends_it(
    tmp_path: Path, base: Path, check_inputs: bool
) -> None:
    """Known by its digest: with --check-inputs in time to choose the recipe, else too late."""
    delta = save(tmp_path / "delta", llama(2, 0.01), shards=2)
    registry = [entry(tmp_path, "my-delta", delta, kind="delta", bases=["llama-7b"], recipe="llava")]
    if check_inputs:
        assert apply(base, delta, tmp_path / "out", registry=registry, check_inputs=True)["recipe"] == "llava"
        return
    with pytest.raises(MismatchError, match="whose recipe is llava, and the sum is made by plain"):
        apply(base, delta, tmp_path / "out", registry=registry)
    assert not (tmp_path / "out").exists()
    assert apply(base, delta, tmp_path / "out", registry=registry, recipe="plain")["recipe"] == "plain"


def test_a_result_that_somebody_recorded_is_recognised(tmp_path: Path, base: Path, delta: Path) -> None:
    """Two people's records of one sum agree: the second's manifest says so."""
    apply(base, delta, tmp_path / "first")

    registry = [(tmp_path / "model.json")]
    registry[0].write_text(json.dumps(entry_from_manifest(tmp_path / "first", load_releases(), name="theirs")))
    manifest = apply(base, delta, tmp_path / "second", registry=registry)
    assert manifest["verification"][0]["outcome"] == "match"
    assert manifest["verification"][0]["against"] == "theirs, as recorded in a manifest"


# names and small tensors


def test_a_delta_in_the_cache_of_the_hub_is_known_by_its_place(tmp_path: Path, base: Path, delta: Path) -> None:
    known = in_cache(tmp_path, "lmsys/vicuna-7b-delta-v0", delta)
    plan = plan_apply(base, known, tmp_path / "out", allow=["vocabulary"])
    assert plan.recipe.name == "vicuna-v0"
    assert any("Vicuna 7B v0" in note for note in plan.notes)


def test_full_models_deltas_and_files_without_a_rule_are_told_apart(tmp_path: Path, base: Path, delta: Path) -> None:
    for repo, role, kind, words in (
        ("ICTNLP/bayling-13b-v1.1", "delta", "looks_like_model", "full weights already, with nothing to apply"),
        ("ICTNLP/bayling-7b-diff", "base", "looks_like_delta", "which is a delta, and a base is a whole model"),
        ("OpenAssistant/oasst-rlhf-2-llama-30b-7k-steps-xor", "delta", "no_recipe", "byte by byte (XOR)"),
    ):
        sides = {"base": base, "delta": delta}
        sides[role] = in_cache(tmp_path / role, repo, sides[role])
        with pytest.raises(MismatchError) as caught:
            plan_apply(sides["base"], sides["delta"], tmp_path / "out")
        assert [problem.kind for problem in caught.value.problems if words in problem.message] == [kind]


def registered(tmp_path: Path, model: Path, name: str, **options: Any) -> Path:
    """The entry that a record of a model makes."""
    manifest = tmp_path / f"{name}-manifest.json"
    record(model, output=manifest)
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(entry_from_manifest(manifest, load_releases(), name=name, **options)))
    return path


def test_another_base_is_known_by_its_norms_before_the_run(tmp_path: Path, base: Path, delta: Path) -> None:
    """A model that was tuned already, given instead of the base that a known delta was made against."""
    tuned = save(tmp_path / "tuned", llama(7), container="safetensors")
    registry = [registered(tmp_path, tuned, "tuned"), registered(tmp_path, base, "mine", equals="llama-7b")]
    known = in_cache(tmp_path, "ICTNLP/bayling-7b-diff", delta)
    plan_apply(base, known, tmp_path / "out", registry=registry)
    with pytest.raises(MismatchError) as caught:
        plan_apply(tuned, known, tmp_path / "out", registry=registry)
    (problem,) = caught.value.problems
    assert problem.kind == "wrong_base"
    assert "tuned, as recorded in a manifest (by the digests of" in problem.message
    assert "was made against LLaMA" in problem.message
    plan_apply(tuned, known, tmp_path / "out", registry=registry, allow=["wrong_base"])


def small_entry(place: Path, name: str, digests: Json, **changes: Any) -> Path:
    """An entry of which nothing is on record but small tensors."""
    weights = {"dtype": "F16", "tensors": 1, "parameters": 1, "tensor_bytes": 2, "source": ["me"]}
    document = {
        "schema": "bayling-delta/release/1",
        "name": name,
        "title": f"the {name}",
        "kind": "full",
        "source": ["me"],
        "sources": {"me": "measured by me"},
        "weights": {**weights, "small_tensors": digests},
        **changes,
    }
    path = place / f"{name}.json"
    path.write_text(json.dumps(document))
    return path


def small_digests(state: StateDict) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in state.items() if "norm" in name
    }


SHARED = ["model.norm.weight", "model.layers.0.input_layernorm.weight"]
NORMS = small_digests(llama(1))
TWO = {name: NORMS[name] for name in SHARED}
ONE = {SHARED[0]: NORMS[SHARED[0]]}
ELSE = {f"model.layers.{number}.input_layernorm.weight": "0" * 64 for number in range(5, 9)}


@pytest.mark.parametrize(
    ("entries", "known", "by"),
    [
        ({"a": TWO, "b": NORMS}, "b", "the digests of 5 small tensors"),
        ({"a": NORMS, "b": TWO}, "a", "the digests of 5 small tensors"),
        ({"a": ONE}, "a", "the digest of 1 small tensor"),
        ({"a": ONE | ELSE}, None, None),
        ({"a": TWO | ELSE}, "a", "the digests of 2 small tensors"),
        ({"a": NORMS | {SHARED[0]: "0" * 64}}, None, None),
        ({"a": TWO, "b": TWO}, None, None),
        ({"a": TWO, "b": TWO, "c": NORMS}, "c", "the digests of 5 small tensors"),
    ],
)
def test_a_release_is_known_by_most_of_its_small_tensors(
    tmp_path: Path, base: Path, entries: Json, known: str | None, by: str | None
) -> None:
    registry = [small_entry(tmp_path, name, digests) for name, digests in entries.items()]
    found = inspect_checkpoint(base, registry=registry)["release"]
    assert (found["name"], found["by"]) == (known, by)


def test_two_entries_of_the_same_weights_are_one(tmp_path: Path, base: Path) -> None:
    registry = [small_entry(tmp_path, name, TWO, equals="llama-7b") for name in ("a", "b")]
    assert inspect_checkpoint(base, registry=registry)["release"]["name"] == "a"


def test_a_full_model_for_a_base_is_asked_about_where_no_base_is_known(tmp_path: Path, base: Path, delta: Path) -> None:
    registry = [registered(tmp_path, base, "tuned")]
    assert any(
        "is a full model, not a known base" in note
        for note in plan_apply(base, delta, tmp_path / "out", registry=registry).notes
    )
    mine = [entry(tmp_path, "my-base", base)]
    assert not any("full model" in note for note in plan_apply(base, delta, tmp_path / "out", registry=mine).notes)


def rounded(state: StateDict) -> StateDict:
    return {name: tensor.bfloat16().to(tensor.dtype) for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("state", "config", "kind"),
    [
        (llama(1, dtype=torch.bfloat16), CONFIG, "bfloat16"),
        (rounded(llama(1)), CONFIG, "bfloat16"),
        (llama(1), {**CONFIG, "vocab_size": 32000, "max_position_embeddings": 4096}, "wrong_base"),
    ],
    ids=["stored as bfloat16", "bfloat16 once", "Llama-2"],
)
def test_signs_of_another_base_are_refused_where_the_delta_is_known(
    tmp_path: Path, delta: Path, state: StateDict, config: Json, kind: str
) -> None:
    base = save(tmp_path / "other", state, config=config)
    known = in_cache(tmp_path, "ICTNLP/bayling-7b-diff", delta)
    with pytest.raises(MismatchError) as caught:
        plan_apply(base, known, tmp_path / "out")
    assert {problem.kind for problem in caught.value.problems} == {kind}
    assert "BayLing 7B v1.0, the delta" in str(caught.value)
    plan_apply(base, known, tmp_path / "out", allow=[kind])
    assert plan_apply(base, delta, tmp_path / "out").notes  # of another delta it is a note


# verify --against a release


def test_a_model_is_verified_against_a_release(tmp_path: Path, base: Path) -> None:
    registry = [entry(tmp_path, "my-base", base), registered(tmp_path, base, "recorded")]
    for name in ("my-base", "recorded"):
        document = verify(base, against=name, registry=registry)
        assert document["compared"][0]["against"].startswith("the registry's record of ")
    other = save(tmp_path / "other", llama(5), shards=2)
    for name in ("my-base", "recorded"):
        with pytest.raises(IntegrityError, match=r"the registry's record of .* says"):
            verify(other, against=name, registry=registry)


def test_files_of_two_forms_of_a_release_are_no_model(tmp_path: Path, base: Path) -> None:
    """Each is on record, and they were never published together."""
    other = save(tmp_path / "other", llama(5), shards=2)
    forms = [json.loads(entry(tmp_path, "x", files).read_text())["forms"][0] for files in (base, other)]
    registry = [entry(tmp_path, "mine", base, forms=[{**form, "title": str(n)} for n, form in enumerate(forms)])]
    for whole in (base, other):
        assert verify(whole, against="mine", registry=registry)["ok"]
    second = "pytorch_model-00002-of-00002.bin"
    shutil.copy(other / second, base / second)
    with pytest.raises(IntegrityError, match="has files of different forms of the model"):
        verify(base, against="mine", registry=registry)


def test_a_release_of_which_too_little_is_on_record_verifies_nothing(tmp_path: Path, base: Path) -> None:
    with pytest.raises(NoRecordError, match=r"a digest of pytorch_model-00002-of-00002\.bin of BayLing"):
        verify(base, against="bayling-7b-diff")
    single = save(tmp_path / "single", llama(1), container="safetensors")
    with pytest.raises(NoRecordError, match=r"nobody has recorded a digest of model\.safetensors"):
        verify(single, against="vicuna-7b-v1.1")


def test_a_release_that_is_misspelled_is_asked_about(base: Path) -> None:
    with pytest.raises(Exception, match=r"nor a release; did you mean the release bayling-7b-diff"):
        verify(base, against="bayling-7b-dif")


def test_what_came_with_the_weights_is_no_record_of_them(tmp_path: Path) -> None:
    """Metadata of a download, and a directory named like the Hub's cache, can be made by anybody."""
    digests: list[str] = []
    for side, seed in (("base", 1), ("delta", 2)):
        place = tmp_path / "models--lab--model" / "snapshots" / "0123456789abcdef0123456789abcdef01234567" / side
        save(place, llama(seed, 1 if seed == 1 else 0.01), container="safetensors")
        digests.append(hashlib.sha256((place / "model.safetensors").read_bytes()).hexdigest())
        write_download_metadata(local_dir=place, filename="model.safetensors", commit_hash="0" * 40, etag=digests[-1])
    pair = (place.with_name("base"), place)
    manifest = apply(*pair, tmp_path / "out")
    assert [entry["outcome"] for entry in manifest["verification"]] == [
        "no record",
        "match",
        "match",
    ]  # it finds damage
    with pytest.raises(NoRecordError, match="is on no record"):
        apply(*pair, tmp_path / "other", require_recorded=True)
