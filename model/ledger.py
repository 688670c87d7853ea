"""The ledger: memory per rank in bytes, and how many cache blocks it leaves. No torch.

`explain` fills it with estimates (model/memory_estimate.py), bring-up with what every rank measured; both then call
`plan_cache`, which sizes the cache groups for the poorest rank or says which number to change, and to what, and print
it with `format_ledger` (model/ledger_table.py).

What a rank may use in all (its share): cache.gpu_memory_utilization of what its device can give, divided among the
ranks on that device. share = weights + activations + reserve + KV cache.
"""

from collections.abc import Callable, Sequence
from math import ceil

import msgspec

from shoal.configs.schema import ShoalConfig

DEFAULT_UTILIZATION = {"cuda": 0.9, "cpu": 0.5}
TYPICAL_WINDOWS = 4  # a sequence is taken to be this many windows long when memory is divided between cache groups


class MemoryReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Memory of one rank. available_bytes: what its device can still give, plus weights_bytes (the weights are loaded
    when it is measured). block_bytes: of one KV block, per cache group of the spec, 0 where it has no such layer."""

    rank: int
    weights_bytes: int
    activation_bytes: int
    available_bytes: int
    block_bytes: list[int]


class CachePlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The sizes of the cache. num_blocks: per cache group, the same on every rank. windows: DecoderSpec.cache_windows.

    share_bytes, cache_bytes: per rank, what it may use in all and what its blocks take.
    """

    block_size: int
    windows: list[int | None]
    num_blocks: list[int]
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    share_bytes: list[int]
    cache_bytes: list[int]

    def concurrency(self, length: int) -> float:
        """Sequences of `length` tokens that fit at once, at most max_num_seqs, one of them computing a chunk."""
        steady = blocks_per_sequence(self.windows, length, self.block_size, 1)
        chunk = blocks_per_sequence(self.windows, length, self.block_size, self.max_num_batched_tokens)
        groups = zip(self.num_blocks, steady, chunk, strict=True)
        return min(self.max_num_seqs, *((have - (most - each)) / each for have, each, most in groups))


def blocks_per_sequence(
    windows: Sequence[int | None], length: int, block_size: int, max_num_batched_tokens: int
) -> list[int]:
    """Blocks a sequence of `length` tokens holds at most, per cache group.

    A window layer needs the window before a chunk and the chunk, wherever their edges lie in a block.
    """
    whole = ceil(length / block_size)
    return [
        whole if window is None else min(whole, ceil((window - 1 + max_num_batched_tokens) / block_size) + 1)
        for window in windows
    ]


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's part of its device. device_bytes: what the device can give to all its ranks; cache_bytes: what is left
    for the KV cache, negative when not even the rest fits."""

    report: MemoryReport
    device_bytes: int
    share_bytes: int
    cache_bytes: int


def rank_budgets(
    reports: Sequence[MemoryReport], config: ShoalConfig, device_type: str, ranks_per_device: int
) -> list[Budget]:
    """Every rank's share and what it leaves for the cache."""
    utilization = config.cache.gpu_memory_utilization or DEFAULT_UTILIZATION[device_type]
    budgets = []
    for index, report in enumerate(reports):
        first = index - index % ranks_per_device
        group = reports[first : first + ranks_per_device]
        free = min(other.available_bytes - other.weights_bytes for other in group)
        device = free + sum(other.weights_bytes for other in group)
        share = int(device * utilization) // ranks_per_device
        left = share - report.weights_bytes - report.activation_bytes - config.cache.reserve
        budgets.append(Budget(report=report, device_bytes=device, share_bytes=share, cache_bytes=left))
    return budgets


