"""Paged FlashAttention on a GPU: how the kernels of attention_kernel.py are configured, split and launched.

Shapes and formula: kernels/attention.py. Nothing here waits for the device: grids come from shapes and from the upper
bounds max_seqlen_q and max_seqlen_k. A call is one pass over the batch, or several:

- prefill rows, and rows of few queries (decode) in smaller tiles, whose keys are split over programs when there are too
  few rows to fill the device. Splits leave partial results, which are folded in their order.
- rows that share a leading run of blocks (cascade attention): one pass in which all queries read those keys once, one
  over what follows, folded like splits.

deterministic: one tile shape, and cuts at multiples of SEGMENT_KEYS alone; whether a row's segments are computed by one
program or by many has no influence on any bit, so that is still chosen by load.
"""

import functools
from typing import NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from shoal.kernels.gpu.attention_kernel import attention_kernel, merge_kernel

DECODE_QUERIES = 8  # rows of at most so many queries are decoded
SEGMENT_KEYS = 512
SCRATCH_BYTES = 32 << 20  # most bytes of partial results of a call; part of cache.reserve
MIN_SPLIT_KEYS = 256
WAVES = 2  # programs per multiprocessor that splitting aims at
ALL_KEYS = 1 << 30
TMA_CAPABILITY = 90  # Hopper, whose tensor memory accelerator and wgmma want tiles of their own
MERGE_HEADS = 4


class Tiles(NamedTuple):
    """Launch configuration of attention_kernel. rows: (query, head) pairs; keys: of a tile."""

    rows: int
    keys: int
    warps: int
    stages: int


def choose_tiles(dtype: torch.dtype, dim: int, group: int, max_queries: int, deterministic: bool, fp8: bool) -> Tiles:
    """dim: head_dim rounded up to a power of two; group: query heads of a key/value head; max_queries: of a row; fp8:
    the cache.

    Chosen for 99 KiB of shared memory (all of sm_80 and up) and no spills, which docs/kernels.md reports; those of a
    head size of 128 on 9.0 by speed on an H200.
    float32 has no tensor cores here (exact products), so its tiles are small. Decode is bound by reading keys and
    values: 16 rows are the smallest tile of a tensor-core product.
    """
    few = max(16, min(64, triton.next_power_of_2(group * min(max_queries, DECODE_QUERIES))))
    if dtype == torch.float32:
        return Tiles(16, 32 if dim <= 128 else 16, 8, 2)
    if deterministic:
        return Tiles(32, 32, 4, 2)
    if max_queries <= DECODE_QUERIES:
        if dim > 128:
            return Tiles(few, 32, 4, 2)
        return Tiles(few, 64, 4, 3) if fp8 else Tiles(few, 128, 4, 2)
    if dim > 128:
        return Tiles(64, 32, 8, 2)
    if dim <= 64:
        return Tiles(128, 64, 8, 3)
    if capability() >= TMA_CAPABILITY:
        return Tiles(64, 64, 4, 2)
    return Tiles(128, 32 if fp8 else 64, 8, 2)


def capability() -> int:
    """Of the device kernels are launched for: 80, 90, ...; of the interpreter, which does TMA as well, 90."""
    if triton.knobs.runtime.interpret:
        return TMA_CAPABILITY
    return int(triton.runtime.driver.active.get_current_target().arch)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 132 for the CPU, where kernels are interpreted or only compiled."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@functools.lru_cache(maxsize=16)
