"""The grouped products of a mixture of experts: every tile of rows, all of one expert (moe_align.py), times its weight.

    gated:  h[a] = act(x[a // top_k] w_gate^T) * (x[a // top_k] w_up^T)     w: [num_experts, 2 columns, inner]
    plain:  y[a] = h[a] w^T                                                w: [num_experts, columns, inner]

a: an assignment. x, h, y: float32, bfloat16, float16, one dtype with w; products summed in float32, the gate applied
before the one rounding. The gated product reads x through the order and never gathers it. FP8 weights are those of
gpu/linear.py, weights of 8 and 4 bits those of gpu/few_bits.py, by their own inner loops, once for the gate and once
for the other half.

Must move: the weights of every expert that has a token, once; with few tokens that is nearly all. FLOPs: 2 per weight
and assignment. A tile is block_rows x BLOCK_N (both halves for the gated product), over the whole inner dimension:
experts times column tiles fill the chip without a split. A row's sums have one order for a given block_rows, which
is BLOCK_ROWS_FIXED when deterministic.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from shoal.kernels.fp8_linear import quantize_rows
from shoal.kernels.fp8_weight import Fp8ChannelWeight
from shoal.kernels.gpu.activation import activate
from shoal.kernels.gpu.few_bits import SPAN, few_bits_product
from shoal.kernels.gpu.fp8 import GROUP, as_bytes
from shoal.kernels.gpu.linear import DENSE, E4M3, finished, product
from shoal.kernels.gpu.moe_align import Alignment
from shoal.kernels.span_weight import SpanWeight
from shoal.kernels.weight import Weight

BLOCK_N, BLOCK_K, STAGES = 64, 64, 3
BLOCK_ROWS_FIXED = 64
"""One full tensor-core tile."""


@triton.jit(do_not_specialize=["num_assignments"])
def moe_gemm_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    x_scale_ptr,
    y_ptr,
    order_ptr,
    tile_experts_ptr,
    num_tiles_ptr,
    num_assignments,
    num_columns,
    inner,
    lead,
    divisor,
    x_stride,
    w_expert_stride,
    w_stride,
    y_stride,
    scale_expert_stride,
    scale_stride,
    scale_columns,
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WEIGHT: tl.constexpr,
    X_SCALE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    STAGES: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile. divisor: assignments that read one row of x: top_k, or 1. BITS: 8 or 4, as in few_bits.py, or 0; then
    WEIGHT: as in linear.py, with its scales; X_SCALE 1: x is e4m3 with a scale per row.
    """
    tile = tl.program_id(1)
    if tile < tl.load(num_tiles_ptr):
        expert = tl.load(tile_experts_ptr + tile).to(tl.int64)
        assignments = tl.load(order_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M))
        row_mask = (assignments < num_assignments)[:, None]
        columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        column_mask = (columns < num_columns)[None, :]
        x_rows = x_ptr + (assignments // divisor)[:, None].to(tl.int64) * x_stride
        w_rows = w_ptr + expert * w_expert_stride + columns[None, :].to(tl.int64) * w_stride
        up_offset = tl.cast(num_columns, tl.int64) * w_stride
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        # what pads a tile is assignment num_assignments, of a row one past the last: no more is read than of x
        rows, num_rows = assignments // divisor, num_assignments // divisor
        w_at, scale_at = w_ptr + expert * w_expert_stride, scale_ptr + expert * scale_expert_stride
        if BITS > 0:
            spans = tl.cdiv(lead + inner, SPAN)
            acc += few_bits_product(
                x_ptr, w_at, scale_at, 0, spans, num_rows, num_columns, inner, lead, x_stride, w_stride, scale_stride,
                rows, columns, BITS, ALIGNED, BLOCK_M, BLOCK_N, STAGES,
            ).trans()  # fmt: skip
            if GATED:
                w_at += up_offset
                scale_at += tl.cast(num_columns, tl.int64) * scale_stride
                up += few_bits_product(
                    x_ptr, w_at, scale_at, 0, spans, num_rows, num_columns, inner, lead, x_stride, w_stride,
                    scale_stride, rows, columns, BITS, ALIGNED, BLOCK_M, BLOCK_N, STAGES,
                ).trans()  # fmt: skip
        elif WEIGHT > 0:
            steps = tl.cdiv(inner, BLOCK_K)
            acc += product(
                x_ptr, w_at, scale_at, scale_at, 0, steps, num_rows, num_columns, inner, x_stride, w_stride,
                scale_stride, 0, 1, scale_columns, rows, columns, WEIGHT, X_SCALE, BLOCK_M, BLOCK_N, BLOCK_K,
                GROUP_SIZE,
            )  # fmt: skip
            acc = finished(acc, x_scale_ptr, scale_at, rows, columns, num_rows, num_columns, 1, X_SCALE, False)
            if GATED:
                w_at += up_offset
                scale_at += tl.cast(num_columns, tl.int64) * scale_stride
                up += product(
                    x_ptr, w_at, scale_at, scale_at, 0, steps, num_rows, num_columns, inner, x_stride, w_stride,
                    scale_stride, 0, 1, scale_columns, rows, columns, WEIGHT, X_SCALE, BLOCK_M, BLOCK_N, BLOCK_K,
                    GROUP_SIZE,
                )  # fmt: skip
                up = finished(up, x_scale_ptr, scale_at, rows, columns, num_rows, num_columns, 1, X_SCALE, False)
        else:
            for start in range(0, inner, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                x = tl.load(x_rows + k[None, :], mask=row_mask & (k < inner)[None, :], other=0.0)
                w_mask = (k < inner)[:, None] & column_mask
                w = tl.load(w_rows + k[:, None], mask=w_mask, other=0.0)
                acc = tl.dot(x, w, acc, input_precision="ieee")
                if GATED:
                    w = tl.load(w_rows + up_offset + k[:, None], mask=w_mask, other=0.0)
                    up = tl.dot(x, w, up, input_precision="ieee")
        if GATED:
            acc = activate(acc, KIND) * up
        y_at = y_ptr + assignments[:, None].to(tl.int64) * y_stride + columns[None, :]
        tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=row_mask & column_mask)


class Operands(NamedTuple):
    """What the kernel reads. scales, x_scales: the codes and x themselves where there are none; bits, lead: of a
    SpanWeight, else 0; kind: of linear.py; group: inputs of a scale; block_k: inner steps of a tile.
    """

    x: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    x_scales: torch.Tensor
    bits: int
    lead: int
    kind: int
    group: int
    block_k: int


def operands(x: torch.Tensor, weight: Weight) -> Operands:
    """x and a stack of experts' weights as the kernel takes them; x is rounded where they are FP8."""
    block_k = 32 if x.dtype == torch.float32 else BLOCK_K
    if isinstance(weight, Fp8ChannelWeight):
        codes, x_scales = quantize_rows(x, grouped=False)
        inner = max(weight.shape[-1], 1)
        return Operands(as_bytes(codes), as_bytes(weight.codes), weight.scales, x_scales, 0, 0, E4M3, inner, BLOCK_K)
    if isinstance(weight, SpanWeight):
        return Operands(x, weight.codes, weight.fours, x, weight.bits, weight.lead, DENSE, 1, block_k)
    assert isinstance(weight, torch.Tensor), type(weight)
    return Operands(x, weight, weight, x, 0, 0, DENSE, 1, block_k)


def launch_moe_gemm(
    x: torch.Tensor, weight: Weight, alignment: Alignment, top_k: int, kind: int | None = None
) -> torch.Tensor:
    """Returns [num_assignments, columns]; rows of experts not aligned are left undefined.

    x: [num_tokens, inner] with top_k choices each, or [num_assignments, inner] with top_k 1. weight: a tensor, or a
    stack of SpanWeights or Fp8ChannelWeights. kind: a value of activation.KINDS for the gated product, None for the
    plain one.
    """
    gated = kind is not None
    rows, inner = weight.shape[-2:]
    columns = rows // 2 if gated else rows
    assert x.stride(1) == 1 and x.shape == (alignment.none // top_k, inner)
    y = torch.empty((alignment.none, columns), dtype=x.dtype, device=x.device)
    max_tiles = alignment.tile_experts.shape[0]
    if max_tiles == 0 or columns == 0:
        return y
    given = operands(x, weight)
    assert given.codes.stride(2) == 1
    moe_gemm_kernel[(triton.cdiv(columns, BLOCK_N), max_tiles)](
        given.x,
        given.codes,
        given.scales,
        given.x_scales,
        y,
        alignment.order,
        alignment.tile_experts,
        alignment.num_tiles,
        alignment.none,
        columns,
        inner,
        given.lead,
        top_k,
        given.x.stride(0),
        given.codes.stride(0),
        given.codes.stride(1),
        y.stride(0),
        given.scales.stride(0),
        given.scales.stride(1),
        given.group,
        BITS=given.bits,
        ALIGNED=given.lead == 0 and inner % SPAN.value == 0,
        WEIGHT=given.kind,
        X_SCALE=int(given.x_scales is not given.x),
        GROUP_SIZE=GROUP,
        STAGES=STAGES,
        KIND=kind or 0,
        GATED=gated,
        BLOCK_M=alignment.block_rows,
        BLOCK_N=BLOCK_N,
        BLOCK_K=given.block_k,
        num_warps=8 if given.x.dtype == torch.float32 else 4,  # float32 operands lie in registers
        num_stages=STAGES,
    )
    return y
