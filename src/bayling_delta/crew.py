"""A few threads that share the work of many stations.

A station handles its messages one at a time and in order, so its state needs no lock; different stations
run at the same time as far as there are threads. What comes out does not depend on their number.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

__all__ = ["Crew", "Station"]


class Station:
    """Something that handles messages, one at a time."""

    def __init__(self, handle: Callable[[Any], None] | None = None) -> None:
        self.handle: Callable[[Any], None] = handle or _unhandled
        """Set before the first message."""
        self._inbox: deque[Any] = deque()
        self._scheduled = False


def _unhandled(message: object) -> None:
    raise RuntimeError(f"a station without a handler was given {message}")


class Crew:
    """The threads. Use as a context manager: leaving it ends them, each after the message it is at."""

    def __init__(self, threads: int) -> None:
        self._condition = threading.Condition()
        self._ready: deque[Station] = deque()
        self._running = 0
        self._busy = 0
        self._stopped = False
        self._fault: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._work, name=f"bayling-delta-{number}", daemon=True)
            for number in range(threads)
        ]

    def __enter__(self) -> "Crew":
        try:
            for thread in self._threads:
                thread.start()
                self._running += 1
        except BaseException:  # there are no more threads to be had
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with self._condition:
            self._stopped = True
            self._condition.notify_all()
        interrupted: BaseException | None = None
        while self._running > 0:  # a signal may end the waiting, and what comes next closes the threads' files
            try:
                with self._condition:  # join would take an interrupted thread for ended, in Python 3.10 and 3.11
                    self._condition.wait_for(lambda: self._running <= 0)
            except BaseException as error:
                interrupted = error
        if interrupted is not None:
            raise interrupted

    def post(self, station: Station, message: object) -> None:
        """Give a station a message; return at once."""
        with self._condition:
            station._inbox.append(message)
            if not station._scheduled:
                station._scheduled = True
                self._ready.append(station)
                self._condition.notify()

    def wait_until_idle(self, seconds: float) -> bool:
        """Wait until no message is left or being handled, at most so long; return whether that is so.

        Raises:
            BaseException: what a station raised, if one did; no station has been run since.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._fault is not None or not (self._ready or self._busy), seconds)
            if self._fault is not None:
                raise self._fault
            return not (self._ready or self._busy)

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._ready or self._stopped)
                if self._stopped:
                    self._running -= 1
                    self._condition.notify_all()
                    return
                station = self._ready.popleft()
                message = station._inbox.popleft()
                self._busy += 1
            fault: BaseException | None = None
            try:
                station.handle(message)
            except BaseException as error:  # it is raised again where the run is waited for
                fault = error
            with self._condition:
                self._busy -= 1
                if fault is not None:
                    self._fault = self._fault or fault
                    self._stopped = True
                if station._inbox:
                    self._ready.append(station)
                else:
                    station._scheduled = False
                if self._stopped or not (self._ready or self._busy):
                    self._condition.notify_all()
                elif self._ready:
                    self._condition.notify()
