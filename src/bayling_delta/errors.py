"""What can be wrong, and the exceptions that say so.

A finding is a `Problem`: its kind, where it is, and what to do about it. `KINDS` is the one list of
kinds; it decides which exception a kind belongs to and whether a user may overrule it. Checks collect
problems, and `refuse` raises them all at once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

__all__ = [
    "KINDS",
    "BaylingDeltaError",
    "CheckpointError",
    "IntegrityError",
    "InterruptedRunError",
    "Kind",
    "MismatchError",
    "NoRecordError",
    "OutputError",
    "Problem",
    "RunEndedError",
    "UsageError",
    "refuse",
    "shown",
]


_MOST_LETTERS: Final = 200


def shown(name: str) -> str:
    """A name from a file as a message has it: cut where it is longer than names are, as it may be megabytes."""
    return name if len(name) <= _MOST_LETTERS else f"{name[:_MOST_LETTERS]}…"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong."""

    kind: str
    """A key of `KINDS`."""
    where: str
    """The file or tensor it was found in, as the user would name it."""
    message: str
    """What is wrong there and what to do next, without the place."""

    @property
    def allow(self) -> bool:
        """Whether ``--allow KIND`` overrules it."""
        return KINDS[self.kind].allow

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class RunEndedError(BaseException):
    """Whatever ends a run in a way that this package knows: an error, or a signal."""

    category: ClassVar[str] = "internal"
    """The value of ``error.kind`` in JSON documents."""

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        self.hint: str | None = None
        """What is left of the work, and how to go on."""
        super().__init__("\n".join(map(str, self.problems)))


class BaylingDeltaError(RunEndedError, Exception):
    """Anything that this package refuses or that goes wrong in a way it knows."""


class UsageError(BaylingDeltaError):
    """Options that contradict each other or cannot be met."""

    category = "usage"


class CheckpointError(BaylingDeltaError):
    """A checkpoint cannot be read: damaged, incomplete, unsupported."""

    category = "checkpoint"


class MismatchError(BaylingDeltaError):
    """Base and delta do not belong together, or not in this way."""

    category = "mismatch"


class IntegrityError(BaylingDeltaError):
    """A digest differs from the one expected."""

    category = "integrity"


class NoRecordError(IntegrityError):
    """There is no digest to compare with."""

    category = "no_record"


class OutputError(BaylingDeltaError):
    """The output cannot be written, or must not be."""

    category = "output"


class InterruptedRunError(RunEndedError):
    """A signal ended the run.

    Like `KeyboardInterrupt` it is no `Exception`: it comes anywhere, and nobody who passes over errors passes over it.
    """

    category = "interrupted"

    def __init__(self, problems: Problem | Iterable[Problem], signal_number: int) -> None:
        super().__init__(problems)
        self.signal_number = signal_number


@dataclass(frozen=True, slots=True)
class Kind:
    """What a problem's kind means."""

    error: type[RunEndedError]
    meaning: str
    allow: bool = False


