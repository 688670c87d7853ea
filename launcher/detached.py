"""A detached model: a controller in an actor of the cluster that outlives the command that started it (`shoal up`).

The actor is restartable. A restarted one finds its crews by name, takes over the engines that have held out
(launcher.controller_grace_s), has what its journal says was accepted go on, and lets front ends in again, which join
it. Without the journal (it was restarted on another host) front ends give in anew what they hold.
"""

import asyncio
import logging
import os
import platform
import threading
import time
from collections import deque
from pathlib import Path

import msgspec

from shoal.configs.model_path import resolve_model_path
from shoal.configs.schema import ShoalConfig
from shoal.engine.client import EngineError
from shoal.engine.messages import Message
from shoal.launcher.attached import Door, NotYet
from shoal.launcher.bootstrap import WORKER
from shoal.launcher.controller import Controller
from shoal.launcher.controller_door import ControllerDoor
from shoal.launcher.controller_status import ControllerStatus
from shoal.launcher.crew_messages import HostRefused
from shoal.launcher.journal import Journal
from shoal.launcher.loop_thread import LoopThread
from shoal.launcher.orphans import Orphans
from shoal.launcher.ray_cluster import Cluster
from shoal.launcher.ray_fleet import RayFleet
from shoal.launcher.ray_places import end_crews
from shoal.launcher.replica_messages import Ready, Starting
from shoal.launcher.replicas import make_controller
from shoal.launcher.session import keep_heap
from shoal.launcher.state_folder import open_journal, remove_journal
from shoal.model.checkpoint_digest import checkpoint_digest
from shoal.model.families import load_spec
from shoal.model.spec import DecoderSpec

KEPT_LINES = 5000
LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"
SCALE_SLACK_S = 60.0
RETURN_S = 30.0  # front ends look for a restarted controller a few times a second

logger = logging.getLogger("shoal")


class DetachedOrder(Message, frozen=True, kw_only=True):
    """What to run. launch: tells launches of the same name apart. model_path: as every host can resolve it. spec: only
    without a checkpoint (model_path None).
    """

    name: str
    launch: str
    config: ShoalConfig
    model_path: str | None
    spec: DecoderSpec | None = None
    worker: str = WORKER


class DetachedStatus(Message, frozen=True, kw_only=True):
    """What `shoal status` shows. state: what the controller is doing while it is None. lives: of the controller."""

    name: str
    model: str
    layout: tuple[int, int, int]
    host: str
    pid: int
    state: str
    controller: ControllerStatus | None


class Lines(Message, frozen=True, kw_only=True):
    """Log lines. next: pass it to be told what follows."""

    lines: list[str]
    next: int


ORDER: "msgspec.msgpack.Decoder[DetachedOrder]" = msgspec.msgpack.Decoder(DetachedOrder)
STATUS: "msgspec.msgpack.Decoder[DetachedStatus]" = msgspec.msgpack.Decoder(DetachedStatus)
LINES: "msgspec.msgpack.Decoder[Lines]" = msgspec.msgpack.Decoder(Lines)
DOOR: "msgspec.msgpack.Decoder[Door | NotYet | HostRefused]" = msgspec.msgpack.Decoder(Door | NotYet | HostRefused)


