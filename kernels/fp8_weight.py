"""Fp8ChannelWeight: a linear's weight in FP8 (e4m3) on a GPU, with a scale per column; inputs are rounded row by row in
the products (W8A8, kernels/fp8_linear.py). A column's scale is that of all its inputs, whatever slice of them a rank
holds. The experts of a layer are one stack, which kernels/gpu/moe_gemm.py reads.
"""

import torch

from shoal.kernels.fp8_linear import LARGEST, SMALLEST, Fp8Weight, fp8_linear, to_codes
from shoal.kernels.weight import RoundedWeight


class Fp8ChannelWeight(RoundedWeight):
    """A weight [columns, inner], or a stack of them [count, columns, inner], of zeros until `put` fills it.

    lead: inputs of the whole weight before the first one held; dtype: of activations. codes: float8_e4m3fn of its
    shape; scales: float32 [(count,) columns, 1].
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        lead: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        memory: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        if memory is None:
            codes = torch.zeros(shape, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
            memory = codes, torch.zeros((*shape[:-1], 1), device=device)
        self.codes, self.scales = memory
        self.shape, self.lead = torch.Size(shape), lead  # type: ignore[assignment]
        self.dtype, self.device = dtype, device
        self.nbytes = self.codes.nbytes + self.scales.nbytes

    def put(self, first: int, values: torch.Tensor) -> None:
        """See RoundedWeight; a group is the whole row."""
        assert len(self.shape) == 2 and values.shape[1] >= self.lead + self.shape[1], (self.shape, values.shape)
        values, stored = values.to(self.device, torch.float32), slice(first, first + len(values))
        scales = (values.abs().amax(1, keepdim=True) / LARGEST).clamp(min=SMALLEST)
        codes = to_codes(values[:, self.lead : self.lead + self.shape[1]] / scales)
        self.codes.view(torch.uint8)[stored] = codes.view(torch.uint8)
        self.scales[stored] = scales

    def unstacked(self) -> list["Fp8ChannelWeight"]:
        """See RoundedWeight."""
        assert len(self.shape) == 3, self.shape
        return [
            Fp8ChannelWeight(self.shape[1:], self.lead, dtype=self.dtype, device=self.device, memory=memory)
            for memory in zip(self.codes, self.scales, strict=True)
        ]

    def multiply(self, x_MK: torch.Tensor, bias: torch.Tensor | None, *, deterministic: bool) -> torch.Tensor:
        """See PreparedWeight."""
        self.check(x_MK, bias)
        weight = Fp8Weight(self.codes, self.scales, (1, self.shape[1]))
        return fp8_linear(x_MK, weight, bias, deterministic=deterministic)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """See PreparedWeight."""
        codes = self.codes.view(torch.uint8)[ids].view(torch.float8_e4m3fn)
        return (codes.float() * self.scales[ids]).to(self.dtype)
