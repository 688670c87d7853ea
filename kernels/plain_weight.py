"""PlainWeight: a linear's weight of 8 or 4 bits on a GPU, multiplied with activations of 16 or 32 bits (W8A16, W4A16).

w[n, k] = code[n, lead + k] * scale[n, (lead + k) // group]: codes int8 [columns, padded inner], or two plus 8 a
byte, the even input in the low half, uint8 [columns, padded inner / 2]; scales [columns, groups], float32 or bfloat16.
padded inner: whole groups; lead: inputs of the first group that a rank before this one holds. The experts of a layer
are one stack, with a dimension before these. The Triton products (kernels/gpu/linear.py, moe_gemm.py) read the codes as
they are; on a CPU, in tests, torch multiplies with the floats they stand for.
"""

import torch
import torch.nn.functional as F

from shoal.kernels.device import on_gpu
from shoal.kernels.quantize import pack_pairs, quantize_groups
from shoal.kernels.quantized_format import GROUP, padded_groups
from shoal.kernels.weight import RoundedWeight

SLAB_ELEMENTS = 1 << 22  # weights made floats at once


class PlainWeight(RoundedWeight):
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
        *rows, groups = scales.shape
        stored = {8: (torch.int8, groups * group), 4: (torch.uint8, groups * group // 2)}
        fits = bits in stored and group % 32 == 0 and (codes.dtype, codes.shape[-1]) == stored[bits]
        if not fits or list(codes.shape[:-1]) != rows:
            raise ValueError(
                f"codes {codes.dtype} {list(codes.shape)} and scales {list(scales.shape)} do not make a weight of "
                f"{bits} bits in groups of {group}; bits are 8 or 4, groups multiples of 32"
            )
        assert 0 <= lead < group and lead + inner <= groups * group, (lead, inner, groups, group)
        self.codes, self.scales, self.bits, self.group, self.lead = codes, scales, bits, group, lead
        self.shape = torch.Size((*rows, inner))  # type: ignore[assignment]
        self.dtype, self.device = dtype, codes.device
        self.nbytes = codes.nbytes + scales.nbytes

    @classmethod
    def zeros(
        cls, shape: tuple[int, ...], bits: int, lead: int, *, dtype: torch.dtype, device: torch.device
    ) -> "PlainWeight":
        """A weight, or a stack, in the groups of kernels/quantized_format.py, for `put` to fill."""
        *rows, inner = shape
        groups = padded_groups(inner, lead)
        codes = torch.zeros((*rows, groups * GROUP * bits // 8), dtype=torch.uint8, device=device)
        scales = torch.zeros((*rows, groups), dtype=torch.bfloat16, device=device)
        codes = codes.view(torch.int8) if bits == 8 else codes
        return cls(codes, scales, inner, bits=bits, group=GROUP, dtype=dtype, lead=lead)

    @property
    def kind(self) -> str:
        """As the Triton products name it."""
        return "int8" if self.bits == 8 else "int4"

    def put(self, first: int, values: torch.Tensor) -> None:
        """See RoundedWeight."""
        assert len(self.shape) == 2 and self.group == GROUP, (self.shape, self.group)
        groups = self.scales.shape[1]
        missing = groups * GROUP - values.shape[1]
        assert 0 <= missing < GROUP, (values.shape, self.shape, self.lead)
        values = F.pad(values.to(self.device, torch.float32), (0, missing)).view(-1, groups, GROUP)
        codes, scales = quantize_groups(values, self.bits)
        stored = slice(first, first + len(values))
        self.codes[stored] = codes.flatten(1) if self.bits == 8 else pack_pairs(codes.flatten(1))
        self.scales[stored] = scales

    def unstacked(self) -> list["PlainWeight"]:
        """See RoundedWeight."""
        assert len(self.shape) == 3, self.shape
        options = {"bits": self.bits, "group": self.group, "lead": self.lead}
        pairs = zip(self.codes, self.scales, strict=True)
        return [PlainWeight(codes, scales, self.shape[-1], dtype=self.dtype, **options) for codes, scales in pairs]

    def multiply(self, x_MK: torch.Tensor, bias: torch.Tensor | None, *, deterministic: bool) -> torch.Tensor:
        """See PreparedWeight."""
        self.check(x_MK, bias)
        if not on_gpu(x_MK):
            return self.multiply_floats(x_MK, bias)
        from shoal.kernels.gpu.linear import launch_linear
        from shoal.kernels.gpu.tables import DEQUANTISED_ROWS

        if not deterministic and len(x_MK) >= DEQUANTISED_ROWS:
            return self.multiply_floats(x_MK, bias)
        return launch_linear(
            x_MK if x_MK.stride(1) == 1 else x_MK.contiguous(),
            self.codes,
            bias,
            deterministic=deterministic,
            kind=self.kind,
            scale=self.scales,
            scale_block=(1, self.group),
            lead=self.lead,
        )

    def multiply_floats(self, x_MK: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The product by torch, of weights made floats a slab of columns at a time."""
        y_MN = torch.empty((len(x_MK), self.shape[0]), dtype=self.dtype, device=self.device)
        step = max(1, SLAB_ELEMENTS // max(1, self.shape[1]))
        for first in range(0, self.shape[0], step):
            held = slice(first, first + step)
            weight = self.floats(self.codes[held], self.scales[held])
            y_MN[:, held] = F.linear(x_MK, weight, None if bias is None else bias[held])
        return y_MN

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """See PreparedWeight."""
        return self.floats(self.codes[ids], self.scales[ids])

    def floats(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """What some columns' codes and scales stand for: [..., inner]."""
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).to(torch.int8) - 8
        wide = codes.unflatten(-1, (-1, self.group)) * scales.float().unsqueeze(-1)
        return wide.flatten(-2)[..., self.lead : self.lead + self.shape[1]].to(self.dtype)
