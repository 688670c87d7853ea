"""Mesh: the groups of one rank of a replica, over one backend. Replica rank = pp_rank * tp_size + tp_rank.

    mesh = make_mesh("shm", rank, tp_size, pp_size, segment.path, timeout_s, deterministic=True, native=load_native())
    mesh.tensor.all_reduce(x); mesh.pipeline.send(hidden, mesh.pipeline.rank + 1); mesh.world.barrier(); mesh.close()

A group of one rank is a SingleCommunicator, and a replica of one rank meets nobody.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch.distributed as dist

from shoal.kernels.build import NativeLibrary
from shoal.parallel.communicator import CollectiveError, Communicator, SingleCommunicator
from shoal.parallel.groups import GroupSpec, replica_groups
from shoal.parallel.shm import ShmCommunicator
from shoal.parallel.shm_segment import SegmentError, SharedSegment
from shoal.parallel.staged_comm import StagedCommunicator
from shoal.parallel.torch_comm import TorchCommunicator

GLOO_DEVICE = "GLOO_SOCKET_IFNAME"
SEGMENT_FAILED = "failed: "
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


class Mesh:
    """tensor: the ranks that share this rank's layers; pipeline: one rank of every stage, in stage order, any of which
    may send to any other; world: all ranks of the replica. Made by make_mesh.
    """

    def __init__(
        self,
        rank: int,
        tp_size: int,
        pp_size: int,
        groups: dict[str, Communicator],
        release: Callable[[], None],
        segment: SharedSegment | None = None,
    ) -> None:
        self.rank, self.tp_size, self.pp_size = rank, tp_size, pp_size
        self.tensor, self.pipeline, self.world = groups["tensor"], groups["pipeline"], groups["world"]
        self._release, self._segment = release, segment
        self._closed = False

    def abort(self, reason: str) -> None:
        """Make the other ranks' waits fail at once with this reason, where the backend can (shared memory)."""
        if self._segment is not None and not self._closed:
            self._segment.abort(reason)

    def close(self) -> None:
        """Give back groups, memory and sockets. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for group in (self.tensor, self.pipeline, self.world):
            group.close()
        self._release()


def make_mesh(
    backend_kind: str,
    rank: int,
    tp_size: int,
    pp_size: int,
    rendezvous: "str | dist.Store | None",
    timeout_s: float,
    deterministic: bool = False,
    native: NativeLibrary | None = None,
    device: str = "cpu",
    pinned: bool = False,
) -> Mesh:
    """Meet the other ranks and make the groups. Every rank of the replica calls it with equal arguments but rank.

    backend_kind: "shm" (CPU tensors, one host, needs native), "gloo" (CPU tensors; those of a GPU through host
    memory), "nccl" (GPU tensors; the rank's device is set before). device: where tensors are, "cpu" or "cuda:N".
    rendezvous: a torch Store; "file://PATH" that no earlier group used; "tcp://HOST:PORT" of a TCPStore that somebody
    serves; or for shm a SharedSegment's path. timeout_s: most seconds of any operation. deterministic: sums in rank
    order (shm always does). pinned: this process keeps to cores on which no other rank works at the same time, so that
    it may wait actively. Raises ValueError for arguments that cannot work, CollectiveError when the others do not come.
    """
    groups = replica_groups(tp_size, pp_size)
    size = tp_size * pp_size
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} is not in a replica of tensor {tp_size} x pipeline {pp_size} = {size} ranks")
    if size == 1:
        return Mesh(rank, 1, 1, {group.name: SingleCommunicator(group.name) for group in groups}, lambda: None)
    if rendezvous is None:
        raise ValueError(f"{size} ranks need a rendezvous: a file:// or tcp:// address, a Store, or shared memory")
    if backend_kind == "shm":
        return _shm_mesh(rank, tp_size, pp_size, groups, rendezvous, timeout_s, native, pinned)
    if backend_kind in ("gloo", "nccl"):
        staged = backend_kind == "gloo" and device != "cpu"
        return _torch_mesh(backend_kind, rank, tp_size, pp_size, groups, rendezvous, timeout_s, deterministic, staged)
    raise ValueError(f"no collectives called {backend_kind!r}; use shm, gloo or nccl")


def _choose(
    rank: int, groups: list[GroupSpec], make: Callable[[int, GroupSpec], Communicator]
) -> dict[str, Communicator]:
    """This rank's group of every name."""
    return {
        group.name: make(index, group) if len(group.ranks) > 1 else SingleCommunicator(group.name, rank)
        for index, group in enumerate(groups)
        if rank in group.ranks
    }


def _shm_mesh(
    rank: int,
    tp_size: int,
    pp_size: int,
    groups: list[GroupSpec],
    rendezvous: "str | dist.Store",
    timeout_s: float,
    native: NativeLibrary | None,
    pinned: bool,
) -> Mesh:
    if native is None:
        raise ValueError("shared-memory collectives need the C kernels; install gcc, or use runtime.collectives = gloo")
    size, made = tp_size * pp_size, None
    if isinstance(rendezvous, str) and not rendezvous.startswith(("file://", "tcp://")):
        path = rendezvous
    else:  # the first rank makes the segment and keeps it open until all have attached
        store = _open_store(rendezvous, size, timeout_s)
        if rank == 0:
            try:
                made = SharedSegment.create(size, groups)
            except SegmentError as error:
                store.set("shm", f"{SEGMENT_FAILED}{error}")
                raise CollectiveError(str(error)) from error
            store.set("shm", made.path)
        try:
            path = store.get("shm").decode()
        except RuntimeError as error:
            raise CollectiveError(
                f"rank {rank}: rank 0 made no shared memory within {timeout_s:g} s: {error}"
            ) from error
        if path.startswith(SEGMENT_FAILED):
            raise CollectiveError(f"rank {rank}: rank 0 could not make shared memory: {path[len(SEGMENT_FAILED) :]}")
    try:
        segment = SharedSegment.attach(path, rank, size, groups)
        chosen = _choose(rank, groups, lambda index, _: ShmCommunicator(segment, index, native, timeout_s, pinned))
        try:
            chosen["world"].barrier()
        except CollectiveError:
            segment.close()
            raise
    except SegmentError as error:
        raise CollectiveError(str(error)) from error
    finally:
        if made is not None:
            made.close()
    return Mesh(rank, tp_size, pp_size, chosen, segment.close, segment)


def _torch_mesh(
    backend: str,
    rank: int,
    tp_size: int,
    pp_size: int,
    groups: list[GroupSpec],
    rendezvous: "str | dist.Store",
    timeout_s: float,
    deterministic: bool,
    staged: bool,
) -> Mesh:
    size, timeout = tp_size * pp_size, timedelta(seconds=timeout_s)
    if dist.is_initialized():
        raise ValueError("this process already has a torch.distributed group; close the earlier mesh first")
    store = _open_store(rendezvous, size, timeout_s)
    try:
        with _loopback(_is_local(rendezvous, store)):
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
            made: dict[int, dist.ProcessGroup | None] = {}
            for index, group in enumerate(groups):  # every rank makes every group, in the same order
                if group.name == "world":
                    made[index] = dist.group.WORLD
                elif len(group.ranks) > 1:
                    made[index] = dist.new_group(list(group.ranks), timeout=timeout, backend=backend)
    except RuntimeError as error:
        raise CollectiveError(
            f"rank {rank} of {size} could not meet the others over {backend} within {timeout_s:g} s: {error}"
        ) from error

    def make(index: int, group: GroupSpec) -> Communicator:
        process_group = made[index]
        assert process_group is not None
        made_here = TorchCommunicator(
            group.name,
            process_group,
            group.ranks,
            rank,
            backend=backend,
            timeout_s=timeout_s,
            deterministic=deterministic,
        )
        return StagedCommunicator(made_here) if staged else made_here

    return Mesh(rank, tp_size, pp_size, _choose(rank, groups, make), dist.destroy_process_group)


def _open_store(rendezvous: "str | dist.Store", size: int, timeout_s: float) -> dist.Store:
    """A store of its own within what was given. Raises ValueError for an address of another form."""
    timeout = timedelta(seconds=timeout_s)
    if isinstance(rendezvous, str):
        if rendezvous.startswith("file://"):
            store: dist.Store = dist.FileStore(rendezvous.removeprefix("file://"), size)
        else:
            host, _, port = rendezvous.removeprefix("tcp://").rpartition(":")
            if not (rendezvous.startswith("tcp://") and host and port.isdigit()):
                raise ValueError(f"rendezvous {rendezvous!r} is neither file://PATH nor tcp://HOST:PORT")
            try:
                store = dist.TCPStore(host, int(port), is_master=False, timeout=timeout)
            except RuntimeError as error:
                raise CollectiveError(
                    f"cannot reach the store at {rendezvous} within {timeout_s:g} s: {error}"
                ) from error
    else:
        store = rendezvous
    store.set_timeout(timeout)
    return dist.PrefixStore("shoal", store)


def _is_local(rendezvous: "str | dist.Store", store: dist.Store) -> bool:
    """Whether all ranks are on this host for certain."""
    if isinstance(rendezvous, str):
        return rendezvous.startswith(("file://", *(f"tcp://{host}:" for host in LOCAL_HOSTS)))
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return isinstance(store, dist.FileStore) or (isinstance(store, dist.TCPStore) and store.host in LOCAL_HOSTS)


@contextlib.contextmanager
def _loopback(wanted: bool) -> Iterator[None]:
    """Have gloo listen on the loopback device only. It can be told by this variable alone."""
    if not wanted or GLOO_DEVICE in os.environ:
        yield
        return
    os.environ[GLOO_DEVICE] = "lo"
    try:
        yield
    finally:
        del os.environ[GLOO_DEVICE]
