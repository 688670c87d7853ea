"""Where a Triton kernel gives way to a library's: the one table of crossovers.

None of these numbers is measured: they follow from what must be moved. A product of few rows reads every weight once
and is bound by that; there a library has nothing to win, and ours can split the inner dimension as it likes. From the
rows on where the tensor cores become the limit, cuBLAS is the better kernel.
"""

import torch

SMALL_ROWS: dict[tuple[str, torch.dtype], int] = {
    ("dense", torch.bfloat16): 16,
    ("dense", torch.float16): 16,
    ("e4m3", torch.float8_e4m3fn): 64,
    ("dense", torch.float32): 0,  # IEEE products of Triton run on the plain cores, as cuBLAS's do: nothing to win
}
"""(kind of weight, dtype of the inputs): rows up to which the Triton linear is used when not deterministic."""

GROUPED_MM_ROWS = 128
"""Assignments per expert held, on average, from which torch's grouped_mm takes the place of the Triton products."""
GROUPED_MM_ALIGNMENT = 8
"""What it wants sizes to be multiples of: 16 bytes."""
