"""The first cause of a group's failure, from whatever its ranks and the kernel said."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Literal

import pytest

from shoal.engine.executor import ExecutorFailed
from shoal.engine.rank_links import RankExit, RankLinks, RankRefused, Supervisor, first_cause
from shoal.engine.rank_messages import FROM_RANK, TO_RANK, Begin, CacheReady, Loaded, LogLine, RankFailure
from shoal.parallel.control import Channel

LONG = "x" * (8 << 20)  # more than sockets hold


def failure(rank: int, kind: Literal["error", "consequence", "refusal"] = "error") -> RankFailure:
    return RankFailure(rank=rank, cause=f"cause {rank}", detail=f"detail {rank}", kind=kind)


def ended(rank: int, by_signal: bool = False) -> RankExit:
    return RankExit(rank, "killed by SIGKILL" if by_signal else "ended with exit code 1", f"log {rank}", by_signal)


def test_a_signal_explains_the_collectives_that_failed_before_it_was_known() -> None:
    found = first_cause([failure(0, "consequence"), failure(1, "consequence")], [ended(2, True)], {2: "closed"})
    assert str(found) == "rank 2: killed by SIGKILL\nlog 2"


def test_a_ranks_own_error_goes_before_consequences_and_exits() -> None:
    found = first_cause([failure(3, "consequence"), failure(1)], [ended(3), ended(1)], {})
    assert (found.rank, found.cause, found.detail) == (1, "cause 1", "detail 1")


def test_an_exit_without_a_word_explains_a_failed_collective() -> None:
    found = first_cause([failure(0, "consequence")], [ended(0), ended(2)], {0: "closed", 2: "closed"})
    assert (found.rank, found.cause) == (2, "ended with exit code 1")


def test_a_consequence_is_told_when_there_is_nothing_else() -> None:
    assert first_cause([failure(2, "consequence")], [ended(2)], {}).rank == 2
    assert str(first_cause([], [], {1: "closed its connection"})) == "rank 1: closed its connection"


def test_a_refusal_is_told_apart_and_without_a_traceback() -> None:
    found = first_cause([failure(1, "refusal")], [], {})
    assert isinstance(found, RankRefused)
    assert str(found) == "rank 1: cause 1"


def test_long_logs_are_cut_to_their_end() -> None:
    long = RankExit(0, "ended with exit code 1", "\n".join(f"line {n}" for n in range(100)), False)
    assert first_cause([], [long], {}).detail.splitlines()[0] == "line 70"


class Nobody(Supervisor):
    """No rank is supervised."""

    def fileno(self) -> int | None:
        return None

    def ended(self) -> list[RankExit]:
        return []

    def wait(self, timeout_s: float) -> None:
        pass

    def kill(self) -> list[RankExit]:
        return []


@contextlib.contextmanager
def linked(*ranks: "Callable[[Channel], object]") -> Iterator[RankLinks]:
    """Links to ranks that are threads."""
    pairs = [socket.socketpair() for _ in ranks]
    links = RankLinks([Channel(ours, FROM_RANK, f"rank {rank}") for rank, (ours, _) in enumerate(pairs)], Nobody())
    threads = [
        threading.Thread(target=rank, args=[Channel(theirs, TO_RANK, "the engine")], daemon=True)
        for rank, (_, theirs) in zip(ranks, pairs)
    ]
    for thread in threads:
        thread.start()
    try:
        yield links
    finally:
        links.close()
        for thread, (_, theirs) in zip(threads, pairs):
            thread.join(10)
            theirs.close()


def test_a_rank_may_have_much_to_say_before_it_takes_a_long_message() -> None:
    taken: list[object] = []

    def rank(channel: Channel) -> None:
        channel.send(LogLine(rank=0, level=10, text="before"), 30)
        channel.send(Loaded(rank=0), 30)
        channel.send(LogLine(rank=0, level=10, text=LONG), 30)
        taken.append(channel.receive(30))
        channel.send(CacheReady(rank=0), 30)

    with linked(rank) as links:
        links.broadcast(Begin(rendezvous=LONG), 30)
        told = links.receive(30)
        while len(told) < 2:
            told += links.receive(30)
    assert told == [(0, Loaded(rank=0)), (0, CacheReady(rank=0))]
    assert taken == [Begin(rendezvous=LONG)]


def test_a_rank_that_takes_nothing_in_time_is_named() -> None:
    done = threading.Event()
    with (
        linked(lambda channel: channel.receive(30), lambda _: done.wait(30)) as links,
        pytest.raises(ExecutorFailed, match=r"rank 1: did not take a Begin within 0.2 s"),
    ):
        try:
            links.broadcast(Begin(rendezvous=LONG), 0.2)
        finally:
            done.set()
