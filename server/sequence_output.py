"""One output of a request as it grows: deltas of token ids in; text, log-probabilities and the finish reason out."""

import time
from collections.abc import Sequence

from shoal.configs.sampling import SamplingParams
from shoal.engine.client import EngineError
from shoal.engine.messages import FinishReason, OutputDelta, TokenLogprobs
from shoal.server.outputs import CompletionOutput, Logprob
from shoal.server.stop_strings import StopChecker
from shoal.server.tokenizer import Tokenizer


class SequenceOutput:
    """The state of output `index` of a request.

    sampling: as given by the user, checked. tokenizer: None works with token ids only. prompt_token_ids: what the
    output continues. eos_token_ids: ids that end an output without a stop_reason.
    """

    def __init__(
        self,
        index: int,
        sampling: SamplingParams,
        tokenizer: Tokenizer | None,
        prompt_token_ids: Sequence[int],
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] | None = None if sampling.logprobs is None else []
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.num_cached_tokens = 0
        self.first_token_time: float | None = None
        self.last_token_time: float | None = None
        self._sampling = sampling
        self._tokenizer = tokenizer
        self._eos = frozenset(eos_token_ids)
        self._pieces: list[str] = []
        self._cumulative = 0.0
        self.version = 0  # grows with every change
        self._reported = (0, 0, 0)  # version, tokens and pieces of text that `take` has given out
        self._stream = None
        if tokenizer is not None and sampling.detokenize:
            self._stream = tokenizer.detokenizer(
                prompt_token_ids,
                skip_special_tokens=sampling.skip_special_tokens,
                spaces_between_special_tokens=sampling.spaces_between_special_tokens,
            )
        stops = [sampling.stop] if isinstance(sampling.stop, str) else sampling.stop or []
        self._checker = StopChecker(stops, sampling.include_stop_str_in_output)

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None

    @property
    def text(self) -> str:
        """The text so far, without what is held back."""
        return "".join(self._pieces)

    def apply(self, delta: OutputDelta) -> bool:
        """Take a delta; tokens that came before are skipped, so delivery may repeat. Tokens behind a stop string are
        dropped.

        Returns whether the engine goes on with a request that is finished here, and must be told. Raises EngineError
        for a delta of an error, and for one that leaves tokens out.
        """
        if delta.finish_reason == "error":
            raise EngineError(delta.error or f"request {delta.request_id} failed; the engine gave no reason")
        if self.finished:
            return False
        skip = len(self.token_ids) - delta.start
        if skip < 0:
            raise EngineError(
                f"request {delta.request_id}: tokens {len(self.token_ids)} to {delta.start - 1} of the output never "
                "arrived"
            )
        self._note(delta)
        if skip < len(delta.token_ids) or delta.finish_reason is not None:
            self.version += 1
        ends_with_stop_token = delta.finish_reason == "stop"
        for position in range(skip, len(delta.token_ids)):
            silent = ends_with_stop_token and position == len(delta.token_ids) - 1
            logprobs = delta.logprobs[position] if delta.logprobs is not None else None
            self._append(delta.token_ids[position], logprobs, silent)
            if self._checker.found is not None:
                self._end("stop", self._checker.found)
                return delta.finish_reason is None
        if delta.finish_reason is not None:
            self._close(delta)
        return False

    def take(self, only_new: bool) -> CompletionOutput | None:
        """The output so far, or only what is new since the last call (None when nothing is)."""
        version, tokens, pieces = self._reported if only_new else (0, 0, 0)
        if only_new and version == self.version:
            return None
        self._reported = (self.version, len(self.token_ids), len(self._pieces))
        return CompletionOutput(
            index=self.index,
            text="".join(self._pieces[pieces:]),
            token_ids=self.token_ids[tokens:],
            cumulative_logprob=None if self.logprobs is None else self._cumulative,
            logprobs=None if self.logprobs is None else self.logprobs[tokens:],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _note(self, delta: OutputDelta) -> None:
        """What a delta says beside its tokens."""
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        if delta.token_ids:
            self.last_token_time = time.time()
            self.first_token_time = self.first_token_time or self.last_token_time
        if delta.prompt_logprobs is not None and self.prompt_logprobs is None:
            self.prompt_logprobs = [None if entry is None else self._named(entry) for entry in delta.prompt_logprobs]

    def _append(self, token_id: int, logprobs: TokenLogprobs | None, silent: bool) -> None:
        """Add a token. silent: it ended the output and gives no text, unless stops are to be included."""
        self.token_ids.append(token_id)
        if self.logprobs is not None and logprobs is not None:
            self.logprobs.append(self._named(logprobs))
            self._cumulative += logprobs.logprobs[0]
        if self._stream is not None and (not silent or self._sampling.include_stop_str_in_output):
            self._add_text(self._stream.push(token_id))

    def _add_text(self, text: str) -> None:
        """Send text past the stop strings; those that end within the first min_tokens tokens do not count."""
        final = self._checker.push(text, check=len(self.token_ids) > self._sampling.min_tokens)
        if final:
            self._pieces.append(final)

    def _close(self, delta: OutputDelta) -> None:
        """The engine ended the output: release what is held back."""
        if self._stream is not None:
            self._add_text(self._stream.close())
        if self._checker.found is not None:
            self._end("stop", self._checker.found)
            return
        held = self._checker.close()
        if held:
            self._pieces.append(held)
        named = delta.stop_reason in (self._sampling.stop_token_ids or ()) or delta.stop_reason not in self._eos
        self._end(delta.finish_reason, delta.stop_reason if named else None)

    def _end(self, finish_reason: FinishReason | None, stop_reason: int | str | None) -> None:
        self.finish_reason, self.stop_reason = finish_reason, stop_reason

    def _named(self, entry: TokenLogprobs) -> dict[int, Logprob]:
        """Log-probabilities of a position by token id, the chosen token first."""
        text = self._tokenizer.token_text if self._tokenizer is not None else lambda token_id: None
        named: dict[int, Logprob] = {}
        for token_id, logprob, rank in zip(entry.token_ids, entry.logprobs, entry.ranks):
            named.setdefault(token_id, Logprob(logprob, rank, text(token_id)))
        return named
