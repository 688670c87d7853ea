"""How fast a layout can be at most: what its steps read and multiply, over how fast its devices do that.

A step takes no less than the longer of both times. Exchanges between ranks, the engine and what else a step does come
on top: `shoal bench` tells how much of a limit is reached. Ranks on CPUs share one host; ranks on GPUs have a card, or
a part of one, each.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec

from shoal.configs.schema import ShoalConfig
from shoal.model.kv_layout import kv_itemsize
from shoal.model.ledger import CachePlan, size
from shoal.model.shard import ModelShard
from shoal.model.spec import DecoderSpec
from shoal.model.step_work import StepRows, StepWork, step_work

CONTEXT = 1024  # tokens in the cache, and of a prompt, that rates are told for, where the context length allows them
STREAMS = (1, 32)  # and as many as run at once


class DeviceLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What bounds a step: of a GPU, or of the host whose cores all ranks share. source: how it is known.

    held_bytes: what its processor's cache keeps from step to step, so that memory does not bound it; 0: unknown.
    """

    source: str
    read_bytes_per_s: float
    flops_per_s: float
    held_bytes: int = 0


class SpeedRow(msgspec.Struct, frozen=True, kw_only=True):
    """One load. tokens_per_s: of all replicas, at most; step_s: from the first stage to the last, at least."""

    load: str
    tokens_per_s: float
    step_s: float
    bound: Literal["memory", "arithmetic"]
    weights_bytes: float
    cache_bytes: float
    flops: float


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """The rows of `explain`'s table, and of what."""

    limits: DeviceLimits
    rows: list[SpeedRow]


def predict(
    spec: DecoderSpec,
    shards: Sequence[ModelShard],
    config: ShoalConfig,
    limits: DeviceLimits,
    plan: CachePlan | None,
    itemsize: int,
) -> Rates:
    """Rates of one stream, of 32, of as many as the cache and max_num_seqs allow, and of prompts.

    config: settled; plan: None where the cache could not be sized; itemsize: bytes of a float weight.
    """
    longest = config.model.max_model_len or spec.max_position
    context = min(CONTEXT, max(1, longest // 2))
    replicas = config.parallel.data
    most = config.scheduler.max_num_seqs if plan is None else max(1, int(plan.concurrency(context + 1)))
    loads = [
        (f"{count} {'stream' if count == 1 else 'streams'}, {context} tokens each", count, 1, context)
        for count in sorted({count for count in STREAMS if count <= most * replicas} | {most * replicas})
    ]
    stages = config.parallel.pipeline
    chunk = max(1, min(context, config.scheduler.max_num_batched_tokens))
    loads.append((f"prompts of {chunk} tokens", stages * replicas, chunk, 0))
    rows = [_row(spec, shards, config, limits, itemsize, *load) for load in loads]
    return Rates(limits=limits, rows=rows)


def _row(
    spec: DecoderSpec,
    shards: Sequence[ModelShard],
    config: ShoalConfig,
    limits: DeviceLimits,
    itemsize: int,
    load: str,
    streams: int,
    tokens: int,
    context: int,
) -> SpeedRow:
    """The limit of one load. streams: of all replicas, which have equal parts of them, in as many steps under way as
    the layout has, with one stream at least in each.
    """
    device, cached = config.runtime.device, kv_itemsize(config.cache.dtype, itemsize)
    replicas = min(streams, config.parallel.data)
    steps = max(1, min(config.parallel.micro_batches or config.parallel.pipeline, streams // replicas))
    rows = StepRows(streams / replicas / steps, tokens, context)
    works = [step_work(spec, shard, rows, itemsize, cached, device) for shard in shards]
    if device == "cpu":
        step_s = _seconds(_sum(works), limits)
        round_s = step_s * steps * replicas  # all of it on the same cores
    else:
        tensor, sharing = config.parallel.tensor, config.parallel.ranks_per_device
        stage_s = [
            sharing * max(_seconds(work, limits) for work in works[first : first + tensor])
            for first in range(0, len(works), tensor)
        ]
        step_s = sum(stage_s)
        round_s = max(step_s, steps * max(stage_s))
    whole = _sum(works)
    memory_s, arithmetic_s = _memory_seconds(whole, limits), whole.flops / limits.flops_per_s
    return SpeedRow(
        load=load,
        tokens_per_s=streams * tokens / round_s,
        step_s=step_s,
        bound="memory" if memory_s > arithmetic_s else "arithmetic",
        weights_bytes=whole.weights_bytes,
        cache_bytes=whole.cache_bytes,
        flops=whole.flops,
    )


def _sum(works: Sequence[StepWork]) -> StepWork:
    return StepWork(*(sum(parts) for parts in zip(*works, strict=True)))


def _memory_seconds(work: StepWork, limits: DeviceLimits) -> float:
    read = work.weights_bytes + work.cache_bytes
    return 0.0 if read <= limits.held_bytes else read / limits.read_bytes_per_s


def _seconds(work: StepWork, limits: DeviceLimits) -> float:
    return max(_memory_seconds(work, limits), work.flops / limits.flops_per_s)


SPEED_COLUMNS = ("load", "tokens/s", "step, ms", "bound by", "weights read", "cache read", "GFLOP")


def speed_table(rates: Rates) -> list[tuple[str, ...]]:
    """Cells under SPEED_COLUMNS: the last three are of one step, over all ranks of a replica."""
    return [
        (
            row.load,
            significant(row.tokens_per_s),
            significant(1e3 * row.step_s),
            row.bound,
            size(int(row.weights_bytes)),
            size(int(row.cache_bytes)),
            significant(row.flops / 1e9),
        )
        for row in rates.rows
    ]


def limits_line(limits: DeviceLimits) -> str:
    """The limits, for people."""
    flops = limits.flops_per_s
    rate = f"{significant(flops / 1e12)} TFLOP/s" if flops >= 1e13 else f"{significant(flops / 1e9)} GFLOP/s"
    return f"{significant(limits.read_bytes_per_s / 1e9)} GB/s read and {rate} {limits.source}"


def significant(value: float) -> str:
    """Three digits of a number that is no whole number of many."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
