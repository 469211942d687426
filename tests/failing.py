"""Worlds in which one call fails, through the seam; and what a run that met one must have left."""

import errno
import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bayling_delta.system import ALIGNMENT, System

METHODS = sorted(name for name, value in vars(System).items() if callable(value) and not name.startswith("_"))
"""Every call of the seam."""

Call = Callable[..., Any]
Fault = Callable[[Call, tuple[Any, ...], dict[str, Any]], Any]
"""What happens instead of a call, which it is given with its arguments."""


def error(code: int) -> Fault:
    """The call fails."""

    def failing(_call: Call, _arguments: tuple[Any, ...], _options: dict[str, Any]) -> Any:
        raise OSError(code, os.strerror(code))

    return failing


def short(call: Call, arguments: tuple[Any, ...], _options: dict[str, Any]) -> Any:
    """The call does an odd part of what it was asked for; past the page cache it says so, having done whole blocks."""
    handle, view, offset = arguments
    part = len(view) // 2 | 1
    try:
        return call(handle, view[:part], offset)
    except OSError as refused:
        if refused.errno != errno.EINVAL:
            raise
    return min(part, call(handle, view[: -(-part // ALIGNMENT) * ALIGNMENT], offset))


def nothing(_call: Call, _arguments: tuple[Any, ...], _options: dict[str, Any]) -> int:
    """The call does nothing, and says so."""
    return 0


class Watched(System):
    """Notes which files the calls are about."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[Path, bool]]] = {name: [] for name in METHODS}
        """By call, in their order: the file, and whether the caller is the main thread."""
        self.left_open: set[int] = set()
        self._paths: dict[int, Path] = {}
        for name in METHODS:
            setattr(self, name, self._watching(name, getattr(super(), name)))

    def _watching(self, name: str, call: Call) -> Call:
        def watching(*arguments: Any, **options: Any) -> Any:
            place = arguments[-1] if name in ("rename_new", "replace") else arguments[0]
            path = place if isinstance(place, Path) else self._paths[place]
            self.seen[name].append((path, threading.current_thread() is threading.main_thread()))
            if name == "close":
                self.left_open.discard(place)
            result = self.at(name, call, arguments, options)
            if name.startswith("open_"):
                self._paths[result] = path
                self.left_open.add(result)
            return result

        return watching

    def at(self, _name: str, call: Call, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Make the call."""
        return call(*arguments, **options)


class FailingNth(Watched):
    """The n-th call of one kind meets a fault; where ``direct``, of those that pass by the page cache."""

    def __init__(self, call: str, number: int, fault: Fault, *, direct: bool = False) -> None:
        super().__init__()
        self.path: Path | None = None
        """The file at which it did."""
        self._call = call
        self._left = number
        self._fault = fault
        self._direct = direct
        self._direct_handles: set[int] = set()

    def at(self, name: str, call: Call, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if name == self._call and not (self._direct and not self._is_direct(arguments, options)):
            self._left -= 1
            if not self._left:
                self.path = self.seen[name][-1][0]
                return self._fault(call, arguments, options)
        result = super().at(name, call, arguments, options)
        if name.startswith("open_"):
            (self._direct_handles.add if options.get("direct") else self._direct_handles.discard)(result)
        return result

    def _is_direct(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
        return bool(options.get("direct")) or arguments[0] in self._direct_handles


def contents(directory: Path) -> dict[str, str]:
    """The SHA-256 of each file of a model, but for the two that no two runs have alike."""
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}
    return {name: digest for name, digest in found.items() if name not in ("bayling-delta.json", "SHA256SUMS")}


def assert_whole(model: Path, expected: Path) -> None:
    """A model has every byte of another, and a list of digests that is right."""
    assert {path.name for path in model.iterdir()} == {path.name for path in expected.iterdir()}
    assert contents(model) == contents(expected)
    assert facts(model) == facts(expected)
    listed = [line.split("  ") for line in (model / "SHA256SUMS").read_text().splitlines()]
    assert {name for _, name in listed} == {path.name for path in model.iterdir()} - {"SHA256SUMS"}
    for digest, name in listed:
        assert hashlib.sha256((model / name).read_bytes()).hexdigest() == digest, name


def facts(model: Path) -> dict[str, Any]:
    """A manifest, without what differs between any two runs."""
    manifest = json.loads((model / "bayling-delta.json").read_text())
    del manifest["created"]
    return dict(manifest)
