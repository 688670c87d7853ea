"""Resolves every "auto" once, at the start: device, type, collectives, threads, context length. Says what it chose. No
torch.

What the devices found cannot carry is refused here, with the numbers and the fix.
"""

import secrets
from typing import Literal

import msgspec

from shoal.configs.host import memory_nodes, usable_cores
from shoal.configs.schema import ShoalConfig
from shoal.model.spec import DecoderSpec
from shoal.parallel.shm_segment import MAX_RANKS

Device = Literal["cpu", "cuda"]


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """What this host offers the launch.

    gpus: that torch sees. native: the C kernels are there. ranks: of all replicas, on this host. one_host: every rank
    of a replica is on the same host as the others. cores: of the host that has the fewest for each of its ranks, and
    how many ranks these are; memory_nodes: most parts of a host's memory that have cores of their own; None: of this
    host.
    """

    gpus: int
    native: bool
    ranks: int
    one_host: bool = True
    cores: tuple[int, int] | None = None
    memory_nodes: int | None = None


class Settled(msgspec.Struct, frozen=True, kw_only=True):
    """config: without any "auto". notes: what was chosen, one line each. ranks_per_device: ranks, of all replicas, that
    share one device's memory on this host.
    """

    config: ShoalConfig
    notes: list[str]
    ranks_per_device: int


def settle(config: ShoalConfig, spec: DecoderSpec, host: Host) -> Settled:
    """Resolve the settings for a model on this host. Raises ValueError naming setting, value, limit and fix."""
    device = choose_device(config, host)
    collectives = choose_collectives(config, host, device)
    check_quantization(config, device)
    check_eager(config, device)
    micro_batches = choose_micro_batches(config, host, device)
    threads = config.runtime.threads or choose_threads(config, host, micro_batches)
    max_model_len = config.model.max_model_len or spec.max_position
    if max_model_len > spec.max_position:
        raise ValueError(
            f"model.max_model_len = {max_model_len} exceeds the checkpoint's context of {spec.max_position} tokens; "
            f"lower it to {spec.max_position} or leave it out"
        )
    dtype = spec.dtype if config.model.dtype == "auto" else config.model.dtype
    replace = msgspec.structs.replace
    native = config.runtime.native if device == "cuda" else ("require" if host.native else "off")
    seed = secrets.randbits(62) if config.runtime.seed is None else config.runtime.seed
    settled = replace(
        config,
        model=replace(config.model, dtype=dtype, max_model_len=max_model_len),
        parallel=replace(config.parallel, micro_batches=micro_batches),
        runtime=replace(
            config.runtime, device=device, collectives=collectives, threads=threads, native=native, seed=seed
        ),
    )
    sharing = config.parallel.ranks_per_device if device == "cuda" else host.ranks
    return Settled(config=settled, notes=_notes(settled, host), ranks_per_device=sharing)


