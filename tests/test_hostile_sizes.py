"""What a bad file may cost: what a good one of its size does, measured from outside the process."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from tests.strategies import write_archive
from tests.test_memory import MIB
from tests.test_state_pickle import PROTO, REBUILD, STORAGE, table, text
from tests.test_zip_records import Entry, archive
from tests.wrong_input import entry, safe

SIZE = 300_000
"""Bytes of most of the headers."""
MANY_NAMES = ",".join(f'"{number:x}":{{"dtype":"U8","shape":[],"data_offsets":[0,0]}}' for number in range(SIZE // 50))
LONG = "x" * 300_000
ACCENTS = ("\u0301" * 50_000 + "\u0323" * 50_000).encode()


def repeated(*parts: bytes) -> bytes:
    """Parts in turn, as often as makes the header large."""
    once = b"".join(parts)
    return once * (SIZE // len(once))


def numbered(form: str) -> bytes:
    """A piece of text for each of many numbers, so that no two are alike."""
    return ",".join(form % number for number in range(SIZE // len(form))).encode()


def small_model(place: Path) -> None:
    save_file({"w": torch.zeros(2).half()}, place / "model.safetensors")


def header(text: bytes) -> Callable[[Path], object]:
    return lambda place: (place / "model.safetensors").write_bytes(safe(text))


def pickle_of(body: bytes) -> Callable[[Path], object]:
    return lambda place: write_archive(place / "pytorch_model.bin", PROTO + body + b".", {"0": bytes(96)})


def beside(name: str, data: bytes) -> Callable[[Path], object]:
    """A good model, with a file beside it."""

    def make(place: Path) -> None:
        small_model(place)
        if name.endswith("index.json"):
            (place / "model.safetensors").rename(place / "model-00001-of-00001.safetensors")
        (place / name).write_bytes(data)

    return make


def tensors(names: Iterable[str], shape: bytes) -> bytes:
    """The pickle of a table of tensors that are one, made of its parts anew for each name."""
    made = REBUILD + b"q\0(" + STORAGE + b"K\0" + shape + b"\x89Ntq\x01R"
    return b"}" + text("first") + made + b"s" + b"".join(text(name) + b"h\0h\x01Rs" for name in names)


def many_records(place: Path) -> None:
    """An archive of more records than two bytes count, which lie about nothing."""
    records = [Entry("a/data.pkl", PROTO + b"}."), *(Entry(f"a/{number:05x}", b"") for number in range(66_000))]
    offset, stored, listed = 0, [], []
    for record in records:
        listed.append(record.listed(offset))
        stored.append(record.stored())
        offset += len(stored[-1])
    start, size, count = offset, sum(map(len, listed)), len(records)
    end64 = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, start + size, 1)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    (place / "pytorch_model.bin").write_bytes(b"".join((*stored, *listed, end64, locator, end)))


def same_record(place: Path) -> None:
    """An archive of many empty records that all are one."""
    one = Entry("a", b"")
    listed = one.listed(0) * 40_000
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 40_000, 40_000, len(listed), len(one.stored()), 0)
    (place / "pytorch_model.bin").write_bytes(one.stored() + listed + end)


def metas_layers(place: Path) -> None:
    """A part that has a tensor each of many layers, and so lacks eight of each."""
    names = (f"layers.{number}.attention.wq.weight" for number in range(1000))
    write_archive(place / "consolidated.00.pth", PROTO + tensors(names, b"K\x18\x85K\x01\x85") + b".", {"0": bytes(96)})
    (place / "params.json").write_text(json.dumps({"dim": 24, "n_layers": 1000, "n_heads": 1}))


def many_tensors(rank: int) -> Callable[[Path], object]:
    """Tensors of a few bytes of pickle each, all of one shape and one storage."""
    shape = b"(" + b"K\x01" * rank + b"tq\x02h\x02"
    return pickle_of(tensors((f"{number:x}" for number in range(SIZE // 16)), shape))


def colliding_memo(place: Path) -> None:
    """What is remembered under numbers whose places in a table of Python's collide: a walk for each."""
    slots, count = 18, 24_000
    mask = (1 << slots) - 1
    walk = [1]
    while len(walk) < (1 << slots) * 3 // 5:
        walk.append((5 * walk[-1] + 1) & mask)
    taken, random, found = set(walk), Random(1), set[int]()
    while len(found) < count:
        number = random.randrange(1 << slots, 1 << 32)
        place_now, rest = number & mask, number
        while place_now in taken and (rest := rest >> 5):
            place_now = (5 * place_now + rest + 1) & mask
        if place_now in taken:
            found.add(number)
    put = b"".join(b"r" + struct.pack("<I", number) for number in (*walk, *found))
    write_archive(place / "pytorch_model.bin", PROTO + b"N" + put + b"}.", {"0": bytes(96)})


