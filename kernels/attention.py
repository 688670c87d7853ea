"""Paged attention: ragged rows of queries against keys and values in blocks (arXiv:2309.06180), online softmax
(arXiv:2205.14135).

    s_j = softcap * tanh(scale q.k_j / softcap)    o = sum_j exp(s_j) v_j / (sum_j exp(s_j) + exp(sink))

over the keys j <= p of the query's row, j > p - window. Without softcap s_j = scale q.k_j; without sinks that term
is absent. Shapes: T tokens, H query heads, K key/value heads, D head_dim, R rows, L keys of a row, B blocks per row.
Nothing beyond a row's keys or before every query's window is read: those blocks may be free, or another request's.

The C kernel (kernels/native/attention.c) computes every (query, head) in an order that the query's position alone
decides, and finds by itself which rows of one query begin in the same blocks. In torch that order takes elementwise
products instead of matrix products, so only `deterministic` asks for it.
"""

import functools

import torch

from shoal.kernels.build import NativeLibrary, native_library
from shoal.kernels.device import on_gpu
from shoal.kernels.native_types import DTYPE_CODES, FLOAT, INT, INT64, POINTER, takes_native

TILE = 64  # keys of a tile of the deterministic path, anchored at position 0
PRODUCT_ELEMENTS = 1 << 22  # most elements of an intermediate tensor of the torch paths
_PROTOTYPE = (INT, POINTER, INT64, POINTER, POINTER, POINTER, INT64, POINTER, POINTER, INT64, POINTER, POINTER, POINTER,
              INT64, INT64, INT64, INT64, FLOAT, INT64, FLOAT)  # fmt: skip


@functools.cache
def uniform_map(num_heads: int, num_kv_heads: int, device: torch.device) -> torch.Tensor:
    """The plain grouped-query map: query head h reads key/value head h // (num_heads / num_kv_heads). [num_heads]
    int32.
    """
    return torch.arange(num_heads, dtype=torch.int32, device=device) // (num_heads // num_kv_heads)


def scale_per_head(scales: torch.Tensor | None, num_kv_heads: int, device: torch.device) -> torch.Tensor:
    """The scales of a cache for every key/value head: [num_kv_heads] float32; ones without scales."""
    if scales is None:
        return torch.ones(num_kv_heads, device=device)
    return scales.float().reshape(-1).expand(num_kv_heads)


