"""ShmCommunicator: collectives of CPU tensors between the ranks of one host, over a shared-memory segment, in C.

Sums are made in rank order, halves in float32, so every rank holds the same bits whatever the message's size.
Operations are checked: ranks that mean different things (operation, number, dtype, shape) all get a CollectiveError
that names who meant what; a rank that does not come within timeout_s, or has ended, is named together with what it
was last doing. After an error the group cannot be used any more. Cost: one crossing into C and one synchronisation
for up to 32 KiB. Waiting spins briefly, then sleeps.
"""

import ctypes
import math
import os
import struct
from collections.abc import Sequence

import torch

from shoal.kernels.build import NativeLibrary
from shoal.kernels.native_ranks import NativeGroup
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
from shoal.parallel.shm_segment import MAX_RANKS, MEMBER_BYTES, MEMBERS_AT, SharedSegment

TIMEOUT, DEAD, ABORTED, MISMATCH = 1, 2, 3, 4
SPINS = 2000  # at most: about 100 us of pause instructions; adapted to whether it helps

_handle, _long, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Group(ctypes.Structure):
    """Mirror of shoal_group in kernels/native/shm.h."""

    _fields_ = (
        ("segment", _handle),
        ("base", _handle),
        ("slot_bytes", _long),
        ("ring_bytes", _long),
        ("timeout_s", ctypes.c_double),
        ("deadline_s", ctypes.c_double),
        ("fd", _int),
        ("rank", _int),
        ("size", _int),
        ("index", _int),
        ("most_spins", _int),
        ("spin", _int),
        ("ranks", _int * MAX_RANKS),
        ("syncs", ctypes.c_uint32),
        ("ops", ctypes.c_uint32),
        ("chunks", ctypes.c_uint32),
        ("waits", ctypes.c_uint32),
        ("sent", ctypes.c_uint32 * MAX_RANKS),
        ("received", ctypes.c_uint32 * MAX_RANKS),
        ("missing", ctypes.c_uint64),
        ("dead", ctypes.c_uint64),
        ("theirs", ctypes.c_char * HEADER.size),
    )


