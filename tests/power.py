"""A model of a file system and of a power cut: what was not synced may be lost, and names may outlive their bytes."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from bayling_delta.system import System

BLOCK = 512
"""Bytes that a disk writes whole or not at all."""


# the record


@dataclass(frozen=True, slots=True)
class Step:
    """One change of the disk, as the program asked for it."""

    call: str
    node: int = 0
    """Of the file that it is about, or that comes into being."""
    path: Path = Path()
    other: Path = Path()
    offset: int = 0
    data: bytes = b""


class Recorder(System):
    """Does everything, and writes down every change of the disk in its order."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._nodes: dict[int, int] = {}
        """By handle."""
        self._names: dict[Path, int] = {}
        self._lock = threading.RLock()

    def _opened(self, path: Path, handle: int, *, new: bool) -> int:
        if new:
            self._names[path] = len(self.steps) + 1
            self.steps.append(Step("create", self._names[path], path))
        self._nodes[handle] = self._names[path]
        return handle

    def _note(self, call: str, act: Callable[[], Any], **fields: Any) -> Any:
        """The change and its line in the record are one, whatever other threads do."""
        with self._lock:
            result = act()
            self.steps.append(Step(call, **fields))
            return result

    def open_write(self, path: Path, *, direct: bool) -> int:
        with self._lock:
            return self._opened(path, super().open_write(path, direct=direct), new=True)

    def open_update(self, path: Path) -> int:
        with self._lock:
            return self._opened(path, super().open_update(path), new=False)

    def write_from(self, handle: int, view: memoryview, offset: int) -> int:
        with self._lock:
            count = super().write_from(handle, view, offset)
            self.steps.append(Step("write", self._nodes[handle], offset=offset, data=bytes(view[:count])))
            return count

    def preallocate(self, handle: int, size: int) -> None:
        self._note(
            "grow", lambda: super(Recorder, self).preallocate(handle, size), node=self._nodes[handle], offset=size
        )

    def truncate(self, handle: int, size: int) -> None:
        self._note("cut", lambda: super(Recorder, self).truncate(handle, size), node=self._nodes[handle], offset=size)

    def sync(self, handle: int) -> None:
        self._note("sync", lambda: super(Recorder, self).sync(handle), node=self._nodes[handle])

    def sync_directory(self, path: Path) -> None:
        self._note("sync directory", lambda: super(Recorder, self).sync_directory(path), path=path)

    def make_directory(self, path: Path) -> None:
        node = len(self.steps) + 1
        self._note("make directory", lambda: super(Recorder, self).make_directory(path), node=node, path=path)

    def remove_file(self, path: Path) -> None:
        self._note("remove", lambda: super(Recorder, self).remove_file(path), path=path)

    def remove_directory(self, path: Path) -> None:
        self._note("remove", lambda: super(Recorder, self).remove_directory(path), path=path)

    def rename_new(self, old: Path, new: Path) -> None:
        self._renamed(old, new, super().rename_new)

    def replace(self, old: Path, new: Path) -> None:
        self._renamed(old, new, super().replace)

    def _renamed(self, old: Path, new: Path, rename: Callable[[Path, Path], None]) -> None:
        with self._lock:
            rename(old, new)
            self.steps.append(Step("rename", path=old, other=new))
            if old in self._names:
                self._names[new] = self._names.pop(old)


# the model

Tree = dict[str, bytes | None]
"""What a directory holds, itself included, by path below it: bytes, or None for a directory."""


@dataclass(slots=True)
class _File:
    now: bytearray = field(default_factory=bytearray)
    synced: bytes = b""


@dataclass(slots=True)
class _Directory:
    now: dict[str, int] = field(default_factory=dict)
    synced: dict[str, int] = field(default_factory=dict)


