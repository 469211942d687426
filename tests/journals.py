"""Journals as docs/formats.md describes them, written and read without the program."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def signed(text: bytes) -> bytes:
    """One line: the first 16 digits of the SHA-256 of a text, a blank, the text."""
    return hashlib.sha256(text).hexdigest()[:16].encode() + b" " + text + b"\n"


def journal_of(documents: Iterable[Any]) -> bytes:
    return b"".join(signed(json.dumps(document).encode()) for document in documents)


def documents_of(journal: bytes) -> list[Any]:
    """What the lines say, up to one that was not written whole."""
    found: list[Any] = []
    for line in journal.split(b"\n")[:-1]:
        text = line[17:]
        if signed(text) != line + b"\n":
            break
        found.append(json.loads(text))
    return found


def signed_again(journal: bytes) -> bytes:
    """The same lines, whatever they say, each as if it had been written so."""
    return b"".join(signed(line[17:]) for line in journal.split(b"\n")[:-1])


def have_made_here(partial: Path) -> None:
    """Have a copy of an unfinished output be one that was made where it is: with its files' times in its journal."""
    journal = partial / "journal"
    documents = documents_of(journal.read_bytes()) if journal.exists() else []
    for entry in documents[1:]:
        file = partial / "model" / entry["name"]
        if entry["finished"] == "file" and file.exists():
            entry["changed_ns"] = file.stat().st_ctime_ns
    if documents:
        journal.write_bytes(journal_of(documents))
