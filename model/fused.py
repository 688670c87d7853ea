"""Which halves of a layer run fused (kernels/fused.py): those with RMSNorm or no norm before them, prepared weights,
and head norms of single heads or none. The others run operation by operation.
"""

from shoal.kernels.build import native_library
from shoal.kernels.fused import FusedFeedForward, FusedMixer, FusedNorm
from shoal.kernels.weight import PreparedWeight
from shoal.model.attention import AttentionMixer
from shoal.model.feed_forward import DenseFeedForward, FeedForward, GatedFeedForward
from shoal.model.norms import NormLayer
from shoal.model.qk_norm import PerHeadNorm


def fusible(norm: NormLayer | None) -> bool:
    """Whether C has this norm."""
    return norm is None or (norm.norm.kind == "rms" and norm.bias is None)


def fused_norm(norm: NormLayer | None) -> FusedNorm | None:
    """A norm as the fused operations take it."""
    return None if norm is None else FusedNorm(norm.weight, norm.norm.eps, 1.0 if norm.norm.unit_offset else 0.0)


def fuse_mixer(norm: NormLayer | None, mixer: AttentionMixer) -> FusedMixer | None:
    """The mixer with the norm before it; None where it cannot be fused."""
    library, heads_norm, qkv, out = native_library(), mixer.qk_norm, mixer.qkv.weight, mixer.out.weight
    if library is None or not isinstance(qkv, PreparedWeight) or not isinstance(out, PreparedWeight):
        return None
    q_norm = k_norm = None
    if isinstance(heads_norm, PerHeadNorm):
        q_norm, k_norm = heads_norm.q_norm, heads_norm.k_norm
    elif heads_norm is not None:
        return None
    if not (fusible(norm) and fusible(q_norm) and fusible(k_norm)):
        return None
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
        q_norm=fused_norm(q_norm),
        k_norm=fused_norm(k_norm),
        window=spec.window,
        softcap=spec.softcap,
        sinks=mixer.sinks,
        q_to_kv=mixer.q_to_kv,
    )


def fuse_feed_forward(norm: NormLayer | None, ffn: FeedForward) -> FusedFeedForward | None:
    """The feed-forward with the norm before it; None where it cannot be fused."""
    library = native_library()
    if library is None or not fusible(norm) or not isinstance(ffn, DenseFeedForward | GatedFeedForward):
        return None
    up = ffn.gate_up if isinstance(ffn, GatedFeedForward) else ffn.up
    if not isinstance(up.weight, PreparedWeight) or not isinstance(ffn.down.weight, PreparedWeight):
        return None
    return FusedFeedForward(library, fused_norm(norm), up.weight, up.bias, ffn.down.weight, kind=ffn.kind)
