"""The router: least outstanding work, other replicas when one is full or has failed, one answer from all."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from shoal.engine.client import EngineClient, EngineError, QueueFull
from shoal.engine.messages import EngineStats, OutputDelta, Request
from shoal.launcher.router import Router
from tests.launcher.harness import collect, request, run


class Scripted(EngineClient):
    """A replica that answers token by token when it is let, and refuses as told."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.refusal: Exception | None = None
        self.failure: EngineError | None = None
        self.go = asyncio.Event()
        self.accepted: list[str] = []
        self.aborted: list[str] = []
        self.closed = 0

    async def submit(self, request: Request) -> AsyncIterator[OutputDelta]:
        await self.health()
        if self.refusal is not None:
            raise self.refusal
        self.accepted.append(request.request_id)
        try:
            for index in range(request.sampling.max_tokens or 4):
                last = index == (request.sampling.max_tokens or 4) - 1
                yield OutputDelta(
                    request_id=request.request_id,
                    start=index,
                    token_ids=[self.number],
                    finish_reason="length" if last else None,
                )
                if not last:
                    await self.go.wait()
        finally:
            self.aborted.append(request.request_id)

    async def abort(self, request_ids: list[str]) -> None:
        self.aborted += request_ids

    async def stats(self) -> list[EngineStats]:
        await self.health()
        return [EngineStats(num_running=self.number)]

    async def health(self) -> None:
        if self.failure is not None:
            raise self.failure

    async def drain(self, timeout_s: float) -> list[str]:
        return [f"left-{self.number}"]

    async def close(self) -> None:
        self.closed += 1


def test_a_request_goes_to_the_replica_with_the_least_outstanding_tokens() -> None:
    async def body() -> None:
        replicas = [Scripted(0), Scripted(1)]
        router = Router(replicas, max_model_len=100)
        long = router.submit(request([1] * 50, 30, "long"))
        await anext(long)
        busy = next(index for index in (0, 1) if replicas[index].accepted)
        assert router.outstanding_tokens[busy] == 29, "the prompt and one token are done"
        short = [router.submit(request([1], 5, f"short-{number}")) for number in range(3)]
        for stream in short:
            await anext(stream)
        assert len(replicas[1 - busy].accepted) == 3
        for replica in replicas:
            replica.go.set()
        for stream in [long, *short]:
            async for _ in stream:
                pass
        assert router.outstanding_tokens == [0, 0]

    run(body())


def test_the_expected_output_without_max_tokens_is_what_the_context_holds() -> None:
    async def body() -> None:
        replicas = [Scripted(0), Scripted(1)]
        router = Router(replicas, max_model_len=100)
        stream = router.submit(request([1] * 60, None, "open"))  # type: ignore[arg-type]
        await anext(stream)
        assert max(router.outstanding_tokens) == 39
        await stream.aclose()  # type: ignore[attr-defined]
        assert router.outstanding_tokens == [0, 0]
        assert [*replicas[0].aborted, *replicas[1].aborted] == ["open"], "closing a stream closes the replica's"

    run(body())


def test_equal_replicas_take_turns() -> None:
    async def body() -> None:
        replicas = [Scripted(number) for number in range(3)]
        router = Router(replicas, 100)
        for number in range(6):
            await collect(router.submit(request([1], 1, f"r{number}")))
        assert [len(replica.accepted) for replica in replicas] == [2, 2, 2]

    run(body())


def test_a_full_replica_is_passed_over_and_only_all_full_is_an_error() -> None:
    async def body() -> None:
        replicas = [Scripted(0), Scripted(1)]
        router = Router(replicas, 100)
        replicas[0].refusal = QueueFull("full", 5.0)
        for number in range(4):
            await collect(router.submit(request([1], 1, f"r{number}")))
        assert len(replicas[1].accepted) == 4
        replicas[1].refusal = QueueFull("full", 2.0)
        with pytest.raises(QueueFull) as full:
            await anext(router.submit(request([1])))
        assert full.value.retry_after_s == 2.0

    run(body())


def test_a_failed_replica_gets_nothing_more_and_the_first_cause_is_told_when_none_is_left() -> None:
    async def body() -> None:
        replicas = [Scripted(0), Scripted(1)]
        router = Router(replicas, 100)
        replicas[0].failure = EngineError("rank 3: killed by SIGKILL")
        for number in range(4):
            await collect(router.submit(request([1], 1, f"r{number}")))
        assert len(replicas[1].accepted) == 4 and replicas[0].accepted == []
        await router.health()
        assert [stats.num_running for stats in await router.stats()] == [1]
        replicas[1].failure = EngineError("another")
        with pytest.raises(EngineError, match="no replica can serve any more; the first cause: rank 3: killed"):
            await anext(router.submit(request([1])))
        with pytest.raises(EngineError, match="rank 3"):
            await router.health()

    run(body())


def test_a_bad_request_is_refused_once() -> None:
    async def body() -> None:
        replicas = [Scripted(0), Scripted(1)]
        for replica in replicas:
            replica.refusal = ValueError("bad")
        with pytest.raises(ValueError, match="bad"):
            await anext(Router(replicas, 100).submit(request([1])))

    run(body())


def test_abort_drain_and_close_reach_every_replica() -> None:
    async def body() -> None:
        replicas = [Scripted(0), Scripted(1)]
        ended: list[int] = []

        async def end() -> None:
            ended.append(sum(replica.closed for replica in replicas))

        router = Router(replicas, 100, end)
        await router.abort(["x"])
        assert [replica.aborted for replica in replicas] == [["x"], ["x"]]
        assert await router.drain(1.0) == ["left-0", "left-1"]
        await router.close()
        assert ended == [2]

    run(body())
