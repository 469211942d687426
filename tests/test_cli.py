"""The command line as a user meets it: a process, its exit code, its two streams."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bayling_delta.cli import Size, _Log
from bayling_delta.staging import partial_path
from tests.pairs import llama, save

Run = subprocess.CompletedProcess[str]


def bayling_delta(*words: str | Path, **options: Any) -> Run:
    command = [sys.executable, "-m", "bayling_delta", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, ...]:
    save(tmp_path / "base", llama(1), shards=2)
    save(tmp_path / "delta", llama(2, 0.01), shards=2)
    return ("--base", str(tmp_path / "base"), "--delta", str(tmp_path / "delta"), "--out", str(tmp_path / "out"))


def test_apply_says_what_it_made(tmp_path: Path, pair: tuple[str, ...]) -> None:
    done = bayling_delta("apply", *pair)
    assert (done.returncode, done.stderr) == (0, "")
    manifest = json.loads((tmp_path / "out" / "bayling-delta.json").read_text())
    assert manifest["result"]["weights_digest"] in done.stdout
    assert "on no record" in done.stdout
    assert "\x1b" not in done.stdout


def test_json_is_one_document_and_the_manifest(tmp_path: Path, pair: tuple[str, ...]) -> None:
    done = bayling_delta("apply", *pair, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == json.loads((tmp_path / "out" / "bayling-delta.json").read_text())


def test_quiet_says_nothing(pair: tuple[str, ...]) -> None:
    done = bayling_delta("apply", *pair, "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_dry_run_writes_nothing_and_tells_the_plan(tmp_path: Path, pair: tuple[str, ...]) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = bayling_delta("apply", *pair, "--dry-run", "--max-shard-size", "50KB")
    assert done.returncode == 0, done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert "model-00001-of-" in done.stdout
    assert "Nothing was written" in done.stdout
    document = json.loads(bayling_delta("apply", *pair, "--dry-run", "--json").stdout)
    assert document["schema"] == "bayling-delta/plan/1"
    bayling_delta("apply", *pair)
    made = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert document["result"]["files"] == [{"name": "model.safetensors", "size": made, "tensors": 21}]


def test_expect(pair: tuple[str, ...]) -> None:
    digest = json.loads(bayling_delta("apply", *pair, "--json").stdout)["result"]["weights_digest"]
    other = [*pair[:-1], pair[-1] + "-2"]
    assert "the result's weights digest: as --expect" in bayling_delta("apply", *other, "--expect", digest).stdout
    failed = bayling_delta("apply", *pair[:-1], pair[-1] + "-3", "--expect", "1" * 64)
    assert failed.returncode == 5
    assert digest in failed.stderr


# failures: (exit code, error.kind, words of the message)


def failing(case: str, place: Path) -> None:
    """Make the pair in ``place`` fail in one way."""
    if case == "absent":
        (place / "base" / "pytorch_model-00001-of-00002.bin").unlink()
    elif case == "unlike":
        (place / "delta").rename(place / "old")
        save(place / "delta", {name: tensor for name, tensor in llama(2, 0.01).items() if name != "model.norm.weight"})
    elif case == "occupied":
        (place / "out").mkdir()


FAILURES = {
    "absent": (3, "checkpoint", "download the missing shard"),
    "unlike": (4, "mismatch", "lacks model.norm.weight"),
    "occupied": (6, "output", "nothing is replaced"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failures(tmp_path: Path, pair: tuple[str, ...], case: str) -> None:
    code, kind, words = FAILURES[case]
    failing(case, tmp_path)
    done = bayling_delta("apply", *pair)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    document = json.loads(bayling_delta("apply", *pair, "--json").stdout)
    assert (document["schema"], document["ok"]) == ("bayling-delta/apply/1", False)
    assert document["error"]["kind"] == kind
    assert all(problem.keys() == {"kind", "where", "message", "allow"} for problem in document["error"]["problems"])


USAGE = [
    ([], "Missing command"),
    (["nonsense"], "No such command 'nonsense'"),
    (["apply"], "Missing option '--base'"),
    (["apply", "--base", "b", "--delta", "d", "--out", "o", "--memory-limit", "lots"], "'lots' is not a size"),
    (["apply", "--base", "b", "--delta", "d", "--out", "o", "--max-shard-size", "0"], "not a size above 0"),
    (["apply", "--base", "b", "--delta", "d", "--out", "o", "--expect", "abc"], "is not a SHA-256"),
    (["apply", "--base", "b", "--delta", "d", "--out", "o", "--allow", "everything"], "'everything' is not"),
    (["apply", "--base", "b", "--delta", "d", "--out", "o", "--threads", "0"], "0 is not in the range"),
]


@pytest.mark.parametrize(("words", "message"), USAGE, ids=[message for _, message in USAGE])
def test_usage_errors(words: list[str], message: str) -> None:
    done = bayling_delta(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    if words:
        document = json.loads(bayling_delta(*words, "--json").stdout)
        assert document["error"]["kind"] == "usage"


def test_help_teaches() -> None:
    done = bayling_delta("apply", "--help")
    assert done.returncode == 0
    for words in ("Examples:", "--dry-run", "bit for bit"):
        assert words in done.stdout
    assert "Exit codes:" in bayling_delta("--help").stdout


def test_names_from_files_cannot_command_the_terminal(tmp_path: Path, pair: tuple[str, ...]) -> None:
    state = llama(2, 0.01) | {"evil\x1b[2J\nname": llama(1)["model.norm.weight"]}
    (tmp_path / "delta").rename(tmp_path / "old")
    save(tmp_path / "delta", state)
    done = bayling_delta("apply", *pair)
    assert done.returncode == 3
    assert "\x1b" not in done.stderr
    assert "evil" in done.stderr


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("64MiB", 1 << 26), ("1.5 kb", 1500), ("10", 10), ("2TiB", 1 << 41), ("1KiB", 1024)],
)
def test_sizes(text: str, size: int) -> None:
    assert Size().convert(text, None, None) == size


SLOW = """
import signal, sys, time
from bayling_delta import system
from bayling_delta.cli import main

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)  # a shell's background job, or nohup, has some ignored

