"""Checks of norms, activations, the embedding and rotary positions with cache writes."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from shoal.kernels.activation import KINDS, activation_reference, gated_activation_reference
from shoal.kernels.gpu.activation import launch_activation
from shoal.kernels.gpu.checks import Budget, Case, Outputs, Scale, Trial
from shoal.kernels.gpu.embedding import launch_embedding
from shoal.kernels.gpu.norm import launch_norm
from shoal.kernels.gpu.rope_kv_write import launch_rope_kv_write
from shoal.kernels.kv_write import kv_write
from shoal.kernels.layer_norm import layer_norm_reference
from shoal.kernels.rms_norm import rms_norm_reference
from shoal.kernels.rope import rope_reference
from shoal.kernels.rope_kv_write import HeadNorm

BUDGET = Budget(registers=96)
PLAIN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def kind_of(dtype: torch.dtype) -> str:
    """float32 and so on."""
    return str(dtype).removeprefix("torch.")


def norm_case(rows: int, size: int, dtype: torch.dtype, *, layer: bool, residual: bool, big: bool = False) -> Case:
    """RMSNorm or LayerNorm, with or without the residual add."""

    def make(device: torch.device) -> Trial:
        x, r = (torch.randn(rows, size, device=device).to(dtype) for _ in range(2))
        w, b = (torch.randn(size, device=device).to(dtype) for _ in range(2))
        summed = x + r if residual else x

        def run() -> Outputs:
            y, total, _ = launch_norm(
                x, w, b if layer else None, 1e-6, layer=layer, unit_offset=not layer, residual=r if residual else None
            )
            return (y,) if total is None else (y, total)

        def reference() -> Outputs:
            if layer:
                y = layer_norm_reference(summed, w, b, 1e-6)
            else:
                y = rms_norm_reference(summed, w, 1e-6, unit_offset=True)
            return (y, summed.float()) if residual else (y,)

        def plain() -> Outputs:
            y = F.layer_norm(summed, (size,), w, b, 1e-6) if layer else F.rms_norm(summed, (size,), w + 1, 1e-6)
            return (y, summed) if residual else (y,)

        moved = rows * size * dtype.itemsize * (4 if residual else 2)
        return Trial(run=run, reference=reference, plain=plain, bytes_moved=moved, flops=5 * rows * size)

    name = f"{'layer' if layer else 'rms'}{', residual' if residual else ''} {rows} x {size} {kind_of(dtype)}"
    return Case(kernel="norm", name=name, dtype=dtype, make=make, budget=BUDGET if big else None, measured=big)


def activation_case(rows: int, size: int, dtype: torch.dtype, kind: str, *, gated: bool, big: bool = False) -> Case:
    """One activation."""

    def make(device: torch.device) -> Trial:
        x = torch.randn(rows, size * (1 + gated), device=device).to(dtype) * 3

        def plain() -> Outputs:
            y = PLAIN[kind](x[:, :size])
            return (y * x[:, size:] if gated else y,)

        return Trial(
            run=lambda: (launch_activation(x, KINDS[kind], gated=gated)[0],),
            reference=lambda: ((gated_activation_reference if gated else activation_reference)(x, kind),),
            plain=plain,
            bytes_moved=rows * size * dtype.itemsize * (2 + gated),
            flops=10 * rows * size,
        )

    name = f"{kind}{', gated' if gated else ''} {rows} x {size} {kind_of(dtype)}"
    return Case(kernel="activation", name=name, dtype=dtype, make=make, budget=BUDGET if big else None, measured=big)


def embedding_case(rows: int, size: int, dtype: torch.dtype, *, big: bool = False) -> Case:
    """A third of a table: the ids of the rest give zeros. Exact."""

    def make(device: torch.device) -> Trial:
        vocab, first, last = 999, 333, 666
        table, ids = torch.randn(vocab, size, device=device).to(dtype), torch.randint(0, vocab, (rows,), device=device)

        def reference() -> Outputs:
            held = ((ids >= first) & (ids < last)).unsqueeze(1)
            return (torch.where(held, table[ids], 0),)

        def run() -> Outputs:
            return (launch_embedding(ids, table[first:last], first),)

        return Trial(run=run, reference=reference, plain=None, bytes_moved=2 * rows * size * dtype.itemsize, flops=0)

    name = f"{rows} x {size} {kind_of(dtype)}"
    return Case(kernel="embedding", name=name, dtype=dtype, make=make, budget=BUDGET if big else None, measured=big)


def rope_case(
    tokens: int, heads: tuple[int, int], size: int, rotary: int, dtype: torch.dtype, *, norm: bool, big: bool = False
) -> Case:
    """Norm of heads, rotary positions and cache writes; compared: queries, and the caches read back."""

    def make(device: torch.device) -> Trial:
        (num_q, num_kv), block_size = heads, 16
        before = torch.randn(tokens, num_q + 2 * num_kv, size, device=device).to(dtype)
        weights = [1 + torch.randn(size, device=device).to(dtype) / 4 for _ in range(2)]
        head_norm = HeadNorm(weights[0], weights[1], None, None, 1e-6) if norm else None
        angles = torch.rand(tokens, rotary // 2, device=device) * 6
        cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1) if rotary else None
        blocks = -(-tokens // block_size) + 1
        slots = torch.randperm(blocks * block_size, device=device)[:tokens]
        shape = (blocks, block_size, num_kv, size)

        def read(heads_TGD: torch.Tensor, caches: list[torch.Tensor]) -> Outputs:
            return heads_TGD[:, :num_q], *(cache.view(-1, num_kv, size)[slots] for cache in caches)

        def run() -> Outputs:
            caches = [torch.empty(shape, dtype=dtype, device=device) for _ in "kv"]
            launch_rope_kv_write(before, num_q, num_kv, head_norm, cos_sin, caches[0], caches[1], slots)
            return read(before, caches)

        def torch_way(kind: torch.dtype) -> Outputs:
            out = before.to(kind, copy=True)
            for start, stop, weight in ((0, num_q, weights[0]), (num_q, num_q + num_kv, weights[1])):
                if norm:
                    out[:, start:stop] = rms_norm_reference(out[:, start:stop], weight, 1e-6).to(kind)
                if cos_sin is not None:
                    out[:, start:stop] = rope_reference(out[:, start:stop], cos_sin).to(kind)
            caches = [torch.zeros(shape, device=device, dtype=kind) for _ in "kv"]
            kv_write(out[:, num_q : num_q + num_kv], out[:, num_q + num_kv :], caches[0], caches[1], slots)
            return read(out, caches)

        return Trial(
            run=run,
            reference=lambda: torch_way(torch.float32),
            plain=lambda: torch_way(dtype),
            bytes_moved=2 * before.numel() * dtype.itemsize,
            flops=10 * before.numel(),
        )

    name = f"{tokens} x {heads[0]}/{heads[1]} x {size}, rotary {rotary}{', norm' if norm else ''} {kind_of(dtype)}"
    return Case(kernel="rope_kv_write", name=name, dtype=dtype, make=make, budget=BUDGET if big else None, measured=big)


def cases(scale: Scale) -> Iterator[Case]:
    """tiny: odd shapes in float32 and float16; full: more, all types, and the shapes of an 8B model."""
    types = [torch.float32, torch.float16] + ([torch.bfloat16] if scale == "full" else [])
    for dtype in types:
        for rows, size in [(3, 77), (2, 515)] + ([(1000, 4096), (7, 12288)] if scale == "full" else []):
            yield norm_case(rows, size, dtype, layer=False, residual=True)
            yield norm_case(rows, size, dtype, layer=True, residual=False)
            yield activation_case(rows, size, dtype, "silu", gated=True)
            yield activation_case(rows, size, dtype, "gelu_tanh", gated=False)
            yield embedding_case(rows, size, dtype)
        for heads, size, rotary in [((5, 2), 80, 20), ((2, 1), 24, 24), ((3, 3), 10, 0)]:
            yield rope_case(4 if scale == "tiny" else 333, heads, size, rotary, dtype, norm=rotary != 24)
    if scale == "full":
        bf16 = torch.bfloat16
        for rows in (32, 4096):
            yield norm_case(rows, 4096, bf16, layer=False, residual=True, big=True)
            yield norm_case(rows, 4096, bf16, layer=True, residual=True, big=True)
            yield activation_case(rows, 14336, bf16, "silu", gated=True, big=True)
            yield activation_case(rows, 14336, bf16, "gelu", gated=False, big=True)
            yield embedding_case(rows, 4096, bf16, big=True)
            yield rope_case(rows, (32, 8), 128, 128, bf16, norm=True, big=True)
