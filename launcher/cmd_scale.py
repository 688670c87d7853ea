"""shoal scale NAME --replicas N: more or fewer replicas of a detached model, losing no request."""

import argparse
import asyncio

from shoal.configs.resolved import ResolvedConfig
from shoal.launcher.detached_client import find_detached, joined

TIMEOUT_S = 3600.0  # the controller keeps launcher.start_timeout_s itself, and says why


def run(args: argparse.Namespace, resolved: ResolvedConfig) -> int:
    """Scale and wait until it is so; returns 0. Raises ValueError when it cannot be, EngineError."""
    asyncio.run(_scale(args))
    print(f"{args.name} has {args.replicas} {'replica' if args.replicas == 1 else 'replicas'}")
    return 0


async def _scale(args: argparse.Namespace) -> None:
    async with joined(args) as cluster:
        why_not = await find_detached(cluster, args.name).call("scale", args.replicas, timeout_s=TIMEOUT_S)
        if why_not:
            raise ValueError(f"{args.name}: {why_not}")
