"""The actor of a detached model, without Ray: what it makes of its order, and of what an earlier life left."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from shoal.configs.schema import CacheConfig, LauncherConfig, ModelConfig, ParallelConfig, ShoalConfig
from shoal.launcher import detached
from shoal.launcher.attached import Door
from shoal.launcher.controller import Controller
from shoal.launcher.fake_replica import FakeReplica
from shoal.launcher.placement import TooSmall
from shoal.launcher.prefix_routing import PrefixRouting
from shoal.launcher.routing import LeastLoaded, RoundRobin, Routing
from shoal.launcher.settle import Settled
from tests.launcher.harness import run, until
from tests.model.specs import plain


class Fleet:
    """Replicas without processes. found: those an earlier life left; there is no place for others then."""

    found: Sequence[int] = ()

    def __init__(self, _cluster: object, config: ShoalConfig, *_rest: object) -> None:
        self.settled = Settled(config=config, notes=[], ranks_per_device=1)

    async def recover(self) -> Sequence[int]:
        return self.found

    async def prepare(self, numbers: Sequence[int]) -> None:
        return

    async def make(self, number: int) -> FakeReplica:
        if self.found and number not in self.found:
            raise TooSmall("no node has a free CPU")
        return FakeReplica(self.settled.config)


@asynccontextmanager
async def serving(monkeypatch: pytest.MonkeyPatch, **launcher: Any) -> AsyncIterator[Controller]:
    """The actor's controller, once its door is open."""
    monkeypatch.setattr(detached, "RayFleet", Fleet)
    cluster = SimpleNamespace(own_node=lambda: SimpleNamespace(address="127.0.0.1"))
    monkeypatch.setattr(detached, "Cluster", lambda: cluster)
    config = ShoalConfig(
        model=ModelConfig(max_model_len=64, dtype="float32", load_format="dummy"),
        cache=CacheConfig(num_blocks=32),
        launcher=LauncherConfig(**launcher),
        parallel=ParallelConfig(data=2),
    )
    order = detached.DetachedOrder(name="prod", config=config, model_path=None, spec=plain(4, 2))
    level, actor = logging.getLogger().level, detached.DetachedController(msgspec.msgpack.encode(order))
    try:
        await until(lambda: actor._door is not None or actor._refused is not None, "the door to open", 20.0)
        assert isinstance(detached.DOOR.decode(actor.door()), Door), actor._refused
        assert actor._controller is not None
        yield actor._controller
    finally:
        if actor._controller is not None:
            await asyncio.to_thread(actor._loop.run, actor._down(actor._controller, 1.0), 20.0)
        actor._loop.stop()
        logging.getLogger().removeHandler(actor._logs)
        logging.getLogger().setLevel(level)


@pytest.mark.parametrize(
    ("routing", "kind"), [("prefix", PrefixRouting), ("least_loaded", LeastLoaded), ("round_robin", RoundRobin)]
)
def test_requests_are_routed_as_the_settings_say(
    routing: str, kind: type[Routing], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with serving(monkeypatch, routing=routing) as controller:
            assert type(controller._routing) is kind

    run(body())


def test_what_runs_serves_although_another_replica_cannot_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fleet, "found", (0, 2))

    async def body() -> None:
        async with serving(monkeypatch) as controller:
            states = [controller.state_of(number)[0] for number in range(3)]
            assert (states[0], states[2]) == ("ready", "ready") and states[1] != "ready"

    run(body())
