"""Memory in huge pages is memory as any other."""

import pytest
import torch

from shoal.kernels.huge_pages import PAGE, empty_in_huge_pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8])
@pytest.mark.parametrize("shape", [(0,), (3, 5), (1 << 19, 4), (1_100_000, 3)])
def test_tensors_hold_what_is_put_in(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    made = empty_in_huge_pages(shape, dtype)
    assert made.shape == shape and made.dtype == dtype and made.is_contiguous()
    assert made.nbytes < PAGE or made.data_ptr() % PAGE == 0
    values = torch.arange(made.numel()).remainder(13).view(shape).to(dtype)
    made.copy_(values)
    assert torch.equal(made.view(torch.uint8), values.view(torch.uint8))
