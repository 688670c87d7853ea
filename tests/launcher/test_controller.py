"""The controller: routes, goes on elsewhere after a death, rebuilds with back-off, scales and drains without a loss."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from shoal.configs.schema import CacheConfig, ModelConfig, SchedulerConfig, ShoalConfig
from shoal.engine.client import EngineClient, EngineError, QueueFull
from shoal.engine.executor import CacheGroup, Capacity
from shoal.engine.fake_executor import StepLatency
from shoal.engine.fake_model import FakeModel
from shoal.engine.messages import EngineStats, OutputDelta, Request
from shoal.launcher.controller import Controller, ControllerOptions
from shoal.launcher.dispatch import MAX_FRUITLESS, Limits
from shoal.launcher.fake_replica import VOCAB_SIZE, FakeReplica, FakeReplicas
from shoal.launcher.replica import Progress, ReplicaHandle
from shoal.launcher.replica_messages import Ready
from shoal.launcher.replica_slot import RestartPolicy
from tests.launcher.harness import collect, request, run, until

QUICK = RestartPolicy(first_s=0.01, longest_s=0.02, lasting_s=1000.0)
CAPACITY = Capacity(
    block_size=16, groups=[CacheGroup(name="full", window=None, num_blocks=8)], max_model_len=100, vocab_size=100
)


class Scripted(EngineClient):
    """A replica's client that answers token by token when it is let, and refuses as told."""

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
        return []

    async def close(self) -> None:
        self.closed += 1


class ScriptedReplica(ReplicaHandle):
    """Ready at once; fails when `died` is set."""

    client: Scripted

    def __init__(self, client: Scripted) -> None:
        self.client, self.died = client, asyncio.Event()

    async def start(self) -> None: ...

    async def ready(self, timeout_s: float, on_progress: Progress | None = None) -> Ready:
        return Ready(capacity=CAPACITY, report="")

    async def failed(self) -> EngineError:
        await self.died.wait()
        assert self.client.failure is not None
        return self.client.failure

    async def stop(self) -> None:
        await self.client.close()


@asynccontextmanager
async def scripted(count: int, **options: Any) -> AsyncIterator[tuple[Controller, Sequence[Scripted]]]:
    """A controller that never rebuilds, over scripted replicas."""
    clients = [Scripted(number) for number in range(count)]

    async def factory(number: int) -> ReplicaHandle:
        return ScriptedReplica(clients[number])

    options = {"limits": Limits(max_model_len=100), "restarts": RestartPolicy(max_restarts=0), **options}
    controller = Controller(factory, count, ControllerOptions(**options))
    await controller.start()
    yield controller, clients
    await controller.close()


def settings(**scheduler: Any) -> ShoalConfig:
    """For fake replicas."""
    return ShoalConfig(
        model=ModelConfig(max_model_len=512),
        cache=CacheConfig(block_size=4),
        scheduler=SchedulerConfig(**{"max_num_seqs": 8, **scheduler}),
    )


@asynccontextmanager
async def fakes(
    count: int,
    step_s: float = 0.002,
    on_make: Callable[[int, int], None] | None = None,
    config: ShoalConfig | None = None,
    **options: Any,
) -> AsyncIterator[tuple[Controller, FakeReplicas]]:
    """A controller over fake replicas that take step_s for a step."""
    factory = FakeReplicas(config or settings(), StepLatency(base_s=step_s), on_make)
    options = {"limits": Limits(max_model_len=512), "restarts": QUICK, "drain_timeout_s": 5.0, **options}
    controller = Controller(factory, count, ControllerOptions(**options))
    try:
        await controller.start()
        yield controller, factory
    finally:
        await controller.close()


def answer(wanted: Request) -> list[int]:
    """What an undisturbed replica says."""
    count = wanted.sampling.max_tokens
    assert count is not None
    return FakeModel(VOCAB_SIZE).generate(wanted.prompt_token_ids, wanted.sampling, count)


def outstanding(controller: Controller) -> list[int]:
    """Tokens, per replica."""
    return [slot.work for _, slot in sorted(controller._slots.items())]


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


@pytest.mark.parametrize("count", [1, 2])
def test_streams_go_on_after_deaths_without_a_gap_or_a_repeat(count: int) -> None:
    """Every replica dies time and again, each time with streams under way."""

    async def body() -> None:
        async with fakes(count) as (controller, factory):
            requests = [request([1, 2, number], 150, f"r{number}", temperature=1.0, seed=number) for number in range(6)]
            streams = [asyncio.create_task(collect(controller.submit(wanted))) for wanted in requests]
            for life in range(3):
                for number in range(count):
                    await _serving(controller, factory, number, life)
                    factory.lives[number][life].kill(f"life {life}")
            for wanted, (tokens, last) in zip(requests, await asyncio.gather(*streams), strict=True):
                assert tokens == answer(wanted) and last.finish_reason == "length", wanted.request_id
            status = await controller.status()
            assert status.resumed >= 3 and status.lost == 0 and status.live_requests == 0
            assert all(replica.restarts >= 3 for replica in status.replicas)
            assert status.replicas[0].failures[0].cause == "rank 0: life 0"

    run(body())


async def _serving(controller: Controller, factory: FakeReplicas, number: int, life: int) -> FakeReplica:
    """Wait until a life of a replica has given a token."""
    slot = controller._slots[number]
    await until(lambda: slot.life == life and slot.served, f"life {life} of replica {number} to serve")
    return factory.lives[number][life]


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
                (await _serving(controller, factory, 0, life)).kill()
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
            await _serving(controller, factory, 0, 0)
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


def test_scaling_down_loses_nothing_and_up_serves_more() -> None:
    async def body() -> None:
        async with fakes(3, config=settings(max_num_seqs=2)) as (controller, factory):
            wanted = [request([7, number], 120, f"r{number}") for number in range(18)]
            streams = [asyncio.create_task(collect(controller.submit(each))) for each in wanted]
            await asyncio.gather(*(_serving(controller, factory, number, 0) for number in range(3)))
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
            await asyncio.gather(*(_serving(controller, factory, number, 0) for number in range(2)))
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
            await _serving(controller, factory, 0, 0)
            await controller.close()
            _, last = await stream
            assert last.finish_reason == "error" and "closed" in (last.error or "")
            with pytest.raises(EngineError, match="closed"):
                await anext(controller.submit(request([1])))

    run(body())
