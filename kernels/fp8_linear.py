"""y = x w^T + bias with weights and inputs in FP8 (e4m3fn, arXiv:2209.05433), summed in float32.

A weight has one scale per tensor, per channel (output column) or per block of BLOCK x BLOCK; x is rounded row by row
with a scale for the row, or with block weights for BLOCK neighbours of it: value = code * scale, scale = largest
magnitude / 448. On GPUs the Triton linear for blocks and when deterministic, else torch's scaled_mm (compute
capability 8.9 and up). Elsewhere plain torch on the rounded values, in float32.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from shoal.kernels.device import on_gpu

BLOCK = 128
LARGEST = 448.0
SMALLEST = 1e-12  # a scale at least, so that zeros stay zeros
Scaling = Literal["tensor", "channel", "block"]


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """codes: [columns, inner] float8_e4m3fn, contiguous; scales: float32, one per block of block[0] columns and
    block[1] inputs: [1, 1], [columns, 1] or [ceil(columns / BLOCK), ceil(inner / BLOCK)].
    """

    codes: torch.Tensor
    scales: torch.Tensor
    block: tuple[int, int]

    @property
    def blocked(self) -> bool:
        """Whether the inner dimension has several scales."""
        return self.block[1] < self.codes.shape[1]

    def dequantize(self) -> torch.Tensor:
        """The values it stands for, float32."""
        return self.codes.float() * spread(self.scales, self.block, self.codes.shape)


def spread(scales: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """One scale per element of a [rows, inner] tensor."""
    wide = scales.repeat_interleave(block[0], 0)[: shape[0]]
    return wide.repeat_interleave(block[1], 1)[:, : shape[1]]


def to_codes(values: torch.Tensor) -> torch.Tensor:
    """The nearest FP8 numbers of float32 values, saturating."""
    return values.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def quantize_weight(weight: torch.Tensor, scaling: Scaling) -> Fp8Weight:
    """weight: [columns, inner], any float type, finite."""
    columns, inner = weight.shape
    block = {"tensor": (columns, inner), "channel": (1, inner), "block": (BLOCK, BLOCK)}[scaling]
    pad = (0, -inner % block[1], 0, -columns % block[0])
    tiles = F.pad(weight.float(), pad).unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
    scales = (tiles.abs().amax((1, 3)) / LARGEST).clamp(min=SMALLEST)
    return Fp8Weight(to_codes(weight.float() / spread(scales, block, weight.shape)), scales, block)


def quantize_rows(x: torch.Tensor, *, grouped: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """x: [rows, inner]. Returns (codes, scales float32 [rows, 1], or grouped [rows, ceil(inner / BLOCK)])."""
    if on_gpu(x) and x.stride(1) == 1:
        from shoal.kernels.gpu.activation import IDENTITY, launch_activation

        codes, scales = launch_activation(x, IDENTITY, gated=False, quantise="group" if grouped else "row")
        assert scales is not None
        return codes, scales
    size = BLOCK if grouped else max(x.shape[1], 1)
    groups = F.pad(x.float(), (0, -x.shape[1] % size)).unflatten(1, (-1, size))
    scales = (groups.abs().amax(-1) / LARGEST).clamp(min=SMALLEST)
    return to_codes(x.float() / spread(scales, (1, size), x.shape)), scales


def fp8_linear_reference(
    codes: torch.Tensor, scales: torch.Tensor, weight: Fp8Weight, bias: torch.Tensor | None
) -> torch.Tensor:
    """The product of rounded inputs in float32."""
    x = codes.float() * spread(scales, (1, BLOCK if weight.blocked else codes.shape[1]), codes.shape)
    return F.linear(x, weight.dequantize(), None if bias is None else bias.float())


def fp8_linear(
    x: torch.Tensor, weight: Fp8Weight, bias: torch.Tensor | None = None, *, deterministic: bool
) -> torch.Tensor:
    """x: [rows, inner], float32, bfloat16 or float16; bias: [columns] of x's type or None. Returns [rows, columns] in
    x's type. Raises ValueError when sizes do not fit.
    """
    if x.dim() != 2 or x.shape[1] != weight.codes.shape[1]:
        raise ValueError(f"fp8_linear: x {list(x.shape)} does not fit a weight {list(weight.codes.shape)}")
    codes, scales = quantize_rows(x, grouped=weight.blocked)
    if not on_gpu(x):
        return fp8_linear_reference(codes, scales, weight, bias).to(x.dtype)
    if not deterministic and x.dtype != torch.float32 and takes_scaled_mm(codes, weight):
        return scaled_mm(codes, scales, weight, bias, x.dtype)
    from shoal.kernels.gpu.linear import launch_linear

    return launch_linear(
        codes,
        weight.codes,
        bias,
        deterministic=deterministic,
        kind="e4m3",
        scale=weight.scales,
        scale_block=weight.block,
        x_scale=scales,
        out_dtype=x.dtype,
    )


def takes_scaled_mm(codes: torch.Tensor, weight: Fp8Weight) -> bool:
    """Whether torch's scaled_mm takes the product, which is then the faster one (from one row on, on an H200): whole 16
    bytes, no blocks, units for FP8.
    """
    whole = len(codes) > 0 and all(size % 16 == 0 for size in weight.codes.shape)
    return whole and not weight.blocked and codes.is_cuda and torch.cuda.get_device_capability() >= (8, 9)


def scaled_mm(
    codes: torch.Tensor, scales: torch.Tensor, weight: Fp8Weight, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """torch's product with a scale per row of either side; its output is bfloat16, rounded before the bias."""
    columns = weight.scales.expand(weight.codes.shape[0], 1).t().contiguous()
    by_row = F.ScalingType.RowWise
    y = F.scaled_mm(codes, weight.codes.t(), scales, by_row, columns, by_row, output_dtype=torch.bfloat16).to(dtype)
    return y if bias is None else y.add_(bias)
