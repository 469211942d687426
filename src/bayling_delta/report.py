"""Results as text for people. What is said here was found out elsewhere; nothing is printed here."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any, Final

from bayling_delta.errors import InterruptedRunError, Problem, RunEndedError, shown
from bayling_delta.manifest import to_json, verification_texts

__all__ = [
    "applied_text",
    "failure_document",
    "failure_text",
    "inspected_text",
    "plan_text",
    "readable",
    "recorded_text",
    "release_text",
    "releases_text",
    "repaired_text",
    "size_text",
    "to_json",
    "usage_document",
    "verified_text",
]

_MOST_PROBLEMS: Final = 20
_MANY_PLACES: Final = 4
_MOST_FILES: Final = 12
_MOST_KINDS: Final = 40
_FEW_FILES: Final = 4


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


def failure_text(error: RunEndedError) -> str:
    """One line a problem, the place first; long lists are cut. At the end, how to overrule what can be, and go on."""
    if isinstance(error, InterruptedRunError):
        return readable(f"error: {error}; {error.hint or 'run the command again'}")
    told = _grouped(error.problems)
    problems = [readable(text) for text in told[:_MOST_PROBLEMS]]
    allow = "".join(
        f" --allow {kind}" for kind in sorted({problem.kind for problem in error.problems if problem.allow})
    )
    advice = [f"To go on all the same:{allow}"] if allow else []
    advice += [readable(error.hint)] if error.hint else []
    if len(told) == 1:
        return "\n".join([f"error: {problems[0]}", *advice])
    lines = [f"error: {len(error.problems)} problems", *(f"  {problem}" for problem in problems)]
    if len(told) > _MOST_PROBLEMS:
        lines.append(f"  … and {len(told) - _MOST_PROBLEMS} more; --json lists all of them")
    return "\n".join([*lines, *advice])


def _grouped(problems: Sequence[Problem]) -> list[str]:
    """Problems as text; those that are said alike of many places in one line, where the first of them was."""
    places: dict[str, list[str]] = {}
    for problem in problems:
        places.setdefault(problem.message, []).append(problem.where)
    texts: list[str] = []
    for problem in problems:
        here = places[problem.message]
        if len(here) < _MANY_PLACES:
            texts.append(str(problem))
        else:
            texts.append(f"{here[0]}, {here[1]} and {len(here) - 2:,} more: {problem.message}")
    return list(dict.fromkeys(texts))


def failure_document(command: str, error: RunEndedError) -> dict[str, Any]:
    """A failure as JSON."""
    return _failure(command, error.category, str(error), error.problems, error.hint)


def usage_document(command: str, category: str, message: str) -> dict[str, Any]:
    """A failure that is not about checkpoints: a wrong option (``usage``), or a fault of ours (``internal``)."""
    return _failure(command, category, message, ())


def _failure(
    command: str, category: str, message: str, problems: Sequence[Problem], hint: str | None = None
) -> dict[str, Any]:
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
            "hint": hint,
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
    rows += [("verified", text) for text in verification_texts(manifest)]
    rows += [("changed", f"{entry['file']}: {entry['change']}") for entry in manifest["changes"]]
    rows.append(("took", f"{seconds:.1f} s, {size_text(int(written / max(seconds, 1e-9)))}/s of result"))
    return _table(rows)


def verified_text(document: dict[str, Any], model: Path) -> str:
    """What ``verify`` says when everything matched."""
    rows = [("model", str(model)), ("weights digest", document["weights_digest"])]
    rows += [("matches", f"{entry['against']} ({entry['what']})") for entry in document["compared"]]
    if document["loaded"]:
        rows.append(("loads", f"{document['loaded']['architecture']} on {document['loaded']['device']}"))
        rows.append(("says", document["loaded"]["generated"]))
    return _table(rows)


def repaired_text(document: dict[str, Any], model: Path) -> str:
    """What ``repair`` says."""
    rows = [("model", str(model)), ("weights digest", document["weights_digest"])]
    rows.append(("repaired", ", ".join(document["repaired"]) or "nothing; every file is as it should be"))
    rows += [("note", text) for text in document["notes"]]
    rows += [("matches", f"{entry['against']} ({entry['what']})") for entry in document["compared"]]
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
        ("release", _release_lines(document["release"])),
        ("architecture", _architecture_lines(document["architecture"])),
        ("container", [f"{document['container']}, {_count(len(files), 'file')}, {size_text(stored)}"]),
        ("", _first_rows(listed, "<>>", _MOST_FILES)),
        ("weights", [f"{document['parameters']:,} parameters in {_count(document['tensors'], 'tensor')}"]),
        ("", [f"embeddings {tied}, {rotary}", *_columns(dtypes, "<>>>")]),
        ("tensors", _first_rows(kinds, "><<><", _MOST_KINDS)),
        ("tokenizer", [_tokenizer_line(document["tokenizer"])]),
        ("odd", _first(odd, _MOST_PROBLEMS) or ["nothing was found"]),
        ("read", [f"{size_text(document['sampled_bytes'])} of the weights"]),
    ]
    return _blocks_text(blocks)


def _blocks_text(blocks: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Blocks of lines below each other, each line wrapped, the name of a block beside its first."""
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