def paged_attention_reference(
    q_THD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table_RB: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    q_to_kv: torch.Tensor | None = None,
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """One query and head after the other. Arguments as paged_attention's. Returns float32 [num_tokens, num_heads,
    head_dim].
    """
    block_size, num_kv_heads = k_cache.shape[1:3]
    heads = uniform_map(q_THD.shape[1], num_kv_heads, q_THD.device) if q_to_kv is None else q_to_kv
    out = torch.zeros(q_THD.shape, dtype=torch.float32, device=q_THD.device)
    k_scales, v_scales = (scale_per_head(scales, num_kv_heads, q_THD.device) for scales in kv_scales or (None, None))
    for row, length in enumerate(seq_lens.tolist()):
        start, stop = int(cu_seqlens_q[row]), int(cu_seqlens_q[row + 1])
        for token in range(start, stop):
            position = length - stop + token
            first = 0 if window is None else max(0, position - window + 1)
            slots = [(int(block_table_RB[row, j // block_size]), j % block_size) for j in range(first, position + 1)]
            for head, kv in enumerate(heads.tolist()):
                keys = torch.stack([k_cache[block, offset, kv] for block, offset in slots]).float() * k_scales[kv]
                values = torch.stack([v_cache[block, offset, kv] for block, offset in slots]).float() * v_scales[kv]
                scores = keys @ q_THD[token, head].float() * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                terms = scores if sinks is None else torch.cat([scores, sinks[head : head + 1].float()])
                weights = torch.softmax(terms, dim=0)[: len(slots)]
                out[token, head] = weights @ values
    return out


class _Torch:
    """The torch paths: everything of one call, in float32. Rows are handled in slices of equal query length."""

    def __init__(
        self,
        q_THD: torch.Tensor,
        caches: tuple[torch.Tensor, torch.Tensor],
        block_table_RB: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
        q_to_kv: torch.Tensor,
        kv_scales: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        self.q_THD, self.table, self.block_size = q_THD, block_table_RB.long(), caches[0].shape[1]
        self.k_flat, self.v_flat = (cache.flatten(0, 1) for cache in caches)
        self.scale, self.window, self.softcap, self.heads = scale, window, softcap, q_to_kv.long()
        self.sinks = None if sinks is None else sinks.float()
        self.kv_scales = None
        if kv_scales is not None:
            k_scales, v_scales = (scale_per_head(each, caches[0].shape[2], q_THD.device) for each in kv_scales)
            self.kv_scales = k_scales[self.heads, None], v_scales[self.heads, None]

    def gather(self, rows: torch.Tensor, positions_GL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of positions of rows, expanded to query heads: two float32 [rows, keys, num_heads,
        head_dim].
        """
        blocks = self.table[rows].gather(1, positions_GL // self.block_size)
        slots = blocks * self.block_size + positions_GL % self.block_size
        keys, values = self.k_flat[slots][:, :, self.heads].float(), self.v_flat[slots][:, :, self.heads].float()
        return (keys, values) if self.kv_scales is None else (keys * self.kv_scales[0], values * self.kv_scales[1])

    def shape_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """Scale and soft cap."""
        scores = scores * self.scale
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def mask(self, q_positions: torch.Tensor, k_positions: torch.Tensor) -> torch.Tensor:
        """Which keys ([..., L]) a query ([..., Q]) sees: [..., Q, L]."""
        distance = q_positions[..., :, None] - k_positions[..., None, :]
        return (distance >= 0) if self.window is None else (distance >= 0) & (distance < self.window)

    def rows(self, rows: list[int], starts: list[int], lengths: list[int], count: int) -> torch.Tensor:
        """Rows of `count` queries each, padded to the longest. Padding repeats a key the row has. Returns [rows,
        count, H, D].
        """
        device = self.q_THD.device
        first = [0 if self.window is None else max(0, length - count - self.window + 1) for length in lengths]
        extent = max(length - begin for length, begin in zip(lengths, first))
        length_G1, first_G1 = (torch.tensor(numbers, device=device)[:, None] for numbers in (lengths, first))
        k_positions = first_G1 + torch.arange(extent, device=device)
        q_index = torch.tensor(starts, device=device)[:, None] + torch.arange(count, device=device)
        q_positions = length_G1 - count + torch.arange(count, device=device)
        visible = self.mask(q_positions, k_positions)[:, None]
        keys, values = self.gather(torch.tensor(rows, device=device), torch.minimum(k_positions, length_G1 - 1))
        queries = self.q_THD[q_index].float()
        scores = self.shape_scores(queries.transpose(1, 2) @ keys.permute(0, 2, 3, 1))
        scores = scores.masked_fill(~visible, float("-inf"))
        if self.sinks is not None:
            sinks = self.sinks[None, :, None, None].expand(*scores.shape[:3], 1)
            weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
        else:
            weights = torch.softmax(scores, dim=-1)
        return (weights @ values.transpose(1, 2)).transpose(1, 2)

    def tiles(self, row: int, start: int, stop: int, length: int) -> torch.Tensor:
        """Queries [start, stop) of the batch, all of one row of `length` keys, in one order of sums per query.
        Returns [queries, H, D].
        """
        device = self.q_THD.device
        queries, last = self.q_THD[start:stop].float(), length - 1
        count, num_heads = queries.shape[:2]
        q_positions = torch.arange(length - count, length, device=device)
        out = torch.zeros_like(queries)
        largest = torch.full((count, num_heads, 1), float("-inf"), device=device)
        total = torch.zeros(count, num_heads, 1, device=device)
        oldest = 0 if self.window is None else max(0, length - count - self.window + 1)
        which = torch.tensor([row], device=device)
        for base in range(oldest // TILE * TILE, length, TILE):
            k_positions = torch.arange(base, base + TILE, device=device)
            keys, values = self.gather(which, k_positions.clamp(oldest, last)[None])
            keys, values = keys[0].transpose(0, 1).contiguous(), values[0].transpose(0, 1).contiguous()  # [H, TILE, D]
            visible = self.mask(q_positions, k_positions)[:, None]
            scores = self.shape_scores((queries[:, :, None] * keys).sum(-1)).masked_fill(~visible, float("-inf"))
            top = torch.maximum(largest, scores.amax(-1, keepdim=True))
            shift = top.masked_fill(top == float("-inf"), 0.0)  # no key of this tile is seen
            weights, factor = torch.exp(scores - shift), torch.exp(largest - shift)
            total = total * factor + weights.sum(-1, keepdim=True)
            products = (weights[..., None] * values).masked_fill_(
                ~visible[..., None], 0.0
            )  # 0 times an overflow is NaN
            out = out * factor + products.sum(-2)
            largest = top
        if self.sinks is not None:
            sinks = self.sinks[None, :, None]
            top = torch.maximum(largest, sinks)
            factor = torch.exp(largest - top)
            out, total = out * factor, total * factor + torch.exp(sinks - top)
        return out / total

    def run(self, cu_seqlens_q: list[int], seq_lens: list[int], deterministic: bool, out: torch.Tensor) -> None:
        """All rows into out: decode rows together, others one by one; the deterministic way row by row in runs of
        queries.
        """
        num_heads, dim = self.q_THD.shape[1:]
        single: list[int] = []
        for row, length in enumerate(seq_lens):
            start, stop = cu_seqlens_q[row], cu_seqlens_q[row + 1]
            if deterministic:
                run = max(1, PRODUCT_ELEMENTS // (num_heads * TILE * dim))
                for first in range(start, stop, run):
                    last = min(first + run, stop)
                    out[first:last] = self.tiles(row, first, last, length - stop + last)
            elif stop - start == 1:
                single.append(row)
            elif stop > start:
                run = max(1, PRODUCT_ELEMENTS // (num_heads * length))
                for first in range(start, stop, run):
                    last = min(first + run, stop)
                    out[first:last] = self.rows([row], [first], [length - stop + last], last - first)[0]
        single.sort(key=lambda row: seq_lens[row])
        while single:
            longest = seq_lens[single[-1]]
            group = single[-max(1, PRODUCT_ELEMENTS // (num_heads * longest * dim)) :]
            del single[-len(group) :]
            starts, lengths = [cu_seqlens_q[row] for row in group], [seq_lens[row] for row in group]
            out[torch.tensor(starts, device=out.device)] = self.rows(group, starts, lengths, 1)[:, 0].to(out.dtype)


def _native(
    library: NativeLibrary,
    q_THD: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    q_to_kv: torch.Tensor,
    out: torch.Tensor,
) -> None:
    block_table, cu_seqlens_q, seq_lens = tables
    assert block_table.dtype == cu_seqlens_q.dtype == seq_lens.dtype == q_to_kv.dtype == torch.int32
    assert cu_seqlens_q.is_contiguous() and seq_lens.is_contiguous() and block_table.stride()[-1] == 1
    _, block_size, num_kv_heads, head_dim = caches[0].shape
    sink_values = None if sinks is None else sinks.float().contiguous()
    status = library.function("shoal_paged_attention", _PROTOTYPE, INT)(
        DTYPE_CODES[q_THD.dtype], q_THD.data_ptr(), q_THD.stride()[0], caches[0].data_ptr(), caches[1].data_ptr(),
        block_table.data_ptr(), block_table.stride()[0], cu_seqlens_q.data_ptr(), seq_lens.data_ptr(), len(seq_lens),
        q_to_kv.data_ptr(), None if sink_values is None else sink_values.data_ptr(), out.data_ptr(), q_THD.shape[1],
        num_kv_heads, head_dim, block_size, scale, window or 0, softcap or 0.0,
    )  # fmt: skip
    if status:
        raise MemoryError(f"no memory for the scratch of attention over {q_THD.shape[0]} tokens")


def paged_attention(
    q_THD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table_RB: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    q_to_kv: torch.Tensor | None = None,
    group_size: int | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    shared_keys: int = 0,
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    deterministic: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the batch's queries, whose own keys and values are in the cache already.

    q: [num_tokens, num_heads, head_dim], the last two dimensions contiguous; caches: [num_blocks, block_size,
    num_kv_heads, head_dim], contiguous, of q's dtype, or float8_e4m3fn with kv_scales; block_table: [num_rows,
    max_blocks] int32; cu_seqlens_q: [num_rows + 1] int32, row r's queries are [cu[r], cu[r + 1]); seq_lens: [num_rows]
    int32, keys of a row, whose last queries these are. window: keys a query sees, itself included; sinks: [num_heads];
    q_to_kv: [num_heads] int32, the key/value head of every query head, never falling (default: equal consecutive
    groups), and group_size the most query heads of one. kv_scales: of keys and of values, float32, one number or
    [num_kv_heads]: what the cache's elements are multiplied by. deterministic: a query's result has one order of sums
    whatever the batch and the chunk. out: contiguous, of q's shape and dtype. Returns out, or a new [num_tokens,
    num_heads, head_dim].

    For GPUs, where reading these numbers would wait for the device: max_seqlen_q, max_seqlen_k: at least the most
    queries and keys of a row; shared_keys: so many first keys, which every query sees, are in the same blocks for all
    rows, and may be read once for all.
    """
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and k_cache.shape == v_cache.shape
    assert q_THD.shape[2] == k_cache.shape[3] and k_cache.dtype == v_cache.dtype
    assert k_cache.dtype == (q_THD.dtype if kv_scales is None else torch.float8_e4m3fn), (q_THD.dtype, k_cache.dtype)
    result = torch.empty_like(q_THD, memory_format=torch.contiguous_format) if out is None else out
    if on_gpu(q_THD):
        from shoal.kernels.gpu.attention import launch_attention

        return launch_attention(
            q_THD, k_cache, v_cache, block_table_RB, cu_seqlens_q, seq_lens, scale=scale, out=result, window=window,
            softcap=softcap, sinks=sinks, q_to_kv=q_to_kv, group_size=group_size, deterministic=deterministic,
            max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, shared_keys=shared_keys, kv_scales=kv_scales,
        )  # fmt: skip
    heads = uniform_map(q_THD.shape[1], k_cache.shape[2], q_THD.device) if q_to_kv is None else q_to_kv
    library = native_library() if q_THD.is_cpu and kv_scales is None else None
    if library is not None and takes_native(q_THD) and q_THD.stride()[1] == q_THD.shape[2]:
        tables = block_table_RB, cu_seqlens_q, seq_lens
        _native(library, q_THD, (k_cache, v_cache), tables, scale, window, softcap, sinks, heads, result)
        return result
    paths = _Torch(q_THD, (k_cache, v_cache), block_table_RB, scale, window, softcap, sinks, heads, kv_scales)
    paths.run(cu_seqlens_q.tolist(), seq_lens.tolist(), deterministic, result)
    return result
