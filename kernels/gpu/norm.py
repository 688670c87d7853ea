"""Residual add, RMSNorm or LayerNorm and FP8 quantisation of a row, in one pass.

    s = x + r (rounded to the dtype, stored)      y = norm(s) w (+ b), in float32, rounded once, or quantised

x, r: [num_rows, size] or [outer, inner, size], any strides but adjacent columns; float32, bfloat16, float16. Norms as
in rms_norm.py and layer_norm.py; y is exactly what the separate operations give up to the order of sums.

Must move, per element: read x (and r), write y (and s): 2 to 4 elements; weights stay in the L2 cache. FLOPs: about 5
per element, far below the ratio at which they would count. One program owns a row and holds it in registers, so each
is read once, and a row's order of sums depends on nothing but its size.
"""

import torch
import triton
import triton.language as tl

from shoal.kernels.gpu.fp8 import GROUP, QUANTISE_CODES, as_bytes, empty_quantised, store_quantised

MAX_SIZE = 32768
"""Columns of a row that still fit the registers of one program (32 a thread)."""


@triton.jit(do_not_specialize=["inner"])
def norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    y_ptr,
    scale_ptr,
    inner,
    size,
    x_outer,
    x_inner,
    residual_stride,
    sum_stride,
    y_outer,
    y_inner,
    scale_stride,
    eps,
    unit_offset,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LAYER: tl.constexpr,
    QUANTISE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row. With a residual x is two-dimensional (inner is num_rows, outer one)."""
    row = tl.program_id(0)
    outer = (row // inner).to(tl.int64)
    index = (row % inner).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    x = tl.load(x_ptr + outer * x_outer + index * x_inner + columns, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + index * residual_stride + columns, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + index * sum_stride + columns, x, mask=mask)
    values = x.to(tl.float32)
    if LAYER:
        values = tl.where(mask, values - tl.sum(values, axis=0) / size, 0.0)
    mean_square = tl.sum(values * values, axis=0) / size
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32) + unit_offset
    y = values * (1.0 / tl.sqrt_rn(mean_square + eps)) * weight
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if QUANTISE == 0:
        tl.store(y_ptr + outer * y_outer + index * y_inner + columns, y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        store_quantised(y_ptr, scale_ptr, y, row, y_inner, scale_stride, columns, size, QUANTISE, BLOCK, GROUP_SIZE)


def takes_norm(x: torch.Tensor, out: torch.Tensor | None = None) -> bool:
    """Whether launch_norm takes x (and out): two or three dimensions, adjacent columns, not too many."""
    adjacent = x.stride(-1) == 1 and (out is None or out.stride(-1) == 1)
    return x.dim() in (2, 3) and adjacent and 0 < x.shape[-1] <= MAX_SIZE


def block_and_warps(size: int) -> tuple[int, int]:
    """Columns of the block and warps: at least 8 elements a thread, so that every thread has 16 bytes in flight of a
    16-bit row, and at most 32 warps.
    """
    block = max(triton.next_power_of_2(size), GROUP)
    return block, min(max(block // 256, 1), 32)


def launch_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    layer: bool,
    unit_offset: bool = False,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    quantise: str | None = None,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Returns (y, x + residual or None, scales or None). out: for y without quantise; it may be x.

    x: as above; residual, quantise only with two dimensions. weight, bias: [size], contiguous. quantise: "tensor" (with
    scale, one float32), "row", "group" or None.
    """
    assert takes_norm(x, out) and weight.is_contiguous() and (bias is None or bias.is_contiguous())
    assert x.dim() == 2 or (residual is None and quantise is None)
    size, inner = x.shape[-1], x.shape[-2]
    num_rows = x.shape[:-1].numel()
    summed = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scales = scale
    if quantise is not None:
        y, scales = empty_quantised((num_rows, size), quantise, scale, x.device)
    else:
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if num_rows == 0:
        return y, summed, scales
    block, warps = block_and_warps(size)
    norm_kernel[(num_rows,)](
        x,
        x if residual is None else residual,
        weight,
        weight if bias is None else bias,
        x if summed is None else summed,
        y if quantise is None else as_bytes(y),
        weight if scales is None else scales,
        inner,
        size,
        x.stride(0) if x.dim() == 3 else 0,
        x.stride(-2),
        0 if residual is None else residual.stride(0),
        0 if summed is None else summed.stride(0),
        y.stride(0) if y.dim() == 3 else 0,
        y.stride(-2),
        0 if scales is None or quantise == "tensor" else scales.stride(0),
        eps,
        1.0 if unit_offset else 0.0,
        HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None,
        LAYER=layer,
        QUANTISE=QUANTISE_CODES[quantise],
        GROUP_SIZE=GROUP,
        BLOCK=block,
        num_warps=warps,
    )
    return y, summed, scales
