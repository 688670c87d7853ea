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


def longrope() -> dict[str, Any]:
    """LongRoPE for a rotary dimension of 6 of 8."""
    return rope("longrope", partial_rotary_factor=0.75, short_factor=[1.0, 1.1, 1.7], long_factor=[1.0, 1.9, 6.0])


LLAMA3 = rope(
    "llama3", 500.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
GEMMA: dict[str, Any] = {**SIZES, "head_dim": 12, "query_pre_attn_scalar": 10, "sliding_window": 7}
MOE: dict[str, Any] = {**SIZES, "moe_intermediate_size": 24, "num_experts": 11, "num_experts_per_tok": 3}
NO_GQA: dict[str, Any] = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}

CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=48, n_layer=3, n_head=6, n_positions=256, n_inner=72, bos_token_id=1, eos_token_id=2
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        max_position_embeddings=256,
        pad_token_id=0,
        ffn_dim=72,
    ),
    "opt_350m": lambda: transformers.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        word_embed_proj_dim=20,
        do_layer_norm_before=False,
        num_hidden_layers=3,
        num_attention_heads=6,
        max_position_embeddings=256,
        pad_token_id=0,
        ffn_dim=72,
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**NO_GQA, rope_parameters=rope(partial_rotary_factor=0.5)),
    "gpt_neox_sequential": lambda: transformers.GPTNeoXConfig(
        **NO_GQA, use_parallel_residual=False, rope_parameters=rope(partial_rotary_factor=0.25)
    ),
    "llama": lambda: llama(),
    "llama_bias": lambda: llama(attention_bias=True, mlp_bias=True, num_key_value_heads=6, head_dim=8),
    "llama3": lambda: llama(tie_word_embeddings=True, rope_parameters=LLAMA3),
    "llama_linear": lambda: llama(rope_parameters=rope("linear", factor=2.5)),
    "llama_dynamic": lambda: llama(max_position_embeddings=32, rope_parameters=rope("dynamic", factor=4.0)),
    "llama_yarn": lambda: llama(rope_parameters=rope("yarn", 500.0, factor=8.0, original_max_position_embeddings=64)),
    "mistral": lambda: transformers.MistralConfig(**SIZES, head_dim=12, sliding_window=9),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2_window": lambda: transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=11, max_window_layers=2
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16),
    "phi3": lambda: transformers.Phi3Config(**SIZES, sliding_window=13),
    "phi3_longrope": lambda: transformers.Phi3Config(
        **SIZES, rope_parameters=longrope(), original_max_position_embeddings=64
    ),
    "gemma2": lambda: transformers.Gemma2Config(**GEMMA, attn_logit_softcapping=20.0, final_logit_softcapping=15.0),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GEMMA, sliding_window_pattern=3),
    "olmo2": lambda: transformers.Olmo2Config(**SIZES),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, head_dim=12, num_local_experts=9, num_experts_per_tok=2),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **MOE, shared_expert_intermediate_size=40, mlp_only_layers=[1], norm_topk_prob=False
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **{**MOE, "num_experts": 7}, head_dim=16, norm_topk_prob=True, decoder_sparse_step=2
    ),
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
