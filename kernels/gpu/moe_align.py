"""Tokens in order of their experts, every expert's part padded to whole tiles of the grouped product.

An assignment is a token's choice: number token * top_k + choice. `order` lists the assignments of expert 0, in rising
order, then `none` up to a multiple of block_rows, then expert 1, ... ; `tile_experts` says whose each tile is. Experts
outside [first, first + num_experts) are left out. Counted, not sorted: no atomics, so always the same order.

Must move: the ids (8 bytes an assignment) twice for every expert, out of the L2 cache, and the order once. One program
per expert; no number travels to the host, so nothing waits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

CHUNK = 1024
"""Assignments compared at a time: 8 for each of 128 threads."""


class Alignment(NamedTuple):
    """order: [max_tiles * block_rows] int32; tile_experts: [max_tiles] int32, local numbers; counts: [num_experts]
    int32, assignments of each; num_tiles: [1] int32, tiles in use, what is after them is undefined. none: the number of
    assignments, standing in order for "no assignment".
    """

    order: torch.Tensor
    tile_experts: torch.Tensor
    counts: torch.Tensor
    num_tiles: torch.Tensor
    none: int
    block_rows: int


@triton.jit(do_not_specialize=["num_assignments"])
def count_kernel(ids_ptr, counts_ptr, num_assignments, first, CHUNK: tl.constexpr):
    """Assignments of one expert."""
    expert = tl.program_id(0)
    count = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, num_assignments, CHUNK):
        at = start + tl.arange(0, CHUNK)
        ids = tl.load(ids_ptr + at, mask=at < num_assignments, other=-1)
        count += (ids == first + expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(count, axis=0))


@triton.jit(do_not_specialize=["num_assignments"])
def place_kernel(
    ids_ptr,
    counts_ptr,
    order_ptr,
    tile_experts_ptr,
    num_tiles_ptr,
    num_assignments,
    first,
    num_experts,
    BLOCK_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One expert's part of the order, its tiles, and the number of all tiles (the last expert)."""
    expert = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + experts, mask=experts < num_experts, other=0)
    tiles = (counts + BLOCK_ROWS - 1) // BLOCK_ROWS
    first_tile = tl.sum(tl.where(experts < expert, tiles, 0), axis=0)
    own_tiles = tl.sum(tl.where(experts == expert, tiles, 0), axis=0)
    placed = first_tile * BLOCK_ROWS
    end = (first_tile + own_tiles) * BLOCK_ROWS
    for start in range(0, num_assignments, CHUNK):
        at = start + tl.arange(0, CHUNK)
        ids = tl.load(ids_ptr + at, mask=at < num_assignments, other=-1)
        mine = (ids == first + expert).to(tl.int32)
        tl.store(order_ptr + placed + tl.cumsum(mine, axis=0) - 1, at, mask=mine > 0)
        placed += tl.sum(mine, axis=0)
    padding = placed + tl.arange(0, BLOCK_ROWS)
    tl.store(order_ptr + padding, tl.zeros((BLOCK_ROWS,), tl.int32) + num_assignments, mask=padding < end)
    for start in range(0, own_tiles, CHUNK):
        at = start + tl.arange(0, CHUNK)
        tl.store(tile_experts_ptr + first_tile + at, tl.zeros((CHUNK,), tl.int32) + expert, mask=at < own_tiles)
    if expert == num_experts - 1:
        tl.store(num_tiles_ptr, first_tile + own_tiles)


def launch_moe_align(ids: torch.Tensor, first: int, num_experts: int, block_rows: int) -> Alignment:
    """ids: [num_tokens, top_k] int64, contiguous, different within a row; block_rows: a power of two."""
    assert ids.is_contiguous() and ids.dtype == torch.int64
    none = ids.numel()
    busy = min(num_experts, none)
    max_tiles = busy + (none - busy) // block_rows
    order, tile_experts, counts, num_tiles = (
        torch.empty(size, dtype=torch.int32, device=ids.device)
        for size in (max_tiles * block_rows, max_tiles, num_experts, 1)
    )
    alignment = Alignment(order, tile_experts, counts, num_tiles, none, block_rows)
    if num_experts == 0:
        num_tiles.zero_()
        return alignment
    count_kernel[(num_experts,)](ids, counts, none, first, CHUNK=CHUNK, num_warps=4)
    place_kernel[(num_experts,)](
        ids,
        counts,
        order,
        tile_experts,
        num_tiles,
        none,
        first,
        num_experts,
        BLOCK_ROWS=block_rows,
        CHUNK=CHUNK,
        BLOCK_E=triton.next_power_of_2(num_experts),
        num_warps=4,
    )
    return alignment
