"""DecoderSpec: what a decoder-only transformer is made of. A family turns a Hugging Face config into one; nothing here
knows a family.

No torch: the ledger, `explain` and the scheduler's cache groups are computed from a spec before anything is spawned.
Sizes are global (unsharded); `model/shard.py` says what a rank holds of them.
"""

from typing import Literal

import msgspec

Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]


class Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the parts of a spec: immutable values that can travel in a message."""


class Norm(Spec, frozen=True, kw_only=True):
    """RMSNorm or LayerNorm over the last dimension. unit_offset: the stored weight is w - 1 (Gemma)."""

    kind: Literal["rms", "layer"]
    eps: float
    unit_offset: bool = False
    bias: bool = False


class LinearScaling(Spec, tag="linear", frozen=True, kw_only=True):
    """Positions divided by factor."""

    factor: float


class DynamicScaling(Spec, tag="dynamic", frozen=True, kw_only=True):
    """Dynamic NTK: beyond original_max_position the base grows with the sequence's length (transformers: `dynamic`)."""

    factor: float
    original_max_position: int


class Llama3Scaling(Spec, tag="llama3", frozen=True, kw_only=True):
    """Llama 3.1's frequency-dependent interpolation."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


class YarnScaling(Spec, tag="yarn", frozen=True, kw_only=True):
    """YaRN (arXiv:2309.00071). attention_factor multiplies cos and sin; None: 0.1 ln(factor) + 1 (or from mscale)."""

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


class LongRopeScaling(Spec, tag="longrope", frozen=True, kw_only=True):
    """LongRoPE (arXiv:2402.13753): per-frequency factors, short up to original_max_position, long beyond."""

    short_factor: list[float]
    long_factor: list[float]
    original_max_position: int
    attention_factor: float


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling


class Rope(Spec, frozen=True, kw_only=True):
    """Rotary positions (arXiv:2104.09864) on the first rotary_dim of every head, half-split (not interleaved) pairs."""

    theta: float
    rotary_dim: int
    max_position: int
    scaling: RopeScaling | None = None


class QkNorm(Spec, frozen=True, kw_only=True):
    """Normalisation of queries and keys before rotary. per_head: over head_dim; otherwise over all heads at once
    (OLMo-2), which needs one more (tiny) all-reduce under tensor parallelism."""

    norm: Norm
    per_head: bool


class Attention(Spec, tag="attention", frozen=True, kw_only=True):
    """Multi-head attention with GQA/MQA. scale multiplies q.k; window: keys a query sees, itself included; softcap:
    tanh cap of scores."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool = False
    out_bias: bool = False
    rope: Rope | None = None
    qk_norm: QkNorm | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


class DenseFfn(Spec, tag="dense", frozen=True, kw_only=True):
    """down(act(up(x)))."""

    intermediate_size: int
    activation: Activation
    bias: bool = False


class GatedFfn(Spec, tag="gated", frozen=True, kw_only=True):
    """down(act(gate(x)) * up(x))."""

    intermediate_size: int
    activation: Activation
    bias: bool = False


class MoeFfn(Spec, tag="moe", frozen=True, kw_only=True):
    """Softmax over all experts in float32, top_k of them, weights renormalised when normalize_top_k; gated experts.

    shared: an expert every token takes; shared_gate: its output is multiplied by sigmoid(x w) (Qwen2-MoE).
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    activation: Activation
    normalize_top_k: bool
    shared: GatedFfn | None = None
    shared_gate: bool = False


Ffn = DenseFfn | GatedFfn | MoeFfn


class Layer(Spec, frozen=True, kw_only=True):
    """One block. sequential: x += post_mixer(mixer(pre_mixer(x))); x += post_ffn(ffn(pre_ffn(x))). parallel: both
    branches read the same x. normed: the sums are normalised, x = post_mixer(x + mixer(x)); x = post_ffn(x + ffn(x)).

    A norm that is None is not there.
    """

    mixer: Attention
    ffn: Ffn
    pre_mixer_norm: Norm | None
    post_mixer_norm: Norm | None = None
    pre_ffn_norm: Norm | None
    post_ffn_norm: Norm | None = None
    residual: Literal["sequential", "parallel", "normed"] = "sequential"


class LearnedPositions(Spec, frozen=True, kw_only=True):
    """A table of num_positions rows added to the embeddings; row position + offset (OPT: 2)."""

    num_positions: int
    offset: int = 0


class DecoderSpec(Spec, frozen=True, kw_only=True):
    """A whole decoder. embed_scale multiplies the embeddings (Gemma); embed_size: of embeddings that a matrix brings to
    hidden_size and another one back before the head (OPT-350m); final_softcap caps the logits; max_position is the
    checkpoint's context length; dtype what its config declares."""

    family: str
    vocab_size: int
    hidden_size: int
    layers: list[Layer]
    final_norm: Norm | None
    max_position: int
    dtype: Literal["float32", "bfloat16", "float16"]
    tie_embeddings: bool
    embed_scale: float | None = None
    embed_size: int | None = None
    learned_positions: LearnedPositions | None = None
    head_bias: bool = False
    final_softcap: float | None = None

    @property
    def cache_windows(self) -> list[int | None]:
        """One entry per cache group, None (full attention) first, then windows in rising order; only those that
        occur."""
        windows = {layer.mixer.window for layer in self.layers}
        return sorted(windows, key=lambda window: (window is not None, window or 0))
