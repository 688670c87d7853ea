"""relu, silu, gelu and gelu_tanh (activation.py), alone or times a second half, with FP8 quantisation.

    y = act(x)      y = act(x[:size]) * x[size:]      in float32, rounded once, or quantised

x: [num_rows, size or 2 size], rows any distance apart; float32, bfloat16, float16. 0.5 (1 + tanh(z)) is computed as
1 / (1 + e^(-2 z)), which is the same number.

Must move, per element of y: 1 or 2 elements in, 1 out; FLOPs: about 10 and one exponential. Without row scales a
program takes CHUNK columns of a row; with them a whole row, whose largest magnitude must be known first.
"""

import torch
import triton
import triton.language as tl

from shoal.kernels.gpu.fp8 import GROUP, QUANTISE_CODES, as_bytes, empty_quantised, store_quantised

CHUNK = 1024
"""Columns of a program: 8 elements for each of 128 threads, one 16-byte access in 16-bit types."""
IDENTITY = 4
"""A kind beside activation.KINDS: y = x, to quantise a tensor as it is."""
MAX_SIZE = 65536
"""Columns of a row that one program may hold to find its scale."""


@triton.jit
def activate(x, KIND: tl.constexpr):
    """KIND: a value of activation.KINDS, or IDENTITY. x: float32."""
    if KIND == 4:
        y = x
    elif KIND == 0:
        y = tl.where(x < 0.0, 0.0, x)  # not maximum: it drops NaN
    elif KIND == 1:
        y = x / (1.0 + tl.exp(-x))
    elif KIND == 2:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        y = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    return y


@triton.jit
def activation_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    size,
    x_stride,
    y_stride,
    scale_stride,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    QUANTISE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of a row, from program_id(1) * BLOCK."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    x_row = x_ptr + row.to(tl.int64) * x_stride
    y = activate(tl.load(x_row + columns, mask=mask, other=0.0).to(tl.float32), KIND)
    if GATED:
        y *= tl.load(x_row + size + columns, mask=mask, other=0.0).to(tl.float32)
    if QUANTISE == 0:
        tl.store(y_ptr + row.to(tl.int64) * y_stride + columns, y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        store_quantised(y_ptr, scale_ptr, y, row, y_stride, scale_stride, columns, size, QUANTISE, BLOCK, GROUP_SIZE)


def launch_activation(
    x: torch.Tensor, kind: int, *, gated: bool, quantise: str | None = None, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns (y [num_rows, size], scales or None). kind: a value of activation.KINDS or IDENTITY; quantise, scale: see
    fp8.py.
    """
    assert x.dim() == 2 and x.stride(1) == 1
    num_rows, size = x.shape[0], x.shape[1] // 2 if gated else x.shape[1]
    scales = scale
    if quantise is not None:
        if size > MAX_SIZE:
            raise ValueError(f"activation can quantise rows of at most {MAX_SIZE} columns, and these have {size}")
        y, scales = empty_quantised((num_rows, size), quantise, scale, x.device)
    else:
        y = torch.empty((num_rows, size), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y, scales
    block = CHUNK if quantise is None else max(triton.next_power_of_2(size), GROUP)
    activation_kernel[(num_rows, triton.cdiv(size, block))](
        x,
        y if quantise is None else as_bytes(y),
        y if scales is None else scales,
        size,
        x.stride(0),
        y.stride(0),
        0 if scales is None or quantise == "tensor" else scales.stride(0),
        KIND=kind,
        GATED=gated,
        QUANTISE=QUANTISE_CODES[quantise],
        GROUP_SIZE=GROUP,
        BLOCK=block,
        num_warps=min(max(block // 256, 1), 32),
    )
    return y, scales
