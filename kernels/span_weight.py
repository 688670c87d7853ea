"""SpanWeight: a linear's weight of 8 or 4 bits on a GPU, multiplied with activations of 16 or 32 bits (W8A16, W4A16).

w[n, k] = code[n, lead + k] * scale[n, (lead + k) // 32], kept in span order (kernels/quantized_format.py): codes int32
[columns, words], scales bfloat16 [columns, groups], both of whole spans; lead: inputs of the first group that a rank
before this one holds. The experts of a layer are one stack, with a dimension before these. The Triton products
(kernels/gpu/few_bits.py, moe_gemm.py) read the codes as they are; on a CPU, in tests, torch multiplies with the floats
they stand for.
"""

import torch
import torch.nn.functional as F

from shoal.kernels.device import has_gpu_kernels, on_gpu
from shoal.kernels.quantize import quantize_groups
from shoal.kernels.quantized_format import GROUP, SLAB, SPAN, padded_spans
from shoal.kernels.weight import RoundedWeight


def pack_spans(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes in span order. codes: int8 [..., inputs], whole spans. Returns int32 [..., words]."""
    lanes = 32 // bits
    unsigned = (codes.to(torch.int32) + 2 ** (bits - 1)).unflatten(-1, (-1, lanes, SPAN // lanes))
    words = unsigned[..., 0, :].clone()
    for lane in range(1, lanes):
        words |= unsigned[..., lane, :] << (bits * lane)
    return words.flatten(-2)


def unpack_spans(words: torch.Tensor, bits: int) -> torch.Tensor:
    """What pack_spans was given: int32."""
    lanes = 32 // bits
    spans = words.unflatten(-1, (-1, SPAN // lanes))
    codes = torch.stack([(spans >> (bits * lane)) & (2**bits - 1) for lane in range(lanes)], dim=-2)
    return codes.flatten(-3) - 2 ** (bits - 1)


class SpanWeight(RoundedWeight):
    """codes, scales: as above, contiguous, on one device. inner: inputs held; dtype: of activations. fours: a span's
    scales as one int64.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        inner: int,
        *,
        bits: int,
        dtype: torch.dtype,
        lead: int = 0,
    ) -> None:
        assert bits in (8, 4) and codes.dtype == torch.int32 and scales.dtype == torch.bfloat16, (bits, codes.dtype)
        assert codes.shape[:-1] == scales.shape[:-1], (codes.shape, scales.shape)
        assert codes.shape[-1] * 32 // bits == scales.shape[-1] * GROUP, (codes.shape, scales.shape, bits)
        assert 0 <= lead < GROUP and scales.shape[-1] * GROUP == padded_spans(inner, lead) * SPAN, (lead, inner)
        self.codes, self.scales, self.bits, self.lead = codes, scales, bits, lead
        self.fours = scales.view(torch.int64) if scales.shape[-1] else scales.to(torch.int64)
        self.shape = torch.Size((*codes.shape[:-1], inner))  # type: ignore[assignment]
        self.dtype, self.device = dtype, codes.device
        self.nbytes = codes.nbytes + scales.nbytes

    @classmethod
    def zeros(
        cls, shape: tuple[int, ...], bits: int, lead: int, *, dtype: torch.dtype, device: torch.device
    ) -> "SpanWeight":
        """A weight, or a stack, for `put` to fill."""
        *rows, inner = shape
        inputs = padded_spans(inner, lead) * SPAN
        codes = torch.zeros((*rows, inputs * bits // 32), dtype=torch.int32, device=device)
        scales = torch.zeros((*rows, inputs // GROUP), dtype=torch.bfloat16, device=device)
        return cls(codes, scales, inner, bits=bits, dtype=dtype, lead=lead)

    def put(self, first: int, values: torch.Tensor) -> None:
        """See RoundedWeight."""
        assert len(self.shape) == 2, self.shape
        missing = self.scales.shape[1] * GROUP - values.shape[1]
        assert 0 <= missing < SPAN, (values.shape, self.shape, self.lead)
        values = F.pad(values.to(self.device, torch.float32), (0, missing)).unflatten(1, (-1, GROUP))
        codes, scales = quantize_groups(values, self.bits)
        stored = slice(first, first + len(values))
        self.codes[stored] = pack_spans(codes.flatten(1), self.bits)
        self.scales[stored] = scales

    def unstacked(self) -> list["SpanWeight"]:
        """See RoundedWeight."""
        assert len(self.shape) == 3, self.shape
        pairs = zip(self.codes, self.scales, strict=True)
        return [
            SpanWeight(codes, scales, self.shape[-1], bits=self.bits, dtype=self.dtype, lead=self.lead)
            for codes, scales in pairs
        ]

    def multiply(self, x_MK: torch.Tensor, bias: torch.Tensor | None, *, deterministic: bool) -> torch.Tensor:
        """See PreparedWeight."""
        self.check(x_MK, bias)
        if not on_gpu(x_MK):
            return self.multiply_floats(x_MK, bias)
        from shoal.kernels.gpu.few_bits import launch_few_bits
        from shoal.kernels.gpu.tables import DEQUANTISED_ROWS

        if not deterministic and len(x_MK) >= DEQUANTISED_ROWS[self.bits]:
            return self.multiply_floats(x_MK, bias)
        x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
        return launch_few_bits(x_MK, self, bias, deterministic=deterministic)

    def multiply_floats(self, x_MK: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The product by torch, of weights made floats a slab of columns at a time."""
        y_MN = torch.empty((len(x_MK), self.shape[0]), dtype=self.dtype, device=self.device)
        step = max(1, SLAB // max(1, self.shape[1]))
        for first in range(0, self.shape[0], step):
            held = slice(first, first + step)
            y_MN[:, held] = F.linear(x_MK, self.slab(held), None if bias is None else bias[held])
        return y_MN

    def slab(self, held: slice) -> torch.Tensor:
        """What some neighbouring columns stand for: [columns, inner]."""
        if not has_gpu_kernels(self.device):
            return self.floats(self.codes[held], self.scales[held])
        from shoal.kernels.gpu.few_bits_floats import launch_floats

        codes, fours = self.codes[held], self.fours[held]
        return launch_floats(codes, fours, self.shape[1], bits=self.bits, lead=self.lead, dtype=self.dtype)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """See PreparedWeight."""
        return self.floats(self.codes[ids], self.scales[ids])

    def floats(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """What some columns' codes and scales stand for: [..., inner]."""
        wide = unpack_spans(codes, self.bits).unflatten(-1, (-1, GROUP)) * scales.float().unsqueeze(-1)
        return wide.flatten(-2)[..., self.lead : self.lead + self.shape[-1]].to(self.dtype)
