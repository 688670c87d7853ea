"""The fused halves of a layer give the bits of their operations one by one."""

import random
from typing import Any

import pytest
import torch

from shoal.kernels.activation import activation, gated_activation
from shoal.kernels.attention import paged_attention
from shoal.kernels.build import native_library
from shoal.kernels.experts import NativeExperts
from shoal.kernels.fused import FusedFeedForward, FusedMixer, FusedMixture, FusedNorm, make_step
from shoal.kernels.fused_layers import FusedLayer, FusedLayers
from shoal.kernels.kv_write import kv_write
from shoal.kernels.linear import linear
from shoal.kernels.moe_routing import moe_routing
from shoal.kernels.rms_norm import rms_norm
from shoal.kernels.rope import rope_
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
@pytest.mark.parametrize("variant", ["plain", "all"])
def test_mixer_gives_the_bits_of_its_operations(dtype, variant, threads):
    native, drawn, everything = library(), Drawn(dtype), variant == "all"
    hidden, q_heads, kv_heads, dim, rotary, block_size = 45, 5, 2, 24, 16, 4
    heads, (table, cu, lengths, slots, num_blocks) = q_heads + 2 * kv_heads, step_tensors(block_size)
    x = drawn(len(slots), hidden)
    norm = FusedNorm(drawn(hidden), 1e-5, 1.0 if everything else 0.0)
    q_norm, k_norm = (FusedNorm(drawn(dim), 1e-6) if everything else None for _ in range(2))
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

    normed = rms_norm(x, norm.weight, norm.eps, unit_offset=everything)
    split = linear(normed, qkv, bias, deterministic=True).view(len(x), heads, dim)
    if q_norm is not None and k_norm is not None and cos_sin is not None:
        rms_norm(split[:, :q_heads], q_norm.weight, q_norm.eps, out=split[:, :q_heads])
        keys = split[:, q_heads : q_heads + kv_heads]
        rms_norm(keys, k_norm.weight, k_norm.eps, out=keys)
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
    for norm in (FusedNorm(drawn(hidden), 1e-5), None):
        got = FusedFeedForward(native, norm, up, bias, down, kind=kind)(x)
        normed = x if norm is None else rms_norm(x, norm.weight, norm.eps)
        active = (gated_activation if gated else activation)(linear(normed, up, bias, deterministic=True), kind)
        assert torch.equal(got, linear(active, down, deterministic=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_mixture_gives_the_bits_of_its_operations(dtype, normalize, rows, threads):
    native, drawn = library(), Drawn(dtype)
    router, experts = mixture_parts(native, drawn, 45)
    x = drawn(rows, 45)
    for norm in (FusedNorm(drawn(45), 1e-5), None):
        fused = FusedMixture(native, norm, router, experts, top_k=3, normalize=normalize)
        normed = x if norm is None else rms_norm(x, norm.weight, norm.eps)
        routing = moe_routing(linear(normed, router, deterministic=True), 3, normalize=normalize)
        for fused.block_rows in (1365, 10, 1):
            assert torch.equal(fused(x), experts(normed, *routing))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_branch", [False, True])
def test_layers_give_the_bits_of_their_halves(dtype, with_branch, threads):
    """Three layers of two cache groups, one of them without positions, one with experts."""
    native, drawn = library(), Drawn(dtype)
    hidden, inner, q_heads, kv_heads, dim, rotary, block_size = 48, 77, 4, 2, 16, 8, 4
    table, cu, lengths, slots, num_blocks = step_tensors(block_size)
    tables = [table, table.flip(0)]  # the steps point into them
    steps = [make_step(one, cu, lengths, slots, block_size) for one in tables]
    cos_sins = [torch.randn(len(slots), rotary)]
    layers = []
    for group, rotation in ((0, 0), (1, None), (0, 0)):
        mixer = FusedMixer(
            native, FusedNorm(drawn(hidden), 1e-5), PackedWeight(native, drawn((q_heads + 2 * kv_heads) * dim, hidden)),
            None, PackedWeight(native, drawn(hidden, q_heads * dim, scale=0.1)), num_heads=q_heads,
            num_kv_heads=kv_heads, rotary_dim=0 if rotation is None else rotary, scale=0.3,
            q_to_kv=torch.tensor([0, 0, 1, 1], dtype=torch.int32),
        )  # fmt: skip
        up, down = PackedWeight(native, drawn(2 * inner, hidden)), PackedWeight(native, drawn(hidden, inner, scale=0.1))
        norm = FusedNorm(drawn(hidden), 1e-5)
        feed_forward: FusedFeedForward | FusedMixture = FusedFeedForward(native, norm, up, None, down, kind="silu")
        if group == 1:
            feed_forward = FusedMixture(native, norm, *mixture_parts(native, drawn, hidden), top_k=2, normalize=True)
        caches = [drawn(num_blocks, block_size, kv_heads, dim) for _ in range(2)]
        layers.append(FusedLayer(mixer, feed_forward, *caches, group, rotation))
    x, branch = drawn(len(slots), hidden), drawn(len(slots), hidden) if with_branch else None

    want, want_branch, want_caches = x.clone(), None if branch is None else branch.clone(), []
    for layer in layers:
        want = want if want_branch is None else want + want_branch
        cos_sin = None if layer.rotation is None else cos_sins[layer.rotation]
        keys, values = layer.keys.clone(), layer.values.clone()
        want = want + layer.mixer(want, cos_sin, steps[layer.group], keys, values)
        want_branch = layer.feed_forward(want)
        want_caches.append((keys, values))
    got, got_branch = FusedLayers(native, layers)(x, branch, cos_sins, steps)
    assert want_branch is not None and want_branch.isfinite().all()
    assert torch.equal(got, want) and torch.equal(got_branch, want_branch)
    for layer, (keys, values) in zip(layers, want_caches, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
