"""Choosing tokens: biases, penalties, temperature, filters, Gumbel noise and the best token, in one pass over shards of
the vocabulary.

    x = logit + bias, penalised (penalties.py), and stored back      greedy: the largest x
    sampled: the largest x / temperature + noise(seed; position, sample index, token id, purpose)   (philox.py)
    among the tokens a filter keeps: x / temperature > limit, or = limit and id <= last_id   (gpu/logit_limits.py)

logits: [num_rows, num_tokens] float32, the tokens [vocab_start, vocab_start + num_tokens) of the vocabulary. Equal
values: the lowest id. Not a number counts as the largest, so that it is found. The noise is made in float64 and
rounded, as on CPUs, so that all ranks and devices have the same.

Must move: 4 bytes per logit in, with biases or penalties 4 out and 5 in for counts. FLOPs: for a sampled row two
float64 logarithms and a fourth of 10 Philox rounds per token (about 150 operations), the limit on cards with few
float64 units; greedy rows do none of it. A program takes SHARD tokens of a row, so that one row alone fills the chip;
the best of a row's shards is found by a second kernel, and the shards of ranks can be joined alike.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

SHARD = 2048
"""Tokens of a program: 16 for each of 128 threads, whole counters of four."""


class Biases(NamedTuple):
    """What is added to single logits: of row r the entries [starts[r], starts[r + 1]) of ids (over the vocabulary,
    int64) and values (float32; -inf bans a token). starts: [num_rows + 1] int64.
    """

    starts: torch.Tensor
    ids: torch.Tensor
    values: torch.Tensor


class Penalties(NamedTuple):
    """rows: [num_rows] int64, a row's place in the other tensors, -1 for none. prompt_seen: [count, num_tokens] bool;
    output_counts: the same, int32; presence, frequency, repetition: [count] float32.
    """

    rows: torch.Tensor
    prompt_seen: torch.Tensor
    output_counts: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor
    repetition: torch.Tensor


@triton.jit
def biased(x, tokens, row, starts_ptr, ids_ptr, values_ptr):
    """x plus the row's biases."""
    for entry in range(tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)):
        x += tl.where(tokens == tl.load(ids_ptr + entry), tl.load(values_ptr + entry), 0.0)
    return x


@triton.jit
def penalised(
    x, columns, mask, row, num_tokens, rows_ptr, seen_ptr, counts_ptr, presence_ptr, frequency_ptr, repeat_ptr
):
    """x with the row's penalties, in the order and arithmetic of penalties.py."""
    place = tl.load(rows_ptr + row)
    at = tl.maximum(place, 0)
    active = tl.where(place >= 0, num_tokens, 0)
    held = mask & (columns < active)
    seen = tl.load(seen_ptr + at * num_tokens + columns, mask=held, other=0)
    counts = tl.load(counts_ptr + at * num_tokens + columns, mask=held, other=0)
    in_output = counts > 0
    repetition = tl.load(repeat_ptr + at)
    factor = tl.where(held & ((seen != 0) | in_output), repetition, 1.0)
    x = tl.where(x > 0, tl.div_rn(x, factor), x * factor)
    x -= tl.load(frequency_ptr + at) * counts.to(tl.float32)
    return x - tl.load(presence_ptr + at) * in_output.to(tl.float32)


