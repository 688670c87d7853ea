"""Log-sum-exp of logits, and the logit and rank of a chosen token, in one pass over shards of the vocabulary.

    lse = m + log(sum over the vocabulary of e^(x - m)), m the largest      rank = 1 + (tokens with a larger logit)

logits: [num_rows, num_tokens] float32, the tokens from vocab_start on. Shards (of a rank, or of ranks) are joined from
their (m, sum, rank) in rising order of shards: the order of sums is fixed.

Must move: the logits once; FLOPs: about 10 and one exponential per logit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

SHARD = 4096
"""Tokens of a program: 16 for each of 256 threads."""


class RowSums(NamedTuple):
    """[num_rows] each: largest logit; sum of e^(logit - largest), float32; tokens above the chosen one, int64."""

    largest: torch.Tensor
    total: torch.Tensor
    above: torch.Tensor


@triton.jit
def row_sums_kernel(
    logits_ptr, chosen_ptr, largest_ptr, total_ptr, above_ptr, num_tokens, logits_stride, SHARD: tl.constexpr
):
    """SHARD tokens of one row; outputs [num_rows, shards]."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * SHARD + tl.arange(0, SHARD)
    mask = columns < num_tokens
    x = tl.load(logits_ptr + row.to(tl.int64) * logits_stride + columns, mask=mask, other=float("-inf"))
    largest = tl.max(x, axis=0)
    finite = tl.where(largest == float("-inf"), 0.0, largest)
    out = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(largest_ptr + out, largest)
    tl.store(total_ptr + out, tl.sum(tl.exp(x - finite), axis=0))
    tl.store(above_ptr + out, tl.sum((x > tl.load(chosen_ptr + row)).to(tl.int32), axis=0))


def launch_row_sums(logits: torch.Tensor, chosen: torch.Tensor) -> RowSums:
    """chosen: [num_rows] float32, the logits of the chosen tokens (of any shard)."""
    num_rows, num_tokens = logits.shape
    assert logits.dtype == torch.float32 and logits.stride(1) == 1 and num_tokens > 0
    shape = (num_rows, triton.cdiv(num_tokens, SHARD))
    largest, total = (torch.empty(shape, dtype=torch.float32, device=logits.device) for _ in range(2))
    above = torch.empty(shape, dtype=torch.int32, device=logits.device)
    if num_rows:
        row_sums_kernel[shape](
            logits, chosen, largest, total, above, num_tokens, logits.stride(0), SHARD=SHARD, num_warps=8
        )
    return join_row_sums(largest, total, above)


def join_row_sums(largest: torch.Tensor, total: torch.Tensor, above: torch.Tensor) -> RowSums:
    """Of [num_rows, shards] tensors, a shard's part each."""
    whole = largest.amax(1, keepdim=True)
    factor = torch.where(largest == float("-inf"), 0.0, (largest - whole).exp())
    return RowSums(whole.squeeze(1), (total * factor).sum(1), above.sum(1))
