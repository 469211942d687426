"""Rebuild large language models from published weight deltas, and prove that what came out is right."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "BaylingDeltaError",
    "Checkpoint",
    "Plan",
    "Problem",
    "Recipe",
    "Registry",
    "Release",
    "TensorRef",
    "__version__",
    "apply",
    "inspect_checkpoint",
    "load_releases",
    "make_plan",
    "open_checkpoint",
    "plan_apply",
    "record",
    "repair",
    "verify",
    "weights_digest",
]

if TYPE_CHECKING:
    from bayling_delta.applying import apply
    from bayling_delta.checkpoint import Checkpoint, open_checkpoint
    from bayling_delta.errors import BaylingDeltaError, Problem
    from bayling_delta.inspecting import inspect_checkpoint
    from bayling_delta.manifest import weights_digest
    from bayling_delta.plan import Plan, make_plan
    from bayling_delta.recipes import Recipe
    from bayling_delta.recording import record
    from bayling_delta.release_entry import Release
    from bayling_delta.releases import Registry, load_releases
    from bayling_delta.repairing import repair
    from bayling_delta.tensors import TensorRef
    from bayling_delta.verifying import verify

_HOMES = {
    "BaylingDeltaError": "errors",
    "Checkpoint": "checkpoint",
    "Plan": "plan",
    "Problem": "errors",
    "Recipe": "recipes",
    "Registry": "releases",
    "Release": "release_entry",
    "TensorRef": "tensors",
    "apply": "applying",
    "inspect_checkpoint": "inspecting",
    "load_releases": "releases",
    "make_plan": "plan",
    "open_checkpoint": "checkpoint",
    "plan_apply": "preparing",
    "record": "recording",
    "repair": "repairing",
    "verify": "verifying",
    "weights_digest": "manifest",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that the command line starts at once."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
