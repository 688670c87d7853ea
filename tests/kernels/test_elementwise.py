"""Norms, rotary positions, activations, cache writes and routing against their float32 references."""

import pytest
import torch

from shoal.kernels.activation import (
    KINDS,
    activation,
    activation_reference,
    gated_activation,
    gated_activation_reference,
    sigmoid,
)
from shoal.kernels.kv_write import kv_write, kv_write_reference
from shoal.kernels.layer_norm import layer_norm, layer_norm_reference
from shoal.kernels.moe_routing import moe_routing, moe_routing_reference
from shoal.kernels.rms_norm import rms_norm, rms_norm_reference
from shoal.kernels.rope import rope_, rope_reference
from shoal.kernels.sigmoid_gate import sigmoid_gate_, sigmoid_gate_reference
from shoal.kernels.softcap import softcap_, softcap_reference

pytestmark = pytest.mark.usefixtures("path")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within one rounding of the dtype."""
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (3, 7), (5, 64), (2, 3, 80), (130, 515)])
def test_rms_norm_matches_the_reference(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))
    close(rms_norm(x, weight, 1e-5, unit_offset=True), rms_norm_reference(x, weight, 1e-5, unit_offset=True))


def test_rms_norm_in_place_on_a_slice_of_heads_leaves_the_rest() -> None:
    fused = torch.randn(5, 4 * 24)
    before, weight = fused.clone(), torch.randn(24)
    heads = fused[:, 24:72].view(5, 2, 24)
    rms_norm(heads, weight, 1e-6, out=heads)
    close(fused[:, 24:72].reshape(5, 2, 24), rms_norm_reference(before[:, 24:72].reshape(5, 2, 24), weight, 1e-6))
    assert torch.equal(fused[:, :24], before[:, :24]) and torch.equal(fused[:, 72:], before[:, 72:])


def test_rms_norm_takes_columns_that_are_not_adjacent() -> None:
    x, weight = torch.randn(33, 9).t(), torch.randn(33)
    close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))


def test_a_rows_norm_does_not_depend_on_the_other_rows() -> None:
    for size in (64, 777):
        x, weight, bias = torch.randn(37, size), torch.randn(size), torch.randn(size)
        whole, layer = rms_norm(x, weight, 1e-6), layer_norm(x, weight, bias, 1e-5)
        for row in (0, 11, 36):
            assert torch.equal(rms_norm(x[row : row + 1], weight, 1e-6)[0], whole[row])
            assert torch.equal(layer_norm(x[row : row + 1], weight, bias, 1e-5)[0], layer[row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_matches_the_reference(dtype: torch.dtype) -> None:
    for shape in [(0, 5), (1, 1), (3, 7), (2, 3, 64), (130, 515)]:
        x, weight, bias = (
            torch.randn(shape).to(dtype),
            torch.randn(shape[-1]).to(dtype),
            torch.randn(shape[-1]).to(dtype),
        )
        close(layer_norm(x, weight, bias, 1e-5), layer_norm_reference(x, weight, bias, 1e-5))
        close(layer_norm(x, weight, None, 1e-5), layer_norm_reference(x, weight, None, 1e-5))


def test_layer_norm_of_a_slice_of_heads_far_from_zero() -> None:
    heads = (torch.randn(5, 4 * 24) + 100)[:, 24:72].view(5, 2, 24)
    weight, bias = torch.randn(24), torch.randn(24)
    expected = layer_norm_reference(heads.double(), weight, bias, 1e-5)
    torch.testing.assert_close(layer_norm(heads, weight, bias, 1e-5), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (2, 1025), (5, 64)])
def test_softcap_matches_the_reference(shape: tuple[int, int]) -> None:
    logits = torch.randn(shape) * 30
    expected, capped = softcap_reference(logits, 15.0), logits.clone()
    assert softcap_(capped, 15.0) is capped
    torch.testing.assert_close(capped.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner", "size"), [(0, 3, 3), (1, 1, 1), (7, 45, 45), (130, 515, 40)])
def test_sigmoid_gate_matches_the_reference(dtype: torch.dtype, rows: int, inner: int, size: int) -> None:
    x, weight, y = (
        torch.randn(rows, inner).to(dtype),
        torch.randn(1, inner).to(dtype),
        torch.randn(rows, size).to(dtype),
    )
    weight *= inner**-0.5
    expected, gated = sigmoid_gate_reference(y, x, weight), y.clone()
    assert sigmoid_gate_(gated, x, weight, deterministic=True) is gated
    tolerance = 3 * TOLERANCE[dtype]  # the logit, the gate and the product are rounded
    torch.testing.assert_close(gated.double(), expected, rtol=tolerance, atol=tolerance)
    for row in range(0, rows, 50):
        alone = sigmoid_gate_(y[row : row + 1].clone(), x[row : row + 1], weight, deterministic=True)
        assert torch.equal(alone[0], gated[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "head_dim", "rotary_dim"), [(0, 8, 8), (1, 6, 4), (7, 80, 20), (33, 64, 64)])
def test_rope_matches_the_reference(dtype: torch.dtype, num_tokens: int, head_dim: int, rotary_dim: int) -> None:
    fused = torch.randn(num_tokens, 5 * head_dim).to(dtype)
    before, angles = fused.clone(), torch.rand(num_tokens, rotary_dim // 2) * 6
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
    heads = fused[:, head_dim : 4 * head_dim].view(num_tokens, 3, head_dim)
    expected = rope_reference(heads, cos_sin)
    assert rope_(heads, cos_sin) is heads
    close(heads, expected)
    assert torch.equal(fused[:, :head_dim], before[:, :head_dim]) and torch.equal(
        fused[:, 4 * head_dim :], before[:, 4 * head_dim :]
    )
    assert torch.equal(heads[..., rotary_dim:], before[:, head_dim : 4 * head_dim].view_as(heads)[..., rotary_dim:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", list(KINDS))
def test_activations_match_the_reference(dtype: torch.dtype, kind: str) -> None:
    for shape in [(0, 6), (1, 2), (5, 74), (3, 256)]:
        x = (torch.randn(shape) * 4).to(dtype)
        close(activation(x, kind), activation_reference(x, kind))
        wide = torch.cat([x, x], dim=-1)[:, : shape[1]]  # rows further apart than they are long
        expected = gated_activation_reference(x, kind)
        torch.testing.assert_close(
            gated_activation(wide, kind).float(), expected, rtol=4 * TOLERANCE[dtype], atol=4 * TOLERANCE[dtype]
        )


def test_activations_at_the_ends_of_the_range() -> None:
    x = torch.tensor([-1e30, -200.0, -88.0, -9.0, -1e-20, 0.0, 1e-20, 4.0, 60.0, 88.0, 200.0, 1e10])
    for kind in KINDS:
        expected = activation_reference(x.double(), kind)
        torch.testing.assert_close(activation(x[None], kind)[0], expected, rtol=1e-6, atol=1e-6)
        gated = gated_activation(torch.cat([x, torch.ones(12)])[None], kind)[0]
        torch.testing.assert_close(gated, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sigmoid(x), torch.sigmoid(x))


def test_silu_of_every_bfloat16_errs_at_most_twice_as_much_as_torch() -> None:
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    x = every[every.isfinite() & (every.float() > -87) & (every.float().abs() > 1e-37)]  # beyond: numbers next to none
    exact = activation_reference(x.double(), "silu").double()
    ours, torchs = (((y.double() - exact) / exact).abs() for y in (activation(x, "silu"), torch.nn.functional.silu(x)))
    assert ours.max() <= 2 * torchs.max() and ours.mean() <= 2 * torchs.mean()


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_activation_does_not_depend_on_where_it_stands(kind: str) -> None:
    x = torch.randn(60, 74) * 3
    whole, gated, gates = activation(x, kind), gated_activation(x, kind), sigmoid(x[:, :1])
    for first, stop in [(0, 1), (1, 3), (7, 40), (59, 60)]:
        assert torch.equal(activation(x[first:stop], kind), whole[first:stop])
        assert torch.equal(gated_activation(x[first:stop], kind), gated[first:stop])
        assert torch.equal(sigmoid(x[first:stop, :1]), gates[first:stop])


@pytest.mark.parametrize("dtype", DTYPES)
def test_kv_write_puts_every_token_in_its_slot(dtype: torch.dtype) -> None:
    for num_tokens, block_size in [(0, 4), (1, 1), (13, 3), (40, 16)]:
        fused = torch.randn(num_tokens, 2 * 2 * 10).to(dtype)
        keys, values = (part.view(num_tokens, 2, 10) for part in fused.chunk(2, dim=1))
        num_blocks = 60 // block_size
        slots = torch.randperm(num_blocks * block_size)[:num_tokens]
        caches = [torch.full((num_blocks, block_size, 2, 10), float("nan")).to(dtype) for _ in range(4)]
        kv_write(keys, values, caches[0], caches[1], slots)
        kv_write_reference(keys, values, caches[2], caches[3], slots)
        assert torch.equal(caches[0].nan_to_num(99.0), caches[2].nan_to_num(99.0))
        assert torch.equal(caches[1].nan_to_num(99.0), caches[3].nan_to_num(99.0))


@pytest.mark.parametrize("normalize", [True, False])
def test_moe_routing_takes_the_lowest_expert_among_equals(normalize: bool) -> None:
    logits = torch.randn(9, 7)
    logits[3] = 0.5
    logits[4, :] = torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0, 2.0, 2.0])
    weights, ids = moe_routing(logits, 4, normalize=normalize)
    expected_weights, expected_ids = moe_routing_reference(logits, 4, normalize=normalize)
    assert torch.equal(ids, expected_ids) and ids[3].tolist() == [0, 1, 2, 3] and ids[4].tolist() == [1, 2, 4, 5]
    torch.testing.assert_close(weights, expected_weights, rtol=1e-6, atol=1e-7)
    empty_weights, empty_ids = moe_routing(torch.empty(0, 7), 2, normalize=normalize)
    assert empty_weights.shape == empty_ids.shape == (0, 2)


@pytest.mark.parametrize("experts", [1, 16, 33, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moe_routing_of_rows_apart_and_without_numbers(path: str, dtype: torch.dtype, experts: int) -> None:
    logits, top_k = (torch.randn(5, experts + 3) * 4).to(dtype)[:, :experts], min(8, experts)
    weights, ids = moe_routing(logits, top_k, normalize=True)
    expected_weights, expected_ids = moe_routing_reference(logits, top_k, normalize=True)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=1e-7)
    _, ids = moe_routing(torch.full((2, experts), float("nan")), top_k, normalize=True)
    assert all(sorted(row) == sorted(set(row)) and min(row) >= 0 and max(row) < experts for row in ids.tolist())
