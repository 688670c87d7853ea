"""Activity: what a rank is at, written by its main thread and read by its heartbeat thread; and the communicators that
write it.

A rank that hangs does so in a collective (somebody does not come) or outside of one. The engine tells the two apart,
and a slow step from a hanging one, by what is written here: `count` grows with every layer and every collective.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

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

    __slots__ = ("count", "doing", "since", "waiting")

    def __init__(self) -> None:
        self.doing, self.since, self.count = "starting", time.monotonic(), 0
        self.waiting: Waiting | None = None

    def begin(self, doing: str) -> None:
        """Something else from now on."""
        self.doing, self.since = doing, time.monotonic()
        self.count += 1

    def tick(self) -> None:
        """A layer is done."""
        self.count += 1

    @contextmanager
    def collective(self, what: str) -> Iterator[None]:
        """While in a collective."""
        self.count += 1
        self.waiting = Waiting(what, time.monotonic())
        try:
            yield
        finally:
            self.waiting = None
            self.count += 1


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
        with self._activity.collective(self._all_reduce):
            return self._inner.all_reduce(tensor)

    def all_gather(self, tensor: torch.Tensor, sizes: Sequence[int], dim: int = -1) -> torch.Tensor:
        """The inner one's."""
        with self._activity.collective(self._all_gather):
            return self._inner.all_gather(tensor, sizes, dim)

    def broadcast(self, tensor: torch.Tensor, root: int) -> torch.Tensor:
        """The inner one's."""
        with self._activity.collective(f"broadcast of group {self.name} from rank {self.global_ranks[root]}"):
            return self._inner.broadcast(tensor, root)

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """The inner one's."""
        with self._activity.collective(f"send in group {self.name} to rank {self.global_ranks[to]}"):
            self._inner.send(tensor, to)

    def recv(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """The inner one's."""
        with self._activity.collective(f"recv in group {self.name} from rank {self.global_ranks[source]}"):
            return self._inner.recv(tensor, source)

    def barrier(self) -> None:
        """The inner one's."""
        with self._activity.collective(self._barrier):
            self._inner.barrier()

    def close(self) -> None:
        """The inner one's."""
        self._inner.close()


def watch_mesh(mesh: Mesh, activity: Activity) -> Mesh:
    """The same mesh, its groups of more than one rank watched."""
    for name in ("tensor", "pipeline", "world"):
        group = getattr(mesh, name)
        if group.size > 1:
            setattr(mesh, name, WatchedCommunicator(group, activity))
    return mesh
