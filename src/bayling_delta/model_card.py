"""The README.md of a rebuilt model. The same inputs give the same text: no time, path or host is in it."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from bayling_delta.companions import CHAT_TEMPLATE
from bayling_delta.manifest import verification_texts
from bayling_delta.recipes import RECIPES
from bayling_delta.release_entry import Release
from bayling_delta.tensors import TORCH_NAMES

__all__ = ["model_card"]

_WEIGHTS_ON_16_GB: Final = 14_000_000_000
"""Bytes of weights that leave room on a GPU of 16 GB for a context of 2,048 tokens, 1 to 2 GB with LLaMA's sizes."""

_FRONT: Final = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- bayling-delta
---
# A model rebuilt from a base and a weight delta

These weights are the sum of a base model and a published weight delta, tensor by tensor, as
`bayling-delta apply` computes it by the recipe `{recipe}`: each tensor is added in {dtype}, rounded to nearest
even.
This directory is the merged model, not the delta: load it as it is."""

_CHECKS: Final = """\
`sha256sum -c SHA256SUMS` checks every file of this directory. `bayling-delta.json` has the digest of every
tensor; the weights digest above is the SHA-256 of one line a tensor, and does not depend on how the weights are
cut into files. Compare it with that of anybody who rebuilt the model from the same inputs."""

_LOAD: Final = """\
```python
{imports}

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".", {options})
```"""

_CHAT: Final = """\
`chat_template.jinja` has the prompt that was published with the model{sampling}.
transformers takes it from here:

```python
messages = [{{"role": "user", "content": "Who are you?"}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**prompt.to(model.device))
answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
```

To chat in a terminal, `pip install "transformers[serving]"`, then run `transformers serve .{eight_bit}` and, in
another terminal, `transformers chat .`, both in this directory. `vllm serve .` serves the same directory, and
`convert_hf_to_gguf.py` of llama.cpp converts it."""

_PLACEHOLDERS: Final = """\
The model was published anonymised: it says placeholders, and the publisher's code put words in their place. They are
no special tokens; replace them in what the model says.

| the model says | it means |
|---|---|
{rows}"""

_LICENCE: Final = """\
This card grants nothing. The licences of the base model and of the delta both apply to their sum. Models
whose base is LLaMA 1 are under Meta's non-commercial research licence, and may not be redistributed."""


def model_card(manifest: Mapping[str, Any], release: Release | None = None) -> str:
    """Say in Markdown what a manifest says of an applied delta, and what is known of the delta's release, if any."""
    return "\n\n".join(_parts(manifest, release)) + "\n"


def _parts(manifest: Mapping[str, Any], release: Release | None) -> Iterator[str]:
    result = manifest["result"]
    recipe = RECIPES[manifest["recipe"]]
    yield _FRONT.format(recipe=recipe.name, dtype=TORCH_NAMES[recipe.dtype] if recipe.dtype else "the delta's dtype")
    yield _result_table(result)
    yield "## From what"
    if release:
        yield f"The delta is that of the release `{release.name}`: {release.title}."
    yield from (_input_text(role, side) for role, side in manifest["inputs"].items())
    yield "## How it was verified"
    yield "\n".join(f"- {text}" for text in verification_texts(manifest))
    yield _CHECKS
    if manifest["changes"]:
        yield "## What was changed beside the weights"
        yield "\n".join(f"    {change['file']}: {change['change']}" for change in manifest["changes"])
    yield "## How to load it"
    yield from _loading(result, release)
    if release and release.prompt and any(file["name"] == CHAT_TEMPLATE for file in result["files"]):
        sampling = ", and `generation_config.json` samples as the publisher does" if release.prompt.generation else ""
        eight_bit = " --quantization bnb-8bit" if _needs_eight_bit(result) else ""
        yield "## How to chat with it"
        yield _CHAT.format(sampling=sampling, eight_bit=eight_bit)
    if release and release.prompt and release.prompt.placeholders:
        rows = [f"| `{says}` | {means} |" for says, means in release.prompt.placeholders.items()]
        yield "## What the placeholders are"
        yield _PLACEHOLDERS.format(rows="\n".join(rows))
    yield "## Licence"
    if release and release.licence:
        yield f"{', '.join(release.licence.names)}. {release.licence.text}"
    yield _LICENCE


def _result_table(result: Mapping[str, Any]) -> str:
    shards = sum(1 for file in result["files"] if file["name"].endswith(".safetensors"))
    return f"""\
| | |
|---|---|
| weights digest | `{result["weights_digest"]}` |
| parameters | {result["parameters"]:,} |
| stored as | {result["dtype"]}, {shards} safetensors {"file" if shards == 1 else "files"} |"""


def _input_text(role: str, side: Mapping[str, Any]) -> str:
    lines = [f"The {role}{', ' + side['name'] if side['name'] else ''} ({side['container']}):", ""]
    if side["weights_digest"]:
        lines += [f"- weights digest `{side['weights_digest']}`"]
    for file in side["files"]:
        digest = f"SHA-256 `{file['sha256']}`" if file["sha256"] else "digested by tensor"
        lines.append(f"- `{file['name']}`, {file['size']:,} bytes, {digest}")
    return "\n".join(lines)


def _needs_eight_bit(result: Mapping[str, Any]) -> bool:
    """Whether a GPU of 16 GB holds the weights only with a byte for each parameter."""
    parameters: int = result["parameters"]
    return 2 * parameters > _WEIGHTS_ON_16_GB >= parameters


def _loading(result: Mapping[str, Any], release: Release | None) -> Iterator[str]:
    """How to load it on a GPU of 16 GB, by the number of its parameters."""
    parameters, dtype = result["parameters"], "BF16" if result["dtype"] == "BF16" else "F16"
    bits, needs = 16, "`pip install accelerate`"
    imports, options = "from transformers import AutoModelForCausalLM, AutoTokenizer", f'dtype="{TORCH_NAMES[dtype]}"'
    if 2 * parameters <= _WEIGHTS_ON_16_GB:
        where = "in 16 bits, which a GPU of 16 GB holds"
    elif _needs_eight_bit(result):
        bits, needs = 8, "`pip install accelerate bitsandbytes`"
        where = "in 8 bits on a GPU of 16 GB, which does not hold them in 16"
        imports = "from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig"
        options = "quantization_config=BitsAndBytesConfig(load_in_8bit=True)"
    else:
        where = "in 16 bits; a GPU of 16 GB does not hold them in 8 bits either, so several share them"
    yield f"The weights take {parameters * bits / 8e9:.1f} GB {where} ({needs}):"
    yield _LOAD.format(imports=imports, options=f'{options}, device_map="auto"')
    notes = []
    if bits == 16:
        notes.append("Versions of transformers before 4.56 call `dtype` `torch_dtype`.")
    if release and release.memory:
        notes.append(f"The publisher states {release.memory.eight_bit_gb:g} GB of GPU memory in 8 bits.")
    if notes:
        yield " ".join(notes)
