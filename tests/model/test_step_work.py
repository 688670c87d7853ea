"""The work of a step: FLOP as torch counts those of transformers, bytes as the parameter table has them, windows by
counting."""

from pathlib import Path

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from shoal.configs.schema import ParallelConfig
from shoal.model.families import load_spec
from shoal.model.kv_layout import kv_bytes_per_block
from shoal.model.memory_estimate import weights_bytes
from shoal.model.shard import Quantization, shard_model
from shoal.model.spec import Attention, MoeFfn
from shoal.model.step_work import StepRows, StepWork, attended, step_work
from tests.model.tiny_models import make_model


def work(folder: Path, rows: StepRows, parallel: ParallelConfig | None = None) -> list[StepWork]:
    spec, _ = load_spec(folder)
    return [step_work(spec, shard, rows, 4, 4) for shard in shard_model(spec, parallel or ParallelConfig())]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt_350m", "gpt_neox", "gemma2", "olmo2"])
def test_decoding_costs_what_torch_counts_in_transformers(
    family: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, rows, context = make_model(family, tmp_path_factory.getbasetemp()), 3, 5
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = torch.ones(rows, context + 1, dtype=torch.long)
    with torch.inference_mode():
        cache = model(ids[:, :context], use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(ids[:, context:], past_key_values=cache)
    [found] = work(folder, StepRows(rows, 1, context))
    rotary = counter.get_total_flops() - found.flops  # transformers multiplies frequencies and positions as matrices
    assert 0 <= rotary <= 0.01 * found.flops


def test_a_prompt_needs_logits_of_its_last_token_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = make_model("llama", tmp_path_factory.getbasetemp())
    spec, _ = load_spec(folder)
    [one], [seven] = work(folder, StepRows(1, 1, 0)), work(folder, StepRows(1, 7, 0))
    head = 2 * spec.vocab_size * spec.hidden_size
    scores = 4 * spec.layers[0].mixer.num_heads * spec.layers[0].mixer.head_dim * len(spec.layers)
    assert seven.flops - head - scores * (1 + 2 + 3 + 4 + 5 + 6 + 7) == pytest.approx(7 * (one.flops - head - scores))


@pytest.mark.parametrize(
    ("quantization", "device"), [("none", "cpu"), ("int8", "cpu"), ("int4", "cpu"), ("int4", "cuda"), ("fp8", "cuda")]
)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_all_weights_are_read_but_for_tables_that_are_looked_up(
    family: str, quantization: Quantization, device: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    spec, _ = load_spec(make_model(family, tmp_path_factory.getbasetemp()))
    [shard] = shard_model(spec, ParallelConfig(), quantization)
    looked_up = 0 if spec.tie_embeddings else spec.vocab_size * spec.hidden_size
    looked_up += spec.learned_positions.num_positions * spec.hidden_size if spec.learned_positions else 0
    found = step_work(spec, shard, StepRows(1, 1, 0), 4, 4, device)
    assert found.weights_bytes == weights_bytes(spec, shard, 4, device) - 4 * looked_up


def test_a_cache_of_fewer_bits_is_read_in_them(tmp_path_factory: pytest.TempPathFactory) -> None:
    spec, _ = load_spec(make_model("llama", tmp_path_factory.getbasetemp()))
    [shard] = shard_model(spec, ParallelConfig())
    floats, bytes_ = (step_work(spec, shard, StepRows(3, 1, 20), 4, size) for size in (4, 1))
    assert floats.cache_bytes == 4 * bytes_.cache_bytes == sum(kv_bytes_per_block(spec, shard, 60, 4))


def test_experts_are_read_as_often_as_tokens_choose_them(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = make_model("qwen3_moe", tmp_path_factory.getbasetemp())
    spec, _ = load_spec(folder)
    ffns = [layer.ffn for layer in spec.layers if isinstance(layer.ffn, MoeFfn)]
    experts = sum(3 * 4 * ffn.num_experts * ffn.intermediate_size * spec.hidden_size for ffn in ffns)
    [one], [many] = work(folder, StepRows(1, 1, 0)), work(folder, StepRows(1000, 1, 0))
    share = ffns[0].top_k / ffns[0].num_experts
    assert many.weights_bytes - one.weights_bytes == pytest.approx((1 - share) * experts)
    assert many.flops == pytest.approx(1000 * one.flops)  # tokens meet top_k experts each, however many they are
    halves = work(folder, StepRows(1, 1, 0), ParallelConfig(tensor=2, expert=True))
    assert sum(half.flops for half in halves) == pytest.approx(one.flops, rel=0.02)  # both have the router


def test_ranks_share_the_work(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, rows = make_model("llama", tmp_path_factory.getbasetemp()), StepRows(4, 1, 9)
    [whole] = work(folder, rows)
    for parallel in (ParallelConfig(tensor=2), ParallelConfig(pipeline=3)):
        parts = work(folder, rows, parallel)
        assert sum(part.flops for part in parts) == pytest.approx(whole.flops)
        assert sum(part.cache_bytes for part in parts) == whole.cache_bytes


@pytest.mark.parametrize("window", [None, 1, 4, 7, 100])
@pytest.mark.parametrize(("tokens", "context"), [(1, 0), (1, 9), (5, 0), (5, 2), (12, 3), (3, 20)])
def test_tokens_see_what_the_window_shows(window: int | None, tokens: int, context: int) -> None:
    mixer = Attention(num_heads=1, num_kv_heads=1, head_dim=1, scale=1.0, window=window)
    limit = window or 1 << 30
    expected = sum(min(limit, context + index + 1) for index in range(tokens))
    read, seen = attended(mixer, StepRows(1, tokens, context))
    assert seen == expected
    assert read == sum(position > context - limit for position in range(context)), "what the first new token sees"
