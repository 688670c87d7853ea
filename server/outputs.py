"""What a request gives back: RequestOutput and its parts, names and shapes as vLLM users know them."""

from dataclasses import dataclass, field

from shoal.engine.messages import FinishReason


@dataclass(slots=True)
class Logprob:
    """A token's log-probability at one position. rank: 1 is the most probable token. decoded_token: its text (None
    without tokenizer).
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request, in seconds as time.time(); None: not yet."""

    arrival_time: float
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None

    @property
    def time_to_first_token_s(self) -> float | None:
        """Arrival to first token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass(slots=True)
class CompletionOutput:
    """One output of a request.

    index: 0 to n - 1. text: "" without a tokenizer or with detokenize=False. token_ids: what was generated, the ending
    token included. cumulative_logprob: sum over token_ids, when logprobs were asked for. logprobs: per position, token
    id to Logprob, the chosen token first. finish_reason: "stop", "length", "abort", or None while running. stop_reason:
    the stop string or stop token id that ended it; None for an end-of-sequence token.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """The outputs of one request, so far or complete.

    prompt: the text, None when token ids were given. prompt_logprobs: per prompt token (the first is None), when asked
    for. outputs: by index. finished: all of them. num_cached_tokens: prompt tokens found in the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = field(default=None)
