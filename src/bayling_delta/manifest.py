"""The documents that say what a model is: digests, the manifest, SHA256SUMS. Data only.

The format of each is a promise to users; docs/formats.md describes them.
"""

import hashlib
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Final

from bayling_delta import __version__
from bayling_delta.errors import KINDS, Problem, UsageError
from bayling_delta.tensors import FLOATS

__all__ = [
    "CHECKLIST_NAME",
    "MANIFEST_NAME",
    "OF_THE_HUB",
    "RESULT",
    "SUMS_NAME",
    "TensorDigest",
    "digest_text",
    "file_entry",
    "is_of_apply",
    "manifest_head",
    "parse_digest",
    "result_section",
    "small_file_entry",
    "sums_text",
    "to_json",
    "verification_texts",
    "weights_digest",
]

MANIFEST_NAME: Final = "bayling-delta.json"
SUMS_NAME: Final = "SHA256SUMS"
RESULT: Final = "the result's weights digest"
"""How ``verification`` names it."""
OF_THE_HUB: Final = "the SHA-256 that the Hub had for it"
"""How ``verification`` names a digest that came with a download, of whatever repository."""
CHECKLIST_NAME: Final = "checklist.chk"
"""What Meta calls the list of the MD5 of a model's files."""


_COMMANDS: Final = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""What a terminal obeys and JSON need not escape: control characters, line separators, marks of direction."""


@dataclass(frozen=True, slots=True)
class TensorDigest:
    """One tensor of a state dict, by what it holds."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    """Hex, of the elements in row-major order, little-endian, and nothing else."""


def digest_text(tensors: Iterable[TensorDigest]) -> str:
    """The text whose SHA-256 is the weights digest: a line for each tensor, sorted by the bytes of its name."""
    return "".join(
        f"{tensor.sha256}  {tensor.dtype}[{','.join(map(str, tensor.shape))}] {tensor.name}\n"
        for tensor in sorted(tensors, key=lambda tensor: tensor.name.encode())
    )


def weights_digest(tensors: Iterable[TensorDigest]) -> str:
    """The one name of a state dict, ``sha256:<hex>``, whatever container, sharding or order holds it."""
    return "sha256:" + hashlib.sha256(digest_text(tensors).encode()).hexdigest()


def parse_digest(text: str) -> str:
    """Return ``sha256:<hex>`` in lower case for a digest with or without its prefix.

    Raises:
        ValueError: it is not a SHA-256.
    """
    found = re.fullmatch(r"(?:sha256:)?([0-9a-f]{64})", text.strip().lower())
    if not found:
        raise ValueError(f"{text!r} is not a SHA-256: 64 hexadecimal digits, with or without 'sha256:' before them")
    return f"sha256:{found[1]}"


def manifest_head(operation: str, recipe: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest's first entries, which say who made it, when and how."""
    return {
        "schema": "bayling-delta/manifest/1",
        "ok": True,
        "tool": {"name": "bayling-delta", "version": __version__},
        "created": _timestamp(),
        "operation": operation,
        "recipe": recipe,
        "options": dict(options),
    }


def _timestamp() -> str:
    """The time for the manifest, RFC 3339 in UTC; SOURCE_DATE_EPOCH sets it, for builds that must be repeatable."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not epoch:
        moment = datetime.now(timezone.utc)
    else:
        try:
            moment = datetime.fromtimestamp(int(epoch), timezone.utc)
        except (ValueError, OverflowError, OSError) as error:
            message = f"is {epoch[:40]!r}, not a number of seconds since 1970"
            raise UsageError(Problem("option", "SOURCE_DATE_EPOCH", message)) from error
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


_SIDE: Final[dict[str, Any]] = {
    "name": str | None,
    "container": str,
    "files": [{"name": str, "size": int, "sha256": str | None}],
    "weights_digest": str | None,
}
_OF_APPLY: Final[dict[str, Any]] = {
    "recipe": str,
    "options": {"max_shard_size": int, "allow": [str]},
    "inputs": {"base": _SIDE, "delta": _SIDE},
    "changes": [{"file": str, "change": str}],
    "verification": [{"what": str, "against": str | None, "outcome": str, "source": str | None}],
}
"""What `apply` writes of how a model was made: the types, by key; a list of one stands for any number."""


def is_of_apply(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest says, in the form in which `apply` does, how the model was made."""
    return (
        _has_form(manifest, _OF_APPLY)
        and manifest["inputs"].keys() == _OF_APPLY["inputs"].keys()
        and KINDS.keys() >= set(manifest["options"]["allow"])
        and manifest["result"]["dtype"] in FLOATS
    )


