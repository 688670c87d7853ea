"""OLMo-2: norms after each branch only, and over all query and key heads at once."""

from shoal.model.families.config import HfConfig
from shoal.model.families.family import (
    Family,
    attention,
    decoder_spec,
    gated_ffn,
    llama_names,
    read_heads,
    rms_norm,
)
from shoal.model.families.names import Names
from shoal.model.families.rope import read_rope
from shoal.model.spec import DecoderSpec, Layer, QkNorm


def spec(config: HfConfig) -> DecoderSpec:
    """An OLMo-2 config as a spec."""
    heads, norm = read_heads(config, config.integer("hidden_size")), rms_norm(config, 1e-5)
    bias = config.boolean("attention_bias", False)
    mixer = attention(
        heads,
        qkv_bias=bias,
        out_bias=bias,
        rope=read_rope(config, heads.head_dim),
        qk_norm=QkNorm(norm=norm, per_head=False),
    )
    layer = Layer(
        mixer=mixer,
        ffn=gated_ffn(config),
        pre_mixer_norm=None,
        post_mixer_norm=norm,
        pre_ffn_norm=None,
        post_ffn_norm=norm,
    )
    return decoder_spec(config, "olmo2", [layer] * config.integer("num_hidden_layers"), norm, tied=False)


def names(spec: DecoderSpec) -> Names:
    """Llama's names with the norms where they are."""
    return {
        **llama_names(spec),
        "post_mixer_norm": "{layer}.post_attention_layernorm",
        "post_ffn_norm": "{layer}.post_feedforward_layernorm",
    }


FAMILY = Family(name="olmo2", architectures=("Olmo2ForCausalLM",), model_types=("olmo2",), spec=spec, names=names)
