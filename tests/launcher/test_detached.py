"""The actor of a detached model, without Ray: what it makes of its order, and of what an earlier life left."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from shoal.configs.schema import CacheConfig, LauncherConfig, ModelConfig, ParallelConfig, ShoalConfig
from shoal.engine.client import EngineError
from shoal.launcher import detached
from shoal.launcher.attached import Door
from shoal.launcher.controller import Controller
from shoal.launcher.fake_replica import FakeReplica
from shoal.launcher.journal import Journal, Wanted, read_records
from shoal.launcher.placement import TooSmall
from shoal.launcher.prefix_routing import PrefixRouting
from shoal.launcher.routing import LeastLoaded, RoundRobin, Routing
from shoal.launcher.settle import Settled
from shoal.launcher.state_folder import open_journal, remove_journal, state_home
from tests.launcher.harness import request, run, until
from tests.model.specs import plain

LAUNCH = "1234"


class Fleet:
    """Replicas without processes. found: those an earlier life left; there is no place for others then. gone: of them,
    those that have vanished when they are to be taken over; there is a place to build them again.
    """

    found: Sequence[int] = ()
    released: Sequence[int] = ()
    gone: Sequence[int] = ()

    def __init__(self, _cluster: object, config: ShoalConfig, *_rest: object) -> None:
        self.settled = Settled(config=config, notes=[], ranks_per_device=1)
        self.made: list[int] = []

    async def recover(self) -> Sequence[int]:
        return self.found

    async def prepare(self, numbers: Sequence[int]) -> None:
        return

    def check(self, more: int) -> None:
        return

    def release(self, number: int) -> None:
        self.released = [*self.released, number]

    async def make(self, number: int) -> FakeReplica:
        self.made.append(number)
        if number in self.gone and self.made.count(number) == 1:
            raise EngineError(f"the crew of replica {number} is gone")
        if self.found and number not in self.found:
            raise TooSmall("no node has a free CPU")
        return FakeReplica(self.settled.config)


def controller_of(actor: detached.DetachedController) -> Controller:
    """Of one that serves."""
    assert actor._controller is not None
    return actor._controller


@asynccontextmanager
async def serving(
    monkeypatch: pytest.MonkeyPatch, home: Path, **launcher: Any
) -> AsyncIterator[detached.DetachedController]:
    """The actor, once its door is open. home: for its journal."""
    monkeypatch.setenv("XDG_STATE_HOME", str(home))
    monkeypatch.setattr(detached, "RayFleet", Fleet)
    cluster = SimpleNamespace(own_node=lambda: SimpleNamespace(address="127.0.0.1"))
    monkeypatch.setattr(detached, "end_crews", lambda cluster, name: None)
    monkeypatch.setattr(detached, "Cluster", lambda: cluster)
    config = ShoalConfig(
        model=ModelConfig(max_model_len=64, dtype="float32", load_format="dummy"),
        cache=CacheConfig(num_blocks=32),
        launcher=LauncherConfig(**launcher),
        parallel=ParallelConfig(data=2),
    )
    order = detached.DetachedOrder(name="prod", launch=LAUNCH, config=config, model_path=None, spec=plain(4, 2))
    level, actor = logging.getLogger().level, detached.DetachedController(msgspec.msgpack.encode(order))
    try:
        await until(lambda: actor._door is not None or actor._refused is not None, "the door to open", 20.0)
        assert isinstance(detached.DOOR.decode(actor.door()), Door), actor._refused
        yield actor
    finally:
        await asyncio.to_thread(actor.down, 1.0)
        actor._loop.stop()
        logging.getLogger().removeHandler(actor._logs)
        logging.getLogger().setLevel(level)


@pytest.mark.parametrize(
    ("routing", "kind"), [("prefix", PrefixRouting), ("least_loaded", LeastLoaded), ("round_robin", RoundRobin)]
)
def test_requests_are_routed_as_the_settings_say(
    routing: str, kind: type[Routing], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def body() -> None:
        async with serving(monkeypatch, tmp_path, routing=routing) as actor:
            assert type(controller_of(actor)._routing) is kind

    run(body())


def test_what_runs_serves_although_another_replica_cannot_come_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Fleet, "found", (0, 2))

    async def body() -> None:
        async with serving(monkeypatch, tmp_path) as actor:
            controller = controller_of(actor)
            await until(lambda: all(controller.state_of(number)[0] == "ready" for number in (0, 2)), "those found")
            assert controller.state_of(1)[0] != "ready"

    run(body())


@pytest.mark.parametrize("gone", [(0,), (2,), (0, 2)])
def test_a_found_replica_that_vanishes_before_it_is_taken_over_is_built_again_and_the_rest_goes_on(
    gone: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Fleet, "found", (0, 1, 2))
    monkeypatch.setattr(Fleet, "gone", gone)

    async def body() -> None:
        async with serving(monkeypatch, tmp_path, max_restarts=3) as actor:
            controller = controller_of(actor)
            await until(lambda: all(controller.state_of(number)[0] == "ready" for number in range(3)), "all")
            assert [controller.state_of(number)[1] for number in range(3)] == [int(n in gone) for n in range(3)]

    run(body())


def earlier_journal(home: Path) -> Path:
    """Where an earlier life of the actor wrote."""
    folder = home / "shoal" / "detached" / f"prod-{LAUNCH}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder / "journal"


@pytest.mark.parametrize("wanted", [1, 3])
def test_a_restarted_controller_remembers_how_many_replicas_there_shall_be(
    wanted: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Fleet, "found", (0, 1))

    async def body() -> None:
        journal = Journal(earlier_journal(tmp_path))
        journal.want(wanted)
        journal.close()
        async with serving(monkeypatch, tmp_path) as actor:
            assert len((await controller_of(actor).status()).replicas) == wanted
            assert cast(Any, actor._fleet).released == ([1] if wanted == 1 else ())

    run(body())


def test_a_restarted_controller_goes_on_with_what_was_accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Fleet, "found", (0,))

    async def body() -> None:
        journal = Journal(earlier_journal(tmp_path))
        journal.accepted(request([1, 2], 8, "front end/a"))
        journal.emitted("front end/a", 0, [5])
        journal.close()
        async with serving(monkeypatch, tmp_path) as actor:
            orphans = actor._orphans
            assert orphans is not None and orphans.waiting == ["front end/a"]
            assert actor._journal is not None
            await until(lambda: actor._journal.live == {}, "it to end")  # type: ignore[union-attr]
            assert (await controller_of(actor).status()).tokens == 7

    run(body())


def test_what_was_scaled_is_remembered_and_down_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def body() -> None:
        async with serving(monkeypatch, tmp_path) as actor:
            assert await asyncio.to_thread(actor.scale, 3) == ""
            assert "keep at least 1" in await asyncio.to_thread(actor.scale, 0)
            path = earlier_journal(tmp_path)
            assert path.parent.stat().st_mode & 0o777 == 0o700
            entries, _ = read_records(path.read_bytes())
            assert entries == [Wanted(replicas=2), Wanted(replicas=3)]
        assert not path.parent.exists()

    run(body())


def test_only_old_journals_that_nobody_writes_are_cleared_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    journals = {name: open_journal(name, LAUNCH) for name in ("old", "recent", "in-use")}
    for name in ("old", "in-use"):
        os.utime(journals[name].path, (0, 0))
    for name in ("old", "recent"):
        journals[name].close()
    remove_journal(open_journal("new", LAUNCH))
    assert sorted(path.name for path in state_home().iterdir()) == [f"in-use-{LAUNCH}", f"recent-{LAUNCH}"]
    journals["in-use"].close()


def test_a_home_that_cannot_hold_a_journal_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="set XDG_STATE_HOME"):
        open_journal("prod", LAUNCH)
