"""The best token of every row: the number of the largest logit, the first among equals.

A row with something that is no number gives the place of the first such, so that who looks at the chosen logit sees it.
torch's argmax does the same an element at a time on CPUs; C takes vectors.
"""

import torch

from shoal.kernels.build import native_library
from shoal.kernels.native_types import INT, INT64, POINTER

_PROTOTYPE = (POINTER, INT64, INT64, INT64, POINTER, INT)


def argmax_reference(values_RV: torch.Tensor) -> torch.Tensor:
    """Row by row in plain Python. values: [rows, size], size > 0. Returns [rows] int64."""
    found = []
    for row in values_RV.tolist():
        strange = [i for i, value in enumerate(row) if value != value]
        found.append(strange[0] if strange else row.index(max(row)))
    return torch.tensor(found, dtype=torch.int64)


def argmax(values_RV: torch.Tensor) -> torch.Tensor:
    """values: [rows, size] float32, size > 0. Returns [rows] int64."""
    library = native_library() if values_RV.is_cpu else None
    if library is None or values_RV.dtype != torch.float32 or values_RV.stride(1) != 1:
        return values_RV.argmax(-1)
    rows, size = values_RV.shape
    assert size > 0
    out_R = torch.empty(rows, dtype=torch.int64)
    library.function("shoal_argmax", _PROTOTYPE)(
        values_RV.data_ptr(), values_RV.stride(0), rows, size, out_R.data_ptr(), torch.get_num_threads()
    )
    return out_R
