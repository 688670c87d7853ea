"""Speed before anything runs: bytes over bandwidth, FLOP over their rate, and what a layout changes of it."""

from typing import Any

import msgspec
import pytest

from shoal.configs.schema import ModelConfig, ParallelConfig, RuntimeConfig, SchedulerConfig, ShoalConfig
from shoal.launcher.explain_speed import DeviceLimits, SpeedRow, limits_line, predict, speed_table
from shoal.model.families import build_spec
from shoal.model.ledger import CachePlan
from shoal.model.shard import shard_model
from shoal.model.step_work import StepRows, StepWork, step_work

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 200,
}
BUDGET = 400
SPEC = build_spec(LLAMA)[0]
MEMORY = DeviceLimits(source="", read_bytes_per_s=1e9, flops_per_s=1e18)
ARITHMETIC = DeviceLimits(source="", read_bytes_per_s=1e18, flops_per_s=1e9)


def rates(limits: DeviceLimits, device: str, **layout: Any) -> dict[str, SpeedRow]:
    layout.setdefault("micro_batches", 1)
    parallel = ParallelConfig(**layout)
    config = ShoalConfig(
        parallel=parallel,
        model=ModelConfig(dtype="bfloat16", max_model_len=200),
        runtime=msgspec.convert({"device": device}, RuntimeConfig),
        scheduler=SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=BUDGET),
    )
    plan = CachePlan(
        block_size=16, windows=[None], num_blocks=[10000], max_model_len=200, max_num_seqs=64,
        max_num_batched_tokens=BUDGET, share_bytes=[0], cache_bytes=[0],
    )  # fmt: skip
    found = predict(SPEC, shard_model(SPEC, parallel), config, limits, plan, 2)
    assert len(speed_table(found)) == len(found.rows)
    return {row.load.split(",")[0].split(" of")[0]: row for row in found.rows}


def whole(*rows: int) -> StepWork:
    return step_work(SPEC, shard_model(SPEC, ParallelConfig())[0], StepRows(*rows), 2, 2)


def test_one_stream_is_bound_by_reading_weights_and_its_cache() -> None:
    found, work = rates(MEMORY, "cuda"), whole(1, 1, 100)
    assert found["1 stream"].tokens_per_s == pytest.approx(1e9 / (work.weights_bytes + work.cache_bytes))
    assert found["1 stream"].bound == "memory"
    assert set(found) == {"1 stream", "32 streams", "64 streams", "prompts"}


def test_a_step_takes_as_many_prompts_as_the_budget_holds() -> None:
    arithmetic, memory = rates(ARITHMETIC, "cuda")["prompts"], rates(MEMORY, "cuda")["prompts"]
    work = whole(4, 100, 0)  # of 100 tokens, in a budget of 400
    assert (arithmetic.bound, arithmetic.tokens_per_s) == ("arithmetic", pytest.approx(400 * 1e9 / work.flops))
    assert memory.tokens_per_s == pytest.approx(400 * 1e9 / work.weights_bytes)
    staged = rates(MEMORY, "cuda", pipeline=4)["prompts"]
    assert staged.flops == pytest.approx(memory.flops), "a step is no larger for being in stages"
    assert staged.tokens_per_s == pytest.approx(memory.tokens_per_s), "one step under way fills one stage"


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
    work, one = whole(1, 1, 100), rates(MEMORY, "cpu")["1 stream"]
    half = msgspec.structs.replace(MEMORY, held_bytes=int(work.weights_bytes + work.cache_bytes) // 2)
    assert rates(half, "cpu")["1 stream"].tokens_per_s == pytest.approx(2 * one.tokens_per_s, rel=0.01)
    held = msgspec.structs.replace(MEMORY, held_bytes=1 << 30)
    assert rates(held, "cpu")["1 stream"].bound == "arithmetic"


@pytest.mark.parametrize(
    "layout", [{"tensor": 2}, {"tensor": 2, "tensor_weights": [3, 1]}, {"pipeline": 2}, {"data": 2}], ids=str
)
def test_ranks_that_share_a_card_are_no_faster_than_one_rank_on_it(layout: dict[str, Any]) -> None:
    shared, one = rates(MEMORY, "cuda", ranks_per_device=2, **layout), rates(MEMORY, "cuda")
    assert shared["1 stream"].tokens_per_s == pytest.approx(one["1 stream"].tokens_per_s, rel=0.01)
    assert shared["prompts"].tokens_per_s == pytest.approx(one["prompts"].tokens_per_s, rel=0.01)


def test_the_limits_are_said_in_their_units() -> None:
    assert limits_line(ARITHMETIC).startswith("1000000000 GB/s read and 1 GFLOP/s")
    card = DeviceLimits(source="of a card", read_bytes_per_s=3.35e12, flops_per_s=9.89e14)
    assert limits_line(card) == "3350 GB/s read and 989 TFLOP/s of a card"
