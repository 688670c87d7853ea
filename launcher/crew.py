"""Crew: one replica's processes on one host, started for a launcher that is elsewhere. Knows nothing of Ray.

Whoever holds a Crew (a Ray actor) calls its coroutines from one event loop, with messages as bytes. The processes are
forked from a zygote of the crew, so they end with it, whatever ends it; ranks whose engine is elsewhere also notice
their channel.
"""

import asyncio
import platform

import msgspec

from shoal.configs.host import host_id, memory_nodes, usable_cores
from shoal.configs.model_path import resolve_model_path
from shoal.engine.client import EngineError
from shoal.launcher.bootstrap import EngineBootstrap, fingerprint, versions
from shoal.launcher.crew_messages import (
    ASSIGNMENT,
    HOST_QUERY,
    START_ENGINE,
    START_RANKS,
    Assignment,
    Ended,
    Ends,
    HostQuery,
    HostRefused,
    HostReport,
    Muster,
)
from shoal.launcher.engine_holdout import adopt_engine
from shoal.launcher.local import ENGINE_ENTRY, Child, LocalProcesses
from shoal.launcher.local_start import count_gpus, has_native, start_processes
from shoal.launcher.processes import describe_exit, signal_ours
from shoal.launcher.rank_group import RANK_ENTRY
from shoal.model.checkpoint_digest import checkpoint_digest
from shoal.model.checkpoint_files import verify_checksums
from shoal.model.families import load_spec
from shoal.parallel.control import ControlError

END_WAIT_S = 5.0
ADOPT_TIMEOUT_S = 15.0


class Crew:
    """Made once per replica and host; may run one engine and its ranks after another."""

    def __init__(self) -> None:
        self._processes: LocalProcesses | None = None
        self._children: dict[str, Child] = {}
        self._assignment: Assignment | None = None
        self._engine: EngineBootstrap | None = None

    async def look(self, payload: bytes) -> bytes:
        """Answer a HostQuery with a HostReport or HostRefused; starts the zygote meanwhile."""
        query = HOST_QUERY.decode(payload)
        answer: HostReport | HostRefused
        try:
            if self._processes is None:
                self._processes = await start_processes(query.config, query.worker)
            answer = await self._report(query, self._processes)
        except ValueError as error:
            answer = HostRefused(text=str(error), users=True)
        except (EngineError, OSError) as error:
            answer = HostRefused(text=str(error), users=False)
        return msgspec.msgpack.encode(answer)

    async def _report(self, query: HostQuery, processes: LocalProcesses) -> HostReport:
        config, spec, digest, model_dir = query.config, query.spec, "", None
        if query.model_path is not None:
            folder = await asyncio.to_thread(resolve_model_path, query.model_path, config.model.revision)
            spec, _ = await asyncio.to_thread(load_spec, folder)
            digest = await asyncio.to_thread(checkpoint_digest, folder, config.model.load_format != "dummy")
            if config.model.checksums is not None:
                await asyncio.to_thread(verify_checksums, folder, config.model.checksums)
            model_dir = str(folder)
        native = await has_native(config)
        await processes.loaded()
        return HostReport(
            host=host_id(),
            name=platform.node(),
            cores=usable_cores(),
            memory_nodes=memory_nodes(),
            gpus=await count_gpus(processes, config),
            native=native,
            versions=versions(),
            config=fingerprint(config, spec),
            checkpoint=digest,
            model_dir=model_dir,
        )

    async def start_engine(self, payload: bytes) -> None:
        """Fork an engine (START_ENGINE) after ending what ran before. Raises EngineError."""
        bootstrap = START_ENGINE.decode(payload)
        await self.stop()
        self._fork(f"engine {bootstrap.replica}", ENGINE_ENTRY, payload, supervises=True)
        self._engine = bootstrap

    async def assign(self, payload: bytes) -> None:
        """Keep an Assignment."""
        self._assignment = ASSIGNMENT.decode(payload)

    async def muster(self) -> bytes:
        """What this crew is and runs."""
        running = any(name.startswith("engine") and not child.ended.done() for name, child in self._children.items())
        return msgspec.msgpack.encode(Muster(assignment=self._assignment, engine=self._engine if running else None))

    async def adopt(self, front_address: str) -> None:
        """Have the engine that lost its front end connect to another. Raises EngineError."""
        if self._engine is None:
            raise EngineError("there is no engine to take over")
        try:
            await asyncio.to_thread(adopt_engine, self._engine.key, front_address, ADOPT_TIMEOUT_S)
        except ControlError as error:
            raise EngineError(str(error)) from None

    async def start_ranks(self, payload: bytes) -> None:
        """Fork ranks (StartRanks) after ending what ran before. Raises EngineError."""
        order = START_RANKS.decode(payload)
        await self.stop()
        for rank in order.ranks:
            self._fork(f"rank {rank.rank}", RANK_ENTRY, msgspec.msgpack.encode(rank))

    def _fork(self, name: str, entry: str, payload: bytes, supervises: bool = False) -> None:
        if self._processes is None:
            raise EngineError("a crew looks at its host before it starts anything")
        self._children[name] = self._processes.fork(name, entry, payload, supervises)

    async def ends(self, timeout_s: float) -> bytes:
        """Ends, as soon as a process has ended, or after timeout_s."""
        waiting = [child.ended for child in self._children.values()]
        if waiting:
            await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        ended = []
        for name, child in self._children.items():
            if child.ended.done():
                exited = child.ended.result()
                how = exited.log.strip() if exited.pid == 0 else f"{describe_exit(exited)}\n{exited.log}".strip()
                ended.append(Ended(name=name, how=how, by_signal=exited.status < 0))
        return msgspec.msgpack.encode(Ends(ends=ended))

    async def stop(self) -> None:
        """End the engine and ranks; the zygote stays for the next ones."""
        children, self._children, self._engine = self._children, {}, None
        for child in children.values():
            if self._processes is not None and not child.ended.done():
                self._processes.kill(child)
        if children:
            await asyncio.wait([child.ended for child in children.values()], timeout=END_WAIT_S)

    async def signal(self, pid: int, number: int) -> bool:
        """Send a signal to one of Shoal's processes on this host, for fault drills; False when it is not there."""
        return signal_ours(pid, number)

    async def pids(self) -> dict[str, int]:
        """Process ids by name, of what runs, for those who look at hosts (fault drills)."""
        if self._processes is None:
            return {}
        return {
            name: pid
            for name, child in self._children.items()
            if not child.ended.done() and (pid := self._processes.pid_of(child)) is not None
        }

    async def close(self) -> None:
        """End everything, the zygote included."""
        if self._processes is not None:
            await self._processes.close()
