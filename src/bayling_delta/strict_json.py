"""JSON from files that are not trusted: no key twice, no surprise but `ValueError`."""

import json
from typing import Any

__all__ = ["load_strict"]


def load_strict(data: bytes) -> Any:
    """Parse UTF-8 JSON.

    Raises:
        ValueError: it is not JSON, nests too deep, or has a key twice in one table, of which readers would
            take one or the other.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_table)
    except RecursionError as error:
        raise ValueError("it nests too deep") from error


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"it has {name!r} twice")
            seen.add(name)
    return table
