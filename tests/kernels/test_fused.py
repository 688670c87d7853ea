"""The fused halves of a layer give the bits of their operations one by one."""

import ctypes
import random
from typing import Any

import pytest
import torch

from shoal.kernels.activation import activation, gated_activation
from shoal.kernels.attention import paged_attention
from shoal.kernels.build import native_library
from shoal.kernels.experts import NativeExperts
from shoal.kernels.fused import FusedFeedForward, FusedMixer, FusedMixture, FusedNorm, make_step
from shoal.kernels.fused_layers import FusedEnding, FusedLayer, FusedLayers
from shoal.kernels.kv_write import kv_write
from shoal.kernels.layer_norm import layer_norm
from shoal.kernels.linear import linear
from shoal.kernels.moe_routing import moe_routing
from shoal.kernels.native_types import DTYPE_CODES, FLOAT, INT, INT64, POINTER
from shoal.kernels.rms_norm import rms_norm
from shoal.kernels.rope import rope_
from shoal.kernels.sigmoid_gate import sigmoid_gate_
from shoal.kernels.softcap import softcap_
from shoal.kernels.weight import PackedWeight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = [(1, 9), (7, 7), (3, 21), (40, 40), (1, 1)]  # queries and keys of the rows of a step


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Drawn:
    """Random tensors of one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(7)

    def __call__(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).to(self.dtype)


def library() -> Any:
    found = native_library()
    if found is None:
        pytest.skip("no C compiler here")
    return found


def normalised(norm: FusedNorm | None, x: torch.Tensor) -> torch.Tensor:
    """By single operations. x: [rows, size]."""
    if norm is None:
        return x
    if norm.layer:
        return layer_norm(x, norm.weight, norm.bias, norm.eps)
    y = rms_norm(x, norm.weight, norm.eps, unit_offset=norm.offset == 1.0)
    return y if norm.bias is None else y + norm.bias


def mixture_parts(native: Any, drawn: Drawn, hidden: int) -> tuple[PackedWeight, NativeExperts]:
    """A router of nine experts, of which four are held."""
    gate_up = [PackedWeight(native, drawn(2 * 19, hidden, scale=0.2)) for _ in range(4)]
    down = [PackedWeight(native, drawn(hidden, 19, scale=0.2)) for _ in range(4)]
    return PackedWeight(native, drawn(9, hidden)), NativeExperts(native, gate_up, down, 3, "silu")


def step_tensors(block_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Block table, cu_seqlens, seq_lens, slots of ROWS in scattered blocks, and how many blocks there are."""
    counts, lengths = [count for count, _ in ROWS], [length for _, length in ROWS]
    widest = -(-max(lengths) // block_size)
    blocks = random.Random(1).sample(range(len(ROWS) * widest), len(ROWS) * widest)
    table = torch.tensor(blocks, dtype=torch.int32).view(len(ROWS), widest)
    slots = [
        int(table[row, position // block_size]) * block_size + position % block_size
        for row, (count, length) in enumerate(ROWS)
        for position in range(length - count, length)
    ]
    cu = torch.tensor([sum(counts[:row]) for row in range(len(ROWS) + 1)], dtype=torch.int32)
    return table, cu, torch.tensor(lengths, dtype=torch.int32), torch.tensor(slots), len(blocks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["plain", "all", "layer", "across"])
def test_mixer_gives_the_bits_of_its_operations(dtype, variant, threads):
    """All of it; LayerNorm before and of the heads, with biases; norms of all heads at once."""
    native, drawn, everything, layer = library(), Drawn(dtype), variant != "plain", variant == "layer"
    hidden, q_heads, kv_heads, dim, rotary, block_size = 45, 5, 2, 24, 16, 4
    heads, (table, cu, lengths, slots, num_blocks) = q_heads + 2 * kv_heads, step_tensors(block_size)
    x = drawn(len(slots), hidden)
    offset, counts = 1.0 if variant == "all" else 0.0, (q_heads, kv_heads)
    norm = FusedNorm(drawn(hidden), 1e-5, offset, drawn(hidden) if layer else None, layer)
    sizes = [dim * (count if variant == "across" else 1) for count in counts]
    q_norm, k_norm = (
        FusedNorm(drawn(size), 1e-6, offset, drawn(size) if layer else None, layer) if everything else None
        for size in sizes
    )
    qkv = PackedWeight(native, drawn(heads * dim, hidden, scale=0.2))
    out = PackedWeight(native, drawn(hidden, q_heads * dim, scale=0.2))
    bias = drawn(heads * dim) if everything else None
    cos_sin = torch.randn(len(slots), rotary) if everything else None
    options: dict[str, Any] = {"scale": 0.3, "q_to_kv": torch.tensor([0, 0, 0, 1, 1], dtype=torch.int32)}
    if everything:
        options |= {"window": 10, "softcap": 5.0, "sinks": torch.randn(q_heads)}
    caches = drawn(num_blocks, block_size, kv_heads, dim), drawn(num_blocks, block_size, kv_heads, dim)
    mine = caches[0].clone(), caches[1].clone()

    fused = FusedMixer(
        native, norm, qkv, bias, out, num_heads=q_heads, num_kv_heads=kv_heads, rotary_dim=rotary if everything else 0,
        q_norm=q_norm, k_norm=k_norm, **options,
    )  # fmt: skip
    got = fused(x, cos_sin, make_step(table, cu, lengths, slots, block_size), *mine)

    split = linear(normalised(norm, x), qkv, bias, deterministic=True).view(len(x), heads, dim)
    if q_norm is not None and k_norm is not None and cos_sin is not None:
        for one, part in ((q_norm, split[:, :q_heads]), (k_norm, split[:, q_heads : q_heads + kv_heads])):
            part.copy_(normalised(one, part.reshape(-1, len(one.weight))).view(part.shape))
        rope_(split[:, : q_heads + kv_heads], cos_sin)
    kv_write(split[:, q_heads : q_heads + kv_heads], split[:, q_heads + kv_heads :], *caches, slots)
    attended = paged_attention(split[:, :q_heads], *caches, table, cu, lengths, deterministic=True, **options)
    want = linear(attended.view(len(x), -1), out, deterministic=True)
    assert want.isfinite().all() and torch.equal(got, want)
    assert torch.equal(mine[0], caches[0]) and torch.equal(mine[1], caches[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "gated"), [("silu", True), ("gelu_tanh", True), ("relu", False), ("gelu", False)])
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_feed_forward_gives_the_bits_of_its_operations(dtype, kind, gated, rows, threads):
    native, drawn = library(), Drawn(dtype)
    hidden, inner = 45, 77
    up = PackedWeight(native, drawn(2 * inner if gated else inner, hidden, scale=0.2))
    down, bias = PackedWeight(native, drawn(hidden, inner, scale=0.2)), drawn(up.shape[0])
    x = drawn(rows, hidden)
    for norm in (FusedNorm(drawn(hidden), 1e-5, bias=drawn(hidden)), None):
        got = FusedFeedForward(native, norm, up, bias, down, kind=kind)(x)
        normed = normalised(norm, x)
        active = (gated_activation if gated else activation)(linear(normed, up, bias, deterministic=True), kind)
        assert torch.equal(got, linear(active, down, deterministic=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 33])
@pytest.mark.parametrize("beside", ["nothing", "shared", "gated"])
def test_mixture_gives_the_bits_of_its_operations(dtype, normalize, rows, beside, threads):
    native, drawn = library(), Drawn(dtype)
    router, experts = mixture_parts(native, drawn, 45)
    x, shared, gate = drawn(rows, 45), None, drawn(1, 45, scale=0.2) if beside == "gated" else None
    if beside != "nothing":
        up, down = (PackedWeight(native, drawn(*shape, scale=0.2)) for shape in ((2 * 21, 45), (45, 21)))
        shared = FusedFeedForward(native, None, up, None, down, kind="silu")
    for norm in (FusedNorm(drawn(45), 1e-5), None):
        fused = FusedMixture(
            native, norm, router, experts, top_k=3, normalize=normalize, shared=shared, gate=gate
        )  # fmt: skip
        normed = normalised(norm, x)
        want = experts(normed, *moe_routing(linear(normed, router, deterministic=True), 3, normalize=normalize))
        if shared is not None:
            more = shared(normed)
            want += more if gate is None else sigmoid_gate_(more, normed, gate, deterministic=True)
        for fused.block_rows in (1365, 10, 1):
            assert torch.equal(fused(x), want)


def some_layers(native: Any, drawn: Drawn, hidden: int, rotary: int, num_blocks: int, block_size: int):
    """Of two cache groups, one of them without positions, two with experts, and of every form of residual stream."""
    inner, q_heads, kv_heads, dim = 77, 4, 2, 16

    def norm(layer: bool = False) -> FusedNorm:
        return FusedNorm(drawn(hidden), 1e-5, bias=drawn(hidden) if layer else None, layer=layer)

    plain, after = (FusedEnding(), FusedEnding()), (FusedEnding((), norm()), FusedEnding((), norm()))
    biased, both = FusedEnding((drawn(hidden),), norm(True)), (drawn(hidden), drawn(hidden))
    normed = FusedEnding((drawn(hidden),), norm(True), of_sum=True)
    kinds = [
        (0, 0, norm(), plain, False),
        (1, None, norm(), after, False),
        (0, 0, norm(True), (FusedEnding(), FusedEnding(both)), True),
        (1, None, norm(), plain, True),
        (0, None, None, (normed, normed), False),
        (0, 0, norm(True), (biased, FusedEnding((drawn(hidden),))), False),
    ]
    layers = []
    for group, rotation, before, endings, parallel in kinds:
        mixer = FusedMixer(
            native, before, PackedWeight(native, drawn((q_heads + 2 * kv_heads) * dim, hidden)),
            None, PackedWeight(native, drawn(hidden, q_heads * dim, scale=0.1)), num_heads=q_heads,
            num_kv_heads=kv_heads, rotary_dim=0 if rotation is None else rotary, scale=0.3,
            q_to_kv=torch.tensor([0, 0, 1, 1], dtype=torch.int32),
        )  # fmt: skip
        up, down = PackedWeight(native, drawn(2 * inner, hidden)), PackedWeight(native, drawn(hidden, inner, scale=0.1))
        feed_forward: FusedFeedForward | FusedMixture = FusedFeedForward(native, before, up, None, down, kind="silu")
        if group == 1:
            shared = FusedFeedForward(native, None, up, None, down, kind="silu")
            parts = mixture_parts(native, drawn, hidden)
            feed_forward = FusedMixture(
                native, before, *parts, top_k=2, normalize=True, shared=shared, gate=drawn(1, hidden)
            )
        caches = [drawn(num_blocks, block_size, kv_heads, dim) for _ in range(2)]
        layers.append(FusedLayer(mixer, feed_forward, *caches, group, rotation, endings, parallel))
    return layers


def joined(ending: FusedEnding, x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """The residual stream that a branch has come to, by single operations."""
    for bias in ending.biases:
        branch = branch + bias
    return normalised(ending.norm, x + branch) if ending.of_sum else x + normalised(ending.norm, branch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_give_the_bits_of_their_halves(dtype, threads):
    native, drawn, hidden, rotary, block_size = library(), Drawn(dtype), 48, 8, 4
    table, cu, lengths, slots, num_blocks = step_tensors(block_size)
    tables = [table, table.flip(0)]  # the steps point into them
    steps = [make_step(one, cu, lengths, slots, block_size) for one in tables]
    cos_sins, x = [torch.randn(len(slots), rotary)], drawn(len(slots), hidden)
    layers = some_layers(native, drawn, hidden, rotary, num_blocks, block_size)

    want, want_caches = x.clone(), []
    for layer in layers:
        cos_sin = None if layer.rotation is None else cos_sins[layer.rotation]
        keys, values = layer.keys.clone(), layer.values.clone()
        mixed = layer.mixer(want, cos_sin, steps[layer.group], keys, values)
        if layer.parallel:
            mixed += layer.feed_forward(want)
        else:
            want = joined(layer.endings[0], want, mixed)
            mixed = layer.feed_forward(want)
        want = joined(layer.endings[1], want, mixed)
        want_caches.append((keys, values))
    got = FusedLayers(native, layers)(x, cos_sins, steps)
    assert got is x and want.isfinite().all() and torch.equal(got, want)
    for layer, (keys, values) in zip(layers, want_caches, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_best_of_capped_logits_is_the_first_among_equals(dtype):
    """A cap makes equals of unequal logits; a row with something that is no number says so."""
    native, drawn = library(), Drawn(dtype)
    best_of = native.function("largest_capped_of_row", (INT, POINTER, INT64, FLOAT, POINTER), INT64)
    for size, scale in ((1, 1.0), (5, 1.0), (2100, 30.0), (2100, 4000.0)):
        for strange in (None, 0, size - 1):
            logits, value = drawn(1, size, scale=scale), FLOAT()
            if strange is not None:
                logits[0, strange] = float("nan")
            found = best_of(DTYPE_CODES[dtype], logits.data_ptr(), size, 15.0, ctypes.addressof(value))
            capped = softcap_(logits.float(), 15.0)[0]
            assert found == capped.argmax() and repr(value.value) == repr(capped[found].item())
