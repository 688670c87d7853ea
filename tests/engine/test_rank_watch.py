"""Who hangs, and since when, from what the ranks' heartbeats say. Time is a number here."""

from shoal.engine.rank_messages import Heartbeat
from shoal.engine.rank_watch import RankWatch, patience_s


class Ranks:
    """Heartbeats of imaginary ranks, a second apart."""

    def __init__(self, size: int, limit_s: float = 5.0) -> None:
        self.now = 100.0
        self.watch = RankWatch([f"host{rank}" for rank in range(size)], limit_s, lambda: self.now)
        self.counts = [0] * size

    def second(self, *doing: str, moving: tuple[int, ...] = (), silent: tuple[int, ...] = (), waiting: bool = True):
        """Let a second pass; doing: per rank, "" in a step, otherwise the collective; whether something hangs then."""
        self.now += 1.0
        for rank, waits in enumerate(doing):
            self.counts[rank] += rank in moving
            if rank not in silent:
                beat = Heartbeat(
                    rank=rank, doing="in step 3", for_s=1.0, step=True, count=self.counts[rank], waits=waits
                )
                self.watch.hear(rank, beat)
        return self.watch.hang(waiting)


def test_a_step_that_advances_is_slow_and_does_not_hang() -> None:
    ranks = Ranks(2)
    for _ in range(60):
        assert ranks.second("", "all_reduce of group tensor", moving=(0,)) is None


def test_the_rank_outside_of_the_collective_is_to_blame() -> None:
    ranks = Ranks(3)
    found = [ranks.second("all_reduce", "", "all_reduce", moving=()) for _ in range(8)]
    assert found[:5] == [None] * 5
    hang = next(hang for hang in found if hang is not None)
    assert (hang.rank, hang.silent) == (1, False) and "no progress for 5 s (launcher.hang_timeout_s)" in hang.cause


def test_when_all_wait_nobody_is_to_blame_and_all_are_described() -> None:
    ranks = Ranks(2)
    hang = [ranks.second("recv in group pipeline from rank 1", "recv in group pipeline from rank 0") for _ in range(8)][
        -1
    ]
    assert hang is not None and hang.rank is None
    assert "rank 0: in step 3, in recv in group pipeline from rank 1 since" in ranks.watch.doing()


def test_a_silent_rank_is_to_blame_also_when_there_is_nothing_to_do() -> None:
    ranks = Ranks(2)
    found = [ranks.second("", "", silent=(1,), waiting=False) for _ in range(8)]
    hang = next(hang for hang in found if hang is not None)
    assert (hang.rank, hang.silent) == (1, True) and "gave no sign of life for 5 s" in hang.cause


def test_a_pause_of_the_engine_itself_does_not_count() -> None:
    ranks = Ranks(2)
    assert ranks.second("", "") is None
    ranks.now += 3600.0
    assert ranks.second("", "", silent=(0, 1)) is None
    assert ranks.second("", "", moving=(0, 1)) is None


def test_idle_ranks_and_a_result_in_between_are_no_standstill() -> None:
    ranks = Ranks(1)
    for _ in range(20):
        assert ranks.second("", waiting=False) is None
    for _ in range(20):
        assert ranks.second("") is None
        ranks.watch.step_done()


def test_a_hang_is_judged_before_its_deadline_and_after_the_next_beat() -> None:
    assert [patience_s(limit) for limit in (1.5, 2.5, 10.0, 600.0)] == [1.5, 2.2, 8.0, 598.0]