@triton.jit
def gumbel(bits):
    """uint32 -> standard Gumbel numbers, float32; as philox.to_gumbel."""
    uniform = (bits.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def noise(seed, position, sample_index, quads, PURPOSE: tl.constexpr):
    """[4 * quads] float32: the noise of the tokens 4 q, 4 q + 1, 4 q + 2, 4 q + 3 of every quad q."""
    zero = quads.to(tl.uint32) * 0
    position = zero + position.to(tl.uint32)
    sample_index = zero + sample_index.to(tl.uint32)
    a, b, c, d = tl.philox(seed, quads.to(tl.uint32), position, sample_index, zero + PURPOSE)
    return tl.interleave(tl.interleave(gumbel(a), gumbel(c)), tl.interleave(gumbel(b), gumbel(d)))


@triton.jit
def sample_kernel(
    logits_ptr,
    best_ptr,
    ids_ptr,
    starts_ptr,
    bias_ids_ptr,
    bias_values_ptr,
    rows_ptr,
    seen_ptr,
    counts_ptr,
    presence_ptr,
    frequency_ptr,
    repetition_ptr,
    temperature_ptr,
    limit_ptr,
    last_id_ptr,
    seed_ptr,
    position_ptr,
    sample_index_ptr,
    num_tokens,
    vocab_start,
    logits_stride,
    num_shards,
    BIASES: tl.constexpr,
    PENALTIES: tl.constexpr,
    LIMITS: tl.constexpr,
    CHOOSE: tl.constexpr,
    PURPOSE: tl.constexpr,
    SHARD: tl.constexpr,
):
    """SHARD tokens of one row, from a multiple of four on. CHOOSE 0: only biases and penalties."""
    row = tl.program_id(0)
    first = vocab_start // 4 * 4 + tl.program_id(1) * SHARD
    tokens = first + tl.arange(0, SHARD)
    columns = tokens - vocab_start
    mask = (columns >= 0) & (columns < num_tokens)
    at = logits_ptr + row.to(tl.int64) * logits_stride + columns
    x = tl.load(at, mask=mask, other=float("-inf"))
    if BIASES:
        x = biased(x, tokens, row, starts_ptr, bias_ids_ptr, bias_values_ptr)
    if PENALTIES:
        x = penalised(
            x, columns, mask, row, num_tokens, rows_ptr, seen_ptr, counts_ptr, presence_ptr, frequency_ptr,
            repetition_ptr,
        )  # fmt: skip
    if BIASES or PENALTIES:
        tl.store(at, x, mask=mask)
    if CHOOSE:
        temperature = tl.load(temperature_ptr + row)
        if temperature > 0.0:
            x = tl.div_rn(x, tl.zeros((SHARD,), tl.float32) + temperature)
            if LIMITS:
                limit = tl.load(limit_ptr + row)
                kept = (x > limit) | ((x == limit) & (tokens <= tl.load(last_id_ptr + row))) | (x != x)
                x = tl.where(kept, x, float("-inf"))
            quads = first // 4 + tl.arange(0, SHARD // 4)
            x += noise(
                tl.load(seed_ptr + row), tl.load(position_ptr + row), tl.load(sample_index_ptr + row), quads, PURPOSE
            )
        x = tl.where(x != x, float("inf"), x)
        best = tl.max(tl.where(mask, x, float("-inf")), axis=0)
        token = tl.min(tl.where(mask & (x == best), tokens, 0x7FFFFFFF), axis=0)
        tl.store(best_ptr + row * num_shards + tl.program_id(1), best)
        tl.store(ids_ptr + row * num_shards + tl.program_id(1), token)


@triton.jit
def best_shard_kernel(best_ptr, ids_ptr, values_ptr, tokens_ptr, num_shards, BLOCK: tl.constexpr):
    """The best shard of one row; among equals the lowest id."""
    row = tl.program_id(0)
    shards = tl.arange(0, BLOCK)
    values = tl.load(best_ptr + row * num_shards + shards, mask=shards < num_shards, other=float("-inf"))
    ids = tl.load(ids_ptr + row * num_shards + shards, mask=shards < num_shards, other=0x7FFFFFFF)
    best = tl.max(values, axis=0)
    tl.store(values_ptr + row, best)
    tl.store(tokens_ptr + row, tl.min(tl.where(values == best, ids, 0x7FFFFFFF), axis=0).to(tl.int64))


class Choices(NamedTuple):
    """How rows are sampled: temperature [num_rows] float32, 0 for the best token; seeds, positions, sample_indices:
    [num_rows] int64. limits: from logit_limits.py, None to keep all tokens.
    """

    temperature: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    sample_indices: torch.Tensor
    limits: tuple[torch.Tensor, torch.Tensor] | None = None


def launch_sample(
    logits: torch.Tensor,
    biases: Biases | None,
    penalties: Penalties | None,
    choices: Choices | None,
    *,
    vocab_start: int = 0,
    purpose: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Edit logits in place and choose. Returns (values [num_rows] float32, ids [num_rows] int64 over the vocabulary) of
    the best tokens of this shard; both empty without choices.
    """
    num_rows, num_tokens = logits.shape
    assert logits.dtype == torch.float32 and logits.stride(1) == 1 and num_tokens > 0
    num_shards = triton.cdiv(num_tokens + vocab_start % 4, SHARD)
    count = 0 if choices is None else num_rows
    best, values = (
        torch.empty(size, dtype=torch.float32, device=logits.device) for size in (count * num_shards, count)
    )
    ids = torch.empty(count * num_shards, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(count, dtype=torch.int64, device=logits.device)
    if num_rows == 0 or (biases is None and penalties is None and choices is None):
        return values, tokens
    edits = [*(biases or [logits] * 3), *(penalties or [logits] * 6)]
    limits = choices.limits if choices is not None and choices.limits is not None else None
    sampling = [logits] * 3 if choices is None else [choices.seeds, choices.positions, choices.sample_indices]
    sample_kernel[(num_rows, num_shards)](
        logits,
        best,
        ids,
        *edits,
        logits if choices is None else choices.temperature,
        *(limits or [logits] * 2),
        *sampling,
        num_tokens,
        vocab_start,
        logits.stride(0),
        num_shards,
        BIASES=biases is not None,
        PENALTIES=penalties is not None,
        LIMITS=limits is not None,
        CHOOSE=choices is not None,
        PURPOSE=purpose,
        SHARD=SHARD,
        num_warps=4,
    )
    if choices is not None:
        best_shard_kernel[(num_rows,)](
            best, ids, values, tokens, num_shards, BLOCK=triton.next_power_of_2(num_shards), num_warps=1
        )
    return values, tokens
