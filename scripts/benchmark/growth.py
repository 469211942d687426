"""Whether a gigabyte always costs the same: with the size of a model, the number of its files and of its tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from benchmark.contenders import parse
from benchmark.pairs import Wanted
from benchmark.session import Session, TooLittleDiskError, say
from benchmark.shapes import SHAPES, Shape, many_tensors

__all__ = ["measure_growth"]

_FILES: Final = (1, 2, 5, 10, 20, 40)


def measure_growth(session: Session, largest: Shape, sparse: Shape, cut: Shape, tensors: int, rounds: int) -> None:
    """Run what shows it; a size that does not fit the disk is left out, and said to be."""
    for shape in _up_to(largest):
        _measure(session, Wanted(shape), "ours+phases=on", rounds)
    for shape in _up_to(sparse):
        _measure(session, Wanted(shape, "sparse"), "plan,ours+sink=off", rounds)
    for files in _FILES:
        _measure(session, Wanted(cut, shards=files), "ours+phases=on", rounds)
    for container in ("safetensors", "bin"):
        _measure(session, Wanted(many_tensors(tensors), container), "plan,ours+phases=on", rounds)


def _up_to(largest: Shape) -> list[Shape]:
    """The sizes to this one, but for the tiny one."""
    return [shape for shape in SHAPES.values() if SHAPES["tiny"].nbytes < shape.nbytes <= largest.nbytes]


def _measure(session: Session, wanted: Wanted, contenders: str, rounds: int) -> None:
    try:
        with _borrowed(session, wanted):
            session.interleave(wanted, parse(contenders), rounds)
    except TooLittleDiskError as error:
        say(f"left out: {error}")


@contextmanager
def _borrowed(session: Session, wanted: Wanted) -> Iterator[None]:
    """Remove the pair afterwards, if it was not there before."""
    kept = session.has(wanted)
    try:
        yield
    finally:
        if not kept:
            session.discard(wanted)
