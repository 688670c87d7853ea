"""The shared-memory segment of one replica on one host: made by whoever starts the ranks, attached by each rank. No
torch.

It is an anonymous file (memfd), reached through /proc/PID/fd/N of its maker: it has no name in /dev/shm, does not
count against a container's /dev/shm limit, and is gone with the last process that maps it, so nothing can be left
behind. Its memory is reserved when it is made. Layout: see kernels/native/shm.h.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import mmap
import os
import struct
from collections.abc import Sequence

import msgspec

from shoal.parallel.groups import GroupSpec

MAX_RANKS = 64
MAGIC = b"SHOALSHM"
PAGE = 4096
RECORDS_AT, RECORD_BYTES = 64, 384
TEXT_AT = 16  # within a record
ABORT_AT, HASH_AT = 12, 16  # within the segment
MEMBERS_AT, MEMBER_BYTES, RING_CONTROL = 192, 320, 192  # within a group
SLOT_BYTES = 256 << 10  # most of one rank's slot; two per rank and group
SLOTS_BYTES = 4 << 20  # most of all slots of a tensor group up to 64 ranks, where each keeps at least 32 KiB
SMALL_SLOT_BYTES = 32 << 10  # groups other than "tensor" reduce little
RINGS_BYTES = 1 << 20  # most of all point-to-point rings of a group, where each keeps at least 4 KiB; and
PIPELINE_RINGS_BYTES = 8 << 20  # of a pipeline group, so that a stage can go on before the next has taken its output


class SegmentError(RuntimeError):
    """Shared memory could not be made or attached: the text names what is missing and the way out."""


class GroupLayout(msgspec.Struct, frozen=True):
    """Where one group lies in the segment, in bytes."""

    offset: int
    slot_bytes: int
    ring_bytes: int
    bytes: int


def _power_of_two(value: int, low: int, high: int) -> int:
    return max(low, min(high, 1 << (max(1, value).bit_length() - 1)))


def lay_out(world_size: int, groups: Sequence[GroupSpec]) -> tuple[list[GroupLayout], int]:
    """The place of every group, and the segment's size in bytes. A group of one rank takes no room."""
    offset = _pages(RECORDS_AT + RECORD_BYTES * (world_size + 1))
    layouts = []
    for group in groups:
        size = len(group.ranks)
        pairs = size * (size - 1)
        share = SLOTS_BYTES // (2 * size) if group.name == "tensor" else SMALL_SLOT_BYTES
        slot = _power_of_two(share, SMALL_SLOT_BYTES, SLOT_BYTES)
        rings = PIPELINE_RINGS_BYTES if group.name == "pipeline" else RINGS_BYTES
        ring = _power_of_two(rings // max(1, pairs), PAGE, rings // 2)
        control = _pages(MEMBERS_AT + MEMBER_BYTES * size)
        total = _pages(control + 2 * size * slot + pairs * (RING_CONTROL + ring)) if size > 1 else 0
        layouts.append(GroupLayout(offset, slot, ring, total))
        offset += total
    return layouts, offset


def _pages(count: int) -> int:
    return -(-count // PAGE) * PAGE


def _identity(world_size: int, groups: Sequence[GroupSpec]) -> bytes:
    """What maker and ranks must agree on."""
    layouts, total = lay_out(world_size, groups)
    text = repr((world_size, [(g.name, g.ranks) for g in groups], layouts, total))
    return hashlib.sha256(text.encode()).digest()[:16]


class SharedSegment:
    """A mapped segment. Make one with `create` (the owner) or `attach` (a rank); `close` when done."""

    def __init__(self, fd: int, world_size: int, groups: Sequence[GroupSpec], writer: int) -> None:
        self.fd, self.world_size, self.groups, self.writer = fd, world_size, list(groups), writer
        self.layouts, self.bytes = lay_out(world_size, groups)
        self._map: mmap.mmap | None = mmap.mmap(fd, self.bytes)
        self._view: ctypes.Array[ctypes.c_char] | None = (ctypes.c_char * self.bytes).from_buffer(self._map)
        self.address = ctypes.addressof(self._view)

    @classmethod
    def create(cls, world_size: int, groups: Sequence[GroupSpec]) -> "SharedSegment":
        """Make and reserve the segment. Keep it open until every rank has attached; while open, `abort` reaches all
        ranks.

        Raises SegmentError when memory is short, ValueError when there are more than 64 ranks.
        """
        if world_size > MAX_RANKS:
            raise ValueError(
                f"shared-memory collectives join at most {MAX_RANKS} ranks, not {world_size}; "
                "use runtime.collectives = gloo"
            )
        _, total = lay_out(world_size, groups)
        fd = os.memfd_create("shoal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(fd, 0, total)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            segment = cls(fd, world_size, groups, world_size)
        except OSError as error:
            os.close(fd)
            raise SegmentError(
                f"cannot reserve {total >> 10} KiB of shared memory for {world_size} ranks ({error}); "
                "free memory, or use runtime.collectives = gloo"
            ) from error
        segment._write(0, MAGIC + struct.pack("<II", world_size, 0) + _identity(world_size, groups))
        return segment

    @property
    def path(self) -> str:
        """Where ranks attach, while this process keeps the segment open."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    @classmethod
    def attach(cls, path: str, rank: int, world_size: int, groups: Sequence[GroupSpec]) -> "SharedSegment":
        """Map the segment as `rank` and hold its lock until this process ends or closes. Raises SegmentError."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise SegmentError(
                f"rank {rank} cannot open the shared memory {path} ({error}); its maker must be alive, on this host, "
                "of this user and in this container; else use runtime.collectives = gloo"
            ) from error
        try:
            _, total = lay_out(world_size, groups)
            if os.fstat(fd).st_size != total:
                raise SegmentError(f"rank {rank}: {path} has {os.fstat(fd).st_size} bytes, this layout needs {total}")
            segment = cls(fd, world_size, groups, rank)
        except BaseException:
            os.close(fd)
            raise
        try:
            expected = MAGIC + struct.pack("<I", world_size), _identity(world_size, groups)
            if (segment._read(0, 12), segment._read(HASH_AT, 16)) != expected:
                raise SegmentError(f"rank {rank}: {path} was made for another layout or version")
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, rank, 1, 0))
        except OSError as error:
            segment.close()
            raise SegmentError(
                f"rank {rank} cannot lock its place in {path} ({error}); is it started twice?"
            ) from error
        except SegmentError:
            segment.close()
            raise
        segment._write(RECORDS_AT + RECORD_BYTES * rank, struct.pack("<I", 1))
        return segment

    def abort(self, reason: str) -> None:
        """Make every waiting and every later operation of every rank fail with this reason, within about 10 ms."""
        if self._map is None or self.abort_reason() is not None:
            return
        text = reason.encode()[: RECORD_BYTES - TEXT_AT - 1].decode(errors="ignore").encode() + b"\0"
        self._write(RECORDS_AT + RECORD_BYTES * self.writer + TEXT_AT, text)
        self._write(ABORT_AT, struct.pack("<I", self.writer + 1))

    def abort_reason(self) -> str | None:
        """Who aborted and why; None when nobody has."""
        writer = struct.unpack("<I", self._read(ABORT_AT, 4))[0] - 1
        if writer < 0:
            return None
        text = self._read(RECORDS_AT + RECORD_BYTES * writer + TEXT_AT, RECORD_BYTES - TEXT_AT)
        who = "the launcher" if writer == self.world_size else f"replica rank {writer}"
        return f"aborted by {who}: {text.split(bytes(1))[0].decode(errors='replace')}"

    def doing(self, rank: int) -> tuple[int, int, int, int] | None:
        """The last operation of a rank that it has not completed: (operation code, group index, peer, number)."""
        word = struct.unpack("<Q", self._read(RECORDS_AT + RECORD_BYTES * rank + 8, 8))[0]
        return (word >> 56, word >> 40 & 0xFFFF, word >> 32 & 0xFF, word & 0xFFFFFFFF) if word else None

    def attached(self, rank: int) -> bool:
        """Whether a rank has ever attached."""
        return self._read(RECORDS_AT + RECORD_BYTES * rank, 4) != bytes(4)

    def _read(self, offset: int, count: int) -> bytes:
        assert self._map is not None, "the segment is closed"
        return self._map[offset : offset + count]

    def _write(self, offset: int, data: bytes) -> None:
        assert self._map is not None, "the segment is closed"
        self._map[offset : offset + len(data)] = data

    def close(self) -> None:
        """Unmap and close; the memory is given back with the last process that does. Idempotent."""
        if self._map is None:
            return
        self._view = None
        with contextlib.suppress(BufferError):
            self._map.close()
        self._map = None
        os.close(self.fd)
