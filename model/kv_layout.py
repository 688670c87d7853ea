"""Where the paged cache keeps which layer, and what a block costs. No torch: the ledger and `explain` compute with
it.
"""

from typing import Literal

from shoal.model.shard import ModelShard
from shoal.model.spec import DecoderSpec


def layer_groups(spec: DecoderSpec) -> list[int]:
    """The cache group of every layer of the model: the index of its window in spec.cache_windows."""
    windows = spec.cache_windows
    return [windows.index(layer.mixer.window) for layer in spec.layers]


def kv_itemsize(dtype: Literal["auto", "fp8"], itemsize: int) -> int:
    """Bytes of a cached element. dtype: cache.dtype; itemsize: of the model's type."""
    return 1 if dtype == "fp8" else itemsize


def kv_bytes_per_block(spec: DecoderSpec, shard: ModelShard, block_size: int, itemsize: int) -> list[int]:
    """Bytes one block of every cache group takes on this rank: keys and values of block_size tokens of its layers.

    itemsize: bytes of a cached element. 0 for a group none of whose layers is on this rank.
    """
    totals = [0] * len(spec.cache_windows)
    groups = layer_groups(spec)
    for index in range(shard.first_layer, shard.last_layer):
        mixer = spec.layers[index].mixer
        totals[groups[index]] += 2 * block_size * shard.heads(mixer).num_kv_heads * mixer.head_dim * itemsize
    return totals