class Slow(system.System):
    def write_from(self, handle, view, offset):
        time.sleep(0.05)
        return super().write_from(handle, view, offset)

system.calls = Slow()
main(sys.argv[1:])
"""
"""The program, with a disk slow enough to be interrupted in the middle."""


def started(partial: Path, program: str, *words: str, begun: int = 1) -> subprocess.Popen[str]:
    """The program, running, with so many weight files begun."""
    process = subprocess.Popen([sys.executable, "-c", program, *words], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(partial.glob("model/model*.safetensors"))) < begun:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_before_anything_is_finished_leaves_nothing(
    tmp_path: Path, pair: tuple[str, ...], number: signal.Signals, code: int
) -> None:
    partial = partial_path(tmp_path / "out")
    process = started(partial, SLOW, "apply", *pair, "--memory-limit", "128KiB")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors == f"error: interrupted by {number.name}; run the command again\n"
    assert not partial.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_one_after_the_other_leave_what_can_be_gone_on_with(
    tmp_path: Path, pair: tuple[str, ...], number: signal.Signals
) -> None:
    """An impatient second and third, while the first is being obeyed, do no harm."""
    words = ("apply", *pair, "--memory-limit", "128KiB", "--max-shard-size", "40kB")
    partial = partial_path(tmp_path / "out")
    process = started(partial, SLOW, *words, begun=4)
    for each in (number, signal.SIGINT, signal.SIGTERM, number):
        process.send_signal(each)
        time.sleep(0.01)
    _, errors = process.communicate(timeout=60)
    first = signal.Signals(process.returncode - 128)  # of several at once the interpreter sees any first
    assert first in (number, signal.SIGINT, signal.SIGTERM)
    told = re.fullmatch(
        rf"error: interrupted by {first.name}; (\d) of 6 weight files are finished, in {re.escape(str(partial))}: "
        r"run the command again to go on\n",
        errors,
    )
    assert told, errors
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("model/*")}
    assert len(kept) == int(told[1]) > 0
    assert not (tmp_path / "out").exists()
    assert bayling_delta(*words).returncode == 0
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in kept} == kept
    assert bayling_delta("verify", str(tmp_path / "out")).returncode == 0


def test_a_second_run_is_told_of_the_first(tmp_path: Path, pair: tuple[str, ...]) -> None:
    stuck = SLOW.replace("0.05", "1")  # it is killed long before it is done
    process = started(partial_path(tmp_path / "out"), stuck, "apply", *pair, "--memory-limit", "128KiB")
    for words in ([], ["--dry-run"], ["--no-resume"]):
        waiting = bayling_delta("apply", *pair, *words)
        assert waiting.returncode == 6
        assert f"is being written by another run, process {process.pid}, since 20" in waiting.stderr
    process.kill()
    process.communicate()
    assert not (tmp_path / "out").exists()
    assert bayling_delta("apply", *pair).returncode == 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]


def test_a_reader_that_goes_away_is_no_fault(pair: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "bayling_delta", "apply", *pair, "--json"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert done.returncode == 6
    assert "Traceback" not in done.stderr
    assert Path(pair[-1]).exists()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("record base >&-", 6),
        ("record base --json >&-", 6),
        ("inspect base >&-", 6),
        ("inspect base --quiet >&-", 0),
        ("record base >/dev/full", 6),
        ("record nothing 2>&-", 3),
        ("record nothing 2>/dev/full", 3),
    ],
)
def test_output_that_goes_nowhere_is_noticed(tmp_path: Path, pair: tuple[str, ...], words: str, code: int) -> None:
    """A stream that is closed, or a disk that is full."""
    assert pair
    command = f"exec {sys.executable} -m bayling_delta {words}"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away_where_errors_go_nowhere(tmp_path: Path, pair: tuple[str, ...]) -> None:
    assert pair
    command = f"{{ {sys.executable} -m bayling_delta record base 2>&-; echo $? >code; }} | true"
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=False)
    assert (tmp_path / "code").read_text() == "6\n"


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path, pair: tuple[str, ...]) -> None:
    """What a library prints would be in the weights."""
    program = (
        "from bayling_delta import system; from bayling_delta.cli import main\n"
        "opened = system.calls.open_write\n"
        "def noted(path, *, direct):\n"
        "    handle = opened(path, direct=direct)\n"
        f"    open({str(tmp_path / 'handles')!r}, 'a').write(f'{{handle}} ')\n"
        "    return handle\n"
        "system.calls.open_write = noted\n"
        f"main({['apply', *pair]!r})\n"
    )
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", program]
    assert subprocess.run(command, check=False).returncode == 6  # the summary could not be printed
    assert min(map(int, (tmp_path / "handles").read_text().split())) > 2
    assert bayling_delta("verify", tmp_path / "out").returncode == 0


def test_a_line_of_progress_that_cannot_be_printed_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    log = _Log("apply")
    log._last -= 100
    monkeypatch.setattr("bayling_delta.cli.click.echo", full)
    log.line(1, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
@pytest.mark.parametrize("limit", [150 << 20, 200 << 20])
def test_too_little_memory_is_called_so(pair: tuple[str, ...], limit: int) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    done = bayling_delta("apply", *pair, preexec_fn=limited)
    assert done.returncode == 1
    assert "cannot have the memory that it needs" in done.stderr, done.stderr


def test_a_current_directory_that_is_gone(tmp_path: Path, pair: tuple[str, ...]) -> None:
    (tmp_path / "gone").mkdir()
    program = (
        f"import os; os.rmdir(os.getcwd()); from bayling_delta.cli import main; main({['apply', *pair[:-1], 'out']!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "gone", capture_output=True, text=True, check=False
    )
    assert done.returncode == 6
    assert "out.partial: cannot be written (No such file or directory)" in done.stderr
