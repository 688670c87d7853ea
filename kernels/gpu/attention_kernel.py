"""The kernels of paged FlashAttention (arXiv:2205.14135, 2307.08691), written in Triton; launched by attention.py.

A program computes a tile of BLOCK_M rows, each a (query, head) pair: BLOCK_M // GROUP consecutive queries of one
request times the GROUP query heads that read one key/value head, so that every key and value is read once for all of
them. It goes over BLOCK_N keys at a time, in tiles anchored at position 0, with a running maximum m, sum l and
unnormalised output acc (exponents to base 2). The last grid axis splits the keys (flash-decoding); partial results go
to scratch slots, which `merge_kernel` folds in their order.

SEGMENTED (deterministic): keys are cut at multiples of SEGMENT whatever the batch. Each segment starts from nothing and
is folded into the total by `fold`, here or in merge_kernel, with the same explicitly rounded operations: the result
does not depend on who folds. A key tile that a row does not see changes none of its bits.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
MINUS_INF: tl.constexpr = tl.constexpr(float("-inf"))


@triton.jit
def tanh(x):
    """tanh to a few units in the last place: a series near 0, where the quotient would cancel."""
    square = x * x
    series = 62.0 / 2835.0
    series = -17.0 / 315.0 + square * series
    series = 2.0 / 15.0 + square * series
    series = x + x * square * (-1.0 / 3.0 + square * series)
    small = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    quotient = (1.0 - small) / (1.0 + small)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def load_cache(pointers, mask):
    """A tile of the cache, 0 where masked."""
    if mask is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0)


@triton.jit
def decode(raw, FP8: tl.constexpr, dtype: tl.constexpr):
    """Elements of the cache as dtype. FP8: bytes of e4m3, whose bits are those of a float16 2^-8 times as large."""
    if FP8:
        bits = raw.to(tl.uint16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        return (half.to(tl.float16, bitcast=True) * 256.0).to(dtype)
    else:
        return raw


@triton.jit
def attend(
    acc, m, l, q, q_positions, k_ptr, v_ptr, k_desc, v_desc, column, table_ptr, oldest, newest, start, stop, window,
    qk_scale, softcap, cache_block, cache_token,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, FP8: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys [start, stop), start a multiple of BLOCK_N. k_ptr, v_ptr: of the key/value head.

    Only keys in [oldest, newest) are read. Without MASKED every row sees every key of the range; whole tiles are then
    read through the tensor descriptors (TMA), whose rows are the cache's slots, from `column` on, where there are any.
    """
    columns = tl.arange(0, DIM)
    for first in range(start, stop, BLOCK_N):
        positions = first + tl.arange(0, BLOCK_N)
        readable = (positions >= oldest) & (positions < newest)
        if BLOCK_SIZE % BLOCK_N == 0:  # the tile lies in one block
            block = tl.load(table_ptr + first // BLOCK_SIZE).to(tl.int64)
            slots = block * cache_block + (positions % BLOCK_SIZE) * cache_token
            slot = (block * BLOCK_SIZE + first % BLOCK_SIZE).to(tl.int32)
        else:
            if MASKED:
                blocks = tl.load(table_ptr + positions // BLOCK_SIZE, mask=readable, other=0).to(tl.int64)
            else:
                blocks = tl.load(table_ptr + positions // BLOCK_SIZE).to(tl.int64)
            slots = blocks * cache_block + (positions % BLOCK_SIZE) * cache_token
        offsets = slots[:, None] + columns[None, :]
        if MASKED:
            mask = readable[:, None] & (columns < HEAD_DIM)[None, :]
        elif HEAD_DIM != DIM:
            mask = (columns < HEAD_DIM)[None, :]
        else:
            mask = None
        if k_desc is not None and not MASKED:
            k = k_desc.load([slot, column])
        else:
            k = load_cache(k_ptr + offsets, mask)
        k = decode(k, FP8, q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if CAPPED:
            scores = tanh(scores * (qk_scale / softcap)) * (softcap * LOG2E)
        else:
            scores = scores * (qk_scale * LOG2E)
        if MASKED:
            visible = (positions[None, :] <= q_positions[:, None]) & readable[None, :]
            if WINDOWED:
                visible = visible & (positions[None, :] > q_positions[:, None] - window)
            scores = tl.where(visible, scores, MINUS_INF)
        top = tl.maximum(m, tl.max(scores, 1))
        shift = tl.where(top == MINUS_INF, 0.0, top)
        weights = tl.exp2(scores - shift[:, None])
        factor = tl.exp2(m - shift)
        l = tl.fma(l, factor, tl.sum(weights, 1))
        if v_desc is not None and not MASKED:
            v = v_desc.load([slot, column])
        else:
            v = load_cache(v_ptr + offsets, mask)
        v = decode(v, FP8, q.dtype)
        acc = tl.dot(weights.to(q.dtype), v, acc * factor[:, None], input_precision="ieee")
        m = top
    return acc, m, l


@triton.jit
def fold(acc, m, l, part, part_m, part_l):
    """Add a part of the keys to the total. Operations are rounded explicitly: one result wherever it is compiled."""
    top = tl.maximum(m, part_m)
    shift = tl.where(top == MINUS_INF, 0.0, top)
    old, new = tl.exp2(m - shift), tl.exp2(part_m - shift)
    return tl.fma(part, new[:, None], acc * old[:, None]), top, tl.fma(part_l, new, l * old)


@triton.jit
def finish(acc, m, l, sinks_ptr, heads, valid, v_scale, HAS_SINKS: tl.constexpr):
    """The output: acc over l, with the sink's term in the sum and the values' scale."""
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + heads, mask=valid, other=0.0) * LOG2E
        top = tl.maximum(m, sink)
        factor = tl.exp2(m - top)
        acc = acc * factor[:, None]
        l = tl.fma(l, factor, tl.exp2(sink - top))
    return acc / tl.where(l == 0.0, 1.0, l)[:, None] * v_scale


@triton.jit
def find_row(cu_ptr, num_rows, tile, QUERIES: tl.constexpr):
    """The row of a tile and the tile's number in it. Row r owns the tiles from cu[r] // QUERIES + r on, which leaves it
    at least as many as it needs, so that no host has to count them.
    """
    row = -1
    for start in range(0, num_rows, 128):
        index = start + tl.arange(0, 128)
        first = tl.load(cu_ptr + index, mask=index < num_rows, other=0) // QUERIES + index
        row += tl.sum(((first <= tile) & (index < num_rows)).to(tl.int32), 0)
    return row, tile - (tl.load(cu_ptr + row) // QUERIES + row)


@triton.jit
def heads_of(map_ptr, kv_head, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEADS: tl.constexpr,
             UNIFORM: tl.constexpr):  # fmt: skip
    """First query head of a key/value head, and the one after its last."""
    if UNIFORM:
        start = kv_head * (NUM_HEADS // NUM_KV_HEADS)
        return start, start + NUM_HEADS // NUM_KV_HEADS
    index = tl.arange(0, HEADS)
    owners = tl.load(map_ptr + index, mask=index < NUM_HEADS, other=NUM_KV_HEADS)
    start = tl.sum((owners < kv_head).to(tl.int32), 0)
    return start, start + tl.sum((owners == kv_head).to(tl.int32), 0)


@triton.jit(do_not_specialize=["num_rows", "min_queries", "max_queries", "key_begin", "key_end", "window", "span",
                               "first_slot", "num_partials", "by_token", "table_row"])  # fmt: skip
def attention_kernel(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, out_ptr, partial_ptr, stats_ptr, table_ptr, cu_ptr, lens_ptr, map_ptr,
    sinks_ptr, k_scale_ptr, v_scale_ptr,
    num_rows, min_queries, max_queries, key_begin, key_end, window, span, first_slot, num_partials, by_token,
    scale, softcap,
    q_token, q_head, out_token, out_head, table_row, cache_block, cache_token, cache_head, scale_step,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    HEAD_TILES: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SEGMENT: tl.constexpr, UNIFORM: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, HAS_SINKS: tl.constexpr, LATE: tl.constexpr, FP8: tl.constexpr,
    SEGMENTED: tl.constexpr,
):  # fmt: skip
    """Grid: tiles, key/value heads times HEAD_TILES, splits of `span` keys.

    Rows with a number of queries outside [min_queries, max_queries] are left alone; keys outside [key_begin, key_end)
    are not seen. num_partials: 0 writes to out; otherwise acc, m and l go to slot first_slot + split, at the token
    (by_token) or at row * max_queries + query. LATE: key_begin may not be 0.
    """
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    row, tile = find_row(cu_ptr, num_rows, tl.program_id(0), QUERIES)
    q_start = tl.load(cu_ptr + row)
    num_queries = tl.load(cu_ptr + row + 1) - q_start
    first_query = tile * QUERIES
    if (first_query >= num_queries) | (num_queries < min_queries) | (num_queries > max_queries):
        return
    kv_head = tl.program_id(1) // HEAD_TILES
    head_start, head_stop = heads_of(map_ptr, kv_head, NUM_HEADS, NUM_KV_HEADS, HEADS, UNIFORM)
    head_start += (tl.program_id(1) % HEAD_TILES) * GROUP
    index = tl.arange(0, BLOCK_M)
    queries, heads = first_query + index // GROUP, head_start + index % GROUP
    valid = (index < QUERIES * GROUP) & (queries < num_queries) & (heads < head_stop)
    columns = tl.arange(0, DIM)
    mask = valid[:, None] & (columns < HEAD_DIM)[None, :]
    tokens = (q_start + queries).to(tl.int64)
    q = tl.load(q_ptr + (tokens * q_token + heads * q_head)[:, None] + columns[None, :], mask=mask, other=0.0)

    context = tl.load(lens_ptr + row) - num_queries
    q_positions = context + queries
    newest = tl.minimum(context + tl.minimum(first_query + QUERIES, num_queries), key_end)
    oldest = key_begin
    if WINDOWED:
        oldest = tl.maximum(oldest, context + first_query - window + 1)
    ALIGN: tl.constexpr = SEGMENT if SEGMENTED else BLOCK_N
    start = oldest // ALIGN * ALIGN + tl.program_id(2) * span
    stop = tl.minimum(start + span, newest)

    qk_scale = scale
    v_scale = 1.0
    if FP8:
        qk_scale = scale * tl.load(k_scale_ptr + kv_head * scale_step)
        v_scale = tl.load(v_scale_ptr + kv_head * scale_step)
    column = kv_head * HEAD_DIM
    k_ptr += kv_head * cache_head
    v_ptr += kv_head * cache_head
    table_ptr += row.to(tl.int64) * table_row
    acc = tl.zeros([BLOCK_M, DIM], dtype=tl.float32)
    m = tl.full([BLOCK_M], MINUS_INF, dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    if SEGMENTED:
        for segment in range(start, stop, SEGMENT):
            part, part_m, part_l = attend(
                tl.zeros([BLOCK_M, DIM], dtype=tl.float32), tl.full([BLOCK_M], MINUS_INF, dtype=tl.float32),
                tl.zeros([BLOCK_M], dtype=tl.float32), q, q_positions, k_ptr, v_ptr, None, None, 0, table_ptr, oldest,
                newest, tl.maximum(segment, oldest // BLOCK_N * BLOCK_N), tl.minimum(segment + SEGMENT, stop), window,
                qk_scale, softcap, cache_block, cache_token, HEAD_DIM, DIM, BLOCK_SIZE, BLOCK_N, WINDOWED, CAPPED, FP8,
                True,
            )  # fmt: skip
            acc, m, l = fold(acc, m, l, part, part_m, part_l)
    else:
        full_start = start
        if LATE or WINDOWED:
            all_see = key_begin
            if WINDOWED:
                all_see = tl.maximum(all_see, context + tl.minimum(first_query + QUERIES, num_queries) - window)
            full_start = tl.minimum(tl.maximum(start, tl.cdiv(all_see, BLOCK_N) * BLOCK_N), stop)
            full_start = tl.maximum(full_start, start)
            acc, m, l = attend(
                acc, m, l, q, q_positions, k_ptr, v_ptr, k_desc, v_desc, column, table_ptr, oldest, newest,
                start, full_start, window, qk_scale, softcap, cache_block, cache_token, HEAD_DIM, DIM, BLOCK_SIZE,
                BLOCK_N, WINDOWED, CAPPED, FP8, True,
            )  # fmt: skip
        full_stop = tl.maximum(tl.minimum(context + first_query + 1, stop) // BLOCK_N * BLOCK_N, full_start)
        acc, m, l = attend(
            acc, m, l, q, q_positions, k_ptr, v_ptr, k_desc, v_desc, column, table_ptr, oldest, newest,
            full_start, full_stop, window, qk_scale, softcap, cache_block, cache_token, HEAD_DIM, DIM, BLOCK_SIZE,
            BLOCK_N, WINDOWED, CAPPED, FP8, False,
        )  # fmt: skip
        acc, m, l = attend(
            acc, m, l, q, q_positions, k_ptr, v_ptr, k_desc, v_desc, column, table_ptr, oldest, newest,
            full_stop, stop, window, qk_scale, softcap, cache_block, cache_token, HEAD_DIM, DIM, BLOCK_SIZE,
            BLOCK_N, WINDOWED, CAPPED, FP8, True,
        )  # fmt: skip

    if num_partials == 0:
        out = finish(acc, m, l, sinks_ptr, heads, valid, v_scale, HAS_SINKS)
        pointers = out_ptr + (tokens * out_token + heads * out_head)[:, None] + columns[None, :]
        tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        places = tl.where(by_token != 0, tokens, row.to(tl.int64) * max_queries + queries)
        places = ((first_slot + tl.program_id(2)).to(tl.int64) * num_partials + places) * NUM_HEADS + heads
        tl.store(partial_ptr + places[:, None] * HEAD_DIM + columns[None, :], acc, mask=mask & (m > MINUS_INF)[:, None])
        tl.store(stats_ptr + places * 2, m, mask=valid)
        tl.store(stats_ptr + places * 2 + 1, l, mask=valid)


@triton.jit(do_not_specialize=["min_queries", "max_queries", "num_slots", "num_partials", "by_token"])
def merge_kernel(
    partial_ptr, stats_ptr, out_ptr, cu_ptr, map_ptr, sinks_ptr, v_scale_ptr,
    min_queries, max_queries, num_slots, num_partials, by_token,
    out_token, out_head, scale_step,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, UNIFORM: tl.constexpr, HAS_SINKS: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Folds the slots of a place in their order. Grid: places (num_partials), blocks of BLOCK_H heads."""
    place = tl.program_id(0)
    token = place
    if by_token == 0:
        row, query = place // max_queries, place % max_queries
        q_start = tl.load(cu_ptr + row)
        num_queries = tl.load(cu_ptr + row + 1) - q_start
        if (query >= num_queries) | (num_queries < min_queries) | (num_queries > max_queries):
            return
        token = q_start + query
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    valid = heads < NUM_HEADS
    columns = tl.arange(0, DIM)
    mask = valid[:, None] & (columns < HEAD_DIM)[None, :]
    acc = tl.zeros([BLOCK_H, DIM], dtype=tl.float32)
    m = tl.full([BLOCK_H], MINUS_INF, dtype=tl.float32)
    l = tl.zeros([BLOCK_H], dtype=tl.float32)
    stride = num_partials.to(tl.int64)
    for slot in range(0, num_slots):
        places = (slot * stride + place) * NUM_HEADS + heads
        part_m = tl.load(stats_ptr + places * 2, mask=valid, other=MINUS_INF)
        part_l = tl.load(stats_ptr + places * 2 + 1, mask=valid, other=0.0)
        seen = mask & (part_m > MINUS_INF)[:, None]
        part = tl.load(partial_ptr + places[:, None] * HEAD_DIM + columns[None, :], mask=seen, other=0.0)
        acc, m, l = fold(acc, m, l, part, part_m, part_l)
    v_scale = tl.full([BLOCK_H, 1], 1.0, dtype=tl.float32)
    if FP8:
        if UNIFORM:
            kv_heads = heads // (NUM_HEADS // NUM_KV_HEADS)
        else:
            kv_heads = tl.load(map_ptr + heads, mask=valid, other=0)
        v_scale = tl.load(v_scale_ptr + kv_heads * scale_step, mask=valid, other=1.0)[:, None]
    out = finish(acc, m, l, sinks_ptr, heads, valid, v_scale, HAS_SINKS)
    pointers = out_ptr + (token.to(tl.int64) * out_token + heads * out_head)[:, None] + columns[None, :]
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=mask)
