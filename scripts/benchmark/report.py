"""Results as tables and as a picture."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

__all__ = ["Row", "cost_table", "limit", "phase_table", "primitive_table", "rows", "table"]

Run = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One contender at one size: all its runs."""

    pair: str
    size: str
    contender: str
    runs: Sequence[Run]

    @property
    def ended(self) -> str | None:
        """Why it did not come to its end."""
        return next((run["ended"] for run in self.runs if run["ended"]), None)

    @property
    def finished(self) -> bool:
        return self.ended is None

    def all(self, key: str) -> list[Any]:
        """What each run took of something."""
        return [run[key] for run in self.runs]

    @property
    def seconds(self) -> float:
        """The median."""
        return float(median(self.all("seconds")))

    @property
    def processor_seconds(self) -> float:
        return float(median(run["user_seconds"] + run["system_seconds"] for run in self.runs))

    @property
    def peak_bytes(self) -> float:
        """The largest."""
        return float(max(self.all("peak_bytes")))

    @property
    def output_bytes(self) -> int:
        return int(self.runs[0]["work"]["output_bytes"])


def rows(runs: Iterable[Run]) -> list[Row]:
    """The runs by size and contender, in the order in which they were first made."""
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        found.setdefault((run["pair"], run["contender"]), []).append(run)
    return [Row(pair, runs[0]["size"], contender, runs) for (pair, contender), runs in found.items()]


def limit(found: Sequence[Row], pair: str) -> float | None:
    """The larger of copy ceiling and digest floor, the ceiling being the faster way to copy; None if not measured."""
    seconds = {row.contender: row.seconds for row in found if row.pair == pair and row.finished}
    copies = [seconds[name] for name in ("copy-cached", "copy-direct") if name in seconds]
    if not copies or "digest-floor" not in seconds:
        return None
    return max(min(copies), seconds["digest-floor"])


def table(runs: Sequence[Run]) -> str:
    """Medians and ranges in Markdown."""
    found = rows(runs)
    lines = [
        "| model | contender | runs | time, s | range | of the limit | processor, s | peak memory, MB | not of files |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in found:
        lines.append(f"| {row.pair} | {row.contender} | {_cells(row, limit(found, row.pair))} |")
    return "\n".join([*lines, "", *_conditions(runs)])


def _conditions(runs: Sequence[Run]) -> list[str]:
    """Under which the runs were made, and whether their results agree."""
    made = [run for run in runs if "cold" in run]
    lines = [f"Before each run: {', '.join(sorted({run['cold'] for run in made}))}."]
    shares = [run["cached_share"] for run in made if run["cached_share"] is not None]
    if shares:
        lines[0] += f" Of the inputs at most {max(shares):.0%} were cached then."
    digests = defaultdict(set)
    for run in made:
        if "weights_digest" in run:
            digests[run["size"]].add(run["weights_digest"])
    lines += [
        f"{size}: {'all results have the same weights digest' if len(found) == 1 else 'THE RESULTS DIFFER'}."
        for size, found in digests.items()
    ]
    return lines


def _cells(row: Row, least: float | None) -> str:
    if not row.finished:
        return f"{len(row.runs)} | {row.ended} | | | | |"
    seconds = row.all("seconds")
    ratio = f"{row.seconds / least:.2f}" if least else ""
    private = max(row.all("peak_private_bytes"))
    return (
        f"{len(seconds)} | {row.seconds:.2f} | {min(seconds):.2f} to {max(seconds):.2f} | {ratio} | "
        f"{row.processor_seconds:.2f} | {row.peak_bytes / 1e6:.0f} | {private / 1e6:.0f}"
    )


_PHASES = (
    ("start-up", None, "plan_begun"),
    ("plan", "plan_begun", "plan_done"),
    ("prepare", "plan_done", "engine_begun"),
    ("apply", "engine_begun", "engine_done"),
    ("finish", "engine_done", "done"),
)


def phase_table(runs: Iterable[Run]) -> str:
    """The phases of the runs whose phases were taken, medians in seconds; empty if there are none."""
    found = rows(run for run in runs if "moments" in run and not run["ended"])
    if not found:
        return ""
    heads = ["model", "contender", *(name for name, _, _ in _PHASES), "exit", "first weights at", "processor in apply"]
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "--:|" * (len(heads) - 2)]
    for row in found:
        moments = row.all("moments")
        cells = [
            median(moment[stop] - (moment[start] if start else 0) for moment in moments) for _, start, stop in _PHASES
        ]
        cells.append(median(run["seconds"] - run["moments"]["done"] for run in row.runs))
        cells.append(median(moment.get("first_weights", float("nan")) for moment in moments))
        cells.append(median(_in_apply(run) for run in row.runs))
        lines.append(f"| {row.pair} | {row.contender} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
    return "\n".join(lines)


def _in_apply(run: Run) -> float:
    """Processor seconds of the engine."""
    return float(run["processor"]["engine_done"] - run["processor"]["engine_begun"])


def cost_table(runs: Iterable[Run]) -> str:
    """What each pair costs by the gigabyte of its result, medians."""
    lines = [
        "| pair | contender | result, GB | tensors | time, s | a GB | apply, a GB | processor, s | a GB | memory, MB |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows(runs):
        size, tensors = row.output_bytes / 1e9, row.runs[0]["work"]["tensors"]
        if not row.finished:
            lines.append(f"| {row.pair} | {row.contender} | {size:.2f} | {tensors:,} | {row.ended} | | | | | |")
            continue
        seconds, processor = row.seconds, row.processor_seconds
        moments = [run["moments"] for run in row.runs if "moments" in run]
        apply = median(moment["engine_done"] - moment["engine_begun"] for moment in moments) if moments else None
        lines.append(
            f"| {row.pair} | {row.contender} | {size:.2f} | {tensors:,} | {seconds:.2f} | {seconds / size:.2f} | "
            f"{f'{apply / size:.2f}' if apply else ''} | "
            f"{processor:.2f} | {processor / size:.2f} | {row.peak_bytes / 1e6:.0f} |"
        )
    return "\n".join(lines)


def primitive_table(runs: Sequence[Run]) -> str:
    """Processor seconds by the gigabyte of the result: of each operation alone, of their sum, and of a run."""
    alone = [run for run in runs if "primitives" in run]
    lines = ["| operation | processor s per GB |", "|---|--:|"]
    total = 0.0
    for name in alone[0]["primitives"]:
        cost = median(run["primitives"][name] / run["work"]["output_bytes"] * 1e9 for run in alone)
        total += cost
        lines.append(f"| {name} | {cost:.3f} |")
    lines.append(f"| sum | {total:.3f} |")
    for row in rows(run for run in runs if "moments" in run and not run["ended"]):
        size = row.output_bytes / 1e9
        inside, whole = median(map(_in_apply, row.runs)) / size, row.processor_seconds / size
        lines.append(f"| {row.contender}, apply alone | {inside:.3f} ({inside / total:.2f} of the sum) |")
        lines.append(f"| {row.contender}, whole process | {whole:.3f} ({whole / total:.2f} of the sum) |")
    return "\n".join(lines)
