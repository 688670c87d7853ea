"""EngineCore: what is accepted, how streams end, resuming, seeds, deadlines, failures, statistics."""

import random
import subprocess
import sys
from typing import Any

import msgspec
import pytest

from shoal.engine.client import EngineError, QueueFull
from shoal.engine.clock import VirtualClock
from shoal.engine.engine_core import JOINED_S, EngineCore
from shoal.engine.executor import ExecutorFailed
from shoal.engine.fake_executor import Fault, StepLatency
from shoal.engine.messages import RankTiming, Request, StepPlan, StepResult
from tests.engine.harness import (
    VOCAB_SIZE,
    Output,
    assert_as_expected,
    expected_output,
    make_capacity,
    make_core,
    make_request,
    run,
)

TORCH_FREE = [
    "admission",
    "block_pool",
    "block_tables",
    "client",
    "clock",
    "cost_model",
    "engine_core",
    "executor",
    "fake_executor",
    "inprocess_client",
    "messages",
    "prefix_cache",
    "scheduler",
    "sequence",
]


def test_the_engine_needs_neither_torch_nor_numpy() -> None:
    imports = "; ".join(f"import shoal.engine.{name}" for name in TORCH_FREE)
    code = f"import sys; {imports}; sys.exit(bool({{'torch', 'numpy'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def run_all(core: EngineCore, requests: list[Request]) -> dict[str, Output]:
    for request in requests:
        core.add(request)
    outputs = run(core)
    for request in requests:
        assert_as_expected(outputs[request.request_id], request)
    return outputs


def crowd(rng: random.Random, count: int) -> list[Request]:
    base = [rng.randrange(VOCAB_SIZE) for _ in range(30)]
    return [
        make_request(
            f"n{index}",
            base[: rng.randrange(30)] + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 20))],
            rng.randrange(1, 14),
            temperature=rng.choice([0.0, 1.0]),
            seed=index,
        )
        for index in range(count)
    ]


@pytest.mark.parametrize(("max_in_flight", "overlap"), [(1, False), (1, True), (3, False)])
@pytest.mark.parametrize("windows", [(None,), (None, 6)])
@pytest.mark.parametrize("num_blocks", [32, 256])
@pytest.mark.parametrize("max_num_batched_tokens", [2, 7, 64])
def test_tokens_do_not_depend_on_neighbours_budget_cache_or_room(
    max_in_flight: int, overlap: bool, windows: tuple[int | None, ...], num_blocks: int, max_num_batched_tokens: int
) -> None:
    capacity = make_capacity(
        num_blocks=num_blocks, block_size=2, windows=windows, max_in_flight=max_in_flight, overlap=overlap
    )
    core = make_core(capacity, max_num_batched_tokens=max_num_batched_tokens)
    core.scheduler.admission.fits = lambda running, candidate, hit: True  # type: ignore[method-assign]
    requests = crowd(random.Random(1), 20)
    cold = run_all(core, requests)
    warm = run_all(core, requests)
    assert sum(output.num_cached_tokens for output in warm.values()) > (100 if num_blocks == 256 else 0)
    assert {name: output.token_ids for name, output in cold.items()} == {
        name: output.token_ids for name, output in warm.items()
    }
    assert core.stats().preemptions > 0 or num_blocks == 256 or max_num_batched_tokens == 2


def test_a_conversation_finds_its_last_turn_in_the_cache() -> None:
    core = make_core()
    first = make_request("1", list(range(10)), 11, ignore_eos=True)
    output = run_all(core, [first])["1"]
    second = make_request("2", [*range(10), *output.token_ids, 7, 7], 2)
    assert run_all(core, [second])["2"].num_cached_tokens == 20


def test_prefixes_are_shared_only_under_the_same_salt() -> None:
    core = make_core()
    prompt = list(range(20))
    cached = [
        run_all(core, [make_request(str(index), prompt, 1, cache_salt=salt)])[str(index)].num_cached_tokens
        for index, salt in enumerate([None, None, "a", "a", "b", None])
    ]
    assert cached == [0, 16, 0, 16, 0, 16]


def test_without_prefix_caching_nothing_is_reused() -> None:
    core = make_core(caching=False)
    for name in "ab":
        assert run_all(core, [make_request(name, list(range(20)), 1)])[name].num_cached_tokens == 0
    assert core.stats().cache_query_tokens == 0 and core.stats().free_blocks == [64]


