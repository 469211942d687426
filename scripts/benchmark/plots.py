"""Pictures, readable on white and on black: nothing is filled behind them, and all lines are of middling brightness."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl  # type: ignore[import-not-found,unused-ignore]
from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]
from matplotlib.ticker import LogLocator  # type: ignore[import-not-found,unused-ignore]

from benchmark.report import Row
from benchmark.trace import Interval

__all__ = ["plot_sizes", "plot_trace"]

_GREY: Final = "#808080"
_COLOURS: Final = ("#2a8fd8", "#e0662f", "#2fa36b", "#c85bb0", "#b8901f", "#7d74e0", "#d1495b", "#3aa6a6", "#8c8c8c")
_STYLE: Final = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "bench",  # the same figures make the same file
    "font.size": 10,
    "text.color": _GREY,
    "axes.labelcolor": _GREY,
    "axes.edgecolor": _GREY,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "axes.grid": True,
    "grid.color": _GREY,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, transparent=True, metadata={"Date": None})


def plot_sizes(found: Sequence[Row], path: Path) -> None:
    """Time and peak memory against the bytes of the result, a line for each contender."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(10, 4.5), layout="constrained")
        time, memory = figure.subplots(1, 2)
        for number, contender in enumerate(dict.fromkeys(row.contender for row in found)):
            rows = sorted(
                (row for row in found if row.contender == contender and row.finished), key=lambda row: row.output_bytes
            )
            look: dict[str, Any] = {"marker": "o", "markersize": 4, "color": _COLOURS[number % len(_COLOURS)]}
            if contender.startswith(("copy", "digest")):
                look |= {"linestyle": ":", "marker": "x"}
            sizes = [row.output_bytes / 1e9 for row in rows]
            time.plot(sizes, [row.seconds for row in rows], label=contender, **look)
            if "linestyle" not in look:
                memory.plot(sizes, [row.peak_bytes / 1e6 for row in rows], **look)
        for axes, label in ((time, "seconds until the data is on the disk"), (memory, "peak memory, MB")):
            axes.set(xscale="log", yscale="log", xlabel="result, GB", ylabel=label)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter("")
        figure.legend(loc="outside lower center", ncols=4)
        _save(figure, path)


def plot_trace(pieces: Sequence[Interval], path: Path) -> None:
    """Hardware threads, disk and stations over the time of a run."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(10, 8), layout="constrained")
        processor, disk, stations = figure.subplots(3, 1, sharex=True, height_ratios=(2, 2, 3))
        times = [(piece.start + piece.stop) / 2 for piece in pieces]
        shares = [[sum(cpu[kind] for cpu in piece.cpus) for piece in pieces] for kind in range(3)]
        processor.stackplot(
            times, *shares, labels=("user", "system", "waiting for the disk"), colors=_COLOURS, alpha=0.7
        )
        processor.set(ylabel="hardware threads", ylim=(0, max((len(piece.cpus) for piece in pieces), default=1)))
        disk.plot(times, [piece.read / 1e6 for piece in pieces], color=_COLOURS[0], label="read")
        disk.plot(times, [piece.written / 1e6 for piece in pieces], color=_COLOURS[1], label="written")
        disk.set(ylabel="MB/s")
        names = list(dict.fromkeys(name for piece in pieces for name in piece.busy))
        for place, name in enumerate(names):
            busy = [min(1.0, piece.busy.get(name, 0)) * 0.8 for piece in pieces]
            stations.fill_between(
                times, place, [place + share for share in busy], color=_COLOURS[place % 9], step="mid"
            )
        stations.set(xlabel="seconds", yticks=range(len(names)), yticklabels=names)
        for axes in (processor, disk):
            axes.legend(loc="upper right", ncols=3)
        _save(figure, path)
