"""The Triton norms, activations, rotary positions with cache writes, embedding: against their float32 references."""

import pytest
import torch

from shoal.kernels.activation import KINDS, activation_reference, gated_activation_reference
from shoal.kernels.layer_norm import layer_norm_reference
from shoal.kernels.rms_norm import rms_norm_reference
from shoal.kernels.rope import rope_reference
from shoal.kernels.rope_kv_write import HeadNorm
from tests.kernels.gpu_support import DEVICE, DTYPES, close, poisoned, poisoned_empty, random  # noqa: F401

from shoal.kernels.gpu.activation import launch_activation  # isort: skip
from shoal.kernels.gpu.embedding import launch_embedding  # isort: skip
from shoal.kernels.gpu.norm import launch_norm  # isort: skip
from shoal.kernels.gpu.rope_kv_write import launch_rope_kv_write  # isort: skip

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (3, 7), (2, 515), (2, 3, 80)])
def test_norms_match_the_reference(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight, bias = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype), random(shape[-1], dtype=dtype)
    y, _, _ = launch_norm(x, weight, None, 1e-6, layer=False, unit_offset=True)
    close(y, rms_norm_reference(x, weight, 1e-6, unit_offset=True))
    y, _, _ = launch_norm(x, weight, bias, 1e-5, layer=True)
    close(y, layer_norm_reference(x, weight, bias, 1e-5), times=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_a_sum_gives_the_rounded_sum_and_its_norm(dtype: torch.dtype) -> None:
    x, residual, weight = random(5, 40, dtype=dtype)[:, 3:30], random(5, 27, dtype=dtype), random(27, dtype=dtype)
    y, summed, _ = launch_norm(x, weight, None, 1e-6, layer=False, residual=residual)
    assert summed is not None and torch.equal(summed, x + residual)
    close(y, rms_norm_reference(summed, weight, 1e-6))


def test_norm_in_place_on_a_slice_of_heads_leaves_the_rest() -> None:
    fused = random(5, 4 * 24)
    before, weight = fused.clone(), random(24)
    heads = fused[:, 24:72].view(5, 2, 24)
    launch_norm(heads, weight, None, 1e-6, layer=False, out=heads)
    close(fused[:, 24:72].reshape(5, 2, 24), rms_norm_reference(before[:, 24:72].reshape(5, 2, 24), weight, 1e-6))
    assert torch.equal(fused[:, :24], before[:, :24]) and torch.equal(fused[:, 72:], before[:, 72:])


def dequantised(q: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return q.float() * scales.repeat_interleave(-(-q.shape[1] // scales.shape[1]), dim=1)[:, : q.shape[1]]


@pytest.mark.parametrize("quantise", ["tensor", "row", "group"])
def test_quantised_outputs_have_torchs_own_bits(quantise: str) -> None:
    x, weight = random(3, 256), random(256)
    given = torch.full((1, 1), 0.01, device=DEVICE) if quantise == "tensor" else None
    for (q, scales), expected in (
        (launch_norm(x, weight, None, 1e-6, layer=False, quantise=quantise, scale=given)[::2],
         rms_norm_reference(x, weight, 1e-6)),
        (launch_activation(x, KINDS["silu"], gated=True, quantise=quantise, scale=given),
         gated_activation_reference(x, "silu")),
    ):  # fmt: skip
        assert q.dtype == torch.float8_e4m3fn and scales is not None
        wide = scales.repeat_interleave(-(-q.shape[1] // scales.shape[1]), dim=1)
        want = (expected / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        differ = (want.view(torch.uint8) != q.view(torch.uint8)).float().mean()
        assert differ <= 0.01  # a float32 rounding that falls on a boundary
        if quantise != "tensor":
            assert (dequantised(q, scales) - expected).abs().max() <= expected.abs().max() / 16
            largest = q.float().abs().view(3, scales.shape[1], -1).amax(-1)
            assert torch.equal(largest, torch.full_like(largest, 448.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", list(KINDS))
def test_activations_match_the_reference(dtype: torch.dtype, kind: str) -> None:
    for shape in [(0, 6), (1, 2), (3, 74), (2, 2100)]:
        x = random(shape[0], shape[1] + 3, dtype=dtype)[:, : shape[1]] * 4
        close(launch_activation(x, KINDS[kind], gated=False)[0], activation_reference(x, kind))
        close(launch_activation(x, KINDS[kind], gated=True)[0], gated_activation_reference(x, kind), times=4)


def test_activations_at_the_ends_of_the_range() -> None:
    x = torch.tensor([[-1e30, -200.0, -88.0, -9.0, -1e-20, 0.0, 1e-20, 4.0, 60.0, 200.0, 1e10]], device=DEVICE)
    for kind, code in KINDS.items():
        expected = activation_reference(x.double(), kind)
        torch.testing.assert_close(launch_activation(x, code, gated=False)[0], expected, rtol=1e-6, atol=1e-6)


def test_embedding_is_zero_outside_its_shard() -> None:
    weight, ids = random(11, 37), torch.tensor([5, 20, 12, 13, 23, 24, 0, 2**33], device=DEVICE)
    rows = launch_embedding(ids, weight, 13)
    expected = torch.stack([weight[i - 13] if 13 <= i < 24 else torch.zeros(37) for i in ids.tolist()])
    assert torch.equal(rows, expected.to(DEVICE)) and launch_embedding(ids[:0], weight, 13).shape == (0, 37)


def head_norm(kind: str, size: int, dtype: torch.dtype) -> HeadNorm | None:
    if kind == "none":
        return None
    biases = (random(size, dtype=dtype), random(size, dtype=dtype)) if kind == "layer" else (None, None)
    weights = random(size, dtype=dtype), random(size, dtype=dtype)
    return HeadNorm(*weights, *biases, eps=1e-6, layer=kind == "layer", unit_offset=kind == "rms")


def expected_heads(heads: torch.Tensor, num_q: int, num_kv: int, norm: HeadNorm | None, cos_sin) -> torch.Tensor:
    out = heads.float().clone()
    for start, stop, which in ((0, num_q, "q"), (num_q, num_q + num_kv, "k")):
        if norm is not None:
            weight, bias = getattr(norm, f"{which}_weight"), getattr(norm, f"{which}_bias")
            if norm.layer:
                out[:, start:stop] = layer_norm_reference(heads[:, start:stop], weight, bias, norm.eps)
            else:
                out[:, start:stop] = rms_norm_reference(heads[:, start:stop], weight, norm.eps, unit_offset=True)
        if cos_sin is not None:
            out[:, start:stop] = rope_reference(out[:, start:stop], cos_sin)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "rms", "layer"])
@pytest.mark.parametrize(
    ("num_q", "num_kv", "size", "rotary"), [(1, 1, 6, 4), (7, 2, 80, 20), (4, 4, 64, 64), (3, 1, 10, 0)]
)
def test_rope_kv_write_matches_norm_rotation_and_write(
    dtype: torch.dtype, kind: str, num_q: int, num_kv: int, size: int, rotary: int
) -> None:
    count = num_q + 2 * num_kv
    for num_tokens in (0, 3):
        fused = random(num_tokens, count * size + 5, dtype=dtype)
        heads = fused[:, : count * size].view(num_tokens, count, size)
        before, slots = heads.clone(), torch.randperm(20, device=DEVICE)[:num_tokens]
        angles = torch.rand(num_tokens, rotary // 2, device=DEVICE) * 6
        cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1) if rotary else None
        norm = head_norm(kind, size, dtype)
        k_cache, v_cache = (poisoned(5, 4, num_kv, size, dtype=dtype) for _ in range(2))
        slots[1:2] = -1  # a token that is not cached
        launch_rope_kv_write(heads, num_q, num_kv, norm, cos_sin, k_cache, v_cache, slots)
        expected = expected_heads(before, num_q, num_kv, norm, cos_sin)
        close(heads[:, :num_q], expected[:, :num_q], times=4)
        assert torch.equal(heads[:, num_q:], before[:, num_q:])
        keys, values = (cache.view(20, num_kv, size) for cache in (k_cache, v_cache))
        cached = slots >= 0
        close(keys[slots[cached]], expected[cached, num_q : num_q + num_kv], times=4)
        assert torch.equal(values[slots[cached]], before[cached, num_q + num_kv :])
        others = torch.ones(20, dtype=torch.bool, device=DEVICE)
        others[slots[cached]] = False
        assert keys[others].isnan().all() and values[others].isnan().all()


def test_rope_kv_write_to_an_fp8_cache_divides_by_the_scales() -> None:
    heads = random(3, 4 + 2 * 2, 16)
    before, slots = heads.clone(), torch.tensor([3, 0, 7], device=DEVICE)
    k_cache, v_cache = (torch.zeros(2, 4, 2, 16, device=DEVICE).to(torch.float8_e4m3fn) for _ in range(2))
    k_scales, v_scales = torch.tensor([0.5, 2.0], device=DEVICE), torch.tensor([0.25, 1.0], device=DEVICE)
    launch_rope_kv_write(heads, 4, 2, None, None, k_cache, v_cache, slots, (k_scales, v_scales))
    assert torch.equal(heads, before)
    keys, values = (cache.float().view(8, 2, 16)[slots] for cache in (k_cache, v_cache))
    assert torch.equal(keys, (before[:, 4:6] / k_scales[:, None]).to(torch.float8_e4m3fn).float())
    assert torch.equal(values, (before[:, 6:] / v_scales[:, None]).to(torch.float8_e4m3fn).float())
