"""Weights as the decoder multiplies with them: prepared for the C kernels where those will do it, as loaded elsewhere:
tensors, or what was rounded for the Triton kernels.

Every [out, in] weight of a linear, each expert's, and a head or an embedding that is the head as well; not those of
embeddings alone, norms and positions.
"""

from typing import Any

import torch

from shoal.kernels.build import NativeLibrary
from shoal.kernels.native_types import takes_native
from shoal.kernels.quantized_weight import QuantizedWeight
from shoal.kernels.weight import LEAST_COLUMNS, PackedWeight, PreparedWeight

MULTIPLIED = ("qkv", "o", "gate_up", "up", "down", "router", "shared_gate", "head")

Params = dict[str, Any]
"""Parameters of a rank by local name: a tensor, a prepared weight, or a list of them where experts are stacked."""


def is_multiplied(name: str) -> bool:
    """Whether the parameter of this local name is the weight of a linear."""
    module, _, kind = name.rpartition(".")
    return kind == "weight" and module.rpartition(".")[2] in MULTIPLIED


def prepare(weight: Any, library: NativeLibrary) -> Any:
    """One weight: [columns, inner], or stacked experts [count, columns, inner]. What C cannot take, and what is no
    tensor any more, stays as it is.
    """
    if not isinstance(weight, torch.Tensor):
        return weight
    if weight.numel() == 0 or weight.shape[-2] < LEAST_COLUMNS or not takes_native(weight):
        return weight
    if weight.dim() == 3:
        return [PackedWeight(library, expert) for expert in weight]
    return PackedWeight(library, weight)


def prepare_weights(params: Params, library: NativeLibrary | None, *, head_is_shared: bool) -> Params:
    """The parameters with every multiplied weight prepared; params is emptied on the way, so that no weight is there
    twice. library: None where torch multiplies. head_is_shared: the embedding is the head of this rank as well.
    """
    prepared: Params = {}
    for name in list(params):
        value = params.pop(name)
        if isinstance(value, QuantizedWeight):
            prepared[name] = value.unstacked() if len(value.shape) == 3 else value
            continue
        multiplied = is_multiplied(name) or (head_is_shared and name == "embed.weight")
        prepared[name] = prepare(value, library) if library is not None and multiplied else value
    return prepared


def num_bytes(value: "torch.Tensor | PreparedWeight | list[PreparedWeight]") -> int:
    """Bytes of one parameter."""
    return sum(weight.nbytes for weight in value) if isinstance(value, list) else value.nbytes
