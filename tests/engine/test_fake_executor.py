"""FakeExecutor: refuses every kind of wrong plan by name, keeps virtual time, fails when told to."""

from typing import Any

import msgspec
import pytest

from shoal.configs.sampling import SamplingParams
from shoal.engine.clock import VirtualClock
from shoal.engine.executor import ExecutorFailed
from shoal.engine.fake_executor import FakeExecutor, Fault, StepLatency
from shoal.engine.fake_model import FakeModel
from shoal.engine.fake_ranks import PlanError
from shoal.engine.messages import NewSequence, PlanRow, StepPlan, TokenRef
from tests.engine.harness import VOCAB_SIZE, make_capacity

GREEDY = SamplingParams(temperature=0.0, seed=0)


def new(name: str, tokens: list[int], *blocks: list[int], sampling: SamplingParams = GREEDY) -> NewSequence:
    return NewSequence(name, tokens, len(tokens), sampling, 0, [], [], list(blocks) or [[]])


def plan(step: int, *rows: PlanRow, **fields: Any) -> StepPlan:
    return StepPlan(epoch=0, step=step, rows=list(rows), **fields)


def started(**capacity: Any) -> tuple[FakeExecutor, int]:
    """An executor with request "a": 6 tokens in the blocks 2 and 5, and the token it sampled."""
    executor = FakeExecutor(make_capacity(num_blocks=8, **capacity))
    row = PlanRow("a", 0, 6, [], [[2, 5]], [5], True)
    executor.launch(plan(0, row, new_sequences=[new("a", [1, 2, 3, 4, 5, 6])]))
    return executor, executor.result(0, 1.0).rows[0].token_ids[0]


def test_tokens_are_the_models() -> None:
    executor, token = started()
    assert [token] == FakeModel(VOCAB_SIZE).generate([1, 2, 3, 4, 5, 6], GREEDY, 1)
    executor.launch(plan(1, PlanRow("a", 6, 1, [token], [[]], [5], True)))
    following = executor.result(1, 1.0).rows[0].token_ids
    assert [token, *following] == FakeModel(VOCAB_SIZE).generate([1, 2, 3, 4, 5, 6], GREEDY, 2)


GOOD = PlanRow("a", 6, 1, [7], [[]], [5], True)
BAD_ROWS = [
    ({"request_id": "x"}, "was not announced"),
    ({"num_computed_tokens": 5, "num_tokens": 2}, "starts at position 5, computed are 6"),
    ({"num_tokens": 2}, "computes 6 to 8 of 7 tokens"),
    ({"num_tokens": 0}, "computes 6 to 6"),
    ({"sample": False}, "has sample=False"),
    ({"last_block_ids": [2]}, "the plan ends it with 2"),
    ({"token_ids": [7, 8, 9], "num_tokens": 3}, "for 9 tokens"),
    ({"new_block_ids": [[8]], "last_block_ids": [8]}, "names blocks .8. of group 0, which has 8"),
    ({"draft_token_ids": [1]}, "draft tokens"),
    ({"ref": TokenRef(0, 0)}, "not a token of its own in flight"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ROWS)
def test_rows_that_do_not_continue_their_sequence_are_refused(change: dict[str, Any], message: str) -> None:
    executor, _ = started()
    with pytest.raises(PlanError, match=f"step 1, request .*{message}"):
        executor.launch(plan(1, msgspec.structs.replace(GOOD, **change)))


def test_a_block_with_other_content_is_not_read() -> None:
    executor, _ = started()
    row = PlanRow("b", 4, 1, [], [[1]], [1], True)
    with pytest.raises(PlanError, match=r"request b: reads positions 0 to 4 of group 0 in block 2"):
        executor.launch(plan(1, row, new_sequences=[new("b", [1, 2, 3, 9, 5], [2])]))


def test_a_block_with_the_same_content_is_shared() -> None:
    executor, _ = started()
    row = PlanRow("b", 4, 1, [], [[1]], [1], True)
    executor.launch(plan(1, row, new_sequences=[new("b", [1, 2, 3, 4, 9], [2])]))


def test_what_the_same_plan_writes_is_not_readable_yet() -> None:
    executor = FakeExecutor(make_capacity(num_blocks=8))
    rows = [PlanRow("a", 0, 5, [], [[2, 5]], [5], True), PlanRow("b", 4, 1, [], [[1]], [1], True)]
    with pytest.raises(PlanError, match="request b: reads positions 0 to 4"):
        executor.launch(plan(0, *rows, new_sequences=[new("a", [1, 2, 3, 4, 5]), new("b", [1, 2, 3, 4, 9], [2])]))


def test_a_block_that_others_hold_is_not_written() -> None:
    executor, _ = started()
    with pytest.raises(PlanError, match="request b: writes block 5 of group 0, which others hold"):
        executor.launch(plan(1, PlanRow("b", 0, 2, [], [[5]], [5], True), new_sequences=[new("b", [1, 2])]))
    executor, _ = started()
    executor.launch(
        plan(1, PlanRow("b", 0, 2, [], [[5]], [5], True), new_sequences=[new("b", [1, 2])], finished_ids=["a"])
    )


def test_windows_give_their_blocks_free_once_nobody_reads_them() -> None:
    executor, token = started(windows=(2,))
    executor.launch(plan(1, PlanRow("b", 0, 2, [], [[2]], [2], True), new_sequences=[new("b", [1, 2])]))
    executor.result(1, 1.0)
    executor.launch(plan(2, PlanRow("a", 6, 1, [token], [[]], [5], True)))
    with pytest.raises(PlanError, match="request c: writes block 5"):
        executor.result(2, 1.0)
        executor.launch(plan(3, PlanRow("c", 0, 1, [], [[5]], [5], True), new_sequences=[new("c", [1])]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"finished_ids": ["x"]}, "request x: is dropped but not held"),
        ({"new_sequences": [new("a", [1])]}, "request a: is announced twice"),
        ({"new_sequences": [new("b", [1], [1], [1])]}, "wrong number of groups"),
        ({"new_sequences": [new("b", [1], [1, -1])]}, "a hole in its blocks"),
        ({"new_sequences": [new("b", [1], [9])]}, "names blocks"),
        ({"new_sequences": [new("b", [1], sampling=SamplingParams())]}, "has no seed"),
    ],
)
def test_announcements_are_checked(fields: dict[str, Any], message: str) -> None:
    executor, token = started()
    with pytest.raises(PlanError, match=message):
        executor.launch(plan(1, msgspec.structs.replace(GOOD, token_ids=[token]), **fields))


