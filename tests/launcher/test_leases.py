"""Leases and hang-ups: whoever vanishes leaves no block behind, and nobody else notices."""

import asyncio
import time

import pytest

from shoal.engine.client import EngineError
from shoal.launcher.controller import Controller
from shoal.launcher.leases import Lease
from tests.launcher.controllers import answer, fakes
from tests.launcher.harness import collect, request, run, until


def referenced(controller: Controller) -> int:
    """Blocks that sequences hold, over all replicas."""
    handles = [slot.handle for slot in controller._slots.values()]
    return sum(sum(handle.core.stats().referenced_blocks) for handle in handles)  # type: ignore[union-attr]


def test_a_front_end_that_does_not_renew_loses_its_requests_within_a_second() -> None:
    async def body() -> None:
        async with fakes(2) as (controller, _):
            vanishing, other = Lease(controller, "front end 1", 0.3), Lease(controller, "front end 2", 30.0)
            mine = [asyncio.create_task(collect(vanishing.submit(request([n], 450, f"m{n}")))) for n in range(6)]
            wanted = request([9], 300, "other")
            theirs = asyncio.create_task(collect(other.submit(wanted)))
            await until(lambda: referenced(controller) > 0, "blocks")
            vanishing.renew()
            renewed = time.monotonic()
            assert [last.finish_reason for _, last in await asyncio.gather(*mine)] == ["abort"] * 6
            assert 0.3 <= time.monotonic() - renewed < 1.3
            assert not vanishing.live
            with pytest.raises(EngineError, match=r"the lease of front end 1 ran out: it was not renewed for 0\.3 s"):
                vanishing.renew()
            with pytest.raises(EngineError, match="ran out"):
                await anext(vanishing.submit(request([1])))
            assert (await theirs)[0] == answer(wanted)
            await until(lambda: referenced(controller) == 0, "all blocks to be free", 1.0)

    run(body())


def test_a_lease_drains_and_closes_for_itself_alone() -> None:
    async def body() -> None:
        async with fakes(1) as (controller, _):
            lease, other = Lease(controller, "one", 30.0), Lease(controller, "two", 30.0)
            long = asyncio.create_task(collect(lease.submit(request([1], 450, "long"))))
            await until(lambda: referenced(controller) > 0, "it to run")
            with pytest.raises(ValueError, match="already in use"):
                await anext(lease.submit(request([1], 5, "long")))
            await other.abort(["long"])
            assert await lease.drain(0.0) == ["long"]
            with pytest.raises(EngineError, match="draining"):
                await anext(lease.submit(request([1])))
            await lease.close()
            assert (await long)[1].finish_reason == "abort"
            await other.health()
            with pytest.raises(EngineError, match="was closed"):
                await lease.health()
            assert (await collect(other.submit(request([1], 3, "fine"))))[0] == answer(request([1], 3))
            await other.close()

    run(body())


def test_a_hundred_disconnects_free_their_blocks_and_change_nothing_else() -> None:
    async def body() -> None:
        async with fakes(2) as (controller, _):
            steady = [request([number, 2], 300, f"s{number}") for number in range(4)]
            streams = [asyncio.create_task(collect(controller.submit(each))) for each in steady]
            for number in range(100):
                stream = controller.submit(request([number], 400, f"d{number}"))
                await anext(stream)
                await stream.aclose()  # type: ignore[attr-defined]
            for each, (tokens, _) in zip(steady, await asyncio.gather(*streams), strict=True):
                assert tokens == answer(each)
            await until(lambda: referenced(controller) == 0, "all blocks to be free", 1.0)

    run(body())
