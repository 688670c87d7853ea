"""Qwen2-MoE (a gated shared expert) and Qwen3-MoE (query and key norms)."""

from shoal.model.families.config import HfConfig
from shoal.model.families.family import (
    Family,
    Heads,
    attention,
    decoder_spec,
    expert_names,
    gated_ffn,
    llama_names,
    moe_ffn,
    read_heads,
    rms_norm,
)
from shoal.model.families.names import Names
from shoal.model.families.rope import read_rope
from shoal.model.spec import Attention, DecoderSpec, Ffn, GatedFfn, Layer, QkNorm


def refuse_windows(config: HfConfig) -> None:
    """Releases of transformers disagree on which layers of these families slide; no published model does."""
    config.only("use_sliding_window", False)
    config.only("layer_types", ["full_attention"] * config.integer("num_hidden_layers"))
    config.ignore("sliding_window", "max_window_layers")


def is_sparse(config: HfConfig) -> list[bool]:
    """Which layers have experts: every decoder_sparse_step-th, without mlp_only_layers."""
    count, step = config.integer("num_hidden_layers"), config.integer("decoder_sparse_step", 1)
    dense = config.value("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(type(index) is int and 0 <= index < count for index in dense):
        raise config.fail("mlp_only_layers", f"must be a list of layers below {count}")
    return [index not in dense and (index + 1) % step == 0 for index in range(count)]


def build(config: HfConfig, family: str, mixer: Attention, experts: Ffn) -> DecoderSpec:
    """The spec from one kind of attention, and experts where there are some."""
    refuse_windows(config)
    norm, dense = rms_norm(config, 1e-6), gated_ffn(config)
    layers = [
        Layer(mixer=mixer, ffn=experts if sparse else dense, pre_mixer_norm=norm, pre_ffn_norm=norm)
        for sparse in is_sparse(config)
    ]
    return decoder_spec(config, family, layers, norm, tied=False)


def read_experts(config: HfConfig, shared: GatedFfn | None = None) -> Ffn:
    """The routed experts. num_local_experts: what transformers 5 calls num_experts."""
    name = "num_local_experts" if config.has("num_local_experts") else "num_experts"
    return moe_ffn(
        config,
        config.integer(name),
        config.integer("num_experts_per_tok"),
        intermediate_size=config.integer("moe_intermediate_size"),
        normalize_top_k=config.boolean("norm_topk_prob", False),
        shared=shared,
        shared_gate=shared is not None,
    )


def qwen2_spec(config: HfConfig) -> DecoderSpec:
    """A Qwen2-MoE config as a spec."""
    heads: Heads = read_heads(config, config.integer("hidden_size"))
    mixer = attention(heads, qkv_bias=config.boolean("qkv_bias", True), rope=read_rope(config, heads.head_dim))
    shared = gated_ffn(config, size_field="shared_expert_intermediate_size")
    return build(config, "qwen2_moe", mixer, read_experts(config, shared))


def qwen3_spec(config: HfConfig) -> DecoderSpec:
    """A Qwen3-MoE config as a spec."""
    heads, bias = read_heads(config, config.integer("hidden_size")), config.boolean("attention_bias", False)
    qk_norm = QkNorm(norm=rms_norm(config, 1e-6), per_head=True)
    rope = read_rope(config, heads.head_dim)
    mixer = attention(heads, qkv_bias=bias, out_bias=bias, rope=rope, qk_norm=qk_norm)
    return build(config, "qwen3_moe", mixer, read_experts(config))


def names(spec: DecoderSpec) -> Names:
    """Llama's names, and the experts'."""
    shared = {f"ffn.shared.{x}": f"{{layer}}.mlp.shared_expert.{x}_proj" for x in ("gate", "up", "down")}
    return {
        **llama_names(spec),
        **expert_names("{layer}.mlp", "gate_proj", "up_proj", "down_proj"),
        **shared,
        "ffn.router": "{layer}.mlp.gate",
        "ffn.shared_gate": "{layer}.mlp.shared_expert_gate",
    }


QWEN2_MOE = Family(
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    model_types=("qwen2_moe",),
    spec=qwen2_spec,
    names=names,
)
QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    model_types=("qwen3_moe",),
    spec=qwen3_spec,
    names=names,
)
