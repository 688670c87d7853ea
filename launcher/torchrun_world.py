"""The processes torchrun started, and the store through which they tell each other addresses and keys.

World ranks [d * size, (d + 1) * size) are replica d's, size = tensor x pipeline; the first of them is its leader. The
store is torch's, at MASTER_ADDR:MASTER_PORT; as anything there it is open to whoever reaches that port. Every attempt
of torchrun has its own part of it.
"""

import os
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import msgspec

from shoal.configs.host import host_id
from shoal.engine.client import EngineError
from shoal.launcher.bootstrap import Model
from shoal.model.shard import ModelShard
from shoal.parallel.control_connect import address_towards

WATCH_INTERVAL_S = 0.5
STORE_POLL_S = 0.1  # its own wait writes warnings, and cannot be interrupted


class World(msgspec.Struct, frozen=True, kw_only=True):
    """What torchrun tells a process about itself."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    master: str
    attempt: str


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """What a process tells the others. host: equal on processes that can use each other's Unix sockets and memory.
    address: of the interface that reaches the master. config: fingerprint of its settings and model.
    """

    host: str
    address: str
    local_rank: int
    config: str


class RankOrders(msgspec.Struct, frozen=True, kw_only=True):
    """What the ranks of a replica that torchrun started need to join its engine."""

    model: Model
    shards: list[ModelShard]
    threads: int
    address: str
    key: bytes


def read_world(environ: Mapping[str, str]) -> World:
    """From torchrun's variables, which `shoal.configs.checks` has found to be there."""
    return World(
        rank=int(environ["RANK"]),
        size=int(environ["WORLD_SIZE"]),
        local_rank=int(environ["LOCAL_RANK"]),
        local_size=int(environ["LOCAL_WORLD_SIZE"]),
        master=environ["MASTER_ADDR"],
        attempt=environ.get("TORCHELASTIC_RUN_ID", "none") + "/" + environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def watch_parent() -> None:
    """End this process, and so all it started, when its parent (torchrun) is gone, however that ended."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_INTERVAL_S)
        os._exit(1)

    threading.Thread(target=watch, name="shoal-watch-parent", daemon=True).start()


class Store:
    """Typed values under names, shared by the processes of one attempt. All waits are bounded by timeout_s."""

    def __init__(self, world: World, timeout_s: float) -> None:
        """Join. Raises EngineError when the store cannot be reached."""
        from torch.distributed import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        self._timeout_s = timeout_s
        try:
            store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
        except (RuntimeError, ValueError) as error:
            raise EngineError(
                f"world rank {world.rank} cannot reach torchrun's store at {world.master}: {error}"
            ) from error
        self._store = PrefixStore(f"shoal/{world.attempt}", store)

    def put(self, name: str, value: msgspec.Struct) -> None:
        """Set a value, once."""
        self._store.set(name, msgspec.msgpack.encode(value))  # type: ignore[arg-type]  # bytes are kept as bytes

    def take(self, name: str, kind: Any, waiting_for: str) -> Any:
        """The value of a name, waited for. Raises EngineError saying what was waited for."""
        deadline = time.monotonic() + self._timeout_s
        try:
            while not self._store.check([name]):
                if time.monotonic() >= deadline:
                    raise EngineError(f"waited {self._timeout_s:g} s (launcher.start_timeout_s) for {waiting_for}")
                time.sleep(STORE_POLL_S)
            return msgspec.msgpack.decode(self._store.get(name), type=kind)
        except RuntimeError as error:
            if isinstance(error, EngineError):
                raise
            raise EngineError(f"torchrun's store is gone while waiting for {waiting_for}: {error}") from error


def introduce(store: Store, world: World, config_fingerprint: str) -> None:
    """Tell the others about this process."""
    member = Member(
        host=host_id(),
        address=address_towards(world.master),
        local_rank=world.local_rank,
        config=config_fingerprint,
    )
    store.put(f"member/{world.rank}", member)


def members(store: Store, world: World) -> list[Member]:
    """All processes, by world rank. Raises EngineError when one was given other settings than this one."""
    found = [
        store.take(f"member/{rank}", Member, f"world rank {rank} to introduce itself") for rank in range(world.size)
    ]
    for rank, member in enumerate(found):
        if member.config != found[world.rank].config:
            raise EngineError(
                f"world rank {rank} was given other settings or another model than world rank {world.rank}; "
                "start all nodes with the same command"
            )
    return found
