"""ReplicaClient: an EngineClient over the control channel to a replica's engine process. No torch.

One task reads: deltas go to their streams, answers to whoever asked. When the engine fails or is gone every stream gets
a last delta with finish_reason "error" that names the cause.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from shoal.engine.cache_log import CacheChanges
from shoal.engine.client import EngineClient, EngineError, QueueFull
from shoal.engine.executor import ExecutorFailed
from shoal.engine.messages import (
    Abort,
    Drain,
    Drained,
    EngineStats,
    Failure,
    OutputDelta,
    Request,
    StatsQuery,
    Submit,
)
from shoal.launcher.replica_messages import Acknowledged, Beat, FromEngine, LogText, Outputs, Rejected, Shutdown
from shoal.parallel.control import ControlError, ControlTimeout
from shoal.parallel.control_async import AsyncChannel

SECOND_LOOK_S = 0.5  # after a silence: it may have been this process that was suspended
DRAIN_SLACK_S = 30.0

logger = logging.getLogger("shoal")

T = TypeVar("T")


def failure_text(failure: Failure, where: str = "") -> str:
    """A failure in words, first cause first."""
    return where + str(ExecutorFailed(failure.cause, failure.rank, failure.detail))


class _Stream:
    """A request's deltas on their way; an exception ends it. abandoned: nobody reads it any more, and its id is free
    when the engine has said its last word of it.
    """

    __slots__ = ("abandoned", "items", "next_start")

    def __init__(self, request: Request) -> None:
        self.abandoned = False
        self.items: asyncio.Queue[OutputDelta | Exception] = asyncio.Queue()
        self.next_start = len(request.emitted_token_ids)


class ReplicaClient(EngineClient):
    """Talks to one engine process. Used from one event loop, the one that made it. beat: what the engine said last of
    itself and its ranks. on_cache: told what its prefix cache gained and lost. on_accepted: told the ids of requests
    that were accepted and have no token yet.
    """

    def __init__(
        self,
        channel: "AsyncChannel[FromEngine]",
        *,
        where: str,
        silence_s: float,
        explain: Callable[[], Awaitable[str]],
        stop: Callable[[], Awaitable[None]],
    ) -> None:
        """where: put before errors ("replica 1: ", or nothing). silence_s: after which the engine, which beats every
        second, counts as hung (launcher.hang_timeout_s). explain: how the engine process ended, in words; called
        when the channel closes without a Failure. stop: ends the replica's processes (`close` calls it).
        """
        self._channel, self._where, self._explain, self._stop = channel, where, explain, stop
        self._silence_s = silence_s
        self._streams: dict[str, _Stream] = {}
        self._stats: deque[asyncio.Future[EngineStats]] = deque()
        self._drains: deque[asyncio.Future[list[str]]] = deque()
        self._failure: EngineError | None = None
        self._failed = asyncio.Event()
        self.beat = Beat()
        self.on_cache: Callable[[CacheChanges], None] | None = None
        self.on_accepted: Callable[[str], None] | None = None
        self._closing = False
        self._reader = asyncio.get_running_loop().create_task(self._read())

    @property
    def failure(self) -> EngineError | None:
        """The first cause when the replica cannot serve any more."""
        return self._failure

    async def failed(self) -> EngineError:
        """Wait until the replica cannot serve any more; the first cause."""
        await self._failed.wait()
        assert self._failure is not None
        return self._failure

    async def submit(self, request: Request) -> AsyncIterator[OutputDelta]:
        """Accept a request and stream its deltas; see EngineClient."""
        self._check()
        if request.request_id in self._streams:
            raise ValueError(f"request_id {request.request_id!r} is already in use: wait for its end or choose another")
        stream = self._streams[request.request_id] = _Stream(request)
        finished = False
        try:
            await self._send(Submit(request=request))
            while not finished:
                item = await stream.items.get()
                if isinstance(item, Exception):
                    finished = True
                    raise item
                finished = item.finish_reason is not None
                yield item
        finally:
            if not finished and self._failure is None and not self._closing and self._channel.error is None:
                stream.abandoned = True
                self._channel.post(Abort(request_ids=[request.request_id]))
            elif self._streams.get(request.request_id) is stream:
                del self._streams[request.request_id]

    async def abort(self, request_ids: list[str]) -> None:
        """End requests; unknown or finished ids are no error."""
        if self._failure is None:
            await self._send(Abort(request_ids=request_ids))

    async def stats(self) -> list[EngineStats]:
        """One entry. Raises EngineError when the replica has failed."""
        self._check()
        answer: asyncio.Future[EngineStats] = asyncio.get_running_loop().create_future()
        self._stats.append(answer)
        await self._send(StatsQuery())
        return [await answer]

    async def health(self) -> None:
        """Raises EngineError with the first cause when the replica cannot serve."""
        self._check()

    async def drain(self, timeout_s: float) -> list[str]:
        """Refuse new requests, wait for the running ones; returns the ids that did not finish in time."""
        self._check()
        answer: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        self._drains.append(answer)
        await self._send(Drain(timeout_s=timeout_s))
        async with asyncio.timeout(timeout_s + DRAIN_SLACK_S):
            return await answer

    async def close(self) -> None:
        """Stop the replica. Idempotent."""
        self._closing = True
        await self._stop()

    async def shut_down(self, timeout_s: float) -> None:
        """Ask the engine to end and wait until it hangs up, at most timeout_s; what still runs ends with an error."""
        self._closing = True
        if self._failure is None:
            try:
                self._channel.post(Shutdown())
            except ControlError:
                pass  # gone already
            await asyncio.wait([self._reader], timeout=timeout_s)
        self._fail(EngineError(f"{self._where}the engine was closed"))
        self._reader.cancel()
        self._channel.close()

    def _check(self) -> None:
        if self._failure is not None:
            raise EngineError(str(self._failure)) from self._failure
        if self._closing:
            raise EngineError(f"{self._where}the engine was closed")

    async def _send(self, message: Submit | Abort | StatsQuery | Drain) -> None:
        try:
            await self._channel.send(message)
        except ControlError as error:
            await asyncio.wait([self._reader], timeout=5.0)  # it finds out why
            self._check()
            raise EngineError(f"{self._where}the engine process cannot be reached: {error}") from error

    async def _read(self) -> None:
        """Take messages until the end, whatever it is, and tell everybody who waits."""
        try:
            while self._failure is None:
                try:
                    message = await self._channel.receive(self._silence_s)
                except ControlTimeout:
                    message = await self._channel.receive(SECOND_LOOK_S)
                self._take(message)
        except ControlTimeout:
            limit = f"{self._silence_s:g} s (launcher.hang_timeout_s)"
            self._fail(EngineError(f"{self._where}the engine process gave no sign of life for {limit}"))
        except ControlError as error:
            how = "the engine was closed" if self._closing else await self._explain() or f"the engine is gone: {error}"
            self._fail(EngineError(self._where + how))
        except Exception as error:  # noqa: BLE001 - no stream may end in silence
            self._fail(EngineError(f"{self._where}reading from the engine failed: {type(error).__name__}: {error}"))

    def _take(self, message: FromEngine) -> None:
        match message:
            case Outputs():
                for delta in message.deltas:
                    self._pass_on(delta)
            case Rejected():
                stream = self._streams.pop(message.request_id, None)
                if stream is not None:
                    stream.items.put_nowait(_rejection(message))
            case Acknowledged():
                for request_id in message.request_ids:
                    if self.on_accepted is not None and request_id in self._streams:
                        self.on_accepted(request_id)
            case EngineStats():
                _answer(self._stats, message)
            case Drained():
                _answer(self._drains, message.unfinished)
            case CacheChanges():
                if self.on_cache is not None:
                    self.on_cache(message)
            case Beat():
                self.beat = message
            case LogText():
                logger.log(message.level, "%s%s", self._where, message.text)
            case Failure():
                self._fail(EngineError(failure_text(message, self._where)))

    def _pass_on(self, delta: OutputDelta) -> None:
        stream = self._streams.get(delta.request_id)
        if stream is not None:
            stream.next_start = max(stream.next_start, delta.start + len(delta.token_ids))
            if not stream.abandoned:
                stream.items.put_nowait(delta)
            if delta.finish_reason is not None:
                del self._streams[delta.request_id]

    def _fail(self, error: EngineError) -> None:
        """End every stream and answer with the first cause."""
        if self._failure is not None:
            return
        self._failure = error
        self._failed.set()
        for request_id, stream in self._streams.items():
            last = OutputDelta(
                request_id=request_id,
                start=stream.next_start,
                token_ids=[],
                finish_reason="error",
                error=str(error),
            )
            stream.items.put_nowait(last)
        self._streams.clear()
        waiting: list[asyncio.Future] = [*self._stats, *self._drains]
        for future in waiting:
            if not future.done():
                future.set_exception(error)
        self._stats.clear()
        self._drains.clear()


def _answer(waiting: "deque[asyncio.Future[T]]", value: T) -> None:
    future = waiting.popleft()
    if not future.done():
        future.set_result(value)


def _rejection(message: Rejected) -> Exception:
    if message.kind == "value":
        return ValueError(message.text)
    if message.kind == "full":
        return QueueFull(message.text, message.retry_after_s)
    return EngineError(message.text)