def _release_lines(release: Mapping[str, Any]) -> list[str]:
    """What it is recognised as; and a hint, where it is not."""
    if release["name"]:
        return [f"{release['title']} (by {release['by']})"]
    if release["sizes_of"]:
        return [f"not recognised; its files have the sizes of {', '.join(release['sizes_of'])}, which prove nothing"]
    return ["not recognised: neither by its place in the Hub's cache nor by small tensors on record"]


def _architecture_lines(architecture: dict[str, Any]) -> list[str]:
    """The class, and the sizes as its configuration and the shapes have them, one below the other."""
    said, shown = architecture["config"], architecture["shapes"]
    known = [size for size in _SIZE_WORDS if said[size] is not None and shown[size] is not None]
    file = architecture["source"]
    words = "agree" if all(said[size] == shown[size] for size in known) else "differ"
    name = architecture["class"] or architecture["model_type"] or "not named"
    table = [("", *_SIZE_WORDS.values())]
    for source, sizes in ((file, said), ("the shapes", shown)):
        table.append((source, *("?" if sizes[size] is None else f"{sizes[size]:,}" for size in _SIZE_WORDS)))
    return [f"{name}; {file} and the shapes {words}" if known else name, *_columns(table, "<>>>>>>")]


def _tokenizer_line(tokenizer: dict[str, Any]) -> str:
    if not tokenizer["files"]:
        return "none"
    known = [tokenizer["class"]] if tokenizer["class"] else []
    known += [f"{tokenizer['vocabulary']:,} tokens"] if tokenizer["vocabulary"] is not None else []
    return "; ".join([*known, ", ".join(tokenizer["files"])])


_KIND_WORDS: Final = {
    "base": "base: a model that deltas are made against",
    "delta": "delta: to be added to its base",
    "full": "full weights: nothing to apply",
    "xor": "XOR files: to be combined with the base's files byte by byte, which is not done here",
    "other": "no weights of its own to rebuild",
}


def releases_text(document: dict[str, Any]) -> str:
    """What ``releases`` says."""
    rows = [("release", "kind", "base", "recipe", "recorded")]
    rows += [
        (
            entry["name"],
            entry["kind"],
            ", ".join(entry["bases"]),
            entry["recipe"] or "",
            _recorded_words(entry["recorded"]),
        )
        for entry in document["releases"]
    ]
    lines = [readable(line) for line in _columns(rows, "<<<<<")]
    last = "recorded: weight files of which a digest is on record, in the form of which most is"
    return "\n".join([*lines, "", last, "'bayling-delta releases NAME' tells all that is known of one, and from where"])


def _recorded_words(recorded: dict[str, int]) -> str:
    return f"{recorded['files']} of {recorded['of']}" if recorded["of"] else ""


def release_text(document: dict[str, Any]) -> str:
    """What ``releases NAME`` says, for 100 columns; what stands in brackets names sources."""
    entry, recipe = document["release"], document["recipe"]
    blocks = [
        ("release", [entry["name"]]),
        ("", [entry["title"]]),
        ("kind", [_KIND_WORDS[entry["kind"]] + _keys(entry)]),
        ("also called", [", ".join(entry["aliases"])] if entry["aliases"] else []),
        ("base", [" or ".join(entry["bases"])] if entry["bases"] else []),
        ("recipe", [f"{recipe['name']}: {recipe['summary']} ({recipe['source']})"] if recipe else []),
        *((name, [entry[name]] if entry[name] else []) for name in ("result", "equals")),
        ("related", [", ".join(entry["related"])] if entry["related"] else []),
        ("weights", _weights_lines(entry)),
        *(("form", _form_lines(form)) for form in entry["forms"]),
        ("unrecorded", [f"- {what}" for what in entry["unrecorded"]]),
        ("tokenizer", _tokenizer_lines(entry["tokenizer"])),
        ("prompt", _prompt_lines(entry["prompt"])),
        ("memory", _memory_lines(entry["memory"])),
        ("licence", _licence_lines(entry["licence"])),
        ("notes", [f"- {note['about']}: {note['text']}{_keys(note)}" for note in entry["notes"]]),
        ("sources", [f"- {key}: {text}" for key, text in entry["sources"].items()]),
    ]
    return _blocks_text(blocks)