@pytest.mark.parametrize("fields", [{}, {"temperature": 1.0, "seed": 3}, {"min_tokens": 9}, {"prompt_logprobs": 1}])
def test_a_request_resumed_from_any_prefix_goes_on_with_the_same_tokens(fields: dict[str, Any]) -> None:
    whole = make_request("r", [1, 2, 3], 12, stop_token_ids=[4, 5], eos_token_ids=[6], **fields)
    tokens = expected_output(whole).token_ids
    for count in range(len(tokens) + 1):
        resumed = make_request(
            "r",
            [1, 2, 3],
            12,
            stop_token_ids=[4, 5],
            eos_token_ids=[6],
            emitted_token_ids=tokens[:count],
            **fields,
        )
        output = run_all(make_core(), [resumed])["r"]
        assert output.start == count
        assert tokens[:count] + output.token_ids == tokens


def test_emitted_tokens_that_satisfy_a_finish_condition_end_the_request_at_once() -> None:
    core = make_core()
    core.add(make_request("length", [1], 2, emitted_token_ids=[3, 4]))
    core.add(make_request("stop", [1], 9, emitted_token_ids=[3, 7], stop_token_ids=[7]))
    outputs = {delta.request_id: delta for delta in core.step()}
    assert (outputs["length"].finish_reason, outputs["length"].start) == ("length", 2)
    assert (outputs["stop"].finish_reason, outputs["stop"].stop_reason) == ("stop", 7)
    assert not core.has_work and core.stats().steps == 0


def test_output_ends_at_max_model_len() -> None:
    core = make_core(make_capacity(max_model_len=20))
    core.add(make_request("r", [1] * 15, None))
    output = run(core)["r"]
    assert (len(output.token_ids), output.finish_reason) == (5, "length")


def test_prompt_logprobs_come_once_and_whole_whatever_is_cached() -> None:
    core = make_core(max_num_batched_tokens=3)
    prompt = list(range(20))
    plain, scored = make_request("a", prompt, 4), make_request("b", prompt, 4, prompt_logprobs=2, logprobs=1)
    run_all(core, [plain])
    assert run_all(core, [scored])["b"].num_cached_tokens == 0
    single = make_request("c", [5], 1, prompt_logprobs=0)
    assert run_all(core, [single])["c"].prompt_logprobs == [None]


def test_an_absent_seed_is_drawn_once_from_the_engines_own() -> None:
    def tokens(seed: int | None) -> list[list[int]]:
        core = make_core(seed=seed)
        for name in "abc":
            core.add(make_request(name, [1, 2, 3], 10, temperature=1.0))
        return [output.token_ids for _, output in sorted(run(core).items())]

    assert tokens(5) == tokens(5) != tokens(6)
    assert len({tuple(output) for output in tokens(5)}) == 3, "each request has its own"
    assert tokens(None) != tokens(None)


BAD = [
    (make_request("r", []), "prompt_token_ids is empty"),
    (make_request("r", [1, 48]), r"prompt_token_ids\[1\] is 48: the vocabulary has the ids 0 to 47"),
    (make_request("r", [-1]), r"prompt_token_ids\[0\] is -1"),
    (make_request("r", [1], emitted_token_ids=[99]), r"emitted_token_ids\[0\] is 99"),
    (make_request("r", [1] * 64), "the prompt has 64 tokens, model.max_model_len 64 leaves no room"),
    (make_request("r", [1], 0), "sampling.max_tokens is 0"),
    (make_request("r", [1], n=2), "sampling.n is 2"),
]


@pytest.mark.parametrize(("request_", "message"), BAD)
def test_bad_requests_are_refused_and_leave_no_trace(request_: Request, message: str) -> None:
    core = make_core()
    with pytest.raises(ValueError, match=message):
        core.add(request_)
    assert not core.has_work
    run_all(core, [make_request("r", [1])])


def test_a_request_larger_than_the_cache_is_refused() -> None:
    core = make_core(make_capacity(num_blocks=4))
    with pytest.raises(ValueError, match=r"needs 16 blocks .* has 4: raise cache.num_blocks to 16, or lower"):
        core.add(make_request("r", [1], None))


