"""Router: one EngineClient over several replicas; a request goes to the replica with the least outstanding work."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar, cast

from shoal.engine.client import EngineClient, EngineError, QueueFull
from shoal.engine.messages import EngineStats, OutputDelta, Request

T = TypeVar("T")

logger = logging.getLogger("shoal")


class Router(EngineClient):
    """Used from one event loop. A replica that fails ends its streams with an error, and gets no more requests."""

    def __init__(
        self,
        replicas: Sequence[EngineClient],
        max_model_len: int,
        on_close: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """max_model_len: bounds the expected output of a request without max_tokens. on_close: called after the
        replicas were closed.
        """
        self._replicas, self._max_model_len, self._on_close = list(replicas), max_model_len, on_close
        self._outstanding = [0] * len(self._replicas)
        self._failed: dict[int, EngineError] = {}
        self._turn = 0

    @property
    def outstanding_tokens(self) -> list[int]:
        """Prompt and expected output tokens not yet computed, per replica."""
        return list(self._outstanding)

    async def submit(self, request: Request) -> AsyncIterator[OutputDelta]:
        """Accept a request at the least busy replica that has room; see EngineClient."""
        full: QueueFull | None = None
        for index in self._by_load():
            async with aclosing(self._follow(index, request)) as stream:
                try:
                    first = await anext(stream)
                except QueueFull as error:
                    full = error if full is None or error.retry_after_s < full.retry_after_s else full
                    continue
                except EngineError as error:
                    await self._note_failure(index, error)
                    continue
                yield first
                async for delta in stream:
                    yield delta
                return
        if full is not None:
            raise full
        raise self._all_failed()

    async def _follow(self, index: int, request: Request) -> AsyncGenerator[OutputDelta]:
        """A replica's stream, counted as its work while it lasts."""
        prompt = len(request.prompt_token_ids) + len(request.emitted_token_ids)
        left = prompt + max(0, self._expected_tokens(request) - len(request.emitted_token_ids))
        self._outstanding[index] += left
        try:
            async with aclosing(cast(AsyncGenerator[OutputDelta], self._replicas[index].submit(request))) as stream:
                async for delta in stream:
                    done = min(left, prompt + len(delta.token_ids))
                    prompt = 0
                    left -= done
                    self._outstanding[index] -= done
                    yield delta
        finally:
            self._outstanding[index] -= left

    def _expected_tokens(self, request: Request) -> int:
        room = max(1, self._max_model_len - len(request.prompt_token_ids))
        return room if request.sampling.max_tokens is None else min(room, request.sampling.max_tokens)

    def _by_load(self) -> list[int]:
        """Replicas that have not failed, least outstanding work first; equals take turns."""
        count = len(self._replicas)
        self._turn = (self._turn + 1) % count
        order = [(self._turn + offset) % count for offset in range(count)]
        return sorted((index for index in order if index not in self._failed), key=self._outstanding.__getitem__)

    async def _note_failure(self, index: int, error: EngineError) -> None:
        """Leave a replica out when it cannot serve any more; a refusal of another kind is raised."""
        try:
            await self._replicas[index].health()
        except EngineError as cause:
            if index not in self._failed:
                self._failed[index] = cause
                logger.warning("replica %d of %d gets no more requests: %s", index, len(self._replicas), cause)
            return
        raise error

    def _all_failed(self) -> EngineError:
        first = next(iter(self._failed.values()))
        return EngineError(f"no replica can serve any more; the first cause: {first}")

    async def abort(self, request_ids: list[str]) -> None:
        """End requests wherever they are."""
        await self._everywhere(lambda replica: replica.abort(request_ids))

    async def stats(self) -> list[EngineStats]:
        """One entry per replica that serves, in their order."""
        answers = await self._everywhere(lambda replica: replica.stats())
        return [stats for answer in answers for stats in answer]

    async def health(self) -> None:
        """Raises EngineError with the first cause when no replica can serve."""
        await self._everywhere(lambda replica: replica.health())

    async def drain(self, timeout_s: float) -> list[str]:
        """Refuse new requests everywhere, wait for the running ones; returns the ids that did not finish in time."""
        answers = await self._everywhere(lambda replica: replica.drain(timeout_s))
        return sorted(request_id for answer in answers for request_id in answer)

    async def close(self) -> None:
        """Stop all replicas. Idempotent."""
        try:
            await asyncio.gather(*(replica.close() for replica in self._replicas))
        finally:
            if self._on_close is not None:
                await self._on_close()

    async def _everywhere(self, ask: Callable[[EngineClient], Awaitable[T]]) -> list[T]:
        """The answers of the replicas that can serve. Raises EngineError when none can."""
        indices = [index for index in range(len(self._replicas)) if index not in self._failed]
        answers = await asyncio.gather(*(ask(self._replicas[index]) for index in indices), return_exceptions=True)
        good = []
        for index, answer in zip(indices, answers, strict=True):
            if isinstance(answer, EngineError):
                await self._note_failure(index, answer)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                good.append(answer)
        if not good:
            raise self._all_failed()
        return good
