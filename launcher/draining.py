"""Draining: what a command does with its requests when it is told to end (SIGTERM), and how many it has at a time.

    drain = Drain(limit_s=30.0)
    drain.listen()                                        # on the running event loop
    await drain.feed(lines, window, answer, begun)

The first signal begins nothing more, ends what has not begun, and gives what runs limit_s to finish; the second ends
that too, now.
"""

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterable
from types import FrameType
from typing import Any, TypeVar

from shoal.launcher.command import Terminated

T = TypeVar("T")

_END = object()


class Drain:
    """told: a signal has come. num_running: items that are being worked on."""

    def __init__(self, limit_s: float, signals: Iterable[int] = (signal.SIGTERM,)) -> None:
        """limit_s: launcher.drain_timeout_s. signals: that `listen` takes."""
        self._limit_s, self._signals = limit_s, tuple(signals)
        self.told = False
        self._running: dict[asyncio.Task[None], Any] = {}
        self._begun: Callable[[Any], bool] = lambda item: True
        self._failure: BaseException | None = None
        self._changed = asyncio.Event()

    @property
    def num_running(self) -> int:
        """Never more than the window."""
        return len(self._running)

    def listen(self) -> None:
        """Take the signals from now on, until the event loop closes."""
        for number in self._signals:
            asyncio.get_running_loop().add_signal_handler(number, self.end)

    def end(self) -> None:
        """What a signal does."""
        if self.told:
            self._end_now()
            return
        self.told = True
        print(f"finishing what runs, at most {self._limit_s:g} s; once more ends now", file=sys.stderr)
        for task, item in list(self._running.items()):
            if not self._begun(item):
                task.cancel()
        asyncio.get_running_loop().call_later(self._limit_s, self._end_now)
        self._changed.set()

    def _end_now(self) -> None:
        for task in list(self._running):
            task.cancel()

    async def feed(
        self,
        items: Iterable[T],
        window: int,
        work: Callable[[T], Coroutine[Any, Any, None]],
        begun: Callable[[T], bool],
    ) -> None:
        """Work on all items, at most `window` at a time, taking each when there is room for it. Returns when all are
        done, or told to end, those that were let finish.

        begun: whether work on an item has given something that would be lost. The first failure, or a cancellation,
        ends the rest before it is raised.
        """
        self._begun, source, more = begun, iter(items), True
        try:
            while True:
                while more and not self.told and len(self._running) < window:
                    item = next(source, _END)
                    more = item is not _END
                    if more:
                        self._start(work(item), item)  # type: ignore[arg-type]
                if self._failure is not None:
                    raise self._failure
                if not self._running:
                    return
                await self._changed.wait()
                self._changed.clear()
        finally:
            self._end_now()
            await asyncio.gather(*self._running, return_exceptions=True)

    def _start(self, coroutine: Coroutine[Any, Any, None], item: object) -> None:
        task = asyncio.ensure_future(coroutine)
        self._running[task] = item
        task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[None]") -> None:
        del self._running[task]
        if not task.cancelled() and self._failure is None:
            self._failure = task.exception()
        self._changed.set()


class AnswerDrain:
    """The same for one answer after the other, read in the main thread: `begun` and `ended` tell of each.

    Between answers, and before one's first token, the signal ends the command at once, by raising Terminated.
    """

    def __init__(self, limit_s: float) -> None:
        """limit_s: launcher.drain_timeout_s."""
        self._limit_s = limit_s
        self._answering = self._told = False
        self._timer: threading.Timer | None = None

    def listen(self) -> None:
        """Take SIGTERM from now on, until `stop`."""
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._answering and not self._told:
            self._told = True
            print(f"\nfinishing the answer, at most {self._limit_s:g} s; once more ends now", file=sys.stderr)
            self._timer = threading.Timer(self._limit_s, os.kill, (os.getpid(), signal.SIGTERM))
            self._timer.daemon = True
            self._timer.start()
            return
        self.stop()
        raise Terminated

    def begun(self) -> None:
        """An answer has given a token."""
        self._answering = True

    def ended(self) -> None:
        """It has ended. Raises Terminated when it was the last."""
        self._answering = False
        if self._told:
            self.stop()
            raise Terminated

    def stop(self) -> None:
        """Nothing is left to finish. Idempotent."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self._timer is not None:
            self._timer.cancel()
