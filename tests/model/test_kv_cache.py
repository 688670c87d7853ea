"""The paged cache's groups and what a block costs."""

import torch

from shoal.configs.schema import ParallelConfig
from shoal.model.kv_cache import KVCache
from shoal.model.kv_layout import kv_bytes_per_block, layer_groups
from shoal.model.shard import shard_model
from shoal.model.spec import Attention, DecoderSpec, DenseFfn, Layer


def make_spec() -> DecoderSpec:
    """Four layers: window 8, full, window 8, window 4; 6 query heads on 3 of 10 dimensions."""
    layers = [
        Layer(
            mixer=Attention(num_heads=6, num_kv_heads=3, head_dim=10, scale=1.0, window=window),
            ffn=DenseFfn(intermediate_size=16, activation="relu"),
            pre_mixer_norm=None,
            pre_ffn_norm=None,
        )
        for window in (8, None, 8, 4)
    ]
    return DecoderSpec(
        family="test",
        vocab_size=20,
        hidden_size=12,
        layers=layers,
        final_norm=None,
        max_position=64,
        dtype="float32",
        tie_embeddings=True,
    )


def test_layers_of_one_window_form_a_group_full_attention_first() -> None:
    spec = make_spec()
    assert spec.cache_windows == [None, 4, 8] and layer_groups(spec) == [2, 0, 2, 1]


def test_bytes_per_block_are_what_the_cache_allocates() -> None:
    spec = make_spec()
    for parallel in (ParallelConfig(), ParallelConfig(tensor=2, pipeline=2), ParallelConfig(tensor=5)):
        for shard in shard_model(spec, parallel):
            num_blocks = [3, 5, 7]
            cache = KVCache(spec, shard, num_blocks, 4, torch.bfloat16, torch.device("cpu"))
            per_block = kv_bytes_per_block(spec, shard, 4, 2)
            assert cache.num_bytes == sum(count * size for count, size in zip(num_blocks, per_block))
            assert set(cache.layers) == set(range(shard.first_layer, shard.last_layer))
            for index, layer in cache.layers.items():
                assert layer.keys.shape[0] == num_blocks[layer.group] and layer.group == layer_groups(spec)[index]


def test_a_group_with_no_layer_on_a_rank_costs_nothing_there() -> None:
    spec = make_spec()
    last = shard_model(spec, ParallelConfig(pipeline=4))[-1]
    assert kv_bytes_per_block(spec, last, 16, 4) == [0, 2 * 16 * 3 * 10 * 4, 0]
