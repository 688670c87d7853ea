"""Every world rank but 0 under torchrun: a rank of a replica, or the parent of a replica's engine and first rank."""

import asyncio
import os
import signal
from pathlib import Path

import msgspec

from shoal.configs.model_path import resolve_model_path
from shoal.configs.resolved import ResolvedConfig
from shoal.configs.schema import ShoalConfig
from shoal.engine.client import EngineError
from shoal.launcher.bootstrap import WORKER, EngineBootstrap, RankBootstrap, fingerprint
from shoal.launcher.local import ENGINE_ENTRY
from shoal.launcher.local_start import device_of, start_processes
from shoal.launcher.rank_process import run_rank
from shoal.launcher.torchrun_world import RankOrders, Store, World, introduce, read_world, watch_parent
from shoal.model.checkpoint_files import verify_checksums
from shoal.model.families import load_spec
from shoal.model.spec import DecoderSpec


def follow(resolved: ResolvedConfig) -> int:
    """Do this process's part of the launch; returns its exit status. Raises ValueError, EngineError."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # world rank 0 decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # at once, also from within torch; what it started ends with it
    config = resolved.config
    if config.model.path is None:
        raise ValueError("model.path is not set: give a folder with config.json, a Hugging Face hub id, or demo")
    model_dir = resolve_model_path(config.model.path, config.model.revision)
    spec, _ = load_spec(model_dir)
    if config.model.checksums is not None and os.environ["LOCAL_RANK"] == "0":  # another host than world rank 0's
        verify_checksums(model_dir, config.model.checksums)
    return follow_model(config, spec, model_dir)


def follow_model(config: ShoalConfig, spec: DecoderSpec, model_dir: Path | None, worker: str = WORKER) -> int:
    """The same once the model is known. worker: to be imported early; which one runs is world rank 0's word."""
    world = read_world(os.environ)
    watch_parent()
    if world.rank % config.ranks_per_replica == 0:
        return asyncio.run(_lead(world, config, spec, model_dir, worker))
    store = Store(world, config.launcher.start_timeout_s)
    introduce(store, world, fingerprint(config, spec))
    return _be_rank(store, world, config, spec, model_dir)


async def _lead(world: World, config: ShoalConfig, spec: DecoderSpec, model_dir: Path | None, worker: str) -> int:
    """Start the engine and the first rank of this replica, and stay until they end."""
    processes = await start_processes(config, worker)
    try:
        store = await asyncio.to_thread(Store, world, config.launcher.start_timeout_s)
        await asyncio.to_thread(introduce, store, world, fingerprint(config, spec))
        number = world.rank // config.ranks_per_replica
        name = f"engine/{number}"
        bootstrap = await asyncio.to_thread(store.take, name, EngineBootstrap, "world rank 0 to order this engine")
        model = msgspec.structs.replace(bootstrap.model, model_dir=None if model_dir is None else str(model_dir))
        bootstrap = msgspec.structs.replace(bootstrap, model=model)
        await processes.loaded()
        engine = processes.fork(f"engine {number}", ENGINE_ENTRY, msgspec.msgpack.encode(bootstrap), supervises=True)
        exited = await engine.ended
        return 0 if exited.status == 0 else 1
    finally:
        await processes.close()


def _be_rank(store: Store, world: World, config: ShoalConfig, spec: DecoderSpec, model_dir: Path | None) -> int:
    """Join the engine of this replica as a rank."""
    number, rank = divmod(world.rank, config.ranks_per_replica)
    orders = store.take(f"ranks/{number}", RankOrders, f"the engine of replica {number} to take ranks")
    model = msgspec.structs.replace(orders.model, model_dir=None if model_dir is None else str(model_dir))
    if len(orders.shards) <= rank:
        raise EngineError(f"world rank {world.rank} is rank {rank} here; the replica has {len(orders.shards)}")
    return run_rank(
        RankBootstrap(
            rank=rank,
            model=model,
            shard=orders.shards[rank],
            device=device_of(model.config, world.local_rank),
            threads=orders.threads,
            address=orders.address,
            key=orders.key,
            config_fingerprint=fingerprint(config, spec),
        )
    )
