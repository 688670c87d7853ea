"""Logits kept within a bound: y = cap tanh(x / cap) in float32 (Gemma-2, arXiv:2408.00118). An element's result does
not depend on where in a tensor it stands. On CPUs C, whose capped logits whole steps (whole_step.py) compare as well.
"""

import torch

from shoal.kernels.build import native_library
from shoal.kernels.native_types import FLOAT, INT, INT64, POINTER

_PROTOTYPE = (POINTER, INT64, INT64, FLOAT, INT)


def softcap_reference(x: torch.Tensor, cap: float) -> torch.Tensor:
    """The formula in float64. Returns float64."""
    return torch.tanh(x.double() / cap) * cap


def softcap_(logits_RV: torch.Tensor, cap: float) -> torch.Tensor:
    """Cap in place. logits: [rows, size] float32; cap > 0. Returns it."""
    library = native_library() if logits_RV.is_cpu else None
    if library is None or logits_RV.dtype != torch.float32 or not logits_RV.is_contiguous():
        return torch.tanh_(logits_RV.div_(cap)).mul_(cap)
    library.function("shoal_softcap", _PROTOTYPE)(logits_RV.data_ptr(), *logits_RV.shape, cap, torch.get_num_threads())
    return logits_RV
