"""The limits that min-p, top-k and top-p set to a row's logits (logit_filters.py): a token is kept when x / temperature
is above limit, or equal to it and its id <= last_id.

logits: [num_rows, vocab_size] float32. No sort: the k-th largest, and the value at which the nucleus ends, are found by
narrowing the ordered 32-bit pattern of a float from the top, four bits a pass: of 16 candidates the largest at or above
which there are k tokens, or the mass top_p. Then the ties of the nucleus are counted off from the lowest id.

Must move: 4 bytes per logit for each of up to 8 passes for top-k, 8 for top-p and 4 more, from the L2 cache (a row is
0.5 MB at 128k tokens). FLOPs: 16 comparisons and sums per logit and pass. A pass is a launch, in which a program takes
SHARD tokens of a row, so that one row alone fills the chip; its sums are added up, in their order, by the programs of
the next pass. Rows that a pass is not for cost it nothing.
"""

import torch
import triton
import triton.language as tl

SHARD = 2048
CHUNK = 1024
"""Tokens in registers at a time, times 16 candidates: 64 pairs for each of 256 threads."""
NONE, MAXIMUM, COUNT, TOTAL, MASS, TIES, LAST = map(tl.constexpr, range(7))
SHIFTS = range(28, -1, -4)
PASSES = ((MAXIMUM, 0), *((COUNT, shift) for shift in SHIFTS), (TOTAL, 0), *((MASS, shift) for shift in SHIFTS),
          (TIES, 0), (LAST, 0))  # fmt: skip


