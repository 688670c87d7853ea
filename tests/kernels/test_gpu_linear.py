"""The Triton linear: every kind of weight against the product in float32, and one order of sums when deterministic."""

import pytest
import torch

from shoal.kernels import device
from shoal.kernels.linear import linear
from tests.kernels.gpu_support import DEVICE, DTYPES, close, poisoned_empty, random  # noqa: F401

from shoal.kernels.gpu.few_bits import cut_few_bits, launch_few_bits  # isort: skip
from shoal.kernels.gpu.few_bits_floats import launch_floats  # isort: skip
from shoal.kernels.gpu.linear import launch_linear, split_count  # isort: skip
from shoal.kernels.gpu.matvec import launch_matvec  # isort: skip
from shoal.kernels.span_weight import SpanWeight  # isort: skip

pytestmark = pytest.mark.usefixtures("poisoned_empty")
SHAPES = [(1, 1, 1), (3, 70, 33), (17, 600, 70), (70, 330, 5), (0, 8, 4), (5, 0, 4), (3, 8, 0)]  # rows, inner, columns


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def weights(columns: int, inner: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (random(columns, inner) / max(inner, 1) ** 0.5).to(dtype)


def few_bits(columns: int, inner: int, lead: int, bits: int, dtype: torch.dtype = torch.float32) -> SpanWeight:
    weight = SpanWeight.zeros((columns, inner), bits, lead, dtype=dtype, device=DEVICE)
    weight.put(0, torch.nn.functional.pad(weights(columns, inner), (lead, 0)))
    return weight


def spread(scale: torch.Tensor, block: tuple[int, int], shape: tuple[int, int]) -> torch.Tensor:
    """One scale per element."""
    return scale.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner", "columns"), SHAPES)
def test_dense_matches_the_reference(dtype: torch.dtype, rows: int, inner: int, columns: int) -> None:
    x, weight, bias = random(rows, inner + 3, dtype=dtype)[:, 2:-1], weights(columns, inner, dtype), random(columns)
    for b in (None, bias.to(dtype)):
        want = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
        for deterministic in (True, False):
            close(launch_linear(x, weight, b, deterministic=deterministic), want, times=2)


@pytest.mark.usefixtures("dots_in_one_order")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_bits_depend_on_nothing_but_the_row(dtype: torch.dtype) -> None:
    x, weight = random(67, 330, dtype=dtype), weights(33, 330, dtype)
    assert split_count(33, 330, 64, 64)[0] > 1  # the parts of a split add up in one order, in a workspace or in place
    whole = launch_linear(x, weight, deterministic=True)
    for rows in (1, 64, 65):
        assert torch.equal(launch_linear(x[:rows], weight, deterministic=True), whole[:rows])
        assert torch.equal(launch_linear(x[-rows:], weight, deterministic=True), whole[-rows:])


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("inner", "columns"), [(1, 1), (70, 33), (512, 5), (1200, 203), (0, 4), (3, 0)])
def test_one_row_matches_the_reference(
    dtype: torch.dtype, inner: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.kernels.gpu.matvec.WIDE", 100)  # columns from which programs are larger
    x, weight, bias = random(1, inner + 3, dtype=dtype)[:, 2:-1], weights(columns, inner, dtype), random(columns)
    for b in (None, bias.to(dtype)):
        want = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
        close(launch_matvec(x, weight, b), want, times=2)


def test_one_row_of_halves_takes_it_unless_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "INTERPRET_CPU_TENSORS", True)
    x, weight = random(1, 1, 300, dtype=torch.float16), weights(70, 300, torch.float16)
    alone, fixed = (linear(x, weight, deterministic=deterministic) for deterministic in (False, True))
    assert alone.shape == (1, 1, 70) and torch.equal(alone.flatten(0, 1), launch_matvec(x[0], weight))
    assert torch.equal(fixed[0], launch_linear(x[0], weight, deterministic=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "inner", "columns", "lead"), [(1, 256, 33, 0), (3, 70, 129, 5), (17, 700, 70, 31), (66, 130, 5, 0)]
)
@pytest.mark.parametrize("bits", [8, 4])
def test_few_bits_match_the_floats_they_stand_for(
    dtype: torch.dtype, rows: int, inner: int, columns: int, lead: int, bits: int
) -> None:
    """lead: inputs of the first group that belong to the rank before, as kernels/quantized_format.py stores them."""
    weight = few_bits(columns, inner, lead, bits, dtype)
    x, bias = random(rows, inner + 3, dtype=dtype)[:, 2:-1], random(columns, dtype=dtype)
    values = weight.rows(torch.arange(columns, device=DEVICE))
    for b in (None, bias):
        want = torch.nn.functional.linear(x.double(), values.double(), None if b is None else b.double())
        for deterministic in (True, False):
            close(launch_few_bits(x, weight, b, deterministic=deterministic), want, times=4)


