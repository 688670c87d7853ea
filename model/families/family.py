"""What a family is, and the parts that most Llama-shaped families share. No torch."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from shoal.model.families.config import HfConfig
from shoal.model.families.names import Names, Source, locate
from shoal.model.families.rope import context_length
from shoal.model.spec import Attention, DecoderSpec, Norm


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
    config: HfConfig, family: str, layers: list[Any], final_norm: Norm | None, tied: bool, **more: Any
) -> DecoderSpec:
    """The DecoderSpec around the layers. tied: the family's default of tie_word_embeddings."""
    rope = next((layer.mixer.rope for layer in reversed(layers) if layer.mixer.rope is not None), None)
    max_position = config.integer("max_position_embeddings")
    return DecoderSpec(
        family=family,
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        layers=layers,
        final_norm=final_norm,
        max_position=context_length(rope) if rope else max_position,
        dtype=config.dtype(),
        tie_embeddings=config.boolean("tie_word_embeddings", tied),
        **more,
    )


def layer_windows(config: HfConfig, count: int, window: int | None, default: Callable[[int], bool]) -> list[int | None]:
    """The window of every layer: from layer_types where there are any, else where default(layer index) says it
    slides.
    """
    types = config.value("layer_types", None)
    if types is None:
        types = ["sliding_attention" if window and default(index) else "full_attention" for index in range(count)]
    if not isinstance(types, list) or len(types) != count or set(types) - {"sliding_attention", "full_attention"}:
        raise config.fail("layer_types", f"must be {count} times sliding_attention or full_attention")
    if "sliding_attention" in types and window is None:
        raise config.fail("layer_types", "has sliding_attention layers, but the config sets no sliding_window")
    return [window if kind == "sliding_attention" else None for kind in types]


def attention_names(prefix: str = "{layer}.self_attn") -> dict[str, str]:
    """q_proj, k_proj, v_proj, o_proj and their norms, as most families call them."""
    names = {f"mixer.{x}": f"{prefix}.{x}_proj" for x in "qkvo"}
    return names | {f"mixer.{x}_norm": f"{prefix}.{x}_norm" for x in "qk"}


def llama_names(_: DecoderSpec) -> dict[str, str | Any]:
    """Names of Llama and of those that follow it."""
    return {
        "embed": "{base}embed_tokens",
        "final_norm": "{base}norm",
        "head": "lm_head",
        "pre_mixer_norm": "{layer}.input_layernorm",
        "pre_ffn_norm": "{layer}.post_attention_layernorm",
        **attention_names(),
        **{f"ffn.{x}": f"{{layer}}.mlp.{x}_proj" for x in ("gate", "up", "down")},
    }


def attention(heads: Heads, **more: Any) -> Attention:
    """An Attention of these sizes with the usual scale, head_dim ** -0.5, unless given."""
    more.setdefault("scale", heads.head_dim**-0.5)
    return Attention(num_heads=heads.num_heads, num_kv_heads=heads.num_kv_heads, head_dim=heads.head_dim, **more)
