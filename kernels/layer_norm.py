"""LayerNorm (arXiv:1607.06450): y = (x - mean(x)) / sqrt(var(x) + eps) * w + b over the last dimension.

On GPUs our own kernel, whose order of sums is that of the fused residual add (add_norm.py); elsewhere torch's, which is
one pass per row in float32. Every row is reduced in one order.
"""

import torch
import torch.nn.functional as F

from shoal.kernels.device import on_gpu


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
    if on_gpu(x):
        from shoal.kernels.gpu.norm import launch_norm, takes_norm

        if takes_norm(x):
            return launch_norm(x, weight, bias, eps, layer=True)[0]
    return F.layer_norm(x, weight.shape, weight, bias, eps)
