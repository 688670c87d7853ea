"""y = x w^T + b with weights of 8 or 4 bits, w[n, k] = code[n, k] scale[n, k // 32], in the span order of
kernels/quantized_format.py.

x: [rows, inner], float32, bfloat16, float16, any row stride; codes: int32 [columns, words]; the scales of a span's four
groups are read as one number: int64 [columns, spans]. A weight cut within a group has `lead` inputs more before the
first. Codes are exact in x's dtype, so only the products are rounded; a group's sum is taken in float32, and times its
scale.

Must move: codes and scales once, 1.06 or 0.56 bytes a weight; FLOPs: 2 per row and weight, and 4 to 5 instructions to
make a weight a number, which for few rows take as long as the memory on an H200 (4 bits) or most of it (8).
Why it is fast: a program's weights are the left operand, which the tensor cores take from registers: codes become
numbers where they were loaded. The word that holds input i of a span's first group, or its first half, holds the same
input of the other groups or halves, so all that a lane of bits gives is multiplied with neighbouring inputs.

Splits, parts and determinism: as gpu/linear.py.
"""

import torch
import triton
import triton.language as tl

from shoal.kernels import quantized_format
from shoal.kernels.gpu.linear import ADDED_COLUMNS, ROWS_FIXED, TARGET_PROGRAMS, Cut, add_parts_kernel
from shoal.kernels.span_weight import SpanWeight

SPAN = tl.constexpr(quantized_format.SPAN)
"""Inputs of a step: four groups."""
COLUMNS = {8: 64, 4: 128}
"""Of a tile; with three stages the fastest on an H200 of those tried, for 1 to 64 rows."""
STAGES = 3
MIN_SPANS = 4
"""Of a split: fewer do not pay for the workspace."""


@triton.jit
def numbers(words, lane, BITS: tl.constexpr, dtype: tl.constexpr):
    """The codes in a lane of the words, less their offset. Those of 4 bits are the last bits of a bfloat16 of 128 and
    more, all others those of a float32 of 2 ** 23 and more.
    """
    code = (words >> (BITS * lane)) & (2**BITS - 1)
    if BITS == 4 and dtype == tl.bfloat16:
        return ((code | 0x4300).to(tl.uint16).to(tl.bfloat16, bitcast=True) - 136.0).to(dtype)
    return ((code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + 2 ** (BITS - 1))).to(dtype)


