"""Front ends in other processes than their controller: one stream through the door, over its death as well."""

import asyncio
import errno
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shoal.configs.schema import LauncherConfig, ModelConfig, ShoalConfig
from shoal.engine.client import EngineError
from shoal.engine.fake_executor import StepLatency
from shoal.engine.messages import EngineStats, Submit
from shoal.launcher import attached, controller_door
from shoal.launcher.attached import AttachedReplica, Door, NotYet, new_front_end
from shoal.launcher.controller import Controller, ControllerOptions
from shoal.launcher.controller_door import ControllerDoor, sum_stats
from shoal.launcher.fake_replica import FakeReplicas
from shoal.launcher.journal import Journal, Kept
from shoal.launcher.orphans import Orphans
from shoal.launcher.replica_messages import FROM_ENGINE, Acknowledged, Enter, Outputs, Ready, Rejected
from shoal.parallel.control_async import AsyncChannel
from shoal.parallel.control_connect import Listener, connect
from tests.launcher.harness import collect, request, run, until

CONFIG = ShoalConfig(model=ModelConfig(max_model_len=512))
SLOW = StepLatency(base_s=0.005)
SCRIPT = Path(__file__).with_name("front_end_script.py")


class Host:
    """A detached controller: its door while it is there. journal: of the life that is next, or under way."""

    def __init__(self, journal: Path, lease_s: float = 10.0) -> None:
        self.door: Door | None = None
        self.journal, self.lease_s = journal, lease_s

    def lose(self) -> None:
        """From now on as if the controller had been killed: the ends of its requests are not noted."""
        self.writing.ended = lambda request_id: None  # type: ignore[method-assign]

    async def ask(self) -> Door | NotYet:
        return self.door or NotYet(doing="starting")

    @asynccontextmanager
    async def serving(self, closed: asyncio.Event | None = None) -> AsyncIterator[Controller]:
        """One life of the controller. closed: front ends are let in when it is set."""
        journal = self.writing = Journal(self.journal)
        controller = Controller(FakeReplicas(CONFIG, SLOW), 2, ControllerOptions(), journal=journal)
        (ready, _) = await controller.start()
        orphans = Orphans(controller, journal)
        orphans.start(20.0)
        door = ControllerDoor(controller, orphans, ready, "127.0.0.1", self.lease_s)
        task = asyncio.create_task(door.serve())
        opening = asyncio.create_task(self._open(door, closed))
        try:
            yield controller
        finally:
            self.door = None
            opening.cancel()
            task.cancel()
            await asyncio.gather(task, opening, return_exceptions=True)
            await orphans.close()
            await controller.close()
            journal.close()

    async def _open(self, door: ControllerDoor, closed: asyncio.Event | None) -> None:
        if closed is not None:
            await closed.wait()
        self.door = Door(
            address=door.address, key=door.key, vocab_size=1, max_model_len=512, checkpoint="", lease_s=self.lease_s
        )

    @asynccontextmanager
    async def attached(self) -> AsyncIterator[Controller]:
        """A front end's controller."""
        front_end = new_front_end()

        async def factory(number: int) -> AttachedReplica:
            return AttachedReplica(self.ask, 10.0, "prod", front_end)

        client = Controller(factory, 1, ControllerOptions(start_timeout_s=20.0))
        readies: list[Ready] = await client.start()
        assert readies[0].report
        try:
            yield client
        finally:
            await client.close()


def kept_in(path: Path) -> dict[str, Kept]:
    """The live requests of a journal that another one may write."""
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    journal = Journal(copy)
    journal.close()
    return journal.live


def emitted(controller: Controller) -> int:
    """Tokens of the first request a replica works on."""
    return max((tokens for _, _, tokens in controller.progress()), default=0)


def _no_space(*_args: Any) -> None:
    raise OSError("no space left on device")


async def alone(prompt: list[int], max_tokens: int) -> list[int]:
    """The tokens of an undisturbed controller."""
    controller = Controller(FakeReplicas(CONFIG), 1, ControllerOptions())
    await controller.start()
    try:
        return (await collect(controller.submit(request(prompt, max_tokens))))[0]
    finally:
        await controller.close()


def test_two_front_ends_use_the_same_request_ids(tmp_path: Path) -> None:
    async def body() -> None:
        host = Host(tmp_path / "journal")
        async with host.serving() as controller, host.attached() as first, host.attached() as second:
            streams = [client.submit(request([1, 2, seed], 12)) for seed, client in ((3, first), (4, second))]
            got = await asyncio.gather(*(collect(stream) for stream in streams))
            assert [tokens for tokens, _ in got] == [await alone([1, 2, 3], 12), await alone([1, 2, 4], 12)]
            assert (await first.stats())[0].generated_tokens == 24
            assert (await controller.status()).accepted == 2

    run(body())


