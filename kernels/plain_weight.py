"""PlainWeight: a linear's weight of 8 or 4 bits on a GPU, multiplied with activations of 16 or 32 bits (W8A16, W4A16).

w[n, k] = code[n, lead + k] * scale[n, (lead + k) // group]: codes int8 [columns, padded inner], or two of them plus 8 a
byte, the even input in the low half, uint8 [columns, padded inner / 2]; scales [columns, groups], float32 or bfloat16.
padded inner: whole groups; lead: inputs of the first group that a rank before this one holds. The Triton linear
(kernels/gpu/linear.py) reads the codes as they are; on a CPU, in tests, torch multiplies with the floats they stand
for. One order of sums per element whatever the rows.
"""

import torch
import torch.nn.functional as F

from shoal.kernels.device import on_gpu
from shoal.kernels.weight import PreparedWeight


class PlainWeight(PreparedWeight):
    """codes, scales: as above, contiguous, on one device. inner: inputs held; group: inputs of a scale, a multiple of
    32; dtype: of activations.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        inner: int,
        *,
        bits: int,
        group: int,
        dtype: torch.dtype,
        lead: int = 0,
    ) -> None:
        columns, groups = scales.shape
        stored = {8: (torch.int8, groups * group), 4: (torch.uint8, groups * group // 2)}
        if bits not in stored or group % 32 or (codes.dtype, codes.shape[1]) != stored[bits] or len(codes) != columns:
            raise ValueError(
                f"codes {codes.dtype} {list(codes.shape)} and scales {list(scales.shape)} do not make a weight of "
                f"{bits} bits in groups of {group}; bits are 8 or 4, groups multiples of 32"
            )
        assert 0 <= lead < group and lead + inner <= groups * group, (lead, inner, groups, group)
        self.codes, self.scales, self.bits, self.group, self.lead = codes, scales, bits, group, lead
        self.shape, self.dtype, self.device = (columns, inner), dtype, codes.device
        self.nbytes = codes.nbytes + scales.nbytes

    def multiply(self, x_MK: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x w^T + bias, a new [rows, columns]. x: [rows, inner]; bias: [columns] or None.

        Raises ValueError when dtypes differ.
        """
        self.check(x_MK, bias)
        if not on_gpu(x_MK):
            return F.linear(x_MK, self.rows(torch.arange(self.shape[0], device=self.device)), bias)
        from shoal.kernels.gpu.linear import launch_linear

        return launch_linear(
            x_MK if x_MK.stride(1) == 1 else x_MK.contiguous(),
            self.codes,
            bias,
            deterministic=True,
            kind="int8" if self.bits == 8 else "int4",
            scale=self.scales,
            scale_block=(1, self.group),
            lead=self.lead,
        )

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """See PreparedWeight."""
        codes = self.codes[ids]
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).to(torch.int8) - 8
        wide = codes * self.scales[ids].float().repeat_interleave(self.group, -1)
        return wide[..., self.lead : self.lead + self.shape[1]].to(self.dtype)
