"""The ledger: shares, blocks per cache group, and refusals that name a number which then works."""

import re
from typing import Any, Literal

import msgspec
import pytest

from shoal.configs.schema import CacheConfig, ParallelConfig, RuntimeConfig, SchedulerConfig, ShoalConfig
from shoal.kernels.quantized_format import SLAB
from shoal.model.families import build_spec
from shoal.model.ledger import CachePlan, MemoryReport, blocks_per_sequence, plan_cache
from shoal.model.ledger_table import format_ledger
from shoal.model.memory_estimate import estimate_reports, graph_sizes, weights_bytes
from shoal.model.shard import shard_model
from shoal.model.spec import DecoderSpec

MIB = 1 << 20
LLAMA_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "torch_dtype": "float16",
}


def llama_7b() -> DecoderSpec:
    return build_spec(LLAMA_7B)[0]


def report(available: int = 1000 * MIB, rank: int = 0, blocks: tuple[int, ...] = (MIB,), **more: int) -> MemoryReport:
    values = {"weights_bytes": 100 * MIB, "activation_bytes": 50 * MIB, **more}
    return MemoryReport(rank=rank, available_bytes=available, block_bytes=list(blocks), **values)


def config(max_num_seqs: int = 4, max_num_batched_tokens: int = 64, **cache: Any) -> ShoalConfig:
    cache.setdefault("gpu_memory_utilization", 0.5)
    cache.setdefault("reserve", 50 * MIB)
    scheduler = SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
    return ShoalConfig(cache=CacheConfig(**cache), scheduler=scheduler)


def plan(
    reports: list[MemoryReport], settings: ShoalConfig, windows: tuple[int | None, ...] = (None,), **more: Any
) -> CachePlan:
    return plan_cache(reports, windows, settings, **{"max_model_len": 1600, "device_type": "cuda", **more})


def test_weights_are_exact() -> None:
    shards = shard_model(llama_7b(), ParallelConfig())
    assert weights_bytes(llama_7b(), shards[0], 2) == 2 * 6_738_415_616


def test_weights_of_all_tensor_ranks_add_up_to_the_model_plus_replicated_norms() -> None:
    spec, hidden = llama_7b(), 4096
    total = sum(weights_bytes(spec, shard, 2) for shard in shard_model(spec, ParallelConfig(tensor=3)))
    assert total - 2 * 6_738_415_616 == 2 * 2 * hidden * (2 * 32 + 1)


def test_blocks_fill_the_share_the_rest_leaves() -> None:
    planned = plan([report()], config(max_num_seqs=100))
    assert planned.share_bytes == [500 * MIB]
    assert planned.num_blocks == [300]  # 500 - 100 - 50 - 50 MiB
    assert planned.cache_bytes == [300 * MIB]
    assert planned.concurrency(1600) == 3.0


def test_poorest_rank_decides() -> None:
    reports = [
        report(),
        report(rank=1, weights_bytes=200 * MIB, available=1000 * MIB),
        report(rank=2, blocks=(2 * MIB,)),
    ]
    assert plan(reports, config()).num_blocks == [150]


def test_rank_without_layers_of_a_group_does_not_limit_it() -> None:
    reports = [report(blocks=(MIB, 0)), report(rank=1, blocks=(0, MIB))]
    assert plan(reports, config(max_num_seqs=1000), windows=(None, 64)).num_blocks == [300, 71]


def test_blocks_are_capped_by_what_max_num_seqs_can_use() -> None:
    assert plan([report()], config(max_num_seqs=2)).num_blocks == [200]


def test_groups_hold_one_longest_sequence_and_equal_numbers_of_typical_ones() -> None:
    windows = (None, 100, 1000)
    needs = blocks_per_sequence(windows, 1600, 16, 64)
    assert needs == [100, 12, 68]
    planned = plan([report(blocks=(MIB, MIB, MIB))], config(max_num_seqs=100), windows=windows)
    typical = blocks_per_sequence(windows, 1600, 16, 1)  # 1600 is less than four windows
    more = (300 - 180) / sum(typical)
    assert planned.num_blocks == [need + int(more * each) for need, each in zip(needs, typical, strict=True)]
    assert planned.concurrency(1600) == pytest.approx(1 + more, rel=0.06)


def test_short_sequences_find_window_blocks_beside_one_of_a_very_long_context() -> None:
    planned = plan([report(blocks=(MIB, 5 * MIB))], config(max_num_seqs=100), windows=(None, 32), max_model_len=1600)
    assert planned.concurrency(1600) >= 1
    assert planned.concurrency(64) > 4
    assert sum(count * each for count, each in zip(planned.num_blocks, (1, 5), strict=True)) <= 300


