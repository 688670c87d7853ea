"""Llama 1 to 3.x."""

from shoal.model.families.config import HfConfig
from shoal.model.families.family import Family, attention, decoder_spec, llama_names, read_heads, rms_norm
from shoal.model.families.rope import read_rope
from shoal.model.spec import DecoderSpec, GatedFfn, Layer


def spec(config: HfConfig) -> DecoderSpec:
    """A Llama config as a spec."""
    heads = read_heads(config, config.integer("hidden_size"))
    norm = rms_norm(config, 1e-6)
    bias = config.boolean("attention_bias", False)
    config.ignore("pretraining_tp")  # how training sliced the matrices; the products are the same
    layer = Layer(
        mixer=attention(heads, qkv_bias=bias, out_bias=bias, rope=read_rope(config, heads.head_dim)),
        ffn=GatedFfn(
            intermediate_size=config.integer("intermediate_size"),
            activation=config.activation("hidden_act", "silu"),
            bias=config.boolean("mlp_bias", False),
        ),
        pre_mixer_norm=norm,
        pre_ffn_norm=norm,
    )
    return decoder_spec(config, "llama", [layer] * config.integer("num_hidden_layers"), norm, tied=False)


FAMILY = Family(name="llama", architectures=("LlamaForCausalLM",), model_types=("llama",), spec=spec, names=llama_names)
