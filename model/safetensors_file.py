"""Reader of one .safetensors file: the header checked to the last byte before any data is read, and ranges read
straight into memory.

Format (https://github.com/huggingface/safetensors): 8 bytes little-endian header size N, N bytes of JSON
{name: {dtype, shape, data_offsets: [begin, end]}, "__metadata__": {str: str}}, then the tensors' bytes without holes.
Data is read with
pread, not mapped: a file that shrinks under us is an error and not a SIGBUS, and only what is asked for is touched. No
torch.
"""

import json
import os
from math import prod
from pathlib import Path
from typing import Any

import msgspec

MAX_HEADER_BYTES = 100_000_000
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: the text names the file, the tensor when there is one, and what to do."""


class TensorInfo(msgspec.Struct, frozen=True):
    """One tensor of a file. dtype: the format's own name (F32, BF16, ...); begin, end: byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def itemsize(self) -> int:
        """Bytes per element (1 for types of less than a byte)."""
        return max(1, DTYPE_BITS[self.dtype] // 8)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """object_pairs_hook that refuses a key given twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return result


def parse_entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """One entry of the header, checked by itself. Raises CheckpointError."""
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{where}: its header entry must hold exactly dtype, shape and data_offsets, got {entry!r:.200}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r}; known are {', '.join(DTYPE_BITS)}")
    for field, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or not all(type(size) is int and size >= 0 for size in value):
            raise CheckpointError(f"{where}: {field} must be a list of non-negative integers, got {value!r:.200}")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets must be [begin, end] with begin <= end, got {offsets}")
    bits = prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where}: shape {shape} of {dtype} needs {(bits + 7) // 8} bytes, "
            f"data_offsets {offsets} hold {offsets[1] - offsets[0]}"
        )
    return TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


class SafetensorsFile:
    """An open file. `tensors`: name -> TensorInfo; `bytes_read`: every byte requested from it so far, the header
    included.

    Opening reads and checks the header only. Raises CheckpointError for anything the format forbids, OSError when it
    cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.size = os.fstat(self.fd).st_size
            self.tensors = self.read_header()
        except BaseException:
            self.close()
            raise

    def read_header(self) -> dict[str, TensorInfo]:
        """Parse and check the header."""
        if self.size < 8:
            raise CheckpointError(
                f"{self.path}: {self.size} bytes are too few for a safetensors file; it is truncated or not one"
            )
        length = int.from_bytes(self.read_bytes(0, 8), "little")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{self.path}: header of {length} bytes exceeds the limit of {MAX_HEADER_BYTES}; "
                "this is not a safetensors file"
            )
        if length < 2 or 8 + length > self.size:
            raise CheckpointError(
                f"{self.path}: header of {length} bytes does not fit the file's {self.size}; it is truncated"
            )
        try:
            header = json.loads(self.read_bytes(8, length).decode(), object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: the header is not valid JSON: {error}") from None
        if not isinstance(header, dict):
            raise CheckpointError(f"{self.path}: the header must be a JSON object, got {header!r:.80}")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise CheckpointError(f"{self.path}: __metadata__ must map strings to strings")
        tensors = {name: parse_entry(self.path, name, entry, 8 + length) for name, entry in header.items()}
        self.check_extents(tensors, 8 + length)
        return tensors

    def check_extents(self, tensors: dict[str, TensorInfo], data_start: int) -> None:
        """Tensors must follow each other without hole or overlap and end where the file ends."""
        end = data_start
        for info in sorted(tensors.values(), key=lambda info: (info.begin, info.end)):
            if info.begin != end:
                kind = (
                    "overlaps the tensor before it"
                    if info.begin < end
                    else f"leaves a hole of {info.begin - end} bytes before it"
                )
                raise CheckpointError(f"{self.path}: tensor {info.name!r} {kind}")
            end = info.end
            if end > self.size:
                raise CheckpointError(
                    f"{self.path}: tensor {info.name!r} ends at byte {end}, the file has {self.size}: it is "
                    f"truncated; download it again"
                )
        if end != self.size:
            raise CheckpointError(f"{self.path}: {self.size - end} bytes follow the last tensor; the file is corrupt")

    def read_bytes(self, offset: int, size: int) -> bytes:
        """`size` bytes at `offset` of the file."""
        buffer = bytearray(size)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_into(self, out: memoryview, offset: int) -> None:
        """Fill `out` (bytes) with the file's bytes from `offset` on. Raises CheckpointError when the file ends
        before.
        """
        done, size = 0, len(out)
        while done < size:
            count = os.preadv(self.fd, [out[done:]], offset + done)
            if count <= 0:
                raise CheckpointError(
                    f"{self.path}: ends at byte {offset + done}, {offset + size} were expected; "
                    "it shrank while it was read"
                )
            done += count
        self.bytes_read += size

    def will_need(self, begin: int, end: int) -> None:
        """Tell the kernel that this range will be read in many small pieces, by this rank or its neighbours on the
        host.
        """
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, begin, end - begin, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
