"""Hostile input: good examples spoiled at random, and the bounds within which each is to be read or refused."""

import base64
import copy
import json
import re
import signal
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from bayling_delta.errors import KINDS, BaylingDeltaError

SECONDS = 20
"""By the clock, for one case: a hundred times what the slowest takes, so that only what hangs is met."""
SPARE_BYTES = 1 << 20
"""What a case may take whatever its size."""
FACTOR = 150
"""What it may take for each byte of input: JSON and pickles can make an object of some hundred with one or two."""
LONGEST = 1 << 16
"""Bytes to which a case may grow."""

# what spoils an example

INTEGERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)
NUMBERS = (
    *(str(number).encode() for number in (0, -1, 1 << 31, 1 << 32, 1 << 53, 1 << 63, 1 << 64)),
    *(b"1.5", b"1e999", b"-0", b"NaN", b"9" * 60, b"9" * 5000),
)
RUNS = (b"[", b"{", b"(", b"]", b'{"a":', b"[[", b"\x00", b"\xff", b"0", b'"', b"\n", b" ")
JSON_WORDS = (
    *(b"{", b"}", b"[", b"]", b":", b",", b'"', b"\\", b"\\u0000", b"\\ud800", b"null", b"true", b"false", b"{}"),
    *(
        b"[]",
        b'""',
        b'"a"',
        b"-1",
        b"1.5",
        b"1e999",
        b"NaN",
        b"Infinity",
        b"..",
        b"/",
        b"\x1b",
        b"\x7f",
        b"\xe2\x80\xae",
    ),
)

Change = Callable[[Random, bytes, Sequence[bytes], Sequence[bytes]], bytes]
"""Given a random source, what is to be changed, all examples, and words of the format."""


def _place(random: Random, data: bytes) -> int:
    return random.randrange(len(data) + 1)


def _piece(random: Random, data: bytes) -> tuple[int, int]:
    """Where a piece begins and ends: most are short."""
    start = _place(random, data)
    return start, start + random.randrange(1 + min(len(data) - start, random.choice((1, 2, 8, 64, LONGEST))))


def _flip_a_bit(random: Random, data: bytes, _: Sequence[bytes], __: Sequence[bytes]) -> bytes:
    return _set(data, random, lambda byte: byte ^ 1 << random.randrange(8))


def _set_a_byte(random: Random, data: bytes, _: Sequence[bytes], __: Sequence[bytes]) -> bytes:
    return _set(data, random, lambda _: random.randrange(256))


def _set(data: bytes, random: Random, value: Callable[[int], int]) -> bytes:
    if not data:
        return data
    place = random.randrange(len(data))
    return data[:place] + bytes([value(data[place])]) + data[place + 1 :]


def _insert(random: Random, data: bytes, _: Sequence[bytes], __: Sequence[bytes]) -> bytes:
    place = _place(random, data)
    return data[:place] + random.randbytes(random.randrange(1, 5)) + data[place:]


def _leave_out(random: Random, data: bytes, _: Sequence[bytes], __: Sequence[bytes]) -> bytes:
    start, end = _piece(random, data)
    return data[:start] + data[end:]


def _repeat(random: Random, data: bytes, _: Sequence[bytes], __: Sequence[bytes]) -> bytes:
    start, end = _piece(random, data)
    piece = data[start:end]
    most = LONGEST // max(1, len(piece))
    return data[:end] + piece * min(most, random.choice((1, 1, 2, 10, 1000, LONGEST))) + data[end:]


def _move(random: Random, data: bytes, _: Sequence[bytes], __: Sequence[bytes]) -> bytes:
    start, end = _piece(random, data)
    rest = data[:start] + data[end:]
    place = _place(random, rest)
    return rest[:place] + data[start:end] + rest[place:]


def _exchange_everywhere(random: Random, data: bytes, _: Sequence[bytes], __: Sequence[bytes]) -> bytes:
    """What is said in two places stays the same in both: a name, a number."""
    start, end = _piece(random, data)
    other_start, other_end = _piece(random, data)
    if end - start < 2:
        return data
    return data.replace(data[start:end], data[other_start:other_end])


