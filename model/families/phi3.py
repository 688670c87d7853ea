"""Phi-3, Phi-3.5 and Phi-4-mini: query, key and value in one tensor, gate and up in another, LongRoPE."""

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
from shoal.model.families.names import Names, Place
from shoal.model.families.rope import read_rope
from shoal.model.spec import DecoderSpec, Layer


def spec(config: HfConfig) -> DecoderSpec:
    """A Phi-3 config as a spec."""
    config.ignore("embd_pdrop", "resid_pdrop")
    for name in ("attention_bias", "mlp_bias", "lm_head_bias"):  # fields of the original code, off in every release
        config.only(name, False)
    for name in ("interpolate_factor", "full_attn_mod"):
        config.only(name, 1)
    heads, norm = read_heads(config, config.integer("hidden_size")), rms_norm(config, 1e-5)
    layer = Layer(
        mixer=attention(heads, rope=read_rope(config, heads.head_dim), window=config.integer("sliding_window", None)),
        ffn=gated_ffn(config),
        pre_mixer_norm=norm,
        pre_ffn_norm=norm,
    )
    return decoder_spec(config, "phi3", [layer] * config.integer("num_hidden_layers"), norm, tied=False)


def names(spec: DecoderSpec) -> Names:
    """Llama's names with fused tensors."""
    qkv = Place("{layer}.self_attn.qkv_proj", fused=("q", "k", "v"))
    gate_up = Place("{layer}.mlp.gate_up_proj", fused=("gate", "up"))
    fused = {"mixer.q": qkv, "mixer.k": qkv, "mixer.v": qkv, "ffn.gate": gate_up, "ffn.up": gate_up}
    return {**llama_names(spec), **fused}


FAMILY = Family(name="phi3", architectures=("Phi3ForCausalLM",), model_types=("phi3",), spec=spec, names=names)
