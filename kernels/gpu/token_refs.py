"""Token ids of which some are known to the device alone: id -1 - r stands for the token chosen for row r of the step
before.

Must move: 8 bytes per id in and out, 8 more per reference. One program for all: a step has few rows.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def token_refs_kernel(ids_ptr, chosen_ptr, count, BLOCK: tl.constexpr):
    """In place."""
    at = tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + at, mask=at < count, other=0)
    tokens = tl.load(chosen_ptr + (-1 - ids), mask=(at < count) & (ids < 0), other=0)
    tl.store(ids_ptr + at, tokens, mask=(at < count) & (ids < 0))


def launch_token_refs(ids: torch.Tensor, chosen: torch.Tensor) -> None:
    """Put tokens in place of references. ids: [count] int64; chosen: [rows] int64, of the step before."""
    assert ids.dtype == chosen.dtype == torch.int64 and ids.is_contiguous() and chosen.is_contiguous()
    if len(ids):
        token_refs_kernel[(1,)](ids, chosen, len(ids), BLOCK=triton.next_power_of_2(len(ids)), num_warps=1)
