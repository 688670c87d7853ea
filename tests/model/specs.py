"""Small DecoderSpecs of many shapes, for tests of the decoder that need no checkpoint."""

from typing import Any

from shoal.model.spec import (
    Attention,
    DecoderSpec,
    DenseFfn,
    Ffn,
    GatedFfn,
    Layer,
    LearnedPositions,
    LinearScaling,
    MoeFfn,
    Norm,
    QkNorm,
    Rope,
)

RMS = Norm(kind="rms", eps=1e-6)
GEMMA = Norm(kind="rms", eps=1e-6, unit_offset=True)
LAYER = Norm(kind="layer", eps=1e-5, bias=True)
ROPE = Rope(theta=1000.0, rotary_dim=8, max_position=256)
GATED = GatedFfn(intermediate_size=44, activation="silu")
VOCAB = 61


def attention(num_heads: int, num_kv_heads: int, **more: Any) -> Attention:
    """Attention with head_dim 8 and rotary positions unless told otherwise."""
    more.setdefault("rope", ROPE)
    return Attention(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=8, scale=8**-0.5, **more)


def decoder(layers: list[Layer], **more: Any) -> DecoderSpec:
    """The decoder around the layers."""
    values: dict[str, Any] = {"final_norm": RMS, "tie_embeddings": False, **more}
    return DecoderSpec(
        family="test",
        vocab_size=VOCAB,
        hidden_size=40,
        layers=layers,
        max_position=256,
        dtype="float32",
        **values,
    )


def moe(num_experts: int = 7, **more: Any) -> MoeFfn:
    """7 experts, 3 of them for a token."""
    return MoeFfn(
        num_experts=num_experts, top_k=3, intermediate_size=26, activation="silu", normalize_top_k=True, **more
    )


def plain(num_heads: int, num_kv_heads: int, ffn: Ffn = GATED, **more: Any) -> DecoderSpec:
    """Two Llama-like layers. more: fields of the attention."""
    mixer = attention(num_heads, num_kv_heads, **more)
    return decoder([Layer(mixer=mixer, ffn=ffn, pre_mixer_norm=RMS, pre_ffn_norm=RMS)] * 2)


def learned() -> DecoderSpec:
    """Like GPT-2 and OPT: learned positions, LayerNorm, biases everywhere, tied embeddings."""
    mixer = attention(5, 5, rope=None, qkv_bias=True, out_bias=True)
    ffn = DenseFfn(intermediate_size=50, activation="gelu", bias=True)
    layer = Layer(mixer=mixer, ffn=ffn, pre_mixer_norm=LAYER, pre_ffn_norm=LAYER)
    positions = LearnedPositions(num_positions=130, offset=2)
    return decoder([layer] * 2, final_norm=LAYER, tie_embeddings=True, learned_positions=positions)


def normed_residual() -> DecoderSpec:
    """Like OPT-350m: norms of the sums, embeddings of another size."""
    mixer = attention(5, 5, rope=None, qkv_bias=True, out_bias=True)
    ffn = DenseFfn(intermediate_size=50, activation="relu", bias=True)
    layer = Layer(
        mixer=mixer,
        ffn=ffn,
        pre_mixer_norm=None,
        post_mixer_norm=LAYER,
        pre_ffn_norm=None,
        post_ffn_norm=LAYER,
        residual="normed",
    )
    positions = LearnedPositions(num_positions=130, offset=2)
    return decoder([layer] * 2, final_norm=None, tie_embeddings=True, learned_positions=positions, embed_size=24)


def parallel_residual() -> DecoderSpec:
    """Like GPT-NeoX: both branches read the same input; biases; a head with a bias."""
    rope = Rope(theta=1000.0, rotary_dim=4, max_position=256, scaling=LinearScaling(factor=2.0))
    mixer = attention(5, 5, rope=rope, qkv_bias=True, out_bias=True)
    ffn = DenseFfn(intermediate_size=48, activation="gelu_tanh", bias=True)
    layer = Layer(mixer=mixer, ffn=ffn, pre_mixer_norm=LAYER, pre_ffn_norm=LAYER, residual="parallel")
    return decoder([layer] * 2, final_norm=LAYER, head_bias=True)


def gemma() -> DecoderSpec:
    """Like Gemma-2: norms after the branches, soft caps, alternating windows, scaled embeddings, norms of q and k."""
    layers = [
        Layer(
            mixer=attention(6, 2, window=window, softcap=5.0, qk_norm=QkNorm(norm=GEMMA, per_head=True)),
            ffn=GatedFfn(intermediate_size=32, activation="gelu_tanh"),
            pre_mixer_norm=GEMMA,
            post_mixer_norm=GEMMA,
            pre_ffn_norm=GEMMA,
            post_ffn_norm=GEMMA,
        )
        for window in (7, None, 12)
    ]
    return decoder(layers, final_norm=GEMMA, tie_embeddings=True, embed_scale=40**0.5, final_softcap=4.0)


def olmo() -> DecoderSpec:
    """Like OLMo-2: norms only after the branches, queries and keys normalised over all heads; sinks besides."""
    mixer = attention(6, 2, qk_norm=QkNorm(norm=RMS, per_head=False), sinks=True)
    layer = Layer(
        mixer=mixer, ffn=GATED, pre_mixer_norm=None, post_mixer_norm=RMS, pre_ffn_norm=None, post_ffn_norm=RMS
    )
    return decoder([layer] * 2)


SPECS = {
    "heads-8-8": lambda: plain(8, 8),
    "heads-6-2": lambda: plain(6, 2, window=9),
    "heads-5-1": lambda: plain(5, 1, qkv_bias=True),
    "learned": learned,
    "parallel-residual": parallel_residual,
    "normed-residual": normed_residual,
    "gemma": gemma,
    "olmo": olmo,
    "moe": lambda: plain(4, 2, ffn=moe()),
    "moe-shared": lambda: plain(
        4, 2, ffn=moe(shared=GatedFfn(intermediate_size=24, activation="silu"), shared_gate=True)
    ),
}
