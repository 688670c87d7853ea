"""Quantised linears: close to float ones, the same integers on every path, and a row's bits depend on nothing else."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shoal.kernels.build import SOURCES, NativeBuild, NativeLibrary, find_compiler, load_native, native_library
from shoal.kernels.linear import linear
from shoal.kernels.quantize import quantize_groups, quantize_rows
from shoal.kernels.quantized_format import GROUP, quantized_bytes
from shoal.kernels.quantized_weight import QuantizedWeight, quantized_linear_reference
from shoal.kernels.weight import embedding_rows

SHAPES = [(1, 1), (5, 17), (64, 16), (70, 333), (33, 64), (150, 96), (9, 2500)]  # columns, inner
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VARIANTS = {  # compiled for other processors
    "avx512": ("avx512bw", ["-march=skylake-avx512"]),
    "avx2": ("avx2", ["-march=haswell"]),
    "plain": ("", []),
}


def compile_variant(flags: list[str], path: Path) -> NativeLibrary:
    """The product kernels compiled with other flags."""
    sources = [str(SOURCES / name) for name in ("packed.c", "quantized.c", "weight.c")]
    command = [*find_compiler(), "-std=gnu11", "-O2", "-fPIC", "-fopenmp", "-w", *flags, "-shared", "-o", str(path)]
    subprocess.run([*command, *sources, "-lm"], check=True, capture_output=True, timeout=120)
    return NativeLibrary(NativeBuild(path, path.stem))


PATHS = ["native", "torch", "avx2", "plain", pytest.param("avx512", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=PATHS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """New weights multiply with torch, with the library of this machine, or with one for others that it can run."""
    name = request.param
    library = load_native("off" if name == "torch" else "auto")
    with pytest.MonkeyPatch.context() as patch:
        if library is None and name != "torch":
            pytest.skip("no C compiler here")
        if name in VARIANTS:
            feature, flags = VARIANTS[name]
            if feature and f" {feature} " not in Path("/proc/cpuinfo").read_text():
                pytest.skip(f"this processor has no {feature}")
            variant = compile_variant(flags, tmp_path_factory.mktemp("variant") / f"{name}.so")
            patch.setattr("shoal.kernels.quantized_weight.native_library", lambda: variant)
        yield name
    load_native("auto")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def quantized(values: torch.Tensor, bits: int, dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    weight = QuantizedWeight(tuple(values.shape), bits, dtype=dtype)
    weight.put(0, values)
    return weight


@pytest.mark.parametrize(("bits", "half_step"), [(8, 0.5 / 127), (4, 0.5 / 8)])
@pytest.mark.parametrize(("columns", "inner"), SHAPES)
def test_weights_come_back_within_half_a_step(bits, half_step, columns, inner):
    values = normal(columns, inner)
    back = quantized(values, bits).dequantize()
    assert back.shape == values.shape
    padded = torch.nn.functional.pad(values, (0, -inner % GROUP)).view(columns, -1, GROUP)
    largest = padded.abs().amax(-1, keepdim=True).expand_as(padded).reshape(columns, -1)[:, :inner]
    # the other end of int4's codes is at 7 of 8 steps, and scales are rounded to bfloat16
    slack = 2**-8 if bits == 8 else 2**-8 + 0.5 / 8
    assert ((back - values).abs() <= largest * (half_step + slack)).all()
    assert (back - values).abs().mean() < largest.mean() * half_step


def test_codes_that_were_rounded_once_stay():
    for bits in (8, 4):
        values = normal(40, 70)
        once = quantized(values, bits)
        again = quantized(once.dequantize(), bits)
        assert torch.equal(once.codes, again.codes) and torch.equal(once.scales, again.scales)


def test_zeros_tiny_and_huge_weights_stay_finite():
    values = torch.zeros(3, 4, GROUP)
    values[0, 1], values[1, 2], values[2, 3] = 1e-38, 3e38, -1e-20
    for bits in (8, 4):
        codes, scales = quantize_groups(values, bits)
        back = codes * scales.float().unsqueeze(-1)
        assert back.isfinite().all() and (back[0] == 0).all()
        torch.testing.assert_close(back[1:], values[1:], rtol=2**-8, atol=0)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_and_scales_are_what_the_format_says(bits):
    values = normal(21, 45)
    weight = quantized(values, bits)
    codes, scales = weight.int_codes(), weight.plain_scales()
    assert scales.shape == (21, 2) and codes.shape == (21, 64)
    floats = codes.float() * scales.float().repeat_interleave(GROUP, 1)
    assert torch.equal(floats[:, :45], weight.dequantize())
    want_codes, want_scales = quantize_groups(torch.nn.functional.pad(values, (0, 19)).view(21, 2, GROUP), bits)
    assert torch.equal(codes, want_codes.flatten(1)) and torch.equal(scales, want_scales)


@pytest.mark.parametrize("bits", [8, 4])
def test_any_pieces_in_any_order_make_the_same_weight(bits):
    values = normal(75, 50)
    whole, pieces = quantized(values, bits), QuantizedWeight((75, 50), bits)
    for first, stop in ((33, 75), (0, 3), (20, 33), (3, 20)):
        pieces.put(first, values[first:stop])
    assert torch.equal(whole.codes, pieces.codes) and torch.equal(whole.scales, pieces.scales)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_slice_of_inputs_has_the_codes_of_the_whole(bits):
    values = normal(20, 130)
    whole = quantized(values, bits).dequantize()
    for start, stop in ((0, 32), (32, 96), (40, 90), (5, 6), (90, 130), (33, 130)):
        lead, end = start % GROUP, min(-(-stop // GROUP) * GROUP, 130)
        part = QuantizedWeight((20, stop - start), bits, lead)
        part.put(0, values[:, start - lead : end])
        assert torch.equal(part.dequantize(), whole[:, start:stop])
        assert part.nbytes == quantized_bytes(20, stop - start, lead, bits)


def test_stacked_weights_share_memory():
    values = normal(3, 20, 40)
    stack = QuantizedWeight((3, 20, 40), 8)
    each = stack.unstacked()
    for weight, one in zip(each, values, strict=True):
        weight.put(0, one)
    assert stack.nbytes == 3 * quantized_bytes(20, 40, 0, 8) and each[1].shape == (20, 40)
    assert torch.equal(stack.dequantize()[2], quantized(values[2], 8).dequantize())
    assert torch.equal(each[1].int_codes(), stack.int_codes()[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("columns", "inner"), SHAPES)
def test_both_paths_compute_the_formula(path, columns, inner, bits, dtype):
    weight, bias = quantized(normal(columns, inner), bits, dtype), normal(columns, seed=1).to(dtype)
    for rows in (1, 2, 13):
        x = normal(rows, inner, seed=2).to(dtype)
        for b in (bias, None):
            want, got = quantized_linear_reference(x, weight, b), weight.multiply(x, b, deterministic=True)
            assert got.dtype == dtype and got.shape == (rows, columns)
            rounding = torch.finfo(dtype).eps * want.abs() if dtype != torch.float32 else 0
            size = 3e-6 * (quantize_rows(x, 0)[1].max() * 127 * weight.dequantize().abs().max() * inner**0.5)
            assert ((got.double() - want).abs() <= rounding + size).all()


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.012), (4, 0.12)])
def test_error_against_the_float_linear_is_bounded(path, bits, limit):
    values, x = normal(96, 512), normal(40, 512, seed=3)
    want = x.double() @ values.double().t()
    error = quantized(values, bits).multiply(x, None, deterministic=True).double() - want
    assert error.norm() / want.norm() < limit


@pytest.mark.parametrize("bits", [8, 4])
def test_a_rows_bits_depend_on_nothing_but_the_row(path, bits):
    weight, bias, x = quantized(normal(150, 96), bits), normal(150), normal(230, 96)
    whole = weight.multiply(x, bias, deterministic=True)
    for rows in (*range(1, 20), 95, 96, 97, 101, 193, 230):
        assert torch.equal(weight.multiply(x[:rows], bias, deterministic=True), whole[:rows]), f"first {rows} rows"
        assert torch.equal(weight.multiply(x[230 - rows :], bias, deterministic=True), whole[230 - rows :]), (
            f"last {rows} rows"
        )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert torch.equal(weight.multiply(x, bias, deterministic=True), whole) or path == "torch"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("lead", [0, 1, 31])
@pytest.mark.parametrize("bits", [8, 4])
def test_slices_sum_to_the_whole(path, bits, lead):
    values, x = normal(20, lead + 70), normal(5, lead + 70)
    x[:, :lead] = 0
    part = QuantizedWeight((20, 70), bits, lead)
    part.put(0, values)
    want = quantized(values, bits).multiply(x, None, deterministic=True)
    torch.testing.assert_close(part.multiply(x[:, lead:], None, deterministic=True), want, rtol=1e-6, atol=1e-5)


def test_takes_any_leading_shape_and_strides(path):
    weight, x = quantized(normal(7, 20), 8), normal(24, 20)
    want = weight.multiply(x, None, deterministic=True)
    assert torch.equal(linear(x.view(2, 3, 4, 20), weight, deterministic=False), want.view(2, 3, 4, 7))
    assert torch.equal(linear(x.t().contiguous().t(), weight, deterministic=True), want)
    wide = torch.zeros(24, 50)
    wide[:, 10:30] = x
    assert torch.equal(weight.multiply(wide[:, 10:30], None, deterministic=True), want)
    assert weight.multiply(x[:0], None, deterministic=True).shape == (0, 7)


def test_not_a_number_and_infinity_stay_in_their_row(path):
    weight, x = quantized(normal(5, 40), 8), normal(6, 40)
    clean = weight.multiply(x, None, deterministic=True)
    x[2, 39], x[4, 0] = float("nan"), float("inf")
    got = weight.multiply(x, None, deterministic=True)
    assert not got[2].isfinite().any() and not got[4].isfinite().any()
    assert torch.equal(got[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])


def test_different_dtypes_are_refused(path):
    weight = quantized(normal(7, 20), 8)
    with pytest.raises(ValueError, match=r"one dtype; x is torch.bfloat16, weight torch.float32"):
        linear(normal(2, 20).bfloat16(), weight, deterministic=True)
    with pytest.raises(ValueError, match=r"bias torch.float16"):
        weight.multiply(normal(2, 20), torch.zeros(7).half(), deterministic=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gives_rows_back_for_an_embedding(dtype):
    weight = QuantizedWeight((41, 50), 8, dtype=dtype)
    weight.put(0, normal(41, 50))
    ids = torch.tensor([[40, 0, 17], [5, 5, 16]])
    rows = embedding_rows(weight, ids)
    assert torch.equal(rows, weight.dequantize()[ids].to(dtype)) and rows.is_contiguous()


@pytest.mark.slow
def test_vnni_of_256_bits_compiles(tmp_path):
    if native_library() is None or os.uname().machine != "x86_64":
        pytest.skip("needs a C compiler for x86-64")
    compile_variant(["-march=haswell", "-mavxvnni"], tmp_path / "alderlake.so")
