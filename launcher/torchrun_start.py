"""World rank 0 under torchrun: the front end, which tells the other processes what to be, through the store.

Its own rank and its replica's engine are children of its zygote, as in a local start; the leader of each other replica
does the same for its own; all remaining processes are ranks themselves (`shoal.launcher.torchrun_follow`).
"""

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from shoal.configs.schema import ShoalConfig
from shoal.launcher.bootstrap import WORKER, EngineBootstrap, Model, fingerprint
from shoal.launcher.engine_replica import EngineReplica
from shoal.launcher.local import LocalProcesses, LocalReplica
from shoal.launcher.local_start import count_gpus, device_of, has_native, start_processes
from shoal.launcher.replica import Progress
from shoal.launcher.replicas import start_replicas
from shoal.launcher.settle import Host, Settled, settle
from shoal.launcher.started import StartedEngine
from shoal.launcher.torchrun_world import Member, RankOrders, Store, introduce, members, read_world, watch_parent
from shoal.model.shard import shard_model
from shoal.model.spec import DecoderSpec
from shoal.parallel.control_connect import Listener, new_key


class RemoteReplica(EngineReplica):
    """A replica whose engine is started by the leader of its ranks."""

    def __init__(
        self,
        store: Store,
        listener: Listener,
        bootstrap: EngineBootstrap,
        *,
        where: str,
        on_listening: Callable[[str], None],
    ) -> None:
        super().__init__(listener, bootstrap, where=where, on_listening=on_listening)
        self._store = store

    async def start(self) -> None:
        """Tell the leader."""
        await asyncio.to_thread(self._store.put, f"engine/{self.bootstrap.replica}", self.bootstrap)

    def how_ended(self) -> str | None:
        """Only torchrun knows."""
        return None

    async def explain(self) -> str:
        """Nothing is known here."""
        return ""


async def start_torchrun(
    config: ShoalConfig,
    spec: DecoderSpec,
    model_dir: Path | None,
    on_progress: Progress | None = None,
    worker: str = WORKER,
) -> StartedEngine:
    """Start all replicas from world rank 0. Raises ValueError (also on another rank), EngineError."""
    world = read_world(os.environ)
    if world.rank != 0:
        raise ValueError(
            f"launcher.kind = torchrun: this is world rank {world.rank}, and only world rank 0 is a front end; under "
            "torchrun run the command line (`torchrun ... -m shoal generate ...`), or give launcher = local"
        )
    watch_parent()
    config_fingerprint = fingerprint(config, spec)
    processes = await start_processes(config, worker)
    try:
        store = await asyncio.to_thread(Store, world, config.launcher.start_timeout_s)
        await asyncio.to_thread(introduce, store, world, config_fingerprint)
        found = await asyncio.to_thread(members, store, world)
        native = await has_native(config)
        gpus = await count_gpus(processes, config)
        size = config.ranks_per_replica
        groups = [found[start : start + size] for start in range(0, world.size, size)]
        one_host = all(_one_host(group) for group in groups)
        settled = settle(config, spec, Host(gpus=gpus, native=native, ranks=world.local_size, one_host=one_host))
        model = Model(
            config=settled.config, spec=spec, model_dir=None if model_dir is None else str(model_dir), worker=worker
        )
    except BaseException:
        await processes.close()
        raise

    async def factory(number: int) -> EngineReplica:
        return _replica(number, groups[number], found[0], processes, store, settled, model, config_fingerprint)

    # torchrun owns the processes: it ends all of them with the first, so nothing can be built again from here.
    return await start_replicas(factory, settled, on_progress, processes.close, rebuild=False)


def _one_host(group: Sequence[Member]) -> bool:
    return all(member.host == group[0].host for member in group)


def _replica(
    number: int,
    group: Sequence[Member],
    front: Member,
    processes: LocalProcesses,
    store: Store,
    settled: Settled,
    model: Model,
    config_fingerprint: str,
) -> EngineReplica:
    """The handle of one replica. group: its ranks; front: this process."""
    config, leader = settled.config, group[0]
    shards, key = shard_model(model.spec, config.parallel, config.model.quantization), new_key()
    assert config.runtime.threads is not None, "settled"
    listener = Listener.unix() if leader.host == front.host else Listener.tcp(front.address)
    bootstrap = EngineBootstrap(
        replica=number,
        model=model,
        shards=shards,
        devices={0: device_of(config, leader.local_rank)},
        ranks_per_device=settled.ranks_per_device,
        threads=config.runtime.threads,
        front_address=listener.address,
        key=key,
        config_fingerprint=config_fingerprint,
        listen_host=None if _one_host(group) else leader.address,
    )

    def order_ranks(address: str) -> None:
        """The engine listens: the other ranks of the replica may join."""
        orders = RankOrders(model=model, shards=shards, threads=bootstrap.threads, address=address, key=key)
        store.put(f"ranks/{number}", orders)

    where = f"replica {number}: " if config.parallel.data > 1 else ""
    if number == 0:
        return LocalReplica(processes, listener, bootstrap, where=where, on_listening=order_ranks)
    return RemoteReplica(store, listener, bootstrap, where=where, on_listening=order_ranks)
