"""GPT-2: learned positions, LayerNorm, matrices stored [in, out] with query, key and value side by side."""

from shoal.model.families.config import HfConfig
from shoal.model.families.family import Family, Heads, attention, decoder_spec, layer_norm
from shoal.model.families.names import Names, Place
from shoal.model.spec import DecoderSpec, DenseFfn, Layer, LearnedPositions


def spec(config: HfConfig) -> DecoderSpec:
    """A GPT-2 config as a spec."""
    config.ignore("resid_pdrop", "embd_pdrop", "attn_pdrop", "n_ctx")
    config.ignore("reorder_and_upcast_attn")  # where it rounds in training; attention is float32 inside anyway
    config.ignore(*(name for name in config.raw if name.startswith("summary_")))  # heads of classifiers
    hidden, num_heads = config.integer("n_embd"), config.integer("n_head")
    if hidden % num_heads:
        raise config.fail("n_embd", f"is not a multiple of n_head = {num_heads}")
    heads = Heads(num_heads=num_heads, num_kv_heads=num_heads, head_dim=hidden // num_heads)
    scale = heads.head_dim**-0.5 if config.boolean("scale_attn_weights", True) else 1.0
    by_layer = config.boolean("scale_attn_by_inverse_layer_idx", False)
    norm = layer_norm(config.number("layer_norm_epsilon", 1e-5))
    ffn = DenseFfn(
        intermediate_size=config.integer("n_inner", 4 * hidden),
        activation=config.activation("activation_function", "gelu_new"),
        bias=True,
    )
    layers = [
        Layer(
            mixer=attention(heads, scale=scale / (index + 1 if by_layer else 1), qkv_bias=True, out_bias=True),
            ffn=ffn,
            pre_mixer_norm=norm,
            pre_ffn_norm=norm,
        )
        for index in range(config.integer("n_layer"))
    ]
    positions = config.integer("n_positions")
    return decoder_spec(
        config,
        "gpt2",
        layers,
        norm,
        tied=True,
        hidden_size=hidden,
        max_position=positions,
        learned_positions=LearnedPositions(num_positions=positions),
    )


def names(_: DecoderSpec) -> Names:
    """GPT-2's names; every matrix is transposed."""
    qkv = Place("{layer}.attn.c_attn", fused=("q", "k", "v"), layout="transposed")
    return {
        "embed": "{base}wte",
        "positions": "{base}wpe",
        "final_norm": "{base}ln_f",
        "head": "lm_head",
        "pre_mixer_norm": "{layer}.ln_1",
        "pre_ffn_norm": "{layer}.ln_2",
        "mixer.q": qkv,
        "mixer.k": qkv,
        "mixer.v": qkv,
        "mixer.o": Place("{layer}.attn.c_proj", layout="transposed"),
        "ffn.up": Place("{layer}.mlp.c_fc", layout="transposed"),
        "ffn.down": Place("{layer}.mlp.c_proj", layout="transposed"),
    }


FAMILY = Family(
    name="gpt2",
    architectures=("GPT2LMHeadModel",),
    model_types=("gpt2",),
    spec=spec,
    names=names,
    bases=("transformer.", ""),
    layer="h.{index}",
    ignored=(r"(^|\.)h\.\d+\.attn\.(masked_)?bias$",),  # the causal mask, once a buffer
)
