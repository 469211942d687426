"""How a delta is added to its base: the rules of the published scripts, as data."""

from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["PLAIN", "RECIPES", "Recipe"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """One family's rule for adding a delta to a base."""

    name: str
    summary: str
    """The rule in a sentence."""
    source: str
    """Who published the rule, and where."""
    rows: Literal["none", "zero", "mean", "overlap"] = "none"
    """How model.embed_tokens.weight and lm_head.weight of the base become as large as the delta's.

    ``none``: they must be so already. ``zero``: rows of zeros are appended, so that the delta's new rows are the
    model's. ``mean``: each new row is the mean of the base's rows, of each of the two tensors for itself.
    ``overlap``: the base is added where the two overlap at the top left, and the delta stands alone elsewhere.
    """
    dtype: str | None = None
    """What the delta's tensors have, and the sum is computed in; None for whatever they have."""
    copied: tuple[str, ...] = ()
    """Names of tensors that only the delta has, and that are taken from it as they are."""


_ALPACA: Final = "new rows of the base are the mean of its rows, and everything is added in float32"

RECIPES: Final = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "plain",
            "base and delta have the same tensors in the same shapes, and are added in the delta's dtype",
            "ictnlp/BayLing, apply_delta.py; lm-sys/FastChat, apply_delta.py, for Vicuna v1.1",
        ),
        Recipe(
            "vicuna-v0",
            "new rows of the base are zeros, so that those of the delta are the model's; added in the delta's dtype",
            "lm-sys/FastChat up to 0.1.10, apply_delta.py",
            rows="zero",
        ),
        Recipe("alpaca", _ALPACA, "tatsu-lab/stanford_alpaca, weight_diff.py", rows="mean", dtype="F32"),
        Recipe(
            "wizardlm",
            f"as alpaca: {_ALPACA}",
            "nlpxucan/WizardLM, which uses Alpaca's script without its check",
            rows="mean",
            dtype="F32",
        ),
        Recipe(
            "llava",
            "the embeddings are added where base and delta overlap, the projector is taken from the delta, "
            "and the rest is added in the delta's dtype",
            "haotian-liu/LLaVA, llava/model/apply_delta.py",
            rows="overlap",
            copied=("model.mm_projector.weight", "model.mm_projector.bias"),
        ),
    )
}
"""Every recipe by the name that ``--recipe`` takes."""
PLAIN: Final = RECIPES["plain"]
