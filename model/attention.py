"""Multi-head attention of one layer on one tensor rank: fused projection, norms, rotary positions, paged cache, output.

Shapes: T tokens, H hidden size; Q query heads, K key/value heads, D head_dim, all local to the rank.
Sharded: heads. The output projection gives a partial sum over ranks, which the decoder reduces (one all-reduce, shared
with the feed-forward where both branches read the same input).
"""

from collections.abc import Mapping
from typing import Any

import torch

from shoal.kernels.attention import paged_attention
from shoal.kernels.rope_kv_write import rope_kv_write
from shoal.model.batch import BatchInput
from shoal.model.kv_cache import LayerCache
from shoal.model.qk_norm import make_across_heads_norm, make_head_norm
from shoal.model.shard import ModelShard
from shoal.model.spec import Attention
from shoal.parallel.communicator import Communicator
from shoal.parallel.linear import ColumnLinear, RowLinear


class AttentionMixer:
    """The mixer of one layer. params: tensors of the layer's mixer, named as in model/parameters.py without prefix."""

    def __init__(
        self,
        spec: Attention,
        shard: ModelShard,
        params: Mapping[str, Any],
        group: Communicator,
        *,
        deterministic: bool,
    ) -> None:
        heads = shard.heads(spec)
        self.spec, self.deterministic = spec, deterministic
        self.num_heads, self.num_kv_heads = heads.num_heads, heads.num_kv_heads
        self.split = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        self.num_rows = sum(self.split)
        self.qkv = ColumnLinear(params["qkv.weight"], params.get("qkv.bias"), deterministic=deterministic)
        self.out = RowLinear(params["o.weight"], params.get("o.bias"), group, deterministic=deterministic)
        self.out_bias = self.out.bias
        device = params["qkv.weight"].device
        self.group_size = max(heads.q_to_kv.count(kv) for kv in range(heads.num_kv_heads))
        # even groups only: what uniform_map gives
        uniform = list(heads.q_to_kv) == [head // self.group_size for head in range(heads.num_heads)]
        uniform &= heads.num_heads == self.group_size * heads.num_kv_heads
        self.q_to_kv = None if uniform else torch.tensor(heads.q_to_kv, dtype=torch.int32, device=device)
        self.sinks = params["sinks"].float() if spec.sinks else None
        self.head_norm = make_head_norm(spec, params)
        self.across_heads = make_across_heads_norm(spec, shard, params, group, deterministic=deterministic)

    def partial(
        self, x_TH: torch.Tensor, cos_sin_TR: torch.Tensor | None, batch: BatchInput, cache: LayerCache
    ) -> torch.Tensor:
        """Attention over x and what is cached, keys and values of x added to the cache: this rank's part of the sum.

        x: [T, H]; cos_sin: the rows' rotary cosines and sines, None without rotary positions. Returns [T, H].
        """
        num_tokens, dim = x_TH.shape[0], self.spec.head_dim
        heads_TGD = self.qkv(x_TH).view(num_tokens, self.num_rows, dim)
        q_TQD, k_TKD, _ = heads_TGD.split_with_sizes(self.split, 1)
        if self.across_heads is not None:
            self.across_heads(q_TQD, k_TKD)
        tables = batch.groups[cache.group]
        rope_kv_write(
            heads_TGD,
            self.num_heads,
            self.head_norm,
            cos_sin_TR,
            cache.keys,
            cache.values,
            tables.slot_mapping_T,
            cache.scales,
        )
        attended_TQD = paged_attention(
            q_TQD,
            cache.keys,
            cache.values,
            tables.block_table_RB,
            batch.cu_seqlens_q,
            batch.seq_lens,
            scale=self.spec.scale,
            window=self.spec.window,
            softcap=self.spec.softcap,
            sinks=self.sinks,
            q_to_kv=self.q_to_kv,
            group_size=self.group_size,
            max_seqlen_q=batch.max_seqlen_q,
            max_seqlen_k=batch.max_seqlen_k,
            shared_keys=tables.shared_keys,
            kv_scales=cache.scales,
            deterministic=self.deterministic,
            out=torch.zeros_like(q_TQD, memory_format=torch.contiguous_format) if batch.has_gaps else None,
        )
        return self.out.partial(attended_TQD.view(num_tokens, self.num_heads * dim))
