"""LayerNorm (arXiv:1607.06450): y = (x - mean(x)) / sqrt(var(x) + eps) * w + b over the last dimension.

On GPUs our own kernel, whose order of sums is that of the fused residual add (add_norm.py); on CPUs C, computed in
float32 and rounded once, so that fused layers (fused.py) can give its bits; elsewhere torch's. Every row is reduced in
one order.
"""

import torch
import torch.nn.functional as F

from shoal.kernels.build import NativeLibrary, native_library
from shoal.kernels.device import on_gpu
from shoal.kernels.native_types import DTYPE_CODES, FLOAT, INT, INT64, POINTER, takes_native

_PROTOTYPE = (INT, POINTER, INT64, INT64, POINTER, POINTER, POINTER, INT64, INT64, INT64, FLOAT)


def layer_norm_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """The formula in float32. x: [..., size]; weight, bias: [size]. Returns float32."""
    values = x.float()
    centred = values - values.mean(-1, keepdim=True)
    result = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps) * weight.float()
    return result if bias is None else result + bias.float()


def _native(
    library: NativeLibrary, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    outer, inner, size = (1, *x.shape)[-3:]
    x_outer, x_inner, _ = (0, *x.stride())[-3:]
    out = torch.empty(x.shape, dtype=x.dtype)
    library.function("shoal_layer_norm", _PROTOTYPE)(
        DTYPE_CODES[x.dtype], x.data_ptr(), x_outer, x_inner, weight.data_ptr(),
        None if bias is None else bias.data_ptr(), out.data_ptr(), outer, inner, size, eps,
    )  # fmt: skip
    return out


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Normalise the last dimension of x: [..., size] of any float dtype, strides at will; weight, bias: [size] of the
    same, contiguous. Returns a new tensor.
    """
    if on_gpu(x):
        from shoal.kernels.gpu.norm import launch_norm, takes_norm

        if takes_norm(x):
            return launch_norm(x, weight, bias, eps, layer=True)[0]
    library = native_library() if x.is_cpu else None
    if library is not None and x.dim() in (2, 3) and takes_native(x) and weight.dtype == x.dtype:
        assert bias is None or bias.dtype == x.dtype, (bias, x.dtype)
        return _native(library, x, weight, bias, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)
