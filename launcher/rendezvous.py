"""Where the ranks of a replica find each other: made by the engine before they join, given back when they have.

Nothing is left behind, whatever ends the engine: on one host it is anonymous memory, reached through /proc.
"""

import os
from collections.abc import Callable
from datetime import timedelta

import msgspec

from shoal.configs.schema import ShoalConfig
from shoal.parallel.groups import replica_groups
from shoal.parallel.shm_segment import SharedSegment


class Rendezvous(msgspec.Struct):
    """address: what `shoal.parallel.mesh.make_mesh` takes. close: call when every rank has joined, or none will."""

    address: str
    close: Callable[[], None]


def make_rendezvous(config: ShoalConfig, listen_host: str | None) -> Rendezvous:
    """For the collectives of a resolved configuration. listen_host: None when all ranks are on this host.

    Shared memory: the segment itself. One host: an anonymous file that holds torch's store. Several hosts: a store that
    this process serves at listen_host.
    """
    if config.runtime.collectives == "shm":
        size = config.ranks_per_replica
        segment = SharedSegment.create(size, replica_groups(config.parallel.tensor, config.parallel.pipeline))
        return Rendezvous(segment.path, segment.close)
    if listen_host is None:
        fd = os.memfd_create("shoal-rendezvous", os.MFD_CLOEXEC)
        return Rendezvous(f"file:///proc/{os.getpid()}/fd/{fd}", lambda: os.close(fd))
    return _served(listen_host, config.launcher.start_timeout_s)


def _served(host: str, timeout_s: float) -> Rendezvous:
    """A TCP store of this process."""
    from torch.distributed import TCPStore

    store = [TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))]
    return Rendezvous(f"tcp://{host}:{store[0].port}", store.clear)
