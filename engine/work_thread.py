"""WorkThread: one thread for what loads a model and what runs it."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class WorkThread:
    """A daemon thread that does one piece of work after another.

    OpenMP keeps a team for every thread that ever computed, and its threads stop waiting actively when all teams
    together have more threads than there are cores; so what loads a model and what runs it had better be one thread.
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._last: Callable[[], None] | None = None
        self._thread = threading.Thread(target=self._run, name="shoal-engine", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Have the thread do it after what it was given before."""
        future: Future[T] = Future()
        self._work.put((work, future))
        return future

    def finish(self, last: Callable[[], None] | None = None) -> None:
        """End the thread when it has done all that it was given, and `last`, whose exceptions are the thread's."""
        self._last = last
        self._work.put(None)

    def join(self, timeout_s: float) -> None:
        """Wait for its end."""
        self._thread.join(timeout_s)

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._thread.is_alive()

    def _run(self) -> None:
        for work, future in iter(self._work.get, None):
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 -- whoever waits for the result gets it
                future.set_exception(error)
        if self._last is not None:
            self._last()
