"""The controller: goes on elsewhere after a death, rebuilds with back-off, gives up with the first cause."""

import asyncio
import random

import pytest

from shoal.engine.client import EngineError, QueueFull
from shoal.engine.executor import ExecutorFailed
from shoal.engine.messages import OutputDelta, Request, StepPlan
from shoal.launcher.dispatch import MAX_FRUITLESS, Limits
from shoal.launcher.fake_replica import FakeReplica
from shoal.launcher.replica_slot import RestartPolicy
from tests.launcher.controllers import answer, fakes, serving
from tests.launcher.harness import collect, request, run, until


@pytest.mark.parametrize("count", [1, 2])
def test_streams_go_on_after_deaths_without_a_gap_or_a_repeat(count: int) -> None:
    """Every replica dies time and again, each time with streams under way."""

    async def body() -> None:
        async with fakes(count) as (controller, factory):
            requests = [request([1, 2, number], 150, f"r{number}", temperature=1.0, seed=number) for number in range(6)]
            streams = [asyncio.create_task(collect(controller.submit(wanted))) for wanted in requests]
            for life in range(3):
                for number in range(count):
                    await serving(controller, factory, number, life)
                    factory.lives[number][life].kill(f"life {life}")
            for wanted, (tokens, last) in zip(requests, await asyncio.gather(*streams), strict=True):
                assert tokens == answer(wanted) and last.finish_reason == "length", wanted.request_id
            status = await controller.status()
            assert status.resumed >= 3 and status.lost == 0 and status.live_requests == 0
            assert all(replica.restarts >= 3 for replica in status.replicas)
            assert status.replicas[0].failures[0].cause == "rank 0: life 0"

    run(body())


def test_what_a_request_asked_for_carries_over() -> None:
    """min_tokens, stop ids, logprobs and prompt logprobs, seeds drawn at admission."""

    async def body() -> None:
        async with fakes(1, seed=5) as (controller, factory):
            wanted = request([4, 5, 6], 200, "r", seed=None, temperature=1.0, logprobs=2, prompt_logprobs=1)
            deltas: list[OutputDelta] = []

            async def read() -> None:
                async for delta in controller.submit(wanted):
                    deltas.append(delta)

            reading = asyncio.create_task(read())
            for life in range(2):
                (await serving(controller, factory, 0, life)).kill()
            await reading
            tokens = [token for delta in deltas for token in delta.token_ids]
            assert len(tokens) == 200 and deltas[-1].finish_reason == "length"
            assert sum(len(delta.logprobs or []) for delta in deltas) == 200
            assert [delta.prompt_logprobs is not None for delta in deltas].count(True) == 1
            assert len({delta.num_cached_tokens for delta in deltas}) == 1

            again = request([4, 5, 6], 200, "again", temperature=1.0, seed=_drawn(5))
            assert (await collect(controller.submit(again)))[0] == tokens

    run(body())


def _drawn(seed: int) -> int:
    """The first seed that a ledger draws."""
    return random.Random(seed).getrandbits(53)


def test_a_request_under_which_every_replica_dies_is_given_up_and_the_replica_is_not() -> None:
    async def body() -> None:
        async with fakes(1) as (controller, factory):

            async def make(number: int) -> FakeReplica:
                replica = await factory(number)
                if len(factory.lives[0]) <= MAX_FRUITLESS:
                    replica.kill("killed by SIGSEGV")
                return replica

            controller._slots[0]._factory = make
            factory.lives[0][0].kill("killed by SIGSEGV")
            _, last = await collect(controller.submit(request([1] * 5, 5, "poison")))
            assert last.finish_reason == "error"
            assert f"{MAX_FRUITLESS} replicas in a row died under this request" in (last.error or "")
            assert "SIGSEGV" in (last.error or "")
            fine = request([1, 2], 5, "fine")
            assert (await collect(controller.submit(fine)))[0] == answer(fine)

    run(body())


