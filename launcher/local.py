"""Replicas on this host: the zygote as an event loop sees it, and the replica whose engine it forks."""

import asyncio
import signal
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from shoal.engine.client import EngineError
from shoal.launcher.bootstrap import EngineBootstrap
from shoal.launcher.engine_replica import EngineReplica
from shoal.launcher.processes import LaunchError, Zygote, describe_exit
from shoal.launcher.zygote_messages import Exited
from shoal.parallel.control import ControlError
from shoal.parallel.control_connect import Listener

ENGINE_ENTRY = "shoal.launcher.engine_process:main"
EXIT_WAIT_S = 1.0


class Child(NamedTuple):
    """A forked process. ended: how, once it has."""

    process_id: int
    ended: "asyncio.Future[Exited]"

    async def has_ended(self, timeout_s: float) -> bool:
        """Whether it ends within timeout_s."""
        await asyncio.wait([self.ended], timeout=timeout_s)
        return self.ended.done()


class LocalProcesses:
    """A zygote and its children, watched by the running event loop."""

    def __init__(self, zygote: Zygote, timeout_s: float) -> None:
        """timeout_s: that it may take to load."""
        self._zygote = zygote
        self._ended: dict[int, asyncio.Future[Exited]] = {}
        self._loop = asyncio.get_running_loop()
        self._closed = self._gone = False
        self._loading = asyncio.create_task(self._load(timeout_s))

    async def loaded(self) -> None:
        """Wait until it can fork. Raises EngineError."""
        await asyncio.shield(self._loading)

    @property
    def cuda(self) -> bool:
        """Whether torch was built for GPUs; once loaded."""
        return self._zygote.cuda

    @property
    def gone(self) -> bool:
        """Whether the zygote has died, and all its children with it."""
        return self._gone

    async def _load(self, timeout_s: float) -> None:
        try:
            await asyncio.to_thread(self._zygote.loaded, timeout_s)
        except LaunchError as error:
            raise EngineError(str(error)) from None
        if not self._closed:
            self._loop.add_reader(self._zygote.connection.fileno(), self._read)

    def fork(self, name: str, entry: str, payload: bytes, supervises: bool = False) -> "Child":
        """Start a child. Raises EngineError."""
        try:
            process_id = self._zygote.connection.fork(name, entry, payload, supervises)
        except LaunchError as error:
            raise EngineError(str(error)) from None
        ended = self._ended[process_id] = self._loop.create_future()
        return Child(process_id, ended)

    def kill(self, child: "Child") -> None:
        """Kill a child, and with it the children forked through it; one that has ended is no error."""
        self._zygote.connection.signal(child.process_id, signal.SIGKILL)

    def pid_of(self, child: "Child") -> int | None:
        """The process id, once the zygote has told it."""
        return self._zygote.connection.pids.get(child.process_id)

    def _read(self) -> None:
        try:
            for exited in self._zygote.connection.poll():
                self._tell(exited)
        except ControlError as error:
            self._loop.remove_reader(self._zygote.connection.fileno())
            self._gone = True
            for process_id in list(self._ended):
                self._tell(
                    Exited(
                        process_id=process_id,
                        pid=0,
                        status=1,
                        log=f"the zygote is gone: {error}",
                    )
                )

    def _tell(self, exited: Exited) -> None:
        ended = self._ended.pop(exited.process_id, None)
        if ended is not None and not ended.done():
            ended.set_result(exited)

    async def close(self) -> None:
        """End the zygote and every child at once. Idempotent."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._zygote.connection.fileno())
            await asyncio.to_thread(self._zygote.close)
            await asyncio.gather(self._loading, return_exceptions=True)


class LocalReplica(EngineReplica):
    """A replica whose engine this host's zygote forks."""

    def __init__(
        self,
        processes: LocalProcesses,
        listener: Listener,
        bootstrap: EngineBootstrap,
        *,
        where: str = "",
        on_listening: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(listener, bootstrap, where=where, on_listening=on_listening)
        self._processes = processes
        self._engine: Child | None = None

    async def start(self) -> None:
        """Fork the engine."""
        payload = msgspec.msgpack.encode(self.bootstrap)
        self._engine = self._processes.fork(f"engine {self.bootstrap.replica}", ENGINE_ENTRY, payload, supervises=True)

    async def stop(self) -> None:
        """The same, and kill the engine when it has not ended then."""
        await super().stop()
        if self._engine is not None and not await self._engine.has_ended(EXIT_WAIT_S):
            self._processes.kill(self._engine)
            await self._engine.has_ended(EXIT_WAIT_S)

    def how_ended(self) -> str | None:
        """From the zygote."""
        if self._engine is None or not self._engine.ended.done():
            return None
        exited = self._engine.ended.result()
        if exited.pid == 0:
            return exited.log.strip()
        return f"the engine process {describe_exit(exited)}\n{exited.log}".strip()

    async def explain(self) -> str:
        """The zygote's word follows the hangup closely."""
        if self._engine is not None:
            await self._engine.has_ended(EXIT_WAIT_S)
        return self.how_ended() or ""