class ShmCommunicator(Communicator):
    """One group over a segment. group_index: its place in segment.groups. The segment stays open for its other groups.

    segment: attached by this rank, which must be in the group. pinned: see make_mesh. Made by every member; nothing is
    exchanged yet.
    """

    def __init__(
        self, segment: SharedSegment, group_index: int, native: NativeLibrary, timeout_s: float, pinned: bool = False
    ) -> None:
        spec, layout = segment.groups[group_index], segment.layouts[group_index]
        self.name, self.global_ranks, self.size = spec.name, spec.ranks, len(spec.ranks)
        self.rank, self.timeout_s = spec.ranks.index(segment.writer), timeout_s
        self._segment = segment
        self._broken: str | None = None
        crowded = not pinned and segment.world_size > len(os.sched_getaffinity(0))
        self._group = _Group(
            segment=segment.address,
            base=segment.address + layout.offset,
            slot_bytes=layout.slot_bytes,
            ring_bytes=layout.ring_bytes,
            timeout_s=timeout_s,
            fd=segment.fd,
            rank=self.rank,
            size=self.size,
            index=group_index,
            most_spins=0 if crowded else SPINS,
            ranks=(_int * MAX_RANKS)(*spec.ranks),
        )
        self._at = ctypes.addressof(self._group)
        self._header = bytearray(HEADER.size)
        self._header_at = ctypes.addressof((ctypes.c_char * HEADER.size).from_buffer(self._header))
        assert native.function("shoal_shm_group_bytes", (), _long)() == ctypes.sizeof(_Group)
        head = (_handle, _handle)
        self._all_reduce = native.function("shoal_shm_all_reduce", (*head, _handle), _int)
        self._all_gather = native.function("shoal_shm_all_gather", (*head, _handle, _handle, _long, _handle), _int)
        self._broadcast = native.function("shoal_shm_broadcast", (*head, _handle, _long), _int)
        self._barrier = native.function("shoal_shm_barrier", head, _int)
        self._send = native.function("shoal_shm_send", (*head, _handle, _long, _int), _int)
        self._recv = native.function("shoal_shm_recv", (*head, _handle, _long, _int, ctypes.c_uint32), _int)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum in place in rank order (halves in float32, rounded once). dtype: float32/64, bfloat16, float16,
        int32/64.
        """
        code = self._check(ALL_REDUCE, tensor)
        if code > len(SUMMABLE):
            raise CollectiveError(
                f"{self._where(ALL_REDUCE)}: cannot sum {tensor.dtype}; sum float or int32/int64 tensors"
            )
        pack_header(self._header, ALL_REDUCE, 0, code, 0, tensor.numel(), 0, tensor.shape)
        self._done(ALL_REDUCE, self._all_reduce(self._at, self._header_at, tensor.data_ptr()))
        return tensor

    def all_gather(self, tensor: torch.Tensor, sizes: Sequence[int], dim: int = -1) -> torch.Tensor:
        """Concatenate along dim, in rank order, into a new contiguous tensor. sizes[r]: rank r's extent there."""
        code = self._check(ALL_GATHER, tensor)
        try:
            dim, shape = gathered_shape(tensor.shape, sizes, dim, self.rank, self.size)
        except ValueError as error:
            raise CollectiveError(f"{self._where(ALL_GATHER)}: {error}") from None
        outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :]) * tensor.element_size()
        out = torch.empty(shape, dtype=tensor.dtype)
        rows = (_long * self.size)(*[size * inner for size in sizes])
        pack_header(self._header, ALL_GATHER, 0, code, dim, out.numel(), hash(tuple(sizes)), shape)
        status = self._all_gather(
            self._at, self._header_at, tensor.data_ptr(), out.data_ptr(), outer, ctypes.addressof(rows)
        )
        self._done(ALL_GATHER, status)
        return out

    def broadcast(self, tensor: torch.Tensor, root: int) -> torch.Tensor:
        """Copy rank root's tensor into everyone's, in place."""
        code = self._check(BROADCAST, tensor, root)
        pack_header(self._header, BROADCAST, 0, code, root, tensor.numel(), 0, tensor.shape)
        self._done(BROADCAST, self._broadcast(self._at, self._header_at, tensor.data_ptr(), tensor.nbytes))
        return tensor

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Put a tensor into the ring to rank `to`; waits only while the ring is full.

        A tensor longer than the ring (4 KiB or more; 4 MiB between two stages) waits for its receiver, so ranks that
        all send long tensors in a circle before they receive end in a timeout.
        """
        code = self._check(SEND, tensor, to, other=True)
        pack_header(self._header, SEND, 0, code, self.rank, tensor.numel(), to, tensor.shape)
        self._done(SEND, self._send(self._at, self._header_at, tensor.data_ptr(), tensor.nbytes, to))

    def recv(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Fill tensor with the next one sent by `source`. A message of another shape or dtype is an error here."""
        code = self._check(RECV, tensor, source, other=True)
        pack_header(self._header, SEND, 0, code, source, tensor.numel(), self.rank, tensor.shape)
        status = self._recv(self._at, self._header_at, tensor.data_ptr(), tensor.nbytes, source, RECV)
        self._done(RECV, status)
        return tensor

    def barrier(self) -> None:
        """Wait for every rank."""
        self._check(BARRIER, None)
        pack_header(self._header, BARRIER, 0, 0, 0, 0, 0, ())
        self._done(BARRIER, self._barrier(self._at, self._header_at))

    def native(self) -> NativeGroup | None:
        """The group for kernels that sum over it from within C."""
        return NativeGroup(self._at, self.size, self._sum_header, self._gather_header, self._check_native)

    def _sum_header(self, dtype: torch.dtype, shape: Sequence[int]) -> bytearray:
        """What all_reduce says of such a tensor."""
        assert CODES[dtype] <= len(SUMMABLE), dtype
        header = bytearray(HEADER.size)
        pack_header(header, ALL_REDUCE, 0, CODES[dtype], 0, math.prod(shape), 0, shape)
        return header

    def _gather_header(self, dtype: torch.dtype, shape: Sequence[int]) -> bytearray:
        """What all_gather says when equal tensors make one of this shape along dimension 0."""
        sizes, header = (shape[0] // self.size,) * self.size, bytearray(HEADER.size)
        pack_header(header, ALL_GATHER, 0, CODES[dtype], 0, math.prod(shape), hash(sizes), shape)
        return header

    def _check_native(self, status: int) -> None:
        """Raise CollectiveError for what an operation within kernels has ended with."""
        doing = self._segment.doing(self.global_ranks[self.rank])
        self._done(ALL_REDUCE if doing is None else doing[0], status)

    def in_c(self) -> tuple[int, str]:
        """How many operations of the whole group have begun, and which one this rank is in."""
        doing = self._segment.doing(self.global_ranks[self.rank])
        where = "" if doing is None else f"{OPERATIONS[doing[0]]} of group {self._segment.groups[doing[1]].name}"
        return self._group.ops, where

    def abort(self, reason: str) -> None:
        """Make every operation of every rank of the segment fail with this reason."""
        self._segment.abort(reason)

    def close(self) -> None:
        """Refuse further operations. The segment is closed by whoever attached it."""
        self._broken = self._broken or "the group is closed"

    def _check(self, op: int, tensor: torch.Tensor | None, peer: int = 0, other: bool = False) -> int:
        """Refuse what C could not do safely; returns the dtype's code."""
        if self._broken is not None:
            raise CollectiveError(f"{self._where(op)}: {self._broken}")
        if not 0 <= peer < self.size or (other and peer == self.rank):
            raise CollectiveError(
                f"{self._where(op)}: rank {peer} is not another rank of the {self.size} in this group"
            )
        if tensor is None:
            return 0
        code = CODES.get(tensor.dtype)
        if tensor.is_cpu and code is not None and tensor.is_contiguous() and tensor.dim() <= MAX_DIMS:
            return code
        raise CollectiveError(
            f"{self._where(op)}: needs a contiguous CPU tensor of at most {MAX_DIMS} dimensions, not {tensor.dtype} "
            f"{list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"
        )

    def _done(self, op: int, status: int) -> None:
        if status:
            self._broken = f"unusable after an earlier error ({OPERATIONS[op]})"
            raise CollectiveError(f"{self._where(op)}: {self._reason(op, status)}")

    def _where(self, op: int) -> str:
        place = f"group {self.name}, rank {self.rank} of {self.size} (replica rank {self.global_ranks[self.rank]})"
        return f"{place}: {OPERATIONS[op]}"

    def _reason(self, op: int, status: int) -> str:
        group = self._group
        if status == ABORTED:
            return str(self._segment.abort_reason())
        if status == MISMATCH:
            return self._disagreement(op)
        if status == DEAD:
            return f"{self._peers(group.dead)} has ended; not there: {self._peers(group.missing)}"
        return f"waited {self.timeout_s:g} s (launcher.step_timeout_s); not there: {self._peers(group.missing)}"

    def _disagreement(self, op: int) -> str:
        if op == RECV:
            theirs = ctypes.string_at(self._at + _Group.theirs.offset, HEADER.size)
            sender = struct.unpack_from("<I", self._header, 12)[0]
            mine = describe_header(bytes(self._header))
            return f"rank {self.rank} expected {mine}, rank {sender} sent {describe_header(theirs)}"
        first = self._group.base + MEMBERS_AT + MEMBER_BYTES - HEADER.size * (2 - (self._group.ops & 1))
        return describe_disagreement(
            [ctypes.string_at(first + MEMBER_BYTES * member, HEADER.size) for member in range(self.size)]
        )

    def _peers(self, bits: int) -> str:
        return ", ".join(self._peer(member) for member in range(self.size) if bits >> member & 1) or "nobody"

    def _peer(self, member: int) -> str:
        rank = self.global_ranks[member]
        text = f"rank {member} (replica rank {rank}, "
        if not self._segment.attached(rank):
            return text + "never attached)"
        doing = self._segment.doing(rank)
        if doing is None:
            return text + "not in any operation)"
        op, index, peer, number = doing
        other = f" with rank {peer}" if op in (SEND, RECV) else ""
        return text + f"last in {OPERATIONS[op]} #{number}{other} of group {self._segment.groups[index].name})"
