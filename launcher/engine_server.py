"""EngineServer: the loop of an engine process, between its front end's channel and the EngineCore."""

import selectors
import time

from shoal.engine.client import EngineError, QueueFull
from shoal.engine.engine_core import EngineCore
from shoal.engine.executor import ExecutorFailed
from shoal.engine.messages import Abort, Drain, Drained, Failure, OutputDelta, Request, StatsQuery, Submit
from shoal.engine.multi_rank_executor import MultiRankExecutor
from shoal.launcher.replica_messages import Acknowledged, Outputs, Rejected, Shutdown, ToEngine
from shoal.parallel.control import Channel

IDLE_CHECK_S = 0.5
SEND_TIMEOUT_S = 600.0  # a front end that was suspended (Ctrl-Z) holds the engine up, and may come back


class FrontGone(Exception):
    """The front end is gone or wants no more."""


class EngineServer:
    """Takes requests between steps, sends every step's deltas in one message. Used by one thread."""

    def __init__(self, core: EngineCore, front: "Channel[ToEngine]", executor: MultiRankExecutor) -> None:
        self._core, self._front = core, front
        self._live: set[str] = set()
        self._unanswered: set[str] = set()  # accepted since the last step
        self._draining = self._shutdown = False
        self._drain_until: float | None = None  # until the drain is answered
        self._selector = selectors.DefaultSelector()
        self._selector.register(front, selectors.EVENT_READ)
        self._selector.register(executor, selectors.EVENT_READ)

    @property
    def live(self) -> list[str]:
        """Requests that were accepted and have not ended."""
        return sorted(self._live)

    def run(self) -> int:
        """Serve until told to shut down (0) or the core failed (1). Raises ControlError when the front end is gone."""
        try:
            return self._run()
        finally:
            self._selector.close()

    def _run(self) -> int:
        core = self._core
        while not self._shutdown and core.failure is None:
            if not core.has_work:
                self._selector.select(self._idle_s())
                core.check_executor()
            for message in self._front.poll():
                self._handle(message)
            if core.has_work:
                deltas = core.step()
                self._tell_cache()
                self._deliver(deltas)
            self._answer_drain()
        if core.failure is None:
            return 0
        self._deliver(core.step())
        cause = core.failure.__cause__
        if isinstance(cause, ExecutorFailed):
            failure = Failure(rank=cause.rank, cause=cause.cause, detail=cause.detail)
        else:
            failure = Failure(rank=None, cause=str(core.failure))
        self._front.send(failure, SEND_TIMEOUT_S)
        return 1

    def _idle_s(self) -> float:
        if self._drain_until is None:
            return IDLE_CHECK_S
        return min(IDLE_CHECK_S, max(0.0, self._drain_until - time.monotonic()))

    def _handle(self, message: ToEngine) -> None:
        match message:
            case Submit():
                self._submit(message.request)
            case Abort():
                self._core.abort(message.request_ids)
            case StatsQuery():
                self._front.send(self._core.stats(), SEND_TIMEOUT_S)
            case Drain():
                self._draining, self._drain_until = True, time.monotonic() + message.timeout_s
            case Shutdown():
                self._shutdown = True

    def _submit(self, request: Request) -> None:
        """Accept a request or say why not. Once the core has failed, the Failure that follows is the answer: it tells a
        death from a refusal.
        """
        request_id = request.request_id
        if self._core.failure is not None:
            return
        try:
            if self._draining:
                raise EngineError("the engine is draining and takes no new requests")
            self._core.add(request)
        except QueueFull as error:
            rejected = Rejected(request_id=request_id, kind="full", text=str(error), retry_after_s=error.retry_after_s)
        except EngineError as error:
            rejected = Rejected(request_id=request_id, kind="engine", text=str(error))
        except ValueError as error:
            rejected = Rejected(request_id=request_id, kind="value", text=str(error))
        else:
            self._live.add(request_id)
            self._unanswered.add(request_id)
            return
        self._front.send(rejected, SEND_TIMEOUT_S)

    def _deliver(self, deltas: list[OutputDelta]) -> None:
        """Send a step's deltas, and word of those that came before it and wait. Once the core has failed, the Failure
        that follows is what ends the streams.
        """
        if self._core.failure is not None:
            deltas = [delta for delta in deltas if delta.finish_reason != "error"]
        if deltas:
            self._live.difference_update(delta.request_id for delta in deltas if delta.finish_reason is not None)
            self._front.send(Outputs(deltas=deltas), SEND_TIMEOUT_S)
        self._unanswered.difference_update(delta.request_id for delta in deltas)
        if self._unanswered and self._core.failure is None:
            self._front.send(Acknowledged(request_ids=sorted(self._unanswered)), SEND_TIMEOUT_S)
        self._unanswered.clear()

    def _tell_cache(self) -> None:
        """Before the tokens of prompts: whoever sees the first token knows what of the prompt is cached."""
        changes = self._core.cache_changes()
        if changes is not None:
            self._front.send(changes, SEND_TIMEOUT_S)

    def _answer_drain(self) -> None:
        """Say when nothing runs any more, or the drain's time is over. Nothing new is taken afterwards either."""
        if self._drain_until is not None and (not self._live or time.monotonic() >= self._drain_until):
            self._drain_until = None
            self._front.send(Drained(unfinished=sorted(self._live)), SEND_TIMEOUT_S)
