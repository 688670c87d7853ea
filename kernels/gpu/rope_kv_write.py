"""Between a layer's fused projection and its attention, in one pass: norm of queries and keys per head, rotary
positions, and keys and values into the paged cache.

    q, k = norm(q), norm(k)  (rms_norm.py, layer_norm.py)      q, k = rotate(q), rotate(k)  (rope.py)
    q in place      k_cache[slot] = k      v_cache[slot] = v      (slot = block * block_size + offset)

heads: [num_tokens, num_heads + 2 num_kv_heads, head_dim], queries, keys, values, any strides but adjacent elements;
float32, bfloat16, float16. Everything between reading and writing is float32, rounded once. Caches of heads' dtype, or
FP8 (e4m3) holding k / k_scale and v / v_scale, a scale per head. Keys in `heads` are left as they are.

Must move: every element of heads read once, and written once (queries back, keys and values to the cache); cosines,
sines and norm weights come from the caches of the chip. FLOPs: under 10 per element. One program takes HEADS heads of a
token; the parts of a head (first and second half of the rotated part, the rest) are loaded apart, so that a pair meets
in one thread without an exchange.
"""

import torch
import triton
import triton.language as tl

from shoal.kernels.gpu.fp8 import as_bytes, to_e4m3
from shoal.kernels.rope_kv_write import HeadNorm

HEADS = 8
"""Heads of one program: 1024 elements of 128 for four warps, 16 bytes a thread in 16-bit types."""


