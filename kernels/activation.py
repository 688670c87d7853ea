"""Activations of feed-forwards: relu, silu, gelu (exact), gelu_tanh, and the gated product act(gate) * up.

silu(x) = x sigmoid(x); gelu(x) = x Phi(x); gelu_tanh(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
(arXiv:1606.08415). Gated units: arXiv:2002.05202.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from shoal.kernels.build import native_library
from shoal.kernels.native_types import DTYPE_CODES, INT, INT64, POINTER, takes_native

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
_NATIVE_KINDS = {"silu": 0, "gelu_tanh": 1}
_PROTOTYPE = (INT, INT, POINTER, INT64, POINTER, INT64, INT64)


def activation_reference(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The formulas in float32. x: any shape. Returns float32."""
    x = x.float()
    if kind == "relu":
        return x.clamp(min=0.0)
    if kind == "silu":
        return x / (1.0 + torch.exp(-x))
    if kind == "gelu":
        return 0.5 * x * (1.0 + torch.erf(x * 0.5**0.5))
    return 0.5 * x * (1.0 + torch.tanh((2.0 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    """kind: a key of ACTIVATIONS, applied elementwise to x of any shape and float dtype. Returns a new tensor."""
    return ACTIVATIONS[kind](x)


def gated_activation_reference(gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    """act(gate) * up in float32 for gate_up: [..., 2 * size]. Returns float32 [..., size]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return activation_reference(gate, kind) * up


def gated_activation(gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    """act(gate) * up. gate_up: [num_tokens, 2 * size], gate's columns before up's, any float dtype. Returns
    [num_tokens, size].
    """
    library = native_library() if gate_up.device.type == "cpu" else None
    size = gate_up.shape[-1] // 2
    if library is not None and kind in _NATIVE_KINDS and gate_up.dim() == 2 and takes_native(gate_up):
        out = torch.empty((gate_up.shape[0], size), dtype=gate_up.dtype)
        function = library.function("shoal_gated_activation", _PROTOTYPE)
        code = DTYPE_CODES[gate_up.dtype]
        function(
            code, _NATIVE_KINDS[kind], gate_up.data_ptr(), gate_up.stride(0), out.data_ptr(), gate_up.shape[0], size
        )
        return out
    return ACTIVATIONS[kind](gate_up[..., :size]) * gate_up[..., size:]
