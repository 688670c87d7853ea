"""y = x w^T + bias. With deterministic=True a row's result does not depend on the other rows, their number or its place
among them: bit for bit, so a request's tokens do not depend on its batch.

Deterministic paths: on a GPU the Triton kernel (kernels/gpu/linear.py); on a CPU the C kernel (one order of sums per
element); without it torch's product over blocks of one shape (the last one padded), whose algorithm then is always the
same. Otherwise the faster one of torch and ours, which for one row on a GPU is kernels/gpu/matvec.py. Types: float32,
bfloat16, float16, accumulated in float32. A prepared weight (kernels/weight.py) multiplies itself, on CPUs in
one order of sums always.
"""

import torch
import torch.nn.functional as F

from shoal.kernels.build import NativeLibrary, native_library
from shoal.kernels.device import on_gpu
from shoal.kernels.native_types import DTYPE_CODES, INT, INT64, POINTER, takes_native
from shoal.kernels.weight import PreparedWeight, Weight

_PROTOTYPE = (INT, POINTER, INT64, POINTER, INT64, POINTER, POINTER, INT64, INT64, INT64, INT64, INT)
BLOCK_ROWS = 16  # decode batches are small; more rows per block would be wasted on them
BLOCK_INNER = 16  # positions of a block come in multiples: rows that begin between vectors are summed in other orders
# Rows for which the C kernel is the faster one (Xeon with AVX-512, 512 to 4096 columns: up to 2 times for float32, 1.5
# to 3 times for halves); torch's float32 product is ahead by a tenth below, and by half far above.
FASTER_ROWS = {torch.float32: range(4, 33), torch.bfloat16: range(1, 33), torch.float16: range(1, 33)}


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The formula in float64. x: [..., inner]; weight: [columns, inner]; bias: [columns]. Returns float64."""
    y = x.double() @ weight.double().t()
    return y if bias is None else y + bias.double()


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, *, deterministic: bool) -> torch.Tensor:
    """x: [..., inner]; weight: [columns, inner], a tensor or prepared; bias: [columns] or None; one dtype and device.
    Returns [..., columns].

    deterministic: see above. Raises ValueError when dtypes differ.
    """
    rows = x.shape[:-1].numel()
    if isinstance(weight, PreparedWeight):
        y_MN = weight.multiply(x.reshape(rows, x.shape[-1]), bias, deterministic=deterministic)
        return y_MN.view(*x.shape[:-1], weight.shape[0])
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        theirs = "none" if bias is None else bias.dtype
        raise ValueError(f"linear needs one dtype; x is {x.dtype}, weight {weight.dtype}, bias {theirs}")
    if on_gpu(x):
        return _gpu(x, weight, bias, deterministic)
    if not (deterministic or (x.is_cpu and rows in FASTER_ROWS.get(x.dtype, ()))):
        return F.linear(x, weight, bias)
    x_MK = x.reshape(rows, x.shape[-1])
    library = native_library() if x.is_cpu else None
    biases = () if bias is None else (bias,)
    if library is not None and takes_native(x_MK, weight, *biases):
        y_MN = _native(library, x_MK, weight, bias)
    elif not deterministic:
        return F.linear(x, weight, bias)
    else:
        y_MN = linear_row_blocks(x_MK, weight, bias, BLOCK_ROWS)
    return y_MN.view(*x.shape[:-1], weight.shape[0])


def _gpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, deterministic: bool) -> torch.Tensor:
    from shoal.kernels.gpu.linear import launch_linear
    from shoal.kernels.gpu.matvec import launch_matvec
    from shoal.kernels.gpu.tables import ONE_ROW

    rows = x.shape[:-1].numel()
    alone = rows == 1 and x.dtype in ONE_ROW
    if not (deterministic or alone):
        return F.linear(x, weight, bias)
    x_MK = x.reshape(rows, x.shape[-1])
    x_MK, weight = (part if part.stride(1) == 1 else part.contiguous() for part in (x_MK, weight))
    y_MN = launch_linear(x_MK, weight, bias, deterministic=True) if deterministic else launch_matvec(x_MK, weight, bias)
    return y_MN.view(*x.shape[:-1], weight.shape[0])


def _native(
    library: NativeLibrary, x_MK: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    assert x_MK.shape[1] == weight.shape[1], (x_MK.shape, weight.shape)
    y_MN = torch.empty((x_MK.shape[0], weight.shape[0]), dtype=x_MK.dtype)
    library.function("shoal_linear", _PROTOTYPE)(
        DTYPE_CODES[x_MK.dtype],
        x_MK.data_ptr(),
        x_MK.stride(0),
        weight.data_ptr(),
        weight.stride(0),
        None if bias is None else bias.data_ptr(),
        y_MN.data_ptr(),
        weight.shape[0],
        *y_MN.shape,
        weight.shape[1],
        torch.get_num_threads(),
    )
    return y_MN


def linear_row_blocks(
    x_MK: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, block_rows: int
) -> torch.Tensor:
    """torch's product over blocks of exactly block_rows rows of whole vectors, both padded with zeros: one shape, one
    algorithm.

    x: [rows, inner]. Returns [rows, columns], contiguous.
    """
    (rows, inner), columns = x_MK.shape, weight.shape[0]
    if inner % BLOCK_INNER:
        weight = F.pad(weight, (0, -inner % BLOCK_INNER))
    y_MN = torch.empty((-(-rows // block_rows) * block_rows, columns), dtype=x_MK.dtype, device=x_MK.device)
    block_BK = torch.zeros((block_rows, weight.shape[1]), dtype=x_MK.dtype, device=x_MK.device)
    for start in range(0, rows, block_rows):
        part = x_MK[start : start + block_rows]
        block_BK[: part.shape[0], :inner] = part
        block_BK[part.shape[0] :] = 0
        y_MN[start : start + block_rows] = F.linear(block_BK, weight, bias)
    return y_MN[:rows]
