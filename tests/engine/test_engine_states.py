"""A Hypothesis state machine over pool, prefix cache, scheduler, core and FakeExecutor, and seeded streams of requests.

Whatever is submitted, aborted, resumed and shared, in whatever order: every request gets the oracle's tokens, and every
block is free, cached or referenced after every step.
"""

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from shoal.engine.admission import check_fits_alone
from shoal.engine.clock import VirtualClock
from shoal.engine.engine_core import EngineCore
from shoal.engine.fake_executor import StepLatency
from shoal.engine.messages import Request
from tests.engine.harness import (
    Output,
    assert_as_expected,
    check_step,
    expected_output,
    make_capacity,
    make_core,
    make_request,
)

MAX_MODEL_LEN = 64
LAYOUTS = [(None,), (None, 5), (7,), (None, 3, 20)]


def random_core(rng: random.Random, **fixed: Any) -> EngineCore:
    """A core with a cache that is often as small as one request needs, and odd settings."""
    choices: dict[str, Any] = {
        "block_size": rng.choice([1, 3, 4, 16, 256]),
        "windows": rng.choice(LAYOUTS),
        "max_in_flight": rng.randrange(1, 5),
        "overlap": rng.random() < 0.5,
        **fixed,
    }
    block_size = choices["block_size"]
    whole = -(-(MAX_MODEL_LEN - 1) // block_size)
    needs = [whole if w is None else min(whole, -(-(w - 1) // block_size) + 1) for w in choices["windows"]]
    sizes = [rng.choice([need, need + rng.randrange(1, 4), 2 * need, 8 * need]) for need in needs]
    capacity = make_capacity(max_model_len=MAX_MODEL_LEN, num_blocks=sizes, **choices)
    core = make_core(
        capacity,
        caching=rng.random() < 0.8,
        clock=VirtualClock(),
        latency=StepLatency(base_s=0.01, row_s=0.001, token_s=0.0001),
        max_num_seqs=rng.choice([1, 3, 8, 16]),
        max_num_batched_tokens=rng.choice([1, 3, 8, 32, 64, 256]),
        prefill_share=rng.choice([0.01, 0.5, 1.0]),
        inter_token_limit_s=rng.choice([None, 0.005, 0.02]),
    )
    if rng.random() < 0.6:  # reckless admission makes many preemptions
        core.scheduler.admission.fits = lambda running, candidate, hit: True  # type: ignore[method-assign]
    return core


def random_request(rng: random.Random, name: str, known: list[list[int]]) -> Request:
    """A request whose prompt is often the beginning of an earlier one with its output; some are resumed ones."""
    start = rng.choice(known) if known and rng.random() < 0.7 else []
    shared = rng.choice([rng.randrange(1, 16), rng.randrange(1, MAX_MODEL_LEN - 1)])
    prompt = start[:shared] + [rng.randrange(3) for _ in range(rng.randrange(1, 12))]
    prompt = prompt[: MAX_MODEL_LEN - 1]
    fields: dict[str, Any] = {
        "max_tokens": rng.choice([None, 1, 2, 5, 40]),
        "min_tokens": rng.choice([0, 0, 1, 4]),
        "temperature": rng.choice([0.0, 1.0]),
        "seed": rng.randrange(4),
        "ignore_eos": rng.random() < 0.6,
        "stop_token_ids": rng.choice([None, None, [5], [5, 6, 7]]),
        "logprobs": rng.choice([None, None, 0, 2]),
        "prompt_logprobs": rng.choice([None, None, None, 1]),
        "eos_token_ids": [1, 2],
        "priority": rng.choice([0, 0, 0, 1, -1]),
        "arrival": float(rng.randrange(3)),
        "cache_salt": rng.choice([None, None, "a"]),
        "sample_index": rng.randrange(2),
    }
    request = make_request(name, prompt, **fields)
    if rng.random() < 0.2:
        output = expected_output(request, MAX_MODEL_LEN).token_ids
        fields["emitted_token_ids"] = output[: rng.randrange(len(output) + 1)]
        request = make_request(name, prompt, **fields)
    return request


class Stream:
    """A core under test, what was asked of it, and what came."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.requests: dict[str, Request] = {}
        self.outputs: dict[str, Output] = {}
        self.known: list[list[int]] = []
        self.num_added = self.num_finished = 0

    def add(self, rng: random.Random) -> None:
        """Submit a random request, sometimes under the name of one that was aborted."""
        request = random_request(
            rng, f"r{rng.randrange(4)}" if rng.random() < 0.2 else f"n{self.num_added}", self.known
        )
        name, prompt = request.request_id, request.prompt_token_ids
        self.num_added += 1
        if name in self.requests:
            with pytest.raises(ValueError, match="already in use"):
                self.core.add(request)
            return
        most = min(MAX_MODEL_LEN, len(prompt) + (request.sampling.max_tokens or MAX_MODEL_LEN))
        check_fits_alone(self.core.scheduler.tables, len(prompt), most)
        self.core.add(request)
        self.requests[name], self.outputs[name] = request, Output()
        self.known = [*self.known[-5:], prompt + expected_output(request).token_ids]

    def abort(self, rng: random.Random) -> None:
        """End a live request; its stream ends with what it has."""
        if self.requests:
            self.core.abort([rng.choice(sorted(self.requests)), "unknown"])

    def step(self) -> None:
        """One step of the core; finished requests are compared with the oracle."""
        for delta in self.core.step():
            output, request = self.outputs[delta.request_id], self.requests[delta.request_id]
            output.take(delta)
            if delta.finish_reason is not None:
                self.num_finished += 1
                if delta.finish_reason == "abort":
                    whole = expected_output(request).token_ids
                    assert output.token_ids == whole[: len(output.token_ids)]
                else:
                    assert_as_expected(output, request)
                del self.requests[delta.request_id], self.outputs[delta.request_id]

    def finish(self) -> None:
        """Run until nothing is left."""
        for _ in range(20_000):
            if not self.core.has_work:
                break
            self.step()
            check_step(self.core)
        assert not self.core.has_work and not self.requests
        assert not any(self.core.stats().referenced_blocks)


class EngineMachine(RuleBasedStateMachine):
    """Rules draw seeds: Hypothesis chooses and shrinks the order of events, the seeds what is in them."""

    @initialize(seed=st.integers(0, 2**32))
    def start(self, seed: int) -> None:
        self.stream = Stream(random_core(random.Random(seed)))

    @rule(seed=st.integers(0, 2**32))
    def add(self, seed: int) -> None:
        self.stream.add(random.Random(seed))

    @rule(seed=st.integers(0, 2**32))
    def abort(self, seed: int) -> None:
        self.stream.abort(random.Random(seed))

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.stream.step()
            check_step(self.stream.core)

    @invariant()
    def everything_is_accounted_for(self) -> None:
        check_step(self.stream.core)

    def teardown(self) -> None:
        if hasattr(self, "stream"):
            self.stream.finish()


def run_machine(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        EngineMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_any_order_of_events_gives_the_oracles_tokens() -> None:
    run_machine(examples=40, steps=40)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_any_order_of_events_gives_the_oracles_tokens_in_a_hundred_thousand_steps() -> None:
    run_machine(examples=1000, steps=100)


def run_stream(seed: int, num_events: int, **fixed: Any) -> EngineCore:
    rng = random.Random(seed)
    stream = Stream(random_core(rng, **fixed))
    for _ in range(num_events):
        stream.add(rng)
        if rng.random() < 0.1:
            stream.abort(rng)
        for _ in range(rng.randrange(5)):
            stream.step()
            check_step(stream.core)
    stream.finish()
    return stream.core


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("max_in_flight", [1, 2, 3, 4])
@pytest.mark.parametrize("block_size", [1, 3, 16, 256])
def test_a_random_stream_gives_the_oracles_tokens(block_size: int, max_in_flight: int, overlap: bool) -> None:
    for windows in LAYOUTS:
        fixed = {"block_size": block_size, "max_in_flight": max_in_flight, "overlap": overlap, "windows": windows}
        run_stream(block_size * 10 + max_in_flight, 12, **fixed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(4))
def test_many_random_streams_give_the_oracles_tokens(part: int) -> None:
    preemptions = hits = 0
    for seed in range(part * 1000, part * 1000 + 100):
        stats = run_stream(seed, 60).stats()
        preemptions, hits = preemptions + stats.preemptions, hits + stats.cache_hit_tokens
    assert preemptions > 100 and hits > 1000, "the streams are too tame to show anything"
