"""y = x w^T + b for any number of rows when deterministic, and with FP8 weights where torch has no product for them.

x: [rows, inner], float32, bfloat16, float16, any row stride; weight: [columns, inner], adjacent inner: "dense", of x's
dtype; or "e4m3", w = q s[column // scale_rows, k // scale_columns]: q e4m3, one scale per tensor, channel or block.
Weights of 8 and 4 bits: gpu/few_bits.py. Accumulated in float32 (float32 inputs in IEEE float32, not TF32), rounded
once.

x may be e4m3 too ("e4m3" weights only), with a scale per tensor, row, or GROUP elements of a row. Such numbers are
exact in x's dtype, so only the products are rounded; scales are applied in float32.

Must move: the weight once, columns * inner elements (1 byte to 4), which for few rows is nearly all; 2 * rows
FLOPs per weight element, under the card's ratio up to about 64 rows for 16-bit weights (H100: 3.35 TB/s, 990 TFLOP/s
dense 16-bit: about 300 FLOPs a byte, but tiles this small reach a fraction of it).
A program takes a tile of BLOCK_M x BLOCK_N outputs over one of `splits` ranges of the inner dimension: one tile row of
64 columns alone leaves most of the chip idle, and splitting fills it. Parts of a split go to a float32 workspace
[splits, rows, columns] and are added in rising order by a second kernel: no atomics, one order.

Deterministic: BLOCK_M is always ROWS_FIXED and splits depend on the weight's shape only. With many rows there are tiles
enough, and a workspace would be large: a program then goes through all splits itself and adds their parts in the same
order. So a row's products are added in one order however many rows there are. (Kernels are not specialised to the
number of rows either: one binary for all, and none to be compiled when a batch of a new size comes.)
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from shoal.kernels.gpu.fp8 import GROUP, as_bytes, from_e4m3

TILES = {"dense": (64, 64), "e4m3": (64, 128)}
"""Columns and inner steps of a tile, 8 KiB of weights a stage. Both are only used when deterministic, or where the
library has no product."""
TILE_FLOAT32 = (64, 32)
"""Of float32 inputs, whatever the weights: the plain cores' products keep their operands in registers."""
ROWS_FIXED = 64
"""Rows of a tile when deterministic: one tile for any decode batch, and a full tensor-core tile for a prompt."""
TARGET_PROGRAMS = 264
"""Programs a split aims at: two for each multiprocessor of an H100 (132)."""
MIN_STEPS = 4
"""Inner steps of a split at least: fewer do not pay for the workspace."""
STAGES = 3
ADDED_COLUMNS = 256
"""Columns of a program that adds the parts of splits: four for each of 64 threads."""

DENSE, E4M3 = 0, 1
WEIGHTS = {"dense": DENSE, "e4m3": E4M3}


@triton.jit
def x_tile(x_ptr, rows, k, inner, x_stride, row_mask, X_FP8: tl.constexpr):
    """[BLOCK_M, BLOCK_K] of x, zeros outside; e4m3 as float16."""
    mask = row_mask & (k < inner)[None, :]
    x = tl.load(x_ptr + rows[:, None].to(tl.int64) * x_stride + k[None, :], mask=mask, other=0)
    if X_FP8:
        x = from_e4m3(x)
    return x


