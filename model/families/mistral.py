"""Mistral: Llama with a sliding window in every layer (7B v0.1), or without one."""

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
from shoal.model.spec import DecoderSpec, Layer


def spec(config: HfConfig) -> DecoderSpec:
    """A Mistral config as a spec."""
    heads, norm = read_heads(config, config.integer("hidden_size")), rms_norm(config, 1e-6)
    rope, ffn, count = read_rope(config, heads.head_dim), gated_ffn(config), config.integer("num_hidden_layers")
    window = config.integer("sliding_window", 4096, nullable=True)
    windows = layer_windows(config, count, window, lambda _: True)
    if len(set(windows)) > 1:
        raise config.fail("layer_types", "mixes windows, which this architecture does not do")
    layer = Layer(mixer=attention(heads, rope=rope, window=windows[0]), ffn=ffn, pre_mixer_norm=norm, pre_ffn_norm=norm)
    return decoder_spec(config, "mistral", [layer] * count, norm, tied=False)


FAMILY = Family(
    name="mistral", architectures=("MistralForCausalLM",), model_types=("mistral",), spec=spec, names=llama_names
)
