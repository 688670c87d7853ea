"""FP8 linears: plain torch, the Triton kernels through the public operation, and scaled_mm agree."""

import pytest
import torch

from shoal.kernels import device
from shoal.kernels.fp8_linear import (
    fp8_linear,
    fp8_linear_reference,
    quantize_rows,
    quantize_weight,
    scaled_mm,
)
from shoal.kernels.fp8_weight import Fp8ChannelWeight
from shoal.kernels.linear import linear

SCALINGS = ["tensor", "channel", "block"]


@pytest.fixture(params=["torch", "triton"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Once in plain torch, once through the Triton kernels in their interpreter."""
    if request.param == "triton":
        triton = pytest.importorskip("triton", reason="the Triton kernels need triton")
        if not triton.knobs.runtime.interpret:
            pytest.skip("runs in Triton's interpreter only")
        monkeypatch.setattr(device, "INTERPRET_CPU_TENSORS", True)
    return str(request.param)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_fp8_linear_is_near_the_product_of_the_values(path: str, scaling: str) -> None:
    torch.manual_seed(0)
    weight, x, bias = torch.randn(150, 300), torch.randn(5, 300), torch.randn(150)
    weight[3] *= 100
    stored = quantize_weight(weight, scaling)  # type: ignore[arg-type]
    assert stored.scales.shape == {"tensor": (1, 1), "channel": (150, 1), "block": (2, 3)}[scaling]
    assert ((stored.dequantize() - weight).abs() <= weight.abs() / 16 + stored.scales.max() / 512).all()
    got = fp8_linear(x, stored, bias, deterministic=True)
    codes, scales = quantize_rows(x, grouped=scaling == "block")
    want = fp8_linear_reference(codes, scales, stored, bias)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4 * float(want.abs().max()))
    exact = x @ weight.t() + bias
    assert (got - exact).norm() / exact.norm() < 0.05
    assert fp8_linear(x[:0], stored, deterministic=False).shape == (0, 150)


def test_rows_are_rounded_with_the_same_bits_on_both_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton", reason="the Triton kernels need triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("runs in Triton's interpreter only")
    torch.manual_seed(1)
    x = torch.randn(4, 300) * 10
    x[2] = 0
    for grouped in (False, True):
        monkeypatch.setattr(device, "INTERPRET_CPU_TENSORS", False)
        codes, scales = quantize_rows(x, grouped=grouped)
        monkeypatch.setattr(device, "INTERPRET_CPU_TENSORS", True)
        same_codes, same_scales = quantize_rows(x, grouped=grouped)
        assert torch.equal(scales, same_scales) and torch.equal(codes.view(torch.uint8), same_codes.view(torch.uint8))


def test_scaled_mm_is_the_same_product_in_bfloat16() -> None:
    torch.manual_seed(2)
    weight, x, bias = torch.randn(48, 64), torch.randn(16, 64), torch.randn(48)
    for scaling in ("tensor", "channel"):
        stored = quantize_weight(weight, scaling)  # type: ignore[arg-type]
        codes, scales = quantize_rows(x, grouped=False)
        got = scaled_mm(codes, scales, stored, bias, torch.float32)
        torch.testing.assert_close(got, fp8_linear_reference(codes, scales, stored, bias), rtol=1e-2, atol=0.1)


def test_slices_of_a_channel_weight_have_the_codes_and_scales_of_the_whole(path: str) -> None:
    torch.manual_seed(3)
    values, x, bias = torch.randn(40, 96), torch.randn(5, 96), torch.randn(40)
    whole = quantize_weight(values, "channel")
    for first, stop in ((0, 96), (0, 33), (33, 96)):
        part = Fp8ChannelWeight((40, stop - first), first, dtype=torch.float32, device=torch.device("cpu"))
        part.put(0, values[:17])
        part.put(17, values[17:])
        assert torch.equal(part.scales, whole.scales) and part.nbytes == 40 * (stop - first + 4)
        assert torch.equal(part.codes.float(), whole.codes[:, first:stop].float())
        ids = torch.tensor([[3, 0]])
        assert torch.equal(part.rows(ids), whole.dequantize()[ids, first:stop])
        got = linear(x[:, first:stop], part, bias, deterministic=True)
        exact = x[:, first:stop] @ values[:, first:stop].t() + bias
        assert (got - exact).norm() / exact.norm() < 0.06
    with pytest.raises(ValueError, match=r"x is torch.float16, weight torch.float32"):
        linear(x[:, 33:].half(), part, deterministic=True)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x \[2, 5\] does not fit a weight \[3, 4\]"):
        fp8_linear(torch.zeros(2, 5), quantize_weight(torch.ones(3, 4), "tensor"), deterministic=True)
