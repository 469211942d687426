"""Meta's own folders against their conversion by transformers' script, and against Meta's arithmetic."""

import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bayling_delta import apply, plan_apply
from bayling_delta.checkpoint import open_checkpoint
from bayling_delta.describing import plan_document
from bayling_delta.errors import BaylingDeltaError, CheckpointError, IntegrityError, MismatchError, Problem, UsageError
from bayling_delta.gathering import read_elements
from bayling_delta.inspecting import inspect_checkpoint
from bayling_delta.meta_format import read_params
from bayling_delta.reads import Gather, Span, read_in_order_of, read_whole
from bayling_delta.recording import record
from bayling_delta.sources import open_source
from bayling_delta.tensors import TensorRef
from bayling_delta.verifying import verify
from tests.meta import GROUPED, PLAIN, Size, converted, cut, logits, random_model, save_meta
from tests.pairs import StateDict, bits, save
from tests.strategies import row_major_bytes
from tests.test_schemas import check

BOTH = ["consolidated.00.pth", "consolidated.01.pth"]
PARTS = pytest.mark.parametrize("parts", [1, 2, 4, 8])
SIZES = pytest.mark.parametrize("size", [PLAIN, GROUPED], ids=["plain", "grouped"])
SHARED = pytest.mark.parametrize("shared", [False, True], ids=["own storages", "shared storages"])


def weights_of(directory: Path) -> str:
    return str(record(directory)["result"]["weights_digest"])


def delta_of(place: Path, size: Size = PLAIN, *, container: str = "torch") -> Path:
    """A delta in the order in which the publisher's script saved it: that of a model, not that of Meta's files."""
    whole = converted(random_model(size, seed=9, scale=0.001), size)
    first = [name for name in whole if name not in ("model.norm.weight", "lm_head.weight")]
    state = {name: whole[name] for name in (*first, "model.norm.weight", "lm_head.weight")}
    norms = {name: tensor - 1 for name, tensor in state.items() if tensor.ndim == 1}
    return save(place, {**state, **norms}, config=size.config, container=container)


# the same model


@SIZES
@PARTS
@SHARED
def test_the_digest_is_that_of_the_conversion(tmp_path: Path, size: Size, parts: int, shared: bool) -> None:
    state = random_model(size)
    folder = save_meta(tmp_path / "meta", state, size, parts, shared=shared)
    other = save(tmp_path / "hf", converted(state, size), config=size.config, container="safetensors")
    assert weights_of(folder) == weights_of(other)


@PARTS
@SHARED
def test_the_result_is_that_of_the_converted_base(tmp_path: Path, parts: int, shared: bool) -> None:
    """The same bytes, and the base's own digest; direct or through the page cache, with few or many buffers."""
    state = random_model(GROUPED)
    folder = save_meta(tmp_path / "meta", state, GROUPED, parts, shared=shared)
    other = save(tmp_path / "hf", converted(state, GROUPED), config=GROUPED.config)
    delta = delta_of(tmp_path / "delta", GROUPED)
    expected = apply(other, delta, tmp_path / "expected")
    for number, options in enumerate(({}, {"direct": False, "threads": 1}, {"memory_limit": 400 << 10})):
        manifest = apply(folder, delta, tmp_path / f"out{number}", **options)  # type: ignore[arg-type]
        assert manifest["result"] | {"files": []} == expected["result"] | {"files": []}
        assert manifest["inputs"]["base"]["container"] == "meta"
        assert manifest["inputs"]["base"]["weights_digest"] == weights_of(other)
        for file in (tmp_path / "expected").glob("*.safetensors"):
            assert (tmp_path / f"out{number}" / file.name).read_bytes() == file.read_bytes()


def elements(ref: TensorRef) -> torch.Tensor:
    with ExitStack() as stack:
        sources = {view.file: stack.enter_context(open_source(view.file)) for view in ref.views}
        values = read_elements(sources, ref, 0, ref.elements)
    dtype = {"F16": torch.float16, "F32": torch.float32}[ref.dtype]
    return torch.from_numpy(values.copy()).view(dtype).reshape(ref.shape)


