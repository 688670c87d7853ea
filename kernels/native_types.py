"""How tensors reach the C kernels: the codes of element types (kernels/native/vector.h) and the argument types of
ctypes.
"""

import ctypes

import torch

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
POINTER, INT, INT64, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float


def takes_native(*tensors: torch.Tensor) -> bool:
    """Whether the C kernels read these tensors: on a CPU, of a type they know, elements of the last dimension
    adjacent.
    """
    for tensor in tensors:  # a loop: this is on the path of every operation of every layer
        if not tensor.is_cpu or tensor.dtype not in DTYPE_CODES or tensor.stride()[-1] != 1:
            return False
    return True