def _has_form(value: object, form: Any) -> bool:
    if isinstance(form, dict):
        return isinstance(value, dict) and all(
            key in value and _has_form(value[key], inner) for key, inner in form.items()
        )
    if isinstance(form, list):
        return isinstance(value, list) and all(_has_form(each, form[0]) for each in value)
    return isinstance(value, form) and not isinstance(value, bool)


def result_section(tensors: Iterable[TensorDigest], placed: Mapping[str, str]) -> dict[str, Any]:
    """The manifest's ``result``, its ``files`` still empty; ``placed`` says which file each tensor is in."""
    digests = list(tensors)
    parameters: Counter[str] = Counter()
    for tensor in digests:
        parameters[tensor.dtype] += math.prod(tensor.shape)
    return {
        "weights_digest": weights_digest(digests),
        "parameters": parameters.total(),
        "dtype": parameters.most_common(1)[0][0] if parameters else None,
        "files": [],
        "tensors": {
            tensor.name: {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "file": placed[tensor.name],
                "sha256": tensor.sha256,
            }
            for tensor in digests
        },
    }


def file_entry(name: str, size: int, sha256: str | None) -> dict[str, Any]:
    """One file as the manifest lists it; None where the file was not digested whole."""
    return {"name": name, "size": size, "sha256": sha256}


def small_file_entry(name: str, data: bytes) -> dict[str, Any]:
    """The same for a file that is in memory."""
    return file_entry(name, len(data), hashlib.sha256(data).hexdigest())


def sums_text(digests: Mapping[str, str]) -> str:
    """The text of SHA256SUMS: what ``sha256sum`` prints for these files, sorted by name."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def to_json(document: Mapping[str, Any]) -> str:
    """A document as it is written and printed."""
    text = io.StringIO()
    json.dump(document, text, indent=2, ensure_ascii=False)  # in parts: dumps would hold them all at once
    # A lone surrogate, from a file name that is not UTF-8, has no encoding, but JSON has an escape for it.
    written = text.getvalue().encode("utf-8", "backslashreplace").decode() + "\n"
    return _COMMANDS.sub(lambda found: f"\\u{ord(found[0]):04x}", written)


def verification_texts(manifest: Mapping[str, Any]) -> list[str]:
    """What was compared, and what that proves: a sentence for each input, and one for the result."""
    entries = manifest["verification"]
    texts: list[str] = []
    complete = True
    for role, side in manifest["inputs"].items():
        files = {f"{role}: {file['name']}" for file in side["files"]}
        matched = [entry for entry in entries if entry["what"] in files and entry["outcome"] == "match"]
        of_hub = {entry["what"] for entry in matched if entry["against"] == OF_THE_HUB}
        of_releases = {entry["what"] for entry in matched if entry["against"] != OF_THE_HUB}
        complete = complete and len(of_releases) == len(files)
        known = f", {side['name']}" if side["name"] else ""
        count = {0: "none", len(files): "all"}.get(len(of_releases), str(len(of_releases)))
        as_fetched = f", {len(of_hub)} as the Hub has them" if of_hub else ""
        texts.append(f"{role}{known}: {count} of {len(files)} weight files on record of a release{as_fetched}")
    texts += [
        f"{entry['what']}: as {entry['source']}"
        for entry in entries
        if entry["outcome"] == "match" and ": " not in entry["what"]
    ]
    if not any(entry["outcome"] == "match" for entry in entries if entry["what"] == RESULT):
        reason = "the inputs are the published ones, and the sum is deterministic: " if complete else ""
        texts.append(f"{RESULT} is on no record; {reason}compare it with another person's")
    return texts
