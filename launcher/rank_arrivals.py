"""RankArrivals: lets the ranks of a replica in, whoever started them, until all said Hello and are alike. No torch."""

import logging
import selectors
import time
from collections.abc import Callable

from shoal.engine.executor import ExecutorFailed
from shoal.engine.rank_links import Supervisor, first_cause
from shoal.engine.rank_messages import FROM_RANK, FromRank, Hello, LogLine, RankFailure
from shoal.launcher.bootstrap import versions
from shoal.parallel.control import Channel, ControlError
from shoal.parallel.control_connect import HANDSHAKE_TIMEOUT_S, Listener

ACCEPT_TIMEOUT_S = 1.0
LAST_WORDS_S = 1.0

logger = logging.getLogger("shoal.ranks")


class RankArrivals:
    """The channels of the ranks that have come so far."""

    def __init__(self, listener: Listener, key: bytes, size: int, supervisor: Supervisor) -> None:
        self._listener, self._key, self._size, self._supervisor = listener, key, size, supervisor
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        if supervisor.fileno() is not None:
            self._selector.register(supervisor, selectors.EVENT_READ)  # type: ignore[arg-type]
        self._unnamed: set[Channel[FromRank]] = set()
        self._arrived: dict[int, tuple[Channel[FromRank], Hello]] = {}
        self._left_at: float | None = None

    def wait(self, left: Callable[[list[int]], float]) -> list[tuple["Channel[FromRank]", Hello]]:
        """Every rank's channel and Hello, in rank order.

        left: called with the ranks that are missing, returns how long to wait before it is called again, or raises.
        Raises ExecutorFailed when a rank fails or leaves.
        """
        try:
            while len(self._arrived) < self._size:
                missing = [rank for rank in range(self._size) if rank not in self._arrived]
                for key, _ in self._selector.select(left(missing)):
                    self._look(key.fileobj)
                if self._left_at is not None and time.monotonic() > self._left_at + LAST_WORDS_S:
                    raise ExecutorFailed("a rank connected and left without a word")
        except BaseException:
            self.close()
            raise
        self._selector.close()
        return [self._arrived[rank] for rank in range(self._size)]

    def close(self) -> None:
        """Hang up on all."""
        self._selector.close()
        for channel in [*self._unnamed, *(channel for channel, _ in self._arrived.values())]:
            channel.close()

    def _look(self, source: object) -> None:
        if source is self._listener:
            self._accept()
        elif isinstance(source, Channel):
            self._read(source)
        else:
            exits = self._supervisor.ended()
            if exits:
                raise first_cause([], exits, {})

    def _accept(self) -> None:
        """Let one in. Strangers are turned away by the listener; that is no error of the start."""
        try:
            channel = self._listener.accept(self._key, FROM_RANK, "a rank", ACCEPT_TIMEOUT_S, HANDSHAKE_TIMEOUT_S)
        except ControlError:
            return
        self._unnamed.add(channel)
        self._selector.register(channel, selectors.EVENT_READ)

    def _read(self, channel: "Channel[FromRank]") -> None:
        """What a rank says before anything is asked of it."""
        try:
            messages = channel.poll()
        except ControlError:
            self._selector.unregister(channel)
            self._left_at = time.monotonic()  # how it ended is about to be known, if it is a child of this host
            return
        for message in messages:
            match message:
                case Hello():
                    self._name(channel, message)
                case LogLine():
                    logger.log(message.level, "rank %d: %s", message.rank, message.text)
                case RankFailure():
                    raise first_cause([message], [], {})
                case _:
                    pass  # a heartbeat

    def _name(self, channel: "Channel[FromRank]", hello: Hello) -> None:
        if not 0 <= hello.rank < self._size or hello.rank in self._arrived:
            raise ExecutorFailed(
                f"introduced itself, but the replica has ranks 0 to {self._size - 1}, each once", hello.rank
            )
        channel.peer = f"rank {hello.rank}"
        self._unnamed.discard(channel)
        self._arrived[hello.rank] = (channel, hello)


def check_alike(hellos: list[Hello], config_fingerprint: str) -> None:
    """Raise ExecutorFailed when a rank runs something else than it should. hellos: in rank order."""
    expected = {
        "runs other versions": ("versions", versions()),
        "was given other settings or another model": ("config", config_fingerprint),
        "has other C kernels": ("native", hellos[0].native),
    }
    for hello in hellos:
        for what, (field, value) in expected.items():
            got = getattr(hello, field)
            if got != value:
                raise ExecutorFailed(
                    f"{what} than its engine: {got or 'none'} on {hello.host}, expected {value or 'none'}; "
                    "install the same on every host and start all with the same command",
                    hello.rank,
                )
