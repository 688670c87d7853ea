"""Where a Triton kernel gives way to a library's: the one table of crossovers.

Measured on an H200 (torch 2.11, triton 3.6) by `python scripts/gpu_jobs.py crossovers`; docs/kernels.md has the
numbers.
"""

import torch

ONE_ROW = (torch.bfloat16, torch.float16)
"""Dtypes of which one row alone is multiplied by gpu/matvec.py; more rows by cuBLAS, which is ahead of our linear from
there on, in the kernel (1.2 to 1.9 times) and in what a launch costs the host. float16 was not measured."""

DEQUANTISED_ROWS = {8: 192, 4: 128}
"""Bits of a weight: rows from which it is made floats, slab by slab, for cuBLAS, unless deterministic. Not measured:
where the products of 64 rows at a time (27 and 30 us at 4096 x 6144) would take as long as writing and reading the
floats (127 MB) and cuBLAS (23 to 27 us)."""

GROUPED_MM_PRODUCTS = 3 << 30
"""Multiply-adds of one projection of an expert, on average, from which torch's grouped_mm takes the place of the Triton
products: 8 experts of 4096 x 3584 cross between 1.9e9 (ours by 1.25) and 3.8e9 (grouped_mm by 1.12); 128 experts of
2048 x 768 had not crossed at 0.8e9, the most that was measured."""
GROUPED_MM_ALIGNMENT = 8
"""What it wants sizes to be multiples of: 16 bytes."""
