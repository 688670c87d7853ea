"""What the engine's tests share: capacities, requests, a core's run to its end, and what the oracle expects of it."""

from dataclasses import dataclass, field
from typing import Any

from shoal.configs.sampling import SamplingParams
from shoal.configs.schema import CacheConfig, RuntimeConfig, SchedulerConfig, ShoalConfig
from shoal.engine.clock import Clock
from shoal.engine.engine_core import EngineCore
from shoal.engine.executor import CacheGroup, Capacity
from shoal.engine.fake_executor import FakeExecutor, Fault, StepLatency
from shoal.engine.fake_model import FakeModel, prefix_states
from shoal.engine.messages import OutputDelta, Request, TokenLogprobs

VOCAB_SIZE = 48


def make_capacity(
    *,
    block_size: int = 4,
    num_blocks: int | list[int] = 64,
    windows: tuple[int | None, ...] = (None,),
    max_model_len: int = 64,
    max_in_flight: int = 1,
    overlap: bool = False,
) -> Capacity:
    """A cache group per window, with num_blocks each."""
    names = ["full" if window is None else f"window{window}" for window in windows]
    sizes = [num_blocks] * len(windows) if isinstance(num_blocks, int) else num_blocks
    return Capacity(
        block_size=block_size,
        groups=[CacheGroup(name=n, window=w, num_blocks=s) for n, w, s in zip(names, windows, sizes, strict=True)],
        max_model_len=max_model_len,
        vocab_size=VOCAB_SIZE,
        max_in_flight=max_in_flight,
        overlap=overlap,
    )


def make_core(
    capacity: Capacity | None = None,
    *,
    caching: bool = True,
    seed: int | None = 0,
    clock: Clock | None = None,
    latency: StepLatency | None = None,
    fault: Fault | None = None,
    **scheduler: Any,
) -> EngineCore:
    """A core over a FakeExecutor that holds plans to the scheduler's limits."""
    capacity = capacity or make_capacity()
    limits = SchedulerConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 32, **scheduler})
    config = ShoalConfig(
        scheduler=limits, cache=CacheConfig(enable_prefix_caching=caching), runtime=RuntimeConfig(seed=seed)
    )
    executor = FakeExecutor(
        capacity,
        clock=clock,
        latency=latency,
        fault=fault,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_num_seqs=limits.max_num_seqs,
    )
    return EngineCore(config, executor, clock=clock)


def make_request(name: str, prompt: list[int], max_tokens: int | None = 8, **fields: Any) -> Request:
    """A greedy request that ignores nothing; sampling fields and request fields may be mixed."""
    known = {key: fields.pop(key) for key in list(fields) if key in Request.__struct_fields__}
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, **fields})
    return Request(request_id=name, prompt_token_ids=prompt, sampling=sampling, **known)


@dataclass
class Output:
    """What a request's deltas add up to."""

    token_ids: list[int] = field(default_factory=list)
    start: int | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    error: str | None = None
    num_cached_tokens: int = 0

    def take(self, delta: OutputDelta) -> None:
        """Add a delta; it must continue the last one, and nothing may follow the end."""
        assert self.finish_reason is None, "a delta after the end"
        if self.start is None:
            self.start = delta.start
        assert delta.start == self.start + len(self.token_ids), "deltas have a gap"
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or []
        if delta.prompt_logprobs is not None:
            assert self.prompt_logprobs is None, "prompt_logprobs came twice"
            self.prompt_logprobs = delta.prompt_logprobs
        self.finish_reason, self.stop_reason, self.error = delta.finish_reason, delta.stop_reason, delta.error
        self.num_cached_tokens = delta.num_cached_tokens


def check_step(core: EngineCore) -> None:
    """What holds after every step: integrity, every block in exactly one state, no block shared across salts."""
    if core.failure is not None:
        raise core.failure
    core.check_integrity()
    stats = core.stats()
    sums = zip(stats.free_blocks, stats.cached_blocks, stats.referenced_blocks, strict=True)
    assert [sum(states) for states in sums] == stats.total_blocks
    owners: dict[tuple[int, int], str | None] = {}
    for seq in core.scheduler.running:
        for group, table in enumerate(seq.tables):
            for block in table[seq.first_live[group] :]:
                salt = seq.request.cache_salt
                assert owners.setdefault((group, block), salt) == salt, "a block is shared across salts"


def run(core: EngineCore, outputs: dict[str, Output] | None = None, max_steps: int = 20_000) -> dict[str, Output]:
    """Step until nothing is left, checking everything after every step; blocks are free or cached then."""
    outputs = {} if outputs is None else outputs
    for _ in range(max_steps):
        if not core.has_work:
            break
        for delta in core.step():
            outputs.setdefault(delta.request_id, Output()).take(delta)
        check_step(core)
    assert not core.has_work, f"not done after {max_steps} steps"
    assert not any(core.stats().referenced_blocks)
    return outputs


def expected_output(request: Request, max_model_len: int = 64) -> Output:
    """What the oracle says of a request with a seed (or a greedy one), by itself."""
    model, sampling, prompt = FakeModel(VOCAB_SIZE), request.sampling, request.prompt_token_ids
    most = max_model_len - len(prompt)
    if sampling.max_tokens is not None:
        most = min(most, sampling.max_tokens)
    eos = request.eos_token_ids
    tokens = model.generate(prompt, sampling, most, sample_index=request.sample_index, eos_token_ids=eos)
    reason, stop_reason = "length", None
    ends = {token: token for token in sampling.stop_token_ids or []}
    if not sampling.ignore_eos:
        ends |= dict.fromkeys(eos)
    for count, token in enumerate(tokens, start=1):
        if token in ends and count >= sampling.min_tokens:
            tokens, reason, stop_reason = tokens[:count], "stop", ends[token]
            break
    states = prefix_states(prompt + tokens)
    output = Output(tokens[len(request.emitted_token_ids) :], len(request.emitted_token_ids), finish_reason=reason)
    output.stop_reason = stop_reason
    if sampling.logprobs is not None:
        before = states[len(prompt) - 1 + len(request.emitted_token_ids) :]
        output.logprobs = [
            model.logprobs(state, t, sampling.logprobs) for state, t in zip(before, output.token_ids, strict=False)
        ]
    if sampling.prompt_logprobs is not None and output.token_ids:
        count = sampling.prompt_logprobs
        entries = [model.logprobs(state, t, count) for state, t in zip(states, prompt[1:], strict=False)]
        output.prompt_logprobs = [None, *entries]
    return output


def assert_as_expected(got: Output, request: Request, max_model_len: int = 64) -> None:
    """Compare with the oracle; how much came from the cache is no part of it."""
    want = expected_output(request, max_model_len)
    want.num_cached_tokens = got.num_cached_tokens
    assert got == want, request.request_id
