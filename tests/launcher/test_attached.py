"""Front ends in other processes than their controller: one stream through the door, over its death as well."""

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from shoal.configs.schema import ModelConfig, ShoalConfig
from shoal.engine.fake_executor import StepLatency
from shoal.engine.messages import EngineStats
from shoal.launcher import attached, controller_door
from shoal.launcher.attached import AttachedReplica, Door, NotYet
from shoal.launcher.controller import Controller, ControllerOptions
from shoal.launcher.controller_door import ControllerDoor, sum_stats
from shoal.launcher.fake_replica import FakeReplicas
from shoal.launcher.replica_messages import Ready
from shoal.parallel.control_connect import Listener
from tests.launcher.harness import collect, request, run

CONFIG = ShoalConfig(model=ModelConfig(max_model_len=512))
SLOW = StepLatency(base_s=0.005)


class Host:
    """A detached controller: its door while it is there."""

    def __init__(self) -> None:
        self.door: Door | None = None

    async def ask(self) -> Door | NotYet:
        return self.door or NotYet(doing="starting")

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Controller]:
        """One life of the controller."""
        controller = Controller(FakeReplicas(CONFIG, SLOW), 2, ControllerOptions())
        (ready, _) = await controller.start()
        door = ControllerDoor(controller, ready, "127.0.0.1")
        task = asyncio.create_task(door.serve())
        self.door = Door(address=door.address, key=door.key, vocab_size=1, max_model_len=512, checkpoint="")
        try:
            yield controller
        finally:
            self.door = None
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await controller.close()

    @asynccontextmanager
    async def attached(self) -> AsyncIterator[Controller]:
        """A front end's controller."""

        async def factory(number: int) -> AttachedReplica:
            return AttachedReplica(self.ask, 10.0, "prod")

        client = Controller(factory, 1, ControllerOptions(start_timeout_s=20.0))
        readies: list[Ready] = await client.start()
        assert readies[0].report
        try:
            yield client
        finally:
            await client.close()


async def alone(prompt: list[int], max_tokens: int) -> list[int]:
    """The tokens of an undisturbed controller."""
    controller = Controller(FakeReplicas(CONFIG), 1, ControllerOptions())
    await controller.start()
    try:
        return (await collect(controller.submit(request(prompt, max_tokens))))[0]
    finally:
        await controller.close()


def test_two_front_ends_use_the_same_request_ids() -> None:
    async def body() -> None:
        host = Host()
        async with host.serving() as controller, host.attached() as first, host.attached() as second:
            streams = [client.submit(request([1, 2, seed], 12)) for seed, client in ((3, first), (4, second))]
            got = await asyncio.gather(*(collect(stream) for stream in streams))
            assert [tokens for tokens, _ in got] == [await alone([1, 2, 3], 12), await alone([1, 2, 4], 12)]
            assert (await first.stats())[0].generated_tokens == 24
            assert (await controller.status()).accepted == 2

    run(body())


def test_door_stays_open_when_there_are_no_descriptors_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    accept, failures = Listener.accept, iter([OSError(errno.EMFILE, "too many open files")] * 2)

    def scarce(*args: Any, **more: Any) -> Any:
        if (error := next(failures, None)) is not None:
            raise error
        return accept(*args, **more)

    monkeypatch.setattr(Listener, "accept", scarce)
    monkeypatch.setattr(controller_door, "ACCEPT_SLICE_S", 0.01)

    async def body() -> None:
        host = Host()
        async with host.serving(), host.attached() as client:
            assert (await collect(client.submit(request([1, 2, 3], 4))))[0] == await alone([1, 2, 3], 4)
        assert next(failures, None) is None

    run(body())


def test_stream_goes_on_over_the_death_of_the_controller() -> None:
    async def body() -> None:
        host = Host()
        lives = AsyncExitStack()
        controller = await lives.enter_async_context(host.serving())
        async with host.attached() as client:
            task = asyncio.create_task(collect(client.submit(request([5, 6], 200))))
            while (await controller.status()).tokens < 20:
                await asyncio.sleep(0.005)
            await lives.aclose()
            assert not task.done()
            async with host.serving() as again:
                tokens, last = await task
                assert (await again.status()).accepted == 1
        assert last.finish_reason == "length"
        assert tokens == await alone([5, 6], 200)

    run(body())


def test_front_end_that_leaves_frees_what_it_had() -> None:
    async def body() -> None:
        host = Host()
        async with host.serving() as controller:
            async with host.attached() as client:
                stream = client.submit(request([5, 6], 400))
                await anext(stream)
                assert (await controller.status()).live_requests == 1
            deadline = asyncio.get_running_loop().time() + 5.0
            while any(stats.referenced_blocks != [0] for stats in await controller.stats()):
                assert asyncio.get_running_loop().time() < deadline, "blocks are still held"
                await asyncio.sleep(0.01)

    run(body())


def test_front_end_that_falls_silent_loses_its_blocks_and_goes_on_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attached, "RENEW_INTERVAL_S", 30.0)
    monkeypatch.setattr(controller_door, "LEASE_S", 0.3)

    async def body() -> None:
        host = Host()
        async with host.serving() as controller, host.attached() as client:
            task = asyncio.create_task(collect(client.submit(request([5, 6], 150))))
            tokens, last = await task
            assert last.finish_reason == "length" and tokens == await alone([5, 6], 150)
            assert (await controller.status()).accepted > 1, "it was cut off in between"

    run(body())


def test_bad_request_is_refused_through_the_door() -> None:
    async def body() -> None:
        host = Host()
        async with host.serving(), host.attached() as client:
            with pytest.raises(ValueError, match="512"):
                await collect(client.submit(request(list(range(600)), 10)))

    run(body())


def test_stats_of_replicas_add_up() -> None:
    parts = [EngineStats(num_running=2, free_blocks=[3, 4]), EngineStats(num_running=1, free_blocks=[1, 1])]
    assert sum_stats(parts) == EngineStats(num_running=3, free_blocks=[4, 5])
    assert sum_stats([]) == EngineStats()