def test_plans_are_counted_and_never_empty() -> None:
    executor, _ = started()
    with pytest.raises(PlanError, match="out of order or empty"):
        executor.launch(plan(2, GOOD))
    with pytest.raises(PlanError, match="out of order or empty"):
        executor.launch(plan(1))
    with pytest.raises(PlanError, match="two rows"):
        executor.launch(plan(1, GOOD, GOOD))


def test_no_more_plans_in_flight_than_agreed() -> None:
    executor, _ = started()
    executor.launch(plan(1, GOOD))
    with pytest.raises(PlanError, match="1 plans in flight"):
        executor.launch(plan(2, msgspec.structs.replace(GOOD, num_computed_tokens=7)))
    with pytest.raises(PlanError, match="out of order"):
        executor.result(0, 1.0)


def test_limits_of_the_scheduler_hold_for_plans() -> None:
    executor = FakeExecutor(make_capacity(), max_num_batched_tokens=2)
    with pytest.raises(PlanError, match="3 tokens, limit 2"):
        executor.launch(plan(0, PlanRow("a", 0, 3, [], [[1]], [1], True), new_sequences=[new("a", [1, 2, 3])]))
    executor = FakeExecutor(make_capacity(), max_num_seqs=1)
    rows = [PlanRow(name, 0, 1, [], [[block]], [block], True) for block, name in enumerate("ab")]
    with pytest.raises(PlanError, match="2 sequences, limit 1"):
        executor.launch(plan(0, *rows, new_sequences=[new("a", [1]), new("b", [1])]))


def test_a_reference_stands_for_a_token_in_flight() -> None:
    executor, token = started(max_in_flight=2)
    executor.launch(plan(1, PlanRow("a", 6, 1, [token], [[]], [5], True)))
    executor.launch(plan(2, PlanRow("a", 7, 1, [], [[]], [5], True, TokenRef(1, 0))))
    got = [executor.result(step, 1.0).rows[0].token_ids[0] for step in (1, 2)]
    assert [token, *got] == FakeModel(VOCAB_SIZE).generate([1, 2, 3, 4, 5, 6], GREEDY, 3)


def test_stages_overlap_plans_on_a_virtual_clock() -> None:
    clock = VirtualClock()
    executor = FakeExecutor(
        make_capacity(max_in_flight=2), clock=clock, latency=StepLatency(base_s=0.8, row_s=0.1, token_s=0.1)
    )
    for step, name in enumerate("ab"):
        row = PlanRow(name, 0, 1, [], [[step]], [step], True)
        executor.launch(plan(step, row, new_sequences=[new(name, [1])]))
    executor.result(0, 5.0)
    assert clock.now == pytest.approx(1.0)
    executor.result(1, 5.0)
    assert clock.now == pytest.approx(1.5)


def test_a_step_slower_than_the_timeout_is_a_failure() -> None:
    clock = VirtualClock()
    executor = FakeExecutor(make_capacity(), clock=clock, latency=StepLatency(base_s=9.0))
    executor.launch(plan(0, PlanRow("a", 0, 1, [], [[0]], [0], True), new_sequences=[new("a", [1])]))
    with pytest.raises(ExecutorFailed, match=r"no result within 2\.0 s"):
        executor.result(0, 2.0)
    assert clock.now == 2.0


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(step=0, at_launch=True, rank=3, cause="killed"), "rank 3: killed"),
        (Fault(step=0, rank=1), "rank 1: ended by a planned fault"),
        (Fault(step=0, hangs=True), "rank 0: step 0 gave no result within 4.0 s"),
    ],
)
def test_planned_faults_happen(fault: Fault, message: str) -> None:
    clock = VirtualClock()
    executor = FakeExecutor(make_capacity(), clock=clock, fault=fault)
    with pytest.raises(ExecutorFailed, match=message):
        executor.launch(plan(0, PlanRow("a", 0, 1, [], [[0]], [0], True), new_sequences=[new("a", [1])]))
        executor.result(0, 4.0)
    assert clock.now == (4.0 if fault.hangs else 0.0)
    if not fault.hangs:
        with pytest.raises(ExecutorFailed, match=message):
            executor.health()


def test_a_stopped_executor_takes_no_plan() -> None:
    executor, _ = started()
    executor.health()
    executor.stop()
    executor.stop()
    with pytest.raises(PlanError, match="stopped: True"):
        executor.launch(plan(1, GOOD))
