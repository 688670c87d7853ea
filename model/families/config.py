"""Reader of a Hugging Face config.json: every field is honoured, known not to matter, or refused by name. No torch.

A family asks for what it needs; `finish` then refuses what nobody asked for. A field whose value is null is absent.
"""

from typing import Any, Literal, cast

from shoal.model.spec import Activation

# What does not change what a decoder computes.
IDENTITY = """architectures model_type transformers_version _name_or_path name_or_path auto_map _commit_hash
    dtype torch_dtype bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id prefix suffix
    tokenizer_class is_decoder keys_to_ignore_at_inference task_specific_params finetuning_task unsloth_version
    unsloth_fixed"""
TRAINING = """initializer_range attention_dropout hidden_dropout classifier_dropout gradient_checkpointing id2label
    label2id num_labels problem_type tie_encoder_decoder"""
IMPLEMENTATION = """use_cache return_dict output_hidden_states output_attentions torchscript use_bfloat16
    tf_legacy_loss chunk_size_feed_forward cache_implementation attn_implementation _attn_implementation
    _attn_implementation_internal _attn_implementation_autoset _experts_implementation _flash_attn_2_enabled
    use_flash_attn"""
GENERATION = """return_dict_in_generate output_scores max_length min_length do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens"""
WITHOUT_EFFECT = frozenset(f"{IDENTITY} {TRAINING} {IMPLEMENTATION} {GENERATION}".split())

ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}

_REQUIRED: Any = object()


class HfConfig:
    """One config.json (or a part of it) being turned into a spec. where: how errors name it."""

    def __init__(self, raw: dict[str, Any], where: str = "config.json") -> None:
        self.raw, self.where = raw, where
        self.used: set[str] = set()

    def fail(self, name: str, reason: str) -> ValueError:
        """An error about one field, to be raised."""
        return ValueError(f"{self.where}: {name} = {self.raw.get(name)!r:.200} {reason}")

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.raw.get(name) is not None

    def value(self, name: str, default: Any = _REQUIRED, nullable: bool = False) -> Any:
        """The field as it is, or the default when absent. nullable: a null means None, not the default."""
        self.used.add(name)
        value = self.raw.get(name)
        if value is not None or (nullable and name in self.raw):
            return value
        if default is _REQUIRED:
            raise ValueError(f"{self.where}: {name} is missing; the family needs it")
        return default

    def integer(self, name: str, default: Any = _REQUIRED, nullable: bool = False) -> Any:
        """A positive integer, or the default, which may be None."""
        value = self.value(name, default, nullable)
        if value is not None and (type(value) is not int or value < 1):
            raise self.fail(name, "must be an integer >= 1")
        return value

    def number(self, name: str, default: Any = _REQUIRED, nullable: bool = False) -> Any:
        """A finite positive number as a float, or the default, which may be None."""
        value = self.value(name, default, nullable)
        if value is None:
            return None
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise self.fail(name, "must be a finite number > 0")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """A true/false field."""
        value = self.value(name, default)
        if not isinstance(value, bool):
            raise self.fail(name, "must be true or false")
        return value

    def activation(self, name: str, default: str) -> Activation:
        """The feed-forward's activation."""
        value = self.value(name, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise self.fail(name, f"is not a supported activation; supported: {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def only(self, name: str, *supported: Any) -> None:
        """Refuse the field unless it is absent or one of `supported`."""
        self.used.add(name)
        value = self.raw.get(name)
        if value is not None and not any(
            value == fine and isinstance(value, bool) == isinstance(fine, bool) for fine in supported
        ):
            raise self.fail(name, f"is not supported; supported: {', '.join(map(repr, supported)) or 'null'}")

    def ignore(self, *names: str) -> None:
        """These fields do not change what the model computes in inference."""
        self.used.update(names)

    def dtype(self) -> Literal["float32", "bfloat16", "float16"]:
        """The declared type of the weights (`dtype`, or `torch_dtype` in transformers 4); float32 without one."""
        for name in ("dtype", "torch_dtype"):
            if self.has(name):
                value = str(self.raw[name]).removeprefix("torch.")
                if value not in ("float32", "bfloat16", "float16"):
                    raise self.fail(name, "is not supported; supported: float32, bfloat16, float16")
                return cast(Literal["float32", "bfloat16", "float16"], value)
        return "float32"

    def finish(self) -> None:
        """Refuse what nobody asked for. Raises ValueError naming every such field and its value."""
        self.only("pruned_heads", {})
        for name in ("is_encoder_decoder", "add_cross_attention", "per_layer_config", "cross_attention_hidden_size"):
            self.only(name, False)
        known = self.used | WITHOUT_EFFECT
        unknown = sorted(name for name in self.raw if self.has(name) and name not in known)
        if unknown:
            fields = ", ".join(f"{name} = {self.raw[name]!r:.80}" for name in unknown)
            raise ValueError(
                f"{self.where}: not supported for this architecture: {fields}. It is not known what they change; "
                "remove a field only if the model computes the same without it"
            )
