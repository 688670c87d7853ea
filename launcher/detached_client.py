"""The commands' side of detached models: join the cluster, find one by name, ask its controller."""

import argparse
import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from shoal.engine.client import EngineError
from shoal.launcher.attached import Door, NotYet
from shoal.launcher.crew_messages import HostRefused
from shoal.launcher.detached import DOOR
from shoal.launcher.ray_cluster import Actor, Cluster, keep_sigterm

ASK_TIMEOUT_S = 10.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def check_name(name: str) -> str:
    """The name of a detached model. Raises ValueError when it cannot be one."""
    if _NAME.fullmatch(name) is None:
        raise ValueError(
            f"{name} cannot be a model's name: it must be 1 to 64 letters, digits, dots, dashes and underscores, the "
            "first a letter or digit"
        )
    return name


@asynccontextmanager
async def joined(args: argparse.Namespace) -> AsyncIterator[Cluster]:
    """The cluster of --ray-address and --ray-auth, left at the end."""
    cluster = await asyncio.to_thread(Cluster.connect, args.ray_address, args.ray_auth, None)
    keep_sigterm()
    try:
        yield cluster
    finally:
        await asyncio.to_thread(cluster.close)


def find_detached(cluster: Cluster, name: str) -> Actor:
    """The controller of a detached model. Raises ValueError naming those that are up."""
    actor = cluster.find_actor(check_name(name), f"the controller of {name}")
    if actor is None:
        others = ", ".join(other for other in cluster.actor_names("") if "/" not in other)
        raise ValueError(f"no model of the name {name} is up on this cluster; up: {others or 'none'}")
    return actor


async def ask_door(actor: Actor) -> Door | NotYet:
    """Where the controller takes front ends. Raises ValueError or EngineError when it could not start, EngineError
    while it is gone.
    """
    answer = DOOR.decode(await actor.call("door", timeout_s=ASK_TIMEOUT_S))
    if isinstance(answer, HostRefused):
        raise (ValueError if answer.users else EngineError)(answer.text)
    return answer
