"""The addition and casts against torch, on every float16 and on every path that this machine has."""

import itertools
from collections.abc import Iterator

import numkong
import numpy as np
import pytest
import torch

from bayling_delta import arithmetic
from bayling_delta.arithmetic import STORED, Array, make_addition
from tests.pairs import bits

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
EVERY = np.arange(1 << 16, dtype=np.uint16)
SIMD = [name for name, present in numkong.get_capabilities().items() if present and name != "serial"]
PATHS = [None, *SIMD, "serial", "exact"]
"""Everything on; each SIMD family off by itself; all off; numpy alone."""


@pytest.fixture(params=PATHS, ids=lambda path: f"without-{path}" if path in SIMD else path or "all")
def exact(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether to take numpy's way; else numkong with some of its kernels switched off, as the parameter says."""
    off = SIMD if request.param == "serial" else [request.param] if request.param in SIMD else []
    for name in off:
        numkong.disable_capability(name)
    yield request.param == "exact"
    for name in off:
        numkong.enable_capability(name)


def as_torch(array: Array, dtype: str) -> torch.Tensor:
    signed = array.view(np.int16 if array.itemsize == 2 else np.int32)
    return torch.from_numpy(signed.copy()).view(TORCH[dtype])


def expected(base: Array, delta: Array, dtypes: tuple[str, str, str]) -> torch.Tensor:
    left, right = as_torch(base, dtypes[0]), as_torch(delta, dtypes[1])
    return (left.to(right.dtype) + right).to(TORCH[dtypes[2]])


def check(base: Array, delta: Array, dtypes: tuple[str, str, str], *, exact: bool) -> None:
    out = np.empty(base.size, STORED[dtypes[2]])
    found = make_addition(*dtypes, exact=exact)(out, base, delta)
    reference = expected(base, delta, dtypes)
    assert torch.equal(bits(as_torch(out, dtypes[2])), bits(reference))
    assert found == int((~reference.isfinite()).sum())


def partners() -> Array:
    """Right operands for every left one: zeros, subnormals, the ends of binades, infinities, NaN, and a random rest."""
    random = np.random.default_rng(0).integers(0, 1 << 16, 24, dtype=np.uint16)
    chosen = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x83FF, 0x0400, 0x8400, 0x3BFF, 0x3C00, 0x3C01, 0xBC00]
    chosen += [0x7BFF, 0xFBFF, 0x7BFE, 0x7C00, 0xFC00, 0x7C01, 0x7E00, 0xFE00, 0xFFFF, 0x5BFF, 0x6400, 0xE801]
    return np.concatenate([np.array(chosen, np.uint16), random])


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_pattern_against_partners(dtype: str, exact: bool) -> None:
    """All 65,536 left operands with partners of every kind, and with each other in several orders."""
    for partner in partners():
        check(EVERY.view(STORED[dtype]), np.full_like(EVERY, partner).view(STORED[dtype]), (dtype,) * 3, exact=exact)
    for factor in (1, 3, 40503, 65535):
        other = (EVERY.astype(np.uint32) * factor).astype(np.uint16)
        check(EVERY.view(STORED[dtype]), other.view(STORED[dtype]), (dtype,) * 3, exact=exact)


def hard_values(dtype: str) -> Array:
    """Every pattern of a 16-bit dtype; for float32, everything on, above, below and half-way between float16s."""
    if dtype != "F32":
        return EVERY.view(STORED[dtype])
    halves = EVERY.view(np.float16).astype(np.float32).view(np.uint32)
    brains = EVERY.astype(np.uint32) << 16
    steps = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    values = np.concatenate([held + np.uint32(step) for held in (halves, brains) for step in steps])
    random = np.random.default_rng(1).integers(0, 1 << 32, 1 << 16, dtype=np.uint64).astype(np.uint32)
    return np.concatenate([values, random]).view(np.float32)


@pytest.mark.parametrize("dtypes", list(itertools.product(STORED, repeat=3)), ids="-".join)
def test_every_combination_of_dtypes(dtypes: tuple[str, str, str], exact: bool) -> None:
    """Base rounded to the delta's dtype, added in it, cast once to the result's: as torch does it."""
    base, delta = hard_values(dtypes[0]), hard_values(dtypes[1])
    size = min(base.size, delta.size)
    base, delta = base[:size].copy(), np.roll(delta, 77)[:size].copy()
    check(base, delta, dtypes, exact=exact)
    check(base, np.zeros_like(delta), dtypes, exact=exact)


@pytest.mark.parametrize("dtypes", list(itertools.product(STORED, repeat=3)), ids="-".join)
def test_finite_sums_take_the_fast_way_and_agree(dtypes: tuple[str, str, str]) -> None:
    """Ordinary weights, in lengths around the block size, so that no non-finite value sends them the exact way."""
    random = torch.Generator().manual_seed(3)
    for size in (1, 2, 31, 65_535, 65_536, 65_537, 200_001):
        base = torch.randn(size, generator=random).to(TORCH[dtypes[0]])
        delta = (torch.randn(size, generator=random) / 64).to(TORCH[dtypes[1]])
        arrays = [
            tensor.view(torch.int16 if tensor.itemsize == 2 else torch.int32).numpy().view(STORED[dtype])
            for tensor, dtype in ((base, dtypes[0]), (delta, dtypes[1]))
        ]
        check(arrays[0], arrays[1], dtypes, exact=False)


def test_nan_is_written_the_same_on_every_path(exact: bool) -> None:
    for dtype, quiet in (("F16", 0x7E00), ("BF16", 0x7FC0)):
        infinity = 0x7C00 if dtype == "F16" else 0x7F80
        nans = EVERY[infinity < EVERY & 0x7FFF]
        out = np.empty(nans.size, STORED[dtype])
        found = make_addition(dtype, dtype, dtype, exact=exact)(
            out, nans.view(STORED[dtype]), np.zeros(nans.size, STORED[dtype])
        )
        assert found == nans.size
        assert set(out.view(np.uint16)) == {quiet}


def test_a_kernel_that_is_wrong_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """If numkong rounded otherwise on some machine, the exact way would be taken, and the sum be right."""

    def truncating(out: Array, left: Array, right: Array, _dtype: str) -> None:
        wide = left.astype(np.float32) + right.astype(np.float32)
        out[:] = (wide.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float16)

    monkeypatch.setattr(arithmetic, "_fast_add", truncating)
    arithmetic._adds_right.cache_clear()
    try:
        check(EVERY.view(np.float16), np.roll(EVERY, 1).view(np.float16), ("F16", "F16", "F16"), exact=False)
        assert not arithmetic._is_trusted("F16", "F16", "F16")
    finally:
        arithmetic._adds_right.cache_clear()


def test_numkong_is_trusted_here() -> None:
    """The fast way is the one that the other tests try, not its fallback."""
    for dtypes in itertools.product(STORED, repeat=3):
        assert arithmetic._is_trusted(*dtypes), dtypes
