"""Results as text for people. What is said here was found out elsewhere; nothing is printed here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from bayling_delta.errors import BaylingDeltaError, Problem
from bayling_delta.manifest import to_json

__all__ = [
    "applied_text",
    "failure_document",
    "failure_text",
    "plan_text",
    "readable",
    "recorded_text",
    "size_text",
    "to_json",
    "usage_document",
    "verified_text",
]

_MOST_PROBLEMS: Final = 20


def size_text(count: int) -> str:
    """A number of bytes for people: ``13.48 GB``."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}" if unit == "GB" else f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def readable(text: str) -> str:
    """The text with everything escaped that a terminal would obey; names in files are their authors' choice."""
    return "".join(
        character if character.isprintable() or character == "\n" else character.encode("unicode_escape").decode()
        for character in text
    )


def failure_text(error: BaylingDeltaError) -> str:
    """One line a problem, the place first; long lists are cut."""
    problems = error.problems
    if len(problems) == 1:
        return readable(f"error: {problems[0]}")
    lines = [f"error: {len(problems)} problems"]
    lines += [f"  {problem}" for problem in problems[:_MOST_PROBLEMS]]
    if len(problems) > _MOST_PROBLEMS:
        lines.append(f"  … and {len(problems) - _MOST_PROBLEMS} more; --json lists all of them")
    return readable("\n".join(lines))


def failure_document(command: str, error: BaylingDeltaError) -> dict[str, Any]:
    """A failure as JSON."""
    return _failure(command, error.category, str(error), error.problems)


def usage_document(command: str, category: str, message: str) -> dict[str, Any]:
    """A failure that is not about checkpoints: a wrong option (``usage``), or a fault of ours (``internal``)."""
    return _failure(command, category, message, ())


def _failure(command: str, category: str, message: str, problems: Sequence[Problem]) -> dict[str, Any]:
    return {
        "schema": f"bayling-delta/{command}/1",
        "ok": False,
        "error": {
            "kind": category,
            "message": message,
            "problems": [
                {"kind": problem.kind, "where": problem.where, "message": problem.message, "allow": problem.allow}
                for problem in problems
            ],
        },
    }


def applied_text(manifest: dict[str, Any], out: Path, seconds: float) -> str:
    """What ``apply`` says when it is done."""
    result = manifest["result"]
    weights = [file for file in result["files"] if file["name"].endswith(".safetensors")]
    written = sum(file["size"] for file in weights)
    files = "1 file" if len(weights) == 1 else f"{len(weights)} files"
    rows = [
        ("model", f"{out} ({result['parameters']:,} parameters, {result['dtype']}, {files}, {size_text(written)})"),
        ("weights digest", result["weights_digest"]),
    ]
    rows += [("verified", _outcome_text(entry)) for entry in manifest["verification"]]
    rows += [("changed", f"{entry['file']}: {entry['change']}") for entry in manifest["changes"]]
    rows.append(("took", f"{seconds:.1f} s, {size_text(int(written / max(seconds, 1e-9)))}/s of result"))
    return _table(rows)


def _outcome_text(entry: dict[str, Any]) -> str:
    if entry["outcome"] == "match":
        return f"matches {entry['source']}"
    return "nothing recorded to compare with; keep the digest, and compare it with another person's"


def verified_text(document: dict[str, Any], model: Path) -> str:
    """What ``verify`` says when everything matched."""
    rows = [("model", str(model)), ("weights digest", document["weights_digest"])]
    rows += [("matches", f"{entry['against']} ({entry['what']})") for entry in document["compared"]]
    if document["loaded"]:
        rows.append(("loads", f"{document['loaded']['architecture']} on {document['loaded']['device']}"))
        rows.append(("says", document["loaded"]["generated"]))
    return _table(rows)


def recorded_text(manifest: dict[str, Any], output: Path | None) -> str:
    """What ``record -o`` says."""
    result = manifest["result"]
    rows = [("weights digest", result["weights_digest"])]
    rows.append(("", f"{result['parameters']:,} parameters in {len(result['tensors'])} tensors, {result['dtype']}"))
    rows.append(("written to", str(output)))
    return _table(rows)


def plan_text(document: dict[str, Any], out: Path) -> str:
    """What ``apply --dry-run`` says."""
    result, memory = document["result"], document["memory"]
    rows = [("recipe", document["recipe"])]
    for role, side in document["inputs"].items():
        files = ", ".join(file["name"] for file in side["files"][:3]) + (", …" if len(side["files"]) > 3 else "")
        rows.append((role, f"{side['tensors']} tensors in {len(side['files'])} {side['container']} files ({files})"))
        rows.append(("", f"{size_text(side['reads'])} to read, digested by {document['digested'][role]}"))
    rows.append(("result", f"{out}: {result['parameters']:,} parameters in {result['tensors']} tensors"))
    rows += [("", f"{file['name']}  {size_text(file['size'])}, {file['tensors']} tensors") for file in result["files"]]
    rows.append(("disk", f"{size_text(result['size'])} needed"))
    rows.append(("memory", f"{memory['buffers'] / (1 << 20):.1f} MiB of buffers, {memory['chunk'] >> 10} KiB each"))
    rows += [("note", note) for note in document["notes"]]
    return _table(rows) + "\nNothing was written. Run again without --dry-run to write the model."


def _table(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows) + 2
    return readable("\n".join(f"{name:{width}}{value}".rstrip() for name, value in rows))
