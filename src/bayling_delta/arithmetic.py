"""Addition and casts on raw buffers, bit for bit what torch computes on the CPU.

numkong adds float16 and bfloat16 at memory speed, rounding to nearest even; numpy adds float32. numkong is
held to a self-test before it is trusted with weights; where that fails, numpy's slow and exact way is
taken. Elements are flat, little-endian and aligned; bfloat16 is carried as its bits in uint16.

numkong 7.8 rounds correctly, but its casts to bfloat16 turn some NaNs into zeros, so no buffer with a
non-finite element is cast by it: those take the exact way too. Every NaN that is written is the canonical
quiet one, so that the bytes do not depend on the path.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["STORED", "Array", "Operation", "as_float", "differing", "make_addition", "widen"]

Array = npt.NDArray[Any]
Operation = Callable[[Array, Array, Array], int]
"""(out, base, delta) -> the number of non-finite elements written to ``out``. All have the same length."""

STORED: Final[dict[str, type[np.generic]]] = {"F16": np.float16, "BF16": np.uint16, "F32": np.float32}
"""How a dtype's elements are carried in numpy."""

_BLOCK_ELEMENTS: Final = 1 << 16
"""How many elements are cast at once, so that the scratch stays in the processor's cache."""
_NUMKONG: Final[dict[str, Any]] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_INFINITY: Final = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}
_QUIET_NAN: Final = {"F16": 0x7E00, "BF16": 0x7FC0, "F32": 0x7FC00000}
_BITS: Final = {2: (np.uint16, np.int16), 4: (np.uint32, np.int32)}


def make_addition(base_dtype: str, delta_dtype: str, out_dtype: str, *, exact: bool = False) -> Operation:
    """Return the function that writes ``base + delta``, cast to ``out_dtype``.

    The base is cast to the delta's dtype, the sum is rounded to it, and then cast once to ``out_dtype``.
    The function owns scratch memory: use one per thread. ``exact`` takes numpy's way throughout.
    Source: BayLing, apply_delta.py (both models loaded with one ``torch_dtype``, ``tensor += base``).
    """
    if exact or not _is_trusted(base_dtype, delta_dtype, out_dtype):
        return _make_exact(base_dtype, delta_dtype, out_dtype)
    return _make_fast(base_dtype, delta_dtype, out_dtype)


def differing(one: Array, other: Array, dtype: str) -> npt.NDArray[np.intp]:
    """The places at which two arrays have different bits; two NaNs count as the same."""
    bits = _BITS[one.itemsize][0]
    left, right = one.view(bits), other.view(bits)
    if np.array_equal(left, right):
        return np.empty(0, np.intp)
    magnitude = (1 << (8 * one.itemsize - 1)) - 1
    both_nan = (left & magnitude > _INFINITY[dtype]) & (right & magnitude > _INFINITY[dtype])
    return np.flatnonzero((left != right) & ~both_nan)


def as_float(element: Any, dtype: str) -> float:
    """The value of one stored element."""
    return float(widen(np.array([element], STORED[dtype]), dtype)[0])


def _settle_non_finite(array: Array, dtype: str) -> int:
    """Count the elements that are infinite or NaN, and make every NaN the quiet one."""
    if _is_finite(array, dtype):
        return 0
    bits = array.view(_BITS[array.itemsize][0])
    infinity = _INFINITY[dtype]
    sign = 1 << (8 * array.itemsize - 1)
    bits[bits & (sign - 1) > infinity] = _QUIET_NAN[dtype]
    return int(np.count_nonzero(bits & infinity == infinity))


def _is_finite(array: Array, dtype: str) -> bool:
    """Whether no element is infinite or NaN. Infinity's bits are a bound on the finite ones of either sign."""
    unsigned, signed = _BITS[array.itemsize]
    infinity = _INFINITY[dtype]
    sign = 1 << (8 * array.itemsize - 1)
    return not array.size or bool(
        np.maximum.reduce(array.view(signed)) < infinity and np.maximum.reduce(array.view(unsigned)) < sign | infinity
    )


# numkong's way


def _tensor(array: Array, dtype: str) -> Any:
    """The array as numkong takes it; only bfloat16, which numpy does not have, needs a wrapper."""
    if dtype != "BF16":
        return array
    import numkong

    return numkong.from_pointer(array.ctypes.data, array.shape, _NUMKONG[dtype], owner=array)


def _fast_add(out: Array, left: Array, right: Array, dtype: str) -> None:
    if dtype == "F32":
        np.add(left, right, out=out)
    else:
        import numkong

        numkong.add(_tensor(left, dtype), _tensor(right, dtype), out=_tensor(out, dtype))


def _fast_cast(out: Array, values: Array, dtype: str, out_dtype: str) -> None:
    import numkong

    numkong.astype(_tensor(values, dtype), _NUMKONG[out_dtype], out=_tensor(out, out_dtype))