KINDS: dict[str, Kind] = {
    # 3: a checkpoint cannot be read
    "not_found": Kind(CheckpointError, "no such file or directory, or no weights in it"),
    "unreadable": Kind(CheckpointError, "the system refused to read it"),
    "network": Kind(CheckpointError, "the Hub cannot be reached, and its cache does not have everything"),
    "access": Kind(CheckpointError, "the Hub wants a token, or its conditions accepted"),
    "incomplete": Kind(CheckpointError, "a shard is absent or shorter than its header says"),
    "not_weights": Kind(CheckpointError, "the file is something else: a git-lfs pointer, a web page, zeros"),
    "damaged": Kind(CheckpointError, "the header, pickle or zip directory contradicts itself or the format"),
    "unsupported": Kind(CheckpointError, "a form of checkpoint that is not read here"),
    "unsafe_pickle": Kind(CheckpointError, "the pickle asks for something that no state dict needs"),
    "unsafe_name": Kind(CheckpointError, "a name that leaves its directory or cannot be written"),
    "index": Kind(CheckpointError, "the index and the shards disagree"),
    "record": Kind(CheckpointError, "a manifest or list of digests cannot be used"),
    "registry": Kind(CheckpointError, "an entry of the registry of releases cannot be used"),
    "changed": Kind(CheckpointError, "an input changed while it was read"),
    # 4: base and delta do not belong together
    "missing_tensor": Kind(MismatchError, "one side lacks a tensor that the other has"),
    "shape": Kind(MismatchError, "base and delta disagree about a tensor's shape"),
    "heads": Kind(MismatchError, "a base in Meta's format and the delta's config.json disagree about the heads"),
    "dtype": Kind(MismatchError, "a dtype that the recipe cannot add"),
    "quantised": Kind(MismatchError, "quantised weights, to which no delta can be added"),
    "recipe": Kind(MismatchError, "base and delta fit together by another recipe"),
    "no_recipe": Kind(MismatchError, "a release that is combined with its base by no rule that is known here"),
    "wrong_base": Kind(MismatchError, "the base is another than the one that the delta was made against", allow=True),
    "bfloat16": Kind(MismatchError, "the base was rounded through bfloat16, and the delta's was not", allow=True),
    "size": Kind(MismatchError, "base and delta are models of different sizes"),
    "vocabulary": Kind(MismatchError, "the base has the rows already that the recipe would add", allow=True),
    "looks_like_delta": Kind(MismatchError, "the base looks like a delta", allow=True),
    "looks_like_model": Kind(MismatchError, "the delta looks like a full model", allow=True),
    "all_zero": Kind(MismatchError, "everything that was read of the base is zero", allow=True),
    "already_rebuilt": Kind(MismatchError, "the base is itself the sum of a base and a delta", allow=True),
    "architecture": Kind(MismatchError, "config.json and the shapes disagree about the model's sizes", allow=True),
    "tokenizer": Kind(MismatchError, "the tokenizer has more tokens than the embedding has rows", allow=True),
    "copies": Kind(
        MismatchError, "parts of a model disagree about a tensor that all have alike, or are one part twice", allow=True
    ),
    "tied": Kind(MismatchError, "lm_head.weight is tied to the embedding and yet differs from it"),
    "non_finite": Kind(MismatchError, "an input or the result has infinite or NaN elements", allow=True),
    # 5: a digest differs
    "crc": Kind(IntegrityError, "a record of a .bin file is damaged: its CRC-32 is wrong"),
    "no_record": Kind(NoRecordError, "there is nothing to compare with"),
    "model": Kind(IntegrityError, "a model is not what a record or a recomputed sum says"),
    "load": Kind(IntegrityError, "transformers cannot load a model, or it computes nonsense"),
    "digest": Kind(IntegrityError, "a digest is not the expected one"),
    # 6: the output cannot be written
    "output_exists": Kind(OutputError, "the output, or an unfinished one, is already there"),
    "unfinished": Kind(OutputError, "what an earlier run left cannot be gone on with"),
    "output_place": Kind(OutputError, "the output's place cannot take it"),
    "disk_space": Kind(OutputError, "the disk is too small for the output, or for a download"),
    "write": Kind(OutputError, "the system refused to write"),
    # 2: usage
    "memory_limit": Kind(UsageError, "the memory limit is below what the plan needs"),
    "device": Kind(UsageError, "a device or library that is not here"),
    "option": Kind(UsageError, "an option has a value that cannot be used"),
    # signals
    "signal": Kind(InterruptedRunError, "a signal ended the run"),
}

_ORDER: Sequence[type[BaylingDeltaError]] = (
    UsageError,
    CheckpointError,
    MismatchError,
    IntegrityError,
    NoRecordError,
    OutputError,
)


def refuse(problems: Sequence[Problem], allowed: Iterable[str] = ()) -> None:
    """Raise every problem that ``allowed`` does not overrule, in one exception; return if there is none.

    The exception is that of the earliest class in the order usage, checkpoint, mismatch, integrity, output.

    Raises:
        BaylingDeltaError: one of its subclasses, carrying all the problems.
    """
    overruled = {kind for kind in allowed if KINDS[kind].allow}
    standing = [problem for problem in problems if problem.kind not in overruled]
    for error in _ORDER:
        if any(KINDS[problem.kind].error is error for problem in standing):
            raise error(standing)
