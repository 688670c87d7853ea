"""A row times one number between 0 and 1 that another row decides: y *= sigmoid(x w^T), w of one row (the gate of a
shared expert). On CPUs one pass in C, in one order of sums; elsewhere a product and torch.
"""

import torch

from shoal.kernels.activation import sigmoid
from shoal.kernels.build import native_library
from shoal.kernels.linear import linear, linear_reference
from shoal.kernels.native_types import DTYPE_CODES, INT, INT64, POINTER, takes_native
from shoal.kernels.weight import Weight

_PROTOTYPE = (INT, POINTER, POINTER, INT64, POINTER, INT64, INT64)


def sigmoid_gate_reference(y_TH: torch.Tensor, x_TK: torch.Tensor, weight_1K: torch.Tensor) -> torch.Tensor:
    """The formula in float64. Returns float64 [T, H]."""
    return y_TH.double() * torch.sigmoid(linear_reference(x_TK, weight_1K))


def sigmoid_gate_(y_TH: torch.Tensor, x_TK: torch.Tensor, weight_1K: Weight, *, deterministic: bool) -> torch.Tensor:
    """Gate y in place. y: [T, H]; x: [T, K]; weight: [1, K], a tensor or prepared; one dtype. deterministic: as linear
    takes it. Returns y.
    """
    tensors = (y_TH, x_TK, weight_1K)
    library = native_library() if x_TK.is_cpu else None
    if library is None or not all(
        isinstance(t, torch.Tensor) and takes_native(t) and t.is_contiguous() for t in tensors
    ):
        return y_TH.mul_(sigmoid(linear(x_TK, weight_1K, deterministic=deterministic)))
    assert isinstance(weight_1K, torch.Tensor) and y_TH.dtype == x_TK.dtype == weight_1K.dtype
    library.function("shoal_sigmoid_gate", _PROTOTYPE)(
        DTYPE_CODES[x_TK.dtype], x_TK.data_ptr(), weight_1K.data_ptr(), x_TK.shape[1], y_TH.data_ptr(), *y_TH.shape
    )
    return y_TH
