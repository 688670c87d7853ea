"""InprocessClient: streams over a thread, abort by leaving, drain, failure, close."""

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

import msgspec
import pytest

from shoal.engine.client import EngineError, QueueFull
from shoal.engine.engine_core import EngineCore
from shoal.engine.executor import ExecutorFailed
from shoal.engine.fake_executor import FakeExecutor, Fault, StepLatency
from shoal.engine.inprocess_client import InprocessClient
from shoal.engine.messages import Request
from tests.engine.harness import Output, assert_as_expected, make_capacity, make_core, make_request

T = TypeVar("T")
ROOMY = make_capacity(num_blocks=5000, max_model_len=20_000)


def slow_core(**options: Any) -> EngineCore:
    """A core whose steps take 5 ms, with room for `endless`."""
    return make_core(**{"capacity": ROOMY, "latency": StepLatency(base_s=0.005), **options})


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(coroutine, 60)

    return asyncio.run(bounded())


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[InprocessClient]:
    client = InprocessClient(slow_core(**options))
    try:
        yield client
    finally:
        await client.close()
        assert not any(thread.name == "shoal-engine" for thread in threading.enumerate())


async def collect(client: InprocessClient, request: Request) -> Output:
    output = Output()
    async for delta in client.submit(request):
        output.take(delta)
    return output


def endless(name: str) -> Request:
    """More than a minute of tokens."""
    return make_request(name, [1, 2], None, ignore_eos=True)


async def until_running(client: InprocessClient, count: int) -> None:
    while (await client.stats())[0].num_running != count:
        await asyncio.sleep(0)


def test_many_streams_at_once_get_their_own_tokens() -> None:
    async def main() -> None:
        async with serving(capacity=msgspec.structs.replace(ROOMY, max_in_flight=2), latency=None) as client:
            requests = [make_request(str(index), [index, 3, 5], 1 + index % 20) for index in range(40)]
            outputs = await asyncio.gather(*(collect(client, request) for request in requests))
            for request, output in zip(requests, outputs, strict=True):
                assert_as_expected(output, request, 20_000)
            (stats,) = await client.stats()
            assert (stats.num_running, stats.num_waiting) == (0, 0)
            await client.health()

    run(main())


def test_refusals_come_on_the_first_iteration() -> None:
    async def main() -> None:
        async with serving(max_queued_requests=1, max_num_seqs=1) as client:
            with pytest.raises(ValueError, match="prompt_token_ids is empty"):
                await collect(client, make_request("r", []))
            async with aclosing(client.submit(endless("a"))) as first:
                await anext(first)
                with pytest.raises(ValueError, match="already in use"):
                    await collect(client, endless("a"))
                waiting = asyncio.create_task(collect(client, make_request("b", [1], 1)))
                while not (await client.stats())[0].num_waiting:
                    await asyncio.sleep(0)
                with pytest.raises(QueueFull):
                    await collect(client, endless("c"))
                await anext(first)
            assert (await waiting).finish_reason == "length"

    run(main())


def test_leaving_a_stream_aborts_its_request() -> None:
    async def main() -> None:
        async with serving() as client:
            async with aclosing(client.submit(endless("r"))) as stream:
                await anext(stream)
            await until_running(client, 0)
            task = asyncio.create_task(collect(client, endless("r")))
            await until_running(client, 1)
            task.cancel()
            await until_running(client, 0)

    run(main())


def test_abort_ends_the_stream_with_its_reason() -> None:
    async def main() -> None:
        async with serving() as client:
            task = asyncio.create_task(collect(client, endless("r")))
            await until_running(client, 1)
            await client.abort(["r", "unknown"])
            assert (await task).finish_reason == "abort"

    run(main())


def test_drain_waits_for_what_runs_and_refuses_the_rest() -> None:
    async def main() -> None:
        async with serving() as client:
            task = asyncio.create_task(collect(client, make_request("r", [1], 10, ignore_eos=True)))
            await until_running(client, 1)
            assert await client.drain(0.0) == ["r"]
            with pytest.raises(EngineError, match="draining"):
                await collect(client, endless("late"))
            assert await client.drain(30.0) == []
            assert len((await task).token_ids) == 10

    run(main())


@pytest.mark.parametrize("at_launch", [True, False])
def test_a_failed_engine_ends_streams_and_refuses_with_the_cause(at_launch: bool) -> None:
    async def main() -> None:
        core = slow_core(fault=Fault(step=5, at_launch=at_launch, rank=1, cause="lost"))
        client = InprocessClient(core)
        outputs = await asyncio.gather(*(collect(client, endless(name)) for name in "abc"))
        assert {(output.finish_reason, output.error) for output in outputs} == {("error", "rank 1: lost")}
        for refused in (collect(client, endless("d")), client.stats(), client.health()):
            with pytest.raises(EngineError, match="rank 1: lost"):
                await refused
        await client.close()
        assert isinstance(core.executor, FakeExecutor) and core.executor.stopped

    run(main())


def test_a_rank_lost_while_idle_is_noticed() -> None:
    async def main() -> None:
        core = slow_core(fault=Fault(step=0, rank=2))
        client = InprocessClient(core)
        while core.failure is None:
            await asyncio.sleep(0.01)
        with pytest.raises(EngineError, match="rank 2"):
            await client.health()
        await client.close()

    run(main())


def test_close_ends_open_streams_with_an_error_and_may_be_repeated() -> None:
    async def main() -> None:
        core = slow_core()
        client = InprocessClient(core)
        task = asyncio.create_task(collect(client, endless("r")))
        await until_running(client, 1)
        await client.close()
        await client.close()
        assert (await task).error == "the engine was closed"
        with pytest.raises(EngineError, match="closed"):
            await collect(client, endless("s"))
        assert await client.drain(1.0) == []
        assert isinstance(core.executor, FakeExecutor) and core.executor.stopped

    run(main())


def test_a_bug_in_the_core_reaches_who_asked_and_ends_every_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        core = slow_core()
        client = InprocessClient(core)
        task = asyncio.create_task(collect(client, endless("r")))
        await until_running(client, 1)
        monkeypatch.setattr(core, "stats", lambda: {}["missing"])
        with pytest.raises(KeyError):
            await client.stats()
        output = await task
        assert output.finish_reason == "error" and "KeyError" in (output.error or "")
        await client.close()

    run(main())


def test_a_closed_event_loop_leaves_nothing_running() -> None:
    core = slow_core()
    client = InprocessClient(core)
    loop = asyncio.new_event_loop()
    stream = client.submit(endless("left open"))
    loop.run_until_complete(anext(stream))
    loop.close()

    async def main() -> None:
        await until_running(client, 0)
        await collect(client, make_request("next", [1], 2))
        await client.close()

    run(main())


def test_an_executor_that_fails_to_stop_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(args.exc_value))

    async def main() -> None:
        core = slow_core()

        def stop() -> None:
            raise ExecutorFailed("rank 0 did not end")

        monkeypatch.setattr(core.executor, "stop", stop)
        await InprocessClient(core).close()

    run(main())
    assert "did not end" in str(seen[0])
