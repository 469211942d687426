"""The command line of the benchmark."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any, Final

import click

from benchmark import report
from benchmark.contenders import Contender, UnknownError, parse
from benchmark.environments import Peers
from benchmark.growth import measure_growth
from benchmark.machine import available_bytes
from benchmark.measure import Guard
from benchmark.pairs import Wanted
from benchmark.session import Session, TooLittleDiskError
from benchmark.shapes import SHAPES, Shape
from benchmark.trace import Tracer, intervals, trace_table

_ROOT: Final = Path(__file__).resolve().parents[2]

_Runs = Sequence[dict[str, Any]]


# option types


class Contenders(click.ParamType[list[Contender]]):
    """A list of contenders."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Contender]:
        """Turn text into contenders."""
        try:
            return value if isinstance(value, list) else parse(value)
        except UnknownError as error:
            self.fail(str(error), param, ctx)


class Sizes(click.ParamType[list[Shape]]):
    """A list of sizes."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Shape]:
        """Turn text into shapes."""
        if isinstance(value, list):
            return value
        if unknown := [name for name in value.split(",") if name not in SHAPES]:
            self.fail(f"{unknown[0]!r} is none of {', '.join(SHAPES)}", param, ctx)
        return [SHAPES[name] for name in value.split(",")]


_PATH: Final = click.Path(path_type=Path)
_SIZE: Final = click.Choice(list(SHAPES))


# what all commands that measure share


def _measuring(tables: Callable[[_Runs], str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a session, made of options that it gets; show and keep what it measured, whatever ends it."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def measuring(
            directory: Path,
            cold: str,
            memory_guard: float | None,
            time_guard: float,
            rest: float,
            json_file: Path | None,
            **options: Any,
        ) -> None:
            directory.mkdir(parents=True, exist_ok=True)
            guard = Guard(int(memory_guard * 1e9) if memory_guard else available_bytes() * 9 // 10, time_guard)
            session = Session(directory.resolve(), Peers(_ROOT / ".bench-env-peers"), cold, guard, _command(), rest)
            try:
                command(session, **options)
            except TooLittleDiskError as error:
                raise click.ClickException(str(error)) from error
            finally:
                if session.runs:
                    file = json_file or session.directory / "results.json"
                    file.write_text(json.dumps(session.document, indent=1) + "\n", encoding="utf-8")
                    click.echo(tables(session.runs))

        for option in _OPTIONS:
            measuring = option(measuring)
        return measuring

    return decorate


_OPTIONS: Final = (
    click.option("--json", "json_file", type=_PATH, help="Where to write all runs.  [default: DIR/results.json]"),
    click.option(
        "--time-guard", type=click.FloatRange(1), default=3600.0, show_default=True, help="The same in seconds."
    ),
    click.option(
        "--memory-guard",
        type=click.FloatRange(0.01),
        metavar="GB",
        help="End what takes more memory, mapped files not counted.  [default: 90 % of what is available]",
    ),
    click.option(
        "--rest",
        type=click.FloatRange(0),
        default=2.0,
        show_default=True,
        help="Seconds before each run, in which the disk is done with the one before.",
    ),
    click.option(
        "--cold",
        type=click.Choice(["all", "inputs", "none"]),
        default="all",
        show_default=True,
        help="What is dropped from the page cache before each run: everything, programs too (as root; else as "
        "'inputs'), the inputs, or nothing.",
    ),
    click.option(
        "--dir",
        "directory",
        type=click.Path(path_type=Path, file_okay=False),
        default=_ROOT / ".bench",
        show_default=".bench in the repository",
        help="Where pairs, results and outputs go. Its disk is what is measured.",
    ),
)
_rounds = click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Runs of each contender.")


def _command() -> str:
    """How this was called, without any path."""
    return " ".join(["scripts/bench", *("PATH" if "/" in word else word for word in sys.argv[1:])])


def _all_tables(runs: _Runs) -> str:
    parts = [report.table(runs), report.phase_table(runs)]
    if any("primitives" in run for run in runs):
        parts.append(report.primitive_table(runs))
    return "\n\n".join(part for part in parts if part)


# the commands


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """Measure how fast models are rebuilt from deltas: by bayling-delta, by other tools, and at best.

    Pairs are made of random numbers in LLaMA's shapes, and kept in the directory for later runs. Each command
    that measures prints tables in Markdown, and writes a JSON file with every single run.
    """


@main.command()
@click.option("--sizes", type=Sizes(), default="1.1B", show_default=True, help=f"Of {', '.join(SHAPES)}.")
@click.option(
    "--contenders",
    type=Contenders(),
    default="ours,ceilings,peers",
    show_default=True,
    help="Of ours, plan, copy-cached, copy-direct, digest-floor (these three: ceilings), fastchat, fastchat-low, "
    "mergekit (these three: peers). What is special follows with a plus sign: base=sorted (a safetensors base "
    "sorted by name), and for ours threads=N, memory=SIZE, digests=off, sink=off, phases=on.",
)
@click.option("--check", is_flag=True, help="Digest each contender's first result; fail if they differ.")
@_rounds
@_measuring(_all_tables)
def run(session: Session, sizes: list[Shape], contenders: list[Contender], check: bool, rounds: int) -> None:
    """Measure contenders against each other, interleaved.

    \b
    Examples:
      scripts/bench run --sizes tiny --rounds 1 --check
      scripts/bench run --sizes 0.3B,1.1B,7B --contenders ours,ours+base=sorted,ceilings,peers
      scripts/bench run --contenders ours,ours+memory=32MiB,ours+memory=256MiB,ours+threads=2
    """  # noqa: D301  # click looks for the character
    for shape in sizes:
        session.interleave(Wanted(shape), contenders, rounds, check=check)
    digests = {(each["size"], each["weights_digest"]) for each in session.runs if "weights_digest" in each}
    if len(digests) > len({size for size, _ in digests}):
        raise click.ClickException("the results are not all the same")


@main.command()
@click.option("--largest", type=_SIZE, default="3B", show_default=True, help="The largest size to write.")
@click.option("--sparse", type=_SIZE, default="13B", show_default=True, help="The largest to read as holes.")
@click.option("--shards-of", type=_SIZE, default="1.1B", show_default=True, help="The size to cut into 1 to 40 files.")
@click.option("--tensors", type=click.IntRange(100), default=100_000, show_default=True, help="To plan.")
@_rounds
@_measuring(lambda runs: f"{report.cost_table(runs)}\n\n{report.phase_table(runs)}")
def growth(session: Session, largest: str, sparse: str, shards_of: str, tensors: int, rounds: int) -> None:
    """Measure what a gigabyte costs: at every size, cut into more and more files, and with very many tensors.

    Sizes to --sparse are also read as files of holes, their sum digested and thrown away: that needs no disk. Pairs
    that were not there before are removed again.
    """
    measure_growth(session, SHAPES[largest], SHAPES[sparse], SHAPES[shards_of], tensors, rounds)


@main.command()
@click.option("--size", type=_SIZE, default="1.1B", show_default=True)
@_rounds
@_measuring(_all_tables)
def primitives(session: Session, size: str, rounds: int) -> None:
    """Compare the processor time of a run with that of its operations, each by itself: on a RAM disk.

    \b
    Example:
      scripts/bench primitives --dir /dev/shm/bench --cold none
    """  # noqa: D301  # click looks for the character
    session.interleave(Wanted(SHAPES[size]), parse("ours+phases=on,primitives"), rounds)


@main.command()
@click.option("--size", type=_SIZE, default="1.1B", show_default=True)
@click.option("--step", type=click.FloatRange(0.05), default=1.0, show_default=True, help="Seconds by which to count.")
@click.option(
    "--contender", type=Contenders(), default="ours", show_default=True, help="One, with what is special of it."
)
@click.option("--plot", "picture", type=_PATH, help="An SVG file to draw the trace into.")
@_measuring(_all_tables)
def trace(session: Session, size: str, step: float, contender: list[Contender], picture: Path | None) -> None:
    """Show what hardware threads, disk and the engine's stations do in every second of a run."""
    tracer = Tracer()
    watched = [each.with_events() for each in contender[:1]]
    session.interleave(Wanted(SHAPES[size]), watched, 1, look=tracer.look)
    events = session.runs[-1].pop("events", [])
    pieces = intervals(tracer.as_data(), events, step)
    session.runs[-1]["trace"] = [asdict(piece) for piece in pieces]
    click.echo(trace_table(pieces, events) + "\n")
    if picture is not None:
        from benchmark.plots import plot_trace

        plot_trace(pieces, picture)


@main.command("report")
@click.argument("results", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)
@click.option("--plot", "picture", type=_PATH, help="An SVG file for time and memory against size.")
def show(results: tuple[Path, ...], picture: Path | None) -> None:
    """Show the tables of earlier runs, all together, and draw them."""
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in results]
    for document in documents:
        click.echo(f"{document['command']}\n{json.dumps(document['machine'])}\n{json.dumps(document['peers'])}\n")
    runs = [run for document in documents for run in document["runs"]]
    click.echo(_all_tables(runs))
    if picture is not None:
        from benchmark.plots import plot_sizes

        plot_sizes(report.rows(run for run in runs if run["pair"] in SHAPES), picture)


if __name__ == "__main__":
    main(prog_name="scripts/bench")
