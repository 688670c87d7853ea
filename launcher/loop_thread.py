"""LoopThread: an asyncio loop in a daemon thread, driven from synchronous code that Ctrl-C can interrupt.

loop = LoopThread("shoal")
loop.run(coroutine)              # its result; an interrupt cancels it, waits for it to clean up, and is raised
for item in loop.iterate(async_generator): ...
loop.stop()
"""

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")

_CANCEL_TIMEOUT_S = 10.0
_END = object()


class LoopThread:
    """One event loop in one daemon thread. Its methods are for other threads of the process that made it."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._pool = concurrent.futures.ThreadPoolExecutor(thread_name_prefix=f"{name}-pool")
        self._loop.set_default_executor(self._pool)
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    @property
    def in_creator_process(self) -> bool:
        """False in a forked child, where the thread does not exist."""
        return os.getpid() == self._pid

    @property
    def is_current_thread(self) -> bool:
        """Whether the caller runs in the loop's own thread, where waiting for the loop would never end."""
        return threading.current_thread() is self._thread

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Run a coroutine to its end and return its result.

        An exception in the waiting thread (KeyboardInterrupt) cancels the coroutine, waits a bounded time for it to
        clean up and is raised. Raises TimeoutError, after cancelling in the same way, when timeout_s passes.
        """
        assert self.in_creator_process and not self.is_current_thread
        finished: concurrent.futures.Future[T] = concurrent.futures.Future()
        started: list[asyncio.Task[T]] = []

        def start() -> None:
            task = self._loop.create_task(coroutine)
            started.append(task)
            task.add_done_callback(lambda done: _copy_result(done, finished))

        def end() -> None:
            if started:
                started[0].cancel()
            else:
                coroutine.close()
                finished.set_exception(concurrent.futures.CancelledError("interrupted before it began"))

        try:  # an interrupt may come anywhere in here
            self._loop.call_soon_threadsafe(start)
            return finished.result(timeout_s)
        except BaseException:
            if self._loop.is_closed():
                coroutine.close()
            elif not finished.done():
                self._loop.call_soon_threadsafe(end)
                concurrent.futures.wait([finished], _CANCEL_TIMEOUT_S)
            raise

    def iterate(self, items: AsyncGenerator[T]) -> Generator[T]:
        """The items of an async generator, which is closed at the end, also when the caller stops early or is
        interrupted.
        """

        async def step() -> Any:
            return await anext(items, _END)

        try:
            while (item := self.run(step())) is not _END:
                yield item
        finally:
            self.run(items.aclose())

    def stop(self, timeout_s: float = 5.0) -> None:
        """Cancel what runs and end the thread. May be called twice."""
        if not self.in_creator_process or not self._thread.is_alive():
            return
        with contextlib.suppress(RuntimeError):  # the loop ended in between
            self._loop.call_soon_threadsafe(self._loop.stop)
        if not self.is_current_thread:
            self._thread.join(timeout_s)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._loop.close()


def _copy_result(task: "asyncio.Task[T]", finished: "concurrent.futures.Future[T]") -> None:
    if task.cancelled():
        finished.set_exception(concurrent.futures.CancelledError("the event loop ended"))
    elif (error := task.exception()) is not None:
        finished.set_exception(error)
    else:
        finished.set_result(task.result())
