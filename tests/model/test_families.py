"""Families: published configs become the right specs in both spellings, and no field is dropped in silence."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal.configs.schema import ParallelConfig
from shoal.model.families import build_spec, load_spec, supported_architectures
from shoal.model.memory_estimate import weights_bytes
from shoal.model.shard import shard_model
from shoal.model.spec import (
    DecoderSpec,
    DenseFfn,
    DynamicScaling,
    GatedFfn,
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    MoeFfn,
    YarnScaling,
)
from tests.model import public_configs as public
from tests.model.tiny_models import CONFIGS, make_model


def spec_of(config: dict[str, Any], **changes: Any) -> DecoderSpec:
    return build_spec(copy.deepcopy({**config, **changes}))[0]


# Parameters as the model cards count them (tied heads once, Gemma-3's and others' text part).
PARAMETERS = {
    "LLAMA_2_7B": 6_738_415_616,
    "LLAMA_3_8B": 8_030_261_248,
    "LLAMA_3_1_8B": 8_030_261_248,
    "LLAMA_3_2_1B": 1_235_814_400,
    "MISTRAL_7B_V01": 7_241_732_096,
    "MISTRAL_7B_V03": 7_248_023_552,
    "QWEN2_5_0_5B": 494_032_768,
    "QWEN3_0_6B": 596_049_920,
    "PHI_3_MINI_4K": 3_821_079_552,
    "PHI_3_MINI_128K": 3_821_079_552,
    "GEMMA_2_9B": 9_241_705_984,
    "GEMMA_3_1B": 999_885_952,
    "GEMMA_3_4B": 3_880_263_168,
    "OLMO_2_7B": 7_298_617_344,
    "MIXTRAL_8X7B": 46_702_792_704,
    "QWEN1_5_MOE_A2_7B": 14_315_784_192,
    "QWEN3_30B_A3B": 30_532_122_624,
    "GPT2": 124_439_808,
    "OPT_125M": 125_239_296,
    "PYTHIA_1_4B": 1_414_647_808,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_config_gives_the_published_number_of_parameters(name: str) -> None:
    spec = spec_of(getattr(public, name))
    assert weights_bytes(spec, shard_model(spec, ParallelConfig())[0], 1) == PARAMETERS[name]


def test_llama_honours_grouped_heads_theta_and_scaling() -> None:
    spec = spec_of(public.LLAMA_3_1_8B)
    mixer, ffn = spec.layers[0].mixer, spec.layers[0].ffn
    assert (mixer.num_heads, mixer.num_kv_heads, mixer.head_dim, mixer.scale) == (32, 8, 128, 128**-0.5)
    assert mixer.rope is not None
    assert (mixer.rope.theta, mixer.rope.rotary_dim) == (500000.0, 128)
    assert mixer.rope.scaling == Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
    )
    assert isinstance(ffn, GatedFfn)
    assert (ffn.intermediate_size, ffn.activation, ffn.bias) == (14336, "silu", False)
    assert (spec.max_position, spec.dtype, spec.tie_embeddings) == (131072, "bfloat16", False)
    assert spec_of(public.LLAMA_3_2_1B).tie_embeddings


def test_llama_biases_are_honoured() -> None:
    layer = spec_of(public.LLAMA_3_8B, attention_bias=True, mlp_bias=True).layers[0]
    assert layer.mixer.qkv_bias and layer.mixer.out_bias
    assert isinstance(layer.ffn, GatedFfn) and layer.ffn.bias


def test_mistral_windows_follow_the_field_null_and_absent_apart() -> None:
    assert spec_of(public.MISTRAL_7B_V01).cache_windows == [4096]
    assert spec_of(public.MISTRAL_7B_V03).cache_windows == [None]
    absent = {key: value for key, value in public.MISTRAL_7B_V03.items() if key != "sliding_window"}
    assert spec_of(absent).cache_windows == [4096]  # transformers' default


def test_window_as_long_as_the_context_is_full_attention() -> None:
    assert spec_of(public.PHI_3_MINI_128K).cache_windows == [None]
    assert spec_of(public.MISTRAL_7B_V01, sliding_window=32767).cache_windows == [32767]


def test_qwen2_windows_begin_at_max_window_layers() -> None:
    spec = spec_of(public.QWEN2_5_0_5B, use_sliding_window=True, sliding_window=100, max_window_layers=20)
    assert [layer.mixer.window for layer in spec.layers] == [None] * 20 + [100] * 4
    kinds = ["sliding_attention", *["full_attention"] * 23]
    spec = spec_of(public.QWEN2_5_0_5B, use_sliding_window=True, sliding_window=100, layer_types=kinds)
    assert [layer.mixer.window for layer in spec.layers] == [100] + [None] * 23
    assert spec.layers[0].mixer.qkv_bias and not spec.layers[0].mixer.out_bias


def test_qwen3_has_query_and_key_norms_per_head() -> None:
    mixer = spec_of(public.QWEN3_0_6B).layers[0].mixer
    assert mixer.qk_norm is not None and mixer.qk_norm.per_head
    assert (mixer.head_dim, mixer.qkv_bias) == (128, False)


def test_phi3_longrope_has_the_attention_factor_of_its_ratio() -> None:
    rope = spec_of(public.PHI_3_MINI_128K).layers[0].mixer.rope
    assert rope is not None and isinstance(rope.scaling, LongRopeScaling)
    assert rope.scaling.original_max_position == 4096
    assert rope.scaling.attention_factor == pytest.approx(1.1902380714238083)
    assert spec_of(public.PHI_3_MINI_4K).cache_windows == [2047]
    renamed = {**public.PHI_3_MINI_128K["rope_scaling"], "type": "su"}
    assert spec_of(public.PHI_3_MINI_128K, rope_scaling=renamed) == spec_of(public.PHI_3_MINI_128K)


def test_partial_rotary_factor_sets_the_rotary_dimension() -> None:
    rope = spec_of(public.PHI_3_MINI_4K, partial_rotary_factor=0.75).layers[0].mixer.rope
    assert rope is not None and rope.rotary_dim == 72


def test_gemma2_alternates_windows_and_caps() -> None:
    spec = spec_of(public.GEMMA_2_9B)
    assert [layer.mixer.window for layer in spec.layers[:3]] == [4096, None, 4096]
    layer = spec.layers[0]
    assert (layer.mixer.softcap, spec.final_softcap, layer.mixer.scale) == (50.0, 30.0, 256**-0.5)
    norms = [layer.pre_mixer_norm, layer.post_mixer_norm, layer.pre_ffn_norm, layer.post_ffn_norm, spec.final_norm]
    assert all(norm is not None and norm.unit_offset for norm in norms)
    assert spec.embed_scale == 3584**0.5 and spec.tie_embeddings
    assert spec_of(public.GEMMA_2_9B, attn_logit_softcapping=None).layers[0].mixer.softcap is None


def test_gemma3_has_five_local_layers_with_their_own_theta_to_one_global() -> None:
    spec = spec_of(public.GEMMA_3_1B)
    assert [layer.mixer.window for layer in spec.layers[:7]] == [512] * 5 + [None] + [512]
    thetas = [layer.mixer.rope.theta for layer in spec.layers[:7] if layer.mixer.rope]
    assert thetas == [1e4] * 5 + [1e6] + [1e4]
    assert spec.layers[0].mixer.qk_norm is not None and spec.final_softcap is None


def test_gemma3_with_vision_takes_the_text_part_and_scales_global_layers_only() -> None:
    spec = spec_of(public.GEMMA_3_4B)
    local, full = spec.layers[0].mixer.rope, spec.layers[5].mixer.rope
    assert local is not None and full is not None
    assert (local.scaling, full.scaling) == (None, LinearScaling(factor=8.0))
    assert (spec.layers[0].mixer.num_heads, spec.vocab_size, spec.dtype) == (8, 262208, "bfloat16")


def test_olmo2_has_norms_after_the_branches_and_over_all_heads() -> None:
    layer = spec_of(public.OLMO_2_7B).layers[0]
    assert layer.pre_mixer_norm is None and layer.pre_ffn_norm is None
    assert layer.post_mixer_norm is not None and layer.post_ffn_norm is not None
    assert layer.mixer.qk_norm is not None and not layer.mixer.qk_norm.per_head


def test_experts_of_every_kind() -> None:
    mixtral, qwen2, qwen3 = (
        spec_of(config).layers[0].ffn
        for config in (public.MIXTRAL_8X7B, public.QWEN1_5_MOE_A2_7B, public.QWEN3_30B_A3B)
    )
    assert isinstance(mixtral, MoeFfn) and isinstance(qwen2, MoeFfn) and isinstance(qwen3, MoeFfn)
    assert (mixtral.num_experts, mixtral.top_k, mixtral.normalize_top_k, mixtral.shared) == (8, 2, True, None)
    assert (qwen2.num_experts, qwen2.top_k, qwen2.normalize_top_k, qwen2.shared_gate) == (60, 4, False, True)
    assert qwen2.shared is not None and qwen2.shared.intermediate_size == 5632
    assert (qwen3.num_experts, qwen3.top_k, qwen3.normalize_top_k, qwen3.intermediate_size) == (128, 8, True, 768)


def test_dense_layers_among_experts() -> None:
    spec = spec_of(public.QWEN3_30B_A3B, mlp_only_layers=[3], decoder_sparse_step=2)
    assert [isinstance(layer.ffn, MoeFfn) for layer in spec.layers[:6]] == [False, True, False, False, False, True]
    dense = spec.layers[0].ffn
    assert isinstance(dense, GatedFfn) and dense.intermediate_size == 6144


def test_gpt2_has_learned_positions_and_its_scales() -> None:
    spec = spec_of(public.GPT2)
    assert spec.learned_positions == LearnedPositions(num_positions=1024)
    assert spec.layers[0].ffn == DenseFfn(intermediate_size=3072, activation="gelu_tanh", bias=True)
    assert spec.dtype == "float32" and spec.tie_embeddings
    scaled = spec_of(public.GPT2, scale_attn_by_inverse_layer_idx=True)
    assert [layer.mixer.scale for layer in scaled.layers[:2]] == [64**-0.5, 64**-0.5 / 2]
    assert spec_of(public.GPT2, scale_attn_weights=False).layers[0].mixer.scale == 1.0


def test_opt_positions_begin_at_two() -> None:
    spec = spec_of(public.OPT_125M)
    assert spec.learned_positions == LearnedPositions(num_positions=2050, offset=2)
    assert spec.max_position == 2048
    assert spec_of(public.OPT_125M, _remove_final_layer_norm=True).final_norm is None


def test_opt_350m_normalises_the_sums_and_projects_small_embeddings() -> None:
    spec = spec_of(public.OPT_125M, do_layer_norm_before=False, word_embed_proj_dim=512)
    layer = spec.layers[0]
    assert layer.residual == "normed" and layer.pre_mixer_norm is None and layer.post_ffn_norm is not None
    assert spec.final_norm is None and spec.embed_size == 512


def test_pythia_rotates_a_quarter_and_runs_branches_in_parallel() -> None:
    layer = spec_of(public.PYTHIA_1_4B).layers[0]
    assert layer.mixer.rope is not None and layer.mixer.rope.rotary_dim == 32
    assert layer.residual == "parallel"
    assert spec_of(public.PYTHIA_1_4B, use_parallel_residual=False).layers[0].residual == "sequential"


def test_scaled_rope_kinds_and_the_contexts_they_reach() -> None:
    def scaled(**scaling: Any) -> DecoderSpec:
        return spec_of(public.LLAMA_2_7B, rope_scaling=scaling)

    dynamic = scaled(type="dynamic", factor=2.0)
    assert dynamic.layers[0].mixer.rope is not None
    assert dynamic.layers[0].mixer.rope.scaling == DynamicScaling(factor=2.0, original_max_position=4096)
    assert dynamic.max_position == 8192
    yarn = scaled(rope_type="yarn", factor=4, beta_fast=16, original_max_position_embeddings=2048, truncate=False)
    assert yarn.layers[0].mixer.rope is not None
    assert yarn.layers[0].mixer.rope.scaling == YarnScaling(
        factor=4.0, original_max_position=2048, beta_fast=16.0, truncate=False
    )
    assert yarn.max_position == 8192
    assert scaled(type="linear", factor=2.0).max_position == 4096


# Spellings


def as_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """A config saved by transformers 5 in the words of transformers 4."""
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    old["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters")
    family = config["model_type"]
    if rope and "full_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
        old["sliding_window_pattern"] = old.pop("_sliding_window_pattern")
    if rope:
        neox = family == "gpt_neox"
        scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        old["rotary_emb_base" if neox else "rope_theta"] = rope["rope_theta"]
        if "partial_rotary_factor" in rope:
            old["rotary_pct" if neox else "partial_rotary_factor"] = rope["partial_rotary_factor"]
        kind = scaling.pop("rope_type")
        old["rope_scaling"] = None if kind == "default" else {"type": kind, **scaling}
    if family in ("gemma2", "gemma3_text", "qwen2", "qwen3"):
        old.pop("layer_types")  # follow from the pattern, max_window_layers or parity
    if "num_local_experts" in old and family == "qwen3_moe":
        old["num_experts"] = old.pop("num_local_experts")
    return old


@pytest.mark.parametrize("name", CONFIGS)
def test_both_spellings_give_the_same_spec(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = make_model(name, tmp_path_factory.getbasetemp())
    config = json.loads((folder / "config.json").read_text())
    old = as_transformers_4(config)
    assert "rope_parameters" not in old
    assert build_spec(old)[0] == load_spec(folder)[0]


# Refusals

SLIDING = ["sliding_attention"] * 24
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "unknown field": (public.LLAMA_3_8B, {"use_magic": 3}, "not supported for this architecture: use_magic = 3"),
    "several unknown fields": (public.GPT2, {"zeta": [1], "alpha": "x"}, r"alpha = 'x', zeta = \[1\]"),
    "another family's field": (public.LLAMA_3_8B, {"sliding_window": 4096}, "sliding_window = 4096"),
    "missing field": (public.LLAMA_3_8B, {"hidden_size": None}, "hidden_size is missing"),
    "text for a number": (
        public.LLAMA_3_8B,
        {"num_hidden_layers": "32"},
        "num_hidden_layers = '32' must be an integer",
    ),
    "zero": (public.LLAMA_3_8B, {"vocab_size": 0}, "vocab_size = 0 must be an integer >= 1"),
    "true for a number": (
        public.LLAMA_3_8B,
        {"intermediate_size": True},
        "intermediate_size = True must be an integer",
    ),
    "negative epsilon": (public.LLAMA_3_8B, {"rms_norm_eps": -1.0}, "rms_norm_eps = -1.0 must be a finite number > 0"),
    "number for a switch": (public.LLAMA_3_8B, {"tie_word_embeddings": 1}, "tie_word_embeddings = 1 must be true or"),
    "activation": (public.LLAMA_3_8B, {"hidden_act": "mish"}, "hidden_act = 'mish' is not a supported activation"),
    "dtype": (
        public.LLAMA_3_8B,
        {"torch_dtype": "float8"},
        "torch_dtype = 'float8' is not supported; supported: float32",
    ),
    "groups": (public.LLAMA_3_8B, {"num_key_value_heads": 5}, "num_attention_heads = 32 is not a multiple of"),
    "odd hidden size": (public.LLAMA_3_8B, {"hidden_size": 4097}, "hidden_size = 4097 is not a multiple of"),
    "rope type": (public.LLAMA_3_8B, {"rope_scaling": {"type": "mrope"}}, "rope_type = 'mrope' is not supported"),
    "rope field": (
        public.LLAMA_3_8B,
        {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 1}},
        "beta_fast is not supported for rope type 'linear'",
    ),
    "rope factor": (public.LLAMA_3_8B, {"rope_scaling": {"type": "linear"}}, "factor is missing; rope type 'linear'"),
    "two ropes": (
        public.LLAMA_3_8B,
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        "contradicts rope_parameters",
    ),
    "nested rope": (
        public.LLAMA_3_8B,
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "rope_parameters .* must be one object for all layers",
    ),
    "flat rope": (public.GEMMA_3_1B, {"rope_parameters": {"rope_theta": 1e6}}, "must hold one object per layer type"),
    "longrope factors": (
        public.PHI_3_MINI_128K,
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 48}},
        "short_factor must be a list of 48 positive numbers",
    ),
    "rotary part": (public.PYTHIA_1_4B, {"rotary_pct": 0.01}, "gives 1 rotary dimensions of 128"),
    "layer types": (public.QWEN2_5_0_5B, {"layer_types": ["full_attention"]}, "layer_types = .* must be 24 times"),
    "window without size": (public.QWEN2_5_0_5B, {"layer_types": SLIDING}, "the config sets no sliding_window"),
    "bidirectional": (public.GEMMA_3_1B, {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    "gemma3 cap": (public.GEMMA_3_1B, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not"),
    "moe window": (public.QWEN3_30B_A3B, {"use_sliding_window": True}, "use_sliding_window = True is not supported"),
    "too many experts": (public.MIXTRAL_8X7B, {"num_experts_per_tok": 9}, "exceeds the number of experts, 8"),
    "cross attention": (public.GPT2, {"add_cross_attention": True}, "add_cross_attention = True is not supported"),
    "per layer": (public.LLAMA_3_8B, {"per_layer_config": {"0": {}}}, "per_layer_config"),
    "quantised": (public.LLAMA_3_8B, {"quantization_config": {"quant_method": "fp8"}}, "quantised with FP8"),
    "architecture": (
        public.LLAMA_3_8B,
        {"architectures": ["MambaForCausalLM"]},
        r"architectures = \['MambaForCausalLM'\] is not supported; supported: GPT2LMHeadModel, .*LlamaForCausalLM",
    ),
    "model type": (
        {"model_type": "bert"},
        {},
        "model_type = 'bert' is not supported; supported: ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_config_is_refused_by_field_and_value(name: str) -> None:
    config, changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        spec_of(config, **changes)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_refuses_a_field_it_does_not_know(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = make_model(name, tmp_path_factory.getbasetemp())
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"config\.json: .*residual_multiplier = 0\.5"):
        build_spec({**config, "residual_multiplier": 0.5})


def test_fields_that_are_null_or_without_effect_are_fine() -> None:
    more = {
        "some_new_field": None,
        "use_cache": False,
        "temperature": 0.6,
        "attention_dropout": 0.1,
        "is_decoder": True,
    }
    assert spec_of(public.LLAMA_3_8B, **more) == spec_of(public.LLAMA_3_8B)


def test_model_type_stands_in_for_missing_architectures() -> None:
    config = {key: value for key, value in public.GPT2.items() if key != "architectures"}
    assert build_spec(config)[1].name == "gpt2"


def test_every_architecture_of_the_first_release_is_there() -> None:
    assert len(supported_architectures()) == 15


def test_config_file_is_named_in_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json is missing: .* is not a Hugging Face checkpoint"):
        load_spec(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json must hold a JSON object"):
        load_spec(tmp_path)


def test_specs_need_no_torch() -> None:
    code = "import sys, shoal.model.families, shoal.model.checkpoint_files, shoal.model.ledger_table\n"
    code += "import shoal.model.memory_estimate; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
