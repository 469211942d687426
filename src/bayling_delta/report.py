"""Results as text for people. What is said here was found out elsewhere; nothing is printed here."""

import os
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any, Final

from bayling_delta.errors import BaylingDeltaError, Problem
from bayling_delta.manifest import to_json

__all__ = [
    "applied_text",
    "failure_document",
    "failure_text",
    "inspected_text",
    "plan_text",
    "readable",
    "recorded_text",
    "size_text",
    "to_json",
    "usage_document",
    "verified_text",
]

_MOST_PROBLEMS: Final = 20
_MOST_FILES: Final = 12
_MOST_KINDS: Final = 40


def size_text(count: int) -> str:
    """A number of bytes for people: ``13.48 GB``."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}" if unit == "GB" else f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def readable(text: str) -> str:
    """The text with everything escaped that a terminal would obey; names in files are their authors' choice."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


def failure_text(error: BaylingDeltaError) -> str:
    """One line a problem, the place first; long lists are cut. At the end, how to overrule what can be."""
    problems = [readable(str(problem)) for problem in error.problems[:_MOST_PROBLEMS]]
    allow = "".join(
        f" --allow {kind}" for kind in sorted({problem.kind for problem in error.problems if problem.allow})
    )
    advice = [f"To go on all the same:{allow}"] if allow else []
    if len(error.problems) == 1:
        return "\n".join([f"error: {problems[0]}", *advice])
    lines = [f"error: {len(error.problems)} problems", *(f"  {problem}" for problem in problems)]
    if len(error.problems) > _MOST_PROBLEMS:
        lines.append(f"  … and {len(error.problems) - _MOST_PROBLEMS} more; --json lists all of them")
    return "\n".join([*lines, *advice])


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
        stored = _count(len(side["files"]), f"{side['container']} file")
        rows.append((role, f"{_count(side['tensors'], 'tensor')} in {stored} ({files})"))
        rows.append(("", f"{size_text(side['reads'])} to read, digested by {document['digested'][role]}"))
    rows.append(("result", f"{out}: {result['parameters']:,} parameters in {result['tensors']} tensors"))
    rows += [
        ("", f"{file['name']}  {size_text(file['size'])}, {_count(file['tensors'], 'tensor')}")
        for file in result["files"]
    ]
    rows.append(("disk", f"{size_text(result['size'])} needed"))
    rows.append(("memory", f"{memory['buffers'] / (1 << 20):.1f} MiB of buffers, {memory['chunk'] >> 10} KiB each"))
    rows += [("note", note) for note in document["notes"]]
    return _table(rows) + "\nNothing was written. Run again without --dry-run to write the model."


def inspected_text(document: dict[str, Any], path: Path) -> str:
    """What ``inspect`` says, for 100 columns."""
    files, stored = document["files"], sum(file["size"] for file in document["files"])
    listed = [(file["name"], _count(file["tensors"], "tensor"), size_text(file["size"])) for file in files]
    dtypes = [
        (
            entry["dtype"],
            _count(entry["tensors"], "tensor"),
            f"{entry['parameters']:,} parameters",
            size_text(entry["bytes"]),
        )
        for entry in document["dtypes"]
    ]
    kinds = [("count", "dtype", "shape", "parameters", "name")]
    kinds += [
        (f"{kind['count']:,}", kind["dtype"], str(kind["shape"]), f"{kind['parameters']:,}", kind["name"])
        for kind in document["kinds"]
    ]
    tied = "tied" if document["tied_embeddings"] else "not tied"
    rotary = _count(document["rotary_buffers"], "rotary buffer")
    inside = f"{path}{os.sep}"
    odd = [
        f"- {entry['where'].removeprefix(inside)}: {entry['message']} [{entry['kind']}]" for entry in document["odd"]
    ]
    blocks = [
        ("path", [str(path)]),
        ("looks like", [f"{document['looks_like']} (from signs, which are no proof)"]),
        ("", [f"- {reason}" for reason in document["reasons"]]),
        ("architecture", _architecture_lines(document["architecture"])),
        ("container", [f"{document['container']}, {_count(len(files), 'file')}, {size_text(stored)}"]),
        ("", _first(_columns(listed, "<>>"), _MOST_FILES)),
        ("weights", [f"{document['parameters']:,} parameters in {_count(document['tensors'], 'tensor')}"]),
        ("", [f"embeddings {tied}, {rotary}", *_columns(dtypes, "<>>>")]),
        ("tensors", _first(_columns(kinds, "><<><"), _MOST_KINDS)),
        ("tokenizer", [_tokenizer_line(document["tokenizer"])]),
        ("odd", _first(odd, _MOST_PROBLEMS) or ["nothing was found"]),
        ("read", [f"{size_text(document['sampled_bytes'])} of the weights"]),
    ]
    rows = [(name if not place else "", line) for name, lines in blocks for place, line in enumerate(lines)]
    return _table([(name if not place else "", part) for name, line in rows for place, part in enumerate(_wrap(line))])


_SIZE_WORDS: Final = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden",
    "intermediate_size": "intermediate",
    "num_attention_heads": "heads",
    "num_key_value_heads": "KV heads",
    "vocab_size": "vocabulary",
}


def _architecture_lines(architecture: dict[str, Any]) -> list[str]:
    """The class, and the sizes as config.json and the shapes have them, one below the other."""
    said, shown = architecture["config"], architecture["shapes"]
    known = [size for size in _SIZE_WORDS if said[size] is not None and shown[size] is not None]
    words = "agree" if all(said[size] == shown[size] for size in known) else "differ"
    name = architecture["class"] or architecture["model_type"] or "not named"
    table = [("", *_SIZE_WORDS.values())]
    for source, sizes in (("config.json", said), ("the shapes", shown)):
        table.append((source, *("?" if sizes[size] is None else f"{sizes[size]:,}" for size in _SIZE_WORDS)))
    return [f"{name}; config.json and the shapes {words}" if known else name, *_columns(table, "<>>>>>>")]


def _tokenizer_line(tokenizer: dict[str, Any]) -> str:
    if not tokenizer["files"]:
        return "none"
    known = [tokenizer["class"]] if tokenizer["class"] else []
    known += [f"{tokenizer['vocabulary']:,} tokens"] if tokenizer["vocabulary"] is not None else []
    return "; ".join([*known, ", ".join(tokenizer["files"])])


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _columns(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Each row as a line, its cells aligned to the left (``<``) or right (``>``) of their columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]


def _first(lines: Sequence[str], most: int) -> list[str]:
    more = [f"… and {len(lines) - most:,} more; --json lists all of them"] if len(lines) > most else []
    return [*lines[:most], *more]


def _wrap(line: str) -> list[str]:
    """The line in pieces that fit beside the names of `_table` in 100 columns; names and paths stay whole."""
    indent = "  " if line.startswith("- ") else ""
    return wrap(line, 86, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) or [""]


def _table(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(readable(f"{name:{width}}{value}".rstrip()) for name, value in rows)
