"""InprocessClient: an EngineClient over an EngineCore that runs in a thread of this process.

The thread alone touches core and executor. Coroutines hand it commands; it hands deltas back to each stream's event
loop, all of a step in one call.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import TypeVar

from shoal.engine.client import EngineClient, EngineError, QueueFull
from shoal.engine.engine_core import EngineCore
from shoal.engine.loop_inbox import LoopInbox
from shoal.engine.messages import EngineStats, OutputDelta, Request
from shoal.engine.work_thread import WorkThread

IDLE_CHECK_S = 0.5  # between looks at the executor's health while there is nothing to do

T = TypeVar("T")


class _Stream:
    """A request's deltas on their way to the event loop that reads them: at most one per token of max_model_len."""

    __slots__ = ("inbox", "queue")

    def __init__(self, inbox: "_Inbox") -> None:
        self.inbox = inbox
        self.queue: asyncio.Queue[OutputDelta] = asyncio.Queue()


_Deltas = list[tuple[_Stream, OutputDelta]]
_Inbox = LoopInbox[_Deltas]


def _put_all(deltas: _Deltas) -> None:
    for stream, delta in deltas:
        stream.queue.put_nowait(delta)


class InprocessClient(EngineClient):
    """Owns the core and its executor from construction to `close`; may be used from several event loops. on_accepted:
    told the id of every request that was accepted.
    """

    def __init__(self, core: EngineCore, thread: WorkThread | None = None) -> None:
        """core: fresh, its executor ready. thread: to run in, the client's from now on; default: a new one."""
        self._core = core
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closing = self._ended = self._draining = False
        self._submitting: set[_Stream] = set()  # not looked at by the core yet
        self._streams: dict[str, _Stream] = {}
        self._inboxes: dict[asyncio.AbstractEventLoop, _Inbox] = {}  # of loops with streams; each loop sees to its own
        self._drained: list[Future[None]] = []
        self._failed: Future[EngineError] = Future()
        self.on_accepted: Callable[[str], None] | None = None
        self._thread = thread or WorkThread()
        self._thread.finish(self._run)

    async def failed(self) -> EngineError:
        """Wait until the engine cannot serve any more; the first cause."""
        return await asyncio.shield(asyncio.wrap_future(self._failed))

    async def submit(self, request: Request) -> AsyncIterator[OutputDelta]:
        """Accept a request and stream its deltas; see EngineClient."""
        if self._draining:
            raise EngineError("the engine is draining and takes no new requests")
        scheduler = self._core.config.scheduler
        if len(self._submitting) >= scheduler.max_queued_requests + scheduler.max_num_seqs:
            raise QueueFull(f"{len(self._submitting)} requests came during one step: come back later", 1.0)
        stream = _Stream(self._enter())
        finished = False
        try:
            self._submitting.add(stream)
            await self._ask(lambda: self._accept(request, stream))
            if self.on_accepted is not None:
                self.on_accepted(request.request_id)
            while not finished:
                delta = await stream.queue.get()
                finished = delta.finish_reason is not None
                yield delta
        finally:
            self._submitting.discard(stream)
            if not finished:
                self._post(lambda: self._abandon(request.request_id, stream))
            self._leave(stream.inbox)

    async def abort(self, request_ids: list[str]) -> None:
        """End requests; unknown or finished ids are no error."""
        self._post(lambda: self._core.abort(request_ids))

    async def stats(self) -> list[EngineStats]:
        """One entry: there is one replica. Raises EngineError when the engine has ended."""
        return [await self._ask(self._core.stats)]

    async def health(self) -> None:
        """Raises EngineError with the first cause when the engine cannot serve."""
        if self._core.failure is not None:
            raise EngineError(str(self._core.failure)) from self._core.failure

    async def drain(self, timeout_s: float) -> list[str]:
        """Refuse new requests, wait for the running ones; returns the ids that did not finish in time."""
        self._draining = True
        drained: Future[None] = Future()
        if not self._post(lambda: self._drained.append(drained)):
            return []
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.wrap_future(drained)
        except TimeoutError:
            return await self._ask(lambda: list(self._streams))
        return []

    async def close(self) -> None:
        """Stop the engine and its ranks; what still runs ends with an error.

        Raises EngineError when the thread hangs.
        """
        with self._wake:
            self._closing = True
            self._wake.notify()
        launcher = self._core.config.launcher
        limit_s = launcher.step_timeout_s + launcher.stop_timeout_s + 1.0  # a step may be running
        await asyncio.to_thread(self._thread.join, limit_s)
        if self._thread.is_alive():
            raise EngineError(f"the engine's thread did not end within {limit_s:g} s (launcher.step_timeout_s)")

    def _enter(self) -> _Inbox:
        """The running loop's inbox, for one more stream."""
        loop = asyncio.get_running_loop()
        inbox = self._inboxes.get(loop)
        if inbox is None:
            inbox = self._inboxes[loop] = LoopInbox(_put_all)
        inbox.num_users += 1
        return inbox

    def _leave(self, inbox: _Inbox) -> None:
        inbox.num_users -= 1
        if not inbox.num_users:
            del self._inboxes[inbox.loop]
            inbox.close()

    def _post(self, command: Callable[[], None]) -> bool:
        """Have the thread run a command between steps; False when it has ended."""
        with self._wake:
            if not self._ended:
                self._commands.append(command)
                self._wake.notify()
            return not self._ended

    async def _ask(self, question: Callable[[], T]) -> T:
        """What the thread answers, or raises. EngineError when it has ended."""
        answer: Future[T] = Future()

        def command() -> None:
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(question())
                except Exception as error:
                    answer.set_exception(error)
                    if not isinstance(error, ValueError | EngineError):
                        raise  # ours: the engine ends with it

        if not self._post(command):
            raise EngineError(str(self._core.failure)) from self._core.failure
        return await asyncio.wrap_future(answer)

    def _accept(self, request: Request, stream: _Stream) -> None:
        self._submitting.discard(stream)
        self._core.add(request)
        self._streams[request.request_id] = stream

    def _abandon(self, request_id: str, stream: _Stream) -> None:
        """Nobody reads this stream any more. The id may belong to another one by now."""
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
            self._core.abort([request_id], silent=True)

    def _run(self) -> None:
        """The thread: commands, a step, its deltas, until closed or failed."""
        core = self._core
        try:
            while core.failure is None and not self._closing:
                self._run_commands(wait=not core.has_work)
                if core.has_work:
                    self._deliver(core.step())
        except Exception as error:  # noqa: BLE001 -- whatever it is, no stream may end in silence
            core.fail(error)
        core.fail(EngineError("the engine was closed"))
        self._deliver(core.step())
        try:
            core.executor.stop()
        finally:
            with self._wake:
                self._ended = True
            self._run_commands(wait=False)
            self._deliver(core.step())
            assert core.failure is not None
            self._failed.set_result(core.failure)

    def _run_commands(self, *, wait: bool) -> None:
        if wait:
            with self._wake:
                if not self._commands and not self._closing:
                    self._wake.wait(IDLE_CHECK_S)
            if not self._commands:
                self._core.check_executor()
        while self._commands:
            self._commands.popleft()()
        if not self._streams:
            while self._drained:
                waiter = self._drained.pop()
                if waiter.set_running_or_notify_cancel():
                    waiter.set_result(None)

    def _deliver(self, deltas: list[OutputDelta]) -> None:
        """Hand a step's deltas to their event loops."""
        batches: dict[_Inbox, _Deltas] = {}
        for delta in deltas:
            stream = self._streams.get(delta.request_id)
            if stream is not None:
                batches.setdefault(stream.inbox, []).append((stream, delta))
                if delta.finish_reason is not None:
                    del self._streams[delta.request_id]
        for inbox, batch in batches.items():
            try:
                inbox.put(batch)
            except RuntimeError:  # the loop was closed with streams open: nobody reads them
                for stream, delta in batch:
                    self._abandon(delta.request_id, stream)
