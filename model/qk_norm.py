"""Normalisation of queries and keys before rotary positions, in place: per head, or over all heads of all ranks at
once.

Shapes: T tokens; Q query heads, K key heads, D head_dim, local to the rank.
"""

from collections.abc import Callable, Mapping

import msgspec
import torch

from shoal.model.norms import NormLayer, make_norm
from shoal.model.shard import ModelShard
from shoal.model.spec import Attention
from shoal.parallel.communicator import Communicator


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

    A key head that several ranks hold is counted by the first of them only: owned is its local range of key heads.
    """

    def __init__(
        self, spec: Attention, q_norm: NormLayer, k_norm: NormLayer, owned: slice, group: Communicator
    ) -> None:
        assert q_norm.norm.kind == "rms" and q_norm.bias is None, "only RMSNorm is defined over sharded heads"
        self.q_norm, self.k_norm, self.owned, self.group = q_norm, k_norm, owned, group
        sizes = [spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim]
        self.sizes = torch.tensor(sizes, dtype=torch.float32, device=q_norm.weight.device)[:, None]

    def __call__(self, q_TQD: torch.Tensor, k_TKD: torch.Tensor) -> None:
        """Normalise both in place."""
        parts = (q_TQD.flatten(1), self.q_norm), (k_TKD.flatten(1), self.k_norm)
        if self.group.size == 1:
            for x_TC, norm in parts:
                norm.normalize_(x_TC)
            return
        counted = (q_TQD.flatten(1), k_TKD[:, self.owned].flatten(1))
        squares_2T = self.group.all_reduce(torch.stack([x_TC.float().pow(2).sum(-1) for x_TC in counted]))
        factors_2T = torch.rsqrt(squares_2T / self.sizes + self.q_norm.norm.eps)
        for (x_TC, norm), factor_T in zip(parts, factors_2T):
            weight_C = norm.weight.float() + (1.0 if norm.norm.unit_offset else 0.0)
            x_TC.copy_(x_TC.float() * factor_T[:, None] * weight_C)


def make_qk_norm(
    spec: Attention, shard: ModelShard, params: Mapping[str, torch.Tensor], group: Communicator
) -> Callable[[torch.Tensor, torch.Tensor], None] | None:
    """What normalises queries and keys ([T, Q, D], [T, K, D]) of a layer in place; None when nothing does."""
    if spec.qk_norm is None:
        return None
    q_norm, k_norm = (make_norm(spec.qk_norm.norm, params, name) for name in ("q_norm", "k_norm"))
    assert q_norm is not None and k_norm is not None
    if spec.qk_norm.per_head:
        return PerHeadNorm(q_norm, k_norm)
    return AcrossHeadsNorm(spec, q_norm, k_norm, owned_kv_heads(spec, shard), group)


def owned_kv_heads(spec: Attention, shard: ModelShard) -> slice:
    """The local key heads that no lower tensor rank holds too: every head of the model is owned by one rank."""
    heads = shard.heads(spec)
    if shard.tp_rank == 0:
        return slice(0, heads.num_kv_heads)
    before = msgspec.structs.replace(shard, tp_rank=shard.tp_rank - 1).heads(spec).kv_stop
    return slice(max(heads.kv_start, before) - heads.kv_start, heads.num_kv_heads)
