"""Mixtral: Mistral with eight (or any number of) experts, their router's weights renormalised over the chosen ones."""

from shoal.model.families.config import HfConfig
from shoal.model.families.family import (
    Family,
    attention,
    decoder_spec,
    expert_names,
    llama_names,
    moe_ffn,
    read_heads,
    rms_norm,
)
from shoal.model.families.names import Names
from shoal.model.families.rope import read_rope
from shoal.model.spec import DecoderSpec, Layer


def spec(config: HfConfig) -> DecoderSpec:
    """A Mixtral config as a spec."""
    heads, norm = read_heads(config, config.integer("hidden_size")), rms_norm(config, 1e-5)
    ffn = moe_ffn(
        config,
        config.integer("num_local_experts", 8),
        config.integer("num_experts_per_tok", 2),
        intermediate_size=config.integer("intermediate_size"),
        normalize_top_k=True,
    )
    mixer = attention(
        heads,
        rope=read_rope(config, heads.head_dim, default_theta=1e6),
        window=config.integer("sliding_window", None),
    )
    layer = Layer(mixer=mixer, ffn=ffn, pre_mixer_norm=norm, pre_ffn_norm=norm)
    return decoder_spec(config, "mixtral", [layer] * config.integer("num_hidden_layers"), norm, tied=False)


def names(spec: DecoderSpec) -> Names:
    """The hub's names: w1 is the gate, w3 up, w2 down."""
    experts = expert_names("{layer}.block_sparse_moe", "w1", "w3", "w2")
    return {**llama_names(spec), **experts, "ffn.router": ("{layer}.block_sparse_moe.gate", "{layer}.mlp.gate")}


FAMILY = Family(name="mixtral", architectures=("MixtralForCausalLM",), model_types=("mixtral",), spec=spec, names=names)
