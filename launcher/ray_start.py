"""A layout on a Ray cluster for a front end that ends it (`launcher.kind = ray`), or a detached model for a front end
that only uses it (`launcher.attach`).
"""

import asyncio
from pathlib import Path

from shoal.configs.host import usable_cores
from shoal.configs.schema import ShoalConfig
from shoal.launcher.attached import AttachedReplica, Door, NotYet, new_front_end
from shoal.launcher.bootstrap import WORKER
from shoal.launcher.controller import Controller, ControllerOptions
from shoal.launcher.detached_client import ask_door, find_detached
from shoal.launcher.ray_cluster import Cluster, keep_sigterm
from shoal.launcher.ray_fleet import RayFleet
from shoal.launcher.replica import Progress
from shoal.launcher.replica_messages import Starting
from shoal.launcher.replicas import start_replicas
from shoal.launcher.started import StartedEngine
from shoal.model.checkpoint_digest import checkpoint_digest
from shoal.model.spec import DecoderSpec


async def start_ray(
    config: ShoalConfig,
    spec: DecoderSpec,
    model_dir: Path | None,
    on_progress: Progress | None = None,
    worker: str = WORKER,
) -> StartedEngine:
    """Join or start the cluster, place the replicas, start them. Raises ValueError, EngineError."""
    if config.launcher.attach is not None:
        return await start_attached(config, config.launcher.attach, spec, model_dir, on_progress)
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


async def start_attached(
    config: ShoalConfig, name: str, spec: DecoderSpec, model_dir: Path | None, on_progress: Progress | None = None
) -> StartedEngine:
    """A client of the detached model `name`. Raises ValueError when there is none or it runs another checkpoint."""
    launcher = config.launcher
    cluster = await asyncio.to_thread(Cluster.connect, launcher.address, launcher.ray_auth, None)
    keep_sigterm()
    controller: Controller | None = None
    try:
        actor = find_detached(cluster, name)
        weights = config.model.load_format != "dummy"
        digest = "" if model_dir is None else await asyncio.to_thread(checkpoint_digest, model_dir, weights)

        async def ask() -> Door | NotYet:
            door = await ask_door(actor)
            if isinstance(door, Door) and door.checkpoint != digest:
                raise ValueError(
                    f"{name} runs another checkpoint than {config.model.path} ({door.checkpoint}, not {digest}); name "
                    "the model it was started with"
                )
            return door

        front_end = new_front_end()

        async def factory(number: int) -> AttachedReplica:
            return AttachedReplica(ask, launcher.hang_timeout_s, name, front_end)

        async def leave() -> None:
            await asyncio.to_thread(cluster.close)

        options = ControllerOptions(start_timeout_s=launcher.start_timeout_s, seed=config.runtime.seed)
        controller = Controller(factory, 1, options, on_close=leave)
        (ready,) = await controller.start(on_progress)
    except BaseException:
        if controller is None:
            await asyncio.to_thread(cluster.close)
        raise
    return StartedEngine(
        client=controller,
        vocab_size=ready.capacity.vocab_size,
        max_model_len=ready.capacity.max_model_len,
        report=f"attached to {name}\n{ready.report}",
    )
