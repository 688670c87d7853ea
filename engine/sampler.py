"""Sampler: logits of the rows that sample to token ids and log-probabilities; of the whole vocabulary on the last
stage's tensor rank 0, or of a rank's shard of it (engine/choosing.py says which, and joins shards).

Order, as in vLLM: log-probabilities are of the raw logits; then allowed ids, bad words, min_tokens, logit_bias,
penalties; greedy rows take the best token; others are divided by the temperature, filtered (min-p, top-k, top-p), and
the best of logits + Gumbel noise is the sample, which is an exact draw from the filtered softmax. Equal logits: the
lowest token id wins.
"""

from collections.abc import Iterable, Sequence

import torch

from shoal.configs.sampling import SamplingParams
from shoal.engine.messages import TokenLogprobs
from shoal.engine.sequence_state import SequenceState
from shoal.kernels.argmax import argmax
from shoal.kernels.device import on_gpu
from shoal.kernels.logit_filters import filter_logits_
from shoal.kernels.penalties import apply_penalties_
from shoal.kernels.philox import gumbel_noise, gumbel_noise_at
from shoal.kernels.token_logprobs import best_tokens, token_logprobs
from shoal.model.memory_estimate import SAMPLING_SLICE
from shoal.parallel.sharding import Range

MINUS_INF = float("-inf")
FEW_KEPT = 8  # when filters keep less than one in this many tokens, only those get noise


class TokenCounts:
    """Which tokens a sequence has seen, kept up to date as its output grows: [vocab_size] each."""

    def __init__(self, sequence: SequenceState, vocab_size: int, device: torch.device) -> None:
        prompt = torch.tensor(sequence.token_ids[: sequence.num_prompt_tokens], device=device)
        self.prompt_seen = torch.zeros(vocab_size, dtype=torch.bool, device=device).index_fill_(0, prompt, True)
        self.output_counts = torch.zeros(vocab_size, dtype=torch.int32, device=device)
        self.counted = sequence.num_prompt_tokens

    def update(self, sequence: SequenceState) -> None:
        """Count the output tokens appended since the last call."""
        new = sequence.token_ids[self.counted :]
        if new:
            ids = torch.tensor(new, device=self.output_counts.device)
            self.output_counts.index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
            self.counted += len(new)


def has_penalties(params: SamplingParams) -> bool:
    """Whether the request's logits depend on the tokens it has seen."""
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


def masks_or_biases(params: SamplingParams, sequence: SequenceState) -> bool:
    """Whether single tokens' logits may be masked or biased at any position, for more than min_tokens."""
    return bool(params.allowed_token_ids or params.logit_bias or sequence.bad_words_token_ids)


def edits_logits(params: SamplingParams, sequence: SequenceState) -> bool:
    """Whether single tokens' logits are masked or biased for this request at this position."""
    return masks_or_biases(params, sequence) or sequence.num_output_tokens < params.min_tokens


def banned_tokens(sequence: SequenceState) -> list[int]:
    """Tokens that may not come next: the ends of bad words whose beginning stands at the end of the output, and end
    tokens while min_tokens is not reached."""
    banned = []
    for word in sequence.bad_words_token_ids:
        begin = len(word) - 1
        tail = sequence.token_ids[len(sequence.token_ids) - begin :] if begin else []
        if begin <= sequence.num_output_tokens and tail == word[:-1]:
            banned.append(word[-1])
    if sequence.num_output_tokens < sequence.sampling.min_tokens:
        banned += sequence.eos_token_ids + (sequence.sampling.stop_token_ids or [])
    return banned


def held_columns(ids: Iterable[int], first: int, logits_V: torch.Tensor) -> torch.Tensor:
    """Where the tokens of these ids stand in the logits of the tokens from `first` on; those elsewhere are left out."""
    held = [token - first for token in ids if 0 <= token - first < len(logits_V)]
    return torch.tensor(held, dtype=torch.int64, device=logits_V.device)


def keep_allowed_(logits_V: torch.Tensor, params: SamplingParams, first: int) -> None:
    """Ban all tokens but the allowed ones, when there are such, in place. first: the first token of the logits."""
    if params.allowed_token_ids:
        allowed = held_columns(params.allowed_token_ids, first, logits_V)
        kept = logits_V[allowed]
        logits_V.fill_(MINUS_INF)
        logits_V[allowed] = kept


