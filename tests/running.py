"""The command line run in this process, and what came of it."""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from bayling_delta import system
from bayling_delta.cli import main
from bayling_delta.system import System


@dataclass(frozen=True)
class Finished:
    """How a run ended."""

    code: int
    document: dict[str, Any]
    errors: str
    """What was printed on stderr."""

    @property
    def kinds(self) -> list[str]:
        """Those of the problems, in their order."""
        return [problem["kind"] for problem in self.document["error"]["problems"]]


Run = Callable[..., Finished]
"""Runs a command line, in a `System` of its own where one is given."""


def runner(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run command lines with ``--json``, whose output a test captures."""

    def run(command: str, world: System | None = None) -> Finished:
        capsys.readouterr()
        with system.using(world or System()), pytest.raises(SystemExit) as exited:
            main([*shlex.split(command), "--json"])
        output, errors = capsys.readouterr()
        assert isinstance(exited.value.code, int)
        return Finished(exited.value.code, json.loads(output), errors)

    return run
