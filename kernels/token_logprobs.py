"""Log-probabilities of chosen tokens and of the best ones, with the rank of the chosen token."""

import torch

from shoal.kernels.device import on_gpu


def token_logprobs(
    logits_RV: torch.Tensor, token_ids_R: torch.Tensor, num_best: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-softmax at the chosen token first, then at the `num_best` best tokens in falling order (lowest id first among
    equals).

    logits_RV: [num_rows, vocab_size] float32, before temperature and penalties. token_ids_R: [num_rows] int64.
    Returns (ids [num_rows, 1 + num_best] int64, logprobs float32 of the same shape, rank of the chosen token [num_rows]
    int64, 1 is best).
    """
    if on_gpu(logits_RV):
        return _gpu(logits_RV, token_ids_R, num_best)
    logprobs_RV = logits_RV.log_softmax(-1)
    chosen = logprobs_RV.gather(1, token_ids_R.unsqueeze(1))
    rank_R = (logprobs_RV > chosen).sum(-1) + 1
    if num_best == 0:
        return token_ids_R.unsqueeze(1), chosen, rank_R
    best, ids = best_tokens(logprobs_RV, min(num_best, logits_RV.shape[1]))
    return torch.cat([token_ids_R.unsqueeze(1), ids], 1), torch.cat([chosen, best], 1), rank_R


def _gpu(
    logits_RV: torch.Tensor, token_ids_R: torch.Tensor, num_best: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One pass for the sums, and no [num_rows, vocab_size] of log-probabilities."""
    from shoal.kernels.gpu.logprobs import launch_row_sums

    ids = token_ids_R.unsqueeze(1)
    picked = logits_RV.gather(1, ids)
    largest_R, total_R, above_R = launch_row_sums(logits_RV, picked.squeeze(1).contiguous())
    if num_best > 0:
        best, best_ids = best_tokens(logits_RV, min(num_best, logits_RV.shape[1]))
        ids, picked = torch.cat([ids, best_ids], 1), torch.cat([picked, best], 1)
    return ids, picked - largest_R.unsqueeze(1) - total_R.log().unsqueeze(1), above_R + 1


def best_tokens(values_RV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and ids of the `count` largest entries of every row, falling, lowest id first among equals: [num_rows,
    count] each."""
    best, ids = values_RV.topk(count, dim=-1)
    by_id = ids.argsort(dim=-1)
    best, ids = best.gather(1, by_id), ids.gather(1, by_id)
    order = best.argsort(dim=-1, descending=True, stable=True)
    return best.gather(1, order), ids.gather(1, order)
