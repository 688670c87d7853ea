"""Routing of tokens to experts: softmax over all experts in float32, then the top_k of them; ties to the lowest expert
(moe_routing.py).

logits: [num_tokens, num_experts], float32, bfloat16 or float16. Must move: the logits once, 12 bytes per chosen expert;
FLOPs: some 10 per logit and one comparison per logit and choice. One program holds a token's logits in registers.
"""

import torch
import triton
import triton.language as tl

MAX_EXPERTS = 4096


@triton.jit
def moe_routing_kernel(
    logits_ptr,
    weights_ptr,
    ids_ptr,
    num_experts,
    logits_stride,
    TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One token."""
    token = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK_E)
    choices = tl.arange(0, BLOCK_K)
    logits = tl.load(logits_ptr + token * logits_stride + experts, mask=experts < num_experts, other=float("-inf"))
    logits = logits.to(tl.float32)
    left = tl.exp(logits - tl.max(logits, axis=0))
    left = left / tl.sum(left, axis=0)
    left = tl.where(experts < num_experts, left, -1.0)
    weights = tl.zeros((BLOCK_K,), tl.float32)
    ids = tl.zeros((BLOCK_K,), tl.int64)
    for choice in tl.static_range(TOP_K):
        best = tl.max(left, axis=0)
        expert = tl.argmax(left, axis=0, tie_break_left=True)
        weights = tl.where(choices == choice, best, weights)
        ids = tl.where(choices == choice, expert.to(tl.int64), ids)
        left = tl.where(experts == expert, -1.0, left)
    if NORMALIZE:
        weights = weights / tl.sum(weights, axis=0)
    tl.store(weights_ptr + token * TOP_K + choices, weights, mask=choices < TOP_K)
    tl.store(ids_ptr + token * TOP_K + choices, ids, mask=choices < TOP_K)


def launch_moe_routing(logits: torch.Tensor, top_k: int, *, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (weights [num_tokens, top_k] float32, ids [num_tokens, top_k] int64), best first."""
    num_tokens, num_experts = logits.shape
    assert logits.stride(1) == 1 and 0 < top_k <= num_experts <= MAX_EXPERTS
    weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=logits.device)
    ids = torch.empty((num_tokens, top_k), dtype=torch.int64, device=logits.device)
    if num_tokens:
        block = triton.next_power_of_2(num_experts)
        moe_routing_kernel[(num_tokens,)](
            logits,
            weights,
            ids,
            num_experts,
            logits.stride(0),
            TOP_K=top_k,
            NORMALIZE=normalize,
            BLOCK_E=block,
            BLOCK_K=triton.next_power_of_2(top_k),
            num_warps=min(max(block // 128, 1), 8),  # one warp holds 128 logits without a barrier
        )
    return weights, ids