@SIZES
@pytest.mark.parametrize("parts", [1, 4])
def test_it_computes_what_metas_own_code_computes(tmp_path: Path, size: Size, parts: int) -> None:
    """The rows of q and k are where transformers' rotation wants them: the logits agree, of a model never converted."""
    from transformers import LlamaConfig, LlamaForCausalLM

    state = random_model(size, dtype=torch.float32, scale=0.2)
    folder = save_meta(tmp_path / "meta", state, size, parts)
    words = torch.arange(0, 60, 5)
    expected = logits(state, size, words)
    model = LlamaForCausalLM(LlamaConfig(**size.config | {"torch_dtype": "float32"}))
    model.load_state_dict({name: elements(ref) for name, ref in open_checkpoint(folder).tensors.items()})
    with torch.no_grad():
        found = model(words[None]).logits[0]
    assert expected.std() > 0.5
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("parts", [2, 8])
def test_an_embedding_cut_by_words(tmp_path: Path, parts: int) -> None:
    """As Llama-3's is."""
    state = random_model(GROUPED)
    folder = save_meta(tmp_path / "meta", state, GROUPED, parts, columns=("attention.wo", "feed_forward.w2"))
    assert weights_of(folder) == weights_of(save(tmp_path / "hf", converted(state, GROUPED)))


def test_the_parts_may_be_views_of_the_whole_model(tmp_path: Path) -> None:
    """Pieces of columns that lie in rows of the whole, and transposed matrices."""
    state = random_model(PLAIN)
    folder = tmp_path / "meta"
    save_meta(folder, state, PLAIN, 2)
    for number in range(2):
        part = cut(state, 2)[number]
        part["layers.0.attention.wo.weight"] = state["layers.0.attention.wo.weight"].chunk(2, 1)[number]
        part["layers.0.attention.wq.weight"] = part["layers.0.attention.wq.weight"].t().contiguous().t()
        part["layers.1.feed_forward.w2.weight"] = part["layers.1.feed_forward.w2.weight"].t().contiguous().t()
        torch.save(part, folder / f"consolidated.{number:02}.pth")
    other = save(tmp_path / "hf", converted(state, PLAIN), config=PLAIN.config)
    assert weights_of(folder) == weights_of(other)
    delta = delta_of(tmp_path / "delta")
    apply(folder, delta, tmp_path / "one")
    apply(other, delta, tmp_path / "two")
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_the_sum_of_a_base_in_metas_format_is_verified(tmp_path: Path) -> None:
    folder = save_meta(tmp_path / "meta", random_model(PLAIN), PLAIN, 2, shared=True)
    delta = delta_of(tmp_path / "delta")
    apply(folder, delta, tmp_path / "out")
    assert verify(tmp_path / "out", base=folder, delta=delta)["ok"]


def test_the_first_part_alone_stands_for_its_folder(tmp_path: Path) -> None:
    state = random_model(PLAIN)
    one = save_meta(tmp_path / "one", state, PLAIN, 1)
    assert weights_of(one / "consolidated.00.pth") == weights_of(one)
    two = save_meta(tmp_path / "two", state, PLAIN, 2)
    (found,) = problems(two / "consolidated.01.pth")
    assert (found.kind, "is one of 2 parts; name the folder" in found.message) == ("incomplete", True)
    (found,) = problems(two / "params.json")
    assert f"name the folder that has them, {two}" in found.message


def test_weights_in_huggingfaces_format_are_taken_where_both_are(tmp_path: Path) -> None:
    folder = save_meta(tmp_path / "meta", random_model(PLAIN), PLAIN, 2)
    other = save(tmp_path / "hf", converted(random_model(PLAIN, seed=5), PLAIN))
    (other / "pytorch_model.bin").rename(folder / "pytorch_model.bin")
    assert open_checkpoint(folder).container == "torch"


# what is read


