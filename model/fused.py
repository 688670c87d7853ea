"""Which halves of a layer run fused (kernels/fused.py): those with RMSNorm or no norm before them, prepared weights,
and head norms of single heads or none. The others run operation by operation. Where nothing but fused halves and sums
is left, and other ranks are waited for in C, steps of few tokens run whole layers in one call.
"""

from collections.abc import Sequence
from typing import TypeGuard

import torch

from shoal.kernels.attention import uniform_map
from shoal.kernels.build import native_library
from shoal.kernels.fused import FusedFeedForward, FusedMixer, FusedMixture, FusedNorm
from shoal.kernels.fused_layers import FusedLayer, FusedLayers
from shoal.kernels.moe_routing import MOST_EXPERTS
from shoal.kernels.native_ranks import NativeGroup
from shoal.kernels.weight import PackedWeight, PreparedWeight, Weight
from shoal.kernels.whole_step import StepEmbedding, StepHead
from shoal.model.attention import AttentionMixer
from shoal.model.feed_forward import DenseFeedForward, FeedForward, GatedFeedForward, MoeFeedForward
from shoal.model.norms import NormLayer
from shoal.parallel.embedding import VocabEmbedding, VocabHead

CPU = torch.device("cpu")
FEW_TOKENS = 64  # of a step that runs whole layers: it is short enough to show no sign of life meanwhile,
FEW_KEYS = 1 << 17  # as it is with so many keys of all its rows
RUN_BYTES = 2 << 30  # of weights that one call goes through


def for_c(weight: Weight) -> TypeGuard[PreparedWeight]:
    """Whether the weight is prepared for the C kernels."""
    return isinstance(weight, PreparedWeight) and hasattr(weight, "native")


def fusible(norm: NormLayer | None) -> bool:
    """Whether C has this norm."""
    return norm is None or (norm.norm.kind == "rms" and norm.bias is None)


def fused_norm(norm: NormLayer | None) -> FusedNorm | None:
    """A norm as the fused operations take it."""
    return None if norm is None else FusedNorm(norm.weight, norm.norm.eps, 1.0 if norm.norm.unit_offset else 0.0)


def fuse_mixer(norm: NormLayer | None, mixer: AttentionMixer) -> FusedMixer | None:
    """The mixer with the norm before it; None where it cannot be fused."""
    heads_norm, qkv, out = mixer.head_norm, mixer.qkv.weight, mixer.out.weight
    if not for_c(qkv) or not for_c(out) or not fusible(norm) or mixer.across_heads is not None:
        return None
    library = native_library()  # asked for only where weights are prepared for C: on GPUs it must not be built
    if library is None:
        return None
    q_norm = k_norm = None
    if heads_norm is not None:
        if heads_norm.layer or heads_norm.q_bias is not None:
            return None
        offset = 1.0 if heads_norm.unit_offset else 0.0
        q_norm, k_norm = (
            FusedNorm(weight, heads_norm.eps, offset) for weight in (heads_norm.q_weight, heads_norm.k_weight)
        )
    spec = mixer.spec
    return FusedMixer(
        library,
        fused_norm(norm),
        qkv,
        mixer.qkv.bias,
        out,
        num_heads=mixer.num_heads,
        num_kv_heads=mixer.num_kv_heads,
        rotary_dim=0 if spec.rope is None else spec.rope.rotary_dim,
        scale=spec.scale,
        q_norm=q_norm,
        k_norm=k_norm,
        window=spec.window,
        softcap=spec.softcap,
        sinks=mixer.sinks,
        q_to_kv=uniform_map(mixer.num_heads, mixer.num_kv_heads, CPU) if mixer.q_to_kv is None else mixer.q_to_kv,
    )


def fuse_feed_forward(norm: NormLayer | None, ffn: FeedForward) -> FusedFeedForward | FusedMixture | None:
    """The feed-forward with the norm before it; None where it cannot be fused."""
    if fusible(norm) and isinstance(ffn, MoeFeedForward):
        return fuse_mixture(norm, ffn)
    if not fusible(norm) or not isinstance(ffn, DenseFeedForward | GatedFeedForward):
        return None
    up = ffn.gate_up if isinstance(ffn, GatedFeedForward) else ffn.up
    if not for_c(up.weight) or not for_c(ffn.down.weight):
        return None
    library = native_library()
    if library is None:
        return None
    return FusedFeedForward(library, fused_norm(norm), up.weight, up.bias, ffn.down.weight, kind=ffn.kind)


def fuse_mixture(norm: NormLayer | None, ffn: MoeFeedForward) -> FusedMixture | None:
    """Routed experts with the norm before them; None where a shared expert stands beside them."""
    experts, router = ffn.experts.native, ffn.router
    if experts is None or ffn.shared is not None or not for_c(router) or router.shape[0] > MOST_EXPERTS:
        return None
    library = native_library()
    if library is None:
        return None
    return FusedMixture(
        library, fused_norm(norm), router, experts, top_k=ffn.spec.top_k, normalize=ffn.spec.normalize_top_k
    )


def runs_of_layers(layers: Sequence[FusedLayer], group: NativeGroup | None) -> list[FusedLayers]:
    """The layers in runs of up to RUN_BYTES of weights, one layer at least. layers: not empty; group: the tensor ranks,
    None for one alone.
    """
    library, found, room = native_library(), [[layers[0]]], RUN_BYTES - layer_bytes(layers[0])
    assert library is not None, "the halves are fused"
    for layer in layers[1:]:
        if layer_bytes(layer) > room:
            found.append([])
            room = RUN_BYTES
        found[-1].append(layer)
        room -= layer_bytes(layer)
    return [FusedLayers(library, run, group) for run in found]


def step_embedding(embedding: VocabEmbedding) -> StepEmbedding | None:
    """A rank's part of the embedding as whole steps take it; None where C cannot read it, or holds nothing of it."""
    weight = embedding.weight
    if not weight.shape[0] or not (isinstance(weight, PackedWeight) or is_table(weight)):
        return None
    return StepEmbedding(weight, embedding.vocab[0])


def step_head(norm: NormLayer | None, head: VocabHead) -> StepHead | None:
    """Likewise of the head."""
    if not fusible(norm) or not for_c(head.weight) or not min(head.sizes):
        return None
    return StepHead(fused_norm(norm), head.weight, head.bias, sum(head.sizes[: head.group.rank]))


def is_table(weight: Weight | None) -> TypeGuard[torch.Tensor]:
    """Whether C reads its rows as they are."""
    return isinstance(weight, torch.Tensor) and weight.is_contiguous()


def layer_bytes(layer: FusedLayer) -> int:
    """Of its weights."""
    return layer.mixer.weight_bytes + layer.feed_forward.weight_bytes
