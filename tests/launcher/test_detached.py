"""The actor of a detached model, without Ray: what it makes of its order."""

import asyncio
import logging
from types import SimpleNamespace

import msgspec
import pytest

from shoal.configs.schema import CacheConfig, LauncherConfig, ModelConfig, ParallelConfig, ShoalConfig
from shoal.launcher import detached
from shoal.launcher.attached import Door
from shoal.launcher.fake_replica import FakeReplica
from shoal.launcher.prefix_routing import PrefixRouting
from shoal.launcher.routing import LeastLoaded, RoundRobin, Routing
from shoal.launcher.settle import Settled
from tests.launcher.harness import run, until
from tests.model.specs import plain


class Fleet:
    """Replicas without processes or places."""

    def __init__(self, _cluster: object, config: ShoalConfig, *_rest: object) -> None:
        self.settled = Settled(config=config, notes=[], ranks_per_device=1)

    async def recover(self) -> list[int]:
        return []

    async def prepare(self, numbers: list[int]) -> None:
        return

    async def make(self, _number: int) -> FakeReplica:
        return FakeReplica(self.settled.config)


@pytest.mark.parametrize(
    ("routing", "kind"), [("prefix", PrefixRouting), ("least_loaded", LeastLoaded), ("round_robin", RoundRobin)]
)
def test_requests_are_routed_as_the_settings_say(
    routing: str, kind: type[Routing], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detached, "RayFleet", Fleet)
    monkeypatch.setattr(
        detached, "Cluster", lambda: SimpleNamespace(own_node=lambda: SimpleNamespace(address="127.0.0.1"))
    )
    config = ShoalConfig(
        model=ModelConfig(max_model_len=64, dtype="float32", load_format="dummy"),
        cache=CacheConfig(num_blocks=32),
        launcher=LauncherConfig(routing=routing),  # type: ignore[arg-type]
        parallel=ParallelConfig(data=2),
    )
    order = detached.DetachedOrder(name="prod", config=config, model_path=None, spec=plain(4, 2))

    level = logging.getLogger().level

    async def body() -> None:
        actor = detached.DetachedController(msgspec.msgpack.encode(order))
        await until(lambda: actor._door is not None or actor._refused is not None, "the door to open", 20.0)
        try:
            assert isinstance(detached.DOOR.decode(actor.door()), Door), actor._refused
            assert actor._controller is not None and type(actor._controller._routing) is kind
        finally:
            assert actor._controller is not None
            await asyncio.to_thread(actor._loop.run, actor._down(actor._controller, 1.0), 20.0)
            actor._loop.stop()
            logging.getLogger().removeHandler(actor._logs)
            logging.getLogger().setLevel(level)

    run(body())