class _KeptLines(logging.Handler):
    """The last log lines."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(LOG_FORMAT))
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self._lines.append(self.format(record))
        self._count += 1

    def since(self, number: int) -> Lines:
        """Lines from this number on, as far as they are kept."""
        lines = list(self._lines)
        first = self._count - len(lines)
        return Lines(lines=lines[max(0, number - first) :], next=self._count)


class DetachedController:
    """The actor. Its methods block and are called from several threads; the controller runs in a loop of its own."""

    def __init__(self, payload: bytes) -> None:
        self._order = ORDER.decode(payload)
        self._logs = _KeptLines()
        logging.getLogger().addHandler(self._logs)
        logging.getLogger().setLevel(self._order.config.runtime.log_level.upper())
        self._doing, self._host = "starting", platform.node()
        self._refused: HostRefused | None = None
        self._door: Door | None = None
        self._controller: Controller | None = None
        self._fleet: RayFleet | None = None
        self._journal: Journal | None = None
        self._ending, self._ended = threading.Lock(), False
        self._orphans: Orphans | None = None
        self._serving: asyncio.Task[None] | None = None
        self._loop = LoopThread("shoal-controller")
        threading.Thread(target=self._bring_up, name="shoal-bring-up", daemon=True).start()

    def _bring_up(self) -> None:
        try:
            self._loop.run(self._start())
        except (ValueError, EngineError) as error:
            logger.error("%s could not be started: %s", self._order.name, error)
            self._refused = HostRefused(text=str(error), users=isinstance(error, ValueError))
        except Exception as error:
            logger.exception("%s could not be started", self._order.name)
            self._refused = HostRefused(text=f"{type(error).__name__}: {error}", users=False)
            raise
        finally:
            if self._refused is not None and self._journal is not None and self._journal.wanted is None:
                remove_journal(self._journal)  # it has never served

    async def _start(self) -> None:
        order, config = self._order, self._order.config
        model_dir: Path | None = None
        if order.model_path is not None:
            model_dir = await asyncio.to_thread(resolve_model_path, order.model_path, config.model.revision)
            spec, _ = await asyncio.to_thread(load_spec, model_dir)
        else:
            assert order.spec is not None, "without a checkpoint the order brings the spec"
            spec = order.spec
        weights = config.model.load_format != "dummy"
        digest = "" if model_dir is None else await asyncio.to_thread(checkpoint_digest, model_dir, weights)
        cluster = Cluster()
        self._host = cluster.own_node().address  # as replicas' hosts are called
        journal = await asyncio.to_thread(self._open_journal)
        fleet = self._fleet = RayFleet(cluster, config, spec, model_dir, order.worker, order.name)
        count, kept = await self._recover(fleet, journal)
        controller = make_controller(fleet.make, count, fleet.settled, journal=journal)
        if kept:
            first = await controller.take_over(kept, self._tell)
        else:
            first = (await controller.start(self._tell))[0]
        journal.want(count)
        self._controller, self._orphans = controller, Orphans(controller, journal)
        self._orphans.start(RETURN_S)
        ready = Ready(capacity=first.capacity, report="\n".join([*fleet.settled.notes, first.report]))
        address, lease_s = cluster.own_node().address, config.launcher.lease_s
        door = ControllerDoor(controller, self._orphans, ready, address, lease_s)
        self._serving = asyncio.create_task(door.serve())
        self._door = Door(
            address=door.address,
            key=door.key,
            vocab_size=ready.capacity.vocab_size,
            max_model_len=ready.capacity.max_model_len,
            checkpoint=digest,
            lease_s=lease_s,
        )
        self._doing = "serving"
        keep_heap()
        logger.info("%s takes requests at %s", order.name, door.address)

    def _open_journal(self) -> Journal:
        """Raises EngineError once the model was taken down."""
        with self._ending:
            if self._ended:
                raise EngineError("it was taken down while it started")
            self._journal = open_journal(self._order.name, self._order.launch)
            return self._journal

    async def _recover(self, fleet: RayFleet, journal: Journal) -> tuple[int, list[int]]:
        """Find what an earlier life left, or place replicas; how many there shall be, and those of them that were
        found.
        """
        name, found = self._order.name, await fleet.recover()
        count = journal.wanted or (max(found) + 1 if found else self._order.config.parallel.data)
        for number in found:
            if number >= count:  # it was about to go
                fleet.release(number)
        kept = [number for number in found if number < count]
        if found or journal.wanted is not None:
            logger.warning(
                "%s: the controller is back and finds replicas %s of %d, and %d requests under way",
                *(name, kept, count, len(journal.live)),
            )
        if journal.torn_bytes:
            logger.warning("%s: the last %d bytes of the journal were torn", name, journal.torn_bytes)
        if not kept:
            await fleet.prepare(range(count))
        return count, kept

    def _tell(self, starting: Starting) -> None:
        self._doing = starting.doing

    def door(self) -> bytes:
        """Door, NotYet or HostRefused."""
        return msgspec.msgpack.encode(self._refused or self._door or NotYet(doing=self._doing))

    def report(self) -> str:
        """The table of ranks and memory, once it serves."""
        return "" if self._fleet is None else "\n".join(self._fleet.settled.notes)

    def status(self) -> bytes:
        """DetachedStatus."""
        order, controller = self._order, self._controller
        parallel = order.config.parallel
        state = self._doing if self._refused is None else f"failed: {self._refused.text}"
        status = DetachedStatus(
            name=order.name,
            model=order.config.model.path or "",
            layout=(parallel.tensor, parallel.pipeline, parallel.data),
            host=self._host,
            pid=os.getpid(),
            state=state,
            controller=None if controller is None else self._loop.run(controller.status(), 10.0),
        )
        return msgspec.msgpack.encode(status)

    def logs(self, since: int) -> bytes:
        """Lines from this number on."""
        return msgspec.msgpack.encode(self._logs.since(since))

    def scale(self, replicas: int) -> str:
        """Have so many replicas; returns when those that go have gone and the new ones serve, or why not, in words."""
        if self._controller is None or self._fleet is None:
            return f"{self._order.name} does not serve yet: {self._doing}"
        try:
            timeout_s = self._order.config.launcher.start_timeout_s + SCALE_SLACK_S
            self._loop.run(self._scale(self._controller, self._fleet, replicas), timeout_s)
        except (ValueError, EngineError) as error:
            return str(error)
        return ""

    async def _scale(self, controller: Controller, fleet: RayFleet, replicas: int) -> None:
        have = [status.number for status in (await controller.status()).replicas]
        if replicas > len(have):
            fleet.check(replicas - len(have))
        if replicas >= 1 and self._journal is not None:
            self._journal.want(replicas)
        await controller.scale(replicas)
        for number in have:
            if number >= replicas:
                fleet.release(number)
        deadline = time.monotonic() + self._order.config.launcher.start_timeout_s
        while True:
            slots = (await controller.status()).replicas
            if all(slot.ready for slot in slots):
                logger.info("%s has %d replicas, and had %d", self._order.name, replicas, len(have))
                return
            lost = next((slot for slot in slots if slot.state == "given up"), None)
            if lost is not None or time.monotonic() >= deadline:
                slot = lost or next(slot for slot in slots if not slot.ready)
                cause = slot.first_failure.cause if slot.first_failure is not None else slot.state
                raise EngineError(f"replica {slot.number} does not serve: {cause}")
            await asyncio.sleep(0.1)

    def down(self, drain_s: float) -> list[str]:
        """Refuse new requests, let what runs finish for drain_s, end everything but this actor; ids that did not."""
        unfinished: list[str] = []
        if self._controller is not None:
            unfinished = self._loop.run(self._down(self._controller, drain_s), drain_s + SCALE_SLACK_S)
        end_crews(Cluster(), self._order.name)
        with self._ending:
            self._ended = True
            if self._journal is not None:
                remove_journal(self._journal)
        return unfinished

    async def _down(self, controller: Controller, drain_s: float) -> list[str]:
        unfinished = await controller.drain(drain_s)
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)
        if self._orphans is not None:
            await self._orphans.close()
        await controller.close()
        return unfinished
