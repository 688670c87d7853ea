"""RankLinks: the engine's side of the control channels to all ranks of a replica; finds the first cause when one of
them fails.

When a rank dies, the others report failed collectives, often before the kernel's word of the death has come. So the
first sign of trouble starts a short hearing: everything that arrives is collected, a cause is chosen (a rank's own
error or a signal before mere consequences), the group is killed, and one ExecutorFailed tells it.
"""

import logging
import select
import selectors
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import NamedTuple, NoReturn

import msgspec

from shoal.engine.executor import ExecutorFailed
from shoal.engine.rank_messages import FromRank, Heartbeat, LogLine, RankFailure, Stop
from shoal.engine.rank_watch import LOOK_INTERVAL_S, RankWatch
from shoal.parallel.control import Channel, ControlError, PeerGone, encode_frame

ELSEWHERE_S = 0.4
HEARING_S = 1.0
DUMP_WAIT_S = 5.0  # a busy host takes its time
LOG_LINES = 30

logger = logging.getLogger("shoal.ranks")


class RankRefused(ExecutorFailed):
    """A rank says that the settings or the checkpoint do not allow a start: the user's to mend, not a malfunction."""


class RankExit(NamedTuple):
    """A rank's process ended. how: in words. log: the end of what it wrote. by_signal: something killed it."""

    rank: int
    how: str
    log: str
    by_signal: bool


class Supervisor(ABC):
    """Knows the processes of the ranks on this host."""

    @abstractmethod
    def fileno(self) -> int | None:
        """Readable when `ended` has news; None when no rank is supervised here."""

    def knows(self, rank: int) -> bool:
        """Whether `ended` will tell of this rank."""
        return False

    @abstractmethod
    def ended(self) -> list[RankExit]:
        """The ranks that ended since the last call. Raises ControlError when nothing can be known any more."""

    @abstractmethod
    def wait(self, timeout_s: float) -> None:
        """Wait until all have ended."""

    @abstractmethod
    def kill(self) -> list[RankExit]:
        """Kill all that still run, and wait until they are gone; how they ended."""

    def write_stacks(self, ranks: Collection[int], timeout_s: float) -> bool:
        """Have ranks, also stopped ones, write the Python stacks of their threads to their logs, and wait until they
        have; False when that cannot be asked of them here.
        """
        return False


def _end_of(log: str) -> str:
    """The last lines of a log, for people."""
    return "\n".join(log.strip().splitlines()[-LOG_LINES:])


def end_with_stacks(supervisor: Supervisor, ranks: Collection[int]) -> str:
    """End the group; what ranks have to say of where they are, in lines, when that can be asked of them here."""
    if not supervisor.write_stacks(ranks, DUMP_WAIT_S):
        return ""
    logs = {exited.rank: exited.log for exited in supervisor.kill() if exited.rank in ranks}
    return "".join(f"\nrank {rank} wrote:\n{_end_of(logs[rank])}" for rank in sorted(logs) if logs[rank].strip())


def first_cause(failures: list[RankFailure], exits: list[RankExit], hung_up: dict[int, str]) -> ExecutorFailed:
    """The cause of a group's failure, from all that was heard of it in the order it came (something was).

    A signal from outside first, then a rank's own error, then one that ended without a word; collectives that failed
    and lost connections are consequences, unless there is nothing else.
    """
    told = {failure.rank for failure in failures}
    for exited in exits:
        if exited.by_signal:
            return ExecutorFailed(exited.how, exited.rank, _end_of(exited.log))
    for failure in failures:
        if failure.kind == "refusal":
            return RankRefused(failure.cause, failure.rank)
        if failure.kind == "error":
            return ExecutorFailed(failure.cause, failure.rank, failure.detail.strip())
    for exited in exits:
        if exited.rank not in told:
            return ExecutorFailed(exited.how, exited.rank, _end_of(exited.log))
    for failure in failures:
        return ExecutorFailed(failure.cause, failure.rank, failure.detail.strip())
    rank, how = next(iter(hung_up.items()))
    return ExecutorFailed(how, rank)


