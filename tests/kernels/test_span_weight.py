"""Weights of 8 and 4 bits in span order: the Triton linear, torch and single rows agree."""

import pytest
import torch

from shoal.kernels import device
from shoal.kernels.linear import linear
from shoal.kernels.quantized_format import GROUP, quantized_bytes
from shoal.kernels.span_weight import SpanWeight, pack_spans, unpack_spans

COLUMNS, INNER, LEAD = 33, 170, 5


def stored(bits: int, dtype: torch.dtype = torch.float32) -> tuple[SpanWeight, torch.Tensor]:
    """A weight cut within a group, and its values."""
    torch.manual_seed(bits)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (COLUMNS, 256))
    scales = (torch.rand(COLUMNS, 256 // GROUP) / 50).bfloat16()
    values = (codes * scales.float().repeat_interleave(GROUP, 1))[:, LEAD : LEAD + INNER]
    return SpanWeight(pack_spans(codes.to(torch.int8), bits), scales, INNER, bits=bits, dtype=dtype, lead=LEAD), values


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_lie_where_the_format_says(bits: int) -> None:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (2, 3, 256)).to(torch.int8)
    words = pack_spans(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (2, 3, 256 * bits // 32)
    assert torch.equal(unpack_spans(words, bits), codes.to(torch.int32))
    for span, word, lane in ((0, 0, 0), (0, 3, 1), (1, 15, 32 // bits - 1)):
        found = (int(words[1, 2, span * 4 * bits + word]) >> (bits * lane)) & (2**bits - 1)
        assert found - 2 ** (bits - 1) == codes[1, 2, 128 * span + 4 * bits * lane + word]


@pytest.mark.parametrize("path", ["torch", "triton"])
@pytest.mark.parametrize("bits", [8, 4])
def test_products_and_rows_are_those_of_the_values(path: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "triton":
        triton = pytest.importorskip("triton", reason="the Triton kernels need triton")
        if not triton.knobs.runtime.interpret:
            pytest.skip("runs in Triton's interpreter only")
        monkeypatch.setattr(device, "INTERPRET_CPU_TENSORS", True)
    weight, values = stored(bits)
    x, bias = torch.randn(2, 3, INNER), torch.randn(COLUMNS)
    got = linear(x, weight, bias, deterministic=True)
    torch.testing.assert_close(got, x @ values.t() + bias, rtol=1e-5, atol=1e-5)
    assert torch.equal(weight.rows(torch.tensor([[3, 0]])), values[torch.tensor([[3, 0]])])
    assert weight.nbytes == quantized_bytes(COLUMNS, INNER, LEAD, bits, blocked=False)


@pytest.mark.parametrize("bits", [8, 4])
def test_many_rows_go_through_floats_unless_deterministic(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton", reason="the Triton kernels need triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("runs in Triton's interpreter only")
    monkeypatch.setattr(device, "INTERPRET_CPU_TENSORS", True)
    monkeypatch.setattr("shoal.kernels.gpu.tables.DEQUANTISED_ROWS", {bits: 4})
    monkeypatch.setattr("shoal.kernels.span_weight.SLAB", 7 * INNER)
    from shoal.kernels.gpu import few_bits_floats

    slabs, launch = [], few_bits_floats.launch_floats
    monkeypatch.setattr(few_bits_floats, "launch_floats", lambda *a, **k: slabs.append(launch(*a, **k)) or slabs[-1])
    weight, values = stored(bits)
    x, bias = torch.randn(4, INNER), torch.randn(COLUMNS)
    alone = linear(x[:1], weight, bias, deterministic=True)
    assert torch.equal(linear(x, weight, bias, deterministic=True)[:1], alone)
    assert not slabs
    got = linear(x, weight, bias, deterministic=False)
    assert len(slabs) == -(-COLUMNS // 7) and torch.equal(torch.cat(slabs), values)
    assert torch.equal(got[:, :7], torch.nn.functional.linear(x, values[:7], bias[:7]))
    torch.testing.assert_close(got, x @ values.t() + bias, rtol=1e-5, atol=1e-5)


def test_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x is torch.float16, weight torch.float32"):
        linear(torch.zeros(1, INNER, dtype=torch.float16), stored(8)[0], deterministic=True)