@triton.jit
def ordered(x):
    """float32 -> uint32 in the order of the numbers."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)


@triton.jit
def value_of(pattern):
    """The float32 whose ordered pattern this is."""
    bits = tl.where(pattern >> 31 != 0, pattern ^ 0x80000000, pattern ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def load_row(row_ptr, start, vocab_size, temperature, CHUNK: tl.constexpr):
    """(x / temperature, -inf outside; its columns)."""
    columns = start + tl.arange(0, CHUNK)
    x = tl.load(row_ptr + columns, mask=columns < vocab_size, other=float("-inf"))
    return tl.div_rn(x, tl.zeros((CHUNK,), tl.float32) + temperature), columns


@triton.jit
def chosen_digit(totals, wanted):
    """The last of 16 candidates that reaches what is wanted."""
    return tl.max(tl.where(totals >= wanted, tl.arange(0, 16), 0), axis=0).to(tl.uint32)


@triton.jit
def entry(sums, number):
    """One of 16 numbers: [16] -> scalar."""
    return tl.sum(tl.where(tl.arange(0, 16) == number, sums, 0.0), axis=0)


@triton.jit
def conclude(
    sums, state_ptr, pattern_ptr, row, top_k, top_p, log_min_p, by_k, shift, BEFORE: tl.constexpr
):  # fmt: skip
    """(limit, largest, wanted, pattern) of a row, from what they were and the sums [shards, 16] of the pass before."""
    if BEFORE == MAXIMUM:
        largest = tl.max(tl.max(sums, axis=1), axis=0)
        limit = largest + log_min_p
        wanted = 0.0
        pattern = tl.cast(0, tl.uint32)
    else:
        limit = tl.load(state_ptr + row * 3)
        largest = tl.load(state_ptr + row * 3 + 1)
        wanted = tl.load(state_ptr + row * 3 + 2)
        pattern = tl.load(pattern_ptr + row).to(tl.uint32, bitcast=True)
        totals = tl.sum(sums, axis=0)
        if BEFORE == COUNT:  # noqa: SIM102 -- known when compiled
            if by_k:
                pattern += chosen_digit(totals, top_k.to(tl.float32)) << shift.to(tl.uint32)
                if shift == 0:
                    limit = tl.maximum(limit, value_of(pattern))
        if BEFORE == TOTAL:
            wanted = tl.maximum(top_p * entry(totals, 0), 1e-30)  # the best token is kept, whatever top_p
            pattern = tl.cast(0, tl.uint32)
        if BEFORE == MASS:  # noqa: SIM102 -- known when compiled
            if top_p < 1.0:
                pattern += chosen_digit(totals, wanted) << shift.to(tl.uint32)
                if (shift == 0) & (pattern > 0):
                    limit = value_of(pattern)
    return limit, largest, wanted, pattern


@triton.jit
def sum_shard(
    row_ptr, first, vocab_size, temperature, limit, largest, pattern, shift,
    PASS: tl.constexpr, SHARD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """[16] sums of a shard. MAXIMUM: its largest; TOTAL: the mass at or above limit, TIES: above it, and how many are
    equal to it; COUNT, MASS: how many tokens, or what mass, at or above each candidate for the next digit.
    """
    digits = tl.arange(0, 16)
    found = tl.zeros((16,), tl.float32)
    if PASS == MAXIMUM:
        found += float("-inf")
    candidates = pattern + (digits.to(tl.uint32) << shift.to(tl.uint32))
    for start in range(first, first + SHARD, CHUNK):
        x, columns = load_row(row_ptr, start, vocab_size, temperature, CHUNK)
        inside = columns < vocab_size
        if PASS == MAXIMUM:
            found = tl.maximum(found, tl.max(x, axis=0))
        if (PASS == COUNT) | (PASS == MASS):
            if PASS == MASS:
                weight = tl.where(inside & (x >= limit), tl.exp(x - largest), 0.0)
            else:
                weight = inside.to(tl.float32)
            reached = ordered(x)[:, None] >= candidates[None, :]
            found += tl.sum(tl.where(reached, weight[:, None], 0.0), axis=0)
        if PASS == TOTAL:
            found += tl.sum(tl.where(inside & (x >= limit), tl.exp(x - largest), 0.0), axis=0)
        if PASS == TIES:
            above = tl.sum(tl.where(x > limit, tl.exp(x - largest), 0.0), axis=0)
            found += tl.where(digits == 1, tl.sum((inside & (x == limit)).to(tl.float32), axis=0), above)
    return found


@triton.jit
def store_limits(
    limit_ptr, last_id_ptr, row, shard, row_ptr, vocab_size, temperature, top_p, limit, largest, wanted, pattern, sums,
    SHARD: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The row's results. Without a nucleus, or when all of its ties are kept, every tie is; else the shard that has the
    last one says which it is.
    """
    kept = tl.cast(0, tl.int32)
    passed = tl.cast(0, tl.int32)
    all_kept = (top_p >= 1.0) | (pattern == 0)
    if top_p < 1.0:
        ties = tl.sum(tl.where(tl.arange(0, 16)[None, :] == 1, sums, 0.0), axis=1).to(tl.int32)
        above = entry(tl.sum(sums, axis=0), 0)
        kept = tl.maximum(tl.ceil((wanted - above) / tl.exp(limit - largest)), 1.0).to(tl.int32)
        passed = tl.sum(tl.where(tl.arange(0, BLOCK) < shard, ties, 0), axis=0)
        all_kept = all_kept | (kept >= tl.sum(ties, axis=0))
    if shard == 0:
        tl.store(limit_ptr + row, limit)
        if all_kept:
            tl.store(last_id_ptr + row, tl.cast(vocab_size, tl.int32))
    if (all_kept == 0) & (passed < kept):
        last_id = -1
        for start in range(shard * SHARD, (shard + 1) * SHARD, CHUNK):
            x, columns = load_row(row_ptr, start, vocab_size, temperature, CHUNK)
            tie = ((columns < vocab_size) & (x == limit)).to(tl.int32)
            number = tl.cumsum(tie, axis=0) + passed
            last_id = tl.maximum(last_id, tl.max(tl.where((tie > 0) & (number == kept), columns, -1), axis=0))
            passed += tl.sum(tie, axis=0)
        if last_id >= 0:
            tl.store(last_id_ptr + row, last_id)


