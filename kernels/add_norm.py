"""A residual add and the norm that follows it: s = x + branch, y = RMSNorm(s) or LayerNorm(s). On GPUs one kernel,
which writes s once and does not read it again; elsewhere the add, then rms_norm or layer_norm.
"""

import torch

from shoal.kernels.device import on_gpu
from shoal.kernels.layer_norm import layer_norm
from shoal.kernels.rms_norm import rms_norm


def add_norm(
    x_TH: torch.Tensor,
    branch_TH: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    layer: bool,
    unit_offset: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, branch: [num_tokens, size] of one dtype; the sum is rounded to it before the norm. layer: LayerNorm, else
    RMSNorm; unit_offset: RMSNorm's stored weight is w - 1; bias: [size] or None.

    Returns (sum, its norm). x is not changed; branch may be overwritten.
    """
    if on_gpu(x_TH):
        from shoal.kernels.gpu.norm import launch_norm, takes_norm

        if takes_norm(x_TH, branch_TH):
            y_TH, sum_TH, _ = launch_norm(
                x_TH, weight, bias, eps, layer=layer, unit_offset=unit_offset, residual=branch_TH
            )
            assert sum_TH is not None
            return sum_TH, y_TH
    sum_TH = branch_TH.add_(x_TH)
    if layer:
        return sum_TH, layer_norm(sum_TH, weight, bias, eps)
    y_TH = rms_norm(sum_TH, weight, eps, unit_offset=unit_offset)
    return sum_TH, y_TH if bias is None else y_TH.add_(bias)
