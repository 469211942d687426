"""JSON from files that are not trusted: no key twice, no surprise but `ValueError`."""

import json
from typing import Any, Final

__all__ = ["load_strict"]

_MOST_DIGITS: Final = 60
_DIGITS_AS_0: Final = bytes(48 if 48 <= byte < 58 else 32 for byte in range(256))
_BLOCK: Final = 1 << 20


def load_strict(data: bytes, most_tables: int = 1_000_000) -> Any:
    """Parse UTF-8 JSON.

    Raises:
        ValueError: it is not JSON, nests too deep, has more than ``most_tables`` tables and lists, or has a key
            twice in one table, of which readers would take one or the other, or a number of very many digits.
    """
    if data.count(b"[") + data.count(b"{") > most_tables:  # a few bytes of JSON can take a hundred of memory
        raise ValueError(f"it has more than {most_tables:,} tables and lists")
    integer = _integer if _has_long_number(data) else None  # a call for each number takes its time
    try:
        text = data.decode("utf-8")
        del data  # where the caller keeps none, this is the last one: parsing takes memory enough
        return json.loads(text, object_pairs_hook=_table, parse_int=integer)
    except RecursionError as error:
        raise ValueError("it nests too deep") from error
    except UnicodeDecodeError as error:  # whose own text would have all of the data in it
        raise ValueError(f"it is not UTF-8 at byte {error.start:,}") from error


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
                raise ValueError(f"it has {name!r} twice")
            seen.add(name)
    return table
