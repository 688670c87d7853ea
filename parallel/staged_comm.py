"""StagedCommunicator: collectives of GPU tensors through host memory, over any communicator of CPU tensors.

For ranks that share a GPU, which NCCL refuses, and for hosts without NCCL. Every operation copies to the host, which
waits for the device, and back. What the inner communicator guarantees (order of sums, checks, deadlines) holds here.
"""

from collections.abc import Sequence

import torch

from shoal.parallel.communicator import Communicator


class StagedCommunicator(Communicator):
    """inner: of CPU tensors, with the group's name, ranks and size; closed with this one."""

    def __init__(self, inner: Communicator) -> None:
        self.inner = inner
        self.name, self.rank, self.size, self.global_ranks = inner.name, inner.rank, inner.size, inner.global_ranks

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum in place, as inner sums."""
        return tensor.copy_(self.inner.all_reduce(tensor.cpu()))

    def all_gather(self, tensor: torch.Tensor, sizes: Sequence[int], dim: int = -1) -> torch.Tensor:
        """Concatenate along dim into a new tensor on the tensor's device."""
        return self.inner.all_gather(tensor.cpu(), sizes, dim).to(tensor.device)

    def broadcast(self, tensor: torch.Tensor, root: int) -> torch.Tensor:
        """Copy rank root's tensor into everyone's, in place."""
        return tensor.copy_(self.inner.broadcast(tensor.cpu(), root))

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Send a copy."""
        self.inner.send(tensor.cpu(), to)

    def recv(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Fill tensor with the next one sent by `source`."""
        return tensor.copy_(self.inner.recv(torch.empty(tensor.shape, dtype=tensor.dtype), source))

    def barrier(self) -> None:
        """Wait for every rank, and for the work queued on this rank's device."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.inner.barrier()

    def close(self) -> None:
        """Close inner."""
        self.inner.close()
