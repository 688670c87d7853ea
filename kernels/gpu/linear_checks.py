"""Checks of the linears of every kind of weight, and of the mixture of experts."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from shoal.kernels.activation import KINDS
from shoal.kernels.gpu.checks import Budget, Case, Outputs, Scale, Trial
from shoal.kernels.gpu.elementwise_checks import kind_of
from shoal.kernels.gpu.experts import launch_experts
from shoal.kernels.gpu.few_bits import launch_few_bits
from shoal.kernels.gpu.few_bits_floats import launch_floats
from shoal.kernels.gpu.linear import launch_linear
from shoal.kernels.gpu.matvec import launch_matvec
from shoal.kernels.gpu.moe_routing import launch_moe_routing
from shoal.kernels.moe_routing import moe_routing_reference
from shoal.kernels.span_weight import SpanWeight
from shoal.kernels.weight import Weight

BUDGET = Budget(registers=255, spill_bytes=0)
FLOAT32_BUDGET = Budget(
    registers=168, spill_bytes=16
)  # products on the plain cores: ptxas takes a word or two of stack
FEW_BITS_BUDGET = Budget(registers=255, spill_bytes=112)  # 64 rows: faster on an H200 than tiles that spill nothing
BYTES = {"dense": None, "int8": 1.0625, "e4m3": 1.0, "int4": 0.5625}
"""Of a weight, with its scales; of floats by their type."""


def stored_weight(kind: str, columns: int, inner: int, dtype: torch.dtype, device: torch.device) -> tuple:
    """(the values, float32; the product of x, bias and deterministic)."""
    weight = torch.randn(columns, inner, device=device) / inner**0.5
    if kind == "one row":
        kept = weight.to(dtype)
        return kept.float(), lambda x, bias, _fixed: launch_matvec(x, kept, bias)
    if kind == "dense":
        kept = weight.to(dtype)
        return kept.float(), lambda x, bias, fixed: launch_linear(x, kept, bias, deterministic=fixed)
    if kind == "e4m3":
        q, block = torch.randn(columns, inner, device=device).to(torch.float8_e4m3fn), (128, 128)
        scale = (torch.rand(-(-columns // block[0]), -(-inner // block[1]), device=device) + 0.5) / inner**0.5
        wide = scale.repeat_interleave(block[0], 0)[:columns].repeat_interleave(block[1], 1)[:, :inner]
        product = partial(launch_linear, kind=kind, scale=scale, scale_block=block)
        return q.float() * wide, lambda x, bias, fixed: product(x, q, bias, deterministic=fixed)
    held = few_bits(weight.unsqueeze(0), 8 if kind == "int8" else 4, dtype).unstacked()[0]
    values = weight if device.type == "meta" else held.rows(torch.arange(columns, device=device)).float()
    return values, lambda x, bias, fixed: launch_few_bits(x, held, bias, deterministic=fixed)


def floats_case(columns: int, inner: int, bits: int, dtype: torch.dtype, *, big: bool = False) -> Case:
    """The floats of a weight of few bits, exact."""

    def make(device: torch.device) -> Trial:
        held = few_bits(torch.randn(1, columns, inner, device=device), bits, dtype).unstacked()[0]

        def run() -> Outputs:
            return (launch_floats(held.codes, held.fours, inner, bits=bits, lead=held.lead, dtype=dtype),)

        def reference() -> Outputs:
            return (held.rows(torch.arange(columns, device=device)),)

        moved = held.nbytes + columns * inner * dtype.itemsize
        return Trial(run=run, reference=reference, plain=None, bytes_moved=moved, flops=2 * columns * inner)

    name = f"floats of int{bits} {inner} x {columns} {kind_of(dtype)}"
    return Case(kernel="linear", name=name, dtype=dtype, make=make, budget=BUDGET if big else None, measured=big)


def bits_case(kind: str) -> Case:
    """One row's bits, alone and as the last of 130: exact, with splits in the workspace and within programs."""

    def make(device: torch.device) -> Trial:
        rows, inner, columns = 130, 2048, 96
        x, bias = (torch.randn(*shape, device=device).to(torch.bfloat16) for shape in ((rows, inner), (columns,)))
        _, product = stored_weight(kind, columns, inner, torch.bfloat16, device)

        def last(count: int) -> torch.Tensor:
            return product(x[-count:], bias, True)[-1]

        return Trial(
            run=lambda: (torch.stack([last(count) for count in (1, 2, 64, 65)]),),
            reference=lambda: (last(rows).expand(4, -1),),
            plain=None,
            bytes_moved=0,
            flops=0,
        )

    return Case(kernel="linear", name=f"{kind}, bits of a row", dtype=torch.bfloat16, make=make)


