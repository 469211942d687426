"""What samples say against adding a base and a delta, before the long run.

These are signs, not proofs: each refusal can be overruled with ``--allow KIND``, and what may be quite in order is
only noted.
"""

from dataclasses import replace

from bayling_delta.checkpoint import Checkpoint, directory_of
from bayling_delta.companions import foreign_files
from bayling_delta.errors import CheckpointError, Problem
from bayling_delta.expectations import read_manifest
from bayling_delta.looking import Look
from bayling_delta.manifest import MANIFEST_NAME
from bayling_delta.sources import exists

__all__ = ["suspect"]

_NOTED = ("bfloat16", "generation")
"""Oddities of a base that make another model than the published one, and that a release may also want."""


def suspect(base: Checkpoint, base_look: Look, delta: Checkpoint, delta_look: Look) -> tuple[list[Problem], list[str]]:
    """What to refuse unless it is overruled, and what to tell of two checkpoints that are to be added.

    Raises:
        CheckpointError: the system cannot read a file.
    """
    problems: list[Problem] = []
    if base_look.looks_like == "delta":
        message = f"looks like a delta, and a base is a whole model: {base_look.reasons[0]}"
        problems.append(Problem("looks_like_delta", str(base.path), message))
    if delta_look.looks_like == "full model":
        message = f"looks like a full model, to which nothing needs to be added: {delta_look.reasons[0]}"
        problems.append(Problem("looks_like_model", str(delta.path), message))
    if len(problems) == 2:
        problems = [replace(problem, message=f"{problem.message}; are base and delta swapped?") for problem in problems]
    if _is_all_zero(base_look):
        message = "all that was read of it is zero: a download that was preallocated, and never finished?"
        problems.append(Problem("all_zero", str(base.path), message))
    problems += _already_rebuilt(base)
    problems += _other_size(base, base_look, delta_look)
    for side, look in (("base", base_look), ("delta", delta_look)):
        problems += [
            Problem("quantised", odd["where"], odd["message"]) for odd in look.odd if odd["kind"] == "quantised"
        ]
        problems += [
            Problem("non_finite", f"{odd['where']} of the {side}", odd["message"])
            for odd in look.odd
            if odd["kind"] == "non_finite"
        ]
    problems += [
        Problem("architecture", odd["where"], odd["message"]) for odd in delta_look.odd if odd["kind"] == "architecture"
    ]
    notes = [f"{odd['where']}: {odd['message']}" for odd in base_look.odd if odd["kind"] in _NOTED]
    if not exists(delta.directory / "config.json"):
        notes.append(f"{delta.directory / 'config.json'}: is not there; the result needs one before it can be loaded")
    if base.container == "meta" and "num_attention_heads" not in (delta.config or {}):
        params = base.directory / base.config_name
        notes.append(f"{params}: its n_heads orders the rows of q and k, and no config.json of the delta confirms it")
    if foreign := foreign_files(delta):
        notes.append(f"{delta.directory}: not understood, and not copied: {', '.join(foreign)}")
    return problems, notes


def _is_all_zero(look: Look) -> bool:
    read = [figures for figures in (look.rows, look.norms) if figures]
    return bool(read) and not any(
        figures.get("magnitude") or figures.get("standard_deviation") or figures.get("mean") for figures in read
    )


def _other_size(base: Checkpoint, base_look: Look, delta_look: Look) -> list[Problem]:
    """The finding that base and delta are of models of different sizes: one problem instead of one a tensor."""
    sizes = [look.architecture["shapes"] for look in (base_look, delta_look)]
    for key in ("hidden_size", "intermediate_size"):
        values = {shown[key] for shown in sizes}
        if None in values or len(values) < 2:
            return []
    here, other = (f"{shown['num_hidden_layers']} layers of {shown['hidden_size']:,}" for shown in sizes)
    message = f"has {here}, and the delta has {other}: they are of models of different sizes"
    return [Problem("size", str(base.path), f"{message}; give the base of the delta's size")]


def _already_rebuilt(base: Checkpoint) -> list[Problem]:
    """The finding that a base is itself a sum: adding the delta again gives nonsense."""
    path = directory_of(base.path) / MANIFEST_NAME
    if not exists(path):
        return []
    try:
        operation = read_manifest(path).operation
    except CheckpointError as error:
        return list(error.problems)
    if operation != "apply":
        return []
    message = "is itself the result of 'bayling-delta apply'; give the original base, or the sum would be added twice"
    return [Problem("already_rebuilt", str(base.path), message)]