def colliding_shapes(place: Path) -> None:
    """Tensors of no elements, of shapes that all have one hash in Python: see tuplehash in Objects/tupleobject.c."""
    most, first, second, start = (1 << 64) - 1, 11400714785074694791, 14029467366897019727, 2870177450012600261
    shapes: list[tuple[int, int, int]] = []
    number = 0
    while len(shapes) < 16_000:
        number += 1
        lane = (start + number * second) & most
        lane = ((lane << 31) | (lane >> 33)) * first & most
        other = (12345 - lane) * pow(second, -1, 1 << 64) & most
        if other < (1 << 61) - 1:
            shapes.append((number, other, 0))
    table = {f"x.{number}": entry(0, 0, shape, "U8") for number, shape in enumerate(shapes)}
    (place / "model.safetensors").write_bytes(safe(json.dumps(table).encode()))


def a_long_name_and_many(place: Path) -> None:
    """A table on a terminal is as wide as its longest cell."""
    names = ["L" * 3_000_000, *(f"{number:x}a" for number in range(50_000))]
    table = {name: entry(0, 0, [0], "U8") for name in names}
    (place / "model.safetensors").write_bytes(safe(json.dumps(table).encode()))


def views_pickle(count: int, elements: int, shape: bytes, strides: bytes) -> bytes:
    """The pickle of so many tensors that are one view of a storage of so many numbers."""
    storage = STORAGE.replace(b"K\x18", b"J" + struct.pack("<i", elements))
    made = REBUILD + b"q\0(" + storage + b"K\0" + shape + strides + b"\x89Ntq\x01R"
    body = b"}" + text("first") + made + b"s"
    body += b"".join(text(f"{number:x}") + b"h\0h\x01Rs" for number in range(count - 1))
    return PROTO + body + b"."


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"


def expanded(place: Path) -> None:
    pickle = views_pickle(100, 1, numbers(16 << 20), numbers(0))
    write_archive(place / "pytorch_model.bin", pickle, {"0": bytes(4)})


def overlapping(place: Path) -> None:
    pickle = views_pickle(1, 5 << 19, numbers(1024, 1024, 16), numbers(1200, 1201, 1100))
    write_archive(place / "pytorch_model.bin", pickle, {"0": bytes(10 << 20)})


