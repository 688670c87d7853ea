"""An engine's own process: brings up the ranks of one replica, then serves its front end. No torch.

Forked from a zygote, with a connection to it for forking and watching the ranks. Nothing outlives it: the zygote kills
its ranks, and ranks on other hosts notice their channel. It ends when the front end says so, or when a rank has failed,
or when the front end is gone: at once, or when no other has taken over within the bootstrap's grace_s.
"""

import logging
import os
import platform
import signal
import time
import traceback

from shoal.engine.engine_core import EngineCore
from shoal.engine.executor import ExecutorFailed
from shoal.engine.messages import Failure, Message
from shoal.engine.rank_watch import RankWatch
from shoal.launcher.bootstrap import ENGINE_BOOTSTRAP, EngineBootstrap
from shoal.launcher.engine_holdout import hold_out
from shoal.launcher.engine_server import EngineServer, FrontGone
from shoal.launcher.processes import ZygoteConnection
from shoal.launcher.rank_group import RankGroup
from shoal.launcher.replica_messages import (
    TO_ENGINE,
    Beat,
    Listening,
    LogText,
    ProcessPlace,
    RankHealth,
    Ready,
    Refused,
    Starting,
    ToEngine,
)
from shoal.parallel.control import Channel, ControlError
from shoal.parallel.control_connect import Listener, connect
from shoal.parallel.control_heartbeat import Heartbeat

CONNECT_TIMEOUT_S = 30.0
TELL_TIMEOUT_S = 10.0
NEWS_INTERVAL_S = 0.1
MAX_LOG_CHARS = 4096


def main(payload: bytes, supervisor_fd: int | None) -> None:
    """Entry of a forked engine."""
    assert supervisor_fd is not None, "an engine is forked with a connection of its own"
    raise SystemExit(run_engine(ENGINE_BOOTSTRAP.decode(payload), ZygoteConnection.from_fd(supervisor_fd)))


def run_engine(bootstrap: EngineBootstrap, zygote: ZygoteConnection) -> int:
    """Be the engine of a replica to its end; 0 when the front end asked for the end, 1 otherwise."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the front end decides
    vital = _Vital()
    front = _Front(bootstrap, vital)
    handler = _ToFrontEnd(front)
    logging.basicConfig(level=bootstrap.model.config.runtime.log_level.upper(), handlers=[handler], force=True)
    try:
        return _bring_up_and_serve(bootstrap, zygote, front, vital)
    except (FrontGone, ControlError):
        return 1
    except Exception as error:  # noqa: BLE001 - told to the front end
        _tell_last(front.channel, _last_word(error))
        return 1
    finally:
        front.close()
        zygote.close()


class _Front:
    """The link to the front end: a channel and the heartbeat on it; after a front end's death, to the next one."""

    def __init__(self, bootstrap: EngineBootstrap, vital: "_Vital") -> None:
        self._bootstrap, self._vital = bootstrap, vital
        self.connect(bootstrap.front_address)

    def connect(self, address: str) -> None:
        """Raises ControlError."""
        self.channel = connect(address, self._bootstrap.key, TO_ENGINE, "the front end", CONNECT_TIMEOUT_S)
        self._heart = Heartbeat(self.channel, self._vital.beat, self._gone)
        self._heart.start()

    def _gone(self) -> None:
        """Nobody wants a long step's result any more, unless another front end may come."""
        if self._bootstrap.grace_s <= 0:
            os._exit(1)

    def close(self) -> None:
        """Hang up. Idempotent."""
        self._heart.stop()
        self.channel.close()


class _Vital:
    """What the heartbeat thread tells of the engine: of its ranks too, once they are there."""

    def __init__(self) -> None:
        self.core: EngineCore | None = None
        self.watch: RankWatch | None = None

    def beat(self) -> Beat:
        """The message."""
        core, watch = self.core, self.watch
        if core is None or watch is None:
            return Beat()
        described = zip(watch.hosts, watch.describe(), strict=True)
        ranks = [RankHealth(rank, host, *said) for rank, (host, said) in enumerate(described)]
        return Beat(busy=core.has_work, step=core.scheduler.num_steps - 1, ranks=ranks)


def _bring_up_and_serve(bootstrap: EngineBootstrap, zygote: ZygoteConnection, front: _Front, vital: _Vital) -> int:
    """The engine's life. Returns its exit code."""
    config = bootstrap.model.config
    listener = Listener.unix() if bootstrap.listen_host is None else Listener.tcp(bootstrap.listen_host)
    front.channel.send(Listening(address=listener.address), TELL_TIMEOUT_S)
    try:
        group = RankGroup(bootstrap, zygote, listener, _News(front.channel))
        executor, report = group.executor()
    finally:
        listener.close()
    try:
        core = vital.core = EngineCore(config, executor)
        vital.watch = executor.watch
        tells = config.launcher.routing == "prefix" and config.cache.enable_prefix_caching
        engine = ProcessPlace(platform.node(), os.getpid())
        ready = Ready(capacity=executor.capacity, report=report, engine=engine, ranks=group.places)
        while True:
            if tells:
                core.tell_cache()
            server = EngineServer(core, front.channel, executor)
            try:
                front.channel.send(ready, TELL_TIMEOUT_S)
                return server.run()
            except (FrontGone, ControlError):
                if bootstrap.grace_s <= 0:
                    raise
            front.close()
            address = hold_out(core, server.live, bootstrap.key, bootstrap.grace_s)
            if address is None:
                return 1
            front.connect(address)
    finally:
        executor.stop()


class _News:
    """Passes progress on, not too often, and notices a front end that gave up."""

    def __init__(self, front: "Channel[ToEngine]") -> None:
        self._front = front
        self._last, self._next = Starting(doing=""), 0.0

    def __call__(self, news: Starting) -> None:
        if self._front.poll():
            raise FrontGone("the front end does not wait for the start any more")
        now = time.monotonic()
        if news != self._last and (now >= self._next or news.doing != self._last.doing or news.done == news.total):
            self._last, self._next = news, now + NEWS_INTERVAL_S
            self._front.try_send(news)


def _last_word(error: Exception) -> Message:
    """What the front end is told when the engine ends by an exception."""
    if isinstance(error, ExecutorFailed):
        return Failure(rank=error.rank, cause=error.cause, detail=error.detail)
    if isinstance(error, ValueError):
        return Refused(text=str(error))
    return Failure(
        rank=None, cause=f"the engine failed: {type(error).__name__}: {error}", detail=traceback.format_exc()
    )


def _tell_last(front: "Channel[ToEngine]", message: Message) -> None:
    print(message, flush=True)
    try:
        front.send(message, TELL_TIMEOUT_S)
    except ControlError:
        pass  # it is gone; the log has it


class _ToFrontEnd(logging.Handler):
    """Sends log records, the ranks' among them, to the front end, as many as it takes."""

    def __init__(self, front: _Front) -> None:
        super().__init__()
        self._front = front

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        try:
            self._front.channel.try_send(LogText(level=record.levelno, text=self.format(record)[:MAX_LOG_CHARS]))
        except ControlError:
            pass  # the loop will notice
