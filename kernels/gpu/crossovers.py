"""Our kernels beside a library's over a range of rows: the measurements that tables.py follows."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from shoal.kernels.activation import KINDS
from shoal.kernels.fp8_linear import quantize_rows, quantize_weight, scaled_mm
from shoal.kernels.gpu.experts import grouped_mm_experts, launch_experts
from shoal.kernels.gpu.few_bits import launch_few_bits
from shoal.kernels.gpu.linear import launch_linear
from shoal.kernels.gpu.matvec import launch_matvec
from shoal.kernels.gpu.moe_combine import launch_moe_combine
from shoal.kernels.span_weight import SpanWeight

ROWS = (1, 4, 8, 16, 32, 64, 128, 256)
FEW_BITS_ROWS = (64, 128, 192, 256, 512, 1024, 4096)
WEIGHTS = ((6144, 4096), (4096, 14336), (2560, 2048))
EXPERT_TOKENS = (64, 512, 1024, 2048, 4096, 8192)
Run = Callable[[], Any]


class Contest(NamedTuple):
    """make: ours and the library's, with inputs on the device."""

    name: str
    make: Callable[[], tuple[Run, Run]]


def dense(rows: int, columns: int, inner: int) -> tuple[Run, Run]:
    """The linear of a 16-bit weight beside cuBLAS; one row is matvec.py's."""
    x = torch.randn(rows, inner, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(columns, inner, dtype=torch.bfloat16, device="cuda")
    ours = partial(launch_linear, deterministic=False) if rows > 1 else launch_matvec
    return lambda: ours(x, weight), lambda: F.linear(x, weight)


def fp8(rows: int, columns: int, inner: int) -> tuple[Run, Run]:
    """The product of FP8 inputs and weights beside scaled_mm."""
    weight = quantize_weight(torch.randn(columns, inner, dtype=torch.bfloat16, device="cuda"), "channel")
    codes, scales = quantize_rows(torch.randn(rows, inner, dtype=torch.bfloat16, device="cuda"), grouped=False)
    options: dict[str, Any] = {"kind": "e4m3", "scale": weight.scales, "scale_block": weight.block, "x_scale": scales}

    def ours() -> torch.Tensor:
        return launch_linear(codes, weight.codes, deterministic=False, out_dtype=torch.bfloat16, **options)

    return ours, lambda: scaled_mm(codes, scales, weight, None, torch.bfloat16)


def few_bits(bits: int, rows: int, columns: int, inner: int) -> tuple[Run, Run]:
    """The linear of int8 or int4 weights beside cuBLAS with floats made of them."""
    x = torch.randn(rows, inner, dtype=torch.bfloat16, device="cuda")
    weight = SpanWeight.zeros((columns, inner), bits, 0, dtype=torch.bfloat16, device=x.device)
    weight.put(0, torch.randn(columns, inner, device="cuda"))
    ours = partial(launch_few_bits, x, weight, None, deterministic=False)
    return ours, lambda: weight.multiply_floats(x, None)


def experts(tokens: int, count: int, top_k: int, hidden: int, columns: int) -> tuple[Run, Run]:
    """Our products beside grouped_mm's, with all that belongs to them."""
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16, device="cuda")
    gate_up = torch.randn(count, 2 * columns, hidden, dtype=torch.bfloat16, device="cuda")
    down = torch.randn(count, hidden, columns, dtype=torch.bfloat16, device="cuda")
    weights, ids = torch.softmax(torch.randn(tokens, count, device="cuda"), -1).topk(top_k)
    kind = KINDS["silu"]

    def library() -> torch.Tensor:
        return launch_moe_combine(grouped_mm_experts(x, gate_up, down, ids, 0, kind), weights, ids, 0, count)

    def ours() -> torch.Tensor:
        return launch_experts(x, gate_up, down, weights, ids, 0, kind, deterministic=True)

    return ours, library


def contests() -> Iterator[Contest]:
    """All of them. Experts: ours with its largest tile, which is the one that meets grouped_mm."""
    for columns, inner in WEIGHTS:
        for rows in ROWS:
            yield Contest(f"dense bfloat16 {rows} x {inner} x {columns}", partial(dense, rows, columns, inner))
            yield Contest(f"e4m3 {rows} x {inner} x {columns}", partial(fp8, rows, columns, inner))
        for rows in FEW_BITS_ROWS:
            for bits in (8, 4):
                make = partial(few_bits, bits, rows, columns, inner)
                yield Contest(f"int{bits} {rows} x {inner} x {columns}", make)
    for tokens in EXPERT_TOKENS:
        for count, top_k, hidden, columns in ((128, 8, 2048, 768), (8, 2, 4096, 3584)):
            name = f"experts {tokens} tokens, {top_k} of {count}, {hidden} x {columns}"
            yield Contest(name, partial(experts, tokens, count, top_k, hidden, columns))