def edit_row_(logits_V: torch.Tensor, sequence: SequenceState, first: int) -> None:
    """Allowed ids, bad words, min_tokens and logit_bias of one row, in place. first: the first token of the logits."""
    params = sequence.sampling
    keep_allowed_(logits_V, params, first)
    banned = banned_tokens(sequence)
    if banned:
        logits_V[held_columns(banned, first, logits_V)] = MINUS_INF
    biases = [(token, bias) for token, bias in (params.logit_bias or {}).items() if 0 <= token - first < len(logits_V)]
    if biases:
        ids, values = zip(*biases, strict=True)
        logits_V[held_columns(ids, first, logits_V)] += torch.tensor(values, device=logits_V.device)


class Sampler:
    """Samples the rows of a step. Holds nothing but the counts that penalties need, dropped with their sequence.

    held: the tokens whose logits it is given; default: the whole vocabulary, which rows that filter need.
    """

    def __init__(self, vocab_size: int, device: torch.device, held: Range | None = None) -> None:
        self.vocab_size, self.device = vocab_size, device
        self.first, self.stop = held or (0, vocab_size)

    def __call__(
        self, logits_RV: torch.Tensor, sequences: Sequence[SequenceState]
    ) -> tuple[list[int], list[TokenLogprobs | None]]:
        """One token of the whole vocabulary per row, and its log-probabilities where the request asked for them.

        Arguments as of `best`.
        """
        wanted = [sequence.sampling.logprobs for sequence in sequences]
        raw_RV = logits_RV.clone() if any(count is not None for count in wanted) else logits_RV
        _, tokens_R = self.best(logits_RV, sequences)
        return tokens_R.tolist(), logprobs_of(raw_RV, tokens_R, wanted)

    def best(self, logits_RV: torch.Tensor, sequences: Sequence[SequenceState]) -> tuple[torch.Tensor, torch.Tensor]:
        """The best token held of every row: its value (edited logit, or over temperature with noise) [num_rows]
        float32, not a number or infinite where a logit is not a number; and its id [num_rows] int64.

        logits_RV: [num_rows, tokens held] float32, edited in place. sequences: the rows' states, their tokens complete
        up to this position.
        """
        if on_gpu(logits_RV):
            return self.fused(logits_RV, sequences)
        self.edit_(logits_RV, sequences)
        return self.choose(logits_RV, sequences)

    def fused(self, logits_RV: torch.Tensor, sequences: Sequence[SequenceState]) -> tuple[torch.Tensor, torch.Tensor]:
        """What edit_ and choose do, in the Triton kernels."""
        from shoal.kernels.gpu.sample_rows import RowPenalties, RowSampling, sample_rows

        rows = []
        for row, sequence in enumerate(sequences):
            params, penalties = sequence.sampling, None
            keep_allowed_(logits_RV[row], params, self.first)
            if has_penalties(params):
                counts = self.counts(sequence)
                penalties = RowPenalties(
                    counts.prompt_seen[self.first : self.stop],
                    counts.output_counts[self.first : self.stop],
                    params.presence_penalty,
                    params.frequency_penalty,
                    params.repetition_penalty,
                )
            rows.append(
                RowSampling(
                    params.temperature,
                    params.top_k,
                    params.top_p,
                    params.min_p,
                    sequence.seed,
                    sequence.num_output_tokens,
                    sequence.sample_index,
                    [(token, MINUS_INF) for token in banned_tokens(sequence)] + list((params.logit_bias or {}).items()),
                    penalties,
                )
            )
        return sample_rows(logits_RV, rows, self.first)

    def edit_(self, logits_RV: torch.Tensor, sequences: Sequence[SequenceState]) -> None:
        """Masks, biases and penalties, in place."""
        for row, sequence in enumerate(sequences):
            if edits_logits(sequence.sampling, sequence):
                edit_row_(logits_RV[row], sequence, self.first)
        penalised = [row for row, sequence in enumerate(sequences) if has_penalties(sequence.sampling)]
        for rows in slices(penalised, logits_RV.shape[1]):
            self.penalise_(logits_RV, sequences, rows)

    def penalise_(self, logits_RV: torch.Tensor, sequences: Sequence[SequenceState], rows: list[int]) -> None:
        """Penalties of these rows, in place."""
        counts = [self.counts(sequences[row]) for row in rows]
        params = [sequences[row].sampling for row in rows]
        index = torch.tensor(rows, device=self.device)
        logits_RV[index] = apply_penalties_(
            logits_RV[index],
            torch.stack([count.prompt_seen[self.first : self.stop] for count in counts]),
            torch.stack([count.output_counts[self.first : self.stop] for count in counts]),
            self.column([p.presence_penalty for p in params]),
            self.column([p.frequency_penalty for p in params]),
            self.column([p.repetition_penalty for p in params]),
        )

    def counts(self, sequence: SequenceState) -> TokenCounts:
        """The sequence's counts, made when first needed and brought up to date."""
        if sequence.counts is None:
            sequence.counts = TokenCounts(sequence, self.vocab_size, self.device)
        sequence.counts.update(sequence)
        return sequence.counts

    def column(self, values: list[float]) -> torch.Tensor:
        """Per-row numbers as a float32 tensor."""
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def choose(self, logits_RV: torch.Tensor, sequences: Sequence[SequenceState]) -> tuple[torch.Tensor, torch.Tensor]:
        """Greedy or sampled: values and ids."""
        columns_R = argmax(logits_RV)
        values_R = logits_RV.gather(1, columns_R.unsqueeze(1)).squeeze(1)
        random = [row for row, sequence in enumerate(sequences) if sequence.sampling.temperature > 0]
        for rows in slices(random, logits_RV.shape[1]):
            index = torch.tensor(rows, device=self.device)
            values_R[index], columns_R[index] = self.sample(logits_RV[index], [sequences[row] for row in rows])
        return values_R, columns_R + self.first

    def sample(self, logits_RV: torch.Tensor, sequences: Sequence[SequenceState]) -> tuple[torch.Tensor, torch.Tensor]:
        """The best of logits over temperature, filtered, plus Gumbel noise: values and columns."""
        params = [sequence.sampling for sequence in sequences]
        logits_RV = logits_RV / self.column([p.temperature for p in params]).unsqueeze(1)
        filter_logits_(
            logits_RV,
            torch.tensor([p.top_k for p in params], device=self.device),
            self.column([p.top_p for p in params]),
            self.column([p.min_p for p in params]),
        )
        counter = (
            torch.tensor([sequence.seed for sequence in sequences], device=self.device),
            torch.tensor([sequence.num_output_tokens for sequence in sequences], device=self.device),
            torch.tensor([sequence.sample_index for sequence in sequences], device=self.device),
        )
        most_kept = int((logits_RV > MINUS_INF).sum(-1).max())
        if most_kept * FEW_KEPT >= logits_RV.shape[1] or most_kept == 0:
            best_R1 = argmax(logits_RV.add_(gumbel_noise(*counter, self.first, self.stop))).unsqueeze(1)
            return logits_RV.gather(1, best_R1).squeeze(1), best_R1.squeeze(1)
        kept_RK, columns_RK = best_tokens(logits_RV, most_kept)
        noisy_RK = kept_RK.add_(gumbel_noise_at(*counter, columns_RK + self.first))
        best_R1 = noisy_RK.argmax(-1, keepdim=True)
        return noisy_RK.gather(1, best_R1).squeeze(1), columns_RK.gather(1, best_R1).squeeze(1)