class Disk:
    """What is on the disk, and what is only on its way there."""

    def __init__(self, root: Path, before: Tree) -> None:
        """Begin with what was in ``root``, all of it synced."""
        self._root = root
        self._nodes: dict[int, _File | _Directory] = {0: _Directory()}
        for number, (name, content) in enumerate(before.items()):
            if not name:
                continue
            self._nodes[-number] = _Directory() if content is None else _File(bytearray(content), content)
            self._parent(root / name).now[name.split("/")[-1]] = -number
        for node in self._nodes.values():
            if isinstance(node, _Directory):
                node.synced = dict(node.now)

    def take(self, step: Step) -> None:
        """Carry out one change."""
        if step.call in ("create", "make directory"):
            self._nodes[step.node] = _File() if step.call == "create" else _Directory()
            self._parent(step.path).now[step.path.name] = step.node
        elif step.call == "remove":
            del self._parent(step.path).now[step.path.name]
        elif step.call == "rename":
            self._parent(step.other).now[step.other.name] = self._parent(step.path).now.pop(step.path.name)
        elif step.call == "sync directory":
            directory = self._directory(step.path)
            directory.synced = dict(directory.now)
        else:
            self._change(self._file(step.node), step)

    def _change(self, file: _File, step: Step) -> None:
        if step.call == "write":
            end = step.offset + len(step.data)
            file.now.extend(bytes(max(0, end - len(file.now))))
            file.now[step.offset : end] = step.data
        elif step.call == "grow":
            file.now.extend(bytes(max(0, step.offset - len(file.now))))
        elif step.call == "cut":
            del file.now[step.offset :]
            file.now.extend(bytes(step.offset - len(file.now)))
        elif step.call == "sync":
            file.synced = bytes(file.now)

    def _file(self, node: int) -> _File:
        found = self._nodes[node]
        assert isinstance(found, _File)
        return found

    def _directory(self, path: Path) -> _Directory:
        node = self._nodes[0]
        for name in path.relative_to(self._root).parts:
            assert isinstance(node, _Directory)
            node = self._nodes[node.now[name]]
        assert isinstance(node, _Directory)
        return node

    def _parent(self, path: Path) -> _Directory:
        return self._directory(path.parent)

    # what is left after a power cut

    def dropped(self) -> Tree:
        """Nothing but what was synced."""
        return self._tree(lambda directory: directory.synced, lambda file: file.synced)

    def names_ahead(self) -> Tree:
        """Every name, but of the bytes only what was synced: renames may be on the disk before what they rename."""
        return self._tree(lambda directory: directory.now, lambda file: file.synced)

    def zeros(self) -> Tree:
        """Every name and size, and zeros where bytes were not synced."""
        return self._tree(
            lambda directory: directory.now,
            lambda file: file.synced[: len(file.now)].ljust(len(file.now), b"\0"),
        )

    def kept(self) -> Tree:
        """All of it, as after a kill."""
        return self._tree(lambda directory: directory.now, lambda file: bytes(file.now))

    def some(self, random: Random) -> Tree:
        """Any of the names and blocks that were on their way. A rename is done or not, in both its directories."""
        arrived: dict[int, bool] = defaultdict(lambda: random.random() < 0.5)

        def names(directory: _Directory) -> dict[str, int]:
            old, new = directory.synced, directory.now
            there = {name: node for name, node in new.items() if old.get(name) == node or arrived[node]}
            # What was renamed or replaced is here as long as that has not arrived.
            return {name: node for name, node in old.items() if not arrived[new.get(name, node)]} | there

        def content(file: _File) -> bytes:
            if file.synced == file.now:
                return file.synced
            size = random.choice([len(file.synced), len(file.now)])
            blocks = range(0, size, BLOCK)
            parts = (random.choice([file.synced, bytes(file.now)])[start : start + BLOCK] for start in blocks)
            return b"".join(part.ljust(BLOCK, b"\0") for part in parts)[:size]

        return self._tree(names, content)

    def _tree(self, names: Callable[[_Directory], dict[str, int]], content: Callable[[_File], bytes]) -> Tree:
        def walk(node: int, where: str) -> Iterator[tuple[str, bytes | None]]:
            found = self._nodes[node]
            if isinstance(found, _File):
                yield where, content(found)
                return
            yield where, None
            for name, child in sorted(names(found).items()):
                yield from walk(child, f"{where}/{name}" if where else name)

        return dict(walk(0, ""))


def tree_of(root: Path) -> Tree:
    """What is in a real directory."""
    paths = sorted(root.rglob("*"))
    return {"": None} | {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in paths}


def lay_down(tree: Tree, root: Path) -> None:
    """Make real files of it, in a new directory."""
    for name, content in tree.items():
        path = root / name
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content)
