"""The published rules, each written plainly with torch, against what the recipes give."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bayling_delta import apply, plan_apply, verify
from bayling_delta.errors import IntegrityError, MismatchError
from bayling_delta.recipes import RECIPES
from tests.pairs import CONFIG, StateDict, assert_same, llama, load, save

ROWS = ("model.embed_tokens.weight", "lm_head.weight")
PROJECTOR = {"model.mm_projector.weight": (64, 48), "model.mm_projector.bias": (64,)}
NEW = 3


def grown(dtype: torch.dtype = torch.float16, new: int = NEW, *, projector: bool = False) -> StateDict:
    """A delta with more rows than its base, with -0.0, the smallest numbers and the largest among them."""
    delta = llama(2, 0.01, dtype)
    random = torch.Generator().manual_seed(9)
    for name in ROWS:
        rows = (torch.randn(new, CONFIG["hidden_size"], generator=random) * 0.05).to(dtype)
        rows[0, :4] = torch.tensor([-0.0, 0.0, torch.finfo(dtype).smallest_normal, -6e-8])
        delta[name] = torch.cat([delta[name], rows])
    if projector:
        for name, shape in PROJECTOR.items():
            delta[name] = torch.randn(shape, generator=random).to(dtype)
        delta["model.mm_projector.bias"][0] = -0.0
    return delta


def vicuna_v0(base: StateDict, delta: StateDict) -> StateDict:
    """FastChat 0.1.10: the base's vocabulary is resized, its new rows are set to zero, and all is added."""
    total: StateDict = {}
    for name, tensor in delta.items():
        left = base[name].to(tensor.dtype)
        if name in ROWS:
            left = torch.cat([left, torch.zeros(len(tensor) - len(left), left.shape[1], dtype=left.dtype)])
        total[name] = tensor + left
    return total


def alpaca(base: StateDict, delta: StateDict) -> StateDict:
    """Alpaca: the base's new rows are the mean of its rows, in float32."""
    total: StateDict = {}
    for name, tensor in delta.items():
        left = base[name].float()
        if name in ROWS:
            mean = base[name].double().mean(dim=0, keepdim=True).float()
            left = torch.cat([left, mean.expand(len(tensor) - len(left), -1)])
        total[name] = tensor + left
    return total


def llava(base: StateDict, delta: StateDict) -> StateDict:
    """LLaVA: the base is added where it overlaps at the top left; what the base lacks stays as the delta has it."""
    total: StateDict = {}
    for name, tensor in delta.items():
        total[name] = tensor.clone()
        if name in base:
            left = base[name].to(tensor.dtype)
            total[name][tuple(slice(size) for size in left.shape)] += left
    return total


Rule = Callable[[StateDict, StateDict], StateDict]
CASES: dict[str, tuple[str, Rule, StateDict]] = {
    "Vicuna v0": ("vicuna-v0", vicuna_v0, grown(new=1)),
    "Vicuna v0 in bfloat16": ("vicuna-v0", vicuna_v0, grown(torch.bfloat16, 1)),
    "Alpaca": ("alpaca", alpaca, grown(torch.float32, 1)),
    "WizardLM, with more than one token": ("wizardlm", alpaca, grown(torch.float32)),
    "WizardLM 13B, with none": ("wizardlm", alpaca, llama(2, 0.01, torch.float32)),
    "LLaVA": ("llava", llava, grown(projector=True)),
    "LLaVA without a projector": ("llava", llava, grown()),
}


def without_rotary(state: StateDict) -> StateDict:
    return {name: tensor for name, tensor in state.items() if not name.endswith("inv_freq")}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("container", ["torch", "safetensors"])
def test_a_recipe_gives_what_the_published_rule_gives(tmp_path: Path, case: str, container: str) -> None:
    recipe, rule, delta = CASES[case]
    base = llama(1)
    save(tmp_path / "base", base, container=container, shards=2)
    save(tmp_path / "delta", delta, shards=3, config={**CONFIG, "vocab_size": len(delta[ROWS[0]])})
    manifest = apply(
        tmp_path / "base", tmp_path / "delta", tmp_path / "out", recipe=recipe, memory_limit=1 << 20, threads=2
    )
    assert manifest["recipe"] == recipe
    assert_same(load(tmp_path / "out"), without_rotary(rule(base, delta)))
    assert (
        verify(tmp_path / "out", base=tmp_path / "base", delta=tmp_path / "delta")["weights_digest"]
        == manifest["result"]["weights_digest"]
    )


def test_zeros_are_added_and_what_stands_alone_is_not_touched(tmp_path: Path) -> None:
    """-0.0 + 0.0 is 0.0 in the script of Vicuna v0; LLaVA's adds nothing, and leaves -0.0."""
    save(tmp_path / "base", llama(1))
    save(tmp_path / "delta", grown(), config={**CONFIG, "vocab_size": CONFIG["vocab_size"] + NEW})
    signs = {}
    for recipe in ("vicuna-v0", "llava"):
        apply(tmp_path / "base", tmp_path / "delta", tmp_path / recipe, recipe=recipe)
        signs[recipe] = bool(load(tmp_path / recipe)[ROWS[0]][CONFIG["vocab_size"], 0].signbit())
    assert signs == {"vicuna-v0": False, "llava": True}


