"""Between a layer's fused projection and its attention: norm of every query and key head, rotary positions, keys and
values into the paged cache. On GPUs one kernel; elsewhere rms_norm or layer_norm, rope_ and kv_write after another.
"""

from dataclasses import dataclass

import torch

from shoal.kernels.device import on_gpu
from shoal.kernels.kv_write import kv_write
from shoal.kernels.layer_norm import layer_norm
from shoal.kernels.rms_norm import rms_norm
from shoal.kernels.rope import rope_


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """The norm of every query and key head by itself: weights [head_dim] (biases too, or None), contiguous. layer:
    LayerNorm, else RMSNorm; unit_offset: the stored weight is w - 1 (RMSNorm only).
    """

    q_weight: torch.Tensor
    k_weight: torch.Tensor
    q_bias: torch.Tensor | None
    k_bias: torch.Tensor | None
    eps: float
    layer: bool = False
    unit_offset: bool = False

    def normalize_(self, x_TND: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Normalise the last dimension of x in place; any strides."""
        if self.layer:
            x_TND.copy_(layer_norm(x_TND, weight, bias, self.eps))
            return
        rms_norm(x_TND, weight, self.eps, unit_offset=self.unit_offset, out=x_TND)
        if bias is not None:
            x_TND += bias


def rope_kv_write(
    heads_TGD: torch.Tensor,
    num_heads: int,
    norm: HeadNorm | None,
    cos_sin_TR: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping_T: torch.Tensor,
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Queries normed and rotated in place; keys, so treated, and values written to the caches.

    heads: [num_tokens, num_heads + 2 num_kv_heads, head_dim], queries, keys, values, the last two dimensions
    contiguous; the keys in it are undefined afterwards. norm: None for none. cos_sin: as rope_ takes it, None for no
    rotary positions. caches, slot_mapping, kv_scales: as kv_write takes them.
    """
    num_kv_heads = (heads_TGD.shape[1] - num_heads) // 2
    if on_gpu(heads_TGD):
        from shoal.kernels.gpu.rope_kv_write import launch_rope_kv_write

        launch_rope_kv_write(
            heads_TGD, num_heads, num_kv_heads, norm, cos_sin_TR, k_cache, v_cache, slot_mapping_T, kv_scales
        )
        return
    q_TQD, k_TKD, v_TKD = heads_TGD.split_with_sizes((num_heads, num_kv_heads, num_kv_heads), 1)
    if norm is not None:
        norm.normalize_(q_TQD, norm.q_weight, norm.q_bias)
        norm.normalize_(k_TKD, norm.k_weight, norm.k_bias)
    if cos_sin_TR is not None:
        rope_(heads_TGD[:, : num_heads + num_kv_heads], cos_sin_TR)
    kv_write(k_TKD, v_TKD, k_cache, v_cache, slot_mapping_T, kv_scales)
