"""Load a model as its users will, with transformers, and have it say a few words."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bayling_delta.errors import IntegrityError, Problem, UsageError, refuse
from bayling_delta.tensors import TensorRef

if TYPE_CHECKING:
    import transformers

__all__ = ["load_and_generate"]

_PROMPT: Final = "The capital of France is"
_NEW_TOKENS: Final = 8
_REFUSALS: Final = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError)
"""What transformers raises of a directory that it cannot load."""


def load_and_generate(
    model: Path, weights: Mapping[str, TensorRef], *, device: str = "cpu", eight_bit: bool = False
) -> dict[str, Any]:
    """Check names and shapes against the architecture, load the model, and generate a few tokens greedily.

    The first check is made on the meta device, before any weights are loaded. ``device`` is a torch device;
    ``eight_bit`` quantises on loading, with bitsandbytes. Returns what was loaded and what it said.

    Raises:
        IntegrityError: transformers cannot load it, needs other weights than are there, or computes non-finite logits.
        UsageError: ``eight_bit`` without bitsandbytes, or a device that is not there.
    """
    import torch
    import transformers

    if eight_bit:
        _require_bitsandbytes()
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(
            Problem("device", f"--device {device}", f"torch {torch.__version__} finds no CUDA device here")
        )
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        config = transformers.AutoConfig.from_pretrained(model)
        refuse(_architecture_problems(model, config, weights))
        options: dict[str, Any] = {}
        if eight_bit:
            options["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
            options["device_map"] = {"": device}
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(model, torch_dtype="auto", **options)
        if not eight_bit:
            loaded = loaded.to(device)
        words, text_of = _prompt(model, config)
        inputs = torch.tensor([words], device=device)
        with torch.no_grad():
            logits = loaded(inputs).logits
            said = loaded.generate(
                inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=_NEW_TOKENS, do_sample=False
            )
    except _REFUSALS as error:
        message = f"transformers {transformers.__version__} cannot load it: {str(error)[:500]}"
        raise IntegrityError(Problem("load", str(model), message)) from error
    if not bool(logits.isfinite().all()):
        raise IntegrityError(Problem("load", str(model), "loads, and computes infinite or NaN logits"))
    return {
        "architecture": type(loaded).__name__,
        "device": device,
        "eight_bit": eight_bit,
        "generated": text_of(said[0].tolist()),
    }


def _architecture_problems(
    model: Path, config: "transformers.PretrainedConfig", weights: Mapping[str, TensorRef]
) -> list[Problem]:
    """Tensors that the architecture needs and that are not there, or are there and it does not know."""
    import torch
    import transformers

    with torch.device("meta"):
        skeleton: Any = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    needed = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    if getattr(config, "tie_word_embeddings", False):
        needed.pop("lm_head.weight", None)
    problems = [
        Problem("load", str(model), f"lacks {name}, which {type(skeleton).__name__} needs")
        for name in needed.keys() - weights.keys()
    ]
    problems += [
        Problem("load", str(model), f"has {name}, which {type(skeleton).__name__} does not know")
        for name in weights.keys() - needed.keys()
    ]
    problems += [
        Problem("load", str(model), f"{name} is {list(weights[name].shape)}, config.json makes it {list(shape)}")
        for name, shape in needed.items()
        if name in weights and weights[name].shape != shape
    ]
    return sorted(problems, key=lambda problem: problem.message)


def _prompt(model: Path, config: "transformers.PretrainedConfig") -> tuple[list[int], Any]:
    """Token ids to begin with, and what turns ids into text; without a tokenizer, the first token alone."""
    import transformers

    if not any((model / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        first = getattr(config, "bos_token_id", None)
        return [first if isinstance(first, int) else 0], lambda ids: f"token ids {ids} (there is no tokenizer)"
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model)
    ids: list[int] = tokenizer(_PROMPT)["input_ids"]
    return ids, lambda said: str(tokenizer.decode(said, skip_special_tokens=True))


def _require_bitsandbytes() -> None:
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None or find_spec("accelerate") is None:
        message = "needs bitsandbytes and accelerate: pip install bitsandbytes accelerate"
        raise UsageError(Problem("device", "--load-in-8bit", message))
