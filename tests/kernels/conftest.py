"""Fixtures of the kernel tests: both CPU paths, with and without the C kernels."""

from collections.abc import Iterator

import pytest

from shoal.kernels.build import load_native


@pytest.fixture(params=["native", "torch"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once with the C kernels and once with torch alone."""
    library = load_native("auto" if request.param == "native" else "off")
    if request.param == "native" and library is None:
        pytest.skip("no C compiler here")
    yield request.param
    load_native("auto")
