"""Tensors of which each part of a model has a copy: whether the copies are alike."""

from bayling_delta.checkpoint import Checkpoint
from bayling_delta.errors import Problem
from bayling_delta.gathering import elements_digest

__all__ = ["copy_problems"]


def copy_problems(checkpoint: Checkpoint) -> list[Problem]:
    """The findings that a part of a model in Meta's format has other norms than the first, whose are taken.

    They are small, and all are read.

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
    ]