def test_door_stays_open_when_there_are_no_descriptors_for_a_while(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    accept, failures = Listener.accept, iter([OSError(errno.EMFILE, "too many open files")] * 2)

    def scarce(*args: Any, **more: Any) -> Any:
        if (error := next(failures, None)) is not None:
            raise error
        return accept(*args, **more)

    monkeypatch.setattr(Listener, "accept", scarce)
    monkeypatch.setattr(controller_door, "ACCEPT_SLICE_S", 0.01)

    async def body() -> None:
        host = Host(tmp_path / "journal")
        async with host.serving(), host.attached() as client:
            assert (await collect(client.submit(request([1, 2, 3], 4))))[0] == await alone([1, 2, 3], 4)
        assert next(failures, None) is None

    run(body())


def test_stream_goes_on_over_two_deaths_of_the_controller(tmp_path: Path) -> None:
    """Before its front end is back, which joins it and sees neither a gap nor a repeat."""

    async def body() -> None:
        host, closed, kept = Host(tmp_path / "journal"), asyncio.Event(), 0
        closed.set()
        lives = AsyncExitStack()
        controller = await lives.enter_async_context(host.serving(closed))
        async with host.attached() as client:
            task = asyncio.create_task(collect(client.submit(request([5, 6], 400, logprobs=1))))
            for _ in range(2):
                await until(lambda: emitted(controller) > kept + 20, "tokens for its front end")  # noqa: B023
                host.lose()
                await lives.aclose()
                ((name, request_kept),) = kept_in(host.journal).items()
                kept = len(request_kept.token_ids)
                assert not task.done() and kept > 20 and name.endswith("/a")
                closed.clear()
                controller = await lives.enter_async_context(host.serving(closed))
                await until(lambda: emitted(controller) > kept, "it to go on for nobody")  # noqa: B023
                closed.set()
            tokens, last = await task
            status = await controller.status()
            assert (status.accepted, status.lost) == (1, 0), "it was joined, not given in anew"
            assert status.tokens == 400 - kept, "and went on where it was"
        await lives.aclose()
        assert last.finish_reason == "length"
        assert tokens == await alone([5, 6], 400)

    run(body())


def test_a_front_end_whose_requests_the_journal_does_not_hold_gives_them_in_anew(tmp_path: Path) -> None:
    async def body() -> None:
        host = Host(tmp_path / "journal")
        lives = AsyncExitStack()
        controller = await lives.enter_async_context(host.serving())
        async with host.attached() as client:
            task = asyncio.create_task(collect(client.submit(request([5, 6], 200))))
            await until(lambda: emitted(controller) > 20, "tokens")
            host.journal = tmp_path / "on another host"
            await lives.aclose()
            async with host.serving():
                tokens, last = await task
        assert last.finish_reason == "length" and tokens == await alone([5, 6], 200)

    run(body())


def test_nothing_is_said_of_a_request_before_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        host = Host(tmp_path / "journal")
        async with host.serving() as controller, host.attached() as client:
            with monkeypatch.context() as full:
                full.setattr(Journal, "_write", _no_space)
                with pytest.raises(EngineError, match="cannot be kept, and is not accepted: no space"):
                    await anext(client.submit(request([5, 6], 5)))
                assert (await controller.status()).live_requests == 0
            stream = client.submit(request([5, 6], 5, "b"))
            await anext(stream)
            assert [name.rpartition("/")[2] for name in kept_in(host.journal)] == ["b"]
            assert [delta.finish_reason async for delta in stream][-1] == "length"
            await until(lambda: not kept_in(host.journal), "its end to be noted")

    run(body())


async def entered(door: Door) -> AsyncChannel[Any]:
    """A front end's end of its connection, by hand."""
    channel = await asyncio.to_thread(connect, door.address, door.key, FROM_ENGINE, "prod", 10.0)
    opened: AsyncChannel[Any] = await AsyncChannel.adopt(channel)
    opened.post(Enter(front_end=new_front_end()))
    assert isinstance(await opened.receive(10.0), Ready)
    return opened


def test_acceptance_is_said_after_the_journal_write_and_before_the_first_token(tmp_path: Path) -> None:
    async def body() -> None:
        host = Host(tmp_path / "journal")
        async with host.serving():
            await until(lambda: host.door is not None, "the door")
            assert host.door is not None
            channel = await entered(host.door)
            channel.post(Submit(request=request([5, 6], 5)))
            told: list[Any] = []
            while not told or not isinstance(told[-1], Outputs):
                message = await channel.receive(10.0)
                if isinstance(message, Acknowledged | Outputs | Rejected):
                    told.append(message)
                if isinstance(message, Acknowledged):
                    assert [name.rpartition("/")[2] for name in kept_in(host.journal)] == ["a"]
            assert told[0] == Acknowledged(request_ids=["a"]) and len(told) == 2
            channel.close()

    run(body())


def test_what_is_not_kept_is_rejected_and_never_acknowledged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Journal, "_write", _no_space)

    async def body() -> None:
        host = Host(tmp_path / "journal")
        async with host.serving():
            await until(lambda: host.door is not None, "the door")
            assert host.door is not None
            channel = await entered(host.door)
            channel.post(Submit(request=request([5, 6], 5)))
            while not isinstance(message := await channel.receive(10.0), Rejected):
                assert not isinstance(message, Acknowledged)
            channel.close()

    run(body())


