"""JSON from files that are not trusted: no key twice, no surprise but `ValueError`.

Parsed, a byte of JSON takes up to some 26 bytes of memory, and a level of it a frame of the interpreter's stack.
So values and levels are counted before anything is parsed.
"""

import json
from itertools import accumulate
from typing import Any, Final

from bayling_delta.errors import shown

__all__ = ["load_strict"]

_MOST_VALUES: Final = 4_000_000
"""Twice those of the largest tokenizers, or of an index of a million tensors."""
_MOST_LEVELS: Final = 100
"""Ten times as many as real files have, and far fewer than any interpreter can take."""
_MOST_DIGITS: Final = 60
_DIGITS_AS_0: Final = bytes(48 if 48 <= byte < 58 else 32 for byte in range(256))
_BLOCK: Final = 1 << 20
_NO_SEPARATORS: Final = bytes(byte for byte in range(256) if byte not in b",:[{")
_NO_BRACKETS: Final = bytes(byte for byte in range(256) if byte not in b'"[]{}')
_ONE_KIND: Final = bytes.maketrans(b"{}", b"[]")
_CLOSING: Final = ord("]")
"""Two more than the opening one."""


def load_strict(data: bytes, most_values: int = _MOST_VALUES) -> Any:
    """Parse UTF-8 JSON.

    Raises:
        ValueError: it is not JSON, nests deeper than any real file, has more than ``most_values`` keys, values, tables
            and lists, or has a key twice in one table, of which readers would take one or the other, or a number of
            very many digits.
    """
    # Each but the first has one of these before it; those that stand in strings are few, and counted too.
    if len(data.translate(None, _NO_SEPARATORS)) > most_values:
        raise ValueError(f"it has more than {most_values:,} values")
    if _levels(data) > _MOST_LEVELS:
        raise ValueError("it nests too deep")
    integer = _integer if _has_long_number(data) else None  # a call for each number takes its time
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:  # whose own text would have all of the data in it
        raise ValueError(f"it is not UTF-8 at byte {error.start:,}") from error
    del data  # where the caller keeps none, this is the last one: parsing takes memory enough
    return json.loads(text, object_pairs_hook=_table, parse_int=integer)


def _levels(data: bytes) -> int:
    """How deep tables and lists nest; some 3 ms a MB.

    Of what is not JSON it is as many at least as a parser enters before it notices.
    """
    if b"\\" in data:
        data = data.replace(rb"\\", b"").replace(rb"\"", b"")  # a quote that is left begins or ends a string
    marks = data.translate(_ONE_KIND, _NO_BRACKETS).replace(b'""', b"")  # which changes nothing around it
    brackets = b"".join(marks.split(b'"')[::2])  # those outside strings
    outer = brackets.replace(b"[]", b"")  # without the innermost, which are most of them
    return bool(brackets) + max(accumulate(_CLOSING - 1 - bracket for bracket in outer), default=0)


def _has_long_number(data: bytes) -> bool:
    """Whether there are more digits in a row, anywhere, than a number may have. Some 1 ms a MB; `re` takes 20."""
    long = b"0" * (_MOST_DIGITS + 1)
    blocks = (data[start : start + _BLOCK + _MOST_DIGITS] for start in range(0, len(data), _BLOCK))
    return any(long in block.translate(_DIGITS_AS_0) for block in blocks)


def _integer(digits: str) -> int:
    """A whole number; one of more digits than any size or count has would fill a message."""
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"it has a number of {len(digits):,} digits")
    return int(digits)


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"it has {shown(name)!r} twice")
            seen.add(name)
    return table
