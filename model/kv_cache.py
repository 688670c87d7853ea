"""KVCache: the paged keys and values of a rank's layers. Layers of one cache group share block numbers, not memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoal.kernels.fused import FusedLayers
from shoal.model.kv_layout import layer_groups
from shoal.model.shard import ModelShard
from shoal.model.spec import DecoderSpec


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's keys and values: [num_blocks, block_size, num_kv_heads, head_dim], local heads; group: its cache
    group.
    """

    keys: torch.Tensor
    values: torch.Tensor
    group: int


class KVCache:
    """The caches of layers [first_layer, last_layer) of a rank, found by the layer's number in the model.

    num_blocks: per cache group of the spec. Contents are undefined until written: nothing may read a slot that no token
    was written to. runs: the stage's layers on this cache in few calls; the stage makes them when it first needs them.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        shard: ModelShard,
        num_blocks: Sequence[int],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        groups = layer_groups(spec)
        assert len(num_blocks) == len(spec.cache_windows), (num_blocks, spec.cache_windows)
        self.block_size = block_size
        self.runs: list[FusedLayers] | None = None
        self.layers: dict[int, LayerCache] = {}
        for index in range(shard.first_layer, shard.last_layer):
            mixer = spec.layers[index].mixer
            shape = (num_blocks[groups[index]], block_size, shard.heads(mixer).num_kv_heads, mixer.head_dim)
            keys, values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
            self.layers[index] = LayerCache(keys, values, groups[index])

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(2 * cache.keys.numel() * cache.keys.element_size() for cache in self.layers.values())
