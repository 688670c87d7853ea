"""RMSNorm (arXiv:1910.07467): y = x / sqrt(mean(x^2) + eps) * w over the last dimension, computed in float32 and
rounded once.

unit_offset: the stored weight is w - 1 (Gemma). Every row is reduced in one order, whatever other rows there are.
"""

import torch

from shoal.kernels.build import NativeLibrary, native_library
from shoal.kernels.device import on_gpu
from shoal.kernels.native_types import DTYPE_CODES, FLOAT, INT, INT64, POINTER, takes_native

_PROTOTYPE = (INT, POINTER, INT64, INT64, POINTER, POINTER, INT64, INT64, INT64, INT64, INT64, FLOAT, FLOAT)


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float, *, unit_offset: bool = False) -> torch.Tensor:
    """The formula in float32. x: [..., size]; weight: [size]. Returns float32."""
    values = x.float()
    scale = weight.float() + (1.0 if unit_offset else 0.0)
    return values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps) * scale


def _native(
    library: NativeLibrary, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, out: torch.Tensor
) -> None:
    shape, x_strides, out_strides = x.shape, x.stride(), out.stride()
    if len(shape) == 3:
        (outer, inner, size), (x_outer, x_inner, _), (out_outer, out_inner, _) = shape, x_strides, out_strides
    else:
        (inner, size), (x_inner, _), (out_inner, _) = shape, x_strides, out_strides
        outer, x_outer, out_outer = 1, 0, 0
    library.function("shoal_rms_norm", _PROTOTYPE)(
        DTYPE_CODES[x.dtype],
        x.data_ptr(),
        x_outer,
        x_inner,
        weight.data_ptr(),
        out.data_ptr(),
        out_outer,
        out_inner,
        outer,
        inner,
        size,
        eps,
        offset,
    )


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, unit_offset: bool = False, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Normalise the last dimension of x.

    x: [..., size], float32, bfloat16 or float16, strides at will; weight: [size], contiguous, of the same dtype.
    out: where to write, of x's shape and dtype; it may be x itself. Returns out, or a new contiguous tensor.
    """
    assert weight.shape == x.shape[-1:] and weight.dtype == x.dtype, (weight.shape, weight.dtype, x.shape, x.dtype)
    if on_gpu(x):
        from shoal.kernels.gpu.norm import launch_norm, takes_norm

        if takes_norm(x, out):
            return launch_norm(x, weight, None, eps, layer=False, unit_offset=unit_offset, out=out)[0]
    library = native_library() if x.is_cpu else None
    if library is None or x.dim() not in (2, 3) or not takes_native(x, weight if out is None else out):
        result = rms_norm_reference(x, weight, eps, unit_offset=unit_offset)
        return result.to(x.dtype) if out is None else out.copy_(result)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _native(library, x, weight, eps, 1.0 if unit_offset else 0.0, out)
    return out
