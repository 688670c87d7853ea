"""Where a Triton kernel gives way to a library's: the one table of crossovers.

Measured on an H200 (torch 2.11, triton 3.6) by `python scripts/gpu_jobs.py crossovers`; docs/kernels.md has the
numbers.
"""

import torch

ONE_ROW = (torch.bfloat16, torch.float16)
"""Dtypes of which one row alone is multiplied by gpu/matvec.py; more rows by cuBLAS, which is ahead of our linear from
there on, in the kernel (1.2 to 1.9 times) and in what a launch costs the host. float16 was not measured."""

DEQUANTISED_ROWS = {8: 1024, 4: 512}
"""Bits of a weight: rows from which it is made floats, slab by slab, for cuBLAS, unless deterministic. At these rows
the two were between 0.74 and 1.76 times each other's speed, by the weight's shape; at a quarter of them ours is ahead
by 1.3 to 3, at four times as many the floats are, by 2 to 5 (int8 of 14336 inputs: ours still by 1.1)."""

GROUPED_MM_PRODUCTS = 3 << 30
"""Multiply-adds of one projection of an expert, on average, from which torch's grouped_mm takes the place of the Triton
products: 8 experts of 4096 x 3584 cross between 1.9e9 (ours by 1.25) and 3.8e9 (grouped_mm by 1.12); 128 experts of
2048 x 768 had not crossed at 0.8e9, the most that was measured."""
GROUPED_MM_ALIGNMENT = 8
"""What it wants sizes to be multiples of: 16 bytes."""
