"""The processes torchrun started, and the store through which they tell each other addresses and keys.

World ranks [d * size, (d + 1) * size) are replica d's, size = tensor x pipeline; the first of them is its leader. The
store is torch's, at MASTER_ADDR:MASTER_PORT; as anything there it is open to whoever reaches that port. Every attempt
of torchrun has its own part of it, so that it finds nothing of the one before.
"""

import os
import secrets
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
BEGINNING = "world rank 0 to begin"
STORE_POLL_S = 0.1  # its own wait writes warnings, and cannot be interrupted


class World(msgspec.Struct, frozen=True, kw_only=True):
    """What torchrun tells a process about itself."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    master: str
    run: str


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
        run=environ.get("TORCHELASTIC_RUN_ID", "none"),
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

        self._deadline, self._timeout_s = time.monotonic() + timeout_s, timeout_s
        try:
            store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
        except (RuntimeError, ValueError) as error:
            raise EngineError(
                f"world rank {world.rank} cannot reach torchrun's store at {world.master}: {error}"
            ) from error
        self._store = PrefixStore(f"shoal/{world.run}", store)
        self._store = PrefixStore(self._agree(world), self._store)

    def _agree(self, world: World) -> str:
        """A name of this attempt, known to all its processes and to none of another. torchrun's count of restarts will
        not do: each host counts for itself. World rank 0 makes a name; who has told it a number of its own under that
        name, and is told it back, is in the same attempt.
        """
        mine, name = secrets.token_hex(8), ""
        if world.rank == 0:
            self._store.set("attempt", mine)
            met = [
                self._take(f"{mine}/{rank}", f"world rank {rank} to introduce itself") for rank in range(1, world.size)
            ]
            self._store.set(f"{mine}/met", b" ".join(met))  # type: ignore[arg-type]
            return mine
        while mine.encode() not in (self._read(f"{name}/met", BEGINNING) or b"").split():
            self._wait(BEGINNING)
            if (now := (self._read("attempt", BEGINNING) or b"").decode()) != name:
                name = now
                self._store.set(f"{name}/{world.rank}", mine)
        return name

    def put(self, name: str, value: msgspec.Struct) -> None:
        """Set a value, once."""
        self._store.set(name, msgspec.msgpack.encode(value))  # type: ignore[arg-type]  # bytes are kept as bytes

    def take(self, name: str, kind: Any, waiting_for: str) -> Any:
        """The value of a name, waited for. Raises EngineError saying what was waited for."""
        self._deadline = time.monotonic() + self._timeout_s
        return msgspec.msgpack.decode(self._take(name, waiting_for), type=kind)

    def _take(self, name: str, waiting_for: str) -> bytes:
        while (value := self._read(name, waiting_for)) is None:
            self._wait(waiting_for)
        return value

    def _read(self, name: str, waiting_for: str) -> bytes | None:
        """The value of a name, None when there is none yet. Raises EngineError."""
        try:
            return bytes(self._store.get(name)) if self._store.check([name]) else None
        except RuntimeError as error:
            raise EngineError(f"torchrun's store is gone while waiting for {waiting_for}: {error}") from error

    def _wait(self, waiting_for: str) -> None:
        """A moment. Raises EngineError past the deadline."""
        if time.monotonic() >= self._deadline:
            raise EngineError(f"waited {self._timeout_s:g} s (launcher.start_timeout_s) for {waiting_for}")
        time.sleep(STORE_POLL_S)


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
