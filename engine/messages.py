"""The messages that cross rooms and processes: requests, output deltas, step plans and step results. All of them
msgspec, no torch.

front end -> engine: Submit, Abort, Drain, StatsQuery     engine -> front end: OutputDelta, StatsReply, Failure
engine -> ranks: StepPlan                                 last stage's tensor rank 0 -> engine: StepResult
"""

from typing import Literal

import msgspec

from shoal.configs.sampling import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True, gc=False):
    """Base of everything that travels on a channel: tagged with its class name, unknown fields refused; never part of a
    cycle, so that nobody looks for one."""


class Record(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Base of the parts of a message that repeat per row: encoded as arrays, positional; never part of a cycle."""


class Request(Message, frozen=True, kw_only=True):
    """One sequence to generate.

    prompt_token_ids: at least one id. sampling: checked, with n == 1 (the front end fans n out by sample_index) and a
    seed. emitted_token_ids: output computed elsewhere before; treated as computed output (resume). arrival:
    time.time(). deadline_s: absolute time.time() after which the request is aborted. cache_salt: prefixes are shared
    only under an equal salt. joined: nobody follows its tokens one by one; deltas may hold what came in some time.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    emitted_token_ids: list[int] = []
    priority: int = 0
    arrival: float = 0.0
    deadline_s: float | None = None
    cache_salt: str | None = None
    sample_index: int = 0
    eos_token_ids: list[int] = []
    bad_words_token_ids: list[list[int]] = []
    joined: bool = False


class TokenLogprobs(Record, frozen=True):
    """Log-probabilities at one position: the chosen token first, then the best ones in falling order.

    token_ids, logprobs, ranks (1 is the most probable): equal lengths.
    """

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]


class OutputDelta(Message, frozen=True, kw_only=True):
    """New tokens of a request. `start` is the absolute output position of token_ids[0]: delivery is idempotent.

    prompt_logprobs comes once, with the first delta, one entry per prompt token (the first is None). finish_reason ends
    the stream; with "error" `error` says why. stop_reason: the stop token id that ended it. num_cached_tokens: prompt
    tokens from the prefix cache.
    """

    request_id: str
    start: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: str | None = None
    num_cached_tokens: int = 0


class TokenRef(Record, frozen=True):
    """The token sampled for row `row` of step `step`, not yet known to the engine: overlapped steps feed on the
    device."""

    step: int
    row: int


class NewSequence(Record, frozen=True):
    """What a rank must know before a request's first row (again after a preemption).

    token_ids: prompt then emitted output. seed: the request's own. block_ids: per cache group, the blocks granted so
    far (cached prefix included; an entry of a window group that fell out is -1).
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    sample_index: int
    eos_token_ids: list[int]
    bad_words_token_ids: list[list[int]]
    block_ids: list[list[int]]


class PlanRow(Record, frozen=True):
    """One request's part in a step.

    num_computed_tokens: tokens whose KV is in the cache before this step, i.e. the position of the row's first token.
    num_tokens: tokens computed now. token_ids: sampled tokens the ranks have not been told yet (they extend the
    sequence). ref: stands for one further token that only the ranks know. draft_token_ids: speculated tokens to verify.
    new_block_ids: per cache group, blocks appended now. last_block_ids: per group, the last block after appending,
    which ranks check against their own table together with num_computed_tokens. sample: the row's last position is
    sampled.
    """

    request_id: str
    num_computed_tokens: int
    num_tokens: int
    token_ids: list[int]
    new_block_ids: list[list[int]]
    last_block_ids: list[int]
    sample: bool
    ref: TokenRef | None = None
    draft_token_ids: list[int] = []


class StepPlan(Message, frozen=True, kw_only=True):
    """One step of one replica, as differences to what the ranks already hold. Steps count from 0 within an epoch.

    finished_ids and preempted_ids are dropped by the ranks before new_sequences are added and rows are run.
    """

    epoch: int
    step: int
    rows: list[PlanRow]
    new_sequences: list[NewSequence] = []
    finished_ids: list[str] = []
    preempted_ids: list[str] = []


class RowResult(Record, frozen=True):
    """What a row gave: 1..k+1 token ids when it sampled (none otherwise), their logprobs when asked for, and the
    log-probabilities of the prompt positions it computed (entry i belongs to the token after the i-th computed
    position).

    error: why no token could be chosen (its logits are not finite, or everything is masked); the request ends with it.
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    error: str | None = None


class RankTiming(Record, frozen=True):
    """Seconds of one rank in one step: its layers, collectives included; before them, embedding the tokens or waiting
    for the hidden states of the stage before; and after them, logits and sampling."""

    rank: int
    forward_s: float
    wait_s: float
    sample_s: float


class StepResult(Message, frozen=True, kw_only=True):
    """Results of the plan with the same epoch and step, in the order of its rows."""

    epoch: int
    step: int
    rows: list[RowResult]
    timings: list[RankTiming] = []


class Submit(Message, frozen=True, kw_only=True):
    """Front end -> engine: accept this request."""

    request: Request


class Abort(Message, frozen=True, kw_only=True):
    """Front end -> engine: end these requests; each gets a last delta with finish_reason "abort"."""

    request_ids: list[str]


class Drain(Message, frozen=True, kw_only=True):
    """Front end -> engine: take no new requests; answered by Drained when nothing runs any more."""

    timeout_s: float


class Drained(Message, frozen=True, kw_only=True):
    """Engine -> front end: nothing runs; unfinished lists the requests that the drain's time did not suffice for."""

    unfinished: list[str]


class StatsQuery(Message, frozen=True, kw_only=True):
    """Front end -> engine: send EngineStats."""


class EngineStats(Message, frozen=True, kw_only=True):
    """Counters and gauges of one replica's engine. Times in seconds, sums since start unless said otherwise.

    forward_s, wait_s, sample_s: of the rank that samples, as its RankTiming has them.
    """

    num_running: int = 0
    num_waiting: int = 0
    free_blocks: list[int] = []
    cached_blocks: list[int] = []
    referenced_blocks: list[int] = []
    total_blocks: list[int] = []
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cache_query_tokens: int = 0
    cache_hit_tokens: int = 0
    preemptions: int = 0
    engine_s: float = 0.0
    executor_s: float = 0.0
    forward_s: float = 0.0
    wait_s: float = 0.0
    sample_s: float = 0.0


class Failure(Message, frozen=True, kw_only=True):
    """Engine -> front end, or rank -> engine: the sender cannot go on. First cause first."""

    rank: int | None
    cause: str
    detail: str = ""