def test_nothing_is_read_twice_for_a_checksum(tmp_path: Path) -> None:
    """The CRC-32 of a storage that many tensors share is put together from what the sum needs of it, in its order."""
    folder = save_meta(tmp_path / "meta", random_model(PLAIN), PLAIN, 2, shared=True)
    plan = plan_apply(folder, delta_of(tmp_path / "delta"), tmp_path / "out")
    assert any(isinstance(step, Gather) and step.records for step in plan.base_reads.steps)
    stored = sum(file.size for file in plan.base.files)
    assert plan.base_reads.nbytes <= stored
    read = sorted((step.file, step.start, step.stop) for step in plan.base_reads.steps if isinstance(step, Span))
    assert all(one[0] != other[0] or one[2] <= other[1] for one, other in pairwise(read))


def flip_a_bit(path: Path, name: str) -> None:
    """Damage the last tensor that has this in its name."""
    state = torch.load(path, weights_only=True)
    (*_, tensor) = (tensor for key, tensor in state.items() if name in key)
    data, elements = bytearray(path.read_bytes()), row_major_bytes(tensor)
    data[data.index(elements) + len(elements) - 1] ^= 1
    path.write_bytes(data)


@SHARED
@pytest.mark.parametrize("name", ["attention.wq", "attention.wv", "attention.wo", "ffn_norm", "tok_embeddings", "rope"])
def test_damage_is_found_wherever_it_is(tmp_path: Path, shared: bool, name: str) -> None:
    """Also in what the sum does not need of a storage that it needs: a norm's second copy, the rotary table."""
    folder = save_meta(tmp_path / "meta", random_model(PLAIN), PLAIN, 2, shared=shared)
    delta = delta_of(tmp_path / "delta")
    flip_a_bit(folder / BOTH[1], name)
    runs: list[Callable[[], Any]] = [lambda: record(folder)]
    if shared or name not in ("ffn_norm", "rope"):
        runs.append(lambda: apply(folder, delta, tmp_path / "out", allow=["copies"]))
    for run in runs:
        with pytest.raises(BaylingDeltaError) as caught:
            run()
        assert [found.where for found in caught.value.problems if found.kind == "crc"] == [str(folder / BOTH[1])]


def test_a_tile_takes_a_whole_head(tmp_path: Path) -> None:
    """Below that the run is refused, and the limit that is named works."""
    size = Size(dim=512, layers=1, heads=2, kv_heads=2, inner=32, words=32)  # heads of 256 KiB
    folder = save_meta(tmp_path / "meta", random_model(size), size, 1)
    delta = delta_of(tmp_path / "delta", size)
    with pytest.raises(UsageError) as caught:
        apply(folder, delta, tmp_path / "out", memory_limit=256 << 10)
    least = int(str(caught.value).rsplit(" ", 1)[1].removesuffix("KiB")) << 10
    assert apply(folder, delta, tmp_path / "out", memory_limit=least)["ok"]


# lists beside the files


def write_checklist(folder: Path, names: list[str]) -> Path:
    path = folder / "checklist.chk"
    path.write_text("".join(f"{hashlib.md5((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names))
    return path


def write_sums(folder: Path, names: list[str]) -> Path:
    path = folder / "SHA256SUMS"
    path.write_text("".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names))
    return path


@pytest.mark.parametrize("write", [write_checklist, write_sums])
def test_a_list_beside_the_base_is_an_expectation(tmp_path: Path, write: Callable[[Path, list[str]], Path]) -> None:
    folder = save_meta(tmp_path / "meta", random_model(PLAIN), PLAIN, 2)
    delta = delta_of(tmp_path / "delta")
    path = write(folder, [*BOTH, "params.json"])
    document = plan_document(plan_apply(folder, delta, tmp_path / "out"))
    assert document["digested"]["base"] == "file and tensor"
    assert "consolidated.00.pth, consolidated.01.pth are read once more" in document["notes"][0]
    manifest = apply(folder, delta, tmp_path / "out")
    entry = {"what": "2 weight files of the base", "outcome": "match", "source": f"{path.name} beside the base"}
    assert {**entry, "against": path.name} in manifest["verification"]
    sha256 = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in BOTH]
    assert [file["sha256"] for file in manifest["inputs"]["base"]["files"]] == sha256
    assert manifest["inputs"]["base"]["weights_digest"] == weights_of(folder)
    assert verify(folder)["ok"]