def _keys(fact: dict[str, Any]) -> str:
    return f" [{', '.join(fact['source'])}]" if fact["source"] else ""


def _weights_lines(entry: dict[str, Any]) -> list[str]:
    weights, sizes = entry["weights"], entry["architecture"]
    lines: list[str] = []
    if weights:
        what = f"{weights['parameters']:,} parameters in {_count(weights['tensors'], 'tensor')}, {weights['dtype']}"
        lines += [f"{what}, {weights['tensor_bytes']:,} bytes{_keys(weights)}"]
        lines += [f"weights digest {weights['digest'] or 'not on record'}"]
    if sizes:
        words = ", ".join(f"{word} {sizes[size]:,}" for size, word in _SIZE_WORDS.items())
        lines += [f"{words}{_keys(sizes)}"]
    return lines


def _form_lines(form: dict[str, Any]) -> list[str]:
    """One form of a release: what it is, where it is found, and its weight files with the beginning of a digest."""
    weights = [file for file in form["files"] if file["name"].endswith((".bin", ".safetensors", ".pth"))]
    recorded = [file for file in weights if file["sha256"] or file["md5"]]
    rows = [(file["name"], _stored(file), _digest_words(file)) for file in recorded]
    others = len(form["files"]) - len(weights)
    keys = dict.fromkeys(key for fact in (form, *form["files"]) for key in fact["source"])
    lines = [f"{form['title']} ({form['container']}) [{', '.join(keys)}]"]
    lines += [f"on the Hub: {', '.join(form['hub'])}"] if form["hub"] else []
    lines += [f"  {line}" for line in _first_rows(rows, "<><", _MOST_FILES)]
    if without := [f"{file['name']} {_stored(file)}".rstrip() for file in weights if file not in recorded]:
        few = len(without) <= _FEW_FILES
        named = ", ".join(without) if few else f"{len(without)} of {_count(len(weights), 'weight file')}"
        lines.append(f"  no digest is on record of {named}")
    return [*lines, f"  and {_count(others, 'other file')}, which --json lists"] if others else lines


def _stored(file: dict[str, Any]) -> str:
    return f"{file['size']:,} bytes" if file["size"] is not None else file["about"] or ""


def _digest_words(file: dict[str, Any]) -> str:
    """The beginning of one of its digests: enough to find it with, and to see a difference."""
    algorithm = "sha256" if file["sha256"] else "md5"
    return f"{algorithm} {file[algorithm][0][:16]}…"


def _tokenizer_lines(tokenizer: dict[str, Any] | None) -> list[str]:
    if tokenizer is None:
        return []
    known = [f"{tokenizer['tokens']:,} tokens"]
    known += [tokenizer["tokenizer_class"]] if tokenizer["tokenizer_class"] else []
    known += [f"{name} {text}" for name, text in tokenizer["special_tokens"].items()]
    known += [f"added {text} as {number}" for text, number in tokenizer["added"].items()]
    return [", ".join(known) + _keys(tokenizer)]


def _memory_lines(memory: dict[str, Any] | None) -> list[str]:
    return [f"{memory['eight_bit_gb']:g} GB of GPU memory in 8 bit{_keys(memory)}"] if memory else []


def _licence_lines(licence: dict[str, Any] | None) -> list[str]:
    return [", ".join(licence["names"]) + _keys(licence), licence["text"]] if licence else []


def _prompt_lines(prompt: dict[str, Any] | None) -> list[str]:
    if prompt is None:
        return []
    lines = [f"{prompt['name']} ({'; '.join(prompt['source'])})"]
    lines += [f"system text: {prompt['system']!r}"]
    if not prompt["chat_template"]:
        lines += ["its whole form is not on record here"]
    if prompt["generation"]:
        lines += [", ".join(f"{name} {value}" for name, value in prompt["generation"].items())]
    lines += [f"where it says {said}, put {meant}" for said, meant in prompt["placeholders"].items()]
    return lines


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
    return [*lines[:most], *_more(len(lines) - most)]


def _first_rows(rows: Sequence[Sequence[str]], sides: str, most: int) -> list[str]:
    """The first rows as lines, and how many more there are; long names cut, as each line is as wide as the longest."""
    first = [[shown(cell) for cell in row] for row in rows[:most]]
    return [*(_columns(first, sides) if first else []), *_more(len(rows) - most)]


def _more(count: int) -> list[str]:
    return [f"… and {count:,} more; --json lists all of them"] if count > 0 else []


def _wrap(line: str) -> list[str]:
    """The line in pieces that fit beside the names of `_table` in 100 columns; names and paths stay whole."""
    indent = "  " if line.startswith("- ") else ""
    return wrap(line, 86, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) or [""]


def _table(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(readable(f"{name:{width}}{value}".rstrip()) for name, value in rows)
