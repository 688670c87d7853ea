"""shoal logs NAME: what a detached model's controller, engines and ranks have logged."""

import argparse
import asyncio

from shoal.configs.resolved import ResolvedConfig
from shoal.launcher.detached import LINES
from shoal.launcher.detached_client import find_detached, joined

FOLLOW_INTERVAL_S = 0.5


def run(args: argparse.Namespace, resolved: ResolvedConfig) -> int:
    """Print the last lines, and with --follow those to come. Raises ValueError, EngineError."""
    asyncio.run(_print(args))
    return 0


async def _print(args: argparse.Namespace) -> None:
    async with joined(args) as cluster:
        actor, number = find_detached(cluster, args.name), 0
        while True:
            told = LINES.decode(await actor.call("logs", number))
            for line in told.lines:
                print(line, flush=True)
            number = told.next
            if not args.follow:
                return
            await asyncio.sleep(FOLLOW_INTERVAL_S)
