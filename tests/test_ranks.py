"""The harness of multi-process tests: results in order, failures carried back, nothing left running."""

import os
import signal

import pytest
import torch

from tests.ranks import RankFailed, Ranks, run_ranks


def echo(ranks: Ranks, value: torch.Tensor) -> dict:
    return {"rank": ranks.rank, "pid": os.getpid(), "value": value * ranks.rank, "threads": torch.get_num_threads()}


def fail_on_one(ranks: Ranks) -> None:
    print(f"hello from {ranks.rank}")
    if ranks.rank == 1:
        raise ValueError("one is odd")
    signal.pause()


def die(ranks: Ranks) -> int:
    if ranks.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return ranks.rank


def test_results_come_back_in_rank_order_with_tensors():
    value = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    answers = run_ranks(3, echo, value)
    assert [a["rank"] for a in answers] == [0, 1, 2]
    assert len({a["pid"] for a in answers}) == 3
    assert all(torch.equal(a["value"], value * r) and a["threads"] == 1 for r, a in enumerate(answers))


def test_a_ranks_traceback_and_output_are_raised_and_the_others_ended():
    with pytest.raises(RankFailed, match="one is odd") as caught:
        run_ranks(2, fail_on_one, grace_s=0.1)
    assert "fail_on_one" in str(caught.value) and "hello from 1" in str(caught.value)


def test_a_job_past_its_time_is_killed_and_named():
    with pytest.raises(RankFailed, match=r"rank 0: had not ended after 0.3 s"):
        run_ranks(1, fail_on_one, timeout_s=0.3)


def test_a_death_fails_the_job_unless_it_was_expected():
    with pytest.raises(RankFailed, match="rank 0: ended without an answer"):
        run_ranks(2, die)
    assert run_ranks(2, die, dying=[0]) == [None, 1]
