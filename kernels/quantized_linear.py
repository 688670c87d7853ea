"""y = x w^T + bias with quantised weights (kernels/quantized_format.py) and x rounded to 8 bits, row by row.

x is rounded in the groups of the weight: scale = max |x| / 127 of the group, codes rounded half to even; the products
of a group are summed as integers, which is exact. So y = sum over groups of (sum of codes) * w_scale * x_scale, in
float32, then the bias: a row's bits depend on nothing but the row, always. C kernel on CPUs; without it torch computes
the same sums from the rounded values in float32. x: float32, bfloat16 or float16. As in llama.cpp's Q8_0 and Q4_0, and
like LLM.int8() (arXiv:2208.07339) without its outliers, which groups keep apart.
"""

import torch
import torch.nn.functional as F

from shoal.kernels.build import NativeLibrary, native_library
from shoal.kernels.native_types import DTYPE_CODES, INT, INT64, POINTER, takes_native
from shoal.kernels.quantized_format import BLOCK, GROUP, padded_groups
from shoal.kernels.quantized_weight import SMALLEST, QuantizedWeight

_PROTOTYPE = (INT, INT, POINTER, INT64, POINTER, POINTER, POINTER, POINTER, *(INT64,) * 5, POINTER, INT)
BLOCK_ROWS = 16  # rows per product without the C kernel: one shape, one order of sums
SLAB_ELEMENTS = 1 << 22  # weights made floats at once without the C kernel


def quantize_rows(x: torch.Tensor, lead: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a quantised linear makes of x: [rows, inner], whose first input is number `lead` of its group.

    Returns codes [rows, groups, GROUP] int8, and scales [rows, groups] float32, not a number where x is not finite.
    """
    groups = padded_groups(x.shape[1], lead)
    pad = (lead, groups * GROUP - lead - x.shape[1])
    values = F.pad(x.float(), pad).view(len(x), groups, GROUP)
    most = values.abs().amax(-1)
    # a true quotient, as in C: torch turns number / tensor into a product with the reciprocal
    inverse = torch.where(most > SMALLEST, torch.full_like(most, 127) / most, 0)
    scales = torch.where(most > SMALLEST, most / 127, 0) + (values * 0).sum(-1)
    codes = (values * inverse.unsqueeze(-1)).round_().nan_to_num_(0, 0, 0)
    return codes.to(torch.int8), scales


def quantized_linear_reference(
    x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The formula in float64. x: [rows, inner]; bias: [columns]. Returns float64 [rows, columns]."""
    codes, scales = quantize_rows(x, weight.lead)
    w_codes = weight.int_codes().unflatten(-1, (-1, GROUP))
    w_scales = weight.scales.transpose(-1, -2).flatten(0, 1)[: weight.shape[0]]
    dots = torch.einsum("rgk,cgk->rcg", codes.double(), w_codes.double())
    y = (dots * scales.double().unsqueeze(1) * w_scales.double()).sum(-1)
    return y if bias is None else y + bias.double()


def quantized_linear(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x: [..., inner]; weight: [columns, inner]; bias: [columns] of x's type or None. Returns [..., columns] in x's
    type.

    Deterministic: a row's result does not depend on the others. Raises ValueError when sizes or types do not fit.
    """
    if x.shape[-1] != weight.shape[1] or (bias is not None and bias.dtype != x.dtype) or x.dtype not in DTYPE_CODES:
        theirs = "none" if bias is None else f"{bias.dtype} {list(bias.shape)}"
        raise ValueError(
            f"quantized_linear: x {x.dtype} {list(x.shape)} and bias {theirs} do not fit a weight {list(weight.shape)}"
        )
    rows = x.shape[:-1].numel()
    x_MK = x.reshape(rows, x.shape[-1])
    x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    library = native_library() if x.is_cpu else None
    if library is not None and takes_native(x_MK, *(() if bias is None else (bias,))):
        y_MN = _native(library, x_MK, weight, bias)
    else:
        y_MN = _torch(x_MK, weight, bias)
    return y_MN.view(*x.shape[:-1], weight.shape[0])


def _native(
    library: NativeLibrary, x_MK: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    (rows, inner), columns = x_MK.shape, weight.shape[0]
    y_MN = torch.empty((rows, columns), dtype=x_MK.dtype)
    scratch = torch.empty(rows * weight.codes.shape[1] * (GROUP + 8), dtype=torch.uint8)
    library.function("shoal_quantized_linear", _PROTOTYPE)(
        DTYPE_CODES[x_MK.dtype],
        weight.bits,
        x_MK.data_ptr(),
        x_MK.stride(0),
        weight.codes.data_ptr(),
        weight.scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y_MN.data_ptr(),
        columns,
        rows,
        columns,
        inner,
        weight.lead,
        scratch.data_ptr(),
        torch.get_num_threads(),
    )
    return y_MN


def _torch(x_MK: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Products of rounded x and weights made floats, over blocks of rows and slabs of columns of one shape each."""
    codes, scales = quantize_rows(x_MK, weight.lead)
    rounded = (codes * scales.unsqueeze(-1)).flatten(1)
    rows, whole = len(rounded), -(-len(rounded) // BLOCK_ROWS) * BLOCK_ROWS
    rounded = F.pad(rounded, (0, 0, 0, whole - rows))[:, weight.lead : weight.lead + weight.shape[1]]
    y_MN = torch.empty((whole, weight.shape[0]), dtype=x_MK.dtype, device=x_MK.device)
    step = max(1, SLAB_ELEMENTS // max(1, weight.codes.shape[1] * GROUP * BLOCK)) * BLOCK
    for first in range(0, weight.shape[0], step):
        part = weight.columns(first, min(first + step, weight.shape[0])).dequantize()
        for row in range(0, whole, BLOCK_ROWS):
            y = F.linear(rounded[row : row + BLOCK_ROWS], part)
            if bias is not None:
                y += bias[first : first + step]
            y_MN[row : row + BLOCK_ROWS, first : first + step] = y
    return y_MN[:rows]
