"""Log-probabilities over shards of the vocabulary: every rank has some tokens' logits, and no rank all of them.

    log p(t) = x_t - lse      lse = log(sum over the ranks of exp(lse of a rank's shard))

A rank tells the log-sum-exp of its shard, how many of its logits are above the chosen one's, and its best tokens. Sums
are folded in rank order, so their bits depend on the row alone.
"""

from collections.abc import Sequence

import torch

from shoal.engine.messages import TokenLogprobs
from shoal.engine.sampler import slices
from shoal.kernels.argmax import argmax
from shoal.kernels.device import on_gpu
from shoal.kernels.token_logprobs import best_tokens
from shoal.parallel.communicator import Communicator


def sharded_logprobs(
    logits_RV: torch.Tensor, tokens_R: torch.Tensor, wanted: Sequence[int], first: int, group: Communicator
) -> list[TokenLogprobs]:
    """Of the chosen tokens, and of the `wanted` best ones of each row: equal on every rank. Collective over the group.

    logits_RV: [num_rows, tokens held] float32, raw, of the tokens from `first` on; ranks hold rising tokens, each at
    least max(wanted). tokens_R: [num_rows] int64 over the vocabulary, equal on every rank.
    """
    num_best = max(wanted)
    mine_R = held_logits(logits_RV, tokens_R - first)
    chosen_R = group.all_gather(mine_R.unsqueeze(1), [1] * group.size).amax(1)
    parts = [
        shard_scores(logits_RV[rows[0] : rows[-1] + 1], chosen_R[rows[0] : rows[-1] + 1], num_best, first)
        for rows in slices(list(range(len(wanted))), logits_RV.shape[1])
    ]
    width = 2 + 2 * num_best
    every_RSC = group.all_gather(torch.cat(parts), [width] * group.size).unflatten(1, (-1, width))
    lse_R, *others = every_RSC[:, :, 0].unbind(1)
    for other_R in others:
        lse_R = torch.logaddexp(lse_R, other_R)
    values_RB, ids_RB = every_RSC[:, :, 2 : 2 + num_best].flatten(1), every_RSC[:, :, 2 + num_best :].flatten(1)
    order_RB = values_RB.argsort(dim=1, descending=True, stable=True)[:, :num_best]  # among equals the lowest rank, id
    ids_RB = torch.cat([tokens_R.unsqueeze(1), ids_RB.gather(1, order_RB).long()], 1)
    values_RB = torch.cat([chosen_R.double().unsqueeze(1), values_RB.gather(1, order_RB)], 1)
    logprobs_RB = (values_RB - lse_R.unsqueeze(1)).float()
    ranks = (every_RSC[:, :, 1].sum(1) + 1).long().tolist()
    entries = zip(wanted, ids_RB.tolist(), logprobs_RB.tolist(), ranks, strict=True)
    return [
        TokenLogprobs(ids[: 1 + count], logprobs[: 1 + count], [rank, *range(1, 1 + count)])
        for count, ids, logprobs, rank in entries
    ]


def held_logits(logits_RV: torch.Tensor, columns_R: torch.Tensor) -> torch.Tensor:
    """One logit of every row, -inf where the column is not held: [num_rows]."""
    held_R = (columns_R >= 0) & (columns_R < logits_RV.shape[1])
    picked_R = logits_RV.gather(1, columns_R.where(held_R, 0).unsqueeze(1)).squeeze(1)
    return picked_R.where(held_R, float("-inf"))


def shard_scores(logits_RV: torch.Tensor, chosen_R: torch.Tensor, num_best: int, first: int) -> torch.Tensor:
    """What a rank tells of rows: [num_rows, 2 + 2 num_best] float64: log-sum-exp, logits above the chosen one, values
    and ids of the best tokens.
    """
    if on_gpu(logits_RV):
        from shoal.kernels.gpu.logprobs import launch_row_sums

        largest_R, total_R, above_R = launch_row_sums(logits_RV, chosen_R.contiguous())
        lse_R = largest_R + total_R.log()
    else:
        best_R1 = argmax(logits_RV).unsqueeze(1)  # a sum over a row's softmax has one order, a plain sum not always
        lse_R = (logits_RV.gather(1, best_R1) - logits_RV.log_softmax(-1).gather(1, best_R1)).squeeze(1)
        above_R = (logits_RV > chosen_R.unsqueeze(1)).sum(1)
    best, ids = best_tokens(logits_RV, num_best)
    sums_R2 = torch.stack([lse_R.double(), above_R.double()], 1)
    return torch.cat([sums_R2, best.double(), ids.double() + first], 1)
