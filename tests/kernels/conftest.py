"""Fixtures of the kernel tests: both CPU paths, with and without the C kernels; dots of Triton's interpreter whose bits
can be compared.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from shoal.kernels.build import load_native


@pytest.fixture(params=["native", "torch"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once with the C kernels and once with torch alone."""
    library = load_native("auto" if request.param == "native" else "off")
    if request.param == "native" and library is None:
        pytest.skip("no C compiler here")
    yield request.param
    load_native("auto")


@pytest.fixture
def dots_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter leaves dots to NumPy, whose BLAS sums in an order that depends on shapes and the processor;
    in tests of bits every element is summed in rising order instead. Nothing changes on a GPU.
    """
    if torch.cuda.is_available():
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def create_dot(self: object, a: Any, b: Any, d: Any, input_precision: object, max_num_imprecise_acc: object) -> Any:
        products = a.data[..., :, :, None].astype(d.data.dtype) * b.data[..., None, :, :].astype(d.data.dtype)
        return interpreter.TensorHandle(np.add.accumulate(products, axis=-2)[..., -1, :] + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