HEAVY: dict[str, Callable[[Path], object]] = {
    "header: empty tables": header(b'{"a":[' + repeated(b"{},") + b"1]}"),
    "header: tables of one": header(b'{"a":[' + repeated(b'{"a":1},') + b"1]}"),
    "header: keys": header(b"{" + numbered('"%5x":1') + b"}"),
    "header: tensors of nothing": header(b"{" + MANY_NAMES.encode() + b"}"),
    "header: metadata": header(b'{"__metadata__":{' + numbered('"%5x":""') + b"}}"),
    "header: brackets": header(b'{"a":' + b"[" * SIZE),
    "header: levels": header(b'{"a":' + b"[" * (SIZE // 2) + b"]" * (SIZE // 2) + b"}"),
    "header: a long name": header(json.dumps({LONG: entry()}).encode()),
    "header: a long name twice": header(b'{"%b":1,"%b":1}' % (LONG.encode(), LONG.encode())),
    "header: a long dtype": header(json.dumps({"w": entry(dtype=LONG)}).encode()),
    "header: a long number": header(b'{"w":' + b"9" * SIZE + b"}"),
    "header: a long fraction": header(b'{"w":1.' + b"9" * SIZE + b"}"),
    "header: a long shape": header(b'{"w":{"dtype":"U8","shape":[' + repeated(b"1,") + b'1],"data_offsets":[0,0]}}'),
    "header: escapes": header(b'{"' + repeated(b"\\\\") + b'":1}'),
    "header: zeros": header(bytes(SIZE)),
    "pickle: lists": pickle_of(b"]" + repeated(b"]a")),
    "pickle: tables": pickle_of(b"]" + repeated(b"}K\x01Nsa")),
    "pickle: tuples": pickle_of(b"]" + repeated(b"N\x85a")),
    "pickle: the memo": pickle_of(b")" + b"".join(b"r%b" % struct.pack("<I", n) for n in range(SIZE // 5))),
    "pickle: many tensors": many_tensors(0),
    "pickle: many tensors of many dimensions": many_tensors(32),
    "pickle: a long name": pickle_of(table(text(LONG), b"N")),
    "archive: many records": many_records,
    "archive: one record often": same_record,
    "archive: a long name": lambda place: (place / "pytorch_model.bin").write_bytes(
        archive(*(Entry("a" * 60_000 + str(n)) for n in range(8)))
    ),
    "pickle: numbers that collide": colliding_memo,
    "header: shapes that collide": colliding_shapes,
    "header: a long name and many": a_long_name_and_many,
    "digest: tensors expanded": expanded,
    "digest: elements in each other's place": overlapping,
    "list: a name of accents": beside("SHA256SUMS", b"0" * 64 + b"  " + ACCENTS + b"\n"),
    "index: a name of accents": beside("model.safetensors.index.json", b'{"weight_map":{"w":"' + ACCENTS + b'"}}'),
    "index: files that are not there": beside(
        "model.safetensors.index.json",
        b'{"weight_map":{' + ",".join(f'"{n:x}":"{n:x}.bin"' for n in range(20_000)).encode() + b"}}",
    ),
    "Meta's: many layers": metas_layers,
    "index: keys": beside("model.safetensors.index.json", b'{"weight_map":{' + numbered('"%5x":1') + b"}}"),
    "configuration: keys": beside("config.json", b"{" + numbered('"%5x":1') + b"}"),
    "configuration: empty tables": beside("config.json", b'{"a":[' + repeated(b"{},") + b"1]}"),
    "tokenizer: keys": beside("tokenizer.json", b'{"model":{"vocab":{' + numbered('"%5x":1') + b"}}}"),
    "tokenizer: pieces": beside("tokenizer.model", repeated(b"\x0a\0")),
    "list: lines of digests": beside("SHA256SUMS", repeated(b"\n")),
    "manifest: keys": beside("bayling-delta.json", b"{" + numbered('"%5x":1') + b"}"),
}


APPLY = "apply --base {} --delta {} --out {}-out --dry-run"
COMMANDS = (
    dict.fromkeys(("index", "configuration", "tokenizer"), APPLY)
    | dict.fromkeys(("list", "manifest"), "verify {}")
    | {"digest": "record {}"}
)
"""What reads these files first; all others are inspected."""
RUNS = """
import json, os, sys
from bayling_delta import applying, inspecting, verifying
from bayling_delta.cli import main

for line in sys.stdin:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(writing, 2)
        main(line.split())
    os.close(writing)
    with open(reading, "rb") as errors:
        said = len(errors.read())
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    print(json.dumps([usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime, code, said]), flush=True)
"""
"""Runs the program for each line, in processes whose peaks begin with what the program takes at rest."""


class Cost(NamedTuple):
    """What a run took."""

    memory: int
    """Peak resident bytes."""
    seconds: float
    """Of the processor."""
    code: int
    said: int
    """Bytes on stderr."""


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, Cost]]:
    """The bytes that each case has for the program to read, and what it took; an empty name is a small model."""
    sizes: dict[str, int] = {}
    lines: list[str] = []
    for name, make in ({"": small_model} | HEAVY).items():
        place = tmp_path_factory.mktemp("case")
        make(place)
        command = COMMANDS.get(name.split(":")[0], "inspect {}")
        lines.append(command.replace("{}", str(place)))
        sizes[name] = sum(path.stat().st_size for path in place.iterdir()) * (2 if command == APPLY else 1)
    done = subprocess.run(
        [sys.executable, "-c", RUNS], input="\n".join(lines), capture_output=True, text=True, timeout=300, check=True
    )
    found = [Cost(*json.loads(line)) for line in done.stdout.splitlines()]
    return {name: (size, cost) for (name, size), cost in zip(sizes.items(), found, strict=True)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes that can be measured so")
@pytest.mark.parametrize("name", HEAVY)
def test_a_bad_file_costs_what_its_size_does(costs: dict[str, tuple[int, Cost]], name: str) -> None:
    """JSON takes some 26 bytes of memory a byte, a pickle 36, one of tensors 57; and 2 microseconds."""
    size, cost = costs[name]
    _, at_rest = costs[""]
    assert cost.memory < at_rest.memory + 4 * MIB + 60 * size
    assert cost.seconds < at_rest.seconds + 1.5 + 5e-6 * size
    assert cost.code in (0, 3, 4, 5)
    assert cost.said < 10_000
