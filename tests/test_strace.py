"""The program itself, of whose system calls one fails, is interrupted, or is its last: injected by strace(1).

Only calls about the run's own files count: those of the interpreter's start are left alone. strace counts by thread;
a run with one thread has two that matter, the main one and the one that carries out the plan, and the n-th call of
each is met.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from bayling_delta import apply
from bayling_delta.errors import OutputError
from bayling_delta.staging import partial_path
from tests.failing import assert_whole
from tests.pairs import llama, save

pytestmark = pytest.mark.long

MOST = 16
"""How many of the calls of a kind are met, evenly spread."""

NAMES = {
    "open": "open openat openat2",
    "read": "preadv2 preadv pread64",
    "stat": "newfstatat fstat stat lstat statx",
    "list": "getdents64",
    "link": "readlink readlinkat",
    "room": "statfs",
    "advise": "fadvise64",
    "write": "pwrite64",
    "reserve": "fallocate",
    "cut": "ftruncate",
    "sync": "fsync",
    "close": "close",
    "mkdir": "mkdir mkdirat",
    "unlink": "unlink unlinkat",
    "rmdir": "rmdir",
    "name": "renameat2",
    "replace": "rename renameat",
    "lock": "flock",
}
"""What the file layer asks of Linux, and the system calls that this is on one machine or another."""

INPUT, OUTPUT, FINE = {3}, {6}, {0}
FAULTS: list[tuple[str, str, set[int]]] = [
    ("open", "EIO", {0, 3, 6}),  # of a directory that is only cleaned up too
    ("open", "EMFILE", {0, 3, 6}),
    ("read", "EIO", INPUT),
    ("stat", "EIO", {0, 3, 6}),  # some are asked of again, or for a hint
    ("list", "EIO", {0, 3, 6}),
    ("link", "EIO", {0, 3, 6}),
    ("room", "EIO", {0, 6}),
    ("advise", "EIO", FINE),
    ("write", "EIO", OUTPUT),
    ("write", "ENOSPC", OUTPUT),
    ("write", "EDQUOT", OUTPUT),
    ("reserve", "ENOSPC", OUTPUT),
    ("reserve", "EIO", OUTPUT),
    ("reserve", "EOPNOTSUPP", FINE),
    ("reserve", "ENOSYS", FINE),
    ("cut", "EIO", OUTPUT),
    ("sync", "EIO", OUTPUT),
    ("sync", "ENOSPC", OUTPUT),
    ("close", "EIO", FINE),
    ("mkdir", "ENOSPC", OUTPUT),
    ("mkdir", "EIO", OUTPUT),
    ("unlink", "EIO", {0, 6}),
    ("rmdir", "EIO", FINE),
    ("name", "EIO", OUTPUT),
    ("name", "EINVAL", FINE),
    ("name", "ENOSYS", FINE),
    ("replace", "EIO", OUTPUT),
    ("replace", "ENOSPC", OUTPUT),
    ("lock", "ENOLCK", {0, 6}),
    *((call, "EINTR", FINE) for call in NAMES),
    *((call, "KILL", {-9}) for call in NAMES),
]


@dataclass(frozen=True)
class Bench:
    """A pair, its sum, and what a run without a fault asks the system for."""

    place: Path
    paths: list[str]
    """Every path of the pair and of the output that a run names."""
    calls: Counter[str]
    """By system call, how many the busiest thread makes about these."""

    @property
    def out(self) -> Path:
        return self.place / "out"

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        return trace(self.place, self.out, *options, *(word for path in self.paths for word in ("-P", path)))


def trace(place: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run ``apply`` under strace."""
    words = ["apply", "--base", place / "base", "--delta", place / "delta", "--out", out, "--quiet", "--threads", "1"]
    program = [sys.executable, "-m", "bayling_delta", *words, "--max-shard-size", "70kB", "--memory-limit", "1MiB"]
    command = ["strace", "-f", "-qq", *options, *map(str, program)]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    place = tmp_path_factory.mktemp("bench")
    save(place / "base", llama(1), shards=2)
    delta = save(place / "delta", llama(2, 0.01), shards=2)
    (delta / "generation_config.json").write_text('{"bos_token_id": 1}')
    log = place / "log"
    first = trace(place, place / "out", "-o", str(log), "-e", "trace=%file")
    if first.returncode:
        pytest.skip(f"strace does not work here: {first.stderr.strip()[-200:]}")
    (place / "out").rename(place / "whole")
    paths = sorted({*re.findall(rf'"({re.escape(str(place))}[^"]*)"', log.read_text())})
    names = ",".join(f"?{name}" for text in NAMES.values() for name in text.split())
    without = Bench(place, paths, Counter())
    done = without.run("--seccomp-bpf", "-o", str(log), "-e", f"trace={names}")
    if done.returncode:
        pytest.skip(f"this strace is too old, or may not filter: {done.stderr.strip()[-200:]}")
    shutil.rmtree(without.out)
    made = Counter(tuple(found) for found in re.findall(r"^(\d+) +(\w+)\(", log.read_text(), re.MULTILINE))
    calls: Counter[str] = Counter()
    for (_, name), count in made.items():
        calls[name] = max(calls[name], count)
    return Bench(place, paths, calls)


