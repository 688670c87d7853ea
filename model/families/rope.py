"""Rotary positions of a Hugging Face config, in both spellings: `rope_parameters` (transformers 5), `rope_theta` +
`rope_scaling` (4). No torch.
"""

import math
from typing import Any

from shoal.model.families.config import HfConfig
from shoal.model.spec import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    RopeScaling,
    YarnScaling,
)


def rope_fields(config: HfConfig, layer_type: str | None) -> dict[str, Any]:
    """The scaling dictionary of a layer type, flat, whatever the spelling; a copy."""
    new, old = config.value("rope_parameters", None), config.value("rope_scaling", None)
    if new is not None and old is not None and new != old:
        raise config.fail("rope_scaling", "contradicts rope_parameters; keep one of them")
    fields = new if new is not None else (old or {})
    if not isinstance(fields, dict):
        raise config.fail("rope_parameters" if new is not None else "rope_scaling", "must be an object")
    nested = any(isinstance(value, dict) for value in fields.values())
    if nested != (layer_type is not None) and (nested or (new is not None and fields)):
        shape = "hold one object per layer type" if layer_type else "be one object for all layers"
        raise config.fail("rope_parameters", f"must {shape} for this architecture")
    if nested:
        fields = fields.get(layer_type)
        if not isinstance(fields, dict):
            raise config.fail("rope_parameters", f"has no object for {layer_type} layers")
    return dict(fields)


class RopeReader:
    """Takes fields out of a rope dictionary and refuses what remains."""

    def __init__(self, config: HfConfig, fields: dict[str, Any]) -> None:
        self.config, self.fields = config, {key: value for key, value in fields.items() if value is not None}
        old, new = self.fields.pop("type", None), self.fields.pop("rope_type", None)
        self.kind = str(new or old or "default")

    def fail(self, name: str, reason: str) -> ValueError:
        """An error about one field of the dictionary, to be raised."""
        return ValueError(f"{self.config.where}: rope parameters: {name} {reason}")

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number; without a default it must be there."""
        value = self.fields.pop(name, default)
        if value is None:
            raise self.fail(name, f"is missing; rope type {self.kind!r} needs it")
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.fail(name, f"= {value!r} must be a finite number > 0")
        return float(value)

    def optional(self, name: str) -> float | None:
        """A positive number or None."""
        return self.number(name) if name in self.fields else None

    def factors(self, name: str, length: int) -> list[float]:
        """A list of `length` positive numbers."""
        value = self.fields.pop(name, None)
        if (
            not isinstance(value, list)
            or len(value) != length
            or not all(type(x) in (int, float) and x > 0 for x in value)
        ):
            got = f"a list of {len(value)}" if isinstance(value, list) else repr(value)
            raise self.fail(name, f"must be a list of {length} positive numbers (half the rotary dimension), got {got}")
        return [float(x) for x in value]

    def finish(self) -> None:
        """Refuse the rest."""
        if self.fields:
            raise self.fail(", ".join(sorted(self.fields)), f"is not supported for rope type {self.kind!r}")


def longrope(reader: RopeReader, rotary_dim: int, max_position: int, original: int) -> LongRopeScaling:
    """LongRoPE with its attention factor worked out as transformers does."""
    factor = reader.optional("factor") or max_position / original
    attention = reader.optional("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRopeScaling(
        short_factor=reader.factors("short_factor", rotary_dim // 2),
        long_factor=reader.factors("long_factor", rotary_dim // 2),
        original_max_position=original,
        attention_factor=attention,
    )


def read_scaling(reader: RopeReader, rotary_dim: int, max_position: int, original: int) -> RopeScaling | None:
    """The scaling of the reader's kind. original: context length before scaling."""
    match reader.kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(factor=reader.number("factor"))
        case "dynamic":
            return DynamicScaling(factor=reader.number("factor"), original_max_position=max_position)
        case "llama3":
            return Llama3Scaling(
                factor=reader.number("factor"),
                low_freq_factor=reader.number("low_freq_factor"),
                high_freq_factor=reader.number("high_freq_factor"),
                original_max_position=original,
            )
        case "longrope" | "su":
            return longrope(reader, rotary_dim, max_position, original)
        case "yarn" if "short_factor" in reader.fields:  # what early Phi-3 configs call longrope
            return longrope(reader, rotary_dim, max_position, original)
        case "yarn":
            truncate = reader.fields.pop("truncate", True)
            if not isinstance(truncate, bool):
                raise reader.fail("truncate", f"= {truncate!r} must be true or false")
            return YarnScaling(
                factor=reader.optional("factor") or max_position / original,
                original_max_position=original,
                beta_fast=reader.number("beta_fast", 32.0),
                beta_slow=reader.number("beta_slow", 1.0),
                attention_factor=reader.optional("attention_factor"),
                mscale=reader.optional("mscale"),
                mscale_all_dim=reader.optional("mscale_all_dim"),
                truncate=truncate,
            )
    raise reader.fail(
        "rope_type", f"= {reader.kind!r} is not supported; supported: default, linear, dynamic, llama3, yarn, longrope"
    )


def read_rope(
    config: HfConfig,
    head_dim: int,
    *,
    default_theta: float = 10000.0,
    default_partial: float = 1.0,
    theta_field: str = "rope_theta",
    partial_field: str = "partial_rotary_factor",
    layer_type: str | None = None,
    scaled: bool = True,
) -> Rope:
    """The Rope of a config. theta_field, partial_field: how transformers 4 names them; scaled=False: rope_scaling is
    not for these layers.
    """
    max_position = config.integer("max_position_embeddings")
    theta, partial = config.number(theta_field, default_theta), config.number(partial_field, default_partial)
    fields = rope_fields(config, layer_type)
    if not scaled and not config.has("rope_parameters"):
        fields = {}
    reader = RopeReader(config, fields)
    theta = reader.number("rope_theta", theta)
    rotary_dim = int(head_dim * reader.number("partial_rotary_factor", partial))
    if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        raise reader.fail(
            "partial_rotary_factor", f"gives {rotary_dim} rotary dimensions of {head_dim}; it must be even"
        )
    uses_original = reader.kind in ("llama3", "yarn", "longrope", "su")
    inner = reader.fields.pop("original_max_position_embeddings", None) if uses_original else None
    original = config.integer("original_max_position_embeddings", inner or max_position)
    if type(original) is not int or original < 1:
        raise reader.fail("original_max_position_embeddings", f"= {original!r} must be an integer >= 1")
    scaling = read_scaling(reader, rotary_dim, max_position, original)
    reader.finish()
    return Rope(theta=theta, rotary_dim=rotary_dim, max_position=max_position, scaling=scaling)


def context_length(rope: Rope) -> int:
    """Tokens a model with these positions was made for: dynamic and yarn scaling extend what the config declares."""
    scaling = rope.scaling
    if isinstance(scaling, DynamicScaling):
        return int(rope.max_position * scaling.factor)
    if isinstance(scaling, YarnScaling):
        return max(rope.max_position, int(scaling.original_max_position * scaling.factor))
    return rope.max_position
