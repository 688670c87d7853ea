"""Normalisation of queries and keys before rotary positions, in place: per head, or over all heads of all ranks at
once.

Shapes: T tokens; Q query heads, K key heads, D head_dim, local to the rank.
"""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import torch

from shoal.model.norms import NormLayer, make_norm
from shoal.model.shard import ModelShard
from shoal.model.spec import Attention
from shoal.parallel.communicator import Communicator
from shoal.parallel.norm import ShardedRmsNorm


class PerHeadNorm:
    """Every head by itself, all with the same weights (Qwen3, Gemma-3). No collective."""

    def __init__(self, q_norm: NormLayer, k_norm: NormLayer) -> None:
        self.q_norm, self.k_norm = q_norm, k_norm

    def __call__(self, q_TQD: torch.Tensor, k_TKD: torch.Tensor) -> None:
        """Normalise both in place."""
        self.q_norm.normalize_(q_TQD)
        self.k_norm.normalize_(k_TKD)


class AcrossHeadsNorm:
    """RMSNorm over the concatenation of all heads (OLMo-2). One all-reduce of two numbers per token for q and k
    together.

    A key head that several ranks hold is counted by the lowest of them only: owned is the local range of key heads that
    this rank counts.
    """

    def __init__(self, q_norm: ShardedRmsNorm, k_norm: ShardedRmsNorm, owned: slice) -> None:
        self.q_norm, self.k_norm, self.owned, self.group = q_norm, k_norm, owned, q_norm.group

    def __call__(self, q_TQD: torch.Tensor, k_TKD: torch.Tensor) -> None:
        """Normalise both in place."""
        q_TC, k_TC = q_TQD.flatten(1), k_TKD.flatten(1)
        if self.group.size == 1:
            q_TC.copy_(self.q_norm(q_TC))
            k_TC.copy_(self.k_norm(k_TC))
            return
        counted = torch.zeros_like(k_TKD, dtype=torch.float32)
        counted[:, self.owned] = k_TKD[:, self.owned].float()
        parts = self.q_norm.sum_of_squares(q_TC.float()), self.k_norm.sum_of_squares(counted.flatten(1))
        squares_T2 = self.group.all_reduce(torch.cat(parts, dim=1))
        q_TC.copy_(self.q_norm.scale(q_TC.float(), squares_T2[:, :1]))
        k_TC.copy_(self.k_norm.scale(k_TC.float(), squares_T2[:, 1:]))


def make_qk_norm(
    spec: Attention,
    shard: ModelShard,
    params: Mapping[str, Any],
    group: Communicator,
    *,
    deterministic: bool,
) -> Callable[[torch.Tensor, torch.Tensor], None] | None:
    """What normalises queries and keys ([T, Q, D], [T, K, D]) of a layer in place; None when nothing does."""
    if spec.qk_norm is None:
        return None
    norm = spec.qk_norm.norm
    if spec.qk_norm.per_head:
        q_norm, k_norm = (make_norm(norm, params, name) for name in ("q_norm", "k_norm"))
        assert q_norm is not None and k_norm is not None
        return PerHeadNorm(q_norm, k_norm)
    assert norm.kind == "rms" and not norm.bias, "only RMSNorm without a bias is defined over sharded heads"
    q_sharded, k_sharded = (
        ShardedRmsNorm(
            params[f"{name}.weight"],
            norm.eps,
            num_heads * spec.head_dim,
            group,
            deterministic=deterministic,
            unit_offset=norm.unit_offset,
        )
        for name, num_heads in (("q_norm", spec.num_heads), ("k_norm", spec.num_kv_heads))
    )
    return AcrossHeadsNorm(q_sharded, k_sharded, owned_kv_heads(spec, shard))


def owned_kv_heads(spec: Attention, shard: ModelShard) -> slice:
    """The local key heads that no lower tensor rank holds too: every head of the model is owned by one rank."""
    heads = shard.heads(spec)
    if shard.tp_rank == 0:
        return slice(0, heads.num_kv_heads)
    before = msgspec.structs.replace(shard, tp_rank=shard.tp_rank - 1).heads(spec).kv_stop
    return slice(max(heads.kv_start, before) - heads.kv_start, heads.num_kv_heads)
