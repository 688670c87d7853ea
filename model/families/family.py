"""What a family is, and the parts that most Llama-shaped families share. No torch."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from shoal.model.families.config import HfConfig
from shoal.model.families.names import Names, Place, Source, locate
from shoal.model.families.rope import context_length
from shoal.model.spec import Attention, DecoderSpec, GatedFfn, Layer, MoeFfn, Norm


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family. architectures: names it answers to in config.json; model_types: the same for configs without
    architectures.

    spec: config -> DecoderSpec, calling config.finish() last is the registry's part. names: where its parameters lie,
    per module. bases: prefixes under which the base model may be stored; layer: template of a layer below the base.
    ignored: regular expressions of tensors that nothing needs (buffers of older releases).
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    spec: Callable[[HfConfig], DecoderSpec]
    names: Callable[[DecoderSpec], Names]
    bases: tuple[str, ...] = ("model.", "")
    layer: str = "layers.{index}"
    ignored: tuple[str, ...] = ()

    def sources(self, spec: DecoderSpec, available: Collection[str]) -> dict[str, Source]:
        """Where every logical parameter lies, given the names of the checkpoint's tensors. See names.locate."""
        return locate(spec, self.names(spec), self.bases, self.layer, available)

    def is_ignorable(self, tensor: str, spec: DecoderSpec) -> bool:
        """Whether a tensor that no parameter needs may be in the checkpoint all the same."""
        patterns = (*self.ignored, r"(^|\.)rotary_emb\.inv_freq$")
        if spec.tie_embeddings:
            patterns = (*patterns, r"(^|\.)(lm_head|embed_out)\.weight$")
        return any(re.search(pattern, tensor) for pattern in patterns)


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The attention sizes every config declares."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


def read_heads(config: HfConfig, hidden_size: int, default_head_dim: int | None = None) -> Heads:
    """num_attention_heads, num_key_value_heads and head_dim; absent ones as transformers derives them."""
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = config.integer("num_key_value_heads", num_heads)
    head_dim = config.integer("head_dim", default_head_dim)
    if head_dim is None:
        if hidden_size % num_heads:
            raise config.fail(
                "hidden_size", f"is not a multiple of num_attention_heads = {num_heads}, and head_dim is absent"
            )
        head_dim = hidden_size // num_heads
    if num_heads % num_kv_heads:
        raise config.fail("num_attention_heads", f"is not a multiple of num_key_value_heads = {num_kv_heads}")
    return Heads(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)


def rms_norm(config: HfConfig, default_eps: float, unit_offset: bool = False) -> Norm:
    """The RMSNorm of a config."""
    return Norm(kind="rms", eps=config.number("rms_norm_eps", default_eps), unit_offset=unit_offset)


def decoder_spec(
    config: HfConfig, family: str, layers: list[Layer], final_norm: Norm | None, *, tied: bool, **more: Any
) -> DecoderSpec:
    """The DecoderSpec around the layers. tied: the family's default of tie_word_embeddings; more: what differs.

    A window as long as the context hides nothing: it becomes full attention, which shares a cache group.
    """
    rope = next((layer.mixer.rope for layer in reversed(layers) if layer.mixer.rope is not None), None)
    if rope is not None:
        more.setdefault("max_position", context_length(rope))
    layers = [
        replace(layer, mixer=replace(layer.mixer, window=None))
        if layer.mixer.window is not None and layer.mixer.window >= more["max_position"]
        else layer
        for layer in layers
    ]
    if "hidden_size" not in more:
        more["hidden_size"] = config.integer("hidden_size")
    return DecoderSpec(
        family=family,
        vocab_size=config.integer("vocab_size"),
        layers=layers,
        final_norm=final_norm,
        dtype=config.dtype(),
        tie_embeddings=config.boolean("tie_word_embeddings", tied),
        **more,
    )


def gated_ffn(
    config: HfConfig,
    *,
    activation_field: str = "hidden_act",
    default: str = "silu",
    size_field: str = "intermediate_size",
) -> GatedFfn:
    """The usual gated feed-forward without bias. default: of the activation."""
    return GatedFfn(
        intermediate_size=config.integer(size_field), activation=config.activation(activation_field, default)
    )


def moe_ffn(config: HfConfig, num_experts: int, top_k: int, **more: Any) -> MoeFfn:
    """Routed experts. Raises ValueError when a token would take more experts than there are."""
    if top_k > num_experts:
        raise config.fail("num_experts_per_tok", f"exceeds the number of experts, {num_experts}")
    config.ignore("router_aux_loss_coef", "output_router_logits", "router_jitter_noise")
    return MoeFfn(num_experts=num_experts, top_k=top_k, activation=config.activation("hidden_act", "silu"), **more)


def layer_norm(eps: float) -> Norm:
    """LayerNorm with weight and bias."""
    return Norm(kind="layer", eps=eps, bias=True)


def layer_windows(config: HfConfig, count: int, window: int | None, default: Callable[[int], bool]) -> list[int | None]:
    """The window of every layer: from layer_types where there are any, else where default(layer index) says it
    slides.
    """
    types = config.value("layer_types", None)
    if types is None:
        types = ["sliding_attention" if window and default(index) else "full_attention" for index in range(count)]
    known = ("sliding_attention", "full_attention")
    if not isinstance(types, list) or len(types) != count or not all(kind in known for kind in types):
        raise config.fail("layer_types", f"must be {count} times sliding_attention or full_attention")
    if "sliding_attention" in types and window is None:
        raise config.fail("layer_types", "has sliding_attention layers, but the config sets no sliding_window")
    return [window if kind == "sliding_attention" else None for kind in types]


def llama_names(_: DecoderSpec) -> Names:
    """Names of Llama and of those that follow it, biases and query/key norms included."""
    return {
        "embed": "{base}embed_tokens",
        "final_norm": "{base}norm",
        "head": "lm_head",
        "pre_mixer_norm": "{layer}.input_layernorm",
        "pre_ffn_norm": "{layer}.post_attention_layernorm",
        **{f"mixer.{x}": f"{{layer}}.self_attn.{x}_proj" for x in "qkvo"},
        **{f"mixer.{x}_norm": f"{{layer}}.self_attn.{x}_norm" for x in "qk"},
        **{f"ffn.{x}": f"{{layer}}.mlp.{x}_proj" for x in ("gate", "up", "down")},
    }


def expert_names(module: str, gate: str, up: str, down: str) -> Names:
    """Experts under `module`, one tensor each with these names, or stacked as transformers 5 holds them in memory."""
    stacked = f"{module.replace('block_sparse_moe', 'mlp')}.experts"
    fused = Place(f"{stacked}.gate_up_proj", fused=("gate", "up"), stacked=True)
    each = module + ".experts.{expert}."
    return {
        "ffn.experts.gate": (each + gate, fused),
        "ffn.experts.up": (each + up, fused),
        "ffn.experts.down": (each + down, Place(f"{stacked}.down_proj", stacked=True)),
    }


def attention(heads: Heads, **more: Any) -> Attention:
    """An Attention of these sizes with the usual scale, head_dim ** -0.5, unless given."""
    more.setdefault("scale", heads.head_dim**-0.5)
    return Attention(num_heads=heads.num_heads, num_kv_heads=heads.num_kv_heads, head_dim=heads.head_dim, **more)
