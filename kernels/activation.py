"""Activations of feed-forwards: relu, silu, gelu (exact), gelu_tanh, alone or as the gated product act(gate) * up.

    silu(x) = x / (1 + e^-x)    gelu(x) = x/2 (1 + erf(x / sqrt 2))
    gelu_tanh(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))

(arXiv:1606.08415; gated units: arXiv:2002.05202.) An element's result does not depend on where in a tensor it
stands. On a CPU torch's own silu, gelu and sigmoid do not keep that: whole vectors and the rest of a row take
different code. Its exp, erf and tanh do, so the torch path there is made of those.
"""

import torch
import torch.nn.functional as F

from shoal.kernels.build import NativeLibrary, native_library
from shoal.kernels.device import on_gpu
from shoal.kernels.native_types import DTYPE_CODES, INT, INT64, POINTER, takes_native

KINDS = {"relu": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}
_PROTOTYPE = (INT, INT, INT, POINTER, INT64, POINTER, INT64, INT64)


def activation_reference(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The formulas in float32. x: any shape. Returns float32."""
    x = x.float()
    if kind == "relu":
        return x.clamp(min=0.0)
    if kind == "silu":
        return x / (1.0 + torch.exp(-x))
    if kind == "gelu":
        return 0.5 * x * (1.0 + torch.erf(x * 0.5**0.5))
    return 0.5 * x * (1.0 + torch.tanh((2.0 / torch.pi) ** 0.5 * (x + 0.044715 * x * x * x)))


def gated_activation_reference(gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    """act(gate) * up in float32 for gate_up: [..., 2 * size]. Returns float32 [..., size]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return activation_reference(gate, kind) * up


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + e^-x) in float32, rounded once. x: any shape and float dtype. Returns a new tensor."""
    return (1.0 / (1.0 + torch.exp(-x.float()))).to(x.dtype)


def _native(library: NativeLibrary, x: torch.Tensor, kind: str, gated: bool) -> torch.Tensor:
    rows, width = x.shape
    out = torch.empty((rows, width // 2 if gated else width), dtype=x.dtype)
    function = library.function("shoal_activation", _PROTOTYPE)
    code, stride = DTYPE_CODES[x.dtype], x.stride()[0]
    function(code, KINDS[kind], gated, x.data_ptr(), stride, out.data_ptr(), rows, out.shape[1])
    return out


def _torch(x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "relu":
        return F.relu(x)
    if x.is_cpu:
        return activation_reference(x, kind).to(x.dtype)
    return F.silu(x) if kind == "silu" else F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    """act(x). x: [num_tokens, size] of any float dtype; kind: a key of KINDS. Returns a new tensor."""
    if on_gpu(x) and x.dim() == 2 and x.stride(1) == 1:
        from shoal.kernels.gpu.activation import launch_activation

        return launch_activation(x, KINDS[kind], gated=False)[0]
    library = native_library() if x.is_cpu else None
    if library is not None and x.dim() == 2 and takes_native(x):
        return _native(library, x, kind, gated=False)
    return _torch(x, kind)


def gated_activation(gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    """act(gate) * up. gate_up: [num_tokens, 2 * size] of any float dtype, gate's columns before up's; kind: a key of
    KINDS. Returns a new [num_tokens, size].
    """
    if on_gpu(gate_up) and gate_up.dim() == 2 and gate_up.stride(1) == 1:
        from shoal.kernels.gpu.activation import launch_activation

        return launch_activation(gate_up, KINDS[kind], gated=True)[0]
    library = native_library() if gate_up.is_cpu else None
    if library is not None and gate_up.dim() == 2 and takes_native(gate_up):
        return _native(library, gate_up, kind, gated=True)
    size = gate_up.shape[-1] // 2
    return _torch(gate_up[..., :size], kind) * gate_up[..., size:]