@pytest.mark.parametrize("memory_limit", [1 << 19, 1 << 22, 64 << 20])
def test_the_mean_does_not_depend_on_memory_or_container(tmp_path: Path, memory_limit: int) -> None:
    base, delta = llama(1, dtype=torch.float32), grown(torch.float32)
    save(tmp_path / "base", base, container="safetensors", shards=2)
    save(tmp_path / "delta", delta, config={**CONFIG, "vocab_size": CONFIG["vocab_size"] + NEW})
    apply(tmp_path / "base", tmp_path / "delta", tmp_path / "out", recipe="alpaca", memory_limit=memory_limit)
    assert_same(load(tmp_path / "out"), without_rotary(alpaca(base, delta)))


# what is refused


def refusal(tmp_path: Path, base: StateDict, delta: StateDict, recipe: str | None, **options: Any) -> str:
    save(tmp_path / "base", base)
    save(tmp_path / "delta", delta, config={**CONFIG, "vocab_size": len(delta[ROWS[0]])})
    with pytest.raises(MismatchError) as caught:
        apply(tmp_path / "base", tmp_path / "delta", tmp_path / "out", recipe=recipe, **options)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("delta", "named"),
    [
        (grown(new=1), "fit together by vicuna-v0 or llava; "),
        (grown(torch.float32, 1), "fit together by vicuna-v0 or alpaca or wizardlm or llava; "),
        (grown(projector=True), "fit together by llava; "),
    ],
    ids=["one row in float16", "one row in float32", "a projector"],
)
def test_without_a_recipe_those_that_would_fit_are_named(tmp_path: Path, delta: StateDict, named: str) -> None:
    message = refusal(tmp_path, llama(1), delta, None)
    assert named in message
    assert "give it with --recipe" in message


def test_a_recipe_makes_up_for_nothing_else(tmp_path: Path) -> None:
    delta = grown(projector=True)
    delta["model.vision.weight"] = torch.zeros(4, 4, dtype=torch.float16)
    message = refusal(tmp_path, llama(1), delta, "llava")
    assert "lacks model.vision.weight" in message
    assert "fit together" not in message


def test_a_base_with_more_rows_than_the_delta_is_refused(tmp_path: Path) -> None:
    assert "F16 [163, 64] in the base, F16 [160, 64] in the delta" in refusal(
        tmp_path, grown(), llama(2, 0.01), "llava"
    )


def test_another_width_is_refused(tmp_path: Path) -> None:
    delta = llama(2, 0.01)
    delta[ROWS[0]] = torch.zeros(163, 65, dtype=torch.float16)
    assert "F16 [160, 64] in the base, F16 [163, 65]" in refusal(tmp_path, llama(1), delta, "vicuna-v0")


@pytest.mark.parametrize("shape", [(0, 64), (160, 0)], ids=["no rows", "no columns"])
@pytest.mark.parametrize("recipe", ["alpaca", "vicuna-v0"])
def test_a_base_whose_embedding_is_empty_is_refused(tmp_path: Path, shape: tuple[int, int], recipe: str) -> None:
    base, delta = llama(1, dtype=torch.float32), grown(torch.float32)
    base[ROWS[0]] = torch.zeros(shape)
    delta[ROWS[0]] = torch.zeros(163, shape[1])
    found = refusal(tmp_path, base, delta, recipe, allow=["architecture"])
    assert f"F32 [{shape[0]}, {shape[1]}] in the base, F32 [163, {shape[1]}] in the delta" in found


def test_an_embedding_that_is_one_number_has_no_rows(tmp_path: Path) -> None:
    """Whatever that is, it was not grown before."""
    for side, tensors in (("base", llama(1)), ("delta", llama(2, 0.01))):
        save(tmp_path / side, tensors | {ROWS[0]: torch.tensor(1.0).half()})
    assert plan_apply(tmp_path / "base", tmp_path / "delta", tmp_path / "out", recipe="vicuna-v0").notes is not None


def test_float32_is_asked_for_where_the_release_is_float32(tmp_path: Path) -> None:
    assert "is F16 in the delta; alpaca adds in F32" in refusal(tmp_path, llama(1), grown(), "alpaca")


def test_a_base_to_which_a_row_was_added_before_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, grown(), grown(), "vicuna-v0", allow=["looks_like_delta"])
    assert "163 rows on both sides, and vicuna-v0 adds rows to the base" in message


def test_a_result_is_verified_by_its_own_recipe(tmp_path: Path) -> None:
    save(tmp_path / "base", llama(1))
    save(tmp_path / "delta", grown(), config={**CONFIG, "vocab_size": CONFIG["vocab_size"] + NEW})
    apply(tmp_path / "base", tmp_path / "delta", tmp_path / "out", recipe="vicuna-v0")
    with pytest.raises(IntegrityError, match=r"model.embed_tokens.weight: 1 of 10,432 elements differ"):
        verify(tmp_path / "out", recipe="llava", base=tmp_path / "base", delta=tmp_path / "delta")


def test_every_recipe_is_tried_here() -> None:
    assert {recipe for recipe, _, _ in CASES.values()} == RECIPES.keys() - {"plain"}
