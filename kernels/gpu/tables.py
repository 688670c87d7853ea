"""Where a Triton kernel gives way to a library's: the one table of crossovers.

Measured on an H200 (torch 2.11, triton 3.6) by `python scripts/gpu_jobs.py crossovers`; docs/kernels.md has the
numbers.
"""

import torch

SMALL_ROWS: dict[tuple[str, torch.dtype], int] = {
    ("dense", torch.bfloat16): 0,
    ("dense", torch.float16): 0,
    ("e4m3", torch.float8_e4m3fn): 0,
    ("dense", torch.float32): 0,  # IEEE products of Triton run on the plain cores, as cuBLAS's do: nothing to win
}
"""(kind of weight, dtype of the inputs): rows up to which the Triton linear is used when not deterministic. cuBLAS and
scaled_mm are ahead from one row on: in the kernel (1.2 to 1.9 times) and in what a launch costs the host (11 us, 60).
float16 was not measured; it has the same kernels as bfloat16."""

DEQUANTISED_ROWS = 512
"""Rows from which int8 and int4 weights are made floats, slab by slab, for cuBLAS, unless deterministic. Not measured:
making them moves some 25 bytes a weight, as long as 500 rows take at 100 TFLOP/s."""

GROUPED_MM_PRODUCTS = 3 << 30
"""Multiply-adds of one projection of an expert, on average, from which torch's grouped_mm takes the place of the Triton
products: 8 experts of 4096 x 3584 cross between 1.9e9 (ours by 1.25) and 3.8e9 (grouped_mm by 1.12); 128 experts of
2048 x 768 had not crossed at 0.8e9, the most that was measured."""
GROUPED_MM_ALIGNMENT = 8
"""What it wants sizes to be multiples of: 16 bytes."""
