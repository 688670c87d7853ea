"""What the tests of the Triton kernels share: the device (a GPU, else the CPU through Triton's interpreter), its
dtypes, and the bound on errors.
"""

from collections.abc import Iterator

import pytest
import torch

from shoal.kernels.gpu import poison

pytest.importorskip("triton", reason="the Triton kernels need triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter's conversion to bfloat16 truncates, so only a GPU runs that type.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of NaN: whatever a kernel leaves unwritten shows."""
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers rounded to the dtype, from the seed of the test."""
    return torch.randn(shape).to(dtype).to(DEVICE)


def close(actual: torch.Tensor, expected: torch.Tensor, times: float = 1.0) -> None:
    """Within `times` roundings of the dtype of float32 values."""
    tolerance = TOLERANCE[actual.dtype] * times
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """Every new tensor is NaN while the test runs, so that no output is left unwritten unseen."""
    with poison.poisoned_empty():
        yield
