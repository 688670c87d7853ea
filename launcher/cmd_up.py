"""shoal up: start a model on a Ray cluster and leave it running there; returns when it takes requests.

shoal up demo --config ray_tp2_dp2 --name prod
shoal generate demo --attach prod -p "..."
shoal status prod; shoal scale prod --replicas 3; shoal down prod
"""

import argparse
import asyncio
import contextlib
import secrets
import sys
import time

import msgspec

from shoal.configs.model_path import resolve_model_path
from shoal.configs.resolved import ResolvedConfig
from shoal.engine.client import EngineError
from shoal.launcher.attached import Door
from shoal.launcher.detached import DetachedController, DetachedOrder
from shoal.launcher.detached_client import ask_door, check_name
from shoal.launcher.progress import StartLine
from shoal.launcher.ray_cluster import Actor, Cluster, keep_sigterm
from shoal.launcher.ray_fleet import portable
from shoal.launcher.ray_places import end_crews
from shoal.launcher.replica_messages import Starting
from shoal.model.families import load_spec
from shoal.model.shard import shard_model

POLL_S = 0.25
END_TIMEOUT_S = 10.0


def run(args: argparse.Namespace, resolved: ResolvedConfig) -> int:
    """Start it; returns 0. Raises ValueError, EngineError, after ending what was started."""
    name = check_name(args.name)
    config = resolved.config
    if config.launcher.kind not in ("auto", "ray"):
        raise ValueError(f"launcher.kind = {config.launcher.kind}: a detached model lives on a Ray cluster; use ray")
    if config.launcher.attach is not None:
        raise ValueError(f"launcher.attach = {config.launcher.attach}: `shoal up` starts a model; leave it out")
    assert config.model.path is not None, "the command needs a model"
    model_dir = resolve_model_path(config.model.path, config.model.revision)
    spec, _ = load_spec(model_dir)
    # a layout the model cannot have is refused before anything is started
    shard_model(spec, config.parallel, config.model.quantization)
    launch = secrets.token_hex(8)
    order = DetachedOrder(name=name, launch=launch, config=config, model_path=portable(config, model_dir))
    asyncio.run(_up(order))
    return 0


async def _up(order: DetachedOrder) -> None:
    launcher = order.config.launcher
    cluster = await asyncio.to_thread(Cluster.connect, launcher.address, launcher.ray_auth, None)
    keep_sigterm()
    try:
        if cluster.find_actor(order.name, order.name) is not None:
            raise ValueError(f"--name {order.name}: a model of this name is up already; choose another, or end it with "
                             f"`shoal down {order.name}`")  # fmt: skip
        actor = cluster.start_actor(
            DetachedController,
            (msgspec.msgpack.encode(order),),
            title=f"the controller of {order.name}",
            name=order.name,
            restarts=-1,
        )
        try:
            door = await _until_ready(actor, launcher.start_timeout_s)
            print(await actor.call("report"), file=sys.stderr)
        except BaseException:
            try:
                with contextlib.suppress(EngineError):
                    await actor.call("down", 0.0, timeout_s=END_TIMEOUT_S)  # its journal goes, too
            finally:  # another Ctrl-C included
                actor.kill()
                end_crews(cluster, order.name)
            raise
        print(f"{order.name} is up and takes front ends at {door.address}")
    finally:
        await asyncio.to_thread(cluster.close)


async def _until_ready(actor: Actor, timeout_s: float) -> Door:
    line, deadline = StartLine(), time.monotonic() + timeout_s
    try:
        while True:
            try:
                door = await ask_door(actor)
            except EngineError:
                if time.monotonic() >= deadline:
                    raise
                await asyncio.sleep(POLL_S)
                continue
            if isinstance(door, Door):
                return door
            line(Starting(doing=door.doing))
            if time.monotonic() >= deadline:
                raise EngineError(f"not ready within launcher.start_timeout_s = {timeout_s:g}: {door.doing}")
            await asyncio.sleep(POLL_S)
    finally:
        line.clear()