@triton.jit
def product(
    x_ptr,
    w_ptr,
    scale_ptr,
    x_scale_ptr,
    first,
    last,
    num_rows,
    num_columns,
    inner,
    x_stride,
    w_stride,
    scale_stride,
    x_scale_stride,
    scale_rows,
    scale_columns,
    rows,
    columns,
    WEIGHT: tl.constexpr,
    X_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """A tile's sum over inner steps [first, last), float32 [BLOCK_M, BLOCK_N]; scales within the sum applied."""
    row_mask = (rows < num_rows)[:, None]
    column_mask = (columns < num_columns)[None, :]
    w_rows = w_ptr + columns[None, :].to(tl.int64) * w_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, last):
        start = step * BLOCK_K
        k = start + tl.arange(0, BLOCK_K)
        x = x_tile(x_ptr, rows, k, inner, x_stride, row_mask, X_SCALE > 0)
        w = tl.load(w_rows + k[:, None], mask=(k < inner)[:, None] & column_mask, other=0)
        if WEIGHT == 0:
            acc = tl.dot(x, w, acc, input_precision="ieee")
        else:
            at = (columns[None, :] // scale_rows).to(tl.int64) * scale_stride + start // scale_columns
            scale = tl.load(scale_ptr + at, mask=column_mask, other=0.0).to(tl.float32)
            if X_SCALE == 2:
                x_at = rows[:, None].to(tl.int64) * x_scale_stride + start // GROUP_SIZE
                scale = scale * tl.load(x_scale_ptr + x_at, mask=row_mask, other=0.0)
            acc += tl.dot(x, from_e4m3(w).to(x.dtype), input_precision="ieee") * scale
    return acc


@triton.jit
def finished(
    acc,
    x_scale_ptr,
    bias_ptr,
    rows,
    columns,
    num_rows,
    num_columns,
    x_scale_stride,
    X_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """What follows the whole sum: the rows' scales, the bias."""
    column_mask = (columns < num_columns)[None, :]
    if X_SCALE == 1:
        at = rows[:, None].to(tl.int64) * x_scale_stride
        acc *= tl.load(x_scale_ptr + at, mask=(rows < num_rows)[:, None], other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns[None, :], mask=column_mask, other=0.0).to(tl.float32)
    return acc


@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    x_scale_ptr,
    bias_ptr,
    y_ptr,
    parts_ptr,
    num_rows,
    num_columns,
    inner,
    splits,
    steps_per_split,
    x_stride,
    w_stride,
    y_stride,
    scale_stride,
    x_scale_stride,
    scale_rows,
    scale_columns,
    WEIGHT: tl.constexpr,
    X_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """One tile. PARTS: over the split program_id(2), to the workspace [splits, num_rows, num_columns]; else over all
    splits.
    """
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    steps = tl.cdiv(inner, BLOCK_K)
    if PARTS:
        split = tl.program_id(2)
        first = split * steps_per_split
        acc = product(
            x_ptr, w_ptr, scale_ptr, x_scale_ptr, first, tl.minimum(first + steps_per_split, steps),
            num_rows, num_columns, inner, x_stride, w_stride, scale_stride, x_scale_stride, scale_rows,
            scale_columns, rows, columns, WEIGHT, X_SCALE, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_SIZE,
        )  # fmt: skip
        at = (split.to(tl.int64) * num_rows + rows[:, None]) * num_columns + columns[None, :]
        tl.store(parts_ptr + at, acc, mask=mask)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for split in range(splits):
            first = split * steps_per_split
            acc += product(
                x_ptr, w_ptr, scale_ptr, x_scale_ptr, first, tl.minimum(first + steps_per_split, steps),
                num_rows, num_columns, inner, x_stride, w_stride, scale_stride, x_scale_stride, scale_rows,
                scale_columns, rows, columns, WEIGHT, X_SCALE, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_SIZE,
            )  # fmt: skip
        acc = finished(
            acc, x_scale_ptr, bias_ptr, rows, columns, num_rows, num_columns, x_scale_stride, X_SCALE, HAS_BIAS
        )
        y_at = y_ptr + rows[:, None].to(tl.int64) * y_stride + columns[None, :]
        tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def add_parts_kernel(
    parts_ptr,
    x_scale_ptr,
    bias_ptr,
    y_ptr,
    num_rows,
    num_columns,
    splits,
    y_stride,
    x_scale_stride,
    X_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of one row: the parts in rising order, then the rows' scales and the bias."""
    rows = tl.program_id(0) + tl.arange(0, 1)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (columns < num_columns)[None, :]
    acc = tl.zeros((1, BLOCK), tl.float32)
    for split in range(splits):
        at = (tl.cast(split, tl.int64) * num_rows + rows[:, None]) * num_columns + columns[None, :]
        acc += tl.load(parts_ptr + at, mask=mask, other=0.0)
    acc = finished(acc, x_scale_ptr, bias_ptr, rows, columns, num_rows, num_columns, x_scale_stride, X_SCALE, HAS_BIAS)
    y_at = y_ptr + rows[:, None].to(tl.int64) * y_stride + columns[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=mask)


def split_count(columns: int, inner: int, block_n: int, block_k: int) -> tuple[int, int]:
    """(splits, steps of each) of a weight's inner dimension: of its shape only, never of the number of rows."""
    steps = max(triton.cdiv(inner, block_k), 1)
    wanted = max(TARGET_PROGRAMS // max(triton.cdiv(columns, block_n), 1), 1)
    per_split = max(triton.cdiv(steps, wanted), min(MIN_STEPS, steps))
    return triton.cdiv(steps, per_split), per_split


class Cut(NamedTuple):
    """How a product is divided among programs. rows, columns, steps: a tile, and its inner steps; splits: ranges of the
    inner dimension, of `span` tiles each; apart: each split is a program of its own and goes through the workspace.
    """

    rows: int
    columns: int
    steps: int
    splits: int
    span: int
    apart: bool


def cut_product(x: torch.Tensor, columns: int, inner: int, kind: str, group: int, *, deterministic: bool) -> Cut:
    """group: inputs of a scale. Deterministic: of the weight alone, but for `apart`, which changes no sum."""
    block_n, block_k = TILE_FLOAT32 if x.dtype == torch.float32 else TILES[kind]
    if kind != "dense" and group < inner:
        block_k = min(block_k, group)
        assert block_k >= 32 and group % block_k == 0, (kind, group)
    splits, span = split_count(columns, inner, block_n, block_k)
    block_m = ROWS_FIXED if deterministic else min(max(triton.next_power_of_2(len(x)), 16), ROWS_FIXED)
    return Cut(block_m, block_n, block_k, splits, span, splits > 1 and len(x) <= ROWS_FIXED)


class Scales(NamedTuple):
    """Scales as the kernels take them; where there are none, any tensor, which is not read. stride, x_stride: to the
    next row's, 0 where one is for all; x_kind: 0 none, 1 of rows, 2 of GROUP elements of a row.
    """

    scale: torch.Tensor
    x_scale: torch.Tensor
    stride: int
    x_stride: int
    x_kind: int


def kernel_scales(
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    *,
    grouped: bool,
) -> Scales:
    """launch_linear's arguments as Scales. grouped: the weight has several scales along its inputs."""
    scales = weight if scale is None else scale
    stride = 0 if scale is None or scale.numel() == 1 else scale.stride(0)
    x_kind = 0 if x_scale is None else 2 if grouped or x_scale.shape[1] != 1 else 1
    x_stride = 0 if x_scale is None or x_scale.numel() == 1 else x_scale.stride(0)
    x_scales = scales if x_scale is None else x_scale
    return Scales(scales, x_scales, stride, x_stride, x_kind)


def launch_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    deterministic: bool,
    kind: str = "dense",
    scale: torch.Tensor | None = None,
    scale_block: tuple[int, int] = (1, 1),
    x_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Returns [rows, columns] in out_dtype (default: x's). x, weight, kind: see above.

    scale: two-dimensional (tensor [1, 1], channel [columns, 1], block).
    scale_block: weights that share one scale, (rows, columns); columns of a block are a power of two or all.
    x_scale: for e4m3 x, float32: [1, 1], [rows, 1] or, with weights in blocks, [rows, ceil(inner / GROUP)].
    """
    (num_rows, inner), columns = x.shape, weight.shape[0]
    assert x.stride(1) == 1 and weight.stride(1) == 1
    y = torch.empty((num_rows, columns), dtype=out_dtype or x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    cut = cut_product(x, columns, inner, kind, scale_block[1], deterministic=deterministic)
    scales = kernel_scales(weight, scale, x_scale, grouped=scale_block[1] < inner or inner == 0)
    biases, ends = scales.scale if bias is None else bias, {"X_SCALE": scales.x_kind, "HAS_BIAS": bias is not None}
    parts = torch.empty((cut.splits if cut.apart else 0, num_rows, columns), dtype=torch.float32, device=x.device)
    grid = triton.cdiv(columns, cut.columns), triton.cdiv(num_rows, cut.rows), cut.splits if cut.apart else 1
    linear_kernel[grid](
        x if x_scale is None else as_bytes(x), as_bytes(weight) if kind == "e4m3" else weight,
        scales.scale, scales.x_scale, biases, y, parts,
        num_rows, columns, inner, cut.splits, cut.span, x.stride(0), weight.stride(0), y.stride(0),
        scales.stride, scales.x_stride, *scale_block,
        WEIGHT=WEIGHTS[kind], PARTS=cut.apart, BLOCK_M=cut.rows, BLOCK_N=cut.columns,
        BLOCK_K=cut.steps, GROUP_SIZE=GROUP, num_stages=STAGES, **ends,
        num_warps=8 if x.dtype == torch.float32 else 4,  # float32 operands lie in registers
    )  # fmt: skip
    if cut.apart:
        add_parts_kernel[(num_rows, triton.cdiv(columns, ADDED_COLUMNS))](
            parts, scales.x_scale, biases, y, num_rows, columns, cut.splits, y.stride(0), scales.x_stride,
            BLOCK=ADDED_COLUMNS, num_warps=2, **ends,
        )  # fmt: skip
    return y
