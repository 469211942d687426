"""Settings for all tests."""

import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

# The machines that run these are shared: a slow moment is no fault.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """The command line sets handlers for signals; a test that calls it must not leave them behind."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)
