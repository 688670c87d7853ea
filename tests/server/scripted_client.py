"""ScriptedClient: an EngineClient that says what a test tells it to, and remembers what it was asked."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from shoal.engine.client import EngineClient, QueueFull
from shoal.engine.messages import EngineStats, FinishReason, OutputDelta, Request, TokenLogprobs

Script = Callable[[Request], Sequence[OutputDelta]]


class ScriptedClient(EngineClient):
    """Streams the deltas that `script` gives for a request.

    refusals: how often QueueFull comes first. hold: streams stop before their last delta until they are aborted;
    errors come at once.
    """

    def __init__(self, script: Script, *, refusals: int = 0, hold: bool = False) -> None:
        self.script, self.refusals, self.hold = script, refusals, hold
        self.submitted: list[Request] = []
        self.aborted: list[str] = []
        self.closed_streams: list[str] = []
        self.closed = 0
        self._ended: dict[str, asyncio.Event] = {}

    async def submit(self, request: Request) -> AsyncIterator[OutputDelta]:
        if self.refusals > 0:
            self.refusals -= 1
            raise QueueFull("the queue is full", 0.01)
        self.submitted.append(request)
        ended = self._ended[request.request_id] = asyncio.Event()
        deltas = list(self.script(request))
        try:
            for number, delta in enumerate(deltas):
                await asyncio.sleep(0)
                if self.hold and number == len(deltas) - 1 and delta.finish_reason != "error":
                    await ended.wait()
                if ended.is_set():
                    yield OutputDelta(
                        request_id=request.request_id, start=delta.start, token_ids=[], finish_reason="abort"
                    )
                    return
                yield delta
        finally:
            self.closed_streams.append(request.request_id)

    async def abort(self, request_ids: list[str]) -> None:
        self.aborted += request_ids
        for request_id in request_ids:
            if request_id in self._ended:
                self._ended[request_id].set()

    async def stats(self) -> list[EngineStats]:
        return [EngineStats(num_running=len(self._ended))]

    async def health(self) -> None:
        pass

    async def drain(self, timeout_s: float) -> list[str]:
        return []

    async def close(self) -> None:
        self.closed += 1


def in_chunks(
    request: Request,
    token_ids: Sequence[int],
    sizes: Sequence[int],
    finish_reason: FinishReason | None = "length",
    stop_reason: int | None = None,
) -> list[OutputDelta]:
    """Deltas of the given sizes (the last one repeats), with log-probabilities when the request asks for them."""
    deltas: list[OutputDelta] = []
    start = 0
    while start < len(token_ids):
        size = sizes[min(len(deltas), len(sizes) - 1)]
        chunk = list(token_ids[start : start + size])
        logprobs = None
        if request.sampling.logprobs is not None:
            logprobs = [TokenLogprobs([token, token + 1], [-0.5, -1.5], [1, 2]) for token in chunk]
        last = start + size >= len(token_ids)
        deltas.append(
            OutputDelta(
                request_id=request.request_id,
                start=start,
                token_ids=chunk,
                logprobs=logprobs,
                finish_reason=finish_reason if last else None,
                stop_reason=stop_reason if last else None,
                num_cached_tokens=3,
            )
        )
        start += size
    return deltas
