"""shoal down NAME: end a detached model, whatever state it is in."""

import argparse
import asyncio
import sys

from shoal.configs.resolved import ResolvedConfig
from shoal.engine.client import EngineError
from shoal.launcher.detached_client import find_detached, joined
from shoal.launcher.ray_places import end_crews

SLACK_S = 90.0


def run(args: argparse.Namespace, resolved: ResolvedConfig) -> int:
    """Drain, then end everything; returns 0. Raises ValueError when there is no such model."""
    asyncio.run(_down(args))
    print(f"{args.name} is down")
    return 0


async def _down(args: argparse.Namespace) -> None:
    async with joined(args) as cluster:
        actor = find_detached(cluster, args.name)
        try:
            unfinished = await actor.call("down", args.drain, timeout_s=args.drain + SLACK_S)
            if unfinished:
                print(f"{len(unfinished)} requests did not finish within {args.drain:g} s", file=sys.stderr)
        except EngineError as error:
            print(f"ended without draining: {error}", file=sys.stderr)
        actor.kill()
        end_crews(cluster, args.name)
