"""The limits that min-p, top-k and top-p set to a row's logits (logit_filters.py): a token is kept when x / temperature
is above limit, or equal to it and its id <= last_id.

logits: [num_rows, vocab_size] float32. No sort: the k-th largest, and the value at which the nucleus ends, are found by
narrowing the ordered 32-bit pattern of a float from the top, four bits a pass: of 16 candidates the largest at or above
which there are k tokens, or the mass top_p. Then the ties of the nucleus are counted off from the lowest id.

Must move: 4 bytes per logit for each of up to 8 passes for top-k, 8 for top-p and 4 more, from the L2 cache (a row is
0.5 MB at 128k tokens). FLOPs: 16 comparisons and sums per logit and pass. One program takes a row: the passes follow
one another anyway, and rows are independent.
"""

import torch
import triton
import triton.language as tl

CHUNK = 1024
"""Tokens in registers at a time, times 16 candidates: 64 pairs for each of 256 threads."""


@triton.jit
def ordered(x):
    """float32 -> uint32 in the order of the numbers."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)


@triton.jit
def load_row(row_ptr, start, vocab_size, temperature, CHUNK: tl.constexpr):
    """(x / temperature, -inf outside; its columns)."""
    columns = start + tl.arange(0, CHUNK)
    x = tl.load(row_ptr + columns, mask=columns < vocab_size, other=float("-inf"))
    return tl.div_rn(x, tl.zeros((CHUNK,), tl.float32) + temperature), columns


@triton.jit
def narrow(row_ptr, vocab_size, temperature, largest, floor, wanted, MASS: tl.constexpr, CHUNK: tl.constexpr):
    """The largest pattern at or above which the tokens that are >= floor number `wanted` (MASS: have the mass `wanted`,
    the sum of e^(x - largest)); 0 when there are not so many.
    """
    pattern = tl.zeros((1,), tl.uint32)
    for step in range(8):
        shift = (tl.zeros((16,), tl.int32) + 28 - 4 * step).to(tl.uint32)
        candidates = pattern + (tl.arange(0, 16).to(tl.uint32) << shift)
        totals = tl.zeros((16,), tl.float32)
        for start in range(0, vocab_size, CHUNK):
            x, columns = load_row(row_ptr, start, vocab_size, temperature, CHUNK)
            keep = (columns < vocab_size) & (x >= floor)
            if MASS:
                weight = tl.where(keep, tl.exp(x - largest), 0.0)
            else:
                weight = keep.to(tl.float32)
            reached = ordered(x)[:, None] >= candidates[None, :]
            totals += tl.sum(tl.where(reached, weight[:, None], 0.0), axis=0)
        chosen = tl.max(tl.where(totals >= wanted, tl.arange(0, 16), 0), axis=0)
        pattern = tl.max(tl.where(tl.arange(0, 16) == chosen, candidates, 0), axis=0) + tl.zeros((1,), tl.uint32)
    return tl.max(pattern, axis=0)


@triton.jit
def value_of(pattern):
    """The float32 whose ordered pattern this is."""
    bits = tl.where(pattern >> 31 != 0, pattern ^ 0x80000000, pattern ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def logit_limits_kernel(
    logits_ptr,
    limit_ptr,
    last_id_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    log_min_p_ptr,
    vocab_size,
    logits_stride,
    CHUNK: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * logits_stride
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    log_min_p = tl.load(log_min_p_ptr + row)
    by_k = (top_k > 0) & (top_k < vocab_size)
    limit = float("-inf")
    last_id = tl.cast(vocab_size, tl.int32)
    if temperature > 0.0:
        largest = float("-inf")
        for start in range(0, vocab_size, CHUNK):
            x, columns = load_row(row_ptr, start, vocab_size, temperature, CHUNK)
            largest = tl.maximum(largest, tl.max(x, axis=0))
        limit = largest + log_min_p
        if by_k:
            kth = narrow(row_ptr, vocab_size, temperature, largest, float("-inf"), top_k, False, CHUNK)
            limit = tl.maximum(limit, value_of(kth))
        if top_p < 1.0:
            total = 0.0
            for start in range(0, vocab_size, CHUNK):
                x, columns = load_row(row_ptr, start, vocab_size, temperature, CHUNK)
                total += tl.sum(tl.where(x >= limit, tl.exp(x - largest), 0.0), axis=0)
            wanted = tl.maximum(top_p * total, 1e-30)  # the best token is kept, whatever top_p
            end = narrow(row_ptr, vocab_size, temperature, largest, limit, wanted, True, CHUNK)
            if end > 0:
                limit = value_of(end)
                above = 0.0
                ties = 0
                for start in range(0, vocab_size, CHUNK):
                    x, columns = load_row(row_ptr, start, vocab_size, temperature, CHUNK)
                    above += tl.sum(tl.where(x > limit, tl.exp(x - largest), 0.0), axis=0)
                    ties += tl.sum((x == limit).to(tl.int32), axis=0)
                kept = tl.maximum(tl.ceil((wanted - above) / tl.exp(limit - largest)), 1.0).to(tl.int32)
                if kept < ties:
                    passed = 0
                    last_id = 0
                    for start in range(0, vocab_size, CHUNK):
                        x, columns = load_row(row_ptr, start, vocab_size, temperature, CHUNK)
                        tie = (x == limit).to(tl.int32)
                        number = tl.cumsum(tie, axis=0) + passed
                        last_id = tl.maximum(
                            last_id, tl.max(tl.where((tie > 0) & (number <= kept), columns, 0), axis=0)
                        )
                        passed += tl.sum(tie, axis=0)
    tl.store(limit_ptr + row, limit)
    tl.store(last_id_ptr + row, last_id)


def launch_logit_limits(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (limits [num_rows] float32, last_ids [num_rows] int32).

    temperature, top_p, min_p: [num_rows] float32; top_k: int64; 0 (or less), 1, 0 filter nothing. Rows of temperature 0
    get limits that keep all.
    """
    num_rows, vocab_size = logits.shape
    assert logits.dtype == torch.float32 and logits.stride(1) == 1
    limits = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    last_ids = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if num_rows:
        logit_limits_kernel[(num_rows,)](
            logits, limits, last_ids, temperature, top_k, top_p, min_p.log(), vocab_size, logits.stride(0),
            CHUNK=CHUNK, num_warps=8,
        )  # fmt: skip
    return limits, last_ids
