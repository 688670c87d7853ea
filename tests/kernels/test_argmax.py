"""The best token: first among equals, and what is not a number before all others."""

import pytest
import torch

from shoal.kernels.argmax import argmax, argmax_reference


@pytest.mark.parametrize("size", [1, 3, 16, 17, 1000, 4099])
def test_equals_the_reference(path, size):
    values = torch.randn(9, size, generator=torch.Generator().manual_seed(size)).round(decimals=1)  # with ties
    values[1], values[2] = float("-inf"), 0.0
    values[3, size // 2] = float("inf")
    values[4, size - 1] = values[5, size // 2] = values[5, size - 1] = float("nan")
    assert torch.equal(argmax(values), argmax_reference(values))
    wide = torch.full((9, size + 5), 9.0)
    wide[:, 2 : 2 + size] = values
    assert torch.equal(argmax(wide[:, 2 : 2 + size]), argmax_reference(values))
    assert argmax(values[:0]).shape == (0,)
