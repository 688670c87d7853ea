"""What a rank says before it exchanges tensors, so that ranks that mean different things find out.

Operation codes, type codes, and the 128-byte header that is compared byte for byte (the same in kernels/native/shm.h).
"""

import struct
from collections.abc import Sequence

import torch

ALL_REDUCE, ALL_GATHER, BROADCAST, BARRIER, SEND, RECV = range(1, 7)
OPERATIONS = ("", "all_reduce", "all_gather", "broadcast", "barrier", "send", "recv")
DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
CODES = {dtype: code for code, dtype in enumerate(DTYPES, 1)}
SUMMABLE = DTYPES[:6]
MAX_DIMS = 12
HEADER = struct.Struct("<4I2q12q")  # operation, number, dtype, root; numel, extra; shape, padded with -1
_PADDING = [(-1,) * (MAX_DIMS - dims) for dims in range(MAX_DIMS + 1)]


def pack_header(
    buffer: bytearray | memoryview,
    op: int,
    number: int,
    code: int,
    root: int,
    numel: int,
    extra: int,
    shape: Sequence[int],
) -> None:
    """Write a header. root: the root, dimension or sender; extra: hash of sizes, or receiver."""
    HEADER.pack_into(buffer, 0, op, number, code, root, numel, extra, *shape, *_PADDING[len(shape)])


def describe_header(header: bytes | bytearray) -> str:
    """A header in words."""
    op, number, code, root, _, extra, *shape = HEADER.unpack(header)
    name = OPERATIONS[op] if op < len(OPERATIONS) else f"operation {op}"
    if not 0 < code <= len(DTYPES):
        return f"{name} #{number}"
    detail = {
        ALL_GATHER: f" along dim {root} (sizes #{extra & 0xFFFF:04x})",
        BROADCAST: f" from rank {root}",
        SEND: f" from rank {root} to rank {extra}",
    }.get(op, "")
    dtype = str(DTYPES[code - 1]).removeprefix("torch.")
    return f"{name} #{number} {dtype}{[extent for extent in shape if extent >= 0]}{detail}"


def describe_disagreement(headers: Sequence[bytes | bytearray]) -> str:
    """What each rank of a group meant, in rank order."""
    texts = [f"rank {rank}: {describe_header(header)}" for rank, header in enumerate(headers)]
    return "the ranks do not agree: " + "; ".join(texts)


def gathered_shape(
    shape: Sequence[int], sizes: Sequence[int], dim: int, rank: int, group_size: int
) -> tuple[int, list[int]]:
    """The dimension counted from the front, and the shape of an all-gather's result. Raises ValueError on nonsense."""
    dims = len(shape)
    if not -dims <= dim < dims:
        raise ValueError(f"a tensor of shape {list(shape)} has no dim {dim} to gather along")
    dim %= dims
    if len(sizes) != group_size or shape[dim] != sizes[rank]:
        raise ValueError(
            f"a tensor of shape {list(shape)} does not fit sizes {list(sizes)} of {group_size} ranks along dim {dim}"
        )
    return dim, [*shape[:dim], sum(sizes), *shape[dim + 1 :]]
