"""Which tensor of the base is added to which of the delta by a recipe, and everything that keeps them from it."""

from collections.abc import Iterator, Mapping
from typing import Final, Literal

from bayling_delta.checkpoint import EMBEDDING, HEAD, Checkpoint
from bayling_delta.errors import Problem
from bayling_delta.recipes import RECIPES, Recipe
from bayling_delta.tensors import FLOATS, TensorRef, natural_key

__all__ = ["StandIn", "pair_problems", "stand_in"]

StandIn = Literal["zero", "mean", "nothing"]
"""What is added where a delta's tensor has elements that the base lacks: zeros, the mean of the base's rows of that
tensor, or nothing at all, which leaves a delta's -0.0 what it is."""

_OF_ROWS: Final[dict[str, StandIn]] = {"none": "nothing", "zero": "zero", "mean": "mean", "overlap": "nothing"}
_GROWING: Final = (EMBEDDING, HEAD)


def stand_in(recipe: Recipe) -> StandIn:
    """What a recipe adds to the rows that the base lacks."""
    return _OF_ROWS[recipe.rows]


def pair_problems(base: Checkpoint, delta: Checkpoint, recipe: Recipe) -> list[Problem]:
    """Everything that keeps two checkpoints from being added by a recipe; with the recipes that would fit."""
    base_weights, delta_weights = base.weights, delta.weights
    problems = [*_problems(base, base_weights, delta, delta_weights, recipe), *_head_problems(base, delta)]
    kinds = {problem.kind for problem in problems}
    if kinds & {"dtype", "vocabulary"} or not kinds & {"shape", "missing_tensor"}:
        return problems
    rows = {name: ref.shape[0] for name, ref in delta_weights.items() if name in _GROWING and len(ref.shape) == 2}
    if len(set(rows.values())) > 1:  # shards of two releases, as in lm-sys/FastChat#510: no recipe makes up for that
        shown = " and ".join(f"{count:,} in {name}" for name, count in rows.items())
        what = f"has rows for different vocabularies, {shown}; are its files of one release? Download it again"
        return [*problems, Problem("shape", str(delta.path), what)]
    fitting = [
        other.name
        for other in RECIPES.values()
        if next(_problems(base, base_weights, delta, delta_weights, other), None) is None
    ]
    if fitting:
        what = f"base and delta fit together by {' or '.join(fitting)}; if that is the release's, give it with --recipe"
        problems.append(Problem("recipe", str(delta.path), what))
    return problems


def _problems(
    base: Checkpoint,
    base_weights: Mapping[str, TensorRef],
    delta: Checkpoint,
    delta_weights: Mapping[str, TensorRef],
    recipe: Recipe,
) -> Iterator[Problem]:
    for name in sorted(delta_weights.keys() - base_weights.keys() - set(recipe.copied), key=natural_key):
        what = f"lacks {name}, which the delta has ({delta_weights[name]}); is this the right base for the delta?"
        yield Problem("missing_tensor", str(base.path), what)
    for name in sorted(base_weights.keys() - delta_weights.keys(), key=natural_key):
        what = (
            f"lacks {name}, which the base has ({base_weights[name]}); is a shard missing, or the base of another kind?"
        )
        yield Problem("missing_tensor", str(delta.path), what)
    for name, right in delta_weights.items():
        left = base_weights.get(name)
        for ref, side in ((left, "base"), (right, "delta")):
            if ref is not None and ref.dtype not in FLOATS:
                yield Problem("dtype", name, f"is {ref.dtype} in the {side}; {', '.join(FLOATS)} can be added")
        if recipe.dtype not in (None, right.dtype):
            what = f"is {right.dtype} in the delta; {recipe.name} adds in {recipe.dtype}, as its releases are stored"
            yield Problem("dtype", name, what)
        if left is not None and left.shape != right.shape and not _may_grow(name, left, right, recipe):
            what = f"{left} in the base, {right} in the delta; is this the right base and release?"
            yield Problem("shape", name, what)
    rows = [weights[EMBEDDING].shape for weights in (base_weights, delta_weights) if EMBEDDING in weights]
    if recipe.rows == "zero" and len(rows) == 2 and rows[0] == rows[1] != ():
        # The published script would set rows to zero that it did not add: FastChat 0.1.10, apply_delta.py.
        what = f"has {rows[0][0]:,} rows on both sides, and {recipe.name} adds rows to the base: was one added before?"
        advice = "Give the base as it was published, or the release's recipe with --recipe"
        yield Problem("vocabulary", EMBEDDING, f"{what} {advice}")


def _may_grow(name: str, left: TensorRef, right: TensorRef, recipe: Recipe) -> bool:
    """Whether a tensor of the base lacks nothing but rows, which the recipe makes up for."""
    return (
        recipe.rows != "none"
        and name in _GROWING
        and len(left.shape) == len(right.shape) == 2
        and left.shape[1] == right.shape[1]
        and left.shape[0] < right.shape[0]
        and left.elements > 0  # of no rows there is no mean
    )


def _head_problems(base: Checkpoint, delta: Checkpoint) -> Iterator[Problem]:
    """Sizes of heads in which two checkpoints differ, where one is in Meta's format.

    They decide into which order the rows of its q and k are put, and no shape shows them.
    """
    if "meta" not in (base.container, delta.container):
        return
    for key in ("num_attention_heads", "num_key_value_heads"):
        here, other = ((side.config or {}).get(key) for side in (base, delta))
        if type(here) is int and type(other) is int and here != other:
            what = f"means {key} {here:,}, and the delta's {delta.config_name} says {other:,}"
            advice = "the rows of q and k would be put into another order; which of them is right?"
            yield Problem("heads", str(base.directory / base.config_name), f"{what}: {advice}")