def choose_device(config: ShoalConfig, host: Host) -> Device:
    """The kind of device. Raises ValueError when there are too few GPUs."""
    wanted, layout = config.runtime.device, config.parallel
    if wanted == "cpu" or (wanted == "auto" and host.gpus == 0):
        if layout.ranks_per_device > 1:
            raise ValueError(
                f"parallel.ranks_per_device = {layout.ranks_per_device} says how many ranks share a GPU, and the ranks "
                "run on the CPU, whose memory all share; leave it out"
            )
        return "cpu"
    if host.gpus == 0:
        raise ValueError("runtime.device = cuda, but torch sees no GPU here; `shoal doctor` says why, or use cpu")
    needed = -(-host.ranks // layout.ranks_per_device)
    if needed > host.gpus:
        raise ValueError(
            f"the layout tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data} needs {needed} "
            f"GPUs on this host, and torch sees {host.gpus}; lower a size, share the cards with "
            f"parallel.ranks_per_device = {-(-host.ranks // host.gpus)}, or rehearse it with runtime.device = cpu"
        )
    return "cuda"


def check_eager(config: ShoalConfig, device: Device) -> None:
    """Raise ValueError where there are no graphs to do without."""
    if config.runtime.enforce_eager and device == "cpu":
        raise ValueError(
            "runtime.enforce_eager does without CUDA graphs, and the ranks run on the CPU, which has none; leave it out"
        )


def check_quantization(config: ShoalConfig, device: Device) -> None:
    """Raise ValueError where quantised weights cannot be computed with."""
    if config.model.quantization == "fp8" and device == "cpu":
        raise ValueError(
            "model.quantization = fp8 is for GPUs, and the ranks run on the CPU; use int8 or int4, or leave it out"
        )


def choose_collectives(config: ShoalConfig, host: Host, device: Device) -> Literal["shm", "gloo", "nccl"]:
    """How ranks exchange tensors. Raises ValueError when the asked way cannot work here."""
    wanted, size = config.runtime.collectives, config.ranks_per_replica
    shared = config.parallel.ranks_per_device > 1
    if wanted == "shm" and device == "cuda" and size > 1:
        raise ValueError("runtime.collectives = shm joins CPU tensors, and the ranks run on GPUs; use auto or nccl")
    if wanted == "nccl" and shared and size > 1:
        raise ValueError(
            f"runtime.collectives = nccl refuses two ranks on one GPU, and parallel.ranks_per_device = "
            f"{config.parallel.ranks_per_device}; use auto"
        )
    if wanted == "shm":
        if not host.native:
            raise ValueError(
                "runtime.collectives = shm needs the C kernels, which are not there; use gloo, or install gcc"
            )
        if not host.one_host:
            raise ValueError(
                "runtime.collectives = shm works on one host; the ranks of a replica are on several; use gloo"
            )
        if size > MAX_RANKS:
            raise ValueError(f"runtime.collectives = shm joins at most {MAX_RANKS} ranks, not {size}; use gloo")
    if wanted == "nccl" and device == "cpu":
        raise ValueError("runtime.collectives = nccl works on GPUs, and torch sees none; use auto, shm or gloo")
    if wanted != "auto":
        return wanted
    if device == "cuda":
        return "gloo" if shared else "nccl"
    return "shm" if host.native and host.one_host and size <= MAX_RANKS else "gloo"


def choose_micro_batches(config: ShoalConfig, host: Host, device: Device) -> int:
    """Steps under way at once. Stages that share a host's cores gain nothing side by side: each would read its weights
    once for every part of the requests, and one of them would wait for the other.
    """
    asked, stages = config.parallel.micro_batches, config.parallel.pipeline
    if asked is not None:
        return asked
    shared = device == "cpu" and host.one_host and (host.memory_nodes or memory_nodes()) == 1
    return 1 if shared and config.runtime.threads is None else stages


def choose_threads(config: ShoalConfig, host: Host, micro_batches: int) -> int:
    """Threads for each rank, of the cores for those that work at once."""
    cores, ranks = host.cores or (usable_cores(), host.ranks)
    turns = config.parallel.pipeline if host.one_host else micro_batches  # elsewhere a host has some of the stages
    return max(1, cores * turns // (ranks * micro_batches))


def for_place(settled: ShoalConfig, asked: ShoalConfig, host: Host, device: Device) -> ShoalConfig:
    """Settings of a replica whose hosts need not be those that all were settled for, such as one that was moved. asked:
    before they were settled; host: what its own hosts offer.
    """
    replace = msgspec.structs.replace
    host = replace(host, native=settled.runtime.native == "require")
    micro_batches = choose_micro_batches(asked, host, device)
    threads = asked.runtime.threads or choose_threads(asked, host, micro_batches)
    collectives = choose_collectives(asked, host, device)
    return replace(
        settled,
        parallel=replace(settled.parallel, micro_batches=micro_batches),
        runtime=replace(settled.runtime, collectives=collectives, threads=threads),
    )


def _notes(config: ShoalConfig, host: Host) -> list[str]:
    """What was chosen, for people."""
    layout, runtime = config.parallel, config.runtime
    weights = "" if config.model.quantization == "none" else f" with {config.model.quantization} weights"
    kept = weights + ("" if config.cache.dtype == "auto" else f", {config.cache.dtype} KV cache")
    between = f", {runtime.collectives} collectives" if config.ranks_per_replica > 1 else ""
    if between and runtime.device == "cuda" and runtime.collectives == "gloo":
        between += " through host memory"
    if layout.ranks_per_device > 1:
        between += f", {layout.ranks_per_device} ranks per GPU"
    threads = f", {runtime.threads} {'thread' if runtime.threads == 1 else 'threads'} per rank"
    stages = ""
    if layout.pipeline > 1:
        stages = ", stages take turns" if layout.micro_batches == 1 else f", {layout.micro_batches} steps in flight"
    kernels = ", C kernels" if runtime.device == "cpu" and host.native else ""
    notes = [
        f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data} = {config.world_size} "
        f"{'rank' if config.world_size == 1 else 'ranks'} on {runtime.device}: {config.model.dtype}{kept}, context "
        f"{config.model.max_model_len}{between}{stages}{threads if runtime.device == 'cpu' else ''}{kernels}"
    ]
    used = -(-host.ranks // layout.ranks_per_device)
    if host.gpus > used and runtime.device == "cuda":
        more = host.gpus // max(1, host.ranks // layout.tensor)  # a tensor group may span hosts
        hint = f": try -tp {more}" if more > layout.tensor else ""
        notes.append(f"{host.gpus} GPUs seen, using {used}{hint}")
    return notes
