"""NativeGroup: what kernels need to add up over tensor ranks from within C. Made by parallel/shm.py, whose collectives
are C; groups of other backends have none, and layers come back to Python between their halves.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from shoal.kernels.native_types import POINTER


class NativeGroup(NamedTuple):
    """A group of ranks as kernels/native/shm.h sees it.

    address: of its struct, valid as long as the group; size: its ranks; sum_header, gather_header: what a rank says of
    itself before an all-reduce of this type and shape, and before an all-gather of equal tensors along dimension 0 into
    this shape; check: raises what a status of C other than 0 stands for.
    """

    address: int
    size: int
    sum_header: Callable[[torch.dtype, Sequence[int]], bytearray]
    gather_header: Callable[[torch.dtype, Sequence[int]], bytearray]
    check: Callable[[int], None]


class NativeRanks(ctypes.Structure):
    """Mirror of Ranks in kernels/native/fused.h. header: what is said before sums; it must live as long."""

    _fields_ = (("group", POINTER), ("sum", POINTER))


def native_ranks(group: NativeGroup, header: bytearray) -> NativeRanks:
    """The struct of a group and a sum's header."""
    return NativeRanks(group.address, buffer_address(header))


def buffer_address(buffer: bytearray) -> int:
    """Where its bytes are; it must not change its length."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