def test_an_id_is_in_use_until_its_last_delta_was_taken() -> None:
    core = make_core()
    core.add(make_request("r", [1]))
    with pytest.raises(ValueError, match="request_id 'r' is already in use"):
        core.add(make_request("r", [2]))
    core.abort(["r"])
    with pytest.raises(ValueError, match="already in use"):
        core.add(make_request("r", [2]))
    core.step()
    run_all(core, [make_request("r", [2])])
    core.add(make_request("r", [1]))
    core.abort(["r"], silent=True)
    assert run_all(core, [make_request("r", [2])])["r"].finish_reason == "length"


def test_a_full_queue_says_when_to_come_back() -> None:
    core = make_core(max_queued_requests=2, max_num_seqs=1)
    for name in "abd":  # one of them has a seat, although no step has given it to it yet
        core.add(make_request(name, [1]))
    with pytest.raises(QueueFull, match=r"3 requests wait already \(scheduler.max_queued_requests\)") as caught:
        core.add(make_request("c", [1]))
    assert 1.0 <= caught.value.retry_after_s <= 60.0
    run(core)
    core.add(make_request("c", [1]))


def test_a_request_that_would_wait_too_long_is_refused_with_a_time_to_come_back() -> None:
    core = make_core(max_num_seqs=2, max_queue_wait_s=1e-9)
    core.add(make_request("a", [1], 30, ignore_eos=True))
    core.add(make_request("b", [1], 10, ignore_eos=True))
    core._queue_wait.observe(0.01)
    with pytest.raises(QueueFull):  # those two have the seats, although no step has given them to them yet
        core.add(make_request("c", [1]))
    core.step()
    with pytest.raises(QueueFull, match=r"would wait .* s for its turn.*scheduler.max_queue_wait_s") as caught:
        core.add(make_request("c", [1]))
    assert caught.value.retry_after_s > 0
    core.abort(["b"])
    core.add(make_request("c", [1]))
    with pytest.raises(QueueFull):
        core.add(make_request("d", [1]))


def test_the_expected_wait_is_until_enough_running_requests_have_ended() -> None:
    core = make_core(max_num_seqs=2)
    wait = core._queue_wait
    core.add(make_request("a", [1], 30, ignore_eos=True))
    core.add(make_request("b", [1], 10, ignore_eos=True))
    core.step()
    wait._step_s = 0.5
    running = {seq.request_id: core.scheduler.admission.remaining(seq) for seq in core.scheduler.running}
    assert wait.expected_s() == 0.5 * min(running.values())
    core.add(make_request("c", [1]))
    assert wait.expected_s() == 0.5 * max(running.values())
    core.add(make_request("d", [1]))
    assert wait.expected_s() == 0.5 * (min(running.values()) + core.scheduler.admission.mean_output)


@pytest.mark.parametrize("steps_before", range(4))
def test_an_aborted_request_ends_and_gives_its_blocks_back(steps_before: int) -> None:
    core = make_core(make_capacity(max_in_flight=2), max_num_batched_tokens=4)
    core.add(make_request("r", list(range(10)), 20, ignore_eos=True))
    core.add(make_request("other", [1, 2, 3], 20, ignore_eos=True))
    outputs: dict[str, Output] = {}
    for _ in range(steps_before):
        for delta in core.step():
            outputs.setdefault(delta.request_id, Output()).take(delta)
    core.abort(["r", "nobody", "r"])
    run(core, outputs)
    assert outputs["r"].finish_reason == "abort" and outputs["r"].error is None
    assert len(outputs["other"].token_ids) == 20


def test_requests_end_at_their_deadline() -> None:
    clock = VirtualClock(100.0)
    core = make_core(clock=clock, latency=StepLatency(base_s=1.0))
    core.add(make_request("soon", [1], 50, ignore_eos=True, deadline_s=104.5))
    core.add(make_request("later", [2], 50, ignore_eos=True, deadline_s=109.5))
    core.add(make_request("never", [3], 12, ignore_eos=True))
    outputs = run(core)
    assert [(outputs[n].finish_reason, len(outputs[n].token_ids)) for n in ("soon", "later", "never")] == [
        ("abort", 5),
        ("abort", 10),
        ("length", 12),
    ]


