"""Top-k, top-p (nucleus, arXiv:1904.09751) and min-p (arXiv:2407.01082): drop unlikely tokens by setting their logits
to -inf.

Applied after the temperature, in the order vLLM has: min-p, then top-k, then top-p on what top-k left. Ties at a
boundary: top-k keeps every token equal to the k-th; top-p keeps the lowest token ids first. The best token is always
kept.
"""

import torch

from shoal.kernels.token_logprobs import best_tokens

NUCLEUS_SLICE = 256  # tokens put in order before the whole vocabulary is


def filter_reference(logits_V: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """One row, by definition: [vocab_size] float32 -> the same with dropped tokens at -inf."""
    logits_V = logits_V.clone()
    if min_p > 0:
        probs = logits_V.softmax(-1)
        logits_V[probs < min_p * probs.max()] = float("-inf")
    if 0 < top_k < logits_V.numel():
        logits_V[logits_V < logits_V.sort(descending=True).values[top_k - 1]] = float("-inf")
    if top_p < 1:
        probs, total = logits_V.softmax(-1), 0.0
        for index in sorted(range(logits_V.numel()), key=lambda i: (-float(logits_V[i]), i)):
            if total >= top_p:
                logits_V[index] = float("-inf")
            total += float(probs[index])
    return logits_V


def filter_logits_(
    logits_RV: torch.Tensor, top_k_R: torch.Tensor, top_p_R: torch.Tensor, min_p_R: torch.Tensor
) -> torch.Tensor:
    """Filter every row in place and return the tensor.

    logits_RV: [num_rows, vocab_size] float32. top_k_R: int64, 0 or less keeps all. top_p_R, min_p_R: float32; 1 and 0
    keep all.
    """
    vocab = logits_RV.shape[1]
    if bool((min_p_R > 0).any()):
        limit = logits_RV.amax(-1, keepdim=True) + min_p_R.log().unsqueeze(1)
        logits_RV.masked_fill_(logits_RV < limit, float("-inf"))
    keep_R = torch.where((top_k_R > 0) & (top_k_R < vocab), top_k_R, vocab)
    if bool((keep_R < vocab).any()):
        largest = int(keep_R[keep_R < vocab].max())
        best = logits_RV.topk(largest, dim=-1).values
        limit = best.gather(1, (keep_R.clamp(max=largest) - 1).unsqueeze(1))
        limit = torch.where((keep_R < vocab).unsqueeze(1), limit, float("-inf"))
        logits_RV.masked_fill_(logits_RV < limit, float("-inf"))
    if bool((top_p_R < 1).any()):
        rows = (top_p_R < 1).nonzero().flatten()
        logits_RV[rows] = keep_nucleus(logits_RV[rows], top_p_R[rows].unsqueeze(1))
    return logits_RV


def keep_nucleus(logits_RV: torch.Tensor, top_p_R1: torch.Tensor) -> torch.Tensor:
    """Top-p of every row: [num_rows, vocab_size] with dropped tokens at -inf.

    The nucleus is nearly always among the best few: only those are put in order, and the whole vocabulary when the
    nucleus of some row does not end above the last of them (where a tie could cross the cut).
    """
    total_R1 = logits_RV.logsumexp(-1, keepdim=True)
    for count in (NUCLEUS_SLICE, logits_RV.shape[1]):
        if count < logits_RV.shape[1]:
            ordered, order = best_tokens(logits_RV, count)
        else:
            ordered, order = logits_RV.sort(dim=-1, descending=True, stable=True)
        probs = (ordered - total_R1).exp()
        kept = (probs.cumsum(-1) - probs) < top_p_R1
        kept[:, 0] = True
        last = ordered.gather(1, kept.sum(-1, keepdim=True) - 1)
        if count >= logits_RV.shape[1] or bool((last > ordered[:, -1:]).all()):
            break
    out_RV = torch.full_like(logits_RV, float("-inf"))
    return out_RV.scatter_(1, order, ordered.masked_fill(~kept, float("-inf")))
