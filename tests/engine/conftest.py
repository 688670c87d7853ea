"""Which kernels a test of choosing tokens goes through."""

import pytest

from shoal.kernels import device


@pytest.fixture(params=["torch", "triton"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as on CPUs, once through the Triton kernels in their interpreter."""
    if request.param == "triton":
        triton = pytest.importorskip("triton", reason="the Triton kernels need triton")
        if not triton.knobs.runtime.interpret:
            pytest.skip("runs in Triton's interpreter only")
        monkeypatch.setattr(device, "INTERPRET_CPU_TENSORS", True)