@pytest.mark.parametrize("write", [write_checklist, write_sums])
def test_a_base_that_is_not_what_a_list_says(tmp_path: Path, write: Callable[[Path, list[str]], Path]) -> None:
    folder = save_meta(tmp_path / "meta", random_model(PLAIN), PLAIN, 2)
    write(folder, BOTH)
    save_meta(tmp_path / "other", random_model(PLAIN, seed=1), PLAIN, 2)
    for name in BOTH:
        (tmp_path / "other" / name).rename(folder / name)
    runs: tuple[Callable[[], Any], ...] = (
        lambda: apply(folder, delta_of(tmp_path / "delta"), tmp_path / "out"),
        lambda: verify(folder),
    )
    for run in runs:
        with pytest.raises(IntegrityError) as caught:
            run()
        assert {(found.kind, found.where) for found in caught.value.problems} >= {
            ("digest", str(folder / name)) for name in BOTH
        }
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("write", [write_checklist, write_sums])
def test_files_that_are_met_in_order_are_read_once(tmp_path: Path, write: Callable[[Path, list[str]], Path]) -> None:
    """Any container's files can have a list beside them."""
    state = converted(random_model(PLAIN), PLAIN)
    base = save(tmp_path / "hf", {name: state[name] for name in converted(random_model(PLAIN), PLAIN)})
    delta = save(tmp_path / "delta", {name: tensor * 0.01 for name, tensor in state.items()}, config=PLAIN.config)
    for side in (base, delta):
        write(side, ["pytorch_model.bin"])
    plan = plan_apply(base, delta, tmp_path / "out", allow=["looks_like_model"])
    assert plan_document(plan)["digested"]["base"] == "file"
    manifest = apply(base, delta, tmp_path / "out", allow=["looks_like_model"])
    what = [entry["what"] for entry in manifest["verification"]]
    assert {"1 weight file of the base", "1 weight file of the delta"} <= set(what)


@pytest.mark.parametrize("write", [write_checklist, write_sums])
def test_a_list_may_have_been_saved_on_windows(tmp_path: Path, write: Callable[[Path, list[str]], Path]) -> None:
    folder = save_meta(tmp_path / "meta", random_model(PLAIN), PLAIN, 2)
    path = write(folder, BOTH)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert verify(folder)["ok"]
    flip_a_bit(folder / BOTH[1], "attention.wo")
    with pytest.raises(IntegrityError):
        verify(folder)


def test_a_list_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    folder = save_meta(tmp_path / "meta", random_model(PLAIN), PLAIN, 2)
    (folder / "checklist.chk").write_text("6efc8dab194ab59e49cd24be5574d85e  ../consolidated.00.pth\n")
    with pytest.raises(CheckpointError) as caught:
        plan_apply(folder, delta_of(tmp_path / "delta"), tmp_path / "out")
    (found,) = caught.value.problems
    assert (found.kind, found.where) == ("record", str(folder / "checklist.chk"))
    assert found.message.startswith("line 1 is not 'DIGEST  NAME' of a file here; mend it, or move it away")


# what can be wrong


def problems(path: Path) -> list[Problem]:
    with pytest.raises((CheckpointError, IntegrityError)) as caught:
        open_checkpoint(path)
    return list(caught.value.problems)


class Story(NamedTuple):
    """Something done to a folder of two parts, and what is said of it."""

    done: Callable[[Path], Any]
    kind: str
    where: str
    says: str


def without(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).rename(folder / "elsewhere")


def with_params(**changes: Any) -> Callable[[Path], Any]:
    return lambda folder: (folder / "params.json").write_text(json.dumps({**PLAIN.params, **changes}))


