"""KVCache: the paged keys and values of a rank's layers. Layers of one cache group share block numbers, not memory.

Elements are of the model's type, or FP8 (e4m3): then value = element * scale, one scale for the keys and one for the
values of a layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from shoal.kernels.fused_layers import FusedLayers
from shoal.kernels.huge_pages import empty_in_huge_pages
from shoal.kernels.whole_step import WholeStep
from shoal.model.kv_layout import layer_groups
from shoal.model.shard import ModelShard
from shoal.model.spec import DecoderSpec


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's keys and values: [num_blocks, block_size, num_kv_heads, head_dim], local heads; group: its cache
    group; scales: of FP8 keys and values, [num_kv_heads] float32 each, None for other types.
    """

    keys: torch.Tensor
    values: torch.Tensor
    group: int
    scales: tuple[torch.Tensor, torch.Tensor] | None = None


class KVCache:
    """The caches of layers [first_layer, last_layer) of a rank, found by the layer's number in the model.

    num_blocks: per cache group of the spec. dtype: the model's, or float8_e4m3fn; scales: then those of the keys and
    values of some layers, 1 for the others. Contents are undefined until written: nothing may read a slot that no token
    was written to. runs: the stage's layers on this cache in few calls, and whole: those with what is around them in
    one, none where that cannot be; the stage makes both when it first needs them.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        shard: ModelShard,
        num_blocks: Sequence[int],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        scales: Mapping[int, tuple[float, float]] | None = None,
    ) -> None:
        groups = layer_groups(spec)
        assert len(num_blocks) == len(spec.cache_windows), (num_blocks, spec.cache_windows)
        self.block_size = block_size
        self.runs: list[FusedLayers] | None = None
        self.whole: list[WholeStep] | None = None
        self.layers: dict[int, LayerCache] = {}
        for index in range(shard.first_layer, shard.last_layer):
            mixer = spec.layers[index].mixer
            shape = (num_blocks[groups[index]], block_size, shard.heads(mixer).num_kv_heads, mixer.head_dim)
            keys, values = (empty_in_huge_pages(shape, dtype, device) for _ in range(2))
            self.layers[index] = LayerCache(keys, values, groups[index])
            if dtype == torch.float8_e4m3fn:
                k_scale, v_scale = (
                    torch.full((shape[2],), scale, device=device) for scale in (scales or {}).get(index, (1.0, 1.0))
                )
                self.layers[index] = LayerCache(keys, values, groups[index], (k_scale, v_scale))

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(2 * cache.keys.numel() * cache.keys.element_size() for cache in self.layers.values())