@pytest.mark.parametrize(("call", "fault", "codes"), FAULTS, ids=[f"{row[0]}-{row[1]}" for row in FAULTS])
def test_a_system_call_fails(
    bench: Bench, record_property: Callable[[str, object], None], call: str, fault: str, codes: set[int]
) -> None:
    """The right exit code, nothing of the output or all of it, and a second run that makes the same."""
    met = 0
    used = [(name, bench.calls[name]) for name in NAMES[call].split() if name in bench.calls]
    if not used:
        pytest.skip(f"a run makes none of these here: {NAMES[call]}")
    for name, count in used:
        for number in sorted({1 + round(place * (count - 1) / (MOST - 1)) for place in range(MOST)}):
            met += meets(bench, name, number, fault, codes)
    record_property("faults met", met)
    assert met


def meets(bench: Bench, name: str, number: int, fault: str, codes: set[int]) -> bool:
    """One run, and one after it; whether the fault was met."""
    log = bench.place / "log"
    # with --seccomp-bpf, which is faster, strace injects no signals
    what = ["signal=KILL"] if fault == "KILL" else [f"error={fault}"]
    options = ["-o", str(log), "-e", f"trace={name}", "-e", f"inject={name}:{what[0]}:when={number}"]
    ended = bench.run(*options, *([] if fault == "KILL" else ["--seccomp-bpf"]))
    text = log.read_text()
    met = "(INJECTED)" in text or "killed by SIGKILL" in text
    assert "Traceback" not in ended.stderr
    assert ended.returncode in (codes if met else FINE), (name, number, ended, text[-500:])
    if ended.returncode in (3, 6):
        assert str(bench.place) in ended.stderr
    out, partial = bench.out, partial_path(bench.out)
    if out.exists():
        assert_whole(out, bench.place / "whole")
        with pytest.raises(OutputError, match="nothing is replaced"):
            again(bench)
    else:
        assert ended.returncode
        again(bench)
        assert_whole(out, bench.place / "whole")
    assert not partial.exists()
    shutil.rmtree(out)
    return met


def again(bench: Bench) -> None:
    apply(bench.place / "base", bench.place / "delta", bench.out, memory_limit=1 << 20, max_shard_size=70_000)


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="there is no preadv here")
def test_the_file_layer_is_seen(bench: Bench) -> None:
    """Were the paths or the names wrong, nothing would ever be met."""
    for call in ("open", "read", "stat", "write", "reserve", "sync", "name", "replace", "mkdir", "lock", "close"):
        assert sum(bench.calls[name] for name in NAMES[call].split()), call
