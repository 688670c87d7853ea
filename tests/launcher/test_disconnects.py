"""Clients that hang up: they leave no block behind, and nobody else notices."""

import asyncio

from shoal.launcher.controller import Controller
from tests.launcher.controllers import answer, fakes
from tests.launcher.harness import collect, request, run, until


def referenced(controller: Controller) -> int:
    """Blocks that sequences hold, over all replicas."""
    handles = [slot.handle for slot in controller._slots.values()]
    return sum(sum(handle.core.stats().referenced_blocks) for handle in handles)  # type: ignore[union-attr]


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