def _splice(random: Random, data: bytes, examples: Sequence[bytes], _: Sequence[bytes]) -> bytes:
    other = random.choice(examples)
    return data[: _place(random, data)] + other[_place(random, other) :]


def _cut_short(random: Random, data: bytes, _: Sequence[bytes], __: Sequence[bytes]) -> bytes:
    return data[: _place(random, data)]


def _write_an_integer(random: Random, data: bytes, _: Sequence[bytes], __: Sequence[bytes]) -> bytes:
    size = random.choice((1, 2, 4, 8))
    place = _place(random, data)
    number = random.choice(INTEGERS) + random.choice((-1, 0, 0, 0, 1))
    return data[:place] + (number % (1 << 8 * size)).to_bytes(size, "little") + data[place + size :]


def _write_a_number(random: Random, data: bytes, _: Sequence[bytes], __: Sequence[bytes]) -> bytes:
    digits = list(re.finditer(rb"-?[0-9]+", data))
    if not digits:
        return data
    start, end = random.choice(digits).span()
    return data[:start] + random.choice(NUMBERS) + data[end:]


def _insert_a_run(random: Random, data: bytes, _: Sequence[bytes], __: Sequence[bytes]) -> bytes:
    """Half of the time where a value may begin, so that what opens is not just part of a string."""
    openings = [place.end() for place in re.finditer(rb"[:,\[]", data)]
    place = random.choice(openings) if openings and random.random() < 0.5 else _place(random, data)
    return data[:place] + random.choice(RUNS) * random.choice((10, 300, 1000, 20_000)) + data[place:]


