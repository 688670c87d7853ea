"""The embedding and the head with the vocabulary sharded over the tensor group, in ranges of any sizes."""

from collections.abc import Sequence

import torch

from shoal.kernels.embedding import embedding
from shoal.kernels.linear import linear
from shoal.kernels.weight import Weight, embedding_rows
from shoal.parallel.communicator import Communicator
from shoal.parallel.sharding import Range


class VocabEmbedding:
    """Rows of the embedding sharded over the group: each rank looks up the ids of its range, one all-reduce joins them.

    weight: [local_rows, hidden_size], rows vocab[0] to vocab[1] of the table. Exact: every sum has one term that is not
    zero. Layout in: ids whole on every rank; out: whole on every rank.
    """

    def __init__(self, weight: Weight, vocab: Range, group: Communicator) -> None:
        assert weight.shape[0] == vocab[1] - vocab[0], (weight.shape, vocab)
        self.weight, self.vocab, self.group = weight, vocab, group

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: any shape, integers within the vocabulary. Returns [*ids.shape, hidden_size], a new tensor."""
        if self.group.size == 1:
            return embedding_rows(self.weight, ids)
        return self.group.all_reduce(embedding(ids, self.weight, self.vocab[0]))


class VocabHead:
    """Logits with the vocabulary sharded over the group, one all-gather in it; or each rank's shard of them, without.

    weight: [local_vocab, hidden_size] (it may be the embedding's); bias: [local_vocab] or None; ranges: every rank's
    range of the vocabulary, in rank order. Layout in: hidden states whole on every rank; out: logits whole on every
    rank.
    """

    def __init__(
        self,
        weight: Weight,
        bias: torch.Tensor | None,
        ranges: Sequence[Range],
        group: Communicator,
        *,
        deterministic: bool,
    ) -> None:
        self.weight, self.bias, self.group, self.deterministic = weight, bias, group, deterministic
        self.sizes = [stop - start for start, stop in ranges]
        assert len(ranges) == group.size and weight.shape[0] == self.sizes[group.rank], (weight.shape, ranges)

    def shard(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [rows, hidden_size]. Returns this rank's logits [rows, local_vocab], in hidden's type."""
        return linear(hidden, self.weight, self.bias, deterministic=self.deterministic)

    def gather(self, shard: torch.Tensor) -> torch.Tensor:
        """The ranks' shards, or the same rows of each, joined: float32 [rows, vocab_size]."""
        whole = shard if self.group.size == 1 else self.group.all_gather(shard, self.sizes)
        return whole.float()

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [rows, hidden_size]. Returns float32 logits [rows, vocab_size]."""
        return self.gather(self.shard(hidden))


def best_of_shards(
    values_R: torch.Tensor, tokens_R: torch.Tensor, picked_R: torch.Tensor, group: Communicator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every rank's best token of its shard the best of all, the lowest id among equals. values: what decides;
    tokens: ids; picked: logits; [rows] each. Returns (tokens, picked), [rows] float64, equal on every rank. One
    all-gather.
    """
    mine_R3 = torch.stack([numbers.double() for numbers in (values_R, tokens_R, picked_R)], 1)  # exact for all three
    every_RS3 = group.all_gather(mine_R3, [3] * group.size).unflatten(1, (-1, 3))
    best_R11 = every_RS3[:, :, :1].argmax(1, keepdim=True)  # the first of equals, of the lowest ids
    _, tokens, picked = every_RS3.gather(1, best_R11.expand(-1, 1, 3)).squeeze(1).unbind(1)
    return tokens, picked