def with_part(change: Callable[[StateDict], Any], number: int = 1) -> Callable[[Path], Any]:
    def done(folder: Path) -> None:
        path = folder / f"consolidated.{number:02}.pth"
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return done


def with_all(change: Callable[[StateDict], Any]) -> Callable[[Path], Any]:
    return lambda folder: [with_part(change, number)(folder) for number in range(2)]


W3, Q, NORM = "layers.1.feed_forward.w3.weight", "layers.0.attention.wq.weight", "layers.0.ffn_norm.weight"
STORIES = {
    "no params.json": Story(without("params.json"), "incomplete", "params.json", "how many heads"),
    "the last part is absent": Story(without(BOTH[1]), "incomplete", BOTH[1], "the model has 2 parts"),
    "the first part is absent": Story(without(BOTH[0]), "incomplete", BOTH[0], "the model has 2 parts"),
    "a part too many": Story(
        lambda folder: (folder / "consolidated.02.pth").write_bytes((folder / BOTH[1]).read_bytes()),
        "damaged", "", "has parts up to consolidated.02.pth; by its shapes the model has 2",
    ),
    "params of another model": Story(with_params(dim=128, n_heads=32), "damaged", "", "it should be [160, 128]"),
    "params with more layers": Story(with_params(n_layers=3), "incomplete", "", "params.json says n_layers 3"),
    "params with a billion layers": Story(with_params(n_layers=10**9), "incomplete", "", "says n_layers 1,000,000,000"),
    "heads that do not divide": Story(with_params(n_heads=7), "damaged", "params.json", "do not divide each other"),
    "heads of one row": Story(with_params(n_heads=64), "damaged", "params.json", "do not divide each other"),
    "groups that do not divide": Story(with_params(n_kv_heads=3), "damaged", "params.json", "do not divide each other"),
    "no heads": Story(with_params(n_heads=0), "damaged", "params.json", "says n_heads 0"),
    "negative size": Story(with_params(dim=-64), "damaged", "params.json", "says dim -64"),
    "size as text": Story(with_params(dim="64"), "damaged", "params.json", "says dim 64, which is no number"),
    "size that is true": Story(with_params(n_layers=True), "damaged", "params.json", "says n_layers True"),
    "params that are a list": Story(
        lambda folder: (folder / "params.json").write_text("[]"), "damaged", "params.json", "is not a JSON object"
    ),
    "params that are no JSON": Story(
        lambda folder: (folder / "params.json").write_text("{"), "damaged", "params.json", "is not JSON"
    ),
    "a tensor is absent": Story(with_all(lambda state: state.pop(W3)), "incomplete", BOTH[0], f"lacks {W3}"),
    "a tensor is absent in one": Story(with_part(lambda state: state.pop(W3)), "incomplete", BOTH[1], f"lacks {W3}"),
    "no head": Story(with_all(lambda state: state.pop("output.weight")), "incomplete", BOTH[1], "lacks output.weight"),
    "a strange tensor": Story(
        with_part(lambda state: state.update({"layers.0.experts.w1": torch.zeros(2)})),
        "unsupported", "", "has 'layers.0.experts.w1', which no LLaMA of Meta's has",
    ),
    "a norm in the wrong place": Story(
        with_part(lambda state: state.update({"layers.0.norm.weight": torch.zeros(2)})), "unsupported", "", "no LLaMA"
    ),
    "names in HuggingFace's format": Story(
        with_all(lambda state: state.update({"model.norm.weight": torch.zeros(2)})), "unsupported", "", "no LLaMA"
    ),
    "another dtype in one part": Story(
        with_part(lambda state: state.update({NORM: state[NORM].float()})), "damaged", "", "is not alike in all parts"
    ),
    "another shape in one part": Story(
        with_part(lambda state: state.update({W3: state[W3][:-1]})), "damaged", "", f"{W3} is not alike in all parts"
    ),
    "another shape in all": Story(
        with_all(lambda state: state.update({W3: state[W3][:-1]})), "damaged", "", "it should be [96, 64]"
    ),
    "a vector for a matrix": Story(
        with_all(lambda state: state.update({W3: state[W3].flatten()})), "damaged", "", "it should have 2 dimensions"
    ),
    "a matrix for a vector": Story(
        with_all(lambda state: state.update({NORM: state[NORM][None]})), "damaged", "", "it should have 1 dimensions"
    ),
    "half a head in a part": Story(
        lambda folder: save_parts_of_half_heads(folder), "damaged", "", "no whole heads of 64 rows"
    ),
    "a git-lfs pointer": Story(
        lambda folder: (folder / BOTH[1]).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "not_weights", BOTH[1], "git-lfs pointer",
    ),
    "a truncated part": Story(
        lambda folder: (folder / BOTH[1]).write_bytes((folder / BOTH[1]).read_bytes()[:-100]),
        "incomplete", BOTH[1], "cut short",
    ),
    "a safetensors file": Story(
        lambda folder: (folder / BOTH[1]).write_bytes(b"\x02" + b"\0" * 7 + b"{}"),
        "unsupported", BOTH[1], "is a safetensors file",
    ),
}  # fmt: skip