def test_what_kills_replicas_is_found_among_many_and_the_others_are_served() -> None:
    async def body() -> None:
        async with fakes(1) as (controller, factory):

            async def make(number: int) -> FakeReplica:
                replica = await factory(number)
                launch = replica.executor.launch

                def dies_of_poison(plan: StepPlan) -> int:
                    if any(row.request_id == "poison" for row in plan.rows):
                        raise ExecutorFailed("killed by SIGSEGV", 0)
                    return launch(plan)

                replica.executor.launch = dies_of_poison  # type: ignore[method-assign]
                return replica

            controller._slots[0]._factory = make
            factory.lives[0][0].kill()
            wanted = [request([number], 40, f"r{number}") for number in range(7)]
            wanted.insert(3, request([9, 9], 40, "poison"))
            results = await asyncio.gather(*(collect(controller.submit(each)) for each in wanted))
            for each, (tokens, last) in zip(wanted, results, strict=True):
                if each.request_id == "poison":
                    assert last.finish_reason == "error" and "5 replicas in a row" in (last.error or "")
                else:
                    assert tokens == answer(each) and last.finish_reason == "length"
            assert (await controller.status()).lost == 1

    run(body())


def test_a_replica_that_does_not_come_up_again_is_given_up_first_cause_first() -> None:
    async def body() -> None:
        def make(number: int, life: int) -> None:
            attempts.append(number)
            if life > 0:
                raise EngineError(f"attempt {len(attempts) - 1}: the checkpoint is gone")

        attempts: list[int] = []
        policy = RestartPolicy(max_restarts=3, first_s=0.01, longest_s=0.02)
        async with fakes(1, on_make=make, restarts=policy) as (controller, factory):
            stream = asyncio.create_task(collect(controller.submit(request([1, 2], 400, "r"))))
            await serving(controller, factory, 0, 0)
            factory.lives[0][0].kill("killed by SIGKILL")
            _, last = await stream
            assert last.finish_reason == "error"
            assert "the first cause: rank 0: killed by SIGKILL" in (last.error or "")
            assert "4 failures in a row; the last: attempt 3: the checkpoint is gone" in (last.error or "")
            assert len(attempts) == 4
            with pytest.raises(EngineError, match="no replica can serve any more"):
                await controller.health()
            status = await controller.status()
            assert (status.replicas[0].state, status.lost) == ("given up", 1)

    run(body())


def test_requests_wait_for_the_only_replica_within_a_bound() -> None:
    async def body() -> None:
        gate = asyncio.Event()

        async with fakes(1, limits=Limits(max_model_len=512, max_waiting=2)) as (controller, factory):
            make = factory.__call__

            async def slow(number: int) -> FakeReplica:
                await gate.wait()
                return await make(number)

            controller._slots[0]._factory = slow
            factory.lives[0][0].kill()
            await controller._slots[0].handle.client.abort([])  # type: ignore[union-attr]
            await until(lambda: not controller._slots[0].ready, "the death to be noticed")
            wanted = [request([number], 5, f"r{number}") for number in range(2)]
            streams = [asyncio.create_task(collect(controller.submit(each))) for each in wanted]
            await until(lambda: len(controller._dispatch.line) == 2, "both to wait")
            with pytest.raises(QueueFull) as full:
                await anext(controller.submit(request([9], 5, "r9")))
            assert full.value.retry_after_s > 0
            gate.set()
            for each, (tokens, _) in zip(wanted, await asyncio.gather(*streams), strict=True):
                assert tokens == answer(each)

    run(body())


def test_abort_and_deadline_end_a_request_that_waits() -> None:
    async def body() -> None:
        async with fakes(1, limits=Limits(max_model_len=512, max_in_flight=1)) as (controller, _):
            controller._slots[0].state = "backing off"
            waits = asyncio.create_task(collect(controller.submit(request([1], 5, "waits"))))
            await until(lambda: len(controller._dispatch.line) == 1, "it to wait")
            await controller.abort(["waits", "unknown"])
            tokens, last = await waits
            assert (tokens, last.finish_reason) == ([], "abort")
            late = Request(request_id="late", prompt_token_ids=[1], sampling=request([1]).sampling, deadline_s=1.0)
            assert (await collect(controller.submit(late)))[1].finish_reason == "abort"
            controller._slots[0].state = "ready"

    run(body())
