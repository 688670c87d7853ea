"""LayerNorm (arXiv:1607.06450): y = (x - mean(x)) / sqrt(var(x) + eps) * w + b over the last dimension.

torch's own kernel is one pass per row in float32, on every device, so there is none of ours. Every row is reduced in
one order.
"""

import torch
import torch.nn.functional as F


def layer_norm_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """The formula in float32. x: [..., size]; weight, bias: [size]. Returns float32."""
    values = x.float()
    centred = values - values.mean(-1, keepdim=True)
    result = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps) * weight.float()
    return result if bias is None else result + bias.float()


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Normalise the last dimension of x: [..., size] of any float dtype; weight, bias: [size] of the same. Returns a
    new tensor.
    """
    return F.layer_norm(x, weight.shape, weight, bias, eps)
