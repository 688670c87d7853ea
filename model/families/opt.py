"""OPT: learned positions that begin at row 2, LayerNorm, ReLU. The 350m model normalises after the residual and has
smaller embeddings.
"""

from shoal.model.families.config import HfConfig
from shoal.model.families.family import Family, attention, decoder_spec, layer_norm, read_heads
from shoal.model.families.names import Names
from shoal.model.spec import DecoderSpec, DenseFfn, Layer, LearnedPositions

POSITION_OFFSET = 2


def spec(config: HfConfig) -> DecoderSpec:
    """An OPT config as a spec."""
    config.ignore("dropout", "activation_dropout", "layerdrop", "init_std")
    norms_first = config.boolean("do_layer_norm_before", True)
    config.only("layer_norm_elementwise_affine", True)
    hidden, positions = config.integer("hidden_size"), config.integer("max_position_embeddings")
    embed_size = config.integer("word_embed_proj_dim", hidden)
    heads, norm, bias = read_heads(config, hidden), layer_norm(1e-5), config.boolean("enable_bias", True)
    layer = Layer(
        mixer=attention(heads, qkv_bias=bias, out_bias=bias),
        ffn=DenseFfn(
            intermediate_size=config.integer("ffn_dim"),
            activation=config.activation("activation_function", "relu"),
            bias=bias,
        ),
        pre_mixer_norm=norm if norms_first else None,
        post_mixer_norm=None if norms_first else norm,
        pre_ffn_norm=norm if norms_first else None,
        post_ffn_norm=None if norms_first else norm,
        residual="sequential" if norms_first else "normed",
    )
    removed = config.boolean("_remove_final_layer_norm", False)
    return decoder_spec(
        config,
        "opt",
        [layer] * config.integer("num_hidden_layers"),
        norm if norms_first and not removed else None,
        tied=True,
        embed_size=embed_size if embed_size != hidden else None,
        max_position=positions,
        learned_positions=LearnedPositions(num_positions=positions + POSITION_OFFSET, offset=POSITION_OFFSET),
    )


def names(_: DecoderSpec) -> Names:
    """OPT's names."""
    return {
        "embed": "{base}embed_tokens",
        "embed_in": "{base}project_in",
        "embed_out": "{base}project_out",
        "positions": "{base}embed_positions",
        "final_norm": "{base}final_layer_norm",
        "head": "lm_head",
        **{f"{at}_mixer_norm": "{layer}.self_attn_layer_norm" for at in ("pre", "post")},
        **{f"{at}_ffn_norm": "{layer}.final_layer_norm" for at in ("pre", "post")},
        **{f"mixer.{x}": f"{{layer}}.self_attn.{x}_proj" for x in "qkv"},
        "mixer.o": "{layer}.self_attn.out_proj",
        "ffn.up": "{layer}.fc1",
        "ffn.down": "{layer}.fc2",
    }


FAMILY = Family(
    name="opt",
    architectures=("OPTForCausalLM",),
    model_types=("opt",),
    spec=spec,
    names=names,
    bases=("model.decoder.", "decoder.", ""),
)