def test_window_never_needs_more_blocks_than_full_attention() -> None:
    assert blocks_per_sequence((None, 4096), 100, 16, 2048) == [7, 7]


@pytest.mark.parametrize("block_size", [1, 7, 16, 256])
@pytest.mark.parametrize(("window", "chunk"), [(1, 1), (5, 1), (100, 64), (33, 17)])
def test_window_blocks_cover_every_alignment(block_size: int, window: int, chunk: int) -> None:
    [need] = blocks_per_sequence((window,), 10**6, block_size, chunk)
    for start in range(window, window + 2 * block_size):  # a chunk's first position
        first, last = (start - window + 1) // block_size, (start + chunk - 1) // block_size
        assert last - first + 1 <= need


def test_ranks_on_one_device_share_what_all_their_weights_were_taken_from() -> None:
    reports = [report(available=900 * MIB), report(rank=1, available=900 * MIB)]  # 800 free, 200 of weights
    planned = plan(reports, config(max_num_seqs=100), device_type="cpu", ranks_per_device=2, max_model_len=160)
    assert planned.share_bytes == [250 * MIB] * 2
    assert planned.num_blocks == [50]


def test_estimates_agree_with_reports_of_loaded_ranks() -> None:
    spec, settings = llama_7b(), config(gpu_memory_utilization=1.0)
    shards = shard_model(spec, ParallelConfig(tensor=2))
    reports = estimate_reports(spec, shards, settings, itemsize=2, available_bytes=64 << 30, ranks_per_device=2)
    planned = plan_cache(
        reports, spec.cache_windows, settings, max_model_len=4096, device_type="cpu", ranks_per_device=2
    )
    assert planned.share_bytes == [32 << 30] * 2


def test_default_utilization_depends_on_the_device() -> None:
    settings = config(gpu_memory_utilization=None)
    assert plan([report()], settings).share_bytes == [900 * MIB]
    assert plan([report()], settings, device_type="cpu").share_bytes == [500 * MIB]


def test_num_blocks_is_taken_as_given_for_every_group() -> None:
    planned = plan([report(blocks=(MIB, MIB))], config(num_blocks=120), windows=(None, 64))
    assert planned.num_blocks == [120, 120]


def test_memory_limits_the_cache() -> None:
    assert plan([report()], config(memory=200 * MIB, max_num_seqs=100)).num_blocks == [200]


def refusal(reports: list[MemoryReport], settings: ShoalConfig, **more: Any) -> str:
    with pytest.raises(ValueError) as caught:
        plan(reports, settings, **more)
    return str(caught.value)


def value_after(pattern: str, text: str) -> str:
    found = re.search(pattern + r" to ([\d.]+)", text)
    assert found, text
    return found.group(1)


def test_too_long_a_context_names_the_length_and_the_utilization_that_fit() -> None:
    text = refusal([report()], config(), max_model_len=6400)
    assert text.startswith("model.max_model_len = 6400 needs 400.00 MiB of KV cache on rank 0, 300.00 MiB are left")
    fits = int(value_after("lower model.max_model_len", text))
    assert fits == 4800
    assert plan([report()], config(), max_model_len=fits).num_blocks == [300]
    with pytest.raises(ValueError):
        plan([report()], config(), max_model_len=fits + 1)
    more = float(value_after("raise cache.gpu_memory_utilization", text))
    assert plan([report()], config(gpu_memory_utilization=more), max_model_len=6400).num_blocks[0] >= 400
    with pytest.raises(ValueError):
        plan([report()], config(gpu_memory_utilization=more - 0.01), max_model_len=6400)


def test_too_long_a_context_for_cache_memory_names_the_memory_that_fits() -> None:
    text = refusal([report()], config(memory=50 * MIB))
    assert "lower model.max_model_len to 800" in text
    enough = int(value_after("raise cache.memory", text))
    assert plan([report()], config(memory=enough)).num_blocks == [100]


def test_weights_that_do_not_fit_name_rank_and_ways_out() -> None:
    text = refusal([report(), report(rank=1, weights_bytes=460 * MIB)], config())
    assert text.startswith("rank 1: 460.00 MiB of weights")
    assert "raise parallel.tensor or parallel.pipeline" in text
    assert "raise cache.gpu_memory_utilization to 0.66" in text


def test_too_few_given_blocks_name_the_number_and_the_length() -> None:
    text = refusal([report()], config(num_blocks=60))
    assert value_after("raise cache.num_blocks", text) == "100"
    assert value_after("lower model.max_model_len", text) == "960"


