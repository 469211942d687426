"""What the machine can do at all: copy as many bytes, and take as many digests. Each is a process of its own.

    python -m benchmark.ceilings copy INPUT... --out FILE --bytes N [--direct]
    python -m benchmark.ceilings digest --sha256-bytes N --crc32-bytes N
    python -m benchmark.ceilings primitives INPUT... --out FILE --bytes N --add-bytes N --sha256-bytes N --crc32-bytes N

prints one JSON document: the seconds that it took, the start of Python not counted. For primitives these are
processor seconds, each operation by itself and on one thread.
"""

import argparse
import hashlib
import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final

from isal.isal_zlib import crc32

from benchmark.machine import cores, files_of

__all__ = ["main"]

_CHUNK: Final = 4 << 20
_DEPTH: Final = 2
"""Requests that each stream has under way."""
_BLOCK: Final = 4096
_MEMORY: Final = 64 << 20
"""Bytes that are digested again and again: more than fit into the processor's caches."""
_UPDATE: Final = 1 << 20


def main(arguments: Sequence[str]) -> None:
    """Measure what is asked for, and print it."""
    parser = argparse.ArgumentParser(prog="ceilings")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("copy", "digest", "primitives"):
        command = commands.add_parser(name)
        if name != "digest":
            command.add_argument("inputs", nargs="+", type=Path)
            command.add_argument("--out", type=Path, required=True)
            command.add_argument("--bytes", type=int, required=True)
        if name != "copy":
            command.add_argument("--sha256-bytes", type=int, required=True)
            command.add_argument("--crc32-bytes", type=int, required=True)
    commands.choices["copy"].add_argument("--direct", action="store_true")
    commands.choices["primitives"].add_argument("--add-bytes", type=int, required=True)
    options = parser.parse_args(arguments)
    measure = {"copy": _copy, "digest": _digest, "primitives": _primitives}[options.command]
    print(json.dumps(measure(options)))


def _together(works: Sequence[Callable[[], None]]) -> None:
    """Run all at once, and wait for them; a fault in one is a fault of the whole."""
    faults: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]


# copying


def _copy(options: argparse.Namespace) -> dict[str, Any]:
    """Read all files of the inputs, each input one stream, and write as many bytes as asked meanwhile, synced."""
    flags = os.O_DIRECT if options.direct else 0
    streams: list[Callable[[], None]] = [partial(_read, files_of([path]), flags) for path in options.inputs]
    started = time.perf_counter()
    _together([*streams, partial(_write, options.out, options.bytes, flags)])
    return {"seconds": time.perf_counter() - started}


def _read(files: Sequence[Path], flags: int) -> None:
    for path in files:
        handle = os.open(path, os.O_RDONLY | flags)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            _chunks(os.fstat(handle).st_size, partial(_read_chunk, handle))
        finally:
            os.close(handle)


def _read_chunk(handle: int, buffer: memoryview, offset: int) -> None:
    os.preadv(handle, [buffer], offset)


def _write(path: Path, size: int, flags: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags)
    try:
        os.posix_fallocate(handle, 0, size)
        _chunks(size, partial(os.pwrite, handle))
        os.ftruncate(handle, size)  # direct writes are of whole blocks
        os.fsync(handle)
    finally:
        os.close(handle)


def _chunks(size: int, do: Callable[[memoryview, int], object]) -> None:
    """Go through a file chunk by chunk, several at a time."""
    places = count(0, _CHUNK)  # a step of it is one call, which threads cannot break into
    noise = os.urandom(_CHUNK)

    def work() -> None:
        buffer = memoryview(mmap.mmap(-1, _CHUNK))
        buffer[:] = noise
        while (place := next(places)) < size:
            wanted = -(-min(_CHUNK, size - place) // _BLOCK) * _BLOCK
            do(buffer[:wanted], place)

    _together([work] * _DEPTH)


# digesting


def _digest(options: argparse.Namespace) -> dict[str, Any]:
    """Take digests of bytes in memory, the work spread evenly over the hardware threads."""
    shares = cores()
    memory = memoryview(os.urandom(_MEMORY))

    def work() -> None:
        _sha256(memory, options.sha256_bytes // shares)
        _crc32(memory, options.crc32_bytes // shares)

    started = time.perf_counter()
    _together([work] * shares)
    return {"seconds": time.perf_counter() - started}


def _sha256(memory: memoryview, size: int) -> None:
    digest = hashlib.sha256()
    for piece in _pieces(memory, size):
        digest.update(piece)


def _crc32(memory: memoryview, size: int) -> None:
    value = 0
    for piece in _pieces(memory, size):
        value = crc32(piece, value)


def _pieces(memory: memoryview, size: int) -> Iterator[memoryview]:
    """So many bytes, taken from memory piece by piece, over and over."""
    return (memory[place % _MEMORY :][: min(_UPDATE, size - place)] for place in range(0, size, _UPDATE))


# each operation by itself


def _primitives(options: argparse.Namespace) -> dict[str, Any]:
    """Processor seconds of reading, adding, digesting and writing, one after the other on one thread."""
    memory = memoryview(mmap.mmap(-1, _MEMORY))
    memory[:] = os.urandom(_MEMORY)
    works: dict[str, Callable[[], None]] = {
        "read": partial(_read_through, memory, files_of(options.inputs)),
        "add": _adder(options.add_bytes),
        "sha256": partial(_sha256, memory, options.sha256_bytes),
        "crc32": partial(_crc32, memory, options.crc32_bytes),
        "write": partial(_write_through, memory, options.out, options.bytes),
    }
    taken: dict[str, float] = {}
    for name, work in works.items():
        begun = time.process_time()
        work()
        taken[name] = time.process_time() - begun
    return {"seconds": sum(taken.values()), "primitives": taken}


def _read_through(memory: memoryview, files: Sequence[Path]) -> None:
    for path in files:
        with path.open("rb", buffering=0) as file:
            for piece in _pieces(memory, path.stat().st_size):
                file.readinto(piece)


def _write_through(memory: memoryview, path: Path, size: int) -> None:
    with path.open("xb", buffering=0) as file:
        for piece in _pieces(memory, size):
            file.write(piece)


def _adder(size: int) -> Callable[[], None]:
    """What adds float16 numbers, ``size`` bytes of sums."""
    import numkong
    import numpy as np

    random = np.random.default_rng(1)
    elements = _MEMORY // 8  # base, delta and result together pass through as much memory as the other operations
    base, delta = (random.normal(0, scale, elements).astype(np.float16) for scale in (0.02, 0.001))
    result = base.copy()
    step = _UPDATE // 2

    def add() -> None:
        for place in range(0, size // 2, step):
            part = slice(place % elements, place % elements + min(step, size // 2 - place))
            numkong.add(base[part], delta[part], out=result[part])

    return add


if __name__ == "__main__":
    main(sys.argv[1:])
