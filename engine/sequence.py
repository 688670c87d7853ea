"""Sequence: one accepted request as the scheduler sees it."""

from enum import Enum

from shoal.configs.sampling import SamplingParams
from shoal.engine.messages import (
    FinishReason,
    NewSequence,
    OutputDelta,
    Request,
    TokenLogprobs,
    TokenRef,
)


class Status(Enum):
    """Where a sequence is: in the queue (also after a preemption), in the running set, or ended."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """A request's tokens, how far they are computed, and the blocks that hold them.

    tokens: prompt, then output. num_computed: tokens whose KV is in the cache once every launched step has run.
    num_told: tokens the ranks know the ids of. in_flight: launched rows without a result; last_row: the last of those
    that sample. keys: prefix keys of its leading full blocks. tables: per cache group, its block ids; first_live: per
    group, the index of the first one it still holds (those before fell out of the window); last_blocks: per group, the
    last one, a new list when it changes. num_hit_blocks: leading blocks it found in the cache. num_published: blocks
    others can find. num_given: output tokens the front end has been told of; logprobs: of those it has not. scores:
    whether log-probabilities are asked for. order: the smallest is served first.
    """

    __slots__ = (
        "first_live",
        "in_flight",
        "keys",
        "last_blocks",
        "last_row",
        "logprobs",
        "max_num_tokens",
        "num_cached_tokens",
        "num_computed",
        "num_given",
        "num_hit_blocks",
        "num_prompt_tokens",
        "num_published",
        "num_told",
        "order",
        "prompt_logprobs",
        "request",
        "request_id",
        "sampling",
        "scores",
        "started",
        "status",
        "stop_reason",
        "stop_reasons",
        "tables",
        "tokens",
        "wanted_key",
    )

    def __init__(self, request: Request, sampling: SamplingParams, max_model_len: int, number: int) -> None:
        """sampling: the request's, with a seed. number: counts the accepted requests."""
        self.request, self.request_id, self.sampling = request, request.request_id, sampling
        self.tokens = request.prompt_token_ids + request.emitted_token_ids
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.max_num_tokens = max_model_len
        if sampling.max_tokens is not None:
            self.max_num_tokens = min(max_model_len, self.num_prompt_tokens + sampling.max_tokens)
        self.order = (request.priority, request.arrival, number)
        self.status = Status.WAITING
        self.started = False
        self.stop_reasons: dict[int, int | None] = {token: token for token in sampling.stop_token_ids or ()}
        if not sampling.ignore_eos:
            self.stop_reasons.update(dict.fromkeys(request.eos_token_ids))
        self.stop_reason: int | None = None
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None if sampling.prompt_logprobs is None else [None]
        self.scores = sampling.logprobs is not None or sampling.prompt_logprobs is not None
        self.num_cached_tokens = 0
        self.keys: list[bytes] = []
        self.wanted_key: bytes | None = None
        self.num_told = self.in_flight = 0
        self.last_row: TokenRef | None = None
        self.num_given = len(request.emitted_token_ids)
        self.logprobs: list[TokenLogprobs] = []
        self.forget_cache(num_groups=0)

    def forget_cache(self, num_groups: int) -> None:
        """Hold no blocks and have nothing computed."""
        self.num_computed = self.num_hit_blocks = self.num_published = 0
        self.tables: list[list[int]] = [[] for _ in range(num_groups)]
        self.first_live = [0] * num_groups
        self.last_blocks = [-1] * num_groups

    @property
    def pending(self) -> int:
        """Known tokens that no launched step computes: 0 while one is being sampled, 1 in decoding, more in prefill."""
        return len(self.tokens) - self.num_computed

    @property
    def num_known(self) -> int:
        """Tokens whose KV is in the cache once every launched step has run, and whose ids are known."""
        return min(self.num_computed, len(self.tokens))

    @property
    def may_follow(self) -> bool:
        """With none pending: whether the token being sampled is followed by another, unless it ends the output."""
        return self.in_flight > 0 and self.num_computed + 1 < self.max_num_tokens

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, emitted ones of an earlier life included."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def max_hit_tokens(self) -> int:
        """Tokens that may come from the cache: not the last one, and none whose position must give prompt_logprobs."""
        if self.prompt_logprobs is None:
            return len(self.tokens) - 1
        return min(len(self.tokens), len(self.prompt_logprobs)) - 1

    def take_prompt_logprobs(self, start: int, entries: list[TokenLogprobs]) -> None:
        """Add what a row from position `start` on gave, less what an earlier run of the same positions gave."""
        if self.prompt_logprobs is not None:
            self.prompt_logprobs += entries[len(self.prompt_logprobs) - 1 - start :]

    def finish_reason(self) -> FinishReason | None:
        """Why the output ends with its last token, if it does; sets stop_reason.

        End tokens count from min_tokens on.
        """
        last = self.tokens[-1]
        if last in self.stop_reasons and self.num_output_tokens >= max(1, self.sampling.min_tokens):
            self.stop_reason = self.stop_reasons[last]
            return "stop"
        return "length" if len(self.tokens) >= self.max_num_tokens else None

    def may_wait(self) -> bool:
        """Whether nobody misses its new tokens yet: not followed one by one, and not the first ones."""
        return self.request.joined and self.num_given > len(self.request.emitted_token_ids)

    def take_delta(self, finish_reason: FinishReason | None = None, error: str | None = None) -> OutputDelta:
        """What the front end has not been told of, which it is now."""
        start, self.num_given = self.num_given, len(self.tokens) - self.num_prompt_tokens
        token_ids = self.tokens[self.num_prompt_tokens + start :]
        if finish_reason is error is None and not self.scores:
            return OutputDelta(
                request_id=self.request_id, start=start, token_ids=token_ids, num_cached_tokens=self.num_cached_tokens
            )
        logprobs, self.logprobs = self.logprobs, []
        prompt_logprobs = None
        if self.num_given > start:  # before its first token they may not be complete
            prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, None
        return OutputDelta(
            request_id=self.request_id,
            start=start,
            token_ids=token_ids,
            logprobs=logprobs or None,
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish_reason,
            stop_reason=self.stop_reason,
            error=error,
            num_cached_tokens=self.num_cached_tokens,
        )

    def announcement(self) -> NewSequence:
        """What the ranks must know before its first row; from then on they know all its tokens."""
        self.num_told = len(self.tokens)
        return NewSequence(
            self.request_id,
            list(self.tokens),
            self.num_prompt_tokens,
            self.sampling,
            self.request.sample_index,
            self.request.eos_token_ids,
            self.request.bad_words_token_ids,
            [list(table) for table in self.tables],
        )
