"""The limits of this machine, measured: how fast memory is read and how fast matrices are multiplied. Benchmarks quote
both."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec
import torch

from shoal.configs.host import available_host_bytes

BUFFER_BYTES = {"cpu": 1 << 30, "cuda": 1 << 32}  # several times any cache, so that reads come from memory
LEAST_BUFFER_BYTES = 1 << 26
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
GEMM_PAIRS = 4


class MachineLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Best of several rounds. read_bytes_per_s: a plain sum over a large buffer. gemm_flops_per_s: square product in
    `dtype`, or in float32 where that is faster: processors without an instruction for halves multiply them so.
    """

    device: str
    threads: int
    dtype: str
    read_bytes_per_s: float
    gemm_flops_per_s: float


BUDGET_S = 0.6


def best_seconds(work: Callable[[], object], device: torch.device, budget_s: float = BUDGET_S) -> float:
    """The fastest run of those that fit in about budget_s seconds: of three at least, unless they take several times as
    long.
    """
    best, rounds, started = float("inf"), 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < budget_s or rounds < min(3, 4 * budget_s / spent):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best, rounds = min(best, time.perf_counter() - start), rounds + 1
    return best


def read_bandwidth(device: torch.device, budget_s: float = BUDGET_S) -> float:
    """Bytes per second of reading memory. Takes no more than a quarter of what is free of it."""
    free = available_host_bytes() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    size = max(min(BUFFER_BYTES[device.type], free // 4), LEAST_BUFFER_BYTES)
    buffer = torch.ones(size // 4, dtype=torch.float32, device=device)
    return buffer.numel() * 4 / best_seconds(lambda: buffer.sum(), device, budget_s)


def gemm_rate(device: torch.device, dtype: torch.dtype, budget_s: float = BUDGET_S) -> float:
    """Multiply-adds of a square matrix product, counted as two FLOP each, per second.

    The best of several pairs of matrices: where they lie decides whether their lines push each other out of the cache,
    which halves the rate of every product of a pair.
    """
    size, best, started = GEMM_SIZE[device.type], float("inf"), time.perf_counter()
    for _ in range(GEMM_PAIRS):
        left, right = (torch.randn(size, size, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
        seconds = best_seconds(lambda a=left, b=right: a @ b, device, budget_s / GEMM_PAIRS)  # type: ignore[misc]
        best = min(best, seconds)
        if time.perf_counter() - started > 2 * budget_s:  # some processors have no instruction for the dtype
            break
    return 2 * size**3 / best


def best_gemm_rate(device: torch.device, dtype: torch.dtype, budget_s: float = BUDGET_S) -> float:
    """The higher one of float32 and `dtype`."""
    return max(gemm_rate(device, one, budget_s) for one in {torch.float32, dtype})


def measure_limits(device: torch.device, dtype: torch.dtype, budget_s: float = BUDGET_S) -> MachineLimits:
    """Both limits with the threads torch has now. Takes about three times budget_s.

    Measured in a thread that ends: its OpenMP threads would count beside those of an engine in this process, and make
    both give up waiting actively (engine/work_thread.py).
    """

    def limits() -> MachineLimits:
        with torch.inference_mode():
            return MachineLimits(
                device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                threads=torch.get_num_threads(),
                dtype=str(dtype).removeprefix("torch."),
                read_bytes_per_s=read_bandwidth(device, budget_s),
                gemm_flops_per_s=best_gemm_rate(device, dtype, budget_s),
            )

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(limits).result()
