"""What the hardware threads and the disk do in every moment of a run."""

import time
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

__all__ = ["Moment", "Tracer", "intervals", "trace_table"]

_SECTOR: Final = 512
_TICKS: Final = 100
"""Of /proc's processor times, a second."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Counts since something began: only differences have a meaning."""

    seconds: float
    """Since the first look, some hundredths of a second after the start of the process."""
    cpus: list[list[int]]
    """For each hardware thread the ticks of user, system, waiting for the disk, and idle."""
    user: int
    """Ticks of the process."""
    system: int
    queued_seconds: float
    """That its threads were ready to run, and no hardware thread was free; 0 where the kernel does not tell."""
    disk_read_bytes: int
    """Of all disks: direct I/O of the process, and what the page cache does for it."""
    disk_written_bytes: int


class Tracer:
    """Looks at the system whenever it is called, and keeps what it saw."""

    def __init__(self) -> None:
        self.moments: list[Moment] = []
        self._started = 0.0
        self._queued: dict[str, int] = {}
        """Nanoseconds that each thread, also one that has ended, was ready to run and did not."""

    def look(self, process: int) -> None:
        """Take down the counts; to be called many times a second."""
        now = time.monotonic()
        if not self.moments:
            self._started = now
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            self._queued |= {
                task.parent.name: int(task.read_text().split()[1])
                for task in Path(f"/proc/{process}/task").glob("*/schedstat")
            }
        except OSError:  # it has ended
            return
        disk = _disk()
        queued = sum(self._queued.values()) / 1e9
        self.moments.append(Moment(now - self._started, _cpus(), int(fields[11]), int(fields[12]), queued, *disk))

    def as_data(self) -> list[dict[str, Any]]:
        """For JSON."""
        return [asdict(moment) for moment in self.moments]


def _cpus() -> list[list[int]]:
    lines = Path("/proc/stat").read_text().splitlines()
    found = []
    for line in lines:
        name, *fields = line.split()
        if name.startswith("cpu") and name != "cpu":
            user, nice, system, idle, waiting, hard, soft = map(int, fields[:7])
            found.append([user + nice, system + hard + soft, waiting, idle])
    return found


def _disk() -> tuple[int, int]:
    """Bytes read from and written to whole disks."""
    read = written = 0
    for line in Path("/proc/diskstats").read_text().splitlines():
        fields = line.split()
        if Path(f"/sys/block/{fields[2]}/device").exists():
            read, written = read + int(fields[5]) * _SECTOR, written + int(fields[9]) * _SECTOR
    return read, written


# by the second


@dataclass(frozen=True, slots=True)
class Interval:
    """What happened from one point of time to another, in shares of that time or in bytes a second."""

    start: float
    stop: float
    cpus: list[list[float]]
    """For each hardware thread the shares of user, system, waiting for the disk, and idle; of all processes."""
    user: float
    """Of the process, in hardware threads."""
    system: float
    queued: float
    """Threads of the process that waited for a hardware thread, on average."""
    read: float
    written: float
    busy: dict[str, float]
    """By station or call: the share of the time in which it had something in hand; calls of several threads add up."""


def intervals(moments: Sequence[Mapping[str, Any]], events: Iterable[Sequence[Any]], step: float) -> list[Interval]:
    """Cut a run into pieces of ``step`` seconds, as nearly as it was looked at then."""
    cuts = list(moments[:1])
    for moment in moments[1:]:
        if moment["seconds"] - cuts[-1]["seconds"] >= step or moment is moments[-1]:
            cuts.append(moment)
    busy = _busy(events, [moment["seconds"] for moment in cuts])
    return [_interval(first, last, busy[place]) for place, (first, last) in enumerate(pairwise(cuts))]


def _interval(first: Mapping[str, Any], last: Mapping[str, Any], busy: dict[str, float]) -> Interval:
    seconds = last["seconds"] - first["seconds"]
    cpus = []
    for before, after in zip(first["cpus"], last["cpus"], strict=True):
        ticks = [b - a for a, b in zip(before, after, strict=True)]
        cpus.append([tick / max(1, sum(ticks)) for tick in ticks])

    def rate(key: str, unit: float = 1) -> float:
        return float((last[key] - first[key]) / unit / seconds)

    return Interval(
        first["seconds"],
        last["seconds"],
        cpus,
        rate("user", _TICKS),
        rate("system", _TICKS),
        rate("queued_seconds"),
        rate("disk_read_bytes"),
        rate("disk_written_bytes"),
        busy,
    )


def _busy(events: Iterable[Sequence[Any]], cuts: Sequence[float]) -> list[dict[str, float]]:
    """The share of the time between two cuts in which each station or call was busy."""
    found: list[dict[str, float]] = [defaultdict(float) for _ in cuts[1:]]
    for name, begun, done, _processor in events:
        for place in range(max(0, bisect_right(cuts, begun) - 1), min(len(found), bisect_left(cuts, done))):
            start, stop = cuts[place], cuts[place + 1]
            found[place][name] += (min(done, stop) - max(begun, start)) / (stop - start)
    return [dict(shares) for shares in found]


def trace_table(pieces: Sequence[Interval], events: Sequence[Sequence[Any]]) -> str:
    """The run by the second, and what each station took of it, in Markdown."""
    names = list(dict.fromkeys(event[0] for event in events))
    count = len(pieces[0].cpus) if pieces else 0
    heads = ["second", *(f"cpu{number}: user, system, disk, idle %" for number in range(count))]
    heads += ["process user", "system", "queued", "read MB/s", "write MB/s", *names]
    lines = [f"| {' | '.join(heads)} |", "|" + "--:|" * len(heads)]
    for piece in pieces:
        cells = [f"{piece.start:.1f}", *(" ".join(f"{share:.0%}"[:-1] for share in cpu) for cpu in piece.cpus)]
        cells += [f"{piece.user:.2f}", f"{piece.system:.2f}", f"{piece.queued:.2f}"]
        cells += [f"{piece.read / 1e6:.0f}", f"{piece.written / 1e6:.0f}"]
        lines.append(f"| {' | '.join([*cells, *(f'{piece.busy.get(name, 0):.0%}' for name in names)])} |")
    lines += ["", "| station or call | times | busy, s | on the processor, s | waiting, s |", "|---|--:|--:|--:|--:|"]
    for name in names:
        own = [event for event in events if event[0] == name]
        busy, processor = sum(event[2] - event[1] for event in own), sum(event[3] for event in own)
        lines.append(f"| {name} | {len(own)} | {busy:.2f} | {processor:.2f} | {busy - processor:.2f} |")
    return "\n".join(lines)
