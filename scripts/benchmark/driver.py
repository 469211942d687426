"""Run bayling-delta's command line, and note from inside when each phase begins.

    python -m benchmark.driver REPORT [--no-digests] [--no-sink] [--events] -- apply --base B --delta D --out O

The command is the user's own; a few functions are wrapped to look at the clock. REPORT is a JSON file: seconds
from the start of the process until the plan is begun and made, the first weights are read, the engine is begun
and done, and all is done. With --events also what each station of the engine and each call of the system did, when.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

from benchmark.measure import STARTED

_Result = TypeVar("_Result")
_CALLS: Final = ("read_into", "write_from", "sync", "preallocate", "rename_new")
"""Of the system, those that may take long."""


class _Clock:
    """Moments, and what went on between them, in seconds from the start of the process."""

    def __init__(self) -> None:
        self._zero = int(os.environ[STARTED])
        self.moments: dict[str, float] = {}
        self.processor: dict[str, float] = {}
        """Processor seconds of the process at each moment."""
        self.events: list[tuple[str, float, float, float]] = []
        """(what, from, to, processor seconds)."""

    def now(self) -> float:
        return (time.monotonic_ns() - self._zero) / 1e9

    def note(self, moment: str) -> None:
        """Note the first time that something happens."""
        if moment not in self.moments:
            self.moments[moment] = self.now()
            self.processor[moment] = time.process_time()

    def around(self, name: str, function: Callable[..., _Result]) -> Callable[..., _Result]:
        """The function, its beginning and its end noted."""

        def noted(*arguments: Any, **options: Any) -> _Result:
            self.note(f"{name}_begun")
            try:
                return function(*arguments, **options)
            finally:
                self.note(f"{name}_done")

        return noted

    def timed(self, name: str, function: Callable[..., _Result]) -> Callable[..., _Result]:
        """The function, every call of it an event."""

        def timed(*arguments: Any, **options: Any) -> _Result:
            begun, processor = self.now(), time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                self.events.append((name, begun, self.now(), time.thread_time() - processor))

        return timed


def main(arguments: Sequence[str]) -> None:
    """Run the command with its clock; exit as it does."""
    clock = _Clock()
    place = arguments.index("--")
    parser = argparse.ArgumentParser(prog="driver")
    parser.add_argument("report", type=Path)
    parser.add_argument("--no-digests", action="store_true")
    parser.add_argument("--no-sink", action="store_true")
    parser.add_argument("--events", action="store_true")
    options = parser.parse_args(arguments[:place])

    from bayling_delta import applying, cli, engine, preparing

    planned = clock.around("plan", preparing.prepare)  # both the plan and the run begin with it
    for module in (preparing, applying):
        vars(module)["prepare"] = planned
    run = _undigested(engine.run) if options.no_digests else engine.run
    run = clock.around("engine", run)
    engine.run = _without_sink(run) if options.no_sink else run
    _watch_reads(clock)
    if options.events:
        _watch_calls(clock)
        _watch_stations(clock)
    try:
        cli.main(list(arguments[place + 1 :]))
    finally:
        clock.note("done")
        found: dict[str, Any] = {"moments": clock.moments, "processor": clock.processor}
        if options.events:
            found["events"] = clock.events
        options.report.write_text(json.dumps(found), encoding="utf-8")


# what is wrapped


def _undigested(run: Callable[..., Any]) -> Callable[..., Any]:
    """The engine with its digests off; what it would have found is made up, so that the rest goes as always."""
    from bayling_delta.engine import Digests

    none = "0" * 64

    def undigested(plan: Any, *arguments: Any, **options: Any) -> Any:
        def made_up(files: Sequence[str], tensors: Sequence[str]) -> Digests:
            return Digests(dict.fromkeys(files, none), dict.fromkeys(tensors, none))

        outcome = run(plan, *arguments, **options, digests=False)
        return replace(
            outcome,
            base=made_up(list(plan.base_reads.files), list(plan.base_reads.tensors)),
            delta=made_up(list(plan.delta_reads.files), list(plan.delta_reads.tensors)),
            result=made_up([file.name for file in plan.files], [tensor.name for tensor in plan.tensors]),
        )

    return undigested


def _without_sink(run: Callable[..., Any]) -> Callable[..., Any]:
    """The engine, its result digested and thrown away."""
    return lambda plan, _sink, **options: run(plan, None, **options)


def _watch_reads(clock: _Clock) -> None:
    """Note when the engine has its first weights."""
    from bayling_delta import system

    read = system.calls.read_into

    def read_into(handle: int, view: memoryview, offset: int) -> int:
        count = read(handle, view, offset)
        if "engine_begun" in clock.moments:
            clock.note("first_weights")
        return count

    system.calls.read_into = read_into  # type: ignore[method-assign]


def _watch_calls(clock: _Clock) -> None:
    from bayling_delta import system

    for name in _CALLS:
        with suppress(AttributeError):
            setattr(system.calls, name, clock.timed(name, getattr(system.calls, name)))


def _watch_stations(clock: _Clock) -> None:
    """Have each station's work timed, from its first message on."""
    from bayling_delta.crew import Crew, Station

    post = Crew.post
    names: dict[int, str] = {}

    def watched(crew: Crew, station: Station, message: object) -> None:
        if id(station) not in names:
            names[id(station)] = getattr(station, "name", f"station {len(names)}")
            station.handle = clock.timed(names[id(station)], station.handle)
        post(crew, station, message)

    Crew.post = watched  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    main(sys.argv[1:])
