"""FP8 numbers (e4m3fn, arXiv:2209.05433) made of integer operations, so that one code runs from compute capability 8.0
up and in Triton's interpreter, with the bits that torch's own conversion has.

    value = (-1)^s 2^(e - 7) (1 + m/8), e > 0        (-1)^s 2^-6 m/8, e = 0        largest 448, no infinity

Kernels see FP8 tensors as uint8 (`as_bytes`). quantise divides by a scale (y = q * scale) and saturates at 448;
scales: one given per tensor ("tensor"), or from the largest magnitude of a row ("row") or of GROUP neighbours of a row
("group"), at least SMALLEST so that zeros stay zeros.
"""

import torch
import triton
import triton.language as tl

LARGEST = 448.0
GROUP = 128
SMALLEST = 1e-12

QUANTISE_NONE, QUANTISE_TENSOR, QUANTISE_ROW, QUANTISE_GROUP = 0, 1, 2, 3
QUANTISE_CODES = {None: QUANTISE_NONE, "tensor": QUANTISE_TENSOR, "row": QUANTISE_ROW, "group": QUANTISE_GROUP}


@triton.jit
def to_e4m3(x):
    """float32 -> uint8 of the nearest e4m3 number, ties to even, saturating; NaN becomes NaN (0x7f)."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    # Not tl.minimum: it drops NaN.
    magnitude = tl.abs(x)
    magnitude = tl.where(magnitude > 448.0, 448.0, magnitude)
    normal_bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((normal_bits + 0x7FFFF + ((normal_bits >> 20) & 1)) >> 20) - (120 << 3)
    # Adding 2^14 leaves multiples of 2^-9, the spacing of subnormals, in the lowest bits.
    subnormal = (magnitude + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0.015625, subnormal, normal)
    code = tl.where(x == x, code, 0x7F)
    return (code | sign).to(tl.uint8)


@triton.jit
def from_e4m3(code):
    """uint8 -> float16, exact. NaN codes become 480."""
    wide = code.to(tl.int16)
    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return bits.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def store_quantised(
    q_ptr,
    scale_ptr,
    y,
    row,
    q_stride,
    scale_stride,
    columns,
    size,
    QUANTISE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """Store row `row` of float32 y [BLOCK], zero beyond size, as e4m3; scale_ptr is read (QUANTISE 1) or written."""
    q_row = q_ptr + row.to(tl.int64) * q_stride
    if QUANTISE == 1:
        scale = tl.load(scale_ptr)
        tl.store(q_row + columns, to_e4m3(y / scale), mask=columns < size)
    elif QUANTISE == 2:
        scale = tl.maximum(tl.max(tl.abs(y), axis=0) / 448.0, 1e-12)
        tl.store(scale_ptr + row.to(tl.int64) * scale_stride, scale)
        tl.store(q_row + columns, to_e4m3(y / scale), mask=columns < size)
    else:
        groups = tl.arange(0, BLOCK // GROUP_SIZE)
        grouped = tl.reshape(y, (BLOCK // GROUP_SIZE, GROUP_SIZE))
        scales = tl.maximum(tl.max(tl.abs(grouped), axis=1) / 448.0, 1e-12)
        tl.store(scale_ptr + row.to(tl.int64) * scale_stride + groups, scales, mask=groups * GROUP_SIZE < size)
        scaled = tl.reshape(grouped / scales[:, None], (BLOCK,))
        tl.store(q_row + columns, to_e4m3(scaled), mask=columns < size)


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """The uint8 view of an FP8 tensor, which kernels take."""
    return x.view(torch.uint8)


def empty_quantised(
    shape: tuple[int, int], quantise: str, scale: torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised (q [rows, size] float8_e4m3fn, scales float32). scale: the given one for "tensor" (one number),
    returned as it is; else [rows, 1] for "row", [rows, ceil(size / GROUP)] for "group".
    """
    q = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    if quantise == "tensor":
        assert scale is not None and scale.numel() == 1 and scale.dtype == torch.float32
        return q, scale
    columns = 1 if quantise == "row" else -(-shape[1] // GROUP)
    return q, torch.empty((shape[0], columns), dtype=torch.float32, device=device)
