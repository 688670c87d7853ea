"""FakeModel: a model whose next token is a hash of everything before it, so a wrong context gives a wrong token.

`state` stands for a prefix: extend(state, token) is the next one. Greedy rows depend on the prefix alone, others also
on seed and sample_index, as real ones do.
"""

from collections.abc import Iterable, Sequence

from shoal.configs.sampling import SamplingParams
from shoal.engine.messages import TokenLogprobs

EMPTY = 1
_PRIME = (1 << 61) - 1
_WORD = (1 << 64) - 1


def extend(state: int, token_id: int) -> int:
    """The state of a prefix with one more token (a polynomial hash modulo 2**61 - 1)."""
    return (state * 0x9E3779B97F4A7C15 + token_id + 1) % _PRIME


def prefix_states(token_ids: Iterable[int], state: int = EMPTY) -> list[int]:
    """Entry i is the state after token i."""
    states = []
    for token_id in token_ids:
        state = extend(state, token_id)
        states.append(state)
    return states


def _mix(value: int) -> int:
    """A well-spread 64-bit number (the finaliser of splitmix64)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _WORD
    return value ^ (value >> 31)


class FakeModel:
    """Chooses tokens and invents log-probabilities."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def next_token(
        self,
        state: int,
        sampling: SamplingParams,
        *,
        sample_index: int,
        num_output_tokens: int,
        eos_token_ids: Sequence[int],
    ) -> int:
        """The token after a prefix.

        Until min_tokens are out, end and stop tokens are passed over, as the ranks' masks do.
        """
        if sampling.temperature > 0.0:
            state = _mix(state ^ _mix((sampling.seed or 0) + 0x100000001 * sample_index + 1))
        masked = set()
        if num_output_tokens < sampling.min_tokens:
            masked = {*eos_token_ids, *(sampling.stop_token_ids or ())}
        candidates = (_mix(state + attempt) % self.vocab_size for attempt in range(64 * self.vocab_size))
        return next(token_id for token_id in candidates if token_id not in masked)

    def logprobs(self, state: int, token_id: int, count: int) -> TokenLogprobs:
        """Log-probabilities after a prefix: the chosen token, then `count` others."""
        others = [_mix(state + 1000 + index) % self.vocab_size for index in range(count)]
        values = [-(_mix(state + token) % 1000) / 1000 for token in (token_id, *others)]
        return TokenLogprobs([token_id, *others], values, list(range(1, count + 2)))

    def generate(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        num_tokens: int,
        *,
        sample_index: int = 0,
        eos_token_ids: Sequence[int] = (),
    ) -> list[int]:
        """The oracle: the next num_tokens of a prompt by itself, end tokens or not."""
        state, output = prefix_states(prompt_token_ids)[-1], []
        for count in range(num_tokens):
            token_id = self.next_token(
                state, sampling, sample_index=sample_index, num_output_tokens=count, eos_token_ids=eos_token_ids
            )
            output.append(token_id)
            state = extend(state, token_id)
        return output
