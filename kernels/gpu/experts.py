"""The routed experts of a token: align, gated product, product, weighted sum. With many tokens per expert the products
are torch's grouped_mm, when the order of sums need not be fixed.
"""

import torch
import torch.nn.functional as F
import triton

from shoal.kernels.gpu.activation import launch_activation
from shoal.kernels.gpu.moe_align import launch_moe_align
from shoal.kernels.gpu.moe_combine import launch_moe_combine
from shoal.kernels.gpu.moe_gemm import BLOCK_ROWS_FIXED, launch_moe_gemm
from shoal.kernels.gpu.tables import GROUPED_MM_ALIGNMENT, GROUPED_MM_PRODUCTS
from shoal.kernels.weight import Weight


def takes_grouped_mm(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, rows_per_expert: float) -> bool:
    """Whether torch's grouped_mm is the better product: by the table, where it takes the tensors at all."""
    aligned = all(size % GROUPED_MM_ALIGNMENT == 0 for size in (x.shape[1], down.shape[2]))
    dense = gate_up.is_contiguous() and down.is_contiguous()
    large = rows_per_expert * down.shape[1] * down.shape[2] >= GROUPED_MM_PRODUCTS
    return x.is_cuda and x.dtype == torch.bfloat16 and aligned and dense and large


def launch_experts(
    x: torch.Tensor,
    gate_up: Weight,
    down: Weight,
    weights: torch.Tensor,
    ids: torch.Tensor,
    first: int,
    kind: int,
    *,
    deterministic: bool,
) -> torch.Tensor:
    """x: [num_tokens, hidden]; gate_up: [num_experts, 2 columns, hidden]; down: [num_experts, hidden, columns], tensors
    or rounded stacks; weights, ids: [num_tokens, top_k] float32, int64, over all experts; first: the first expert held;
    kind: a value of activation.KINDS. Returns [num_tokens, hidden], the sum over the experts held.
    """
    num_experts, top_k = gate_up.shape[0], ids.shape[1]
    weights, ids = weights.contiguous(), ids.contiguous()
    rows_per_expert = ids.numel() / max(num_experts, 1)
    if (
        isinstance(gate_up, torch.Tensor)
        and isinstance(down, torch.Tensor)
        and not deterministic
        and takes_grouped_mm(x, gate_up, down, rows_per_expert)
    ):
        y = grouped_mm_experts(x, gate_up, down, ids, first, kind)
    else:
        wanted = max(triton.next_power_of_2(int(rows_per_expert)), 16)
        block_rows = BLOCK_ROWS_FIXED if deterministic else min(wanted, BLOCK_ROWS_FIXED)
        alignment = launch_moe_align(ids, first, num_experts, block_rows)
        hidden = launch_moe_gemm(x, gate_up, alignment, top_k, kind)
        y = launch_moe_gemm(hidden, down, alignment, 1)
    return launch_moe_combine(y, weights, ids, first, num_experts)


def grouped_mm_experts(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, ids: torch.Tensor, first: int, kind: int
) -> torch.Tensor:
    """The products by grouped_mm: [num_assignments + 1, hidden] by assignment; the last row is waste."""
    alignment = launch_moe_align(ids, first, gate_up.shape[0], 1)
    ends = alignment.counts.cumsum(0, dtype=torch.int32)
    # After the experts held come rows that grouped_mm leaves alone: they read any token and are written to the waste.
    places = torch.arange(alignment.none, device=x.device)
    order = torch.where(places < ends[-1], alignment.order, alignment.none).long()
    gathered = x.index_select(0, (order // ids.shape[1]).clamp_(max=x.shape[0] - 1))
    hidden = F.grouped_mm(gathered, gate_up.transpose(1, 2), offs=ends)
    hidden, _ = launch_activation(hidden, kind, gated=True)
    y = torch.empty((alignment.none + 1, x.shape[1]), dtype=x.dtype, device=x.device)
    return y.index_copy_(0, order, F.grouped_mm(hidden, down.transpose(1, 2), offs=ends))
