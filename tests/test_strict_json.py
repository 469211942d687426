"""JSON from strangers: the same as Python reads, or refused before it costs anything."""

import json
import sys
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bayling_delta.strict_json import load_strict

TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('"\\[]{},:'), max_size=6)
"""Strings with everything in them that has a meaning outside."""
ATOMS = st.none() | st.booleans() | st.integers(-(10**50), 10**50) | st.floats(allow_nan=False) | TEXTS
VALUES = st.recursive(ATOMS, lambda part: st.lists(part, max_size=4) | st.dictionaries(TEXTS, part, max_size=4))


@given(VALUES, st.booleans(), st.sampled_from([None, 1]))
def test_json_is_what_python_reads(value: Any, ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert load_strict(text.encode()) == json.loads(text) == value


# levels


def levels(value: Any) -> int:
    """How deep it nests, by walking through it."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if parts is None else 1 + max(map(levels, parts), default=0)


@given(VALUES, st.integers(90, 110), st.sampled_from(["[%s]", '{"\\"[":%s}', '["]", %s, "[{"]', '[{}, %s, {"a": []}]']))
def test_a_hundred_levels_are_read_and_no_more(value: Any, depth: int, around: str) -> None:
    text = json.dumps(value)
    for _ in range(depth):
        text = around.replace("%s", text)
    whole = json.loads(text)
    if levels(whole) <= 100:
        assert load_strict(text.encode()) == whole
    else:
        with pytest.raises(ValueError, match="nests too deep"):
            load_strict(text.encode())


UNENDING = ["[", '{"a":', "[[]," * 3, '["]",', '{"\\\\":', '["a\\"",[],']


@pytest.mark.parametrize("opening", UNENDING)
@pytest.mark.parametrize("closing", ["", "]", "}", "]}", '"', '"]', "\\", "]" * 9])
@pytest.mark.parametrize("depth", [200, 100_000])
def test_what_never_ends_is_not_followed(opening: str, closing: str, depth: int) -> None:
    """It is not JSON; still no parser may go deeper into it than it can."""
    data = (opening * depth + closing * depth).encode()
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len_of_stack() + 250)
    try:
        with pytest.raises(ValueError, match=r"nests too deep|Expecting|Extra data|Unterminated|Invalid"):
            load_strict(data)
    finally:
        sys.setrecursionlimit(limit)


def len_of_stack() -> int:
    """How many frames there are now."""
    frame, count = sys._getframe(), 0
    while frame.f_back is not None:
        frame, count = frame.f_back, count + 1
    return count


# values

MANY: dict[str, bytes] = {
    "tables in a list": b"[" + b"{}," * 2_000_001 + b"1]",
    "lists in a list": b"[" + b"[]," * 2_000_001 + b"1]",
    "numbers in a list": b"[" + b"1," * 4_000_001 + b"1]",
    "keys in a table": b"{" + b",".join(b'"%x":1' % number for number in range(2_000_001)) + b"}",
    "strings in a list": b"[" + b'"ab",' * 4_000_001 + b'""]',
}


@pytest.mark.parametrize("data", MANY.values(), ids=MANY)
def test_values_are_counted_before_they_are_made(data: bytes) -> None:
    """Each byte could become twenty-six."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="more than 4,000,000 values"):
            load_strict(data)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(data)
    finally:
        tracemalloc.stop()


DENSE: dict[str, bytes] = {
    "tables": b"[" + b"{}," * 100_000 + b"1]",
    "tables of one": b"[" + b'{"a":1},' * 40_000 + b"1]",
    "lists": b"[" + b"[]," * 100_000 + b"1]",
    "keys": b"{" + b",".join(b'"%x":1' % number for number in range(30_000)) + b"}",
    "keys of other letters": b"{" + ",".join(f'"\U0001f600{number:x}":1' for number in range(30_000)).encode() + b"}",
    "brackets in strings": b"[" + b'"[",' * 75_000 + b"1]",
    "escapes": b'["' + b"\\\\" * 150_000 + b'"]',
    "fractions": b"[" + b"1.5," * 75_000 + b"1]",
    "long fractions": b"[1." + b"1" * 300_000 + b"]",
}


@pytest.mark.parametrize("data", DENSE.values(), ids=DENSE)
def test_memory_is_in_proportion_to_the_text(data: bytes) -> None:
    tracemalloc.start()
    try:
        load_strict(data)
        assert tracemalloc.get_traced_memory()[1] < 32 * len(data)
    finally:
        tracemalloc.stop()


# keys and numbers


def test_a_key_twice_is_named_and_not_at_length() -> None:
    with pytest.raises(ValueError, match=r"^it has 'aaaa.*…' twice$") as caught:
        load_strict(b'{"%b":1,"%b":2}' % (b"a" * 100_000, b"a" * 100_000))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("digits", [60, 61, 5000, 100_000])
def test_a_number_of_many_digits(digits: int) -> None:
    data = b'{"a": -' + b"1" * digits + b"}"
    if digits == 60:
        assert load_strict(data) == {"a": -int("1" * 60)}
    else:
        with pytest.raises(ValueError, match=f"a number of {digits + 1:,} digits"):
            load_strict(data)


def test_what_is_not_utf8_is_placed() -> None:
    with pytest.raises(ValueError, match=r"^it is not UTF-8 at byte 2$"):
        load_strict(b'["\xff' + b"a" * 1000)