def test_too_many_given_blocks_name_the_number() -> None:
    assert value_after("lower cache.num_blocks", refusal([report()], config(num_blocks=400))) == "300"


def test_where_no_number_of_blocks_would_do_the_length_is_named() -> None:
    text = refusal([report()], config(num_blocks=900), max_model_len=6400)
    assert value_after("lower model.max_model_len", text) == "4800" and "cache.num_blocks" not in text


def test_a_cache_smaller_than_a_block_names_what_to_raise() -> None:
    text = refusal([report()], config(memory=1000))
    assert text.endswith(f"1.0 KiB are left, not even one block: raise cache.memory to {100 * MIB}")


def test_cache_memory_beyond_the_share_names_the_bytes() -> None:
    assert value_after("lower cache.memory", refusal([report()], config(memory=400 * MIB))) == str(300 * MIB)


def test_table_shows_every_rank_and_the_largest_context() -> None:
    spec, settings = llama_7b(), config(gpu_memory_utilization=1.0)
    shards = shard_model(spec, ParallelConfig(tensor=2, pipeline=2))
    reports = estimate_reports(spec, shards, settings, itemsize=2, available_bytes=8 << 30)
    planned = plan_cache(reports, spec.cache_windows, settings, max_model_len=4096, device_type="cuda")
    lines = format_ledger(reports, shards, settings.cache.reserve, planned).splitlines()
    head = ["rank", "stage", "shard", "layers", "weights", "activations", "reserve", "KV cache", "sum", "may use"]
    assert re.split(r"  +", lines[0]) == head
    assert len(lines) == 1 + 4 + 2
    assert lines[1].split()[:4] == ["0", "0", "0", "0-15"]
    assert lines[-1].startswith("largest context x concurrency: 4096 tokens x ")
    assert lines[-1].endswith(" sequences (max_num_seqs)")
    assert "KV cache" not in format_ledger(reports, shards, settings.cache.reserve)


def test_graphs_of_steps_take_memory_on_gpus_unless_steps_are_eager() -> None:
    spec, (shard,) = llama_7b(), shard_model(llama_7b(), ParallelConfig())

    def activations(device: Literal["cpu", "cuda"], *, enforce_eager: bool) -> int:
        settings = msgspec.structs.replace(config(), runtime=RuntimeConfig(device=device, enforce_eager=enforce_eager))
        (one,) = estimate_reports(spec, [shard], settings, itemsize=2, available_bytes=64 << 30)
        return one.activation_bytes

    assert activations("cuda", enforce_eager=False) > 500 * MIB + activations("cuda", enforce_eager=True)
    assert activations("cuda", enforce_eager=True) == activations("cpu", enforce_eager=False)


def test_few_bits_count_a_slab_of_floats_on_gpus() -> None:
    spec, found = llama_7b(), {}
    for device, quantization in (("cuda", "none"), ("cuda", "int4"), ("cpu", "none"), ("cpu", "int4")):
        settings = config()
        settings = msgspec.structs.replace(
            settings,
            scheduler=SchedulerConfig(max_num_batched_tokens=1 << 14),  # their tensors outweigh what sampling takes
            runtime=RuntimeConfig(device=device, enforce_eager=True),  # type: ignore[arg-type]
            model=msgspec.structs.replace(settings.model, quantization=quantization),
        )
        [shard] = shard_model(spec, ParallelConfig(), quantization)  # type: ignore[arg-type]
        [one] = estimate_reports(spec, [shard], settings, itemsize=2, available_bytes=64 << 30)
        found[device, quantization] = one.activation_bytes
    assert found["cuda", "int4"] == found["cuda", "none"] + 2 * SLAB and found["cpu", "int4"] == found["cpu", "none"]


def test_graphs_are_no_larger_than_steps_can_be() -> None:
    limits = SchedulerConfig(max_num_seqs=40, max_num_batched_tokens=512)
    sizes = graph_sizes(ShoalConfig(scheduler=limits, runtime=RuntimeConfig(device="cuda")))
    assert sizes is not None and sizes.rows[-2:] == (32, 48) and sizes.tokens[-1] == 512 and sizes.most() == (128, 512)
    assert graph_sizes(ShoalConfig(runtime=RuntimeConfig(device="cpu"))) is None


def test_report_and_plan_travel_as_messages() -> None:
    planned = plan([report()], config())
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(planned), type=CachePlan) == planned
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(report()), type=MemoryReport) == report()
