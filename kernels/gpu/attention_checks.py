"""Checks of paged attention: decode, prefill, chunks and mixed steps over head sizes, block sizes and options."""

from collections.abc import Iterator
from typing import Any

import torch

from shoal.kernels.attention import scale_per_head
from shoal.kernels.gpu.attention import launch_attention
from shoal.kernels.gpu.checks import Budget, Case, Outputs, Scale, Trial

Rows = list[tuple[int, int]]
"""Queries and keys of every row."""


class Inputs:
    """A paged batch: shuffled blocks, NaN in everything nobody may read."""

    def __init__(
        self,
        rows: Rows,
        heads: tuple[int, int],
        dim: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        fp8: bool = False,
        uneven: bool = False,
        sinks: bool = False,
        shared: int = 0,
        **options: Any,
    ) -> None:
        self.rows, self.options = rows, options
        self.keys = [torch.randn(k, heads[1], dim, device=device).to(dtype) for _, k in rows]
        self.values = [torch.randn(k, heads[1], dim, device=device).to(dtype) for _, k in rows]
        if fp8:
            self.keys, self.values = (
                [part.to(torch.float8_e4m3fn) for part in parts] for parts in (self.keys, self.values)
            )
        self.shared = shared // block_size * block_size
        for index in range(1, len(rows) if self.shared else 1):
            self.keys[index][: self.shared] = self.keys[0][: self.shared]
            self.values[index][: self.shared] = self.values[0][: self.shared]
        self.queries = torch.randn(sum(q for q, _ in rows), heads[0], dim, device=device).to(dtype)
        self.cu = torch.tensor([0, *(q for q, _ in rows)], device=device).cumsum(0).to(torch.int32)
        self.lens = torch.tensor([k for _, k in rows], dtype=torch.int32, device=device)
        k_scales, v_scales = (torch.rand(heads[1], device=device) + 0.5 for _ in range(2))
        self.scales = (k_scales, v_scales) if fp8 else None
        cut = max(1, heads[1] // 2)
        owners = [min(head // (1 + heads[0] // heads[1]), heads[1] - 1) for head in range(heads[0])]
        self.owners = owners if uneven else [head * heads[1] // heads[0] for head in range(heads[0])]
        self.map = torch.tensor(owners, dtype=torch.int32, device=device) if uneven else None
        self.sinks = torch.randn(heads[0], device=device) * cut if sinks else None
        self._fill(block_size, device)

    def _fill(self, block_size: int, device: torch.device) -> None:
        needs = [-(-k // block_size) for _, k in self.rows]
        num_shared = self.shared // block_size
        order = torch.randperm(sum(needs) + 3, device=device).to(torch.int32)
        shape = (len(order), block_size, *self.keys[0].shape[1:])
        self.table = torch.full((len(needs), max(needs) + 1), -1, dtype=torch.int32, device=device)
        self.caches = tuple(torch.full(shape, float("nan"), device=device).to(self.keys[0].dtype) for _ in range(2))
        window, used = self.options.get("window"), 0
        for row, ((q, k), need) in enumerate(zip(self.rows, needs, strict=True)):
            self.table[row, :need] = order[used : used + need]
            used += need
            self.table[row, :num_shared] = self.table[0, :num_shared]
            first = 0 if window is None else max(0, k - q - window + 1)
            positions = torch.arange(first, k, device=device)
            blocks = self.table[row, positions // block_size].long()
            for cache, parts in zip(self.caches, (self.keys, self.values), strict=True):
                as_bytes = cache.view(torch.uint8)  # index_put knows few 8-bit types
                as_bytes[blocks, positions % block_size] = parts[row][first:].view(torch.uint8)
            self.table[row, : first // block_size] = -1

    def kernel(self) -> Outputs:
        """The Triton kernel."""
        q = self.queries
        k_cache, v_cache = self.caches
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        launch_attention(
            q, k_cache, v_cache, self.table, self.cu, self.lens, scale=q.shape[2] ** -0.5, out=out, q_to_kv=self.map,
            sinks=self.sinks, group_size=max(self.owners.count(kv) for kv in set(self.owners)), kv_scales=self.scales,
            max_seqlen_q=max(q for q, _ in self.rows), max_seqlen_k=max(k for _, k in self.rows),
            shared_keys=self.shared, **self.options,
        )  # fmt: skip
        return (out,)

    def torch_way(self, exact: bool) -> Outputs:
        """Row by row: products in float64 (exact), or in the inputs' own type as plain torch would."""
        return (torch.cat([self._row(index, exact) for index in range(len(self.rows))]),)

    def _row(self, index: int, exact: bool) -> torch.Tensor:
        (count, length), start = self.rows[index], int(self.cu[index])
        kind = torch.float64 if exact else self.queries.dtype
        q = self.queries[start : start + count].to(kind).transpose(0, 1)
        keys, values = (
            (parts[index].float() * scale_per_head(scales, parts[index].shape[1], q.device)[:, None]).to(kind)
            for parts, scales in zip((self.keys, self.values), self.scales or (None, None), strict=True)
        )
        scores = (q @ keys[:, self.owners].permute(1, 2, 0)).to(torch.float64 if exact else torch.float32)
        scores = scores * q.shape[2] ** -0.5
        softcap, window = self.options.get("softcap"), self.options.get("window")
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = (length - count + torch.arange(count, device=q.device))[:, None] - torch.arange(
            length, device=q.device
        )
        hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
        scores = scores.masked_fill(hidden, float("-inf"))
        if self.sinks is not None:
            sinks = self.sinks.to(scores.dtype)[:, None, None].expand(-1, count, 1)
            scores = torch.cat([scores, sinks], -1)
        weights = torch.softmax(scores, -1)[..., :length].to(kind)
        return (weights @ values[:, self.owners].transpose(0, 1)).transpose(0, 1)

    def work(self) -> tuple[int, int]:
        """Bytes and FLOPs that cannot be avoided: queries, visible keys and values once per row, outputs."""
        window = self.options.get("window")
        element, (_, num_kv_heads, dim) = self.keys[0].element_size(), self.keys[0].shape
        seen = [k if window is None else min(k, q + window - 1) for q, k in self.rows]
        pairs = sum(q * (2 * (k if window is None else min(k, window + q)) - q) // 2 for q, k in self.rows)
        shared = self.shared * (len(self.rows) - 1)
        moved = 2 * (sum(seen) - shared) * num_kv_heads * dim * element
        moved += 2 * self.queries.numel() * self.queries.element_size()
        return moved, 4 * pairs * self.queries.shape[1] * dim


def case(
    name: str,
    rows: Rows,
    heads: tuple[int, int] = (8, 2),
    dim: int = 128,
    block_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    budget: Budget | None = None,
    measured: bool = False,
    **options: Any,
) -> Case:
    """One Case; options as launch_attention's, or fp8, uneven, sinks, shared."""

    def make(device: torch.device) -> Trial:
        inputs = Inputs(rows, heads, dim, block_size, dtype, device, **options)
        moved, flops = inputs.work()
        return Trial(
            run=inputs.kernel,
            reference=lambda: inputs.torch_way(True),
            plain=lambda: inputs.torch_way(False),
            bytes_moved=moved,
            flops=flops,
        )

    return Case(kernel="attention", name=name, dtype=dtype, make=make, budget=budget, measured=measured)


MIXED: Rows = [(1, 1), (3, 3), (9, 40), (1, 131), (2, 65)]
FEW_SPILLS = Budget(spill_bytes=64)


def cases(scale: Scale) -> Iterator[Case]:
    """tiny: what the interpreter does in seconds, in float16 and float32; full: those, and a grid for GPUs."""
    for dtype in (torch.float32, torch.float16):
        kind = str(dtype).removeprefix("torch.")
        yield case(f"mixed {kind}", MIXED, (6, 2), 16, 5, dtype)
        yield case(f"uneven heads, sinks, window, soft cap {kind}", MIXED, (6, 2), 24, 16, dtype,
                   uneven=True, sinks=True, window=9, softcap=3.0)  # fmt: skip
    yield case("fp8 cache float16", [(1, 70), (12, 20)], (4, 2), 16, 8, torch.float16, fp8=True)
    yield case("shared prefix float16", [(1, 90), (2, 80)], (4, 2), 16, 8, torch.float16, shared=64)
    yield case("deterministic float16", [(1, 70), (12, 20)], (4, 2), 16, 8, torch.float16, deterministic=True)
    if scale == "full":
        yield from full_cases()
        yield from measured_cases()


def full_cases() -> Iterator[Case]:
    """Correctness over shapes; some of them compiled in reports."""
    chunks: Rows = [(1, 700), (1, 33), (129, 129), (1, 2500), (200, 1111), (7, 7), (4, 900)]
    decode: Rows = [(1, 1 + 97 * index) for index in range(24)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        kind = str(dtype).removeprefix("torch.")
        for dim in (64, 80, 96, 112, 128, 192, 256):
            yield case(f"chunks d{dim} {kind}", chunks, dim=dim, dtype=dtype)
            yield case(f"decode d{dim} {kind}", decode, dim=dim, dtype=dtype)
        for block_size in (1, 5, 32, 64, 128, 256):
            yield case(f"chunks, blocks of {block_size} {kind}", chunks, block_size=block_size, dtype=dtype)
        for name, options in OPTIONS.items():
            yield case(f"chunks, {name} {kind}", chunks, dtype=dtype, **options)
            yield case(f"decode, {name} {kind}", decode, dtype=dtype, **options)
        yield case(f"one key/value head for 71 {kind}", chunks, (71, 1), 64, dtype=dtype)
        yield case(f"28 heads on 4 {kind}", chunks, (28, 4), dtype=dtype)
        shared: Rows = [(1, 1100 + 50 * index) for index in range(16)]
        yield case(f"shared prefix {kind}", shared, dtype=dtype, shared=1024)


OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window": 300},
    "soft cap": {"softcap": 30.0},
    "sinks": {"sinks": True},
    "uneven heads": {"uneven": True},
    "fp8 cache": {"fp8": True},
    "deterministic": {"deterministic": True},
    "deterministic, window, sinks": {"deterministic": True, "window": 300, "sinks": True},
}


def measured_cases() -> Iterator[Case]:
    """Shapes of Llama-3-8B (32 heads on 8) and neighbours: timed on a card, compiled and held to budgets without."""
    decode: Rows = [(1, 4096)] * 32
    for dim in (64, 128, 256):
        yield case(f"decode 32 x 4096 d{dim}", decode, (32, 8), dim, budget=Budget(), measured=True)
        yield case(f"prefill 1 x 2048 d{dim}", [(2048, 2048)], (32, 8), dim, budget=FEW_SPILLS, measured=True)
    yield case("decode 1 x 8192", [(1, 8192)], (32, 8), measured=True)
    yield case("decode 32 x 4096 fp8", decode, (32, 8), fp8=True, budget=Budget(), measured=True)
    yield case("prefill 1 x 2048 fp8", [(2048, 2048)], (32, 8), fp8=True, budget=Budget(), measured=True)
    yield case("decode 32 x 4096 deterministic", decode, (32, 8), deterministic=True, budget=FEW_SPILLS, measured=True)
    yield case("prefill 1 x 2048 deterministic", [(2048, 2048)], (32, 8), deterministic=True, measured=True)
    yield case("decode 32 x 4096 window 1024", decode, (32, 8), window=1024, budget=Budget(), measured=True)
    yield case("decode 32 x 4096 blocks of 64", decode, (32, 8), block_size=64, budget=Budget(), measured=True)
    yield case("prefill 1 x 2048 blocks of 64", [(2048, 2048)], (32, 8), block_size=64, budget=Budget(), measured=True)
    yield case("shared 4096 of 32 x 4352", [(1, 4352)] * 32, (32, 8), shared=4096, measured=True)
    yield case("prefill 1 x 512 d128 float32", [(512, 512)], (32, 8), dtype=torch.float32, budget=FEW_SPILLS,
               measured=True)  # fmt: skip
