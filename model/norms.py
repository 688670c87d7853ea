"""Norms of a decoder as callables: the spec's Norm with its tensors. Replicated on every rank, no collective."""

from collections.abc import Mapping
from typing import Any

import torch

from shoal.kernels.layer_norm import layer_norm
from shoal.kernels.rms_norm import rms_norm
from shoal.model.spec import Norm


class NormLayer:
    """RMSNorm or LayerNorm over the last dimension."""

    def __init__(self, norm: Norm, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.norm, self.weight, self.bias = norm, weight, bias
        if norm.kind == "layer" and norm.unit_offset:
            self.weight = weight + 1

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x: [..., size]. Returns a new tensor of its shape and dtype."""
        if self.norm.kind == "layer":
            return layer_norm(x, self.weight, self.bias, self.norm.eps)
        y = rms_norm(x, self.weight, self.norm.eps, unit_offset=self.norm.unit_offset)
        return y if self.bias is None else y.add_(self.bias)

    def normalize_(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x in place and return it; any strides."""
        if self.norm.kind == "rms" and self.bias is None:
            return rms_norm(x, self.weight, self.norm.eps, unit_offset=self.norm.unit_offset, out=x)
        return x.copy_(self(x))


def make_norm(norm: Norm | None, params: Mapping[str, Any], name: str) -> NormLayer | None:
    """The norm whose tensors are params[name.weight] and, when it has one, params[name.bias]; None when there is
    none.
    """
    if norm is None:
        return None
    return NormLayer(norm, params[f"{name}.weight"], params[f"{name}.bias"] if norm.bias else None)
