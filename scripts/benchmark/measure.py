"""Run a command as a process tree, and take its time, its processor time and its memory from outside."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

__all__ = ["STARTED", "Guard", "Job", "Measured", "measure"]

STARTED: Final = "BENCH_STARTED"
"""Environment variable: the monotonic clock in nanoseconds when the process was started."""
_SAMPLE_SECONDS: Final = 0.02


@dataclass(frozen=True, slots=True)
class Job:
    """A command to measure."""

    command: Sequence[str]
    environment: Mapping[str, str]
    output: Path | None
    """What it writes; synced before the clock is stopped."""


@dataclass(frozen=True, slots=True)
class Guard:
    """When a process tree is ended."""

    memory_bytes: int
    """Of what it has in memory and is not a mapped file: that cannot be dropped."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run took."""

    seconds: float
    """From the start until the data is on the disk."""
    user_seconds: float
    """Of all processes of the tree; what the kernel does on its own account is in none of them."""
    system_seconds: float
    peak_bytes: int
    """Resident memory of the tree, mapped files included: the largest sum that was seen."""
    peak_private_bytes: int
    """The same without mapped files."""
    ended: str | None
    """Why it did not come to its end; None for a run that did."""
    output: str
    """What it printed on stdout."""


def measure(job: Job, guard: Guard, log: Path, look: Callable[[int], None] | None = None) -> Measured:
    """Run a job to its end, or until a guard ends it.

    What it says goes into files beside ``log``. ``look`` is called many times a second with the process's id.
    """
    out, err = log.with_suffix(".out"), log.with_suffix(".err")
    with out.open("wb") as stdout, err.open("wb") as stderr:
        started = time.monotonic_ns()
        process = subprocess.Popen(
            job.command,
            env={**job.environment, STARTED: str(started)},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        watch = _Watch(process.pid, guard, look)
        watch.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # Ctrl-C does not reach it: it is in a session of its own
            _end(process.pid)
            process.wait()
            raise
        finally:
            watch.stop()
        process.returncode = os.waitstatus_to_exitcode(status)  # so that nobody waits for it again
    if job.output is not None:
        _sync(job.output)
    seconds = (time.monotonic_ns() - started) / 1e9
    ended = watch.ended
    if ended is None and process.returncode:
        last = err.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        ended = f"exit {process.returncode}: {''.join(last)[:200]}"
    return Measured(
        seconds, usage.ru_utime, usage.ru_stime, watch.peak, watch.peak_private, ended, out.read_text(encoding="utf-8")
    )


def _sync(output: Path) -> None:
    """Have everything below a path on the disk."""
    for path in [output, *output.rglob("*")]:
        if path.exists():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


# memory


class _Watch(threading.Thread):
    """Looks at a process tree's memory many times a second, and ends the tree when a guard says so."""

    def __init__(self, leader: int, guard: Guard, look: Callable[[int], None] | None) -> None:
        super().__init__(daemon=True)
        self._leader = leader
        self._guard = guard
        self._look = look
        self._done = threading.Event()
        self.peak = 0
        self.peak_private = 0
        self.ended: str | None = None

    def run(self) -> None:
        deadline = time.monotonic() + self._guard.seconds
        while not self._done.wait(_SAMPLE_SECONDS):
            if self._look is not None:
                self._look(self._leader)
            statuses = [_read_status(pid) for pid in _tree(self._leader)]
            resident = sum(status.get("VmRSS", 0) for status in statuses)
            private = sum(status.get("RssAnon", 0) + status.get("RssShmem", 0) for status in statuses)
            highest = max(
                (status.get("VmHWM", 0) for status in statuses), default=0
            )  # the kernel's own, between samples
            self.peak = max(self.peak, resident, highest)
            self.peak_private = max(self.peak_private, private)
            if private > self._guard.memory_bytes:
                self._end(f"ended at {private / 1e9:.1f} GB of memory")
            elif time.monotonic() > deadline:
                self._end(f"ended after {self._guard.seconds:.0f} s")

    def stop(self) -> None:
        self._done.set()
        self.join()

    def _end(self, why: str) -> None:
        self.ended = why
        self._done.set()
        _end(self._leader)


def _end(leader: int) -> None:
    """End a process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _tree(leader: int) -> list[int]:
    """A process and all below it."""
    found = [leader]
    for pid in found:
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
        except OSError:  # it has ended
            continue
    return found


def _read_status(pid: int) -> dict[str, Any]:
    """Sizes in bytes from a process's status; none when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {field[0].rstrip(":"): int(field[1]) * 1024 for field in fields}
