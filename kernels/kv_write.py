"""Write new keys and values into the paged cache: row t of each goes to the cache's token slot slot_mapping[t]."""

import torch

from shoal.kernels.build import native_library
from shoal.kernels.fp8_linear import to_codes
from shoal.kernels.native_types import INT64, POINTER

_PROTOTYPE = (POINTER, INT64, POINTER, INT64, POINTER, POINTER, POINTER, INT64, INT64)


def kv_write_reference(
    keys_TKD: torch.Tensor,
    values_TKD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping_T: torch.Tensor,
) -> None:
    """One token after the other, in place."""
    block_size = k_cache.shape[1]
    for token, slot in enumerate(slot_mapping_T.tolist()):
        k_cache[slot // block_size, slot % block_size] = keys_TKD[token]
        v_cache[slot // block_size, slot % block_size] = values_TKD[token]


def kv_write(
    keys_TKD: torch.Tensor,
    values_TKD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping_T: torch.Tensor,
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Scatter into the caches in place.

    keys, values: [num_tokens, num_kv_heads, head_dim], the last two dimensions contiguous (a slice of the fused
    projection will do); caches: [num_blocks, block_size, num_kv_heads, head_dim], contiguous, of the same dtype, or
    float8_e4m3fn with kv_scales, [num_kv_heads] float32 of keys and of values, by which they are divided; slot_mapping:
    [num_tokens] int64, block * block_size + offset, all different.
    """
    if kv_scales is not None:
        assert k_cache.dtype == v_cache.dtype == torch.float8_e4m3fn
        keys_TKD, values_TKD = (
            to_codes(x.float() / scale[:, None]).view(torch.uint8)
            for x, scale in zip((keys_TKD, values_TKD), kv_scales, strict=True)
        )
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and keys_TKD.dtype == values_TKD.dtype == k_cache.dtype
    num_tokens, num_kv_heads, head_dim = keys_TKD.shape
    library = native_library() if keys_TKD.is_cpu else None
    dense = keys_TKD.stride()[1:] == (head_dim, 1) == values_TKD.stride()[1:]
    if library is None or not dense or not slot_mapping_T.is_contiguous():
        k_cache.view(-1, num_kv_heads, head_dim).index_copy_(0, slot_mapping_T, keys_TKD)
        v_cache.view(-1, num_kv_heads, head_dim).index_copy_(0, slot_mapping_T, values_TKD)
        return
    size = keys_TKD.element_size()
    library.function("shoal_kv_write", _PROTOTYPE)(
        keys_TKD.data_ptr(),
        keys_TKD.stride()[0] * size,
        values_TKD.data_ptr(),
        values_TKD.stride()[0] * size,
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        slot_mapping_T.data_ptr(),
        num_tokens,
        num_kv_heads * head_dim * size,
    )
