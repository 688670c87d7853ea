"""The weighted sum of a token's experts: out[t] = sum over choices c of weights[t, c] * y[t * top_k + c], in float32,
in rising order of the experts' numbers, rounded once. Choices outside [first, first + num_experts) are left out.

y: [num_tokens * top_k, size], float32, bfloat16, float16. Must move: y read once, 1 / top_k of it written; FLOPs: 2 per
element of y. A program takes CHUNK columns of a token; the order of the sum is found again by each, which is cheaper
than a launch.
"""

import torch
import triton
import triton.language as tl

CHUNK = 1024
"""Columns of a program: 8 elements for each of 128 threads."""


@triton.jit
def moe_combine_kernel(
    y_ptr,
    weights_ptr,
    ids_ptr,
    out_ptr,
    first,
    num_experts,
    size,
    y_stride,
    out_stride,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """CHUNK columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    choices = tl.arange(0, BLOCK_K)
    ids = tl.load(ids_ptr + token * TOP_K + choices, mask=choices < TOP_K, other=1 << 40)
    weights = tl.load(weights_ptr + token * TOP_K + choices, mask=choices < TOP_K, other=0.0)
    ranks = tl.sum((ids[None, :] < ids[:, None]).to(tl.int32), axis=1)
    acc = tl.zeros((CHUNK,), tl.float32)
    for rank in tl.static_range(TOP_K):
        here = ranks == rank
        choice = tl.sum(tl.where(here, choices, 0), axis=0)
        weight = tl.sum(tl.where(here, weights, 0.0), axis=0)
        expert = tl.sum(tl.where(here, ids, 0), axis=0) - first
        held = tl.where((expert >= 0) & (expert < num_experts), size, 0)
        y = tl.load(y_ptr + (token * TOP_K + choice) * y_stride + columns, mask=columns < held, other=0.0)
        acc += y.to(tl.float32) * weight
    tl.store(out_ptr + token * out_stride + columns, acc.to(out_ptr.dtype.element_ty), mask=columns < size)


def launch_moe_combine(
    y: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, first: int, num_experts: int
) -> torch.Tensor:
    """weights: [num_tokens, top_k] float32; ids: the same, int64, different within a row; contiguous. Returns
    [num_tokens, size] in y's dtype.
    """
    num_tokens, top_k = ids.shape
    assert weights.is_contiguous() and ids.is_contiguous() and y.stride(1) == 1 and len(y) >= num_tokens * top_k
    out = torch.empty((num_tokens, y.shape[1]), dtype=y.dtype, device=y.device)
    if out.numel():
        moe_combine_kernel[(num_tokens, triton.cdiv(y.shape[1], CHUNK))](
            y,
            weights,
            ids,
            out,
            first,
            num_experts,
            y.shape[1],
            y.stride(0),
            out.stride(0),
            TOP_K=top_k,
            BLOCK_K=triton.next_power_of_2(top_k),
            CHUNK=CHUNK,
            num_warps=4,
        )
    return out
