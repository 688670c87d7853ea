"""Rows of an embedding table of which this rank holds [first, first + num_local): y = w[id - first], zeros elsewhere.

ids: [num_tokens] int64; weight: [num_local, size], adjacent columns; any dtype. Must move: each row read and written
once, no FLOPs. A program copies CHUNK columns of a token.
"""

import torch
import triton
import triton.language as tl

CHUNK = 1024
"""Columns of a program: one 16-byte access for each of 128 threads in 16-bit types."""


@triton.jit
def embedding_kernel(ids_ptr, weight_ptr, out_ptr, first, num_local, size, weight_stride, CHUNK: tl.constexpr):
    """CHUNK columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    row = tl.load(ids_ptr + token) - first
    held = tl.where((row >= 0) & (row < num_local), size, 0)
    values = tl.load(weight_ptr + row * weight_stride + columns, mask=columns < held, other=0.0)
    tl.store(out_ptr + token * size + columns, values, mask=columns < size)


def launch_embedding(ids: torch.Tensor, weight: torch.Tensor, first: int) -> torch.Tensor:
    """ids: [num_tokens] int64, contiguous. Returns [num_tokens, size], new."""
    assert weight.stride(1) == 1 and ids.is_contiguous() and ids.dtype == torch.int64
    num_local, size = weight.shape
    out = torch.empty((ids.shape[0], size), dtype=weight.dtype, device=weight.device)
    if out.numel():
        embedding_kernel[(ids.shape[0], triton.cdiv(size, CHUNK))](
            ids, weight, out, first, num_local, size, weight.stride(0), CHUNK=CHUNK, num_warps=4
        )
    return out
