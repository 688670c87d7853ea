"""Speed before anything runs: bytes over bandwidth, FLOP over their rate, and what a layout changes of it."""

from typing import Any

import msgspec
import pytest

from shoal.configs.schema import ModelConfig, ParallelConfig, RuntimeConfig, SchedulerConfig, ShoalConfig
from shoal.launcher.explain_speed import DeviceLimits, SpeedRow, predict, speed_table
from shoal.model.families import build_spec
from shoal.model.shard import shard_model
from shoal.model.step_work import StepRows, step_work

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 200,
}
SPEC = build_spec(LLAMA)[0]
MEMORY = DeviceLimits(source="", read_bytes_per_s=1e9, flops_per_s=1e18)
ARITHMETIC = DeviceLimits(source="", read_bytes_per_s=1e18, flops_per_s=1e9)


def rates(limits: DeviceLimits, device: str, micro_batches: int = 1, **layout: int) -> dict[str, SpeedRow]:
    parallel = ParallelConfig(micro_batches=micro_batches, **layout)
    config = ShoalConfig(
        parallel=parallel,
        model=ModelConfig(dtype="bfloat16", max_model_len=200),
        runtime=msgspec.convert({"device": device}, RuntimeConfig),
        scheduler=SchedulerConfig(max_num_seqs=64),
    )
    found = predict(SPEC, shard_model(SPEC, parallel), config, limits, None, 2)
    assert len(speed_table(found)) == len(found.rows)
    return {row.load.split(",")[0].split(" of")[0]: row for row in found.rows}


def test_one_stream_is_bound_by_reading_weights_and_its_cache() -> None:
    found = rates(MEMORY, "cuda")
    work = step_work(SPEC, shard_model(SPEC, ParallelConfig())[0], StepRows(1, 1, 100), 2, 2)
    assert found["1 stream"].tokens_per_s == pytest.approx(1e9 / (work.weights_bytes + work.cache_bytes))
    assert found["1 stream"].bound == "memory"
    assert set(found) == {"1 stream", "32 streams", "64 streams", "prompts"}


def test_prompts_are_bound_by_arithmetic_where_memory_is_fast() -> None:
    found = rates(ARITHMETIC, "cuda")["prompts"]
    work = step_work(SPEC, shard_model(SPEC, ParallelConfig())[0], StepRows(1, 100, 0), 2, 2)
    assert (found.bound, found.tokens_per_s) == ("arithmetic", pytest.approx(100 * 1e9 / work.flops))


def test_cards_add_up() -> None:
    one = rates(MEMORY, "cuda")
    tensor, replicas = rates(MEMORY, "cuda", tensor=2), rates(MEMORY, "cuda", data=2)
    assert tensor["1 stream"].tokens_per_s == pytest.approx(2 * one["1 stream"].tokens_per_s, rel=0.01)
    assert replicas["1 stream"].tokens_per_s == pytest.approx(one["1 stream"].tokens_per_s)
    assert replicas["128 streams"].tokens_per_s == pytest.approx(2 * one["64 streams"].tokens_per_s)


def test_stages_have_one_stream_in_turn_and_prompts_side_by_side() -> None:
    one, staged = rates(ARITHMETIC, "cuda"), rates(ARITHMETIC, "cuda", pipeline=2, micro_batches=2)
    assert staged["1 stream"].tokens_per_s == pytest.approx(one["1 stream"].tokens_per_s)
    assert 1.5 < staged["prompts"].tokens_per_s / one["prompts"].tokens_per_s < 2.0  # the head makes one stage longer
    assert staged["prompts"].step_s == pytest.approx(one["prompts"].step_s)


def test_cores_of_one_host_do_not_add_up() -> None:
    one = rates(MEMORY, "cpu")
    for layout in ({"tensor": 2}, {"pipeline": 2}, {"data": 2}):
        found = rates(MEMORY, "cpu", **layout)
        assert found["1 stream"].tokens_per_s == pytest.approx(one["1 stream"].tokens_per_s, rel=0.01)
    twice = rates(MEMORY, "cpu", micro_batches=2, pipeline=2)["32 streams"]  # weights are read for each half of them
    assert twice.tokens_per_s < 0.8 * one["32 streams"].tokens_per_s


def test_what_the_processors_cache_holds_is_not_read_from_memory() -> None:
    held = msgspec.structs.replace(MEMORY, held_bytes=1 << 30)
    assert rates(held, "cpu")["1 stream"].bound == "arithmetic"


def test_ranks_that_share_a_card_take_turns() -> None:
    shared = rates(MEMORY, "cuda", tensor=2, ranks_per_device=2)
    assert shared["1 stream"].tokens_per_s == pytest.approx(rates(MEMORY, "cuda")["1 stream"].tokens_per_s, rel=0.01)
