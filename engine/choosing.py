"""TokenChooser: the tokens of the rows that sample, chosen by the last stage's tensor group, and the scores of prompts.

A row that drops no unlikely tokens needs no whole logits. Every rank takes the best token of its shard of the
vocabulary, and three numbers of each rank decide: the value, the id, and the logit, by which a row that has none to
choose from is found. Penalties and biases are of single tokens, and noise depends on the token's id alone, so the best
of the shards' best is what one rank would take, bit for bit; equal values: the lowest id. Log-probabilities are joined
likewise (engine/shard_logprobs.py). The shards of the other rows are gathered, and the group's rank 0 chooses.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from shoal.configs.sampling import SamplingParams
from shoal.engine.messages import TokenLogprobs
from shoal.engine.sampler import Sampler, has_penalties, logprobs_of, masks_or_biases
from shoal.engine.sequence_state import SequenceState
from shoal.engine.shard_logprobs import sharded_logprobs
from shoal.kernels.whole_step import StepOutput
from shoal.model.decoder import Stage
from shoal.parallel.communicator import Communicator
from shoal.parallel.embedding import best_of_shards


class Choice(NamedTuple):
    """What one row samples. finite: whether there was a token to choose, of finite logit."""

    token: int
    logprobs: TokenLogprobs | None
    finite: bool


def choices_of(output: StepOutput) -> list[Choice]:
    """The best tokens as they are."""
    return [*map(Choice, output.best, itertools.repeat(None), map(math.isfinite, output.values))]


def filters(params: SamplingParams) -> bool:
    """Whether a row drops unlikely tokens, which depend on the logits of all tokens together."""
    return params.temperature > 0 and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)


def is_plain(sequence: SequenceState) -> bool:
    """Whether a row chooses from the logits as they are, and wants to know the token alone."""
    params = sequence.sampling
    if sequence.plain is None:
        asks = params.logprobs is not None or has_penalties(params)
        sequence.plain = not asks and not masks_or_biases(params, sequence)
    return sequence.plain and (not params.min_tokens or sequence.num_output_tokens >= params.min_tokens)


class TokenChooser:
    """Chooses with a stage that has the head. Collective over the tensor group: equal rows on every rank."""

    def __init__(self, stage: Stage, group: Communicator) -> None:
        self.stage, self.group = stage, group
        vocab_size, device = stage.spec.vocab_size, stage.device
        self.whole = Sampler(vocab_size, device)
        self.shard = Sampler(vocab_size, device, stage.shard.vocab(vocab_size))
        self.fewest = min(stop - start for start, stop in stage.shard.vocab_ranges(vocab_size))

    def __call__(self, hidden_RH: torch.Tensor, sequences: Sequence[SequenceState]) -> list[Choice]:
        """hidden_RH: the rows' last hidden state; sequences: their states. Returns a choice per row on the group's rank
        0, of which alone the result is to be used.
        """
        return self.choose(self.stage.head_shard(hidden_RH), sequences)

    def of_step(self, output: StepOutput, sequences: Sequence[SequenceState]) -> list[Choice]:
        """A choice per row of what Stage.step gave, on the group's rank 0."""
        if all(is_plain(one) and self.decided_in_step(output, one.sampling) for one in sequences):
            return choices_of(output)
        return self.choose(output.head_RV, sequences)

    def is_decided_in_graphs(self, sequence: SequenceState) -> bool:
        """Whether a step whose output is sampled decides the row."""
        return is_plain(sequence) and (self.group.size == 1 or not filters(sequence.sampling))

    def decided_in_step(self, output: StepOutput, params: SamplingParams) -> bool:
        """Whether a plain row's token is the best one the step found."""
        return params.temperature == 0 or (output.sampled and (self.group.size == 1 or not filters(params)))

    @torch.inference_mode()
    def choose(self, shard_RV: torch.Tensor, sequences: Sequence[SequenceState]) -> list[Choice]:
        """A choice per row of a head's shard, which may be overwritten."""
        gathered = [row for row, one in enumerate(sequences) if not self.decided_by_shards(one.sampling)]
        apart = sorted(set(range(len(sequences))) - set(gathered))
        found: dict[int, Choice] = {}
        for rows, choose in ((apart, self.by_shards), (gathered, self.of_whole)):
            if rows:
                part_RV = shard_RV if len(rows) == len(sequences) else shard_RV[torch.tensor(rows).to(shard_RV.device)]
                found |= zip(rows, choose(part_RV, [sequences[row] for row in rows]), strict=False)
        return [found[row] for row in range(len(sequences))] if self.group.rank == 0 else []

    def decided_by_shards(self, params: SamplingParams) -> bool:
        """Whether a row's logits need not be gathered."""
        return self.group.size > 1 and not filters(params) and (params.logprobs or 0) <= self.fewest

    def scores(self, hidden_RH: torch.Tensor, token_ids: Sequence[int], count: int) -> list[TokenLogprobs | None]:
        """Log-probabilities of these tokens, one per row, and of the `count` best ones; on the group's rank 0.
        Collective.
        """
        shard_RV = self.stage.head_shard(hidden_RH)
        tokens_R = torch.tensor(token_ids, device=shard_RV.device)
        if self.group.size > 1 and count <= self.fewest:
            logits_RV, wanted = self.stage.shard_logits(shard_RV), [count] * len(token_ids)
            return [*sharded_logprobs(logits_RV, tokens_R, wanted, self.shard.first, self.group)]
        logits_RV = self.stage.gather_logits(shard_RV)
        return logprobs_of(logits_RV, tokens_R, [count] * len(token_ids)) if self.group.rank == 0 else []

    def by_shards(self, shard_RV: torch.Tensor, sequences: Sequence[SequenceState]) -> list[Choice]:
        """The best of the ranks' best."""
        logits_RV = self.stage.shard_logits(shard_RV)
        wanted = {row: one.sampling.logprobs for row, one in enumerate(sequences) if one.sampling.logprobs is not None}
        raw_RV = logits_RV[torch.tensor([*wanted], dtype=torch.int64).to(logits_RV.device)]
        values_R, tokens_R = self.shard.best(logits_RV, sequences)
        picked_R = logits_at(logits_RV, tokens_R - self.shard.first)
        tokens, picked = best_of_shards(values_R, tokens_R, picked_R, self.group)
        scores = self.scores_of(raw_RV, tokens.long(), wanted)
        finite = zip(tokens.tolist(), picked.isfinite().tolist(), strict=True)
        return [Choice(int(token), scores.get(row), fine) for row, (token, fine) in enumerate(finite)]

    def scores_of(
        self, raw_RV: torch.Tensor, tokens_R: torch.Tensor, wanted: Mapping[int, int]
    ) -> dict[int, TokenLogprobs]:
        """Log-probabilities by row. raw_RV: this rank's logits of the rows that want some, before they were edited;
        tokens_R: of all rows.
        """
        if not wanted:
            return {}
        chosen_R = tokens_R[torch.tensor([*wanted]).to(tokens_R.device)]
        counts = list(wanted.values())
        return dict(zip(wanted, sharded_logprobs(raw_RV, chosen_R, counts, self.shard.first, self.group), strict=True))

    def of_whole(self, shard_RV: torch.Tensor, sequences: Sequence[SequenceState]) -> list[Choice]:
        """From the logits of all tokens, on the group's rank 0; nothing elsewhere."""
        logits_RV = self.stage.gather_logits(shard_RV)
        if self.group.rank != 0:
            return []
        tokens, logprobs = self.whole(logits_RV, sequences)
        finite = logits_at(logits_RV, torch.tensor(tokens).to(logits_RV.device)).isfinite().tolist()
        return [Choice(*one) for one in zip(tokens, logprobs, finite, strict=True)]


def logits_at(logits_RV: torch.Tensor, columns_R: torch.Tensor) -> torch.Tensor:
    """One logit of every row: [num_rows]."""
    return logits_RV.gather(1, columns_R.unsqueeze(1)).squeeze(1)
