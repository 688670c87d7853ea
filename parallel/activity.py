"""Activity: what a rank is at, written by its main thread and read by its heartbeat thread; and the communicators that
write it.

A rank that hangs does so in a collective (somebody does not come) or outside of one. The engine tells the two apart,
and a slow step from a hanging one, by what is written here: `count` grows with every layer and every collective.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from shoal.kernels.native_ranks import NativeGroup
from shoal.parallel.communicator import Communicator
from shoal.parallel.mesh import Mesh


class Waiting(NamedTuple):
    """A collective a rank is in. what: "all_reduce of group tensor", with the peer where there is one. since:
    time.monotonic().
    """

    what: str
    since: float


class Activity:
    """One writer, any readers: every field is replaced whole. doing: in words; since: time.monotonic(). count: layers
    and collectives so far. waiting: the collective it is in, None outside.
    """

    __slots__ = ("_seen", "count", "doing", "in_c", "since", "waiting")

    def __init__(self) -> None:
        self.doing, self.since, self.count = "starting", time.monotonic(), 0
        self.waiting: Waiting | None = None
        self.in_c: Communicator | None = None  # the group that kernels sum over from within C
        self._seen = 0, Waiting("", self.since)

    def begin(self, doing: str) -> None:
        """Something else from now on."""
        self.doing, self.since = doing, time.monotonic()
        self.count += 1

    def tick(self) -> None:
        """A layer is done."""
        self.count += 1

    def enter(self, what: str) -> None:
        """In a collective from now on, until `leave`."""
        self.count += 1
        self.waiting = Waiting(what, time.monotonic())

    def leave(self) -> None:
        """Out of it."""
        self.waiting = None
        self.count += 1

    def look(self) -> tuple[int, Waiting | None]:
        """How far it has come, and what it waits in, within kernels too: for one reader, who knows since when C waits
        by having looked before.
        """
        count, waiting = self.count, self.waiting
        if self.in_c is None:
            return count, waiting
        begun, what = self.in_c.in_c()
        if (begun, what) != (self._seen[0], self._seen[1].what):
            self._seen = begun, Waiting(what, time.monotonic())
        return count + begun, waiting or (self._seen[1] if what else None)


class WatchedCommunicator(Communicator):
    """A communicator that says when it is in a collective."""

    def __init__(self, inner: Communicator, activity: Activity) -> None:
        self._inner, self._activity = inner, activity
        self.name, self.rank, self.size, self.global_ranks = inner.name, inner.rank, inner.size, inner.global_ranks
        self._all_reduce, self._all_gather, self._barrier = (
            f"{operation} of group {self.name}" for operation in ("all_reduce", "all_gather", "barrier")
        )

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The inner one's."""
        self._activity.enter(self._all_reduce)
        try:
            return self._inner.all_reduce(tensor)
        finally:
            self._activity.leave()

    def all_gather(self, tensor: torch.Tensor, sizes: Sequence[int], dim: int = -1) -> torch.Tensor:
        """The inner one's."""
        self._activity.enter(self._all_gather)
        try:
            return self._inner.all_gather(tensor, sizes, dim)
        finally:
            self._activity.leave()

    def broadcast(self, tensor: torch.Tensor, root: int) -> torch.Tensor:
        """The inner one's."""
        self._activity.enter(f"broadcast of group {self.name} from rank {self.global_ranks[root]}")
        try:
            return self._inner.broadcast(tensor, root)
        finally:
            self._activity.leave()

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """The inner one's."""
        self._activity.enter(f"send in group {self.name} to rank {self.global_ranks[to]}")
        try:
            self._inner.send(tensor, to)
        finally:
            self._activity.leave()

    def recv(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """The inner one's."""
        self._activity.enter(f"recv in group {self.name} from rank {self.global_ranks[source]}")
        try:
            return self._inner.recv(tensor, source)
        finally:
            self._activity.leave()

    def barrier(self) -> None:
        """The inner one's."""
        self._activity.enter(self._barrier)
        try:
            self._inner.barrier()
        finally:
            self._activity.leave()

    def native(self) -> NativeGroup | None:
        """The inner one's, which the activity is told of."""
        native = self._inner.native()
        if native is not None:
            self._activity.in_c = self._inner
        return native

    def in_c(self) -> tuple[int, str]:
        """The inner one's."""
        return self._inner.in_c()

    def close(self) -> None:
        """The inner one's."""
        self._activity.in_c = None
        self._inner.close()


def watch_mesh(mesh: Mesh, activity: Activity) -> Mesh:
    """The same mesh, its groups of more than one rank watched."""
    for name in ("tensor", "pipeline", "world"):
        group = getattr(mesh, name)
        if group.size > 1:
            setattr(mesh, name, WatchedCommunicator(group, activity))
    return mesh