def save_parts_of_half_heads(folder: Path) -> None:
    size = Size(heads=1, kv_heads=1)
    for number, part in enumerate(cut(random_model(size), 2)):
        torch.save(part, folder / f"consolidated.{number:02}.pth")
    (folder / "params.json").write_text(json.dumps(size.params))


@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES.keys())
def test_a_folder_that_is_not_as_it_should_be(tmp_path: Path, story: Story) -> None:
    folder = save_meta(tmp_path / "meta", random_model(PLAIN), PLAIN, 2)
    story.done(folder)
    found = problems(folder)
    where = str(folder / story.where) if story.where else str(folder)
    assert any((p.kind, p.where) == (story.kind, where) and story.says in p.message for p in found), found
    with pytest.raises(BaylingDeltaError) as caught:
        inspect_checkpoint(folder)
    assert list(caught.value.problems) == found


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    folder = save_meta(tmp_path / "meta", random_model(PLAIN), PLAIN, 2)
    with_part(lambda state: [state.pop(name) for name in (W3, Q, NORM)])(folder)
    with_part(lambda state: state.update({"extra": torch.zeros(1)}), 0)(folder)
    assert sorted(found.kind for found in problems(folder)) == ["incomplete"] * 3 + ["unsupported"]


def test_parts_of_two_models(tmp_path: Path) -> None:
    """Shapes agree, and every part's norms tell."""
    folder = save_meta(tmp_path / "meta", random_model(PLAIN), PLAIN, 2)
    other = save_meta(tmp_path / "other", random_model(PLAIN, seed=1), PLAIN, 2)
    (other / BOTH[1]).rename(folder / BOTH[1])
    delta = delta_of(tmp_path / "delta")
    with pytest.raises(MismatchError) as caught:
        apply(folder, delta, tmp_path / "out")
    (found,) = caught.value.problems
    assert (found.kind, found.where, found.allow) == ("copies", str(folder / BOTH[1]), True)
    assert "has other values than consolidated.00.pth in 5 of the tensors" in found.message
    with pytest.raises(MismatchError):
        record(folder)
    assert [odd["kind"] for odd in inspect_checkpoint(folder)["odd"]] == ["copies"]
    assert apply(folder, delta, tmp_path / "out", allow=["copies"])["options"]["allow"] == ["copies"]