def _make_fast(base_dtype: str, delta_dtype: str, out_dtype: str) -> Operation:
    exact = _make_exact(base_dtype, delta_dtype, out_dtype)
    cast_base, cast_sum = base_dtype != delta_dtype, out_dtype != delta_dtype
    if not cast_base and not cast_sum:

        def add(out: Array, base: Array, delta: Array) -> int:
            with np.errstate(over="ignore", invalid="ignore"):
                _fast_add(out, base, delta, delta_dtype)
            return _settle_non_finite(out, delta_dtype)

        return add

    scratch = np.empty(_BLOCK_ELEMENTS, STORED[delta_dtype])
    total = np.empty(_BLOCK_ELEMENTS, STORED[delta_dtype])

    def cast_and_add(out: Array, base: Array, delta: Array) -> int:
        found = 0
        for start in range(0, out.size, _BLOCK_ELEMENTS):
            piece = slice(start, start + _BLOCK_ELEMENTS)
            here, left, right = out[piece], base[piece], delta[piece]
            sums = total[: here.size] if cast_sum else here
            fine = not cast_base or _is_finite(left, base_dtype)
            if fine and cast_base:
                left = scratch[: here.size]
                _fast_cast(left, base[piece], base_dtype, delta_dtype)
            if fine:
                with np.errstate(over="ignore", invalid="ignore"):
                    _fast_add(sums, left, right, delta_dtype)
                fine = _is_finite(sums, delta_dtype)
            if fine and cast_sum:
                _fast_cast(here, sums, delta_dtype, out_dtype)
                fine = _is_finite(here, out_dtype)
            if not fine:
                found += exact(here, base[piece], right)
        return found

    return cast_and_add


# numpy's way


def widen(values: Array, dtype: str) -> npt.NDArray[np.float32]:
    """As float32, which holds every float16 and bfloat16 exactly; always a copy."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _round(values: npt.NDArray[np.float32], dtype: str) -> Array:
    """From float32 to ``dtype``, to nearest even, NaN made canonical."""
    if dtype == "BF16":
        bits = values.view(np.uint32)
        rounded: Array = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    else:
        rounded = values.astype(STORED[dtype])
    rounded.view(_BITS[rounded.itemsize][0])[np.isnan(values)] = _QUIET_NAN[dtype]
    return rounded


def _make_exact(base_dtype: str, delta_dtype: str, out_dtype: str) -> Operation:
    """A float16 or bfloat16 sum computed in float32 and rounded once is the sum rounded once: no double rounding."""

    def add(out: Array, base: Array, delta: Array) -> int:
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, out.size, _BLOCK_ELEMENTS):
                piece = slice(start, start + _BLOCK_ELEMENTS)
                left = widen(_round(widen(base[piece], base_dtype), delta_dtype), delta_dtype)
                total = _round(left + widen(delta[piece], delta_dtype), delta_dtype)
                out[piece] = _round(widen(total, delta_dtype), out_dtype)
        return _settle_non_finite(out, out_dtype)

    return add


# trust


def _is_trusted(base_dtype: str, delta_dtype: str, out_dtype: str) -> bool:
    """Whether numkong is there and does right what this addition needs of it."""
    try:
        import numkong  # noqa: F401
    except ImportError:
        return False
    return (
        _adds_right(delta_dtype)
        and (base_dtype == delta_dtype or _casts_right(base_dtype, delta_dtype))
        and (delta_dtype == out_dtype or _casts_right(delta_dtype, out_dtype))
    )


@cache
def _adds_right(dtype: str) -> bool:
    """Compare with the exact way on every finite 16-bit pattern, with partners that cancel, round and overflow.

    Takes milliseconds, on the processor and the build that will add the weights.
    """
    if dtype == "F32":
        return True  # numpy adds these
    left = _finite_patterns(dtype)
    for right in (left[::-1].copy(), np.roll(left, 1), left[np.arange(left.size) * 40503 % left.size]):
        ours, reference = np.empty_like(left), np.empty_like(left)
        with np.errstate(over="ignore"):
            _fast_add(ours, left, right, dtype)
        _make_exact(dtype, dtype, dtype)(reference, left, right)
        if ours.tobytes() != reference.tobytes():
            return False
    return True


@cache
def _casts_right(dtype: str, out_dtype: str) -> bool:
    """The same for a cast, with float32 values on, just above and just below what the narrower dtypes hold."""
    if dtype == "F32":
        held = np.concatenate([widen(_finite_patterns(kind), kind) for kind in ("F16", "BF16")]).view(np.uint32)
        steps = (held + np.uint32(step) for step in (0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001))
        values: Array = np.concatenate(list(steps)).view(np.float32)
        values = values[np.isfinite(values)]
    else:
        values = _finite_patterns(dtype)
    ours = np.empty(values.size, STORED[out_dtype])
    _fast_cast(ours, values, dtype, out_dtype)
    with np.errstate(over="ignore"):
        return ours.tobytes() == _round(widen(values, dtype), out_dtype).tobytes()


def _finite_patterns(dtype: str) -> Array:
    every = np.arange(1 << 16, dtype=np.uint16)
    finite: Array = every[every & _INFINITY[dtype] != _INFINITY[dtype]].view(STORED[dtype])
    return finite
