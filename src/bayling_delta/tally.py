"""What a run has finished while it goes on: output files, and input files read to their end.

Many stations find out something of each file. When the last of them has, the file is reported, with all of it.
"""

import hashlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from bayling_delta.plan import Plan

__all__ = ["Finished", "FinishedFile", "FinishedInput", "Tally"]

_NOTHING: Final = hashlib.sha256().hexdigest()
"""The digest of a tensor that has no elements; no station meets it."""


@dataclass(frozen=True, slots=True)
class FinishedFile:
    """An output file that is written and synced, and what was found out on the way. Digests are SHA-256 in hex."""

    name: str
    size: int
    sha256: str
    tensors: dict[str, str]
    """Of the result's tensors, by name."""
    base: dict[str, str]
    """Of the base's tensors that went into it, where these are digested by tensor."""
    delta: dict[str, str]
    parts: dict[str, str]
    """Where an input is digested by file: of what was read of it for this file, as ``role/name@stop``."""
    non_finite: dict[str, int] = field(default_factory=dict)
    """How many elements are infinite or NaN, for the tensors that have any."""
    changed_ns: int = 0
    """When the file was last changed in any way, where that was noted."""


@dataclass(frozen=True, slots=True)
class FinishedInput:
    """A weight file of an input that was digested to its end."""

    role: str
    """``base`` or ``delta``."""
    name: str
    sha256: str
    md5: str | None
    """Where a list has it."""
    parts: dict[str, str]
    """Up to each stop, as ``role/name@stop``."""
    changed_ns: int = 0
    """When the file was last changed in any way, where that was noted."""


Finished = FinishedFile | FinishedInput
_Target = tuple[str, str]
"""What is being finished: ``result``, ``base`` or ``delta``, and the file's name."""


class Tally:
    """Gathers what is found out of each file, and reports the file when nothing is missing."""

    def __init__(self, plan: Plan) -> None:
        self.report: Callable[[Finished], None] = lambda _: None
        """Given each finished file, in the thread that finished it; set before the first is."""
        self._lock = threading.Lock()
        self._sizes = {file.name: file.size for file in plan.files}
        self._left: dict[_Target, int] = {}
        self._found: dict[_Target, dict[str, dict[str, str]]] = {}
        self._targets: dict[str, dict[str, tuple[_Target, ...]]] = {}
        """By the kind of event and its name: to which files it belongs."""
        sides = {"base": plan.base_reads, "delta": plan.delta_reads}
        tensors: dict[str, tuple[_Target, ...]] = {}
        files: dict[str, tuple[_Target, ...]] = {}
        for file in plan.files:
            target: tuple[_Target, ...] = (("result", file.name),)
            files[file.name] = target
            tensors |= dict.fromkeys((tensor.name for tensor in file.tensors), target)
        self._targets |= {"written": files, "file": files}
        self._targets |= dict.fromkeys(("tensor", "tensor of the base", "tensor of the delta"), tensors)
        for role, reads in sides.items():
            whole: dict[str, tuple[_Target, ...]] = {name: ((role, name),) for name in reads.files}
            self._targets |= {f"file of the {role}": whole, f"MD5 of the {role}": whole}
            parts: dict[str, tuple[_Target, ...]] = {
                f"{name}@{stop}": ((role, name),) for name, stops in reads.stops.items() for stop in stops
            }
            self._targets[f"part of the {role}"] = parts
            for name in reads.files:
                self._expect((role, name), {}, 1 + (name in reads.md5) + len(reads.stops.get(name, ())))
        for file in plan.files:
            count = 2
            nothing: dict[str, dict[str, str]] = {}
            by_tensor = {"tensor": {tensor.name: tensor.nbytes for tensor in file.tensors}}
            for role, reads in sides.items():
                names = (tensor.name for tensor in file.tensors if tensor.name in reads.tensors)
                by_tensor[f"tensor of the {role}"] = {name: reads.tensors[name] for name in names}
                if reads.stops:
                    for name, stop in file.made_of(role).items():
                        self._targets[f"part of the {role}"][f"{name}@{stop}"] += files[file.name]
                        count += 1
            for what, sizes in by_tensor.items():
                count += sum(1 for size in sizes.values() if size)
                nothing[what] = {name: _NOTHING for name, size in sizes.items() if not size}
            self._expect(("result", file.name), nothing, count)

    def _expect(self, target: _Target, found: dict[str, dict[str, str]], count: int) -> None:
        """Of a file, so many events are to come."""
        self._found[target] = found
        self._left[target] = count

    def hears(self, what: str) -> Callable[[str, str], None]:
        """What to tell (which, what was found) of one kind of event."""
        targets = self._targets[what]

        def note(key: str, found: str) -> None:
            for target in targets[key]:
                with self._lock:
                    self._found[target].setdefault(what, {})[key] = found
                    self._left[target] -= 1
                    whole = None if self._left[target] else self._found.pop(target)
                if whole is not None:
                    self.report(self._finished(*target, whole))

        return note

    def _finished(self, role: str, name: str, found: Mapping[str, dict[str, str]]) -> Finished:
        parts = {
            f"{side}/{key}": digest
            for side in ("base", "delta")
            for key, digest in found.get(f"part of the {side}", {}).items()
        }
        if role != "result":
            md5 = found.get(f"MD5 of the {role}", {}).get(name)
            return FinishedInput(role, name, found[f"file of the {role}"][name], md5, parts)
        return FinishedFile(
            name,
            self._sizes[name],
            found["file"][name],
            found["tensor"],
            found["tensor of the base"],
            found["tensor of the delta"],
            parts,
        )
