"""The floats that weights of 8 or 4 bits stand for: for products of many rows, which cuBLAS does faster with floats
than gpu/few_bits.py without.

codes: int32 [columns, words], scales: int64 [columns, spans], in span order (kernels/quantized_format.py); out:
[columns, inner], float32, bfloat16 or float16: code times scale in float32, rounded once, as torch has it.

Must move: codes and scales in, 1.06 or 0.56 bytes a weight, and 2 or 4 out; a slab of them (kernels/span_weight.py)
stays in the second-level cache until the product reads it. A program takes one span of COLUMNS columns.
"""

import torch
import triton
import triton.language as tl

from shoal.kernels.gpu.few_bits import SPAN, numbers

COLUMNS = 32
"""Of a program: 32 weights for each of 128 threads."""


@triton.jit(do_not_specialize=["num_columns"])
def floats_kernel(
    codes_ptr, scales_ptr, out_ptr, num_columns, inner, lead, codes_stride, scales_stride, out_stride,
    BITS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A span of COLUMNS columns."""
    LANES: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = SPAN // LANES
    span = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    held = tl.minimum(columns, num_columns - 1).to(tl.int64)
    word = tl.arange(0, WORDS)
    words = tl.load(codes_ptr + held[:, None] * codes_stride + span * WORDS + word[None, :])
    four = tl.load(scales_ptr + held * scales_stride + span)
    for lane in tl.static_range(LANES):
        scale = ((four >> (16 * (lane // (LANES // 4)))).to(tl.int32) << 16).to(tl.float32, bitcast=True)
        values = numbers(words, lane, BITS, tl.float32) * scale[:, None]
        k = span * SPAN + lane * WORDS + word - lead
        mask = (columns < num_columns)[:, None] & ((k >= 0) & (k < inner))[None, :]
        at = out_ptr + held[:, None] * out_stride + k[None, :]
        tl.store(at, values.to(out_ptr.dtype.element_ty), mask=mask)


def launch_floats(
    codes: torch.Tensor, fours: torch.Tensor, inner: int, *, bits: int, lead: int, dtype: torch.dtype
) -> torch.Tensor:
    """Returns [columns, inner], new. fours: a span's scales as one number."""
    columns, spans = fours.shape
    out = torch.empty((columns, inner), dtype=dtype, device=codes.device)
    if out.numel():
        floats_kernel[(triton.cdiv(columns, COLUMNS), spans)](
            codes, fours, out, columns, inner, lead, codes.stride(0), fours.stride(0), out.stride(0),
            BITS=bits, COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip
    return out
