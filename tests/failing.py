"""Worlds in which one call fails, through the seam; and what a run that met one must have left."""

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bayling_delta import apply, system
from bayling_delta.errors import OutputError
from bayling_delta.staging import partial_path
from bayling_delta.system import ALIGNMENT, System
from tests.journals import have_made_here
from tests.pairs import llama, save
from tests.running import Finished

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


COMMANDS = ["apply", "go on", "repair", "record", "verify", "inspect"]


@dataclass(frozen=True)
class Stage:
    """What the runs are about, made once; each begins from one of these states."""

    place: Path
    calls: dict[str, dict[str, list[tuple[Path, bool]]]] = field(default_factory=dict)
    """By command, once it has been asked for: what `Watched.seen` has of a run without a fault."""

    @property
    def out(self) -> Path:
        return self.place / "out"

    def command(self, name: str) -> str:
        inputs = f"--base {self.place / 'base'} --delta {self.place / 'delta'} --memory-limit 1MiB"
        return {
            "apply": f"apply {inputs} --out {self.out} --max-shard-size 70kB",
            "go on": f"apply {inputs} --out {self.out} --max-shard-size 70kB",
            "repair": f"repair {self.out} {inputs}",
            "record": f"record {self.place / 'whole'} -o {self.out} --memory-limit 1MiB",
            "verify": f"verify {self.place / 'whole'} --memory-limit 1MiB",
            "inspect": f"inspect {self.place / 'whole'}",
        }[name]

    def reset(self, name: str) -> None:
        """Have everything as it is before the command."""
        for path in (self.out, partial_path(self.out)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        if name == "go on":
            shutil.copytree(self.place / "begun", partial_path(self.out))
            have_made_here(partial_path(self.out))
        if name == "repair":
            shutil.copytree(self.place / "damaged", self.out)

    def check(self, name: str, ended: Finished, *, before: bool = False) -> None:
        """Hold what a run left against what it may have left; ``before``: whether the output was there before it."""
        partial, whole = partial_path(self.out), self.place / "whole"
        if name in ("apply", "go on"):
            if ended.code == 0 or self.out.exists():
                assert_whole(self.out, whole)
            elif partial.exists() and name == "apply":
                assert ended.document["error"]["hint"]
            if name == "go on" and not self.out.exists():  # nothing is lost
                assert contents(self.place / "begun" / "model").items() <= contents(partial / "model").items()
        elif name == "repair":
            bad = self.place / "damaged"
            assert {path.name for path in self.out.iterdir()} == {path.name for path in whole.iterdir()}
            for path in self.out.iterdir():
                good = path.read_bytes() == (whole / path.name).read_bytes()
                assert good or (ended.code and path.read_bytes() == (bad / path.name).read_bytes())
        elif name == "record":
            assert self.out.exists() >= (before or ended.code == 0)
            if self.out.exists() and not before:  # it is whole, even where its name was not synced
                assert json.loads(self.out.read_text())["ok"]
            assert not list(self.place.glob(".bayling-delta-*"))
        if partial.exists():
            assert {path.name for path in partial.iterdir()} <= {"lock", "journal", "journal.new", "model"}

    def named(self, path: Path, ended: Finished) -> bool:
        """Whether what a run says leads to the file that could not be used."""
        told = [(problem["where"], problem["message"]) for problem in ended.document["error"]["problems"]]
        return any(str(path).startswith(where) or where.startswith(str(path)) for where, _ in told if where) or any(
            str(path) in message for _, message in told
        )

    def codes(self, name: str, path: Path, outcome: str) -> set[int]:
        """With which codes a run may end that could not use a file; ``outcome`` is ``fine``, ``ends`` or ``either``."""
        if outcome == "fine":
            return {0}
        ours = path.is_relative_to(self.out) or path.is_relative_to(partial_path(self.out)) or path == self.place
        ours = ours or path.name.startswith(".bayling-delta-")
        codes = {6} if ours else {3}
        if name == "go on" and path.parent == partial_path(self.out) / "model":  # it is read back, or made again
            codes = {0, 3, 6}
        if name in ("verify", "repair"):  # what cannot be read of the model is damage, or is made anew
            codes |= {3, 5}
        if outcome == "either" or name in ("inspect", "repair"):
            codes |= {0}
        return codes


def make_stage(place: Path) -> Stage:
    """The states that runs begin from."""
    save(place / "base", llama(1), shards=2)
    delta = save(place / "delta", llama(2, 0.01), shards=2)
    (delta / "generation_config.json").write_text('{"bos_token_id": 1}')
    (delta / "tokenizer.model").write_bytes(b"\x0a\x00not really")
    options: dict[str, Any] = {"memory_limit": 1 << 20, "max_shard_size": 70_000}
    with system.using(FailingNth("rename_new", 1, error(errno.EIO))), pytest.raises(OutputError):
        apply(place / "base", delta, place / "whole", **options)
    partial_path(place / "whole").rename(place / "begun")
    apply(place / "base", delta, place / "whole", **options)
    for path in (place / "begun" / "model").iterdir():
        if path.suffix != ".safetensors" or path.name.startswith("model-00003"):
            path.unlink()
    shutil.copytree(place / "whole", place / "damaged")
    for name in ("model-00002-of-00003.safetensors", "generation_config.json"):
        path = place / "damaged" / name
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    return Stage(place)