class RankLinks:
    """Channels to the ranks, indexed by replica rank, and their supervisor. Used by one thread."""

    def __init__(
        self,
        channels: "list[Channel[FromRank]]",
        supervisor: Supervisor,
        hosts: Sequence[str] | None = None,
        hang_timeout_s: float = 10.0,
    ) -> None:
        """hosts: of the ranks, in order, when they are known. hang_timeout_s: `patience_s` of launcher's."""
        self.size = len(channels)
        self.watch = RankWatch(hosts or [""] * self.size, hang_timeout_s)
        self._channels, self._supervisor = channels, supervisor
        self._selector = selectors.DefaultSelector()
        for rank, channel in enumerate(channels):
            self._selector.register(channel, selectors.EVENT_READ, rank)
        if supervisor.fileno() is not None:
            self._selector.register(supervisor, selectors.EVENT_READ, None)  # type: ignore[arg-type]
        self._hung_up: dict[int, str] = {}
        self._early: list[tuple[int, FromRank]] = []  # said while a broadcast was on its way
        self._failure: ExecutorFailed | None = None
        self._closed = False

    def fileno(self) -> int:
        """For another selector: readable when any rank has said something."""
        return self._selector.fileno()

    def broadcast(self, message: msgspec.Struct, timeout_s: float) -> None:
        """Send a message to every rank, encoded once. Raises ExecutorFailed.

        What ranks say meanwhile is kept for `receive`: one that has a long result to tell takes nothing before that.
        """
        if self._failure is not None:
            raise self._failure
        frame, deadline = encode_frame(message), time.monotonic() + timeout_s
        unsent = [rank for rank in range(self.size) if not self._push(rank, frame)]
        while unsent:
            left = deadline - time.monotonic()
            if left <= 0:
                self.fail(
                    f"did not take a {type(message).__name__} within {timeout_s:g} s", unsent[0], self.watch.doing()
                )
            poller = select.poll()
            poller.register(self._selector.fileno(), select.POLLIN)
            for rank in unsent:
                poller.register(self._channels[rank], select.POLLOUT)
            poller.poll(min(left, LOOK_INTERVAL_S) * 1000)
            self._early += self._listen(0.0)
            self.check_hang(waiting=False)
            unsent = [rank for rank in unsent if not self._push(rank, b"")]

    def _push(self, rank: int, frame: bytes) -> bool:
        """Whether the rank took all of it, and of what came before."""
        try:
            return self._channels[rank].push_frame(frame)
        except ControlError as error:
            self._hung_up[rank] = str(error)
            self._hear()

    def try_broadcast(self, message: msgspec.Struct) -> None:
        """Send a message to every rank that takes it at once."""
        for channel in self._channels:
            try:
                channel.try_send(message)
            except ControlError:
                pass  # its end of file is what tells

    def receive(self, timeout_s: float) -> list[tuple[int, FromRank]]:
        """What ranks said, waiting at most timeout_s for the first; heartbeats and log lines are taken care of.

        Raises ExecutorFailed when a rank has failed or ended; the group is dead then.
        """
        if self._failure is not None:
            raise self._failure
        early, self._early = self._early, []
        return early + self._listen(0.0 if early else timeout_s)

    def _listen(self, timeout_s: float) -> list[tuple[int, FromRank]]:
        messages, failures, exits = self._collect(timeout_s)
        if failures or exits or self._hung_up:
            self._hear(failures, exits)
        return messages

    def _collect(self, timeout_s: float) -> tuple[list[tuple[int, FromRank]], list[RankFailure], list[RankExit]]:
        messages: list[tuple[int, FromRank]] = []
        failures: list[RankFailure] = []
        exits: list[RankExit] = []
        for key, _ in self._selector.select(timeout_s):
            rank = key.data
            try:
                if rank is None:
                    exits += self._supervisor.ended()
                    continue
                for message in self._channels[rank].poll():
                    match message:
                        case Heartbeat():
                            self.watch.hear(rank, message)
                        case LogLine():
                            logger.log(message.level, "rank %d: %s", rank, message.text)
                        case RankFailure():
                            failures.append(message)
                        case _:
                            messages.append((rank, message))
            except ControlError as error:
                self._selector.unregister(key.fileobj)
                if rank is None:
                    raise self._end(ExecutorFailed(f"the ranks' supervisor is gone: {error}")) from None
                self._hung_up[rank] = "closed its connection" if isinstance(error, PeerGone) else str(error)
        return messages, failures, exits

    def _hear(self, failures: list[RankFailure] | None = None, exits: list[RankExit] | None = None) -> NoReturn:
        """Collect what can be known about a failure, then raise it."""
        failures, exits = list(failures or []), list(exits or [])
        began = time.monotonic()
        while not self._known(failures, exits) and (left := began + self._hearing_s() - time.monotonic()) > 0:
            _, more_failures, more_exits = self._collect(left)
            failures += more_failures
            exits += more_exits
        raise self._end(first_cause(failures, exits, self._hung_up))

    def _hearing_s(self) -> float:
        """How long to wait for a cause. Ranks elsewhere have said all that is heard here before they hung up, and how
        they ended their crew will tell.
        """
        elsewhere = any(not self._supervisor.knows(rank) for rank in self._hung_up)
        return ELSEWHERE_S if elsewhere else HEARING_S

    @staticmethod
    def _known(failures: list[RankFailure], exits: list[RankExit]) -> bool:
        """Whether there is a cause that needs no other."""
        return any(failure.kind != "consequence" for failure in failures) or any(exited.by_signal for exited in exits)

    def fail(self, cause: str, rank: int | None, detail: str = "") -> NoReturn:
        """Give the group up for a reason of the engine's own: kill it and raise ExecutorFailed."""
        raise self._end(ExecutorFailed(cause, rank, detail))

    def _end(self, failure: ExecutorFailed) -> ExecutorFailed:
        """Kill the group for this reason, unless there was one before; returns the first."""
        if self._failure is None:
            self._failure = failure = self._on_host(failure)
            self._supervisor.kill()
            self.close()
        return self._failure

    def _on_host(self, failure: ExecutorFailed) -> ExecutorFailed:
        """The same with the rank's host, where it is known."""
        host = "" if failure.rank is None else self.watch.hosts[failure.rank]
        if not host or isinstance(failure, RankRefused):
            return failure
        return ExecutorFailed(f"{failure.cause} on {host}", failure.rank, failure.detail)

    def check_hang(self, waiting: bool) -> None:
        """Give the group up when a rank, or all together, hang. waiting: a step's result is due. Raises ExecutorFailed
        with what each rank was doing, and the stack of the one to blame where it can be had.
        """
        hang = self.watch.hang(waiting)
        if hang is None:
            return
        detail = self.watch.doing()
        if hang.rank is not None and hang.silent:
            detail += end_with_stacks(self._supervisor, [hang.rank])
        self.fail(hang.cause, hang.rank, detail)

    def fail_late(self, cause: str) -> NoReturn:
        """Give the group up because a step took too long: the rank that has been silent meanwhile, if one has, tells
        where it is.
        """
        rank, detail = self.watch.stalest(), self.watch.doing()
        self.fail(cause, rank, detail if rank is None else detail + end_with_stacks(self._supervisor, [rank]))

    def stop(self, timeout_s: float) -> None:
        """Ask every rank to end, kill those that have not after timeout_s. Idempotent."""
        if self._closed:
            return
        self.try_broadcast(Stop())
        deadline = time.monotonic() + timeout_s
        waiting = set(range(self.size)) - set(self._hung_up)
        while waiting and (left := deadline - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                try:
                    if key.data is None:
                        self._supervisor.ended()
                    else:
                        self._channels[key.data].poll()
                except ControlError:
                    self._selector.unregister(key.fileobj)
                    waiting.discard(key.data)
        self._supervisor.wait(max(0.0, deadline - time.monotonic()))
        self._supervisor.kill()
        self.close()

    def close(self) -> None:
        """Close the channels: ranks that live elsewhere end when they notice. Idempotent."""
        if not self._closed:
            self._closed = True
            self._selector.close()
            for channel in self._channels:
                channel.close()
