"""TokenChooser: the tokens of the rows that sample, chosen by the last stage's tensor group.

A row that drops no unlikely tokens and wants no log-probabilities needs no whole logits. Every rank takes the best
token of its shard of the vocabulary, and three numbers of each rank decide: the value, the id, and the logit, by which
a row that has none to choose from is found. Penalties and biases are of single tokens, and noise depends on the token's
id alone, so the best of the shards' best is what one rank would take, bit for bit; equal values: the lowest id. The
shards of the other rows are gathered, and the group's rank 0 chooses.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from shoal.configs.sampling import SamplingParams
from shoal.engine.batch_state import SequenceState
from shoal.engine.messages import TokenLogprobs
from shoal.engine.sampler import Sampler
from shoal.model.decoder import Stage
from shoal.parallel.communicator import Communicator


class Choice(NamedTuple):
    """What one row samples. finite: whether there was a token to choose, of finite logit."""

    token: int
    logprobs: TokenLogprobs | None
    finite: bool


def needs_whole_logits(params: SamplingParams) -> bool:
    """Whether a row's token, or what is told of it, depends on the logits of all tokens together."""
    filters = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
    return params.logprobs is not None or (params.temperature > 0 and filters)


class TokenChooser:
    """Chooses with a stage that has the head. Collective over the tensor group: equal rows on every rank."""

    def __init__(self, stage: Stage, group: Communicator) -> None:
        self.stage, self.group = stage, group
        vocab_size, device = stage.spec.vocab_size, stage.device
        self.whole = Sampler(vocab_size, device)
        self.shard = Sampler(vocab_size, device, stage.shard.vocab(vocab_size))

    def __call__(self, hidden_RH: torch.Tensor, sequences: Sequence[SequenceState]) -> list[Choice]:
        """hidden_RH: the rows' last hidden state; sequences: their states. Returns a choice per row on the group's rank
        0, of which alone the result is to be used.
        """
        shard_RV = self.stage.head_shard(hidden_RH)
        gathered = [
            row for row, one in enumerate(sequences) if self.group.size == 1 or needs_whole_logits(one.sampling)
        ]
        apart = sorted(set(range(len(sequences))) - set(gathered))
        found: dict[int, Choice] = {}
        for rows, choose in ((apart, self.by_shards), (gathered, self.of_whole)):
            if rows:
                part_RV = shard_RV if len(rows) == len(sequences) else shard_RV[torch.tensor(rows).to(shard_RV.device)]
                found |= zip(rows, choose(part_RV, [sequences[row] for row in rows]), strict=False)
        return [found[row] for row in range(len(sequences))] if self.group.rank == 0 else []

    def by_shards(self, shard_RV: torch.Tensor, sequences: Sequence[SequenceState]) -> list[Choice]:
        """The best of the ranks' best."""
        logits_RV = self.stage.shard_logits(shard_RV)
        values_R, tokens_R = self.shard.best(logits_RV, sequences)
        picked_R = logits_at(logits_RV, tokens_R - self.shard.first)
        mine_R3 = torch.stack(
            [numbers.double() for numbers in (values_R, tokens_R, picked_R)], 1
        )  # exact for all three
        every_RS3 = self.group.all_gather(mine_R3, [3] * self.group.size).unflatten(1, (-1, 3))
        best_R11 = every_RS3[:, :, :1].argmax(1, keepdim=True)  # the first of equals, of the lowest ids
        _, tokens, picked = every_RS3.gather(1, best_R11.expand(-1, 1, 3)).squeeze(1).unbind(1)
        finite = picked.isfinite().tolist()
        return [Choice(int(token), None, fine) for token, fine in zip(tokens.tolist(), finite, strict=True)]

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
