"""Replicas whose engine is forked on this host: the zygote as an event loop sees it, and the handle of one replica.

The front end listens, the engine connects; ranks are the engine's to fork (or, under torchrun, to wait for).
"""

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec

from shoal.engine.client import EngineError
from shoal.engine.messages import Failure
from shoal.launcher.bootstrap import EngineBootstrap
from shoal.launcher.processes import LaunchError, Zygote, describe_exit
from shoal.launcher.replica import Progress, ReplicaHandle
from shoal.launcher.replica_client import ReplicaClient, failure_text
from shoal.launcher.replica_messages import (
    FROM_ENGINE,
    Beat,
    FromEngine,
    Listening,
    LogText,
    Ready,
    Refused,
    Starting,
)
from shoal.launcher.zygote_messages import Exited
from shoal.parallel.control import Channel, ControlError, ControlTimeout
from shoal.parallel.control_async import AsyncChannel
from shoal.parallel.control_connect import Listener

ENGINE_ENTRY = "shoal.launcher.engine_process:main"
ACCEPT_SLICE_S = 0.2
EXIT_WAIT_S = 1.0
STOP_SLACK_S = 1.0

logger = logging.getLogger("shoal")


class LocalProcesses:
    """A zygote and its children, watched by the running event loop. The last replica to stop closes it."""

    def __init__(self, zygote: Zygote) -> None:
        self._zygote = zygote
        self._ended: dict[int, asyncio.Future[Exited]] = {}
        self._loop = asyncio.get_running_loop()
        self._closed = False

    async def loaded(self, timeout_s: float) -> None:
        """Wait for the zygote, then watch it. Raises EngineError."""
        try:
            await asyncio.to_thread(self._zygote.loaded, timeout_s)
        except LaunchError as error:
            raise EngineError(str(error)) from None
        self._loop.add_reader(self._zygote.connection.fileno(), self._read)

    def fork(self, name: str, entry: str, payload: bytes, supervises: bool = False) -> "asyncio.Future[Exited]":
        """Start a child; the future tells how it ends. Raises EngineError."""
        try:
            process_id = self._zygote.connection.fork(name, entry, payload, supervises)
        except LaunchError as error:
            raise EngineError(str(error)) from None
        ended = self._ended[process_id] = self._loop.create_future()
        return ended

    def _read(self) -> None:
        try:
            for exited in self._zygote.connection.poll():
                self._tell(exited)
        except ControlError as error:
            self._loop.remove_reader(self._zygote.connection.fileno())
            for process_id in list(self._ended):
                self._tell(Exited(process_id=process_id, pid=0, status=1, log=f"the zygote is gone: {error}"))

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


class EngineConnection:
    """The front end's side of one engine: listens, lets the engine in, follows its start."""

    def __init__(self, listener: Listener, key: bytes, where: str) -> None:
        """where: put before errors ("replica 1: ", or nothing)."""
        self._listener, self._key, self._where = listener, key, where
        self.address = listener.address
        self.channel: AsyncChannel[FromEngine] | None = None

    async def accept(self, deadline: float, ended: "Callable[[], str | None]") -> None:
        """Wait for the engine. ended: how its process ended, None while it runs. Raises EngineError."""
        while time.monotonic() < deadline:
            try:
                channel: Channel[FromEngine] = await asyncio.to_thread(
                    self._listener.accept, self._key, FROM_ENGINE, "the engine", ACCEPT_SLICE_S
                )
            except ControlTimeout:
                if (how := ended()) is not None:
                    raise EngineError(f"{self._where}the engine process {how}") from None
                continue
            self._listener.close()
            self.channel = await AsyncChannel.adopt(channel)
            return
        raise EngineError(f"{self._where}the engine did not connect within launcher.start_timeout_s")

    async def started(
        self, deadline: float, on_progress: Progress | None, on_listening: Callable[[str], None] | None
    ) -> Ready:
        """Follow the start until the engine takes requests. Raises ValueError, EngineError, ControlError."""
        assert self.channel is not None
        while True:
            message = await self.channel.receive(max(0.0, deadline - time.monotonic()))
            match message:
                case Ready():
                    return message
                case Refused():
                    raise ValueError(self._where + message.text)
                case Failure():
                    raise EngineError(failure_text(message, self._where))
                case Starting() if on_progress is not None:
                    on_progress(message)
                case Listening() if on_listening is not None:
                    on_listening(message.address)
                case LogText():
                    logger.log(message.level, "%s%s", self._where, message.text)
                case Beat() | Starting() | Listening():
                    pass
                case _:
                    raise EngineError(f"{self._where}the engine sent a {type(message).__name__} while it started")

    def close(self) -> None:
        """Stop listening and hang up. Idempotent."""
        self._listener.close()
        if self.channel is not None:
            self.channel.close()


class LocalReplica(ReplicaHandle):
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
        """listener: at bootstrap.front_address. on_listening: told where the engine waits for its ranks."""
        self._processes, self._bootstrap, self._where = processes, bootstrap, where
        self._connection = EngineConnection(listener, bootstrap.key, where)
        self._on_listening = on_listening
        self._limits = bootstrap.model.config.launcher
        self._ended: asyncio.Future[Exited] | None = None
        self._client: ReplicaClient | None = None

    async def start(self) -> None:
        """Fork the engine."""
        payload = msgspec.msgpack.encode(self._bootstrap)
        name = f"engine {self._bootstrap.replica}"
        self._ended = self._processes.fork(name, ENGINE_ENTRY, payload, supervises=True)

    async def ready(self, timeout_s: float, on_progress: Progress | None = None) -> Ready:
        """Wait until the engine takes requests."""
        deadline = time.monotonic() + timeout_s
        await self._connection.accept(deadline, self._how_ended)
        try:
            ready = await self._connection.started(deadline, on_progress, self._on_listening)
        except ControlTimeout:
            raise EngineError(f"{self._where}the start took longer than {timeout_s:g} s") from None
        except ControlError as error:
            raise EngineError(self._where + (await self._explain() or str(error))) from None
        assert self._connection.channel is not None
        self.client = self._client = ReplicaClient(
            self._connection.channel, where=self._where, explain=self._explain, stop=self.stop
        )
        return ready

    async def stop(self) -> None:
        """Ask the engine to end its ranks and itself; what has not ended in time is killed with the zygote."""
        if self._client is not None:
            await self._client.shut_down(self._limits.stop_timeout_s + STOP_SLACK_S)
        self._connection.close()

    def _how_ended(self) -> str | None:
        """How the engine process ended, with its last words; None while it runs."""
        if self._ended is None or not self._ended.done():
            return None
        exited = self._ended.result()
        return f"{describe_exit(exited)}\n{exited.log}".strip()

    async def _explain(self) -> str:
        """The same, given a moment to be told; empty when nothing is known."""
        if self._ended is not None:
            await asyncio.wait([self._ended], timeout=EXIT_WAIT_S)
        how = self._how_ended()
        return "" if how is None else f"the engine process {how}"