def test_a_death_between_the_journal_write_and_the_acknowledgement_runs_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        host, lives = Host(tmp_path / "journal"), AsyncExitStack()
        await lives.enter_async_context(host.serving())
        written = asyncio.Event()

        async def dies(guest: Any, request_id: str, deltas: Any) -> None:
            await anext(deltas)
            written.set()
            await asyncio.Event().wait()

        with monkeypatch.context() as first_life:
            first_life.setattr(controller_door._Guest, "_acknowledge", lambda guest, request_id: None)
            first_life.setattr(controller_door._Guest, "_pass_back", dies)
            async with host.attached() as client:
                front = client._dispatch
                task = asyncio.create_task(collect(client.submit(request([5, 6], 100))))
                await written.wait()
                host.lose()
                await lives.aclose()
                entry = front.ledger.get("a")
                assert entry is not None and not entry.started_here and len(kept_in(host.journal)) == 1
                first_life.undo()
                async with host.serving() as controller:
                    tokens, last = await task
                    status = await controller.status()
        assert (status.accepted, status.lost) == (1, 0) and last.finish_reason == "length"
        assert tokens == await alone([5, 6], 100)

    run(body())


def test_front_end_that_leaves_frees_what_it_had(tmp_path: Path) -> None:
    async def body() -> None:
        host = Host(tmp_path / "journal")
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


def test_front_end_that_falls_silent_is_cut_off_and_goes_on_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(attached, "RENEWALS", 0.01)

    async def body() -> None:
        host = Host(tmp_path / "journal", lease_s=0.3)
        async with host.serving() as controller, host.attached() as client:
            task = asyncio.create_task(collect(client.submit(request([5, 6], 150))))
            tokens, last = await task
            assert last.finish_reason == "length" and tokens == await alone([5, 6], 150)
            assert (await controller.status()).accepted > 1, "it was cut off in between"

    run(body())


def test_stopped_front_end_frees_its_blocks_within_a_second_and_goes_on_when_it_runs_again(tmp_path: Path) -> None:
    """A process of its own, stopped by SIGSTOP: its connection stays."""

    async def body() -> None:
        loop = asyncio.get_running_loop()
        host = Host(tmp_path / "journal", LauncherConfig().lease_s)
        async with host.serving() as controller:
            await until(lambda: host.door is not None, "the door")
            front_end = await asyncio.create_subprocess_exec(
                *(sys.executable, str(SCRIPT), str(SCRIPT.parents[2]), msgspec.json.encode(host.door).decode()),
                stdout=asyncio.subprocess.PIPE,
            )
            assert front_end.stdout is not None
            await until(lambda: emitted(controller) > 20, "tokens", 20.0)
            front_end.send_signal(signal.SIGSTOP)
            stopped = loop.time()
            while any(stats.referenced_blocks != [0] for stats in await controller.stats()):
                assert loop.time() - stopped < 1.0 + 1.0, "blocks are still held"
                await asyncio.sleep(0.01)
            front_end.send_signal(signal.SIGCONT)
            tokens = json.loads(await front_end.stdout.read())
            assert await front_end.wait() == 0 and tokens == await alone([5, 6], 250)

    run(body())


def test_bad_request_is_refused_through_the_door(tmp_path: Path) -> None:
    async def body() -> None:
        host = Host(tmp_path / "journal")
        async with host.serving(), host.attached() as client:
            with pytest.raises(ValueError, match="512"):
                await collect(client.submit(request(list(range(600)), 10)))

    run(body())


def test_stats_of_replicas_add_up() -> None:
    parts = [EngineStats(num_running=2, free_blocks=[3, 4]), EngineStats(num_running=1, free_blocks=[1, 1])]
    assert sum_stats(parts) == EngineStats(num_running=3, free_blocks=[4, 5])
    assert sum_stats([]) == EngineStats()