@pytest.mark.usefixtures("dots_in_one_order")
@pytest.mark.parametrize("bits", [8, 4])
def test_a_rows_bits_depend_on_nothing_but_the_row_with_few_bits(bits: int) -> None:
    x, weight = random(67, 1200), few_bits(33, 1200, 0, bits, torch.float32)
    assert cut_few_bits(67, 33, 10, bits, deterministic=True).splits > 1
    whole = launch_few_bits(x, weight, None, deterministic=True)
    for rows in (1, 64, 65):
        assert torch.equal(launch_few_bits(x[:rows], weight, None, deterministic=True), whole[:rows])
        assert torch.equal(launch_few_bits(x[-rows:], weight, None, deterministic=True), whole[-rows:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inner", "columns", "lead"), [(256, 33, 0), (70, 65, 5), (300, 7, 31), (0, 4, 0), (3, 0, 0)])
@pytest.mark.parametrize("bits", [8, 4])
def test_floats_of_few_bits_are_torchs(dtype: torch.dtype, inner: int, columns: int, lead: int, bits: int) -> None:
    weight = few_bits(columns, inner, lead, bits, dtype)
    got = launch_floats(weight.codes, weight.fours, inner, bits=bits, lead=lead, dtype=dtype)
    assert torch.equal(got, weight.rows(torch.arange(columns, device=DEVICE)))


@pytest.mark.parametrize("bits", [8, 4])
def test_few_bits_without_rows_inputs_or_columns(bits: int) -> None:
    for rows, inner, columns in ((0, 8, 4), (3, 8, 0), (2, 0, 5)):
        bias = random(columns)
        got = launch_few_bits(random(rows, inner), few_bits(columns, inner, 0, bits), bias, deterministic=False)
        assert got.shape == (rows, columns) and (inner > 0 or torch.equal(got, bias.expand(rows, columns)))


@pytest.mark.parametrize("rows", [3, 66])
@pytest.mark.parametrize("block", [(70, 300), (1, 300), (32, 128)], ids=["tensor", "channel", "block"])
def test_e4m3_weights_and_inputs(rows: int, block: tuple[int, int]) -> None:
    columns, inner = 70, 300
    q = (weights(columns, inner) * 50).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-columns // block[0]), -(-inner // block[1]), device=DEVICE) / 50
    weight = q.float() * spread(scale, block, (columns, inner))
    x = random(rows, inner)
    got = launch_linear(x, q, deterministic=True, kind="e4m3", scale=scale, scale_block=block)
    close(got, x @ weight.t(), times=4)
    x_q = x.to(torch.float8_e4m3fn)
    groups = 3 if block[1] == 128 else 1
    for shape in [(1, 1), (rows, 1)] if groups == 1 else [(rows, 3)]:
        x_scale = torch.rand(shape, device=DEVICE) + 0.5
        got = launch_linear(
            x_q, q, deterministic=False, kind="e4m3", scale=scale, scale_block=block, x_scale=x_scale,
            out_dtype=torch.float32,
        )  # fmt: skip
        wide = spread(x_scale, (1, -(-inner // groups) if groups == 1 else 128), (rows, inner))
        close(got, (x_q.float() * wide) @ weight.t(), times=4)