@pytest.mark.parametrize("shared", [False, True])
def test_a_part_that_is_there_twice(tmp_path: Path, shared: bool) -> None:
    """Shapes and norms agree, as in parts of one model."""
    folder = save_meta(tmp_path / "meta", random_model(PLAIN), PLAIN, 4, shared=shared)
    (folder / "consolidated.03.pth").write_bytes((folder / "consolidated.01.pth").read_bytes())
    delta = delta_of(tmp_path / "delta")
    with pytest.raises(MismatchError) as caught:
        apply(folder, delta, tmp_path / "out")
    (found,) = caught.value.problems
    assert (found.kind, found.where, found.allow) == ("copies", str(folder / "consolidated.03.pth"), True)
    assert "has the same weights as consolidated.01.pth" in found.message
    assert [odd["kind"] for odd in inspect_checkpoint(folder)["odd"]] == ["copies"]
    assert plan_apply(folder, delta, tmp_path / "out", allow=["copies"])


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"n_heads": 8}, ["num_attention_heads 8, and the delta's config.json says 16", "num_key_value_heads 8, and"]),
        ({"n_heads": 32}, ["num_attention_heads 32, and the delta's config.json says 16", "num_key_value_heads 32"]),
    ],
)
def test_heads_that_are_not_those_of_the_delta(tmp_path: Path, params: dict[str, int], said: list[str]) -> None:
    """Every shape agrees, and the rows of q and k would be put into another order."""
    folder = save_meta(tmp_path / "meta", random_model(PLAIN), PLAIN, 2)
    with_params(**params)(folder)
    delta = delta_of(tmp_path / "delta")
    with pytest.raises(MismatchError) as caught:
        plan_apply(folder, delta, tmp_path / "out", allow=["architecture"])
    assert [(found.kind, found.where) for found in caught.value.problems] == [
        ("heads", str(folder / "params.json"))
    ] * 2
    for found, words in zip(caught.value.problems, said, strict=True):
        assert words in found.message
        assert not found.allow


@pytest.mark.parametrize("config", [None, {}])
def test_heads_that_no_config_confirms_are_noted(tmp_path: Path, config: dict[str, Any] | None) -> None:
    folder = save_meta(tmp_path / "meta", random_model(PLAIN), PLAIN, 2)
    whole = {name: tensor * 0.001 for name, tensor in converted(random_model(PLAIN, seed=9), PLAIN).items()}
    delta = save(tmp_path / "delta", whole, config=config)
    plan = plan_apply(folder, delta, tmp_path / "out")
    assert any("n_heads orders the rows of q and k" in note for note in plan.notes)


@given(
    st.dictionaries(
        st.sampled_from([*PLAIN.params, "n_kv_heads", "moe"]),
        st.one_of(
            st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([1]), st.integers(1, 64)
        ),
    )
)
def test_params_are_read_or_refused(table: dict[str, Any]) -> None:
    params, found = read_params(Path("params.json"), {**PLAIN.params, **table})
    assert (params is None) == bool(found)
    if params is not None:
        assert params.head_dim % 2 == 0
        assert params.config["hidden_size"] == params.head_dim * params.heads


# inspect


def test_it_is_described_as_its_conversion_is(tmp_path: Path) -> None:
    """But for what names the files, and what no params.json says."""
    state = random_model(GROUPED)
    folder = save_meta(tmp_path / "meta" / "7B", state, GROUPED, 2, shared=True)
    write_checklist(folder, BOTH)
    (tmp_path / "meta" / "tokenizer.model").write_bytes(b"\x0a\x02xx" * 160)
    other = save(tmp_path / "hf", converted(state, GROUPED), config=GROUPED.config)
    (other / "tokenizer.model").write_bytes(b"\x0a\x02xx" * 160)
    found, expected = inspect_checkpoint(folder), inspect_checkpoint(other)
    for key in ("looks_like", "reasons", "signs", "parameters", "kinds", "tied_embeddings", "dtypes", "odd"):
        assert found[key] == expected[key], key
    assert found["container"] == "meta"
    assert [file["tensors"] for file in found["files"]] == [21, 16]  # five norms are the first part's
    assert found["tokenizer"] == {"files": ["../tokenizer.model"], "class": None, "vocabulary": 160}
    assert found["architecture"]["source"] == "params.json"
    assert found["architecture"]["shapes"] == expected["architecture"]["shapes"]
    assert found["architecture"]["config"] | {"vocab_size": 160} == expected["architecture"]["config"]
    assert found["odd"] == []


