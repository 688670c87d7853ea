"""Gemma-2 and the text part of Gemma-3: norms before and after each branch, alternating windows, scaled embeddings."""

from collections.abc import Callable
from typing import Any

from shoal.model.families.config import HfConfig
from shoal.model.families.family import (
    Family,
    Heads,
    attention,
    decoder_spec,
    gated_ffn,
    layer_windows,
    llama_names,
    read_heads,
    rms_norm,
)
from shoal.model.families.names import Names
from shoal.model.families.rope import read_rope
from shoal.model.spec import DecoderSpec, Layer, QkNorm, Rope

# What configs of Gemma3ForConditionalGeneration leave out of text_config, from transformers' Gemma3TextConfig.
GEMMA3_TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
}


def build(
    config: HfConfig,
    family: str,
    heads: Heads,
    windows: list[int | None],
    rope_of: Callable[[int | None], Rope],
    qk_norm: QkNorm | None,
    softcap: float | None,
) -> DecoderSpec:
    """The spec common to both. rope_of: the rope of a layer with this window."""
    config.ignore("hidden_act")  # transformers reads hidden_activation only
    config.only("use_bidirectional_attention", False)
    norm = rms_norm(config, 1e-6, unit_offset=True)
    ffn = gated_ffn(config, activation_field="hidden_activation", default="gelu_pytorch_tanh")
    bias = config.boolean("attention_bias", False)
    scale = config.number("query_pre_attn_scalar", 256) ** -0.5
    layers = [
        Layer(
            mixer=attention(
                heads,
                scale=scale,
                qkv_bias=bias,
                out_bias=bias,
                rope=rope_of(window),
                qk_norm=qk_norm,
                window=window,
                softcap=softcap,
            ),
            ffn=ffn,
            pre_mixer_norm=norm,
            post_mixer_norm=norm,
            pre_ffn_norm=norm,
            post_ffn_norm=norm,
        )
        for window in windows
    ]
    return decoder_spec(
        config,
        family,
        layers,
        norm,
        tied=True,
        embed_scale=config.integer("hidden_size") ** 0.5,
        final_softcap=config.number("final_logit_softcapping", 30.0 if family == "gemma2" else None, nullable=True),
    )


def gemma2_spec(config: HfConfig) -> DecoderSpec:
    """A Gemma-2 config as a spec: every other layer slides, beginning with the first."""
    heads = read_heads(config, config.integer("hidden_size"), default_head_dim=256)
    window = config.integer("sliding_window", 4096, nullable=True)
    config.only("sliding_window_size", window)  # an older name of the same, written beside it
    windows = layer_windows(config, config.integer("num_hidden_layers"), window, lambda index: index % 2 == 0)
    rope, softcap = read_rope(config, heads.head_dim), config.number("attn_logit_softcapping", 50.0, nullable=True)
    return build(config, "gemma2", heads, windows, lambda _: rope, None, softcap)


def gemma3_spec(config: HfConfig) -> DecoderSpec:
    """A Gemma-3 config as a spec. Of Gemma3ForConditionalGeneration the text part alone: images are not supported."""
    if config.raw.get("text_config") is not None:
        return gemma3_text_part(config)
    heads = read_heads(config, config.integer("hidden_size"), default_head_dim=256)
    window = config.integer("sliding_window", 4096, nullable=True)
    period = config.value("sliding_window_pattern", config.raw.get("_sliding_window_pattern", 6))
    config.ignore("_sliding_window_pattern")
    if type(period) is not int or period < 1:
        raise config.fail("sliding_window_pattern", "must be an integer >= 1")
    config.only("attn_logit_softcapping")  # transformers has the field but does not apply it
    count = config.integer("num_hidden_layers")
    windows = layer_windows(config, count, window, lambda index: (index + 1) % period != 0)
    full = read_rope(config, heads.head_dim, default_theta=1e6, layer_type="full_attention")
    local = read_rope(
        config, heads.head_dim, theta_field="rope_local_base_freq", layer_type="sliding_attention", scaled=False
    )
    qk_norm = QkNorm(norm=rms_norm(config, 1e-6, unit_offset=True), per_head=True)
    return build(config, "gemma3", heads, windows, lambda window: local if window else full, qk_norm, None)


def gemma3_text_part(config: HfConfig) -> DecoderSpec:
    """The text_config of a Gemma3ForConditionalGeneration."""
    outer = {name: config.raw[name] for name in ("dtype", "torch_dtype", "tie_word_embeddings") if config.has(name)}
    text = HfConfig({**GEMMA3_TEXT_DEFAULTS, **outer, **config.value("text_config")}, f"{config.where}: text_config")
    config.ignore("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index")
    config.ignore("tie_word_embeddings")
    spec = gemma3_spec(text)
    text.finish()
    return spec


def names(spec: DecoderSpec) -> Names:
    """Llama's names with four norms per layer."""
    return {
        **llama_names(spec),
        "post_mixer_norm": "{layer}.post_attention_layernorm",
        "pre_ffn_norm": "{layer}.pre_feedforward_layernorm",
        "post_ffn_norm": "{layer}.post_feedforward_layernorm",
    }


GEMMA2 = Family(
    name="gemma2", architectures=("Gemma2ForCausalLM",), model_types=("gemma2",), spec=gemma2_spec, names=names
)
GEMMA3 = Family(
    name="gemma3",
    architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    model_types=("gemma3_text", "gemma3"),
    spec=gemma3_spec,
    names=names,
    bases=("model.", "language_model.model.", "model.language_model.", ""),
    ignored=(r"^(model\.)?(vision_tower|multi_modal_projector)\.",),
)
