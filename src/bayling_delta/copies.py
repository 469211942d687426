"""The parts of a model in Meta's format: whether what all have is alike, and what each has is its own."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

from bayling_delta.checkpoint import Checkpoint
from bayling_delta.errors import Problem
from bayling_delta.gathering import elements_digest, read_elements
from bayling_delta.sources import open_source
from bayling_delta.tensors import TensorRef

__all__ = ["copy_problems"]

_MATRICES: Final = 8
_ELEMENTS: Final = 256
"""Of each part's piece of so many matrices, so many elements are read: at most 400 KB of 100 parts in float16."""


def copy_problems(checkpoint: Checkpoint) -> list[Problem]:
    """The findings that a part of a model in Meta's format has other norms than the first, whose are taken, or is
    another part once more.

    Norms are small, and all are read; of a few matrices, each part's first elements.

    Raises:
        CheckpointError: the system cannot read a file.
    """
    different: dict[int, list[str]] = {}
    for name, refs in checkpoint.copies.items():
        first = elements_digest(refs[0]) if len(refs) > 1 else b""
        for number, ref in enumerate(refs[1:], 1):
            if elements_digest(ref) != first:
                different.setdefault(number, []).append(name)
    return [
        Problem(
            "copies",
            str(checkpoint.files[number].path),
            f"has other values than {checkpoint.files[0].path.name} in {len(names)} of the tensors that all parts have "
            f"alike, {names[0]} among them; are these parts of one model?",
        )
        for number, names in different.items()
    ] + _repeated_parts(checkpoint)


def _repeated_parts(checkpoint: Checkpoint) -> list[Problem]:
    """The findings that a part begins as an earlier one does, in every matrix that is looked at."""
    joined = [ref for ref in checkpoint.tensors.values() if len(ref.views) > 1 and ref.elements]
    chosen = joined[:: -(-len(joined) // _MATRICES) or 1]
    seen: dict[bytes, int] = {}
    problems: list[Problem] = []
    for number, file in enumerate(checkpoint.files if chosen else ()):
        beginning = _beginning(chosen, number)
        earlier = seen.setdefault(beginning, number)
        if earlier != number and any(beginning):  # all zero, it is no part at all, which is told elsewhere
            what = (
                f"has the same weights as {checkpoint.files[earlier].path.name}; is it the same part under two names?"
            )
            problems.append(Problem("copies", str(file.path), what))
    return problems


def _beginning(matrices: Sequence[TensorRef], number: int) -> bytes:
    """The first elements of a part's pieces, one after the other, as stored."""
    pieces = [TensorRef(ref.dtype, ref.views[number].shape, (ref.views[number],)) for ref in matrices]
    with ExitStack() as stack:
        sources = {path: stack.enter_context(open_source(path)) for path in {piece.views[0].file for piece in pieces}}
        return b"".join(read_elements(sources, piece, 0, min(piece.elements, _ELEMENTS)).tobytes() for piece in pieces)
