"""What is measured: bayling-delta, what the machine can do at all, and other people's tools."""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from benchmark.environments import Peers
from benchmark.measure import Job
from benchmark.pairs import Pair
from benchmark.work import Work

__all__ = ["Contender", "Place", "UnknownError", "parse"]

_ROOT: Final = Path(__file__).resolve().parents[2]
_OPTIONS: Final = {
    "base": ("same", "sorted"),
    "digests": ("on", "off"),
    "events": ("on", "off"),
    "phases": ("on", "off"),
    "sink": ("on", "off"),
    "memory": (),
    "threads": (),
}
"""What can be said of a contender after its kind, and the values where they are few."""


_OF_HOLES: Final = ("--allow", "all_zero", "--allow", "looks_like_delta")
"""What a pair of holes needs where nothing is written."""


class UnknownError(ValueError):
    """Nothing is known by this name."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a contender finds its inputs and leaves its output."""

    pair: Pair
    work: Work
    output: Path
    report: Path
    """Where the driver writes its report."""
    temporary: Path
    peers: Peers


@dataclass(frozen=True, slots=True)
class Contender:
    """A kind, and what is special: ``ours+threads=2`` is bayling-delta with two threads."""

    name: str
    kind: str
    options: Mapping[str, str]

    @property
    def sorted_base(self) -> bool:
        """Whether the base is in another order and container than the delta."""
        return self.options.get("base") == "sorted"

    @property
    def driven(self) -> bool:
        """Whether the driver takes its phases."""
        return self.kind == "ours" and any(self.options.get(key) for key in ("digests", "events", "phases", "sink"))

    @property
    def is_tool(self) -> bool:
        """Whether it writes a model."""
        return not self.is_ceiling and self.kind != "plan" and self.options.get("sink") != "off"

    @property
    def is_ceiling(self) -> bool:
        """Whether it is what the machine can do at all."""
        return self.kind in (*_GROUPS["ceilings"], "primitives")

    def disk_bytes(self, work: Work) -> int:
        """What it may have on the disk at most, inputs apart."""
        if self.kind in ("digest-floor", "plan") or self.options.get("sink") == "off":
            return 0
        copies = 3 if self.kind == "fastchat-low" else 1  # it first splits both inputs into copies
        return copies * (work.output_bytes + (16 << 20))

    @property
    def peer(self) -> str | None:
        """The environment that it needs."""
        return {"fastchat": "fastchat", "fastchat-low": "fastchat", "mergekit": "mergekit"}.get(self.kind)

    def with_events(self) -> "Contender":
        """The same, what its stations do noted too."""
        return replace(self, options={**self.options, "events": "on"}) if self.kind == "ours" else self

    def inputs(self, pair: Pair) -> tuple[Path, Path]:
        """Base and delta."""
        return (pair.sorted_base if self.sorted_base else pair.base), pair.delta

    def job(self, place: Place) -> Job:
        """The command to measure."""
        return _JOBS[self.kind](self, place)


def parse(text: str) -> list[Contender]:
    """Contenders from a list such as ``ours,ours+base=sorted,ceilings,mergekit``.

    Raises:
        UnknownError: a kind, an option or a value that there is not.
    """
    found = [_one(name) for word in text.split(",") for name in _GROUPS.get(word, (word,))]
    return list({contender.name: contender for contender in found}.values())


def _one(name: str) -> Contender:
    kind, *said = name.split("+")
    if kind not in _JOBS:
        raise UnknownError(f"{kind!r} is none of {', '.join((*_JOBS, *_GROUPS))}")
    options: dict[str, str] = {}
    for word in said:
        key, _, value = word.partition("=")
        if key not in _OPTIONS or not value or (_OPTIONS[key] and value not in _OPTIONS[key]):
            known = ", ".join(f"{key}={'|'.join(values) or '…'}" for key, values in _OPTIONS.items())
            raise UnknownError(f"{name!r}: {word!r} is none of {known}")
        if kind != "ours" and key != "base":
            raise UnknownError(f"{name!r}: {key} is an option of 'ours' alone")
        options[key] = value
    return Contender(name, kind, options)


# the commands


