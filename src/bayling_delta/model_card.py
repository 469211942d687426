"""The README.md of a rebuilt model. The same inputs give the same text: no time, path or host is in it."""

from typing import Any

__all__ = ["model_card"]

_TEXT = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- bayling-delta
---
# A model rebuilt from a base and a weight delta

These weights are the sum of a base model and a published weight delta, tensor by tensor, as
`bayling-delta apply` computes it: {recipe_says}
This directory is the merged model, not the delta: load it as it is.

| | |
|---|---|
| weights digest | `{digest}` |
| parameters | {parameters:,} |
| stored as | {dtype}, {files} safetensors {files_word} |

## From what

{inputs}
## How it was verified

{verification}

`sha256sum -c SHA256SUMS` checks every file of this directory. `bayling-delta.json` has the digest of every
tensor; the weights digest above is the SHA-256 of one line a tensor, and does not depend on how the weights are
cut into files. Compare it with that of anybody who rebuilt the model from the same inputs.

## Licence

This card grants nothing. The licences of the base model and of the delta both apply to their sum. Models
whose base is LLaMA 1 are under Meta's non-commercial research licence, and may not be redistributed.
"""


def model_card(manifest: dict[str, Any]) -> str:
    """Say in Markdown what a manifest says of an applied delta."""
    result = manifest["result"]
    shards = [file for file in result["files"] if file["name"].endswith(".safetensors")]
    return _TEXT.format(
        recipe_says="each tensor is added in the delta's dtype, rounded to nearest even.",
        digest=result["weights_digest"],
        parameters=result["parameters"],
        dtype=result["dtype"],
        files=len(shards),
        files_word="file" if len(shards) == 1 else "files",
        inputs="\n".join(_input_text(role, side) for role, side in manifest["inputs"].items()),
        verification="\n".join(_verification_text(entry) for entry in manifest["verification"]),
    )


def _input_text(role: str, side: dict[str, Any]) -> str:
    lines = [f"The {role}{', ' + side['name'] if side['name'] else ''} ({side['container']}):", ""]
    if side["weights_digest"]:
        lines += [f"- weights digest `{side['weights_digest']}`"]
    for file in side["files"]:
        digest = f"SHA-256 `{file['sha256']}`" if file["sha256"] else "digested by tensor"
        lines.append(f"- `{file['name']}`, {file['size']:,} bytes, {digest}")
    return "\n".join([*lines, ""])


def _verification_text(entry: dict[str, Any]) -> str:
    against = f" against `{entry['against']}`" if entry["against"] else ""
    return f"- {entry['what']}{against}: {entry['outcome']}"