def test_a_vocabulary_that_is_not_that_of_the_params(tmp_path: Path) -> None:
    folder = save_meta(tmp_path / "meta", random_model(PLAIN), PLAIN, 1)
    with_params(vocab_size=128)(folder)
    (odd,) = inspect_checkpoint(folder)["odd"]
    assert odd["message"] == "has 160 rows; params.json says vocab_size 128"


def test_documents_keep_to_their_schemas(tmp_path: Path) -> None:
    folder = save_meta(tmp_path / "meta", random_model(PLAIN), PLAIN, 2)
    write_checklist(folder, BOTH)
    delta = delta_of(tmp_path / "delta")
    check(inspect_checkpoint(folder), "inspect")
    check(plan_document(plan_apply(folder, delta, tmp_path / "out")), "plan")
    check(apply(folder, delta, tmp_path / "out"), "manifest")
    check(record(folder), "manifest")
    check(verify(folder), "verify")


def test_a_record_of_either_form_is_one_of_the_other(tmp_path: Path) -> None:
    state = random_model(PLAIN)
    folder = save_meta(tmp_path / "meta", state, PLAIN, 2)
    other = save(tmp_path / "hf", converted(state, PLAIN), config=PLAIN.config)
    for one, another in ((folder, other), (other, folder)):
        record(one, output=tmp_path / f"{one.name}.json")
        assert verify(another, against=str(tmp_path / f"{one.name}.json"))["ok"]


def test_the_recorded_files(tmp_path: Path) -> None:
    folder = save_meta(tmp_path / "meta", random_model(PLAIN), PLAIN, 2)
    result = record(folder)["result"]
    assert [file["name"] for file in result["files"]] == [*BOTH, "params.json"]
    for file in result["files"]:
        assert file["sha256"] == hashlib.sha256((folder / file["name"]).read_bytes()).hexdigest()
    assert result["tensors"]["model.layers.0.self_attn.o_proj.weight"]["file"] == BOTH[0]


# read lists


@given(st.permutations(range(21)), st.booleans(), st.sampled_from([1, 2, 4]))
def test_every_record_is_checked_whole(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], shared: bool, parts: int
) -> None:
    """In whatever order the tensors are wanted, what the steps give of a record is all of it, in one or in parts."""
    place = tmp_path_factory.getbasetemp() / f"records-{shared}-{parts}"
    if not place.exists():
        save_meta(place, random_model(PLAIN), PLAIN, parts, shared=shared)
    checkpoint = open_checkpoint(place)
    names = [list(checkpoint.tensors)[number] for number in order]
    needed = [(name, checkpoint.tensors[name]) for name in names]
    for reads in (read_in_order_of(checkpoint, needed), read_whole(checkpoint, checkpoint.tensors)):
        given_bytes: dict[tuple[Path, str], int] = {}
        sizes: dict[tuple[Path, str], int] = {}
        for step in reads.steps:
            views = [] if isinstance(step, Span) else step.ref.views
            runs = [(view.file, view.offset, view.offset + 2 * view.elements) for view in views]
            runs += [(step.file, step.start, step.stop)] if isinstance(step, Span) else []
            own = [(step.file, each) for each in step.records] if isinstance(step, Span) else step.records
            for (path, zipped), (file, start, stop) in product(own, runs):
                if file == path:
                    count = min(stop, zipped.offset + zipped.size) - max(start, zipped.offset)
                    already = given_bytes.get((path, zipped.name), 0) if count < zipped.size else 0
                    given_bytes[path, zipped.name] = already + max(0, count)
                    sizes[path, zipped.name] = zipped.size
        assert given_bytes == sizes


def test_the_oracles_agree() -> None:
    """Joining the parts again gives the whole; and rows 0, 1, 2, 3 of a head of four become 0, 2, 1, 3."""
    state = random_model(PLAIN)
    parts = cut(state, 4)
    assert torch.equal(torch.cat([part[Q] for part in parts]), state[Q])
    name = "layers.0.attention.wo.weight"
    assert torch.equal(torch.cat([part[name] for part in parts], 1), state[name])
    new = converted(state, PLAIN)["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(bits(new[:4]), bits(state[Q][[0, 2, 1, 3]]))