def logprobs_of(
    logits_RV: torch.Tensor, tokens_R: torch.Tensor, wanted: Sequence[int | None]
) -> list[TokenLogprobs | None]:
    """Log-probabilities of the chosen and the best tokens of the rows that want them; one entry per row."""
    found: list[TokenLogprobs | None] = [None] * len(wanted)
    rows = [row for row, count in enumerate(wanted) if count is not None]
    if not rows:
        return found
    num_best = max(wanted[row] or 0 for row in rows)
    for some in slices(rows, logits_RV.shape[1]):
        index = torch.tensor(some, device=logits_RV.device)
        ids, logprobs, ranks = token_logprobs(logits_RV[index], tokens_R[index], num_best)
        for row, row_ids, row_logprobs, rank in zip(some, ids.tolist(), logprobs.tolist(), ranks.tolist(), strict=True):
            count = 1 + min(wanted[row] or 0, len(row_ids) - 1)
            found[row] = TokenLogprobs(row_ids[:count], row_logprobs[:count], [rank, *range(1, count)])
    return found


def slices(rows: list[int], vocab_size: int) -> list[list[int]]:
    """The rows in groups whose logits are at most SAMPLING_SLICE numbers: rows are independent, this bounds memory."""
    step = max(1, SAMPLING_SLICE // vocab_size)
    return [rows[start : start + step] for start in range(0, len(rows), step)]
