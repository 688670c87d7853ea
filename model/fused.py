"""Which halves of a layer run fused (kernels/fused.py): those with prepared weights, unless several ranks normalise all
heads of a token at once. The others run operation by operation. Where nothing but fused halves and sums is left, and
other ranks are waited for in C, steps of few tokens run whole layers in one call.
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


def fused_norm(norm: NormLayer | None) -> FusedNorm | None:
    """A norm as the fused operations take it."""
    if norm is None:
        return None
    layer = norm.norm.kind == "layer"
    return FusedNorm(norm.weight, norm.norm.eps, unit(norm.norm.unit_offset and not layer), norm.bias, layer)


def unit(offset: bool) -> float:
    """What is added to a norm's weight."""
    return 1.0 if offset else 0.0


def fused_head_norms(mixer: AttentionMixer) -> tuple[FusedNorm | None, FusedNorm | None]:
    """Those of queries and keys, of single heads or of all at once."""
    one, every = mixer.head_norm, mixer.across_heads
    if every is not None:
        q_norm, k_norm = (
            FusedNorm(norm.weight, norm.eps, unit(norm.unit_offset)) for norm in (every.q_norm, every.k_norm)
        )
        return q_norm, k_norm
    if one is None:
        return None, None
    parts, offset = ((one.q_weight, one.q_bias), (one.k_weight, one.k_bias)), unit(one.unit_offset)
    q_norm, k_norm = (FusedNorm(weight, one.eps, offset, bias, one.layer) for weight, bias in parts)
    return q_norm, k_norm


def fuse_mixer(norm: NormLayer | None, mixer: AttentionMixer) -> FusedMixer | None:
    """The mixer with the norm before it; None where it cannot be fused."""
    qkv, out, across_ranks = mixer.qkv.weight, mixer.out.weight, mixer.across_heads
    if not for_c(qkv) or not for_c(out) or (across_ranks is not None and across_ranks.group.size > 1):
        return None
    library = native_library()  # asked for only where weights are prepared for C: on GPUs it must not be built
    if library is None:
        return None
    q_norm, k_norm = fused_head_norms(mixer)
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
    if isinstance(ffn, MoeFeedForward):
        return fuse_mixture(norm, ffn)
    return fuse_dense(norm, ffn) if isinstance(ffn, DenseFeedForward | GatedFeedForward) else None


def fuse_dense(norm: NormLayer | None, ffn: DenseFeedForward | GatedFeedForward) -> FusedFeedForward | None:
    """A feed-forward without experts, likewise."""
    up = ffn.gate_up if isinstance(ffn, GatedFeedForward) else ffn.up
    if not for_c(up.weight) or not for_c(ffn.down.weight):
        return None
    library = native_library()
    if library is None:
        return None
    return FusedFeedForward(library, fused_norm(norm), up.weight, up.bias, ffn.down.weight, kind=ffn.kind)


def fuse_mixture(norm: NormLayer | None, ffn: MoeFeedForward) -> FusedMixture | None:
    """Routed experts, and perhaps a shared one beside them, likewise."""
    experts, router, gate = ffn.experts.native, ffn.router, ffn.shared_gate
    shared = None if ffn.shared is None else fuse_dense(None, ffn.shared)
    if experts is None or not for_c(router) or router.shape[0] > MOST_EXPERTS:
        return None
    if (ffn.shared is not None and shared is None) or not (gate is None or is_table(gate)):
        return None
    library = native_library()
    if library is None:
        return None
    return FusedMixture(
        library,
        fused_norm(norm),
        router,
        experts,
        top_k=ffn.spec.top_k,
        normalize=ffn.spec.normalize_top_k,
        shared=shared,
        gate=gate,
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


def step_embedding(
    embedding: VocabEmbedding, scale: float | None, learned: torch.Tensor | None
) -> StepEmbedding | None:
    """A rank's part of the embedding as whole steps take it; None where C cannot read it, or holds nothing of it."""
    weight = embedding.weight
    if not weight.shape[0] or not (isinstance(weight, PackedWeight) or is_table(weight)):
        return None
    return StepEmbedding(weight, embedding.vocab[0], scale, learned)


def step_head(norm: NormLayer | None, head: VocabHead, softcap: float | None) -> StepHead | None:
    """Likewise of the head."""
    if not for_c(head.weight) or not min(head.sizes):
        return None
    return StepHead(fused_norm(norm), head.weight, head.bias, sum(head.sizes[: head.group.rank]), softcap)


def is_table(weight: Weight | None) -> TypeGuard[torch.Tensor]:
    """Whether C reads its rows as they are."""
    return isinstance(weight, torch.Tensor) and weight.is_contiguous()


def layer_bytes(layer: FusedLayer) -> int:
    """Of its weights."""
    return layer.mixer.weight_bytes + layer.feed_forward.weight_bytes
