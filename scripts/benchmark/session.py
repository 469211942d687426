"""One interleaved run: every contender once in every round, on the same cold files."""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmark.contenders import Contender, Place
from benchmark.environments import Peers
from benchmark.machine import cached_share, chill, describe, files_of
from benchmark.measure import Guard, measure
from benchmark.pairs import Pair, Wanted, is_made, make_pair, missing_bytes
from benchmark.work import Work, weights_digest, work_of

__all__ = ["SCHEMA", "Session", "TooLittleDiskError", "pair_name", "say"]

SCHEMA: Final = "bayling-delta/bench/1"


class TooLittleDiskError(RuntimeError):
    """What was asked for does not fit the disk."""


def say(text: str) -> None:
    """Tell how far the run is."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


@dataclass(slots=True)
class Session:
    """Where runs happen, under which conditions, and what came of them."""

    directory: Path
    peers: Peers
    cold: str
    """As `chill` has it."""
    guard: Guard
    command: str
    """How the benchmark was called."""
    rest_seconds: float = 0.0
    """Before each run: what the one before it wrote and removed may keep the disk busy for a while."""
    runs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def document(self) -> dict[str, Any]:
        """All that was measured, and where."""
        used = {peer for run in self.runs if (peer := run["peer"])}
        return {
            "schema": SCHEMA,
            "command": self.command,
            "machine": describe(self.directory),
            "peers": {peer: self.peers.versions(peer) for peer in sorted(used)},
            "memory_guard_bytes": self.guard.memory_bytes,
            "runs": self.runs,
        }

    def pair(self, wanted: Wanted, contenders: Sequence[Contender]) -> Pair:
        """The inputs, made if need be.

        Raises:
            TooLittleDiskError: they don't fit, or no result beside them would.
        """
        directory = self._directory_of(wanted)
        is_sorted = any(contender.sorted_base for contender in contenders)
        missing = missing_bytes(wanted, directory, with_sorted_base=is_sorted)
        result = wanted.shape.nbytes if wanted.container != "sparse" else 0
        free = shutil.disk_usage(self.directory).free
        if missing + result > free:
            raise TooLittleDiskError(
                f"{wanted.shape.name} needs {(missing + result) / 1e9:.1f} GB of disk for what is still to be made of "
                f"the pair, and for a result; {free / 1e9:.1f} GB are free"
            )
        if missing:
            say(f"making the pair {pair_name(wanted)}")
        return make_pair(wanted, directory, with_sorted_base=is_sorted)

    def interleave(
        self,
        wanted: Wanted,
        contenders: Sequence[Contender],
        rounds: int,
        *,
        check: bool = False,
        look: Callable[[int], None] | None = None,
    ) -> None:
        """Measure every contender once in every round, and keep what each run took.

        One that does not come to its end is not run again. ``check`` has the weights of each result of the first
        round digested. ``look`` is as in `measure`.

        Raises:
            TooLittleDiskError: the pair and a result don't fit.
        """
        pair = self.pair(wanted, contenders)
        work = {inputs: work_of(*inputs) for inputs in {contender.inputs(pair) for contender in contenders}}
        for peer in sorted({contender.peer for contender in contenders if contender.peer}):
            self.peers.install(peer)
        given_up: set[str] = set()
        for number in range(1, rounds + 1):
            first = (number - 1) * (len(contenders) // rounds or 1) % len(contenders)
            # Each round begins elsewhere: on a disk with a budget, what follows a pause is faster.
            for contender in (*contenders[first:], *contenders[:first]):
                if contender.name in given_up:
                    continue
                todo = work[contender.inputs(pair)]
                taken = self._once(pair, contender, todo, check=check and number == 1, look=look)
                self.runs.append(
                    {"pair": pair_name(wanted), "size": wanted.shape.name, "container": wanted.container}
                    | {"contender": contender.name, "peer": contender.peer, "round": number}
                    | {"work": asdict(todo)}
                    | taken
                )
                say(f"{pair_name(wanted)}, round {number} of {rounds}: {contender.name} {_words(taken)}")
                if taken["ended"]:
                    given_up.add(contender.name)

    def _once(
        self, pair: Pair, contender: Contender, work: Work, *, check: bool, look: Callable[[int], None] | None
    ) -> dict[str, Any]:
        """Measure one run, and remove what it wrote."""
        needed, free = contender.disk_bytes(work), shutil.disk_usage(self.directory).free
        if needed > free:
            return {"ended": f"not run: needs {needed / 1e9:.1f} GB of disk, and {free / 1e9:.1f} GB are free"}
        with self._scratch() as scratch:
            place = Place(pair, work, scratch / "result", scratch / "report.json", scratch, self.peers)
            job, inputs = contender.job(place), files_of(contender.inputs(pair))
            taken: dict[str, Any] = {"cold": chill(inputs, self.cold), "cached_share": cached_share(inputs)}
            time.sleep(self.rest_seconds)
            measured = measure(job, self.guard, self.directory / "last", look)
            taken |= asdict(measured)
            del taken["output"]
            if measured.ended:
                taken["ended"] = measured.ended.replace(str(self.directory), "DIR")
            if place.report.is_file():
                taken |= json.loads(place.report.read_text(encoding="utf-8"))
            if contender.is_ceiling and not measured.ended:
                taken |= json.loads(measured.output)  # its own seconds: Python's start is no part of a ceiling
            if check and contender.is_tool and not measured.ended:
                taken["weights_digest"] = weights_digest(place.output)
            return taken

    def discard(self, wanted: Wanted) -> None:
        """Remove a pair."""
        shutil.rmtree(self._directory_of(wanted), ignore_errors=True)

    def has(self, wanted: Wanted) -> bool:
        """Whether a pair is there."""
        return is_made(wanted, self._directory_of(wanted))

    def _directory_of(self, wanted: Wanted) -> Path:
        return self.directory / "pairs" / pair_name(wanted)

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        """An empty directory for one run."""
        path = self.directory / "scratch"
        if path.exists():  # an earlier run was killed
            shutil.rmtree(path)
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path)


def pair_name(wanted: Wanted) -> str:
    """A name for a pair, and for its directory."""
    container = "" if wanted.container == "bin" else f"-{wanted.container}"
    return f"{wanted.shape.name}{container}" + (f"-{wanted.shards}-shards" if wanted.shards else "")


def _words(taken: dict[str, Any]) -> str:
    """A run in a few words."""
    if taken["ended"]:
        return str(taken["ended"])
    processor = taken["user_seconds"] + taken["system_seconds"]
    return f"{taken['seconds']:.2f} s, {processor:.2f} s of processor, {taken['peak_bytes'] / 1e6:.0f} MB"
