"""The Triton linear: every kind of weight against the product in float32, and one order of sums when deterministic."""

import pytest
import torch

from tests.kernels.gpu_support import DEVICE, DTYPES, close, poisoned_empty, random  # noqa: F401

from shoal.kernels.gpu.linear import launch_linear, split_count  # isort: skip

pytestmark = pytest.mark.usefixtures("poisoned_empty")
SHAPES = [(1, 1, 1), (3, 70, 33), (17, 600, 70), (70, 330, 5), (0, 8, 4), (5, 0, 4), (3, 8, 0)]  # rows, inner, columns


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def weights(columns: int, inner: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (random(columns, inner) / max(inner, 1) ** 0.5).to(dtype)


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


@pytest.mark.parametrize("rows", [1, 66])
def test_int8_weights_per_channel(rows: int) -> None:
    x, weight = random(rows, 300), weights(70, 300)
    scale = weight.abs().amax(1) / 127
    q = (weight / scale[:, None]).round().to(torch.int8)
    got = launch_linear(x, q, deterministic=False, kind="int8", scale=scale[:, None], scale_block=(1, 300))
    close(got, x @ (q.float() * scale[:, None]).t(), times=4)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_weight_cut_within_a_group(kind: str) -> None:
    """As kernels/quantized_format.py stores it: 5 inputs of the first group belong to the rank before."""
    lead, inner, columns = 5, 70, 33
    q, scale = torch.randint(0, 16, (columns, 96), device=DEVICE), torch.rand(columns, 3, device=DEVICE) / 50
    stored = q.to(torch.int8) if kind == "int8" else (q[:, ::2] | (q[:, 1::2] << 4)).to(torch.uint8)
    values = (q - (0 if kind == "int8" else 8)) * scale.bfloat16().float().repeat_interleave(32, 1)
    x = random(3, inner)
    got = launch_linear(
        x, stored, deterministic=True, kind=kind, scale=scale.bfloat16(), scale_block=(1, 32), lead=lead
    )
    close(got, x @ values[:, lead : lead + inner].t(), times=4)


@pytest.mark.parametrize("rows", [1, 66])
@pytest.mark.parametrize(("group", "asymmetric"), [(32, True), (128, False)])
def test_int4_weights_per_group(rows: int, group: int, asymmetric: bool) -> None:
    inner, columns = 256, 35
    x, q = random(rows, inner), torch.randint(0, 16, (columns, inner), device=DEVICE)
    scale = torch.rand(columns, inner // group, device=DEVICE) / 50
    zero = torch.randint(0, 16, scale.shape, dtype=torch.uint8, device=DEVICE) if asymmetric else None
    packed = (q[:, ::2] | (q[:, 1::2] << 4)).to(torch.uint8)
    got = launch_linear(
        x, packed, deterministic=True, kind="int4", scale=scale, zero=zero, scale_block=(1, group)
    )  # fmt: skip
    centre = torch.full_like(q, 8) if zero is None else zero.long().repeat_interleave(group, 1)
    close(got, x @ ((q - centre) * scale.repeat_interleave(group, 1)).t(), times=4)


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
