"""A layout of several ranks on this host: one zygote, one engine process per replica, and their ranks."""

import asyncio
import os
from pathlib import Path

from shoal.configs.schema import ShoalConfig
from shoal.engine.client import EngineError
from shoal.kernels.build import NativeBuildError, build_native
from shoal.launcher import probe
from shoal.launcher.bootstrap import WORKER, EngineBootstrap, Model, fingerprint
from shoal.launcher.local import LocalProcesses, LocalReplica
from shoal.launcher.processes import PRELOAD, LaunchError, Zygote
from shoal.launcher.replica import Progress
from shoal.launcher.replicas import start_replicas
from shoal.launcher.settle import Host, Settled, settle
from shoal.launcher.started import StartedEngine
from shoal.model.shard import shard_model
from shoal.model.spec import DecoderSpec
from shoal.parallel.control_connect import Listener, new_key

PROBE_TIMEOUT_S = 60.0


async def start_local(
    config: ShoalConfig,
    spec: DecoderSpec,
    model_dir: Path | None,
    on_progress: Progress | None = None,
    worker: str = WORKER,
) -> StartedEngine:
    """Start all replicas. worker: "module:class" of what ranks run. Raises ValueError, EngineError."""
    processes = await start_processes(config, worker)
    try:
        native = await has_native(config)
        gpus = await count_gpus(processes, config)
        settled = settle(config, spec, Host(gpus=gpus, native=native, ranks=config.world_size))
        model = Model(
            config=settled.config,
            spec=spec,
            model_dir=None if model_dir is None else str(model_dir),
            worker=worker,
        )
    except BaseException:
        await processes.close()
        raise
    factory = LocalFactory(processes, settled, model, fingerprint(config, spec))
    return await start_replicas(factory, settled, on_progress, factory.close)


class LocalFactory:
    """Makes handles of replicas on this host; starts a new zygote when the old one has died, with all its children."""

    def __init__(self, processes: LocalProcesses, settled: Settled, model: Model, config_fingerprint: str) -> None:
        self._processes, self._settled, self._model = processes, settled, model
        self._fingerprint = config_fingerprint
        self._lock = asyncio.Lock()

    async def __call__(self, number: int) -> LocalReplica:
        """A handle for the next life of replica `number`. Raises EngineError."""
        async with self._lock:
            if self._processes.gone:
                await self._processes.close()
                self._processes = await start_processes(self._settled.config, self._model.worker)
                await self._processes.loaded()
        return make_replica(number, self._processes, self._settled, self._model, self._fingerprint)

    async def close(self) -> None:
        """End the zygote and what is left of its children."""
        await self._processes.close()


async def start_processes(config: ShoalConfig, worker: str = WORKER) -> LocalProcesses:
    """A zygote, importing while the caller goes on. Raises EngineError."""
    try:
        zygote = Zygote(tuple(dict.fromkeys([*PRELOAD, worker.partition(":")[0]])))
    except LaunchError as error:
        raise EngineError(str(error)) from None
    return LocalProcesses(zygote, config.launcher.start_timeout_s)


async def has_native(config: ShoalConfig) -> bool:
    """Build the C kernels, once for all ranks of this host. Raises EngineError when they are required and cannot be."""
    if config.runtime.device == "cuda":
        return False
    try:
        return await asyncio.to_thread(build_native, config.runtime.native) is not None
    except NativeBuildError as error:
        raise EngineError(f"runtime.native = require: {error}") from None


async def count_gpus(processes: LocalProcesses, config: ShoalConfig) -> int:
    """GPUs that torch sees here, counted in a process that ends afterwards."""
    await processes.loaded()
    if config.runtime.device == "cpu" or not processes.cuda:
        return 0
    child = processes.fork("probe", "shoal.launcher.probe:main", b"")
    if not await child.has_ended(PROBE_TIMEOUT_S):
        raise EngineError(f"torch did not count the GPUs within {PROBE_TIMEOUT_S:g} s; is the driver well?")
    log = child.ended.result().log
    try:
        return probe.read_count(log)
    except ValueError:
        raise EngineError(f"torch could not count the GPUs:\n{log}") from None


def make_replica(
    number: int, processes: LocalProcesses, settled: Settled, model: Model, config_fingerprint: str
) -> LocalReplica:
    """The handle of one replica, its listener open."""
    config, size = settled.config, settled.config.ranks_per_replica
    assert config.runtime.threads is not None, "settled"
    listener = Listener.unix()
    cores = cores_of_ranks(config)
    bootstrap = EngineBootstrap(
        replica=number,
        model=model,
        shards=shard_model(model.spec, config.parallel, config.model.quantization),
        devices={rank: device_of(config, number * size + rank) for rank in range(size)},
        ranks_per_device=settled.ranks_per_device,
        threads=config.runtime.threads,
        front_address=listener.address,
        key=new_key(),
        config_fingerprint=config_fingerprint,
        cores=dict(enumerate(cores[number * size : (number + 1) * size])),
    )
    where = f"replica {number}: " if config.parallel.data > 1 else ""
    return LocalReplica(processes, listener, bootstrap, where=where)


def cores_of_ranks(config: ShoalConfig) -> list[tuple[int, ...]]:
    """Cores for every rank of all replicas to keep to, by runtime.pin_cores; none where that gains nothing.

    Ranks of a tensor group wait for each other many times a layer, and one that shares a core keeps the others waiting.
    Stages of a pipeline wait less, and gain from a core that another leaves idle; where they take turns, the groups of
    all stages keep to the same cores.
    """
    layout, threads, usable = config.parallel, config.runtime.threads or 1, sorted(os.sched_getaffinity(0))
    wanted = config.runtime.pin_cores and config.runtime.device == "cpu" and layout.tensor > 1
    ranks = range(config.ranks_per_replica)
    at_once = layout.tensor if layout.micro_batches == 1 else len(ranks)  # of a replica's ranks
    if not wanted or layout.data * at_once * threads > len(usable):
        return []
    places = [replica * at_once + rank % at_once for replica in range(layout.data) for rank in ranks]
    return [tuple(usable[place * threads : (place + 1) * threads]) for place in places]


def device_of(config: ShoalConfig, local_rank: int) -> str:
    """The device of a host's rank."""
    return f"cuda:{local_rank // config.parallel.ranks_per_device}" if config.runtime.device == "cuda" else "cpu"
