"""How fast a layout can be at most: what its steps read and multiply, over how fast its devices do that.

A step takes no less than the longer of both times. Exchanges between ranks, the engine and what else a step does come
on top: `shoal bench` tells how much of a limit is reached. Ranks on CPUs share one host; ranks on GPUs have a card, or
a part of one, each.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, NamedTuple

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

    held_bytes: what the processor's cache may keep from step to step.
    """

    source: str
    read_bytes_per_s: float
    flops_per_s: float
    held_bytes: int = 0


class SpeedRow(msgspec.Struct, frozen=True, kw_only=True):
    """One load. tokens_per_s: of all replicas, at most; step_s: from the first stage to the last, at least. bound: by
    what; the others: of one step of one replica, over all its ranks.
    """

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


class Load(NamedTuple):
    """sequences: of all replicas, in `steps` steps under way at each of `replicas`; tokens: new ones of each in a step;
    context: those in the cache.
    """

    name: str
    sequences: int
    tokens: int
    context: int
    replicas: int
    steps: int


def predict(
    spec: DecoderSpec,
    shards: Sequence[ModelShard],
    config: ShoalConfig,
    limits: DeviceLimits,
    plan: CachePlan,
    itemsize: int,
) -> Rates:
    """Rates of one stream, of 32, of as many as the cache and the scheduler's limits allow, and of prompts.

    config: settled; itemsize: bytes of a float weight.
    """
    rows = [_row(spec, shards, config, limits, itemsize, load) for load in _loads(spec, config, plan)]
    return Rates(limits=limits, rows=rows)


def _loads(spec: DecoderSpec, config: ShoalConfig, plan: CachePlan) -> list[Load]:
    """What rates are told for: steps hold no more than the scheduler puts into them."""
    longest = config.model.max_model_len or spec.max_position
    context, replicas = min(CONTEXT, max(1, longest // 2)), config.parallel.data
    steps, budget = config.parallel.micro_batches or config.parallel.pipeline, config.scheduler.max_num_batched_tokens
    each = "1 token" if context == 1 else f"{context} tokens"
    most = replicas * max(1, min(int(plan.concurrency(context + 1)), budget * steps))
    loads = []
    for count in sorted({count for count in STREAMS if count <= most} | {most}):
        active = min(count, replicas)
        under_way = max(1, min(steps, count // active))
        streams = "1 stream" if count == 1 else f"{count} streams"
        loads.append(Load(f"{streams}, {each} each", count, 1, context, active, under_way))
    chunk = min(context, budget)
    together = max(1, min(budget // chunk, int(plan.concurrency(context))))
    return [*loads, Load(f"prompts of {each}", together * steps * replicas, chunk, 0, replicas, steps)]


def _row(
    spec: DecoderSpec,
    shards: Sequence[ModelShard],
    config: ShoalConfig,
    limits: DeviceLimits,
    itemsize: int,
    load: Load,
) -> SpeedRow:
    device, cached = config.runtime.device, kv_itemsize(config.cache.dtype, itemsize)
    rows = StepRows(load.sequences / load.replicas / load.steps, load.tokens, load.context)
    works = [step_work(spec, shard, rows, itemsize, cached, device) for shard in shards]
    whole = _sum(works)
    if device == "cpu":  # all of it on the same cores
        step_s = _seconds(whole, limits)
        round_s = load.steps * _seconds(StepWork(*(load.replicas * part for part in whole)), limits)
    else:
        step_s, busiest_s = _on_cards([_seconds(work, limits) for work in works], config, load.replicas)
        round_s = max(step_s, load.steps * busiest_s)
    memory_s, arithmetic_s = _memory_seconds(whole, limits), whole.flops / limits.flops_per_s
    return SpeedRow(
        load=load.name,
        tokens_per_s=load.sequences * load.tokens / round_s,
        step_s=step_s,
        bound="memory" if memory_s > arithmetic_s else "arithmetic",
        weights_bytes=whole.weights_bytes,
        cache_bytes=whole.cache_bytes,
        flops=whole.flops,
    )


def _on_cards(seconds: Sequence[float], config: ShoalConfig, replicas: int) -> tuple[float, float]:
    """seconds: that a step takes on each rank of a replica. Returns those of a step, its stages one after the other,
    and those of a step of all replicas on the busiest card. Ranks of a card take turns.
    """
    tensor, sharing = config.parallel.tensor, config.parallel.ranks_per_device
    cards: defaultdict[int, float] = defaultdict(float)
    stages: list[defaultdict[int, float]] = [defaultdict(float) for _ in range(config.parallel.pipeline)]
    for rank in range(len(seconds) * replicas):
        place = rank % len(seconds)
        cards[rank // sharing] += seconds[place]
        if rank == place:
            stages[place // tensor][rank // sharing] += seconds[place]
    return sum(max(stage.values()) for stage in stages), max(cards.values())


def _sum(works: Sequence[StepWork]) -> StepWork:
    return StepWork(*(sum(parts) for parts in zip(*works, strict=True)))


def _memory_seconds(work: StepWork, limits: DeviceLimits) -> float:
    return max(0.0, work.weights_bytes + work.cache_bytes - limits.held_bytes) / limits.read_bytes_per_s


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
    flops, read = limits.flops_per_s, f"{significant(limits.read_bytes_per_s / 1e9)} GB/s read"
    rate = f"{significant(flops / 1e12)} TFLOP/s" if flops >= 1e13 else f"{significant(flops / 1e9)} GFLOP/s"
    return f"{read} and {rate} {limits.source}"


def significant(value: float) -> str:
    """A number's first three digits, and all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
