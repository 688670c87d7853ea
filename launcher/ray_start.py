"""A layout on a Ray cluster, started from a front end that ends it: what `launcher.kind = ray` does."""

import asyncio
from pathlib import Path

from shoal.configs.host import usable_cores
from shoal.configs.schema import ShoalConfig
from shoal.launcher.bootstrap import WORKER
from shoal.launcher.ray_cluster import Cluster, keep_sigterm
from shoal.launcher.ray_fleet import RayFleet
from shoal.launcher.replica import Progress
from shoal.launcher.replica_messages import Starting
from shoal.launcher.replicas import start_replicas
from shoal.launcher.started import StartedEngine
from shoal.model.spec import DecoderSpec


async def start_ray(
    config: ShoalConfig,
    spec: DecoderSpec,
    model_dir: Path | None,
    on_progress: Progress | None = None,
    worker: str = WORKER,
) -> StartedEngine:
    """Join or start the cluster, place the replicas, start them. Raises ValueError, EngineError."""
    tell = on_progress or (lambda starting: None)
    tell(Starting(doing="joining the Ray cluster"))
    launcher = config.launcher
    cores = max(usable_cores(), config.world_size)  # of a cluster of its own, where CPU ranks may share cores
    cluster = await asyncio.to_thread(Cluster.connect, launcher.address, launcher.ray_auth, cores)
    keep_sigterm()
    try:
        tell(Starting(doing="placing replicas and checking their hosts"))
        fleet = RayFleet(cluster, config, spec, model_dir, worker)
        await fleet.prepare(range(config.parallel.data))
    except BaseException:
        await asyncio.to_thread(cluster.close)
        raise
    return await start_replicas(fleet.make, fleet.settled, on_progress, fleet.close)
