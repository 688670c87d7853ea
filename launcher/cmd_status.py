"""shoal status NAME: what a detached model is doing, as tables or JSON."""

import argparse
import asyncio
import json
import sys
import time

import msgspec

from shoal.configs.resolved import ResolvedConfig
from shoal.launcher.controller_status import ControllerStatus, ReplicaStatus
from shoal.launcher.detached import STATUS, DetachedStatus
from shoal.launcher.detached_client import find_detached, joined
from shoal.launcher.tables import text_table

REPLICA_COLUMNS = ("replica", "state", "running", "waiting", "KV use", "tokens", "restarts", "ready for")
RANK_COLUMNS = ("replica", "rank", "host", "device", "layers", "doing", "heard")


def run(args: argparse.Namespace, resolved: ResolvedConfig) -> int:
    """Print it; returns 0 when the model serves, 1 when no replica does. Raises ValueError, EngineError."""
    status = asyncio.run(_ask(args))
    if args.json:
        sys.stdout.write(json.dumps(msgspec.to_builtins(status), indent=1) + "\n")
    else:
        sys.stdout.write(describe_status(status) + "\n")
    serves = status.controller is not None and any(replica.ready for replica in status.controller.replicas)
    return 0 if serves else 1


async def _ask(args: argparse.Namespace) -> DetachedStatus:
    async with joined(args) as cluster:
        return STATUS.decode(await find_detached(cluster, args.name).call("status"))


def describe_status(status: DetachedStatus) -> str:
    """The status as text."""
    layout = " x ".join(f"{axis} {size}" for axis, size in zip(("tensor", "pipeline", "data"), status.layout))
    lines = [f"{status.name}: {status.model}, {layout}; controller on {status.host}, pid {status.pid}: {status.state}"]
    controller = status.controller
    if controller is None:
        return lines[0]
    lines += [_totals(controller), ""]
    lines += [text_table(REPLICA_COLUMNS, [_replica_row(replica) for replica in controller.replicas]), ""]
    lines.append(text_table(RANK_COLUMNS, [row for replica in controller.replicas for row in _rank_rows(replica)]))
    for replica in controller.replicas:
        for failure in replica.failures:
            ago = time.time() - failure.moment
            lines.append(f"replica {replica.number}, life {failure.life}, {ago:.0f} s ago: {failure.cause}")
    return "\n".join(lines)


def _totals(controller: ControllerStatus) -> str:
    draining = "; draining" if controller.draining else ""
    return (
        f"requests: {controller.live_requests} under way ({controller.waiting} wait for a replica), "
        f"{controller.accepted} accepted, {controller.refused} refused, {controller.resumed} resumed, "
        f"{controller.lost} lost; {controller.tokens} tokens, {controller.tokens_per_s:.1f} tokens/s; up "
        f"{controller.uptime_s:.0f} s{draining}"
    )


def _replica_row(replica: ReplicaStatus) -> tuple[str, ...]:
    stats = replica.stats
    running, waiting, use, tokens = "-", "-", "-", "-"
    if stats is not None:
        running, waiting, tokens = str(stats.num_running), str(stats.num_waiting), str(stats.generated_tokens)
        use = ", ".join(
            f"{100 * used / total:.0f}%"
            for used, total in zip(stats.referenced_blocks, stats.total_blocks, strict=True)
            if total
        )
    since = "-" if replica.ready_for_s is None else f"{replica.ready_for_s:.0f} s"
    return str(replica.number), replica.state, running, waiting, use, tokens, str(replica.restarts), since


def _rank_rows(replica: ReplicaStatus) -> list[tuple[str, ...]]:
    health = {entry.rank: entry for entry in replica.health}
    rows: list[tuple[str, ...]] = []
    for place in replica.ranks:
        said = health.get(place.rank)
        layers = f"{place.layers[0]}-{place.layers[1] - 1}"
        doing = "-" if said is None else f"{said.doing} since {said.for_s:.1f} s"
        heard = "-" if said is None else f"{said.heard_s:.1f} s ago"
        rows.append((str(replica.number), str(place.rank), place.host, place.device, layers, doing, heard))
    return rows