@triton.jit
def load_part(token_ptr, heads, head_stride, start, columns, mask):
    """[HEADS, width] float32: columns start + columns of the heads of one token."""
    return tl.load(token_ptr + heads[:, None] * head_stride + start + columns[None, :], mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit
def norm_weights(q_ptr, k_ptr, is_q, start, columns, mask):
    """[HEADS, width] float32: the queries' weights for queries, the keys' for the other heads."""
    q = tl.load(q_ptr + start + columns[None, :] + 0 * is_q[:, None], mask=mask, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + start + columns[None, :] + 0 * is_q[:, None], mask=mask, other=0.0).to(tl.float32)
    return tl.where(is_q[:, None], q, k)


@triton.jit
def normed(
    x, mean, factor, q_weight, k_weight, q_bias, k_bias, is_q, is_v, start, columns, mask, offset, BIAS: tl.constexpr
):
    """The norm of a part, values untouched."""
    y = (x - mean[:, None]) * factor[:, None] * (norm_weights(q_weight, k_weight, is_q, start, columns, mask) + offset)
    if BIAS:
        y += norm_weights(q_bias, k_bias, is_q, start, columns, mask)
    return tl.where(is_v[:, None], x, y)


@triton.jit
def store_part(
    x, token_ptr, k_ptr, v_ptr, heads, kv_heads, head_stride, size, start, columns, mask, is_q, is_v, cached,
    FP8: tl.constexpr,
):  # fmt: skip
    """Queries back to their place, keys and values, if cached, to the slot's. k_ptr, v_ptr: of its first element."""
    q_at = token_ptr + heads[:, None] * head_stride + start + columns[None, :]
    tl.store(q_at, x.to(token_ptr.dtype.element_ty), mask=mask & is_q[:, None])
    if FP8:
        stored = to_e4m3(x)
    else:
        stored = x.to(k_ptr.dtype.element_ty)
    offset = kv_heads[:, None] * size + start + columns[None, :]
    tl.store(k_ptr + offset, stored, mask=mask & (cached & ~is_q & ~is_v)[:, None])
    tl.store(v_ptr + offset, stored, mask=mask & (cached & is_v)[:, None])


@triton.jit
def rope_kv_write_kernel(
    heads_ptr,
    cos_sin_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_bias_ptr,
    k_bias_ptr,
    k_scale_ptr,
    v_scale_ptr,
    num_q,
    num_kv,
    size,
    half,
    token_stride,
    head_stride,
    eps,
    unit_offset,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    FP8: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """HEADS heads of a token. BLOCK_HALF 0: no rotary positions; BLOCK_REST 0: the whole head rotates. NORM: 0 none, 1
    RMSNorm, 2 LayerNorm.
    """
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    valid = (heads < num_q + 2 * num_kv)[:, None]
    is_q = heads < num_q
    is_v = heads >= num_q + num_kv
    kv_heads = tl.where(is_v, heads - num_q - num_kv, heads - num_q)
    token_ptr = heads_ptr + token * token_stride
    slot = tl.load(slots_ptr + token)
    cached = slot >= 0
    cache_offset = slot * num_kv * size
    k_ptr = k_cache_ptr + cache_offset
    v_ptr = v_cache_ptr + cache_offset
    if FP8:
        held = (heads >= num_q) & (heads < num_q + 2 * num_kv)
        k_scale = tl.load(k_scale_ptr + kv_heads, mask=held & ~is_v, other=1.0)
        scale = k_scale * tl.load(v_scale_ptr + kv_heads, mask=held & is_v, other=1.0)

    total = tl.zeros((HEADS,), tl.float32)
    if BLOCK_HALF > 0:
        pairs = tl.arange(0, BLOCK_HALF)
        half_mask = valid & (pairs < half)[None, :]
        first = load_part(token_ptr, heads, head_stride, 0, pairs, half_mask)
        second = load_part(token_ptr, heads, head_stride, half, pairs, half_mask)
        total += tl.sum(first, axis=1) + tl.sum(second, axis=1)
    if BLOCK_REST > 0:
        others = tl.arange(0, BLOCK_REST)
        rest_mask = valid & (others < size - 2 * half)[None, :]
        rest = load_part(token_ptr, heads, head_stride, 2 * half, others, rest_mask)
        total += tl.sum(rest, axis=1)

    if NORM > 0:
        mean = total / size if NORM == 2 else total * 0.0
        squares = tl.zeros((HEADS,), tl.float32)
        if BLOCK_HALF > 0:
            a = tl.where(half_mask, first - mean[:, None], 0.0)
            b = tl.where(half_mask, second - mean[:, None], 0.0)
            squares += tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)
        if BLOCK_REST > 0:
            c = tl.where(rest_mask, rest - mean[:, None], 0.0)
            squares += tl.sum(c * c, axis=1)
        factor = 1.0 / tl.sqrt_rn(squares / size + eps)
        if BLOCK_HALF > 0:
            first = normed(
                first, mean, factor, q_weight_ptr, k_weight_ptr, q_bias_ptr, k_bias_ptr, is_q, is_v, 0, pairs,
                half_mask, unit_offset, BIAS,
            )  # fmt: skip
            second = normed(
                second, mean, factor, q_weight_ptr, k_weight_ptr, q_bias_ptr, k_bias_ptr, is_q, is_v, half, pairs,
                half_mask, unit_offset, BIAS,
            )  # fmt: skip
        if BLOCK_REST > 0:
            rest = normed(
                rest, mean, factor, q_weight_ptr, k_weight_ptr, q_bias_ptr, k_bias_ptr, is_q, is_v, 2 * half, others,
                rest_mask, unit_offset, BIAS,
            )  # fmt: skip

    if BLOCK_HALF > 0:
        angles = cos_sin_ptr + token * 2 * half + pairs
        cos = tl.where(is_v[:, None], 1.0, tl.load(angles, mask=pairs < half, other=0.0)[None, :])
        sin = tl.where(is_v[:, None], 0.0, tl.load(angles + half, mask=pairs < half, other=0.0)[None, :])
        low = first * cos - second * sin
        high = second * cos + first * sin
        if FP8:
            low = low / scale[:, None]
            high = high / scale[:, None]
        store_part(
            low, token_ptr, k_ptr, v_ptr, heads, kv_heads, head_stride, size, 0, pairs, half_mask, is_q, is_v,
            cached, FP8,
        )  # fmt: skip
        store_part(
            high, token_ptr, k_ptr, v_ptr, heads, kv_heads, head_stride, size, half, pairs, half_mask, is_q, is_v,
            cached, FP8,
        )  # fmt: skip
    if BLOCK_REST > 0:
        if FP8:
            rest = rest / scale[:, None]
        store_part(
            rest, token_ptr, k_ptr, v_ptr, heads, kv_heads, head_stride, size, 2 * half, others, rest_mask,
            is_q, is_v, cached, FP8,
        )  # fmt: skip


def launch_rope_kv_write(
    heads: torch.Tensor,
    num_q: int,
    num_kv: int,
    norm: HeadNorm | None,
    cos_sin: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """In place; see above. cos_sin: [num_tokens, rotary_dim] float32, contiguous, or None; caches: [num_blocks,
    block_size, num_kv, head_dim], contiguous; slots: [num_tokens] int64, negative for tokens that are not cached.
    kv_scales: for FP8 caches, of keys and of values, [num_kv] float32 each.
    """
    num_tokens, count, size = heads.shape
    assert count == num_q + 2 * num_kv and heads.stride(2) == 1 and slots.is_contiguous()
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and k_cache.shape[2:] == (num_kv, size)
    half = 0 if cos_sin is None else cos_sin.shape[1] // 2
    rest = size - 2 * half
    fp8 = k_cache.dtype == torch.float8_e4m3fn
    assert fp8 == (kv_scales is not None) and (fp8 or k_cache.dtype == heads.dtype)
    k_scale, v_scale = kv_scales or (heads, heads)
    if num_tokens == 0:
        return
    biased = norm is not None and norm.q_bias is not None
    rope_kv_write_kernel[(num_tokens, triton.cdiv(count, HEADS))](
        heads,
        heads if cos_sin is None else cos_sin,
        as_bytes(k_cache) if fp8 else k_cache,
        as_bytes(v_cache) if fp8 else v_cache,
        slots,
        heads if norm is None else norm.q_weight,
        heads if norm is None else norm.k_weight,
        norm.q_bias if norm is not None and biased else heads,
        norm.k_bias if norm is not None and biased else heads,
        k_scale,
        v_scale,
        num_q,
        num_kv,
        size,
        half,
        heads.stride(0),
        heads.stride(1),
        0.0 if norm is None else norm.eps,
        1.0 if norm is not None and norm.unit_offset else 0.0,
        NORM=0 if norm is None else 2 if norm.layer else 1,
        BIAS=biased,
        FP8=fp8,
        HEADS=HEADS,
        BLOCK_HALF=triton.next_power_of_2(half) if half else 0,
        BLOCK_REST=triton.next_power_of_2(rest) if rest else 0,
        num_warps=4,
    )
