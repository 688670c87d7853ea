"""Weights of 8 and 4 bits in plain order: the Triton linear, torch and single rows agree."""

import pytest
import torch

from shoal.kernels import device
from shoal.kernels.linear import linear
from shoal.kernels.plain_weight import PlainWeight

COLUMNS, INNER, LEAD = 33, 70, 5


def stored(bits: int, group: int, dtype: torch.dtype = torch.float32) -> tuple[PlainWeight, torch.Tensor]:
    """A weight cut within a group, and its values."""
    torch.manual_seed(bits)
    groups = -(-(LEAD + INNER) // group)
    limit = 127 if bits == 8 else 7
    codes = torch.randint(-limit, limit + 1, (COLUMNS, groups * group))
    scales = (torch.rand(COLUMNS, groups) / 50).bfloat16()
    values = (codes * scales.float().repeat_interleave(group, 1))[:, LEAD : LEAD + INNER]
    packed = codes.to(torch.int8) if bits == 8 else ((codes[:, ::2] + 8) | ((codes[:, 1::2] + 8) << 4)).to(torch.uint8)
    return PlainWeight(packed, scales, INNER, bits=bits, group=group, dtype=dtype, lead=LEAD), values


@pytest.mark.parametrize("path", ["torch", "triton"])
@pytest.mark.parametrize(("bits", "group"), [(8, 32), (4, 32), (4, 128)])
def test_products_and_rows_are_those_of_the_values(
    path: str, bits: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "triton":
        triton = pytest.importorskip("triton", reason="the Triton kernels need triton")
        if not triton.knobs.runtime.interpret:
            pytest.skip("runs in Triton's interpreter only")
        monkeypatch.setattr(device, "INTERPRET_CPU_TENSORS", True)
    weight, values = stored(bits, group)
    x, bias = torch.randn(2, 3, INNER), torch.randn(COLUMNS)
    got = linear(x, weight, bias, deterministic=True)
    torch.testing.assert_close(got, x @ values.t() + bias, rtol=1e-5, atol=1e-5)
    assert torch.equal(weight.rows(torch.tensor([[3, 0]])), values[torch.tensor([[3, 0]])])
    assert weight.nbytes == weight.codes.nbytes + weight.scales.nbytes


@pytest.mark.parametrize("bits", [8, 4])
def test_many_rows_go_through_floats_unless_deterministic(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton", reason="the Triton kernels need triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("runs in Triton's interpreter only")
    monkeypatch.setattr(device, "INTERPRET_CPU_TENSORS", True)
    monkeypatch.setattr("shoal.kernels.gpu.tables.DEQUANTISED_ROWS", 4)
    monkeypatch.setattr("shoal.kernels.plain_weight.SLAB_ELEMENTS", 7 * INNER)
    weight, values = stored(bits, 32)
    x, bias = torch.randn(4, INNER), torch.randn(COLUMNS)
    alone = linear(x[:1], weight, bias, deterministic=True)
    assert torch.equal(linear(x, weight, bias, deterministic=True)[:1], alone)
    got = linear(x, weight, bias, deterministic=False)
    assert torch.equal(got[:, :7], torch.nn.functional.linear(x, values[:7], bias[:7]))
    torch.testing.assert_close(got, x @ values.t() + bias, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    weight, _ = stored(8, 32)
    with pytest.raises(ValueError, match="do not make a weight of 4 bits in groups of 32"):
        PlainWeight(weight.codes, weight.scales, INNER, bits=4, group=32, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"x is torch.float16, weight torch.float32"):
        linear(torch.zeros(1, INNER, dtype=torch.float16), weight, deterministic=True)
