"""Scheduler: what a plan holds, in which order, and who gives way."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest

from shoal.configs.schema import SchedulerConfig
from shoal.engine.clock import VirtualClock
from shoal.engine.executor import Capacity, ExecutorFailed
from shoal.engine.fake_executor import FakeExecutor, StepLatency
from shoal.engine.messages import OutputDelta, RowResult, StepPlan, StepResult, TokenRef
from shoal.engine.scheduler import Scheduler
from shoal.engine.sequence import Sequence
from tests.engine.harness import make_capacity, make_core, make_request, run


class Bench:
    """A scheduler with its executor, stepped by hand."""

    def __init__(self, capacity: Capacity | None = None, caching: bool = True, **config: Any) -> None:
        self.capacity = capacity or make_capacity()
        limits = SchedulerConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 32, **config})
        self.scheduler = Scheduler(limits, self.capacity, enable_prefix_caching=caching)
        self.executor = FakeExecutor(self.capacity)
        self.count = 0

    def add(self, name: str, prompt: list[int], max_tokens: int = 8, **fields: Any) -> Sequence:
        request = make_request(name, prompt, max_tokens, **fields)
        seq = Sequence(request, request.sampling, self.capacity.max_model_len, self.count)
        if seq.sampling.seed is None:
            seq.sampling = make_request(name, prompt, max_tokens, seed=0, **fields).sampling
        self.count += 1
        self.scheduler.add(seq)
        return seq

    def launch(self) -> StepPlan:
        plan = self.scheduler.schedule()
        assert plan is not None
        self.executor.launch(plan)
        self.scheduler.check_integrity()
        return plan

    def take(self) -> list[OutputDelta]:
        handle = self.scheduler.launched[0].plan.step
        deltas = self.scheduler.update(self.executor.result(handle, 1.0), 0.01)
        self.scheduler.check_integrity()
        return deltas

    def step(self) -> StepPlan:
        plan = self.launch()
        self.take()
        return plan

    def admit_all(self) -> None:
        """Admission is not what is tested."""
        self.scheduler.admission.fits = lambda running, candidate, hit: True  # type: ignore[method-assign]


def shape(plan: StepPlan) -> list[tuple[str, int, int]]:
    return [(row.request_id, row.num_computed_tokens, row.num_tokens) for row in plan.rows]


def test_a_step_mixes_decode_rows_then_chunks_then_new_prompts() -> None:
    bench = Bench(max_num_batched_tokens=10)
    bench.add("a", [1, 2])
    bench.step()
    bench.add("b", list(range(12)))
    assert shape(bench.step()) == [("a", 2, 1), ("b", 0, 9)]
    bench.add("c", [3, 3, 3])
    plan = bench.step()
    assert shape(plan) == [("a", 3, 1), ("b", 9, 3), ("c", 0, 3)]
    assert [row.sample for row in plan.rows] == [True, True, True]
    assert [len(row.token_ids) for row in plan.rows] == [1, 0, 0], "sampled tokens are told once"


def test_a_plan_knows_what_it_reads() -> None:
    bench = Bench(max_num_batched_tokens=6)
    for name, prompt in (("a", [1, 2]), ("b", [3, 4, 5])):
        bench.add(name, prompt)
    bench.step()
    bench.add("c", [7] * 9)
    bench.launch()
    load = bench.scheduler.launched[-1].load
    assert (load.decode_rows, load.prefill_tokens) == (2, 4)
    assert load.attended == 3 + 4 + (1 + 2 + 3 + 4), "every token reads itself and what is before it"


def test_only_the_last_chunk_of_a_prompt_samples() -> None:
    bench = Bench(max_num_batched_tokens=4)
    bench.add("a", list(range(10)))
    assert [bench.step().rows[0].sample for _ in range(3)] == [False, False, True]


def test_order_is_priority_then_arrival_then_submission() -> None:
    bench = Bench(max_num_seqs=1)
    for name, fields in {
        "late": {"arrival": 2.0},
        "early": {"arrival": 1.0},
        "urgent": {"arrival": 3.0, "priority": -1},
        "early too": {"arrival": 1.0},
    }.items():
        bench.add(name, [1], 1, **fields)
    assert [bench.step().rows[0].request_id for _ in range(4)] == ["urgent", "early", "early too", "late"]


def test_max_num_seqs_bounds_the_running_set() -> None:
    bench = Bench(max_num_seqs=2)
    for name in "abc":
        bench.add(name, [1])
    assert len(bench.step().rows) == 2


def test_no_more_sequences_run_than_a_step_can_hold() -> None:
    bench = Bench(max_num_batched_tokens=3)
    for index in range(6):
        bench.add(str(index), [index, 1])
    assert bench.scheduler.max_num_running == 3
    for _ in range(10):
        bench.step()


def test_the_last_in_order_gives_way_and_is_computed_again() -> None:
    bench = Bench(make_capacity(num_blocks=5, max_model_len=20), caching=False)
    bench.admit_all()
    bench.add("a", list(range(8)))
    bench.add("b", list(range(20, 27)))
    assert len(bench.step().rows) == 2
    plan = bench.step()
    assert shape(plan) == [("a", 8, 1), ("b", 7, 1)], "5 blocks suffice for 9 and 8 tokens"
    plan = bench.step()
    assert shape(plan) == [("a", 9, 1)] and not plan.preempted_ids, "b waits for a block and keeps its own"
    while not plan.preempted_ids:
        plan = bench.step()
    assert shape(plan) == [("a", 12, 1)] and plan.preempted_ids == ["b"]
    while not plan.new_sequences:
        plan = bench.step()
    assert shape(plan)[-1][0] == "b" and plan.new_sequences[0].token_ids[:7] == list(range(20, 27))
    assert bench.scheduler.num_preemptions == 1


def test_a_preempted_sequence_finds_its_own_blocks_in_the_cache() -> None:
    bench = Bench(make_capacity(num_blocks=5, max_model_len=20))
    bench.admit_all()
    bench.add("a", list(range(8)))
    bench.add("b", list(range(20, 27)))
    bench.step()
    while not (plan := bench.step()).new_sequences:
        pass
    assert bench.scheduler.num_preemptions == 1
    assert plan.rows[-1].num_computed_tokens > 0


def test_priority_is_kept_when_blocks_run_out() -> None:
    bench = Bench(make_capacity(num_blocks=5, max_model_len=20), caching=False)
    bench.admit_all()
    bench.add("later but urgent", list(range(20, 28)), priority=-1)
    bench.add("first", list(range(8)), arrival=-5.0)
    plan = bench.step()
    while not plan.preempted_ids:
        plan = bench.step()
    assert plan.preempted_ids == ["first"]


def test_chunks_of_one_prompt_are_in_flight_at_once() -> None:
    bench = Bench(make_capacity(num_blocks=200, max_model_len=600, max_in_flight=4), max_num_batched_tokens=512)
    bench.add("a", [1] * 240)
    rows = [bench.launch().rows[0] for _ in range(4)]
    assert [(row.num_computed_tokens, row.num_tokens) for row in rows] == [(0, 64), (64, 64), (128, 64), (192, 48)]
    assert bench.scheduler.schedule() is None, "its first token is not known yet"
    assert [len(bench.take()) for _ in range(4)] == [0, 0, 0, 1]


@pytest.mark.parametrize("max_in_flight", [2, 3, 4])
def test_decode_rows_spread_evenly_over_the_plans_in_flight(max_in_flight: int) -> None:
    bench = Bench(
        make_capacity(num_blocks=400, max_in_flight=max_in_flight), max_num_seqs=16, max_num_batched_tokens=64
    )
    for index in range(10):
        bench.add(str(index), [index, 3], 40, ignore_eos=True)
    seen: list[int] = []
    for _ in range(60):
        while len(bench.scheduler.launched) < max_in_flight and (plan := bench.scheduler.schedule()):
            bench.executor.launch(plan)
            seen.append(len(plan.rows))
        bench.take()
    fair = -(-10 // max_in_flight)
    assert all(fair - 2 <= count <= fair for count in seen[-20:]), seen


def test_one_prompt_is_computed_once_for_many_requests() -> None:
    bench = Bench(max_num_batched_tokens=16)
    prompt = list(range(20))
    for index in range(4):
        bench.add(str(index), prompt, seed=index, temperature=1.0)
    assert shape(bench.step()) == [("0", 0, 16)], "the others wait for its blocks"
    assert shape(bench.step()) == [("0", 16, 4), ("1", 16, 4), ("2", 16, 4), ("3", 16, 4)]


def test_those_who_wait_for_a_prefix_do_not_hold_up_others() -> None:
    bench = Bench(max_num_batched_tokens=16)
    bench.add("a", list(range(12)))
    bench.add("same", list(range(12)))
    bench.add("other", [9, 9])
    assert shape(bench.step()) == [("a", 0, 12), ("other", 0, 2)]


def test_the_urgent_do_not_wait_for_a_prefix_of_those_behind_them() -> None:
    bench = Bench(max_num_batched_tokens=16)
    bench.add("a", list(range(24)))
    bench.step()
    bench.add("urgent", list(range(24)), priority=-1)
    bench.add("patient", list(range(24)), priority=1)
    assert shape(bench.step()) == [("a", 16, 8), ("urgent", 16, 8)]
    assert shape(bench.step())[-1] == ("patient", 20, 4)


def test_a_sequence_that_does_not_fit_is_not_overtaken() -> None:
    bench = Bench(make_capacity(num_blocks=8, max_model_len=32))
    bench.add("a", list(range(16)), 2)
    bench.add("big", [7] * 16, 8)
    bench.add("small", [5], 1)
    assert shape(bench.step()) == [("a", 0, 16)]
    assert shape(bench.step()) == [("a", 16, 1)]
    assert shape(bench.step()) == [("big", 0, 16), ("small", 0, 1)]


def test_finished_ids_are_told_with_the_next_plan_and_an_id_may_return() -> None:
    bench = Bench()
    bench.add("a", [1], 1)
    bench.step()
    first = bench.add("b", [1, 2], 5)
    assert bench.step().finished_ids == ["a"]
    bench.scheduler.finish(first)
    bench.add("b", [3, 4], 5)
    plan = bench.step()
    assert plan.finished_ids == ["b"] and plan.new_sequences[0].token_ids == [3, 4]


def test_what_is_in_flight_for_an_aborted_sequence_is_ignored() -> None:
    bench = Bench(make_capacity(num_blocks=200, max_model_len=600, max_in_flight=2), max_num_batched_tokens=512)
    seq = bench.add("a", [1] * 300)
    bench.launch()
    bench.launch()
    bench.scheduler.finish(seq)
    again = bench.add("a", [2] * 10)
    assert bench.take() == [] and bench.take() == []
    bench.step()
    assert again.num_output_tokens == 1


def test_rows_follow_the_token_that_is_being_sampled() -> None:
    bench = Bench(make_capacity(overlap=True))
    seq = bench.add("a", [1, 2], max_tokens=3)
    first, second = bench.launch(), bench.launch()
    assert first.rows[0].ref is None and second.rows[0].ref == TokenRef(first.step, 0)
    assert shape(second) == [("a", 2, 1)] and second.rows[0].sample and second.rows[0].token_ids == []
    bench.take()
    third = bench.launch()
    assert third.rows[0].ref == TokenRef(second.step, 0)
    bench.take()
    assert bench.scheduler.schedule() is None, "the third token is the last one"
    bench.take()
    assert seq.num_output_tokens == 3


def test_the_first_in_order_does_not_wait_for_rows_that_are_always_in_flight() -> None:
    bench = Bench(make_capacity(block_size=4, num_blocks=5, overlap=True))
    bench.admit_all()
    first, second = bench.add("a", [1, 2, 3], max_tokens=14), bench.add("b", [4] * 7, max_tokens=14)
    bench.launch()
    waited = 0
    while first.num_output_tokens < 14 and waited < 4:
        before = first.num_output_tokens
        plan = bench.scheduler.schedule()
        if plan is not None:
            bench.executor.launch(plan)
        bench.take()
        waited = waited + 1 if first.num_output_tokens == before else 0
    assert first.num_output_tokens == 14 and bench.scheduler.num_preemptions > 0
    assert second.num_output_tokens < 14


def test_a_row_that_followed_an_end_token_is_ignored() -> None:
    bench = Bench(make_capacity(overlap=True))
    probe = bench.add("probe", [5], max_tokens=1)
    bench.step()
    seq = bench.add("a", [5], max_tokens=8, stop_token_ids=[probe.tokens[-1]])
    bench.launch()
    follower = bench.launch()
    assert shape(follower) == [("a", 1, 1)]
    assert bench.take()[0].finish_reason == "stop"
    assert bench.take() == [] and seq.num_output_tokens == 1 and not bench.scheduler.running


@contextmanager
def answers(bench: Bench, result: StepResult) -> Iterator[None]:
    assert bench.scheduler.schedule() is not None
    yield
    bench.scheduler.update(result, 0.01)


@pytest.mark.parametrize(
    ("rows", "step"),
    [
        ([RowResult("a", [1])], 1),
        ([], 0),
        ([RowResult("b", [1])], 0),
        ([RowResult("a", [])], 0),
        ([RowResult("a", [1, 2])], 0),
        ([RowResult("a", [48])], 0),
        ([RowResult("a", [-1])], 0),
        ([RowResult("a", [1], [])], 0),
        ([RowResult("a", [1], None, [])], 0),
    ],
)
def test_results_that_do_not_answer_the_plan_are_named(rows: list[RowResult], step: int) -> None:
    bench = Bench()
    bench.add("a", [1, 2, 3], logprobs=None)
    accepted = rows and (rows[0].logprobs == [] or rows[0].prompt_logprobs == [])
    if accepted:  # an empty list says the same as none
        with answers(bench, StepResult(epoch=0, step=step, rows=rows)):
            pass
        return
    with pytest.raises(ExecutorFailed, match="step"):
        with answers(bench, StepResult(epoch=0, step=step, rows=rows)):
            pass


def test_missing_logprobs_are_named() -> None:
    bench = Bench()
    bench.add("a", [1, 2, 3], logprobs=1)
    with pytest.raises(ExecutorFailed, match="does not answer the row"):
        with answers(bench, StepResult(epoch=0, step=0, rows=[RowResult("a", [1])])):
            pass


def test_a_row_error_ends_only_its_request_and_its_content_is_not_shared() -> None:
    bench = Bench()
    seq = bench.add("a", [1] * 9)
    assert bench.scheduler.schedule() is not None
    (delta,) = bench.scheduler.update(
        StepResult(epoch=0, step=0, rows=[RowResult("a", [], None, None, "not finite")]), 0.01
    )
    assert (delta.finish_reason, delta.error) == ("error", "not finite")
    assert seq not in bench.scheduler.running
    assert bench.scheduler.tables.pools[0].num_free == 64


def test_a_step_stays_within_the_inter_token_limit_once_costs_are_known() -> None:
    clock = VirtualClock()
    core = make_core(
        make_capacity(num_blocks=2000, max_model_len=4000),
        clock=clock,
        latency=StepLatency(base_s=0.01, token_s=0.0001),
        max_num_batched_tokens=1000,
        inter_token_limit_s=0.03,
    )
    core.add(make_request("decoding", [1], 400, ignore_eos=True))
    for index in range(12):
        core.add(make_request(str(index), [index] * 1000, 2, ignore_eos=True))
    moments: list[float] = []
    while core.has_work:
        if any(delta.request_id == "decoding" for delta in core.step()):
            moments.append(clock.now)
    gaps = [after - before for before, after in pairwise(moments)]
    assert max(gaps[12:]) < 0.033, "decoding goes on at the agreed pace"
    assert sum(gap > 0.02 for gap in gaps) > 30, "and prompts use what the pace leaves"


def test_the_queue_may_be_longer_than_the_cache() -> None:
    core = make_core(make_capacity(num_blocks=4, max_model_len=16))
    for index in range(40):
        core.add(make_request(str(index), [index] * 5, 6, ignore_eos=True))
    assert all(len(output.token_ids) == 6 for output in run(core).values())
