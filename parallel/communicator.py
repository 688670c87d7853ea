"""Communicator: the one way ranks exchange tensors. Groups come in as arguments, never from a global; size 1 issues
no collective.

Implemented over shared memory (parallel/shm.py: CPU tensors, one host, C), torch.distributed (parallel/torch_comm.py:
gloo, NCCL) and for one rank (SingleCommunicator below). Every implementation checks contiguity, shape and dtype
agreement and a deadline, and every error names group, rank, operation and peer.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from shoal.kernels.native_ranks import NativeGroup


class CollectiveError(RuntimeError):
    """A collective could not complete: the text names group, rank, operation and what was waited for."""


class Communicator(ABC):
    """One group of ranks. name: "tensor", "pipeline", ... ; rank and size are within the group; global_ranks: replica
    ranks in order.
    """

    name: str
    rank: int
    size: int
    global_ranks: tuple[int, ...]

    @abstractmethod
    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum in place over the group, in float32 and in rank order where the backend allows, and return the tensor.

        tensor: contiguous, same shape and dtype on every rank. Bit-identical on all ranks.
        """

    @abstractmethod
    def all_gather(self, tensor: torch.Tensor, sizes: Sequence[int], dim: int = -1) -> torch.Tensor:
        """Concatenate along dim; sizes[r] is rank r's extent there (they may differ), equal to its tensor's."""

    @abstractmethod
    def broadcast(self, tensor: torch.Tensor, root: int) -> torch.Tensor:
        """Copy rank root's tensor into everyone's, in place."""

    @abstractmethod
    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Hand a contiguous tensor to a rank of the group; returns once the tensor may be overwritten (buffered: does
        not wait for the
        receiver unless the channel's bounded buffer is full)."""

    @abstractmethod
    def recv(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Fill tensor with the next one sent by `source`; shapes and dtypes must agree."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait for every rank."""

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold its collectives."""
        return False

    def wait(self, done: torch.cuda.Event) -> None:
        """Wait for what a device does, with collectives of this group in it. Raises CollectiveError when that takes too
        long.
        """
        done.synchronize()

    def native(self) -> NativeGroup | None:
        """The group for kernels that sum over it from within C; None where the backend is not C."""
        return None

    def in_c(self) -> tuple[int, str]:
        """How many operations C has begun, those from within kernels included, and which one it is in, "" for none. Any
        thread may ask.
        """
        return 0, ""

    @abstractmethod
    def close(self) -> None:
        """Give back memory, files and sockets. Idempotent."""


class SingleCommunicator(Communicator):
    """A group of one rank: every collective is the identity."""

    def __init__(self, name: str, global_rank: int = 0) -> None:
        self.name, self.rank, self.size, self.global_ranks = name, 0, 1, (global_rank,)

    @property
    def capturable(self) -> bool:
        """There are none."""
        return True

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor."""
        return tensor

    def all_gather(self, tensor: torch.Tensor, sizes: Sequence[int], dim: int = -1) -> torch.Tensor:
        """Return the tensor."""
        return tensor

    def broadcast(self, tensor: torch.Tensor, root: int) -> torch.Tensor:
        """Return the tensor."""
        return tensor

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """There is nobody to send to."""
        raise CollectiveError(f"group {self.name} has one rank: nothing to send to rank {to}")

    def recv(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """There is nobody to receive from."""
        raise CollectiveError(f"group {self.name} has one rank: nothing to receive from rank {source}")

    def barrier(self) -> None:
        """Nobody to wait for."""

    def close(self) -> None:
        """Nothing to give back."""
