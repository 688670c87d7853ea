"""An engine with a grace: it outlives its front end, ends the old requests, and serves the next front end."""

import asyncio

import msgspec

from shoal.launcher.engine_holdout import adopt_engine
from shoal.launcher.engine_replica import EngineReplica
from shoal.launcher.processes import Zygote
from shoal.parallel.control_connect import Listener
from tests.launcher.fake_worker import config
from tests.launcher.harness import collect, expected, group_of, prepare, request, run, until


class NextFront(EngineReplica):
    """A front end for an engine that runs already."""

    async def start(self) -> None:
        await asyncio.to_thread(adopt_engine, self.bootstrap.key, self._listener.address, 10.0)

    def how_ended(self) -> str | None:
        return None

    async def explain(self) -> str:
        return ""


def test_engine_holds_out_for_the_next_front_end(zygote: Zygote, tag: str) -> None:
    async def body() -> None:
        processes, (first,) = prepare(zygote, config(tensor=2))
        await processes.loaded()
        first.bootstrap = msgspec.structs.replace(first.bootstrap, grace_s=20.0)
        await first.start()
        await first.ready(60.0)
        before = group_of(tag)
        stream = first.submit(request([1, 2, 3], 400))
        await anext(stream)
        assert first._channel is not None
        first._channel.close()  # what the death of a front end looks like
        listener = Listener.unix()
        second = NextFront(listener, msgspec.structs.replace(first.bootstrap, front_address=listener.address))
        await second.start()
        await second.ready(20.0)
        assert group_of(tag) == before
        (stats,) = await second.client.stats()
        assert stats.num_running == 0 and stats.referenced_blocks == [0]
        tokens, _ = await collect(second.submit(request([1, 2, 3], 8)))
        assert tokens == expected([1, 2, 3], 8)
        await second.stop()
        await first.stop()

    run(body())


def test_engine_ends_when_no_front_end_comes_within_the_grace(zygote: Zygote, tag: str) -> None:
    async def body() -> None:
        processes, (first,) = prepare(zygote, config(tensor=2))
        await processes.loaded()
        first.bootstrap = msgspec.structs.replace(first.bootstrap, grace_s=0.5)
        await first.start()
        await first.ready(60.0)
        assert first._channel is not None
        first._channel.close()
        await until(lambda: group_of(tag) == {}, "engine and ranks to end", 10.0)
        await first.stop()

    run(body())
