"""Prepared weights: products as accurate as torch's whose rows do not depend on each other, rows given back exactly."""

import os

import pytest
import torch

from shoal.kernels.build import NativeLibrary, native_library
from shoal.kernels.linear import linear, linear_reference
from shoal.kernels.weight import PackedWeight, embedding_rows
from tests.kernels.variants import VARIANTS, compile_sources, compile_variant

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 8), (17, 9), (16, 64), (333, 70), (1031, 33), (2500, 40), (512, 513)]  # inner, columns
SOURCE_NAMES = ("packed.c", "quantized.c", "weight.c")


@pytest.fixture(scope="module", params=["native", *VARIANTS])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> NativeLibrary:
    """The library of this machine, and variants of it for others that this machine can run."""
    found = native_library()
    if found is None:
        pytest.skip("no C compiler here")
    if request.param == "native":
        return found
    return compile_variant(request.param, SOURCE_NAMES, tmp_path_factory.mktemp("variant"))


def tensors(rows: int, inner: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows * inner + columns)
    shapes = (rows, inner), (columns, inner), (columns,)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inner", "columns"), SHAPES)
def test_errs_at_most_twice_as_much_as_torch(library, inner, columns, dtype):
    x, weight, bias = tensors(37, inner, columns, dtype)
    packed = PackedWeight(library, weight)
    for b in (bias, None):
        want = linear_reference(x, weight, b)
        error = (linear(x, packed, b, deterministic=False).double() - want).abs().max()
        allowed = (torch.nn.functional.linear(x, weight, b).double() - want).abs().max()
        assert error <= 2 * allowed + 1e-6 * want.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inner", "columns"), [(17, 9), (544, 40), (1031, 70)])
def test_a_rows_bits_depend_on_nothing_but_the_row(library, inner, columns, dtype):
    x, weight, bias = tensors(300, inner, columns, dtype)
    packed = PackedWeight(library, weight)
    whole = packed.multiply(x, bias, deterministic=True)
    for rows in (*range(1, 35), 95, 96, 97, 192, 193, 256, 257):
        assert torch.equal(packed.multiply(x[:rows], bias, deterministic=True), whole[:rows]), f"first {rows} rows"
        assert torch.equal(packed.multiply(x[300 - rows :], bias, deterministic=True), whole[300 - rows :]), (
            f"last {rows} rows"
        )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(packed.multiply(x, bias, deterministic=True), whole), "3 threads"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gives_its_rows_back(library, dtype):
    for inner, columns in SHAPES:
        _, weight, _ = tensors(1, inner, columns, dtype)
        ids = torch.randint(0, columns, (2, 3), generator=torch.Generator().manual_seed(columns))
        packed = PackedWeight(library, weight)
        assert packed.shape == (columns, inner) and packed.nbytes >= weight.nbytes
        assert torch.equal(embedding_rows(packed, ids), embedding_rows(weight, ids))
        assert torch.equal(embedding_rows(packed, torch.arange(columns)), weight)


def test_takes_strides_and_no_rows(library):
    x, weight, bias = tensors(6, 40, 12, torch.float32)
    want = torch.nn.functional.linear(x, weight, bias)
    wide = torch.zeros(12, 100)
    wide[:, 10:50] = weight
    for same in (wide[:, 10:50], weight.t().contiguous().t()):
        packed = PackedWeight(library, same)
        assert torch.allclose(packed.multiply(x, bias, deterministic=True), want, atol=1e-5)
        assert torch.allclose(packed.multiply(x.t().contiguous().t(), bias, deterministic=True), want, atol=1e-5)
        assert linear(x.view(2, 3, 40), packed, bias, deterministic=True).shape == (2, 3, 12)
        assert packed.multiply(x[:0], bias, deterministic=True).shape == (0, 12)


def test_not_a_number_and_infinity_stay_in_their_row(library):
    x, weight, _ = tensors(6, 41, 33, torch.bfloat16)
    packed = PackedWeight(library, weight)
    clean = packed.multiply(x, None, deterministic=True)
    x[2, 40], x[4, 0] = float("nan"), float("inf")
    got = packed.multiply(x, None, deterministic=True)
    assert got[2].isnan().all() and got[4].isinf().all()
    assert torch.equal(got[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])


def test_different_dtypes_are_refused(library):
    x, weight, bias = tensors(2, 16, 8, torch.float32)
    packed = PackedWeight(library, weight)
    with pytest.raises(ValueError, match=r"one dtype; x is torch.bfloat16, weight torch.float32"):
        linear(x.bfloat16(), packed, deterministic=False)
    with pytest.raises(ValueError, match=r"bias torch.float16"):
        linear(x, packed, bias.half(), deterministic=False)


def test_avx512_bf16_compiles(tmp_path):
    """That processor is not at hand everywhere: its arithmetic is tested as the variant `pairs`."""
    if native_library() is None or os.uname().machine != "x86_64":
        pytest.skip("needs a C compiler for x86-64")
    compile_sources(["-march=cooperlake"], SOURCE_NAMES, tmp_path)
