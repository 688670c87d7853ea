"""poisoned_empty: torch.empty gives NaN (0xAA bytes in other types) while it lasts, so that whatever a kernel leaves
unwritten shows.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """For tests and checks only: one thread, and the name torch.empty."""
    real = torch.empty

    def poison(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = real(*args, **kwargs)
        if out.dtype.is_floating_point and out.dtype.itemsize > 1:
            return out.fill_(float("nan"))
        out.view(torch.uint8).fill_(0xAA)
        return out

    torch.empty = poison
    try:
        yield
    finally:
        torch.empty = real
