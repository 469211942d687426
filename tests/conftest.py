"""Settings for all tests."""

import os
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("tests.failing", "tests.wrong_input")

from tests.failing import Stage, make_stage  # noqa: E402
from tests.running import Run, runner  # noqa: E402

# The machines that run these are shared: a slow moment is no fault.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# Nothing here may ask the Hub or touch a user's cache; huggingface_hub reads these when it is imported.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": tempfile.gettempdir() + "/no-cache-of-the-hub"}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what the tests that count have tried, each test's cases together; docs/reliability.md has these figures."""
    tried: dict[str, Counter[str]] = {}
    for report in terminalreporter.getreports("passed"):
        for what, found in report.user_properties:
            counts = found if isinstance(found, dict) else {what: found}
            tried.setdefault(report.nodeid.partition("[")[0], Counter()).update(counts)
    if tried:
        terminalreporter.section("tried")
    for test, counts in tried.items():
        figures = ", ".join(f"{what}: {count}" for what, count in sorted(counts.items()))
        terminalreporter.line(f"{test}: {figures}")


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


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """What runs with a fault, or a signal, are about."""
    return make_stage(tmp_path_factory.mktemp("stage"))
