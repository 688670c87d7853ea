"""Rotary positions (arXiv:2104.09864): rotate the pairs (x_i, x_{i + r/2}) of the first r = rotary_dim of a head by
position * f_i.

    y_i = x_i cos(p f_i) - x_{i + r/2} sin(p f_i)        y_{i + r/2} = x_{i + r/2} cos(p f_i) + x_i sin(p f_i)

Only the rotation lives here, on cosines and sines that are looked up once per step; the frequencies are made in
model/rotary.py. Computed in float32 and rounded once.
"""

import torch

from shoal.kernels.build import native_library
from shoal.kernels.native_types import DTYPE_CODES, INT, INT64, POINTER, takes_native

_PROTOTYPE = (INT, POINTER, INT64, INT64, POINTER, INT64, INT64, INT64)


def rope_reference(x_THD: torch.Tensor, cos_sin_TR: torch.Tensor) -> torch.Tensor:
    """The formula in float32. x: [num_tokens, num_heads, head_dim]; cos_sin: [num_tokens, rotary_dim]. Returns
    float32.
    """
    rotary_dim = cos_sin_TR.shape[-1]
    half = rotary_dim // 2
    cos, sin = cos_sin_TR[:, None, :half], cos_sin_TR[:, None, half:]
    x = x_THD.float()
    first, second = x[..., :half], x[..., half:rotary_dim]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., rotary_dim:]], dim=-1)


def rope_(x_THD: torch.Tensor, cos_sin_TR: torch.Tensor) -> torch.Tensor:
    """Rotate in place and return x.

    x: [num_tokens, num_heads, head_dim], float32, bfloat16 or float16, any strides (a slice of the fused projection
    will do); cos_sin: [num_tokens, rotary_dim] float32, contiguous: cosines of the rotary_dim / 2 angles, then their
    sines.
    """
    num_tokens, num_heads, _ = x_THD.shape
    rows, rotary_dim = cos_sin_TR.shape
    assert cos_sin_TR.dtype == torch.float32 and cos_sin_TR.is_contiguous() and rows == num_tokens
    library = native_library() if x_THD.is_cpu else None
    if library is None or not takes_native(x_THD):
        x_THD[..., :rotary_dim] = rope_reference(x_THD[..., :rotary_dim], cos_sin_TR)
        return x_THD
    function = library.function("shoal_rope", _PROTOTYPE)
    code, (token_stride, head_stride, _) = DTYPE_CODES[x_THD.dtype], x_THD.stride()
    function(
        code, x_THD.data_ptr(), token_stride, head_stride, cos_sin_TR.data_ptr(), num_tokens, num_heads, rotary_dim
    )
    return x_THD
