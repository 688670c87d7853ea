"""Bringing up several replicas at once, and the one client in front of them."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from shoal.engine.client import EngineClient
from shoal.launcher.replica import Progress, ReplicaHandle
from shoal.launcher.replica_messages import Ready
from shoal.launcher.router import Router
from shoal.launcher.settle import Settled
from shoal.launcher.started import StartedEngine


async def start_replicas(
    replicas: Sequence[ReplicaHandle],
    settled: Settled,
    on_progress: Progress | None,
    on_close: Callable[[], Awaitable[None]],
) -> StartedEngine:
    """Start all, wait until all take requests. on_close: called once everything is to end, by the client or a failure.

    Raises ValueError or EngineError, the first cause, after stopping every replica.
    """
    try:
        readies = await _all_ready(replicas, settled.config.launcher.start_timeout_s, on_progress)
    except BaseException:
        await asyncio.gather(*(replica.stop() for replica in replicas), return_exceptions=True)
        await on_close()
        raise
    max_model_len = min(ready.capacity.max_model_len for ready in readies)
    clients: list[EngineClient] = [replica.client for replica in replicas]
    return StartedEngine(
        client=Router(clients, max_model_len, on_close),
        vocab_size=readies[0].capacity.vocab_size,
        max_model_len=max_model_len,
        report="\n".join([*settled.notes, *_tables(readies)]),
    )


async def _all_ready(replicas: Sequence[ReplicaHandle], timeout_s: float, on_progress: Progress | None) -> list[Ready]:
    for replica in replicas:
        await replica.start()
    tasks = [asyncio.ensure_future(replica.ready(timeout_s, on_progress)) for replica in replicas]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _tables(readies: Sequence[Ready]) -> list[str]:
    """The memory table, once when all replicas are alike."""
    if all(ready.report == readies[0].report for ready in readies):
        return ([f"each of {len(readies)} replicas:"] if len(readies) > 1 else []) + [readies[0].report]
    return [f"replica {index}:\n{ready.report}" for index, ready in enumerate(readies)]
