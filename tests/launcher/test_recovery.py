"""Real processes that die or hang under streams: each failure is named, the group is rebuilt, every stream goes on."""

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from shoal.configs.schema import ShoalConfig
from shoal.launcher.bootstrap import Model, fingerprint
from shoal.launcher.controller import Controller
from shoal.launcher.local import LocalProcesses
from shoal.launcher.local_start import LocalFactory
from shoal.launcher.processes import PRELOAD, Zygote
from shoal.launcher.replicas import controller_options, make_routing
from shoal.launcher.settle import Host, settle
from tests.launcher.fake_worker import HANG, SLOW, SPEC, WORKER, config
from tests.launcher.harness import collect, expected, group_of, processes_tagged, request, run, until


@asynccontextmanager
async def controlled(zygote: Zygote, settings: ShoalConfig) -> AsyncIterator[Controller]:
    """A controller over fake workers in processes of their own."""
    settled = settle(settings, SPEC, Host(gpus=0, native=True, ranks=settings.world_size))
    model = Model(config=settled.config, spec=SPEC, model_dir=None, worker=WORKER)
    factory = LocalFactory(LocalProcesses(zygote, 60.0), settled, model, fingerprint(settings, SPEC))
    controller = Controller(factory, settings.parallel.data, controller_options(settled), make_routing(settings))
    try:
        await controller.start()
        yield controller
    finally:
        await controller.close()


def pids_of(controller: Controller, tag: str) -> list[int]:
    """Ranks and engines that run now."""
    return list(group_of(tag).values())


async def ready(controller: Controller, life: int, number: int = 0) -> None:
    """Wait until this life of a replica takes requests."""
    slot = controller._slots[number]
    await until(lambda: slot.life >= life and slot.ready, f"life {life} of replica {number}", 20.0)


def test_killed_ranks_and_engines_lose_nothing(zygote: Zygote, tag: str) -> None:
    """Five kills over two replicas of two ranks, always with a stream that decodes."""

    async def body() -> None:
        choose = random.Random(7)
        async with controlled(zygote, config(2, data=2)) as controller:
            asked = [request([SLOW, 0, number], 100, f"r{number}") for number in range(16)]
            streams = [asyncio.create_task(collect(controller.submit(each))) for each in asked]
            for _ in range(5):
                await until(lambda: any(slot.ready and slot.served for slot in controller._slots.values()), "decoding")
                names = [item for item in processes_tagged(tag) if item[0].startswith(("shoal-rank", "shoal-engine"))]
                os.kill(choose.choice(names)[1], signal.SIGKILL)
                lives = sum(slot.life for slot in controller._slots.values())
                await until(
                    lambda lives=lives: sum(s.life for s in controller._slots.values()) > lives, "the death", 5.0
                )
            for each, (tokens, last) in zip(asked, await asyncio.gather(*streams), strict=True):
                assert tokens == expected(each.prompt_token_ids, 100) and last.finish_reason == "length"
            status = await controller.status()
            assert sum(replica.restarts for replica in status.replicas) == 5 and status.lost == 0
            causes = [failure.cause for replica in status.replicas for failure in replica.failures]
            assert causes and all("killed by SIGKILL" in cause for cause in causes)
        await until(lambda: group_of(tag) == {}, "all to end", 3.0)

    run(body())


def test_a_stopped_rank_is_found_named_with_its_stack_and_replaced(zygote: Zygote, tag: str) -> None:
    async def body() -> None:
        async with controlled(zygote, config(2, hang_timeout_s=2.5)) as controller:
            await ready(controller, 0)
            for life, busy in enumerate((True, False)):
                prompt = [SLOW, 0] if busy else [1, 2]
                asked = request(prompt, 100, f"r{life}")
                stream = asyncio.create_task(collect(controller.submit(asked)))
                if busy:
                    await until(lambda: controller._slots[0].served, "it to decode")
                else:
                    await stream
                os.kill(group_of(tag)["shoal-rank-1"], signal.SIGSTOP)
                stopped = time.monotonic()
                await ready(controller, life + 1)
                assert time.monotonic() - stopped < 12.0
                assert (await stream)[0] == expected(prompt, 100)
                (replica,) = (await controller.status()).replicas
                cause = replica.failures[-1].cause
                assert "rank 1: gave no sign of life for 2.2 s (launcher.hang_timeout_s) on " in cause
                assert "rank 1 wrote:" in cause and "most recent call first" in cause and "serve" in cause

    run(body())


def test_a_step_that_hangs_is_blamed_on_its_rank_with_the_line_it_is_at(zygote: Zygote, tag: str) -> None:
    async def body() -> None:
        async with controlled(zygote, config(2, hang_timeout_s=3.5)) as controller:
            stream = asyncio.create_task(collect(controller.submit(request([HANG, 0], 5))))
            await ready(controller, 1)
            await controller.abort(["a"])
            await stream
            cause = (await controller.status()).replicas[0].failures[0].cause
            assert "rank 0: hangs, no progress for 2.9 s (launcher.hang_timeout_s) on " in cause
            assert "rank 0: in step 0 since" in cause and "time.sleep(60)" in cause

    run(body())


def test_a_stopped_engine_is_replaced(zygote: Zygote, tag: str) -> None:
    async def body() -> None:
        async with controlled(zygote, config(2, hang_timeout_s=1.5)) as controller:
            stream = asyncio.create_task(collect(controller.submit(request([SLOW, 0], 100))))
            await until(lambda: controller._slots[0].served, "it to decode")
            os.kill(group_of(tag)["shoal-engine-0"], signal.SIGSTOP)
            await ready(controller, 1)
            assert (await stream)[0] == expected([SLOW, 0], 100)
            (replica,) = (await controller.status()).replicas
            assert "the engine process gave no sign of life for 1.5 s" in replica.failures[0].cause
        await until(lambda: group_of(tag) == {}, "all to end", 3.0)

    run(body())


def test_ranks_say_what_they_do(zygote: Zygote) -> None:
    async def body() -> None:
        async with controlled(zygote, config(2, 2)) as controller:
            slot = controller._slots[0]
            await until(lambda: len(slot.handle.rank_health()) == 4 if slot.handle else False, "a beat of every rank")
            (replica,) = (await controller.status()).replicas
            assert (replica.live, replica.ready, replica.busy) == (True, True, False)
            assert [health.rank for health in replica.health] == [0, 1, 2, 3]
            assert {place.layers for place in replica.ranks} == {(0, 2), (2, 4)}
            assert all(place.host and place.device == "cpu" for place in replica.ranks)

    run(body())


@pytest.mark.slow
def test_the_zygotes_death_is_mended_too() -> None:
    async def body() -> None:
        own = Zygote((*PRELOAD, "tests.launcher.fake_worker"))
        own.loaded(120)
        async with controlled(own, config(2)) as controller:
            stream = asyncio.create_task(collect(controller.submit(request([SLOW, 0], 100))))
            await until(lambda: controller._slots[0].served, "it to decode")
            os.kill(own.pid, signal.SIGKILL)
            assert (await stream)[0] == expected([SLOW, 0], 100)

    run(body())