class CachePlanner:
    """Sizes the cache of a replica from its ranks' budgets; every refusal names the number to change and its value."""

    def __init__(
        self,
        reports: Sequence[MemoryReport],
        windows: Sequence[int | None],
        config: ShoalConfig,
        max_model_len: int,
        device_type: str,
        ranks_per_device: int,
    ) -> None:
        self.windows, self.config, self.max_model_len = list(windows), config, max_model_len
        self.ranks_per_device = ranks_per_device
        self.budgets = rank_budgets(reports, config, device_type, ranks_per_device)
        self.needs = self.blocks_for(max_model_len)

    def blocks_for(self, length: int) -> list[int]:
        """blocks_per_sequence with this configuration."""
        budget = self.config.scheduler.max_num_batched_tokens
        return blocks_per_sequence(self.windows, length, self.config.cache.block_size, budget)

    def allowed(self, budget: Budget) -> int:
        """Bytes of cache a rank gets: cache.memory when it is set, else what is left."""
        return budget.cache_bytes if self.config.cache.memory is None else self.config.cache.memory

    def plan(self) -> CachePlan:
        """Check everything, then size the groups."""
        for budget in self.budgets:
            self.check_rest(budget)
            self.check_memory(budget)
        blocks = self.given_blocks() if self.config.cache.num_blocks is not None else self.fitting_blocks()
        scheduler = self.config.scheduler
        return CachePlan(
            block_size=self.config.cache.block_size,
            windows=self.windows,
            num_blocks=blocks,
            max_model_len=self.max_model_len,
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            share_bytes=[budget.share_bytes for budget in self.budgets],
            cache_bytes=[cost(budget.report, blocks) for budget in self.budgets],
        )

    def fitting_blocks(self) -> list[int]:
        """As many blocks as every rank can hold.

        Every group holds one sequence of max_model_len. The rest is divided so that all groups hold the same number of
        typical sequences: of max_model_len with one group; with several, TYPICAL_WINDOWS times the largest window,
        since shorter ones need as many blocks of a window as of full attention, and longer ones hardly any.
        """
        typical_len = self.max_model_len
        if len(self.windows) > 1:
            typical_len = min(typical_len, TYPICAL_WINDOWS * max(window or 0 for window in self.windows))
        typical = blocks_per_sequence(self.windows, typical_len, self.config.cache.block_size, 1)
        most = self.config.scheduler.max_num_seqs
        sequences = float(most)
        for budget in self.budgets:
            left, per_sequence = self.allowed(budget) - cost(budget.report, self.needs), cost(budget.report, typical)
            if left < 0:
                raise self.too_long()
            if per_sequence:
                sequences = min(sequences, left / per_sequence)
        return [min(need + int(sequences * each), most * need) for need, each in zip(self.needs, typical, strict=True)]

    def given_blocks(self) -> list[int]:
        """cache.num_blocks for every group, when a sequence of max_model_len and every rank's memory allow it."""
        count, cache = self.config.cache.num_blocks or 0, self.config.cache
        if count < max(self.needs):
            raise ValueError(
                f"cache.num_blocks = {count} blocks of {cache.block_size} tokens do not hold one sequence of "
                f"model.max_model_len = {self.max_model_len}: raise cache.num_blocks to {max(self.needs)}, "
                f"or lower model.max_model_len to {self.largest(lambda needs: max(needs) <= count)}"
            )
        for budget in self.budgets:
            per_block, allowed = sum(budget.report.block_bytes), self.allowed(budget)
            if max(self.needs) * per_block > allowed:
                raise self.too_long()
            if count * per_block > allowed:
                raise ValueError(
                    f"cache.num_blocks = {count} needs {size(count * per_block)} on rank {budget.report.rank}, "
                    f"{size(allowed)} are left: lower cache.num_blocks to {allowed // per_block}"
                    + self.more_memory(budget, count * per_block)
                )
        return [count] * len(self.needs)

    def check_rest(self, budget: Budget) -> None:
        """Raise ValueError when weights, activations and reserve alone exceed a rank's share."""
        if budget.cache_bytes > 0:
            return
        report = budget.report
        raise ValueError(
            f"rank {report.rank}: {size(report.weights_bytes)} of weights, {size(report.activation_bytes)} of "
            f"activations and {size(self.config.cache.reserve)} of cache.reserve leave nothing of the "
            f"{size(budget.share_bytes)} it may use: {self.spread()}lower scheduler.max_num_batched_tokens"
            + self.more_memory(budget, cost(report, self.needs))
        )

    def check_memory(self, budget: Budget) -> None:
        """Raise ValueError when cache.memory asks for more than a rank has left."""
        memory = self.config.cache.memory
        if memory is not None and memory > budget.cache_bytes:
            raise ValueError(
                f"cache.memory = {size(memory)} exceeds the {size(budget.cache_bytes)} left on rank "
                f"{budget.report.rank}: lower cache.memory to {budget.cache_bytes}" + self.more_memory(budget, memory)
            )

    def too_long(self) -> ValueError:
        """The error for a cache that cannot hold one sequence of max_model_len."""
        worst = max(self.budgets, key=lambda budget: cost(budget.report, self.needs) - self.allowed(budget))
        need, left = cost(worst.report, self.needs), self.allowed(worst)
        fits = self.largest(lambda needs: all(cost(b.report, needs) <= self.allowed(b) for b in self.budgets))
        fixes = [f"lower model.max_model_len to {fits}"] if fits else []
        if self.config.cache.memory is not None:
            fixes.append(f"raise cache.memory to {need}")
        else:
            fixes += [self.spread().removesuffix(", "), self.more_memory(worst, need).removeprefix(", or ")]
        if not any(fixes):
            fixes = ["lower scheduler.max_num_batched_tokens"]
        return ValueError(
            f"model.max_model_len = {self.max_model_len} needs {size(need)} of KV cache on rank {worst.report.rank}, "
            f"{size(left)} are left{'' if fits else ', not even one block'}: {', or '.join(filter(None, fixes))}"
        )

    def largest(self, fits: Callable[[list[int]], bool]) -> int:
        """The longest context, in whole blocks where it can be, whose blocks fit; 0 when none does."""
        low, high = 0, self.max_model_len
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(self.blocks_for(middle)) else (low, middle - 1)
        return low

    def spread(self) -> str:
        """Advice that only helps when ranks have devices of their own."""
        return "raise parallel.tensor or parallel.pipeline, " if self.ranks_per_device == 1 else ""

    def more_memory(self, budget: Budget, cache_bytes: int) -> str:
        """The gpu_memory_utilization that would leave cache_bytes, when there is one."""
        report = budget.report
        total = report.weights_bytes + report.activation_bytes + self.config.cache.reserve + cache_bytes
        needed = ceil(100 * total * self.ranks_per_device / max(budget.device_bytes, 1)) / 100
        return f", or raise cache.gpu_memory_utilization to {needed:.2f}" if needed <= 1 else ""


def cost(report: MemoryReport, blocks: Sequence[int]) -> int:
    """Bytes these blocks, one number per group, take on a rank."""
    return sum(count * each for count, each in zip(blocks, report.block_bytes, strict=True))


def plan_cache(
    reports: Sequence[MemoryReport],
    windows: Sequence[int | None],
    config: ShoalConfig,
    *,
    max_model_len: int,
    device_type: str,
    ranks_per_device: int = 1,
) -> CachePlan:
    """Blocks per cache group that every rank can hold.

    reports: one per rank of a replica, in rank order. windows: DecoderSpec.cache_windows. device_type: "cuda" or "cpu";
    ranks_per_device: ranks, of all replicas, that share a device (parallel.ranks_per_device on GPUs, the host's ranks
    on a CPU). Honours cache.num_blocks, memory, reserve and gpu_memory_utilization. Raises ValueError naming number,
    rank and fix.
    """
    return CachePlanner(reports, windows, config, max_model_len, device_type, ranks_per_device).plan()


def size(count: int) -> str:
    """Bytes for people: GiB, MiB or KiB."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if abs(count) >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count / 1024:.1f} KiB"