def linear_case(
    rows: int, inner: int, columns: int, dtype: torch.dtype, kind: str, *, deterministic: bool, big: bool = False
) -> Case:
    """One product with a bias."""

    def make(device: torch.device) -> Trial:
        x, bias = torch.randn(rows, inner, device=device).to(dtype), torch.randn(columns, device=device).to(dtype)
        values, product = stored_weight(kind, columns, inner, dtype, device)
        return Trial(
            run=lambda: (product(x, bias, deterministic),),
            reference=lambda: (F.linear(x.double(), values.double(), bias.double()).float(),),
            plain=lambda: (F.linear(x, values.to(dtype), bias),),
            bytes_moved=int(columns * inner * (BYTES.get(kind) or dtype.itemsize))
            + rows * (inner + columns) * dtype.itemsize,
            flops=2 * rows * columns * inner,
        )

    mode = ", deterministic" if deterministic else ""
    name = f"{kind}{mode} {rows} x {inner} x {columns} {kind_of(dtype)}"
    budget = FLOAT32_BUDGET if dtype == torch.float32 else FEW_BITS_BUDGET if kind in ("int8", "int4") else BUDGET
    return Case(kernel="linear", name=name, dtype=dtype, make=make, budget=budget if big else None, measured=big)


def few_bits(weight: torch.Tensor, bits: int, dtype: torch.dtype) -> SpanWeight:
    """A stack of weights rounded in groups, for activations of dtype."""
    stack = SpanWeight.zeros(weight.shape, bits, 0, dtype=dtype, device=weight.device)
    for one, values in zip(stack.unstacked(), weight, strict=True):
        one.put(0, values)
    return stack


def values_of(stack: Weight) -> torch.Tensor:
    """The floats a stack stands for."""
    assert isinstance(stack, SpanWeight)
    return torch.stack([one.rows(torch.arange(one.shape[0], device=one.device)) for one in stack.unstacked()])


def experts_case(
    tokens: int, experts: int, top_k: int, hidden: int, columns: int, dtype: torch.dtype,
    *, deterministic: bool, first: int = 0, bits: int | None = None, big: bool = False,
) -> Case:  # fmt: skip
    """Routed gated experts from number `first` on. bits: of their weights' codes, None for floats."""

    def make(device: torch.device) -> Trial:
        x = torch.randn(tokens, hidden, device=device).to(dtype)
        weights, ids = torch.softmax(torch.randn(tokens, experts, device=device), -1).topk(top_k)
        gate_up = (torch.randn(experts - first, 2 * columns, hidden, device=device) / hidden**0.5).to(dtype)
        down = (torch.randn(experts - first, hidden, columns, device=device) / columns**0.5).to(dtype)
        held: tuple[Weight, Weight] = (gate_up, down)
        if bits is not None:
            held = few_bits(gate_up, bits, dtype), few_bits(down, bits, dtype)
            gate_up, down = (values_of(weight) if x.device.type != "meta" else weight for weight in held)

        def torch_way(kind: torch.dtype) -> Outputs:
            wide = torch.float64 if kind == torch.float64 else torch.float32
            out = torch.zeros(x.shape, dtype=wide, device=device)
            for expert in range(first, experts):
                token, choice = (ids == expert).nonzero(as_tuple=True)
                gate, up = (x[token].to(kind) @ gate_up[expert - first].to(kind).t()).chunk(2, dim=-1)
                y = (F.silu(gate) * up) @ down[expert - first].to(kind).t()
                out.index_add_(0, token, y.to(wide) * weights[token, choice].unsqueeze(1))
            return (out.to(kind),)

        def run() -> Outputs:
            one = launch_experts(x, *held, weights, ids, first, KINDS["silu"], deterministic=deterministic)
            return (one,)

        busy = (experts - first) * (1 - (1 - top_k / experts) ** tokens)  # experts that have a token, on average
        return Trial(
            run=run,
            reference=lambda: torch_way(torch.float64),
            plain=lambda: torch_way(dtype),
            bytes_moved=int(busy * sum(part.nbytes for part in held) / (experts - first))
            + 2 * x.numel() * dtype.itemsize,
            flops=6 * tokens * top_k * hidden * columns,
        )

    mode = (", deterministic" if deterministic else "") + (f", int{bits}" if bits else "")
    name = f"{tokens} tokens, {top_k} of {experts - first}/{experts}{mode}, {hidden} x {columns} {kind_of(dtype)}"
    return Case(kernel="experts", name=name, dtype=dtype, make=make, budget=BUDGET if big else None, measured=big)


