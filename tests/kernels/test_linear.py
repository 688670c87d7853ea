"""The linear: as accurate as torch's, and when deterministic a row's bits depend on nothing but the row."""

import pytest
import torch

from shoal.kernels import linear as module
from shoal.kernels.build import load_native, native_library
from shoal.kernels.linear import linear, linear_reference, linear_row_blocks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (17, 5), (16, 64), (333, 70), (2500, 9)]  # inner, columns
MODES = ["auto", "off"]


@pytest.fixture(params=MODES)
def native(request):
    """With the C kernels and without."""
    load_native(request.param)
    yield native_library()
    load_native("auto")


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def tensors(rows: int, inner: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows * inner + columns)
    return tuple(
        torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, inner), (columns, inner), (columns,))
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inner", "columns"), SHAPES)
def test_errs_at_most_twice_as_much_as_torch(native, inner, columns, dtype):
    x, weight, bias = tensors(37, inner, columns, dtype)
    for b in (bias, None):
        want = linear_reference(x, weight, b)
        error = (linear(x, weight, b, deterministic=True).double() - want).abs().max()
        allowed = (torch.nn.functional.linear(x, weight, b).double() - want).abs().max()
        assert error <= 2 * allowed + 1e-6 * want.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inner", "columns"), SHAPES)
def test_a_rows_bits_depend_on_nothing_but_the_row(native, threads, inner, columns, dtype):
    x, weight, bias = tensors(70, inner, columns, dtype)
    whole = linear(x, weight, bias, deterministic=True)
    every = range(1, 71) if native is not None and threads == 1 else (1, 2, 7, 15, 16, 17, 33, 64, 65, 70)
    for rows in every:
        assert torch.equal(linear(x[:rows], weight, bias, deterministic=True), whole[:rows]), f"first {rows} rows"
        assert torch.equal(linear(x[70 - rows :], weight, bias, deterministic=True), whole[70 - rows :]), f"last {rows}"
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    assert torch.equal(linear(x[order], weight, bias, deterministic=True), whole[order])


def test_threads_do_not_change_bits(native):
    x, weight, bias = tensors(70, 333, 150, torch.float32)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(linear(x, weight, bias, deterministic=True))
    torch.set_num_threads(1)
    assert torch.equal(*results)


@pytest.mark.parametrize("deterministic", [True, False])
def test_takes_any_leading_shape_and_strides(native, deterministic):
    x, weight, bias = tensors(24, 20, 7, torch.float32)
    want = torch.nn.functional.linear(x, weight, bias)

    def check(got: torch.Tensor, shape: tuple[int, ...]) -> None:
        assert got.shape == shape and torch.allclose(got.reshape(24, 7), want, atol=1e-5)

    check(linear(x.view(2, 3, 4, 20), weight, bias, deterministic=deterministic), (2, 3, 4, 7))
    wide = torch.zeros(24, 50)
    wide[:, 10:30] = x
    check(linear(wide[:, 10:30], weight, bias, deterministic=deterministic), (24, 7))
    check(linear(x.t().contiguous().t(), weight, bias, deterministic=deterministic), (24, 7))
    rows = torch.zeros(7, 50)
    rows[:, 3:23] = weight
    check(linear(x, rows[:, 3:23], bias, deterministic=deterministic), (24, 7))
    check(linear(x, weight.t().contiguous().t(), bias, deterministic=deterministic), (24, 7))


@pytest.mark.parametrize(("rows", "inner", "columns"), [(0, 8, 4), (3, 0, 4), (3, 8, 0)])
def test_takes_empty_sizes(native, rows, inner, columns):
    x, weight, bias = tensors(rows, inner, columns, torch.float32)
    got = linear(x, weight, bias, deterministic=True)
    assert torch.equal(got, torch.nn.functional.linear(x, weight, bias))


def test_not_a_number_and_infinity_stay_in_their_row(native):
    x, weight, _ = tensors(6, 40, 5, torch.float32)
    clean = linear(x, weight, deterministic=True)
    x[2, 39], x[4, 0] = float("nan"), float("inf")
    got = linear(x, weight, deterministic=True)
    assert got[2].isnan().all() and got[4].isinf().all()
    assert torch.equal(got[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])


def test_different_dtypes_are_refused():
    x, weight, bias = tensors(2, 4, 3, torch.float32)
    with pytest.raises(ValueError, match=r"bias torch.float16"):
        linear(x, weight, bias.half(), deterministic=True)
    with pytest.raises(ValueError, match=r"one dtype; x is torch.float32, weight torch.bfloat16"):
        linear(x, weight.bfloat16(), deterministic=True)


def test_row_blocks_are_always_of_one_shape(monkeypatch):
    shapes = set()

    def spy(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        shapes.add(tuple(x.shape))
        return x @ weight.t()

    monkeypatch.setattr(module.F, "linear", spy)
    x, weight, _ = tensors(35, 9, 3, torch.float32)
    linear_row_blocks(x, weight, None, 16)
    assert shapes == {(16, 16)}  # whole vectors
