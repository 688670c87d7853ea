"""GPT-NeoX and Pythia: both branches read the same input, rotary on a quarter of each head, heads interleaved."""

from shoal.model.families.config import HfConfig
from shoal.model.families.family import Family, Heads, attention, decoder_spec, layer_norm
from shoal.model.families.names import Names, Place
from shoal.model.families.rope import read_rope
from shoal.model.spec import DecoderSpec, DenseFfn, Layer


def spec(config: HfConfig) -> DecoderSpec:
    """A GPT-NeoX config as a spec."""
    hidden, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if hidden % num_heads:
        raise config.fail("hidden_size", f"is not a multiple of num_attention_heads = {num_heads}")
    heads = Heads(num_heads=num_heads, num_kv_heads=num_heads, head_dim=hidden // num_heads)
    norm, bias = layer_norm(config.number("layer_norm_eps", 1e-5)), config.boolean("attention_bias", True)
    theta_field = "rotary_emb_base" if config.has("rotary_emb_base") else "rope_theta"
    partial_field = "rotary_pct" if config.has("rotary_pct") else "partial_rotary_factor"
    rope = read_rope(config, heads.head_dim, default_partial=0.25, theta_field=theta_field, partial_field=partial_field)
    for alias, field in (("rope_theta", theta_field), ("partial_rotary_factor", partial_field)):
        config.only(alias, config.raw.get(field))  # some releases of transformers write both
    layer = Layer(
        mixer=attention(heads, qkv_bias=bias, out_bias=bias, rope=rope),
        ffn=DenseFfn(
            intermediate_size=config.integer("intermediate_size"),
            activation=config.activation("hidden_act", "gelu"),
            bias=True,
        ),
        pre_mixer_norm=norm,
        pre_ffn_norm=norm,
        residual="parallel" if config.boolean("use_parallel_residual", True) else "sequential",
    )
    return decoder_spec(config, "gpt_neox", [layer] * config.integer("num_hidden_layers"), norm, tied=False)


def names(spec: DecoderSpec) -> Names:
    """GPT-NeoX's names; query, key and value of a head lie together."""
    head_dim = spec.layers[0].mixer.head_dim
    qkv = Place("{layer}.attention.query_key_value", fused=("q", "k", "v"), layout="heads", head_dim=head_dim)
    return {
        "embed": "{base}embed_in",
        "final_norm": "{base}final_layer_norm",
        "head": ("embed_out", "lm_head"),
        "pre_mixer_norm": "{layer}.input_layernorm",
        "pre_ffn_norm": "{layer}.post_attention_layernorm",
        "mixer.q": qkv,
        "mixer.k": qkv,
        "mixer.v": qkv,
        "mixer.o": "{layer}.attention.dense",
        "ffn.up": "{layer}.mlp.dense_h_to_4h",
        "ffn.down": "{layer}.mlp.dense_4h_to_h",
    }


FAMILY = Family(
    name="gpt_neox",
    architectures=("GPTNeoXForCausalLM",),
    model_types=("gpt_neox",),
    spec=spec,
    names=names,
    bases=("gpt_neox.", ""),
    ignored=(r"\.attention\.(masked_)?bias$", r"\.attention\.rotary_emb\.inv_freq$"),  # buffers of older releases
)