@triton.jit
def few_bits_product(
    x_ptr, codes_ptr, scales_ptr, first, last, num_rows, num_columns, inner, lead, x_stride, codes_stride,
    scales_stride, rows, columns,
    BITS: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[COLUMNS, ROWS] float32: the sums over the spans [first, last). Rows and columns beyond the last are taken for
    the last. ALIGNED: the inputs are whole spans, and no group is cut.
    """
    LANES: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = SPAN // LANES
    word = tl.arange(0, WORDS)
    held = tl.minimum(columns, num_columns - 1).to(tl.int64)
    x_at = x_ptr + tl.minimum(rows, num_rows - 1)[None, :].to(tl.int64) * x_stride + word[:, None]
    codes_at = codes_ptr + held[:, None] * codes_stride + word[None, :]
    acc = tl.zeros((COLUMNS, ROWS), tl.float32)
    for span in tl.range(first, last, num_stages=STAGES):
        words = tl.load(codes_at + span * WORDS)
        four = tl.load(scales_ptr + held * scales_stride + span)
        for group in tl.static_range(4):
            total = tl.zeros((COLUMNS, ROWS), tl.float32)
            for part in tl.static_range(LANES // 4):
                start = span * SPAN + (group * (LANES // 4) + part) * WORDS - lead
                if ALIGNED:
                    x = tl.load(x_at + start)
                else:
                    inside = (start + word >= 0) & (start + word < inner)
                    x = tl.load(x_at + start, mask=inside[:, None], other=0.0)
                lane = numbers(words, group * (LANES // 4) + part, BITS, x.dtype)
                total = tl.dot(lane, x, total, input_precision="ieee")
            scale = ((four >> (16 * group)).to(tl.int32) << 16).to(tl.float32, bitcast=True)
            acc += total * scale[:, None]
    return acc


@triton.jit(do_not_specialize=["num_rows", "splits", "spans_per_split"])
def few_bits_kernel(
    x_ptr, codes_ptr, scales_ptr, bias_ptr, y_ptr, parts_ptr, num_rows, num_columns, inner, lead, splits,
    spans_per_split, x_stride, codes_stride, y_stride, scales_stride,
    BITS: tl.constexpr, ALIGNED: tl.constexpr, HAS_BIAS: tl.constexpr, PARTS: tl.constexpr, LOOPED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile. PARTS: over the split program_id(2), to the workspace [splits, num_rows, num_columns]; else over all of
    them, LOOPED: there are several.
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    mask = (columns < num_columns)[:, None] & (rows < num_rows)[None, :]
    spans, part = tl.cdiv(lead + inner, SPAN), tl.program_id(2)
    first = part * spans_per_split
    acc = few_bits_product(
        x_ptr, codes_ptr, scales_ptr, first, tl.minimum(first + spans_per_split, spans), num_rows, num_columns,
        inner, lead, x_stride, codes_stride, scales_stride, rows, columns, BITS, ALIGNED, ROWS, COLUMNS, STAGES,
    )  # fmt: skip
    if LOOPED:
        for split in range(1, splits):
            first = split * spans_per_split
            acc += few_bits_product(
                x_ptr, codes_ptr, scales_ptr, first, tl.minimum(first + spans_per_split, spans), num_rows,
                num_columns, inner, lead, x_stride, codes_stride, scales_stride, rows, columns, BITS, ALIGNED, ROWS,
                COLUMNS, STAGES,
            )  # fmt: skip
    if PARTS:
        at = (part.to(tl.int64) * num_rows + rows[None, :]) * num_columns + columns[:, None]
        tl.store(parts_ptr + at, acc, mask=mask)
    else:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[:, None]
        y_at = y_ptr + rows[None, :].to(tl.int64) * y_stride + columns[:, None]
        tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=mask)


def cut_few_bits(num_rows: int, columns: int, spans: int, bits: int, *, deterministic: bool) -> Cut:
    """How the product is divided. Deterministic: of the weight alone, but for `apart`, which changes no sum."""
    tile = COLUMNS[bits]
    wanted = max(TARGET_PROGRAMS // max(triton.cdiv(columns, tile), 1), 1)
    span = max(triton.cdiv(spans, wanted), min(MIN_SPANS, spans), 1)
    splits = max(triton.cdiv(spans, span), 1)
    rows = ROWS_FIXED if deterministic else min(max(triton.next_power_of_2(num_rows), 16), ROWS_FIXED)
    return Cut(rows, tile, SPAN.value, splits, span, splits > 1 and num_rows <= ROWS_FIXED)


def launch_few_bits(
    x: torch.Tensor, weight: SpanWeight, bias: torch.Tensor | None, *, deterministic: bool
) -> torch.Tensor:
    """Returns [rows, columns] in x's dtype."""
    (num_rows, inner), columns = x.shape, weight.shape[0]
    assert x.stride(1) == 1 and x.shape[1] == weight.shape[1], (x.shape, x.stride(), weight.shape)
    y = torch.empty((num_rows, columns), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    codes, fours, bits = weight.codes, weight.fours, weight.bits
    cut = cut_few_bits(num_rows, columns, fours.shape[1], bits, deterministic=deterministic)
    parts = torch.empty((cut.splits if cut.apart else 0, num_rows, columns), dtype=torch.float32, device=x.device)
    grid = triton.cdiv(columns, cut.columns), triton.cdiv(num_rows, cut.rows), cut.splits if cut.apart else 1
    few_bits_kernel[grid](
        x, codes, fours, x if bias is None else bias, y, parts, num_rows, columns, inner, weight.lead, cut.splits,
        cut.span, x.stride(0), codes.stride(0), y.stride(0), fours.stride(0),
        BITS=bits, ALIGNED=weight.lead == 0 and inner % SPAN.value == 0, HAS_BIAS=bias is not None, PARTS=cut.apart,
        LOOPED=cut.splits > 1 and not cut.apart, ROWS=cut.rows, COLUMNS=cut.columns, STAGES=STAGES, num_stages=STAGES,
        num_warps=8 if x.dtype == torch.float32 else 4,  # float32 operands lie in registers
    )  # fmt: skip
    if cut.apart:
        add_parts_kernel[(num_rows, triton.cdiv(columns, ADDED_COLUMNS))](
            parts, x, x if bias is None else bias, y, num_rows, columns, cut.splits, y.stride(0), 0,
            X_SCALE=0, HAS_BIAS=bias is not None, BLOCK=ADDED_COLUMNS, num_warps=2,
        )  # fmt: skip
    return y
