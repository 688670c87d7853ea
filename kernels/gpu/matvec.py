"""y = x w^T + b for one row of 16-bit inputs.

x: [1, inner], bfloat16 or float16; weight: [columns, inner], the same dtype, adjacent inner. Products and sums in
float32, rounded once; which columns a program takes changes no sum.

Must move: the weight once; 2 FLOPs per weight, which the plain cores do while it arrives. A program takes a few columns
over the whole inner dimension, a warp's loads being neighbours in a column: no tile of a tensor-core product, of which
one row would use a sixteenth, and no split of the inner dimension to be added up by another kernel.
"""

import torch
import triton
import triton.language as tl

STEP, STAGES = 512, 3
"""Inputs of a step (1 KiB of a column), and steps on their way."""
WIDE = 8192
"""Columns from which there are programs enough of more columns and warps."""


@triton.jit
def matvec_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, num_columns, inner, w_stride,
    HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """COLUMNS outputs. WHOLE: the inputs are whole steps."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    w_rows = w_ptr + tl.minimum(columns, num_columns - 1)[:, None].to(tl.int64) * w_stride
    acc = tl.zeros((COLUMNS,), tl.float32)
    for start in tl.range(0, inner, STEP, num_stages=STAGES):
        k = start + tl.arange(0, STEP)
        if WHOLE:
            x = tl.load(x_ptr + k)
            w = tl.load(w_rows + k[None, :])
        else:
            x = tl.load(x_ptr + k, mask=k < inner, other=0.0)
            w = tl.load(w_rows + k[None, :], mask=(k < inner)[None, :], other=0.0)
        acc += tl.sum(w.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)
    mask = columns < num_columns
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + columns, acc.to(y_ptr.dtype.element_ty), mask=mask)


def launch_matvec(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Returns [1, columns] in x's dtype."""
    columns, inner = weight.shape
    assert x.shape == (1, inner) and x.stride(1) == 1 and weight.stride(1) == 1, (x.shape, weight.shape)
    y = torch.empty((1, columns), dtype=x.dtype, device=x.device)
    if columns == 0:
        return y
    held, warps = (4, 1) if columns < WIDE else (8, 4)
    matvec_kernel[(triton.cdiv(columns, held),)](
        x, weight, x if bias is None else bias, y, columns, inner, weight.stride(0),
        HAS_BIAS=bias is not None, WHOLE=inner % STEP == 0, COLUMNS=held, STEP=STEP, STAGES=STAGES, num_warps=warps,
    )  # fmt: skip
    return y
