"""TorchCommunicator: collectives over a torch.distributed process group, gloo for CPU tensors and NCCL for GPUs.

gloo is guarded against what it does silently or fatally wrong: it sums or copies the wrong elements of non-contiguous
tensors (refused here), ends the process when sizes differ (ranks first exchange a 128-byte header, directly between
every two, which names who meant what and which rank is missing, and makes a small operation take 2 to 4 times as
long), and sums in an order that depends on the message (halves, and everything with `deterministic`, are gathered and
summed here, in float32 and in rank order). NCCL does no such exchange; its sums are its own unless `deterministic`,
which gathers too. After an error the group cannot be used any more.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from shoal.parallel.agreement import (
    ALL_GATHER,
    ALL_REDUCE,
    BARRIER,
    BROADCAST,
    CODES,
    HEADER,
    MAX_DIMS,
    OPERATIONS,
    RECV,
    SEND,
    SUMMABLE,
    describe_disagreement,
    describe_header,
    gathered_shape,
    pack_header,
)
from shoal.parallel.communicator import CollectiveError, Communicator

MAX_PENDING_SENDS = 16  # messages, and
MAX_PENDING_BYTES = 256 << 20  # bytes copied and not yet taken by their receivers; beyond, send waits
LOOK_S = 20e-6  # between looks at a device
AGREE_TAG, HEADER_TAG, DATA_TAG = 1, 2, 3
HALVES = (torch.bfloat16, torch.float16)

logger = logging.getLogger("shoal.parallel")


class TorchCommunicator(Communicator):
    """One group. process_group: of torch.distributed, whose ranks are global_ranks in this order, with its own timeout.

    backend: "gloo" or "nccl". deterministic: sums in rank order, in float32, whatever the message's size.
    """

    def __init__(
        self,
        name: str,
        process_group: dist.ProcessGroup,
        global_ranks: Sequence[int],
        global_rank: int,
        *,
        backend: str,
        timeout_s: float,
        deterministic: bool,
    ) -> None:
        self.name, self.global_ranks, self.size = name, tuple(global_ranks), len(global_ranks)
        self.rank = self.global_ranks.index(global_rank)
        self.backend, self.timeout_s, self.deterministic = backend, timeout_s, deterministic
        self._group = process_group
        self._checked = backend == "gloo"
        self._number = 0
        self._sent, self._received = [0] * self.size, [0] * self.size
        self._pending: deque[tuple[int, int, list[Any], list[torch.Tensor]]] = deque()
        self._broken: str | None = None

    @property
    def capturable(self) -> bool:
        """NCCL's, which nothing on the host waits for."""
        return self.backend == "nccl"

    def wait(self, done: torch.cuda.Event) -> None:
        """Look again and again: NCCL itself watches no collective that is part of a graph."""
        deadline = time.monotonic() + self.timeout_s
        while not done.query():
            if time.monotonic() > deadline:
                others = [peer for peer in range(self.size) if peer != self.rank]
                raise self._break(ALL_REDUCE, f"{self._peers(others)}: a graph took more than {self.timeout_s:g} s")
            time.sleep(LOOK_S)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum in place. Halves under gloo, and all types when deterministic: in float32, in rank order."""
        self._start(ALL_REDUCE, tensor)
        if tensor.dtype not in SUMMABLE:
            raise CollectiveError(
                f"{self._where(ALL_REDUCE)}: cannot sum {tensor.dtype}; sum float or int32/int64 tensors"
            )
        self._agree(ALL_REDUCE, tensor, 0, 0, tensor.shape)
        ordered = self.deterministic or (self.backend == "gloo" and tensor.dtype in HALVES)
        if ordered and tensor.is_floating_point() and tensor.numel():
            parts = torch.empty((self.size, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
            self._collective(ALL_REDUCE, lambda: self._gather_bytes(parts, tensor))
            total = parts[0].float() if tensor.dtype in HALVES else parts[0].clone()
            for part in parts[1:]:
                total += part
            return tensor.copy_(total)
        if tensor.numel():
            self._collective(ALL_REDUCE, lambda: dist.all_reduce(tensor, group=self._group, async_op=True))
        return tensor

    def all_gather(self, tensor: torch.Tensor, sizes: Sequence[int], dim: int = -1) -> torch.Tensor:
        """Concatenate along dim, in rank order, into a new contiguous tensor; shorter parts travel padded."""
        self._start(ALL_GATHER, tensor)
        try:
            dim, shape = gathered_shape(tensor.shape, sizes, dim, self.rank, self.size)
        except ValueError as error:
            raise CollectiveError(f"{self._where(ALL_GATHER)}: {error}") from None
        self._agree(ALL_GATHER, tensor, dim, hash(tuple(sizes)), shape)
        part = tensor.movedim(dim, 0)
        longest = max(sizes)
        padded = torch.zeros((longest, *part.shape[1:]), dtype=tensor.dtype, device=tensor.device)
        padded[: part.shape[0]] = part
        gathered = torch.empty((self.size, *padded.shape), dtype=tensor.dtype, device=tensor.device)
        if padded.numel():
            self._collective(ALL_GATHER, lambda: self._gather_bytes(gathered, padded))
        return torch.cat([gathered[r, :size].movedim(0, dim) for r, size in enumerate(sizes)], dim).contiguous()

    def broadcast(self, tensor: torch.Tensor, root: int) -> torch.Tensor:
        """Copy rank root's tensor into everyone's, in place."""
        self._start(BROADCAST, tensor, root)
        self._agree(BROADCAST, tensor, root, 0, tensor.shape)
        if tensor.numel():
            source = self.global_ranks[root]
            flat = _bytes_of(tensor)
            self._collective(BROADCAST, lambda: dist.broadcast(flat, source, group=self._group, async_op=True))
        return tensor

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Send a copy; waits only while MAX_PENDING_SENDS messages or MAX_PENDING_BYTES have not been taken."""
        self._start(SEND, tensor, to, other=True)
        self._sent[to] += 1
        parts = [(DATA_TAG, _bytes_of(tensor.clone()))] if tensor.numel() else []
        if self._checked:
            header = self._header(SEND, self._sent[to], tensor, self.rank, to, tensor.shape)
            parts.insert(0, (HEADER_TAG, torch.frombuffer(header, dtype=torch.uint8)))
        deadline = time.monotonic() + self.timeout_s
        while self._pending and (
            len(self._pending) >= MAX_PENDING_SENDS
            or sum(part.nbytes for *_, held in self._pending for part in held) + tensor.nbytes > MAX_PENDING_BYTES
            or all(work.is_completed() for work in self._pending[0][2])
        ):
            self._finish_oldest_send(deadline)
        works = [self._try(SEND, [to], self._isend, part, to, tag) for tag, part in parts]
        self._pending.append((to, self._sent[to], works, [part for _, part in parts]))

    def recv(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Fill tensor with the next one sent by `source`. Under gloo, another shape or dtype is an error here."""
        self._start(RECV, tensor, source, other=True)
        self._received[source] += 1
        deadline = time.monotonic() + self.timeout_s
        if self._checked:
            mine = self._header(SEND, self._received[source], tensor, source, self.rank, tensor.shape)
            theirs = torch.empty(HEADER.size, dtype=torch.uint8)
            work = self._try(RECV, [source], self._irecv, theirs, source, HEADER_TAG)
            self._wait(RECV, [(source, work)], deadline)
            sent = theirs.numpy().tobytes()
            if sent != bytes(mine):
                raise self._break(
                    RECV,
                    f"rank {self.rank} expected {describe_header(mine)}, rank {source} sent {describe_header(sent)}",
                )
        if tensor.numel():
            flat = _bytes_of(tensor)
            work = self._try(RECV, [source], self._irecv, flat, source, DATA_TAG)
            self._wait(RECV, [(source, work)], deadline)
        return tensor

    def barrier(self) -> None:
        """Wait for every rank (on GPUs: for the work queued on every rank's device, too)."""
        self._start(BARRIER, None)
        if self._checked:
            self._agree(BARRIER, None, 0, 0, ())
            return
        token = torch.zeros(1, device="cuda")
        self._collective(BARRIER, lambda: dist.all_reduce(token, group=self._group, async_op=True))
        torch.cuda.synchronize()

    def close(self) -> None:
        """Wait for sent messages to be taken, unless the group is broken. The mesh destroys the process group."""
        if self._broken is None:
            deadline = time.monotonic() + min(self.timeout_s, 5.0)
            try:
                while self._pending:
                    self._finish_oldest_send(deadline)
            except CollectiveError as error:
                logger.warning("closing with messages that nobody took: %s", error)
        self._pending.clear()
        self._broken = self._broken or "the group is closed"

    # ---- checks

    def _start(self, op: int, tensor: torch.Tensor | None, peer: int = 0, other: bool = False) -> None:
        """Refuse what the backend would do wrong."""
        if self._broken is not None:
            raise CollectiveError(f"{self._where(op)}: {self._broken}")
        if not 0 <= peer < self.size or (other and peer == self.rank):
            raise CollectiveError(
                f"{self._where(op)}: rank {peer} is not another rank of the {self.size} in this group"
            )
        kind = "cpu" if self.backend == "gloo" else "cuda"
        if tensor is None or (
            tensor.device.type == kind and tensor.dtype in CODES and tensor.is_contiguous() and tensor.dim() <= MAX_DIMS
        ):
            return
        raise CollectiveError(
            f"{self._where(op)}: needs a contiguous {kind} tensor of at most {MAX_DIMS} dimensions, not {tensor.dtype} "
            f"{list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"
        )

    def _header(
        self, op: int, number: int, tensor: torch.Tensor | None, root: int, extra: int, shape: Sequence[int]
    ) -> bytearray:
        header = bytearray(HEADER.size)
        code, numel = (0, 0) if tensor is None else (CODES[tensor.dtype], tensor.numel())
        pack_header(header, op, number, code, root, numel if op == SEND else 0, extra, shape)
        return header

    def _agree(self, op: int, tensor: torch.Tensor | None, root: int, extra: int, shape: Sequence[int]) -> None:
        """Exchange headers with every rank, directly, so that a missing one can be named. Raises unless all are
        equal.
        """
        if not self._checked:
            return
        self._number += 1
        mine = self._header(op, self._number, tensor, root, extra, shape)
        sent = torch.frombuffer(mine, dtype=torch.uint8)
        headers = torch.empty((self.size, HEADER.size), dtype=torch.uint8)
        headers[self.rank] = sent
        deadline = time.monotonic() + self.timeout_s
        others = [peer for peer in range(self.size) if peer != self.rank]
        receives, sends = [], []
        for peer in others:
            receives.append((peer, self._try(op, [peer], self._irecv, headers[peer], peer, AGREE_TAG)))
        for peer in others:
            sends.append((peer, self._try(op, [peer], self._isend, sent, peer, AGREE_TAG)))
        self._wait(op, receives, deadline)
        self._wait(op, sends, deadline)
        texts = [header.numpy().tobytes() for header in headers]
        if any(text != texts[0] for text in texts):
            raise self._break(op, describe_disagreement(texts))

    # ---- calls into torch.distributed; every failure becomes a CollectiveError

    def _isend(self, flat: torch.Tensor, to: int, tag: int) -> Any:
        return dist.isend(flat, self.global_ranks[to], group=self._group, tag=tag)

    def _irecv(self, flat: torch.Tensor, source: int, tag: int) -> Any:
        return dist.irecv(flat, self.global_ranks[source], group=self._group, tag=tag)

    def _gather_bytes(self, out: torch.Tensor, part: torch.Tensor) -> Any:
        """Rank r's part into out[r]. As bytes: gloo knows few types."""
        rows = list(_bytes_of(out).view(self.size, -1))
        return dist.all_gather(rows, _bytes_of(part), group=self._group, async_op=True)

    def _collective(self, op: int, begin: Callable[[], Any]) -> None:
        others = [peer for peer in range(self.size) if peer != self.rank]
        work = self._try(op, others, begin)
        try:
            work.wait(timedelta(seconds=self.timeout_s)) if self._checked else work.wait()
        except RuntimeError as error:
            raise self._break(op, f"failed within {self.timeout_s:g} s: {_first_line(error)}") from error

    def _finish_oldest_send(self, deadline: float) -> None:
        to, _, works, _ = self._pending.popleft()
        self._wait(SEND, [(to, work) for work in works], deadline)

    def _try(self, op: int, peers: list[int], begin: Callable[..., Any], *args: Any) -> Any:
        try:
            return begin(*args)
        except RuntimeError as error:
            raise self._break(op, f"{self._peers(peers)}: {_first_line(error)}") from error

    def _wait(self, op: int, works: list[tuple[int, Any]], deadline: float) -> None:
        """Wait for all; the error names every peer that failed or did not come."""
        failures: list[str] = []
        for peer, work in works:
            left_s = max(0.01, deadline - time.monotonic()) if not failures else 0.01
            try:
                work.wait(timedelta(seconds=left_s)) if self._checked else work.wait()
            except RuntimeError as error:
                failures.append(f"{self._peers([peer])}: {_first_line(error)}")
        if failures:
            raise self._break(op, f"waited at most {self.timeout_s:g} s; " + "; ".join(failures))

    def _break(self, op: int, text: str) -> CollectiveError:
        self._broken = f"unusable after an earlier error ({OPERATIONS[op]})"
        return CollectiveError(f"{self._where(op)}: {text}")

    def _peers(self, peers: list[int]) -> str:
        return ", ".join(f"rank {peer} (replica rank {self.global_ranks[peer]})" for peer in peers)

    def _where(self, op: int) -> str:
        place = f"group {self.name}, rank {self.rank} of {self.size} (replica rank {self.global_ranks[self.rank]})"
        return f"{place}: {OPERATIONS[op]} over {self.backend}"


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor that is not empty."""
    return tensor.view(-1).view(torch.uint8)


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().split("\n")[0]