def one_row(num_tokens: int, num_keys: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cu_seqlens_q and seq_lens of a batch that is one row whose every query sees the first num_keys keys."""
    bounds = torch.arange(0, num_tokens + 1, num_tokens, dtype=torch.int32, device=device)
    return bounds, torch.full((1,), num_keys + num_tokens, dtype=torch.int32, device=device)


@functools.cache
def one_float(device: torch.device) -> torch.Tensor:
    """A float32 tensor for arguments that a kernel does not touch."""
    return torch.zeros(1, device=device)


class Pass(NamedTuple):
    """One launch. queries: rows with a number of queries in this range; keys: the range they see; span: keys of a
    program; splits: programs per tile; late: keys do not begin at 0.
    """

    tiles: Tiles
    queries: tuple[int, int]
    keys: tuple[int, int] = (0, ALL_KEYS)
    span: int = ALL_KEYS
    splits: int = 1
    shared: bool = False

    @property
    def late(self) -> bool:
        """Whether keys do not begin at 0."""
        return self.keys[0] > 0


class _Call:
    """One call: its tensors, and what all of its launches have in common."""

    def __init__(
        self,
        q_THD: torch.Tensor,
        caches: tuple[torch.Tensor, torch.Tensor],
        tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
        q_to_kv: torch.Tensor | None,
        group: int,
        scales: tuple[torch.Tensor, torch.Tensor] | None,
        deterministic: bool,
        out: torch.Tensor,
    ) -> None:
        self.q, self.out = q_THD, out
        self.k_cache, self.v_cache = caches
        self.table, self.cu, self.lens = tables
        self.scale, self.window, self.softcap = scale, window, softcap
        self.sinks = None if sinks is None else sinks.float().contiguous()
        self.map, self.group, self.scales, self.deterministic = q_to_kv, group, scales, deterministic
        self.num_tokens, self.num_heads, self.head_dim = q_THD.shape
        self.block_size, self.num_kv_heads = self.k_cache.shape[1:3]
        self.dim = max(16, triton.next_power_of_2(self.head_dim))
        self.num_rows = self.lens.shape[0]

    def tiles(self, max_queries: int) -> Tiles:
        """For rows of so many queries at most."""
        fp8 = self.scales is not None
        return choose_tiles(self.q.dtype, self.dim, self.group, max_queries, self.deterministic, fp8)

    def programs(self, plan: Pass) -> tuple[int, int]:
        """Tiles (an upper bound), and key/value heads times head tiles."""
        rows = 1 if plan.shared else self.num_rows
        group = min(self.group, plan.tiles.rows)
        return self.num_tokens // (plan.tiles.rows // group) + rows, self.num_kv_heads * -(-self.group // group)

    def split(self, plan: Pass, num_keys: int, num_places: int) -> Pass:
        """The pass with its keys, at most num_keys, divided over as many programs as the device wants and scratch for
        num_places queries allows. Deterministic: into segments, all or none.
        """
        held = num_places * self.num_heads * (self.head_dim + 2) * 4
        most = SCRATCH_BYTES // max(1, held)
        if self.deterministic:
            splits = -(-(num_keys + SEGMENT_KEYS - 1) // SEGMENT_KEYS)
            spread = splits <= most and self.busy(plan) < WAVES * multiprocessors(self.q.device)
            return plan._replace(span=SEGMENT_KEYS, splits=splits) if spread and splits > 1 else plan
        wanted = WAVES * multiprocessors(self.q.device) // max(1, self.busy(plan))
        splits = min(wanted, most, -(-num_keys // MIN_SPLIT_KEYS))
        if splits <= 1:
            return plan
        span = -(-num_keys // (splits * plan.tiles.keys)) * plan.tiles.keys
        return plan._replace(span=span, splits=-(-(num_keys + plan.tiles.keys - 1) // span))

    def busy(self, plan: Pass) -> int:
        """Programs of the pass that have work, about."""
        tiles, heads = self.programs(plan)
        return min(tiles, self.num_rows) * heads if plan.queries[1] <= DECODE_QUERIES else tiles * heads

    def launch(self, plan: Pass, scratch: "_Scratch | None" = None, first_slot: int = 0) -> None:
        """One attention_kernel, into out or into slots of scratch."""
        tiles, heads = self.programs(plan)
        table, cu, lens, num_rows = self.table, self.cu, self.lens, self.num_rows
        if plan.shared:
            (cu, lens), num_rows = one_row(self.num_tokens, plan.keys[1], self.q.device), 1
        unused = one_float(self.q.device)  # of the scratch's type, so that the compiled kernel is the same one
        partial, stats = (unused, unused) if scratch is None else (scratch.partial, scratch.stats)
        k_scale, v_scale, scale_step = self.scale_arguments()
        attention_kernel[(tiles, heads, plan.splits)](
            self.q, self.k_cache, self.v_cache, *self.descriptors(plan.tiles), self.out, partial, stats, table, cu,
            lens, cu if self.map is None else self.map, self.q if self.sinks is None else self.sinks, k_scale, v_scale,
            num_rows, *plan.queries, *plan.keys, self.window or 0, plan.span,
            first_slot, 0 if scratch is None else scratch.num_places, int(scratch is not None and scratch.by_token),
            self.scale, self.softcap or 1.0,
            *self.q.stride()[:2], *self.out.stride()[:2], table.stride(0), *self.k_cache.stride()[:3], scale_step,
            NUM_HEADS=self.num_heads, NUM_KV_HEADS=self.num_kv_heads, HEADS=triton.next_power_of_2(self.num_heads),
            GROUP=min(self.group, plan.tiles.rows), HEAD_TILES=heads // self.num_kv_heads, HEAD_DIM=self.head_dim,
            DIM=self.dim, BLOCK_SIZE=self.block_size, BLOCK_M=plan.tiles.rows, BLOCK_N=plan.tiles.keys,
            SEGMENT=SEGMENT_KEYS, UNIFORM=self.map is None, WINDOWED=self.window is not None,
            CAPPED=self.softcap is not None, HAS_SINKS=self.sinks is not None, LATE=plan.late,
            FP8=self.scales is not None, SEGMENTED=self.deterministic,
            num_warps=plan.tiles.warps, num_stages=plan.tiles.stages,
        )  # fmt: skip

    def descriptors(self, tiles: Tiles) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
        """The caches as TMA sees them, [slots, num_kv_heads * head_dim] in tiles; None where it cannot be used: before
        9.0, and unless a tile lies in one block and its rows are whole powers of two.
        """
        fits = self.block_size % tiles.keys == 0 and self.head_dim == self.dim and not self.deterministic
        if not fits or capability() < TMA_CAPABILITY:
            return None, None
        k_2d, v_2d = (cache.view(-1, self.num_kv_heads * self.head_dim) for cache in (self.k_cache, self.v_cache))
        tile = [tiles.keys, self.head_dim]
        return TensorDescriptor.from_tensor(k_2d, tile), TensorDescriptor.from_tensor(v_2d, tile)

    def merge(self, scratch: "_Scratch", queries: tuple[int, int]) -> None:
        """Fold the slots of scratch into out."""
        _, v_scale, scale_step = self.scale_arguments()
        merge_kernel[(scratch.num_places, -(-self.num_heads // MERGE_HEADS))](
            scratch.partial, scratch.stats, self.out, self.cu, self.cu if self.map is None else self.map,
            self.q if self.sinks is None else self.sinks, v_scale,
            *queries, scratch.num_slots, scratch.num_places, int(scratch.by_token),
            *self.out.stride()[:2], scale_step,
            NUM_HEADS=self.num_heads, NUM_KV_HEADS=self.num_kv_heads, HEAD_DIM=self.head_dim, DIM=self.dim,
            BLOCK_H=MERGE_HEADS, UNIFORM=self.map is None, HAS_SINKS=self.sinks is not None,
            FP8=self.scales is not None, num_warps=4,
        )  # fmt: skip

    def scale_arguments(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Pointers of the cache's scales, and their step per head (0: one for all)."""
        if self.scales is None:
            return self.q, self.q, 0
        return *self.scales, int(self.scales[0].numel() > 1)

    def run(self, plan: Pass, num_keys: int) -> None:
        """A pass over rows of their own keys, split where that helps."""
        max_queries = min(plan.queries[1], self.num_tokens)
        num_places = self.num_rows * max_queries
        plan = self.split(plan, num_keys, num_places)
        if plan.splits == 1:
            self.launch(plan)
            return
        scratch = _Scratch(self, plan.splits, num_places, by_token=False)
        self.launch(plan._replace(queries=(plan.queries[0], max_queries)), scratch)
        self.merge(scratch, (plan.queries[0], max_queries))

    def run_shared(self, shared_keys: int, max_queries: int, num_keys: int) -> None:
        """All queries over the shared keys, then each row over its own, folded."""
        shared = Pass(self.tiles(DECODE_QUERIES + 1), (1, ALL_KEYS), keys=(0, shared_keys), shared=True)
        shared = self.split(shared, shared_keys, 2 * self.num_tokens)
        own = Pass(self.tiles(max_queries), (1, max_queries), keys=(shared_keys, ALL_KEYS))
        own = self.split(own, max(1, num_keys - shared_keys), 2 * self.num_tokens)
        scratch = _Scratch(self, shared.splits + own.splits, self.num_tokens, by_token=True)
        self.launch(shared, scratch)
        self.launch(own, scratch, shared.splits)
        self.merge(scratch, (1, max_queries))


class _Scratch:
    """Partial results. partial: [num_slots, num_places, num_heads, head_dim] float32; stats: [..., 2], m and l.

    by_token: places are tokens of the batch, else row * max_queries + query.
    """

    def __init__(self, call: _Call, num_slots: int, num_places: int, *, by_token: bool) -> None:
        shape, device = (num_slots, num_places, call.num_heads), call.q.device
        self.partial = torch.empty((*shape, call.head_dim), dtype=torch.float32, device=device)
        self.stats = torch.empty((*shape, 2), dtype=torch.float32, device=device)
        self.num_slots, self.num_places, self.by_token = num_slots, num_places, by_token


def launch_attention(
    q_THD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table_RB: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    q_to_kv: torch.Tensor | None = None,
    group_size: int | None = None,
    deterministic: bool = False,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    shared_keys: int = 0,
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """paged_attention's arguments, checked by it. q_to_kv must not fall. Returns out."""
    num_tokens, num_heads, _ = q_THD.shape
    if num_tokens == 0:
        return out
    if kv_scales is not None:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    uniform = q_to_kv is None
    group = num_heads // k_cache.shape[2] if uniform else (group_size or num_heads)
    tables = (block_table_RB, cu_seqlens_q, seq_lens)
    call = _Call(
        q_THD, (k_cache, v_cache), tables, scale, window, softcap, sinks, q_to_kv, group, kv_scales, deterministic, out
    )
    max_queries = num_tokens if max_seqlen_q is None else max_seqlen_q
    num_keys = block_table_RB.shape[1] * k_cache.shape[1] if max_seqlen_k is None else max_seqlen_k
    decodes = max_queries <= DECODE_QUERIES
    if shared_keys and decodes and window is None and not deterministic:
        call.run_shared(shared_keys, max_queries, num_keys)
        return out
    seen = num_keys if window is None else min(num_keys, window + DECODE_QUERIES)
    if decodes:
        call.run(Pass(call.tiles(max_queries), (1, max_queries)), seen)
    elif call.num_rows == 1:
        call.launch(Pass(call.tiles(max_queries), (1, ALL_KEYS)))
    else:
        call.launch(Pass(call.tiles(max_queries), (2, ALL_KEYS)))
        call.run(Pass(call.tiles(1), (1, 1)), seen)
    return out
