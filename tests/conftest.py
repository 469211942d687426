"""Settings for all tests."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.running import Run, runner

pytest.register_assert_rewrite("tests.wrong_input")

# The machines that run these are shared: a slow moment is no fault.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# Nothing here may ask the Hub or touch a user's cache; huggingface_hub reads these when it is imported.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": tempfile.gettempdir() + "/no-cache-of-the-hub"}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what the tests that count have tried; docs/reliability.md has these figures."""
    reports = [report for report in terminalreporter.getreports("passed") if report.user_properties]
    if reports:
        terminalreporter.section("tried")
    for report in reports:
        for what, figure in report.user_properties:
            terminalreporter.line(f"{report.nodeid.partition('::')[2]}: {what}: {figure}")


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """The command line sets handlers for signals; a test that calls it must not leave them behind."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line with ``--json`` in this process."""
    return runner(capsys)


@pytest.fixture
def place(tmp_path: Path, pristine: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module's pristine pair, to be spoiled, in the current directory."""
    from tests.wrong_input import copy_linked

    copy_linked(pristine, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
