"""The first cause of a group's failure, from whatever its ranks and the kernel said."""

from typing import Literal

from shoal.engine.rank_links import RankExit, RankRefused, first_cause
from shoal.engine.rank_messages import RankFailure


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
