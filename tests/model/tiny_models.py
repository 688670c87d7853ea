"""Tiny random Hugging Face models of every family, written by save_pretrained: what parity, loading and layout tests
run on.

    folder = make_model("llama", tmp_path_factory.getbasetemp())      # made once per folder, then reused

Sizes are odd on purpose (head_dim that hidden_size does not imply, 6 query heads on 2, a vocabulary of 101, windows
shorter than a test's
sequences). Weights are drawn so that logits spread by several units: argmax gaps are wide beside float32 rounding.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 101
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def rope(kind: str = "default", theta: float = 10000.0, **more: Any) -> dict[str, Any]:
    """rope_parameters as transformers 5 spells them."""
    return {"rope_type": kind, "rope_theta": theta, **more}


def llama(**more: Any) -> transformers.PreTrainedConfig:
    """Llama with an explicit head_dim."""
    return transformers.LlamaConfig(**{**SIZES, "head_dim": 12, **more})


CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama": lambda: llama(),
    "llama_bias": lambda: llama(attention_bias=True, mlp_bias=True, num_key_value_heads=6, head_dim=8),
    "llama3": lambda: llama(
        tie_word_embeddings=True,
        rope_parameters=rope(
            "llama3", 500.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
        ),
    ),
    "llama_linear": lambda: llama(rope_parameters=rope("linear", factor=2.5)),
    "llama_dynamic": lambda: llama(max_position_embeddings=32, rope_parameters=rope("dynamic", factor=4.0)),
    "llama_yarn": lambda: llama(rope_parameters=rope("yarn", 500.0, factor=8.0, original_max_position_embeddings=64)),
}


def draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Fill every parameter: matrices with a gain near one, embeddings wide, norms near one, biases small."""
    generator = torch.Generator().manual_seed(seed)
    vocab = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator,union-attr]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.empty(parameter.shape, dtype=torch.float32).normal_(generator=generator)
            if parameter.dim() == 1:
                near_one = name.endswith("weight") and "gemma" not in type(model).__name__.lower()
                noise = noise * 0.1 + (1.0 if near_one else 0.0)
            elif parameter.shape[0] == vocab:
                noise *= 0.5
            else:
                noise *= 0.16
            parameter.copy_(noise)


def make_model(name: str, root: Path, dtype: str = "float32", seed: int = 0, max_shard_size: str = "1GB") -> Path:
    """The folder of a tiny model, written on first use. name: a key of CONFIGS. max_shard_size: as save_pretrained
    takes it.
    """
    folder = Path(root) / f"{name}-{dtype}-{seed}-{max_shard_size}"
    if not (folder / "config.json").is_file():
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
        draw_weights(model, seed)
        model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def load_oracle(folder: Path) -> transformers.PreTrainedModel:
    """The model as transformers runs it, in float32 with plain attention."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()
