"""Runs on a disk that is really full; a program of its own, since it wants a small disk that goes when it ends.

``python -m tests.filling PLACE WHAT STEP`` mounts a small tmpfs on ``PLACE/small``, which wants a mount namespace
of its own. Beside it lie ``base``, ``delta`` and their sum, ``whole``. It prints, as JSON, how each run ended.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bayling_delta import apply, system
from bayling_delta.errors import OutputError
from bayling_delta.staging import partial_path
from bayling_delta.system import System
from tests.failing import assert_whole

SHARD = 70_000
PAGE = 4096


class Hopeful(System):
    """A system that promises room, so that a run begins: another program takes it meanwhile."""

    def free_bytes(self, path: Path) -> int:  # noqa: ARG002
        return 1 << 40

    def free_files(self, path: Path) -> None:  # noqa: ARG002
        return None


@contextmanager
def bytes_left(small: Path, room: int) -> Iterator[None]:
    """Let so many bytes be free."""
    ballast = small / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free(small) - room)
    yield
    ballast.unlink()


@contextmanager
def names_left(small: Path, room: int) -> Iterator[None]:
    """Let so many files more be possible."""
    (small / "ballast").mkdir()
    for number in range(os.statvfs(small).f_favail - room):
        (small / "ballast" / str(number)).touch()
    yield
    shutil.rmtree(small / "ballast")


def free(small: Path) -> int:
    usage = os.statvfs(small)
    return usage.f_bavail * usage.f_frsize


def ended(place: Path, out: Path) -> str:
    """The kind of problem that a run on a full disk ends with, "" where it had room enough."""
    options: dict[str, Any] = {"memory_limit": 1 << 20, "max_shard_size": SHARD}
    try:
        with system.using(Hopeful()):
            apply(place / "base", place / "delta", out, **options)
    except OutputError as error:
        assert not out.exists()
        return ",".join(problem.kind for problem in error.problems)
    return ""


def each(place: Path, less: Callable[[Path, int], Any], rooms: range) -> Iterator[dict[str, Any]]:
    """Run with each so much room; then with enough, by the same command."""
    out = place / "small" / "out"
    for room in rooms:
        with less(out.parent, room):
            kind = ended(place, out)
        kept = sorted(path.name for path in partial_path(out).glob("model/*"))
        if kind:
            apply(place / "base", place / "delta", out, memory_limit=1 << 20, max_shard_size=SHARD)
        assert_whole(out, place / "whole")
        assert not partial_path(out).exists()
        shutil.rmtree(out)
        yield {"room": room, "kind": kind, "kept": kept}


def program(place: Path, out: Path) -> list[str]:
    words = ["apply", "--base", place / "base", "--delta", place / "delta", "--out", out, "--max-shard-size", SHARD]
    return [sys.executable, "-m", "bayling_delta", *map(str, words), "--memory-limit", "1MiB", "--json"]


def refused(place: Path) -> dict[str, Any]:
    """The program itself, which sees beforehand that there is too little room."""
    out = place / "small" / "out"
    with bytes_left(out.parent, 10 << 20):
        done = subprocess.run(program(place, out), capture_output=True, text=True, check=False)
    left = sorted(path.name for path in out.parent.iterdir())
    return {"code": done.returncode, "document": json.loads(done.stdout), "left": left}


def filled_meanwhile(place: Path) -> Iterator[dict[str, Any]]:
    """The program itself, on a disk that somebody fills while it is stopped; then again, with room."""
    out = place / "small" / "out"
    for number in range(16):
        process = subprocess.Popen(program(place, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        names = ("lock", "journal", "model/model-00001-of-00003.safetensors", "model/model-00002-of-00003.safetensors")
        awaited = partial_path(out) / names[number % len(names)]
        while not awaited.exists() and process.poll() is None:
            time.sleep(0.0002)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # all its threads
        with bytes_left(out.parent, 0):
            process.send_signal(signal.SIGCONT)
            output, errors = process.communicate()
        kept = sorted(path.name for path in partial_path(out).glob("model/*"))
        assert out.exists() == (process.returncode == 0)
        if process.returncode:
            done = subprocess.run(program(place, out), capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        assert_whole(out, place / "whole")
        shutil.rmtree(out)
        document = json.loads(output)
        kinds = [] if document["ok"] else [problem["kind"] for problem in document["error"]["problems"]]
        yield {"code": process.returncode, "kinds": kinds, "errors": errors, "kept": kept}


def main(place: Path, what: str, step: int) -> None:
    small = place / "small"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m,nr_inodes=64", "tmpfs", str(small)], check=True)
    found: Any
    if what == "bytes":
        found = list(each(place, bytes_left, range(0, 70 * PAGE, step * PAGE)))
    elif what == "names":
        found = list(each(place, names_left, range(0, 16, step)))
    elif what == "refused":
        found = refused(place)
    else:
        found = list(filled_meanwhile(place))
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
