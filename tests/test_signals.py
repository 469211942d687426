"""A signal at any moment: at every call of the seam, in whatever thread; the run ends, and the next one is right."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from bayling_delta.cli import main
from bayling_delta.crew import Crew, Station
from bayling_delta.errors import BaylingDeltaError, InterruptedRunError
from bayling_delta.staging import partial_path
from bayling_delta.system import System
from tests.failing import COMMANDS, Call, Stage, Watched
from tests.running import Finished, Run

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class SignalAt(Watched):
    """At the n-th call, whatever it is, a signal comes."""

    def __init__(self, number: int, signal_number: int) -> None:
        super().__init__()
        self.count = 0
        self._number = number
        self._signal = signal_number
        self._counting = threading.Lock()

    def at(self, name: str, call: Call, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        with self._counting:
            self.count += 1
            now = self.count == self._number
        if now:
            os.kill(os.getpid(), self._signal)  # in the main thread the handler is run before the next line is
        return super().at(name, call, arguments, options)


def interrupted(stage: Stage, run: Run, command: str, world: SignalAt) -> Finished:
    """Run a command from its beginning, as a process that nothing has interrupted."""
    stage.reset(command)
    for number in NUMBERS:
        signal.signal(number, signal.SIG_DFL)
    return run(stage.command(command), world)


def close_files_in(place: Path) -> None:
    """A signal may come between opening a file and noting that it is open."""
    for handle in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the directory itself
            if handle.readlink().is_relative_to(place):
                os.close(int(handle.name))


@pytest.mark.parametrize("step", [41, pytest.param(1, marks=pytest.mark.long)], ids=["some", "every"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_comes_at_every_call(
    stage: Stage, run: Run, record_property: Callable[[str, object], None], command: str, step: int
) -> None:
    calls = SignalAt(0, 0)
    assert interrupted(stage, run, command, calls).code == 0
    met = 0
    for number in range(1, calls.count, step):
        which = NUMBERS[number % len(NUMBERS)]
        world = SignalAt(number, which)
        ended = interrupted(stage, run, command, world)
        if world.count < number:  # threads make more calls in one run than in another
            continue
        met += 1
        assert ended.code == 128 + which, (number, ended)
        assert ended.kinds == ["signal"]
        close_files_in(stage.place)  # as the end of the process does
        told = [line for line in ended.errors.splitlines() if not line.startswith("note: ")]
        there = stage.out.exists()
        how = f"{stage.out} is whole" if there and command in ("apply", "go on") else ".*run the command again"
        assert re.fullmatch(f"error: interrupted by {which.name}; {how}.*", "\n".join(told)), ended.errors
        stage.check(command, ended)
        again = run(stage.command(command))
        assert again.code == (6 if there and command in ("apply", "go on", "record") else 0), (number, ended, again)
        stage.check(command, again, before=there)
    record_property("signals", met)
    assert met


def test_who_passes_over_errors_does_not_pass_over_a_signal() -> None:
    """Libraries do, and so do we where problems are collected."""
    assert not issubclass(InterruptedRunError, (Exception, BaylingDeltaError))


def test_a_crew_is_waited_for_though_a_signal_comes() -> None:
    """What comes next closes the files that its threads are at."""
    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def slow(_: object) -> None:
        begun.set()
        go_on.wait(60)
        done.set()

    def leave() -> None:
        with Crew(1) as crew:
            crew.post(Station(slow), None)
            begun.wait(60)

    def interrupt(*_: object) -> None:
        go_on.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        leave()
    assert done.is_set()


def test_a_signal_while_a_failure_is_told_adds_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It ends the program as it ends any other."""
    ends: list[object] = []

    def told(*_: object, **__: object) -> None:
        ends.extend(signal.getsignal(number) for number in NUMBERS)

    for number in NUMBERS:
        signal.signal(number, signal.SIG_DFL)
    monkeypatch.setattr("bayling_delta.cli.click.echo", told)
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "nothing")])
    assert ends == [signal.SIG_DFL] * 3
    capsys.readouterr()


def test_a_signal_before_the_program_is_loaded_ends_it_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    begin = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    ended = subprocess.run(
        [sys.executable, "-c", begin + "from bayling_delta.__main__ import run; run()"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")


def test_a_signal_that_comes_while_the_output_is_renamed(stage: Stage, run: Run) -> None:
    """The system has done it, and the program does not know it yet."""

    class Renamed(System):
        def rename_new(self, old: Path, new: Path) -> None:
            super().rename_new(old, new)
            os.kill(os.getpid(), signal.SIGTERM)

    for number in NUMBERS:
        signal.signal(number, signal.SIG_DFL)
    stage.reset("apply")
    ended = run(stage.command("apply"), Renamed())
    assert ended.code == 128 + signal.SIGTERM
    assert ended.document["error"]["hint"] == f"{stage.out} is whole, and has its name"
    stage.check("apply", ended)
    assert not partial_path(stage.out).exists()


def test_threads_that_cannot_be_begun_leave_none(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[threading.Thread] = []
    start = threading.Thread.start

    def starting(thread: threading.Thread) -> None:
        if len(begun) == 3:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", starting)
    with pytest.raises(RuntimeError), Crew(8):
        pass
    for thread in begun:
        thread.join(60)
        assert not thread.is_alive()