@pytest.mark.parametrize("fault", [Fault(step=3, rank=2), Fault(step=3, at_launch=True), Fault(step=3, hangs=True)])
@pytest.mark.parametrize(("max_in_flight", "overlap"), [(1, False), (1, True), (2, False)])
def test_when_the_executor_fails_every_stream_ends_with_the_first_cause(
    fault: Fault, max_in_flight: int, overlap: bool
) -> None:
    core = make_core(
        make_capacity(max_in_flight=max_in_flight, overlap=overlap), fault=fault, clock=VirtualClock(), max_num_seqs=2
    )
    outputs = {name: Output() for name in "abc"}
    for name in outputs:
        core.add(make_request(name, [1, 2], 30, ignore_eos=True))
    for _ in range(100):
        for delta in core.step():
            outputs[delta.request_id].take(delta)
    assert not core.has_work and isinstance(core.failure, EngineError)
    assert isinstance(core.failure.__cause__, ExecutorFailed)
    assert all(o.finish_reason == "error" and o.error == str(core.failure) for o in outputs.values())
    assert f"rank {fault.rank}" in str(core.failure)
    with pytest.raises(EngineError, match=f"rank {fault.rank}"):
        core.add(make_request("d", [1]))
    core.fail(ExecutorFailed("a second cause"))
    assert "second" not in str(core.failure)


def test_any_other_error_in_a_step_ends_every_stream_too(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()
    core.add(make_request("r", [1]))

    def broken() -> StepPlan | None:
        raise KeyError("bug")

    monkeypatch.setattr(core.scheduler, "schedule", broken)
    (delta,) = core.step()
    assert (delta.finish_reason, delta.error) == ("error", "the engine failed: KeyError: 'bug'")


def test_a_wrong_result_fails_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()
    core.add(make_request("r", [1]))
    monkeypatch.setattr(core.executor, "result", lambda handle, timeout_s: StepResult(epoch=0, step=7, rows=[]))
    (delta,) = core.step()
    assert delta.finish_reason == "error" and "step 7 with 0 rows came" in (delta.error or "")


def test_a_rank_that_ended_is_noticed_without_work() -> None:
    core = make_core(fault=Fault(step=0, rank=1))
    core.check_executor()
    assert "rank 1" in str(core.failure)


def test_the_times_of_the_sampling_rank_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()
    told = core.executor.result

    def timed(handle: int, timeout_s: float) -> StepResult:
        timing = RankTiming(rank=0, forward_s=2.0, wait_s=0.5, sample_s=1.0)
        return msgspec.structs.replace(told(handle, timeout_s), timings=[timing])

    monkeypatch.setattr(core.executor, "result", timed)
    run_all(core, [make_request("a", [1, 2, 3], 2, ignore_eos=True)])
    stats = core.stats()
    assert (stats.steps, stats.forward_s, stats.wait_s, stats.sample_s) == (2, 4.0, 1.0, 2.0)


def test_statistics_are_true() -> None:
    clock = VirtualClock()
    core = make_core(clock=clock, latency=StepLatency(base_s=0.5))
    run_all(core, [make_request("a", list(range(9)), 3, ignore_eos=True)])
    run_all(core, [make_request("b", list(range(9)), 2, ignore_eos=True)])
    core.add(make_request("c", [1], 5))
    core.add(make_request("d", [1], 5))
    stats = core.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 2)
    assert (stats.steps, stats.prompt_tokens, stats.generated_tokens) == (5, 18, 5)
    assert (stats.cache_query_tokens, stats.cache_hit_tokens) == (18, 8)
    assert (stats.total_blocks, stats.cached_blocks, stats.referenced_blocks) == ([64], [2], [0])
    assert stats.executor_s == 2.5 and stats.engine_s == 0.0 and stats.preemptions == 0
    core.step()
    assert (core.stats().num_running, core.stats().num_waiting) == (2, 0)


def test_tokens_nobody_follows_come_together() -> None:
    clock = VirtualClock()
    core = make_core(clock=clock)
    core.add(msgspec.structs.replace(make_request("a", [1, 2, 3], 8), joined=True))
    core.add(make_request("b", [1, 2, 3], 8))
    told: dict[str, list[int]] = {"a": [], "b": []}
    while core.has_work:
        for delta in core.step():
            told[delta.request_id].append(len(delta.token_ids))
        clock.now += JOINED_S / 4 + 1e-6
    assert told["b"] == [1] * 8
    assert sum(told["a"]) == 8 and told["a"][0] == 1 and max(told["a"]) > 1