def _environment(place: Place, *python_path: Path) -> dict[str, str]:
    """Nothing but what a program needs; temporary files go to the disk that is measured."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TQDM_DISABLE": "1"}
    environment = {**kept, **quiet, "TMPDIR": str(place.temporary)}
    if python_path:
        environment["PYTHONPATH"] = os.pathsep.join(map(str, python_path))
    return environment


def _ours(contender: Contender, place: Place) -> Job:
    base, delta = contender.inputs(place.pair)
    words = ["apply", "--quiet", "--base", str(base), "--delta", str(delta), "--out", str(place.output)]
    for key, option in (("threads", "--threads"), ("memory", "--memory-limit")):
        if key in contender.options:
            words += [option, contender.options[key]]
    if not contender.driven:
        command = [sys.executable, "-m", "bayling_delta", *words]
        return Job(command, _environment(place, _ROOT / "src"), place.output)
    switches = [f"--no-{key}" for key in ("digests", "sink") if contender.options.get(key) == "off"]
    switches += ["--events"] if contender.options.get("events") == "on" else []
    if contender.options.get("sink") == "off":
        words += _OF_HOLES
    command = [sys.executable, "-m", "benchmark.driver", str(place.report), *switches, "--", *words]
    return Job(command, _environment(place, _ROOT / "src", _ROOT / "scripts"), place.output)


def _plan(contender: Contender, place: Place) -> Job:
    base, delta = contender.inputs(place.pair)
    words = ["apply", "--dry-run", "--quiet", "--base", str(base), "--delta", str(delta), "--out", str(place.output)]
    command = [sys.executable, "-m", "bayling_delta", *words, *_OF_HOLES]
    return Job(command, _environment(place, _ROOT / "src"), None)


def _copy(*switches: str) -> Callable[[Contender, Place], Job]:
    def job(contender: Contender, place: Place) -> Job:
        command = [sys.executable, "-m", "benchmark.ceilings", "copy", *_copied(contender, place), *switches]
        return Job(command, _environment(place, _ROOT / "scripts"), place.output)

    return job


def _copied(contender: Contender, place: Place) -> list[str]:
    inputs = map(str, contender.inputs(place.pair))
    return [*inputs, "--out", str(place.output), "--bytes", str(place.work.output_bytes)]


def _digest_sizes(work: Work) -> list[str]:
    return ["--sha256-bytes", str(work.sha256_bytes), "--crc32-bytes", str(work.crc32_bytes)]


def _digest_floor(_contender: Contender, place: Place) -> Job:
    command = [sys.executable, "-m", "benchmark.ceilings", "digest", *_digest_sizes(place.work)]
    return Job(command, _environment(place, _ROOT / "scripts"), None)


def _primitives(contender: Contender, place: Place) -> Job:
    sizes = [*_digest_sizes(place.work), "--add-bytes", str(2 * place.work.parameters)]
    command = [sys.executable, "-m", "benchmark.ceilings", "primitives", *_copied(contender, place), *sizes]
    return Job(command, _environment(place, _ROOT / "scripts"), None)


def _fastchat(*switches: str) -> Callable[[Contender, Place], Job]:
    def job(contender: Contender, place: Place) -> Job:
        base, delta = contender.inputs(place.pair)
        paths = ["--base-model-path", str(base), "--delta-path", str(delta), "--target-model-path", str(place.output)]
        command = [
            str(place.peers.program("fastchat", "python")),
            "-m",
            "fastchat.model.apply_delta",
            *paths,
            *switches,
        ]
        return Job(command, _environment(place), place.output)

    return job


def _mergekit(contender: Contender, place: Place) -> Job:
    recipe = {
        "merge_method": "linear",
        "dtype": "float16",
        "parameters": {"normalize": False},
        "models": [{"model": str(path), "parameters": {"weight": 1}} for path in contender.inputs(place.pair)],
    }
    file = place.temporary / "mergekit.yml"
    file.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    program = str(place.peers.program("mergekit", "mergekit-yaml"))
    command = [program, str(file), str(place.output), "--lazy-unpickle"]  # else it holds whole shards
    return Job(command, _environment(place), place.output)


_JOBS: Final[Mapping[str, Callable[[Contender, Place], Job]]] = {
    "ours": _ours,
    "plan": _plan,
    "copy-cached": _copy(),
    "copy-direct": _copy("--direct"),
    "digest-floor": _digest_floor,
    "primitives": _primitives,
    "fastchat": _fastchat(),
    "fastchat-low": _fastchat("--low-cpu-mem"),
    "mergekit": _mergekit,
}
_GROUPS: Final[Mapping[str, Sequence[str]]] = {
    "ceilings": ("copy-cached", "copy-direct", "digest-floor"),
    "peers": ("fastchat", "fastchat-low", "mergekit"),
}
