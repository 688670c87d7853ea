"""Qwen2 and Qwen2.5 (biases on queries, keys and values) and Qwen3 (query and key norms instead), dense."""

from shoal.model.families.config import HfConfig
from shoal.model.families.family import (
    Family,
    attention,
    decoder_spec,
    gated_ffn,
    layer_windows,
    llama_names,
    read_heads,
    rms_norm,
)
from shoal.model.families.rope import read_rope
from shoal.model.spec import DecoderSpec, Layer, QkNorm


def read_windows(config: HfConfig, count: int) -> list[int | None]:
    """Layers from max_window_layers on slide when use_sliding_window is set, or those layer_types names."""
    slides, first = config.boolean("use_sliding_window", False), config.value("max_window_layers", 28)
    window = config.integer("sliding_window", 4096, nullable=True) if slides else None
    config.ignore("sliding_window")  # without use_sliding_window
    return layer_windows(config, count, window, lambda index: index >= first)


def qwen2_spec(config: HfConfig) -> DecoderSpec:
    """A Qwen2 config as a spec."""
    config.only("use_mrope", False)
    heads, norm = read_heads(config, config.integer("hidden_size")), rms_norm(config, 1e-6)
    rope, ffn = read_rope(config, heads.head_dim), gated_ffn(config)
    layers = [
        Layer(
            mixer=attention(heads, qkv_bias=True, rope=rope, window=window),
            ffn=ffn,
            pre_mixer_norm=norm,
            pre_ffn_norm=norm,
        )
        for window in read_windows(config, config.integer("num_hidden_layers"))
    ]
    return decoder_spec(config, "qwen2", layers, norm, tied=False)


def qwen3_spec(config: HfConfig) -> DecoderSpec:
    """A Qwen3 config as a spec."""
    heads, norm = read_heads(config, config.integer("hidden_size"), default_head_dim=128), rms_norm(config, 1e-6)
    rope, ffn, bias = read_rope(config, heads.head_dim), gated_ffn(config), config.boolean("attention_bias", False)
    qk_norm = QkNorm(norm=norm, per_head=True)
    layers = [
        Layer(
            mixer=attention(heads, qkv_bias=bias, out_bias=bias, rope=rope, qk_norm=qk_norm, window=window),
            ffn=ffn,
            pre_mixer_norm=norm,
            pre_ffn_norm=norm,
        )
        for window in read_windows(config, config.integer("num_hidden_layers"))
    ]
    return decoder_spec(config, "qwen3", layers, norm, tied=False)


QWEN2 = Family(
    name="qwen2", architectures=("Qwen2ForCausalLM",), model_types=("qwen2",), spec=qwen2_spec, names=llama_names
)
QWEN3 = Family(
    name="qwen3", architectures=("Qwen3ForCausalLM",), model_types=("qwen3",), spec=qwen3_spec, names=llama_names
)
