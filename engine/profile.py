"""The profiling step: what memory the largest step takes, measured before the cache is sized.

On GPUs the step has the full token budget. On CPUs, where a full step may take many seconds, it has at most
PROFILE_TOKENS_CPU tokens, and the result is scaled up: activations grow linearly with tokens. Peak memory on a CPU is
the kernel's own mark of this process (/proc/self/status VmHWM, reset through /proc/self/clear_refs); where that is not
permitted, nothing is measured and the ledger's estimate stands.
"""

import os
from types import TracebackType

import msgspec
import torch

from shoal.configs.host import available_host_bytes
from shoal.configs.sampling import SamplingParams
from shoal.configs.schema import ShoalConfig
from shoal.engine.messages import NewSequence, PlanRow, StepPlan
from shoal.model.spec import DecoderSpec

PROFILE_TOKENS_CPU = 128
WARM_UP_TOKENS = 8


def profile_plan(config: ShoalConfig, spec: DecoderSpec, device: torch.device) -> tuple[StepPlan, list[int], float]:
    """A plan of one step, the blocks per cache group it needs, and the factor from its tokens to the token budget."""
    budget = config.scheduler.max_num_batched_tokens
    total = min(budget, PROFILE_TOKENS_CPU) if device.type == "cpu" else budget
    length = min(total, config.model.max_model_len or spec.max_position)
    block_size, groups = config.cache.block_size, len(spec.cache_windows)
    per_row = -(-length // block_size)
    num_rows = min(max(1, total // length), config.scheduler.max_num_seqs)
    rows, sequences = [], []
    for index in range(num_rows):
        blocks = list(range(index * per_row, (index + 1) * per_row))
        name = f"profile-{index}"
        sampling = SamplingParams(temperature=0.0)
        sequences.append(NewSequence(name, [0] * length, length, sampling, 0, [], [], [blocks] * groups))
        rows.append(PlanRow(name, 0, length, [], [[] for _ in range(groups)], [blocks[-1]] * groups, True))
    plan = StepPlan(epoch=0, step=0, rows=rows, new_sequences=sequences)
    return plan, [num_rows * per_row] * groups, budget / (num_rows * length)


def warm_up_plans(plan: StepPlan) -> list[StepPlan]:
    """The profiling plan cut to the first few tokens of its first row, which has its blocks already, and where there is
    a token left to that one alone: prefill and decode run through different kernels on a GPU.
    """
    first = plan.rows[0]
    count = min(WARM_UP_TOKENS, first.num_tokens)
    rows = [msgspec.structs.replace(first, num_tokens=count)]
    if count < first.num_tokens:
        rows.append(msgspec.structs.replace(first, num_computed_tokens=count, num_tokens=1))
    return [
        StepPlan(epoch=plan.epoch, step=plan.step, rows=[row], new_sequences=plan.new_sequences[: 1 - index])
        for index, row in enumerate(rows)
    ]


def available_bytes(device: torch.device) -> int:
    """Memory that could still be taken on the device now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the allocator kept of the profiling step can be taken, too
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return available_host_bytes()


class ActivationMeter:
    """Context: peak_bytes is afterwards the memory taken at the worst moment beyond what was held before, 0 when it
    cannot be read."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak_bytes = device, 0

    def __enter__(self) -> "ActivationMeter":
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            self.before = reset_peak_rss()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - self.before
        elif self.before:
            self.peak_bytes = max(0, read_status_kib("VmHWM") * 1024 - self.before)


def reset_peak_rss() -> int:
    """Set the peak to the present resident size and return that, in bytes; 0 when the kernel does not permit it."""
    try:
        descriptor = os.open("/proc/self/clear_refs", os.O_WRONLY)
        try:
            os.write(descriptor, b"5")
        finally:
            os.close(descriptor)
    except OSError:
        return 0
    return read_status_kib("VmRSS") * 1024


def read_status_kib(field: str) -> int:
    """A field of /proc/self/status, in KiB."""
    with open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith(f"{field}:"):
                return int(line.split()[1])
    return 0
