"""The controller: routes by load, refuses what it cannot hold, scales and drains without a loss."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from shoal.engine.client import EngineError, QueueFull
from shoal.engine.fake_executor import StepLatency
from shoal.engine.messages import OutputDelta
from shoal.launcher.controller import Controller, ControllerOptions
from shoal.launcher.dispatch import Limits
from shoal.launcher.fake_replica import FakeReplicas
from tests.launcher.controllers import answer, fakes, outstanding, scripted, serving, settings
from tests.launcher.harness import collect, request, run, until


def test_a_request_goes_to_the_replica_with_the_least_outstanding_tokens() -> None:
    async def body() -> None:
        async with scripted(2) as (controller, replicas):
            long = controller.submit(request([1] * 50, 30, "long"))
            await anext(long)
            busy = next(index for index in (0, 1) if replicas[index].accepted)
            assert outstanding(controller)[busy] == 29, "the prompt and one token are done"
            short = [controller.submit(request([1], 5, f"short-{number}")) for number in range(3)]
            for stream in short:
                await anext(stream)
            assert len(replicas[1 - busy].accepted) == 3
            for replica in replicas:
                replica.go.set()
            for stream in [long, *short]:
                async for _ in stream:
                    pass
            assert outstanding(controller) == [0, 0]

    run(body())


def test_the_expected_output_without_max_tokens_is_what_the_context_holds() -> None:
    async def body() -> None:
        async with scripted(2) as (controller, replicas):
            stream = controller.submit(request([1] * 60, None, "open"))  # type: ignore[arg-type]
            await anext(stream)
            assert max(outstanding(controller)) == 39
            await stream.aclose()  # type: ignore[attr-defined]
            assert outstanding(controller) == [0, 0]
            assert [*replicas[0].aborted, *replicas[1].aborted] == ["open"], "closing a stream closes the replica's"

    run(body())


def test_equal_replicas_take_turns() -> None:
    async def body() -> None:
        async with scripted(3) as (controller, replicas):
            for number in range(6):
                await collect(controller.submit(request([1], 1, f"r{number}")))
            assert [len(replica.accepted) for replica in replicas] == [2, 2, 2]

    run(body())


def test_a_full_replica_is_passed_over_and_only_all_full_is_an_error() -> None:
    async def body() -> None:
        async with scripted(2) as (controller, replicas):
            replicas[0].refusal = QueueFull("full", 5.0)
            for number in range(4):
                await collect(controller.submit(request([1], 1, f"r{number}")))
            assert len(replicas[1].accepted) == 4
            replicas[1].refusal = QueueFull("full", 2.0)
            with pytest.raises(QueueFull) as full:
                await anext(controller.submit(request([1])))
            assert full.value.retry_after_s in (2.0, 5.0)
            assert (await controller.status()).refused == 1

    run(body())


def test_a_replica_that_said_it_is_full_is_not_asked_again_before_one_of_its_requests_ends() -> None:
    async def body() -> None:
        async with scripted(1, limits=Limits(bounded_wait=True)) as (controller, (replica,)):
            stream = controller.submit(request([1], 2, "runs"))
            await anext(stream)
            replica.refusal = QueueFull("would wait", 60.0)
            with pytest.raises(QueueFull, match="would wait"):
                await anext(controller.submit(request([1], 2, "asks")))
            assert controller._slots[0].says_full
            controller._slots[0].is_full(60.0)
            replica.refusal = None
            with pytest.raises(QueueFull, match=r"scheduler\.max_queue_wait_s"):
                await anext(controller.submit(request([1], 2, "does not ask")))
            replica.go.set()
            await _rest(stream)
            await collect(controller.submit(request([1], 2, "finds a place")))
            assert replica.accepted == ["runs", "finds a place"]
            assert (await controller.status()).refused == 2

    run(body())


def test_a_replica_that_says_nothing_is_asked_about_few_requests() -> None:
    async def body() -> None:
        async with fakes(1, limits=Limits(bounded_wait=True, max_unanswered=2)) as (controller, factory):
            slot = controller._slots[0]
            factory.lives[0][0].executor.latency = StepLatency(base_s=0.3)
            first = [asyncio.create_task(collect(controller.submit(request([n], 2, f"r{n}")))) for n in range(2)]
            await until(lambda: slot.in_flight == 2 and not slot.unanswered, "both to be accepted")
            slot.unanswered += 2  # as of two that a stalled engine has not looked at
            with pytest.raises(QueueFull):
                await anext(controller.submit(request([4], 2, "r4")))
            slot.unanswered -= 2
            await asyncio.gather(*first)
            assert slot.unanswered == 0

    run(body())


def test_the_controller_refuses_by_its_own_count_without_asking_a_replica() -> None:
    async def body() -> None:
        async with scripted(2, limits=Limits(max_in_flight=1)) as (controller, replicas):
            streams = [controller.submit(request([1], 2, f"r{number}")) for number in range(2)]
            for stream in streams:
                await anext(stream)
            with pytest.raises(QueueFull, match="max_queued_requests"):
                await anext(controller.submit(request([1], 2, "one too many")))
            assert [len(replica.accepted) for replica in replicas] == [1, 1]
            for replica in replicas:
                replica.go.set()
            await asyncio.gather(*(_rest(stream) for stream in streams))

    run(body())


async def _rest(stream: AsyncIterator[OutputDelta]) -> list[int]:
    return [token for delta in [delta async for delta in stream] for token in delta.token_ids]


def test_a_failed_replica_gets_nothing_more_and_the_first_cause_is_told_when_none_is_left() -> None:
    async def body() -> None:
        async with scripted(2) as (controller, replicas):
            handles = [controller._slots[number].handle for number in (0, 1)]
            replicas[0].failure = EngineError("rank 3: killed by SIGKILL")
            for number in range(4):
                await collect(controller.submit(request([1], 1, f"r{number}")))
            assert len(replicas[1].accepted) == 4 and replicas[0].accepted == []
            handles[0].died.set()  # type: ignore[union-attr]
            await until(lambda: controller._slots[0].state == "given up", "the first to be given up")
            await controller.health()
            assert [stats.num_running for stats in await controller.stats()] == [1]
            replicas[1].failure = EngineError("another")
            handles[1].died.set()  # type: ignore[union-attr]
            await until(lambda: controller._slots[1].state == "given up", "the second to be given up")
            with pytest.raises(EngineError, match="no replica can serve any more; the first cause: rank 3: killed"):
                await anext(controller.submit(request([1])))
            with pytest.raises(EngineError, match="rank 3"):
                await controller.health()

    run(body())


def test_a_bad_request_is_refused_once_and_leaves_nothing() -> None:
    async def body() -> None:
        async with scripted(2) as (controller, replicas):
            for replica in replicas:
                replica.refusal = ValueError("bad")
            with pytest.raises(ValueError, match="bad"):
                await anext(controller.submit(request([1])))
            assert (await controller.status()).live_requests == 0 and outstanding(controller) == [0, 0]

    run(body())


def test_a_start_that_fails_stops_every_replica_and_says_why() -> None:
    async def body() -> None:
        def fails(number: int, life: int) -> None:
            if number == 1:
                raise ValueError("no such device")

        closed: list[bool] = []

        async def on_close() -> None:
            closed.append(True)

        factory = FakeReplicas(settings(), on_make=fails)
        controller = Controller(factory, 2, ControllerOptions(), on_close=on_close)
        with pytest.raises(ValueError, match="no such device"):
            await controller.start()
        assert closed == [True] and factory.lives[0][0].executor.stopped

    run(body())


def test_scaling_down_loses_nothing_and_up_serves_more() -> None:
    async def body() -> None:
        async with fakes(3, config=settings(max_num_seqs=2)) as (controller, factory):
            wanted = [request([7, number], 120, f"r{number}") for number in range(18)]
            streams = [asyncio.create_task(collect(controller.submit(each))) for each in wanted]
            await asyncio.gather(*(serving(controller, factory, number, 0) for number in range(3)))
            await controller.scale(1)
            assert sorted(controller._slots) == [0]
            await controller.scale(2)
            for each, (tokens, last) in zip(wanted, await asyncio.gather(*streams), strict=True):
                assert tokens == answer(each) and last.finish_reason == "length"
            status = await controller.status()
            assert [replica.number for replica in status.replicas] == [0, 1] and status.lost == 0
            assert all(not any(replica.stats.referenced_blocks) for replica in status.replicas if replica.stats)
            with pytest.raises(ValueError, match="at least 1"):
                await controller.scale(0)

    run(body())


def test_a_replica_that_is_taken_away_hands_over_what_does_not_finish_in_time() -> None:
    async def body() -> None:
        async with fakes(2, drain_timeout_s=0.05) as (controller, factory):
            wanted = [request([7, number], 300, f"r{number}") for number in range(4)]
            streams = [asyncio.create_task(collect(controller.submit(each))) for each in wanted]
            await asyncio.gather(*(serving(controller, factory, number, 0) for number in range(2)))
            await controller.scale(1)
            for each, (tokens, last) in zip(wanted, await asyncio.gather(*streams), strict=True):
                assert tokens == answer(each) and last.finish_reason == "length"
            assert (await controller.status()).resumed == 2

    run(body())


def test_drain_waits_for_what_was_accepted_and_refuses_the_rest() -> None:
    async def body() -> None:
        async with fakes(2) as (controller, _):
            long = asyncio.create_task(collect(controller.submit(request([1], 400, "long"))))
            await until(lambda: controller._slots[0].served or controller._slots[1].served, "it to run")
            assert await controller.drain(0.0) == ["long"]
            with pytest.raises(EngineError, match="draining"):
                await anext(controller.submit(request([2], 1, "new")))
            assert await controller.drain(20.0) == []
            assert (await long)[1].finish_reason == "length"

    run(body())


def test_closing_ends_streams_with_an_error() -> None:
    async def body() -> None:
        async with fakes(1) as (controller, factory):
            stream = asyncio.create_task(collect(controller.submit(request([1], 400, "r"))))
            await serving(controller, factory, 0, 0)
            await controller.close()
            _, last = await stream
            assert last.finish_reason == "error" and "closed" in (last.error or "")
            with pytest.raises(EngineError, match="closed"):
                await anext(controller.submit(request([1])))

    run(body())