def routing_case(tokens: int, experts: int, top_k: int, *, big: bool = False) -> Case:
    """Weights and ids; distinct logits, so that the choice is exact."""

    def make(device: torch.device) -> Trial:
        logits = torch.rand(tokens, experts, device=device).argsort(-1).float() / 8

        def reference() -> Outputs:
            weights, ids = moe_routing_reference(logits.cpu(), top_k, normalize=True)
            return weights.to(device), ids.to(device)

        def plain() -> Outputs:
            weights, ids = torch.softmax(logits, -1).topk(top_k)
            return weights / weights.sum(-1, keepdim=True), ids

        def run() -> Outputs:
            return launch_moe_routing(logits, top_k, normalize=True)

        moved = 4 * logits.numel() + 12 * tokens * top_k
        return Trial(run=run, reference=reference, plain=plain, bytes_moved=moved, flops=10 * logits.numel())

    name = f"{tokens} tokens, {top_k} of {experts}"
    return Case(
        kernel="routing", name=name, dtype=torch.float32, make=make, budget=BUDGET if big else None, measured=big
    )


def cases(scale: Scale) -> Iterator[Case]:
    """tiny: odd shapes in float32 and float16; full: more, all types, and the shapes of an 8B model."""
    types = [torch.float32, torch.float16] + ([torch.bfloat16] if scale == "full" else [])
    yield routing_case(9, 7, 3)
    for dtype in types:
        for kind in BYTES:
            yield linear_case(3, 256, 70, dtype, kind, deterministic=False)
            yield linear_case(65, 640, 33, dtype, kind, deterministic=True)
            yield linear_case(5, 333, 130, dtype, kind, deterministic=False)
        for bits in (8, 4):
            yield floats_case(70, 333, bits, dtype)
        if dtype != torch.float32:
            yield linear_case(1, 640, 33, dtype, "one row", deterministic=False)
            yield linear_case(1, 333, 130, dtype, "one row", deterministic=False)
        yield experts_case(9, 7, 3, 40, 18, dtype, deterministic=False)
        yield experts_case(9, 7, 3, 40, 18, dtype, deterministic=True, first=3)
        yield experts_case(9, 7, 3, 40, 18, dtype, deterministic=False, bits=8)
        yield experts_case(9, 7, 3, 40, 18, dtype, deterministic=True, first=3, bits=4)
    if scale == "full":
        bf16 = torch.bfloat16
        yield from (bits_case(kind) for kind in BYTES)
        for dtype in types:
            for rows in (1, 16, 63, 300):
                for kind in BYTES:
                    yield linear_case(rows, 2304, 1000, dtype, kind, deterministic=rows == 300)
            yield experts_case(300, 64, 8, 512, 384, dtype, deterministic=False)
            yield experts_case(300, 64, 8, 512, 384, dtype, deterministic=False, bits=4)
            yield experts_case(3000, 16, 4, 512, 384, dtype, deterministic=False)
        yield routing_case(4096, 128, 8, big=True)
        for rows in (1, 16, 64):
            for kind in BYTES:
                yield linear_case(rows, 4096, 6144, bf16, kind, deterministic=False, big=True)
        for rows in (1, 64, 4096):
            yield linear_case(rows, 4096, 6144, bf16, "dense", deterministic=True, big=True)
        yield linear_case(64, 1024, 1024, torch.float32, "dense", deterministic=True, big=True)
        for inner, columns in ((2048, 2560), (4096, 6144), (14336, 4096), (2048, 32000)):
            yield linear_case(1, inner, columns, bf16, "one row", deterministic=False, big=True)
        for rows in (1, 16, 64):
            for kind in ("int8", "int4"):
                yield linear_case(rows, 14336, 4096, bf16, kind, deterministic=False, big=True)
        yield linear_case(64, 4096, 6144, bf16, "int4", deterministic=True, big=True)
        for bits in (8, 4):
            yield floats_case(6144, 4096, bits, bf16, big=True)
        yield experts_case(16, 128, 8, 2048, 768, bf16, deterministic=False, big=True)
        yield experts_case(16, 128, 8, 2048, 768, bf16, deterministic=True, big=True)
        for bits in (8, 4):
            yield experts_case(16, 128, 8, 2048, 768, bf16, deterministic=False, bits=bits, big=True)
        yield experts_case(4096, 128, 8, 2048, 768, bf16, deterministic=True, big=True)