def _insert_a_word(random: Random, data: bytes, _: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    place = _place(random, data)
    return data[:place] + random.choice(words) + data[place:]


def _exchange_a_word(random: Random, data: bytes, _: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    found = [word for word in words if word in data]
    if not found:
        return data
    word = random.choice(found)
    start = random.choice([place.start() for place in re.finditer(re.escape(word), data)])
    return data[:start] + random.choice(words) + data[start + len(word) :]


_CHANGES: tuple[Change, ...] = (
    _flip_a_bit,
    _set_a_byte,
    _insert,
    _leave_out,
    _repeat,
    _move,
    _exchange_everywhere,
    _splice,
    _cut_short,
    _write_an_integer,
    _write_a_number,
    _insert_a_run,
    _insert_a_word,
    _exchange_a_word,
)


def spoiled(random: Random, examples: Sequence[bytes], words: Sequence[bytes] = JSON_WORDS) -> bytes:
    """One of the examples after a few changes."""
    data = random.choice(examples)
    for _ in range(random.choice((1, 1, 1, 2, 3, 5))):
        data = random.choice(_CHANGES)(random, data, examples, words)[:LONGEST]
    return data


# documents that are nearly right

_TEXTS = st.text(st.characters(), max_size=8) | st.sampled_from(
    ["", ".", "..", "../x", "a/b", "\0", "\ud800", "\x1b[2J", "__metadata__", "sha256:", "x" * 300, "0" * 64]
)
_NUMBERS = st.integers() | st.floats() | st.sampled_from([-1, 0, 1, 2**31, 2**53, 2**63, 2**64, 10**59, 1e308])
_VALUES = st.recursive(
    st.none() | st.booleans() | _NUMBERS | _TEXTS,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(_TEXTS, values, max_size=3),
    max_leaves=4,
)


def _somewhere(draw: st.DrawFn, table: Any) -> tuple[Any, Any]:
    """A table or list of a document, and a key in it; what lies in few others is as likely as what lies in many."""
    while True:
        key = draw(st.sampled_from(list(table) if isinstance(table, dict) else range(len(table))))
        if not isinstance(table[key], dict | list) or not table[key] or draw(st.booleans()):
            return table, key
        table = table[key]


@st.composite
def documents(draw: st.DrawFn, good: Any) -> Any:
    """A good JSON document of which something, anywhere, is another value, left out, or somewhere else too."""
    document = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        if not document:
            break
        table, key = _somewhere(draw, document)
        match draw(st.integers(0, 5)):
            case 0:
                del table[key]
            case 1 if isinstance(table, dict):
                table[draw(_TEXTS)] = table[key]
            case 2:
                other, place = _somewhere(draw, good)
                table[key] = copy.deepcopy(other[place])
            case _:
                table[key] = draw(_VALUES)
    return document


def as_json(document: Any) -> bytes:
    """JSON, with escapes for what has no encoding."""
    return json.dumps(document).encode()


# reading a case


class HangError(BaseException):
    """A case took longer than it may; no handler of exceptions may take it for its own."""


@contextmanager
def _no_hang() -> Iterator[None]:
    def ring(_: int, __: FrameType | None) -> None:
        raise HangError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Target:
    """Something that reads bytes which anybody may have written."""

    examples: Sequence[bytes]
    """Good ones."""
    read: Callable[[bytes], object]
    """Reads them, and asserts what must be true of all that is accepted."""
    spoil: Callable[[Random], bytes]
    """Makes a case of them."""
    near: st.SearchStrategy[bytes] | None = None
    """Documents that are nearly right."""
    spare_bytes: int = SPARE_BYTES


@dataclass
class Campaign:
    """Cases that one target read, and how that went."""

    name: str
    target: Target
    measured: int = 1
    """Of so many cases the memory of one is measured, which takes three times as long."""
    accepted: int = 0
    refused: int = 0
    peak_bytes: int = 0
    """The most that one case took, without the input."""
    slowest: float = 0.0
    """Seconds."""

    def case(self, label: str, data: bytes) -> None:
        """Have the target read one case; nothing but an exception of ours may come out, within the bounds."""
        peak = 0
        if (self.accepted + self.refused) % self.measured == 0:
            tracemalloc.start()
        began = time.perf_counter()
        try:
            with _no_hang():
                accepted = self._is_accepted(data)
            _, peak = tracemalloc.get_traced_memory()  # 0 where it is not measured
            if peak > self.target.spare_bytes + FACTOR * len(data):
                raise AssertionError(f"{peak:,} bytes of memory for {len(data):,} bytes of input")
        except (Exception, HangError) as error:
            shown = base64.b64encode(zlib.compress(data, 9)).decode()
            message = f"{self.name}, {label}: {type(error).__name__}: {str(error)[:500]}; the case, deflated: {shown}"
            raise AssertionError(message) from error
        finally:
            tracemalloc.stop()
        self.accepted += accepted
        self.refused += not accepted
        self.peak_bytes = max(self.peak_bytes, peak)
        self.slowest = max(self.slowest, time.perf_counter() - began)

    def _is_accepted(self, data: bytes) -> bool:
        try:
            self.target.read(data)
        except BaylingDeltaError as error:
            if not error.problems or any(problem.kind not in KINDS for problem in error.problems):
                raise AssertionError("it does not say what is wrong") from error
            return False
        return True

    def run(self, cases: int, first_seed: int) -> None:
        """Read the good examples, then so many spoiled ones; a quarter are documents, if the target has any."""
        for example in self.target.examples:
            self.target.read(example)
        structured = 0 if self.target.near is None else cases // 4
        for number in range(cases - structured):
            label = f"{first_seed}/{self.name}/{number}"
            self.case(f"seed {label}", self.target.spoil(Random(label)))
        if self.target.near is not None and structured:
            self._run_documents(self.target.near, structured, first_seed)

    def _run_documents(self, near: st.SearchStrategy[bytes], cases: int, first_seed: int) -> None:
        @seed(first_seed)
        @settings(max_examples=cases, database=None, deadline=None, suppress_health_check=list(HealthCheck))
        @given(near)
        def read(data: bytes) -> None:
            self.case("a document", data)

        read()
