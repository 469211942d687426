"""The journal of an unfinished output: what decides its bytes, and what of it is finished, a line of JSON for each.

A line is written, and synced, when what it says is on the disk. The machine may stop in a line, and a disk may damage
one: each begins with a digest of the rest, and what cannot be read ends the journal, so that what it would have said is
done again. It is read as if anybody had written it.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from bayling_delta.checkpoint import JSON_CAP, stays_in_directory
from bayling_delta.errors import CheckpointError, Problem
from bayling_delta.files import Appender, replace_file
from bayling_delta.sources import exists, read_file
from bayling_delta.strict_json import load_strict
from bayling_delta.tally import Finished, FinishedFile, FinishedInput

__all__ = ["Journal", "read_journal", "write_journal"]

_KINDS: Final[dict[str, type[Finished]]] = {"file": FinishedFile, "input": FinishedInput}
_NAMES: Final = {kind: name for name, kind in _KINDS.items()}


class Journal:
    """A journal that is being written."""

    def __init__(self, path: Path, head: Mapping[str, Any], entries: Iterable[Finished]) -> None:
        """Begin it anew, in place of one that may be there, with what is already finished.

        Raises:
            OutputError: it cannot be written.
        """
        self.entries = list(entries)
        """Everything that it says is finished."""
        self._lock = threading.Lock()
        write_journal(path, head, self.entries)
        self._file = Appender(path)

    def add(self, finished: Finished) -> None:
        """Write down that something is finished, and sync; any thread may.

        Raises:
            OutputError: it cannot be written.
        """
        with self._lock:
            self._file.append(_entry(finished))
            self.entries.append(finished)

    def close(self) -> None:
        """Close the file, whatever state it is in."""
        self._file.close()


def write_journal(path: Path, head: Mapping[str, Any], entries: Iterable[Finished]) -> None:
    """Write a whole journal, in place of one that may be there.

    Raises:
        OutputError: it cannot be written.
    """
    replace_file(path, b"".join([_line(head), *map(_entry, entries)]))


def read_journal(path: Path) -> tuple[dict[str, Any], list[Finished]] | None:
    """The head of a journal and its entries, as far as they can be read; None where none was begun.

    Raises:
        CheckpointError: it cannot be read, or not even its head is one.
    """
    if not exists(path):
        return None
    first, *lines = read_file(path, JSON_CAP).split(b"\n")[:-1] or [b""]  # a line without its end was cut short
    try:
        head = load_strict(_text(first))
        if not isinstance(head, dict):
            raise ValueError("it is no table")
    except ValueError as error:
        raise CheckpointError(Problem("record", str(path), f"is not a journal ({str(error)[:200]})")) from error
    entries: list[Finished] = []
    for line in lines:
        try:
            entries.append(_parse(line))
        except (ValueError, TypeError, KeyError, AttributeError):
            break
    return head, entries


def _parse(line: bytes) -> Finished:
    fields = load_strict(_text(line))
    finished = _KINDS[fields.pop("finished")](**fields)
    digests = [finished.sha256, *finished.parts.values()]
    if isinstance(finished, FinishedFile):
        counts = finished.non_finite.values()
        if not all(type(count) is int and count > 0 for count in (finished.size, *counts)):
            raise ValueError("a count is none")
        for table in (finished.tensors, finished.base, finished.delta):
            digests += table.values()
    elif finished.role not in ("base", "delta"):
        raise ValueError("a role is none")
    elif finished.md5 is not None and not re.fullmatch("[0-9a-f]{32}", finished.md5):
        raise ValueError("an MD5 is none")
    if type(finished.changed_ns) is not int:
        raise ValueError("a time is none")
    if not stays_in_directory(finished.name) or not all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests):
        raise ValueError("a digest or a name is none")
    return finished


def _entry(finished: Finished) -> bytes:
    return _line({"finished": _NAMES[type(finished)], **asdict(finished)})


def _line(document: Mapping[str, Any]) -> bytes:
    text = json.dumps(document, separators=(",", ":")).encode()
    return _digest(text) + b" " + text + b"\n"


def _text(line: bytes) -> bytes:
    """What a line says, if it is as it was written."""
    digest, _, text = line.partition(b" ")
    if digest != _digest(text):
        raise ValueError("a line of it is damaged")
    return text


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:16].encode()