@triton.jit(do_not_specialize=["shift_before", "shift"])
def logit_limits_kernel(
    logits_ptr, limit_ptr, last_id_ptr, sums_in_ptr, sums_ptr, state_in_ptr, state_ptr, pattern_in_ptr, pattern_ptr,
    temperature_ptr, top_k_ptr, top_p_ptr, log_min_p_ptr, vocab_size, logits_stride, num_shards, shift_before, shift,
    BEFORE: tl.constexpr, PASS: tl.constexpr, SHARD: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pass over a shard of a row, once it is concluded what the pass before found: by every program of the row, of
    which the first keeps it. sums: [num_rows, num_shards, 16]; state: limit, largest, wanted of each row; pattern: the
    digits found so far.
    """
    row = tl.program_id(0)
    shard = tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    by_k = (top_k > 0) & (top_k < vocab_size)
    if temperature <= 0.0:
        if (PASS == LAST) & (shard == 0):
            tl.store(limit_ptr + row, float("-inf"))
            tl.store(last_id_ptr + row, tl.cast(vocab_size, tl.int32))
        return
    row_ptr = logits_ptr + row.to(tl.int64) * logits_stride
    limit = float("-inf")
    largest = float("-inf")
    pattern = tl.cast(0, tl.uint32)
    if BEFORE != NONE:
        at = (row * num_shards + tl.arange(0, BLOCK))[:, None] * 16 + tl.arange(0, 16)[None, :]
        empty = float("-inf") if BEFORE == MAXIMUM else 0.0
        sums = tl.load(sums_in_ptr + at, mask=(tl.arange(0, BLOCK) < num_shards)[:, None], other=empty)
        limit, largest, wanted, pattern = conclude(
            sums, state_in_ptr, pattern_in_ptr, row, top_k, top_p, tl.load(log_min_p_ptr + row), by_k, shift_before,
            BEFORE,
        )  # fmt: skip
        if PASS == LAST:
            store_limits(
                limit_ptr, last_id_ptr, row, shard, row_ptr, vocab_size, temperature, top_p, limit, largest, wanted,
                pattern, sums, SHARD, CHUNK, BLOCK,
            )  # fmt: skip
        elif shard == 0:
            tl.store(state_ptr + row * 3, limit)
            tl.store(state_ptr + row * 3 + 1, largest)
            tl.store(state_ptr + row * 3 + 2, wanted)
            tl.store(pattern_ptr + row, pattern.to(tl.int32, bitcast=True))
    if PASS != LAST:
        wants = top_p < 1.0
        if PASS == MAXIMUM:
            wants = True
        if PASS == COUNT:
            wants = by_k
        if wants:
            found = sum_shard(
                row_ptr, shard * SHARD, vocab_size, temperature, limit, largest, pattern, shift, PASS, SHARD, CHUNK
            )
            tl.store(sums_ptr + (row * num_shards + shard) * 16 + tl.arange(0, 16), found)


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
    (num_rows, vocab_size), device = logits.shape, logits.device
    assert logits.dtype == torch.float32 and logits.stride(1) == 1
    limits = torch.empty(num_rows, dtype=torch.float32, device=device)
    last_ids = torch.empty(num_rows, dtype=torch.int32, device=device)
    if not num_rows:
        return limits, last_ids
    num_shards, log_min_p = triton.cdiv(vocab_size, SHARD), min_p.log()
    block = triton.next_power_of_2(num_shards)
    sums = torch.empty((2, num_rows, num_shards, 16), dtype=torch.float32, device=device)
    state = torch.empty((2, num_rows, 3), dtype=torch.float32, device=device)
    pattern = torch.zeros((2, num_rows), dtype=torch.int32, device=device)
    before, shift_before = NONE, 0
    for number, (kind, shift) in enumerate(PASSES):
        old, new = (number + 1) % 2, number % 2
        logit_limits_kernel[(num_rows, num_shards)](
            logits, limits, last_ids, sums[old], sums[new], state[old], state[new], pattern[old], pattern[new],
            temperature, top_k, top_p, log_min_p, vocab_size, logits.stride(0), num_shards,
            shift_before, shift, BEFORE=before, PASS=kind, SHARD=SHARD, CHUNK=CHUNK, BLOCK=block, num_warps=8,
        )  # fmt: skip
        before, shift_before = kind, shift
    return limits, last_ids
