"""QuantizedWeight: y = x w^T + bias with weights of 8 or 4 bits (kernels/quantized_format.py) and x rounded to 8 bits.

x is rounded in the groups of the weight, row by row; a group's products are summed as integers, which is exact. So
y = sum over groups of (sum of codes) * w_scale * x_scale, in float32, then the bias: a row's bits depend on nothing but
the row, always. C kernel on CPUs (kernels/native/quantized.c); without it torch computes the same sums from the rounded
values in float32. The scheme of llama.cpp's Q8_0 and Q4_0; outliers (arXiv:2208.07339) spoil their own group only.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from shoal.kernels.build import native_library
from shoal.kernels.huge_pages import empty_in_huge_pages
from shoal.kernels.native_types import DTYPE_CODES
from shoal.kernels.quantize import quantize_groups, quantize_rows
from shoal.kernels.quantized_format import BLOCK, GROUP, padded_groups
from shoal.kernels.weight import NativeWeight, RoundedWeight

KINDS = {8: 1, 4: 2}  # kernels/native/weight.h
ZERO = {8: 128, 4: 8}  # what is added to codes when they are stored
BLOCK_ROWS = 16  # rows per product without the C kernel: one shape, one order of sums
SLAB_ELEMENTS = 1 << 22  # weights made floats at once without the C kernel


class QuantizedWeight(RoundedWeight):
    """A weight [columns, inner], or a stack of them [count, columns, inner], of `bits` (8 or 4) bits, in blocked order.

    dtype: of activations. lead: inputs of the first group before the first one held. codes: uint8 [(count,) blocks,
    groups, GROUP * BLOCK * bits / 8]; scales: bfloat16 [(count,) blocks, groups, BLOCK]. A new one is all zeros; `put`
    fills it.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        bits: int,
        lead: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
        memory: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        *count, columns, inner = shape
        groups = (*count, -(-columns // BLOCK), padded_groups(inner, lead))
        self.shape, self.bits, self.lead, self.dtype = torch.Size(shape), bits, lead, dtype  # type: ignore[assignment]
        if memory is None:
            codes = empty_in_huge_pages((*groups, GROUP * BLOCK * bits // 8), torch.uint8)
            memory = codes.zero_(), empty_in_huge_pages((*groups, BLOCK), torch.bfloat16).zero_()
        self.codes, self.scales = memory
        self.nbytes = self.codes.nbytes + self.scales.nbytes
        self._library = native_library()
        if self._library is not None and not count:
            super().__init__(self._library)
            pointers = self.codes.data_ptr(), self.scales.data_ptr()
            self.native = NativeWeight(KINDS[bits], DTYPE_CODES[dtype], columns, inner, lead, *pointers)

    def unstacked(self) -> list["QuantizedWeight"]:
        """See RoundedWeight."""
        assert len(self.shape) == 3, self.shape
        pairs = zip(self.codes, self.scales, strict=True)
        return [
            QuantizedWeight(self.shape[1:], self.bits, self.lead, dtype=self.dtype, memory=memory) for memory in pairs
        ]

    def columns(self, first: int, stop: int) -> "QuantizedWeight":
        """Columns [first, stop) of one weight, sharing its memory; first is a multiple of BLOCK."""
        assert len(self.shape) == 2 and first % BLOCK == 0, (self.shape, first)
        blocks = slice(first // BLOCK, -(-stop // BLOCK))
        memory = self.codes[blocks], self.scales[blocks]
        return QuantizedWeight((stop - first, self.shape[1]), self.bits, self.lead, dtype=self.dtype, memory=memory)

    def multiply(self, x_MK: torch.Tensor, bias: torch.Tensor | None, *, deterministic: bool) -> torch.Tensor:
        """See PreparedWeight."""
        if self._library is not None:
            return super().multiply(x_MK, bias, deterministic=deterministic)
        self.check(x_MK, bias)
        return self._multiply_floats(x_MK, bias)

    def _multiply_floats(self, x_MK: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Products of rounded x and weights made floats, over blocks of rows and slabs of columns of one shape each."""
        codes, scales = quantize_rows(x_MK, self.lead)
        rounded = (codes * scales.unsqueeze(-1)).flatten(1)[:, self.lead : self.lead + self.shape[1]]
        rows = -(-len(x_MK) // BLOCK_ROWS) * BLOCK_ROWS
        rounded = F.pad(rounded, (0, 0, 0, rows - len(x_MK)))
        y_MN = torch.empty((rows, self.shape[0]), dtype=x_MK.dtype)
        step = max(1, SLAB_ELEMENTS // max(1, self.codes.shape[1] * GROUP * BLOCK)) * BLOCK
        for first in range(0, self.shape[0], step):
            stop = min(first + step, self.shape[0])
            part = self.columns(first, stop).dequantize()
            for row in range(0, rows, BLOCK_ROWS):
                y = F.linear(rounded[row : row + BLOCK_ROWS], part)
                y_MN[row : row + BLOCK_ROWS, first:stop] = y if bias is None else y + bias[first:stop]
        return y_MN[: len(x_MK)]

    def put(self, first: int, values: torch.Tensor) -> None:
        """See RoundedWeight."""
        assert len(self.shape) == 2, self.shape
        groups = self.codes.shape[1]
        missing = groups * GROUP - values.shape[1]
        assert 0 <= missing < GROUP, (values.shape, self.shape, self.lead)
        codes, scales = quantize_groups(F.pad(values.float(), (0, missing)).view(-1, groups, GROUP), self.bits)
        words, targets = _words(codes, self.bits), self.codes.view(torch.int32).unflatten(-1, (-1, BLOCK))
        for start, stop in _runs(first, first + len(values)):
            block, where = start // BLOCK, slice(start - first, stop - first)
            if (stop - start) % BLOCK == 0 and start % BLOCK == 0:
                blocks = slice(block, stop // BLOCK)
                targets[blocks] = words[where].unflatten(0, (-1, BLOCK)).permute(0, 2, 3, 1)
                self.scales[blocks] = scales[where].unflatten(0, (-1, BLOCK)).transpose(1, 2)
            else:
                within = slice(start % BLOCK, start % BLOCK + stop - start)
                targets[block, :, :, within] = words[where].permute(1, 2, 0)
                self.scales[block, :, within] = scales[where].t()

    def plain_scales(self) -> torch.Tensor:
        """Every scale: bfloat16 [(count,) columns, groups]."""
        return self.scales.transpose(-1, -2).flatten(-3, -2)[..., : self.shape[-2], :]

    def int_codes(self) -> torch.Tensor:
        """Every code: int8 [(count,) columns, groups * GROUP]."""
        stored = self.codes.unflatten(-1, (-1, BLOCK, 4))
        if self.bits == 4:
            stored = torch.stack((stored & 15, stored >> 4), dim=-3).flatten(-4, -3)
        codes = (stored ^ ZERO[8]).view(torch.int8) if self.bits == 8 else stored.view(torch.int8) - ZERO[4]
        # [(count,) blocks, groups, 8, BLOCK, 4] -> [(count,) blocks, BLOCK, groups, 8, 4]
        codes = codes.movedim(-2, -4).flatten(-3).flatten(-3, -2)
        return codes[..., : self.shape[-2], :].contiguous()

    def dequantize(self) -> torch.Tensor:
        """The floats it stands for: float32 of its shape."""
        wide = self.int_codes().unflatten(-1, (-1, GROUP)) * self.plain_scales().float().unsqueeze(-1)
        return wide.flatten(-2)[..., self.lead : self.lead + self.shape[-1]]

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """See PreparedWeight. For weights of 8 bits, which embeddings have."""
        assert self.bits == 8 and len(self.shape) == 2, (self.bits, self.shape)
        block, column = ids // BLOCK, ids % BLOCK
        codes = self.codes.view(torch.int32).unflatten(-1, (-1, BLOCK))[block, :, :, column].contiguous()
        floats = (codes.view(torch.uint8) ^ ZERO[8]).view(torch.int8) * self.scales[block, :, column].float()[..., None]
        return floats.flatten(-2)[..., self.lead : self.lead + self.shape[1]].to(self.dtype).contiguous()


def quantized_linear_reference(
    x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The formula in float64. x: [rows, inner]; bias: [columns]. Returns float64 [rows, columns]."""
    codes, scales = quantize_rows(x, weight.lead)
    dots = torch.einsum("rgk,cgk->rcg", codes.double(), weight.int_codes().unflatten(-1, (-1, GROUP)).double())
    y = (dots * scales.double().unsqueeze(1) * weight.plain_scales().double()).sum(-1)
    return y if bias is None else y + bias.double()


def _words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [columns, groups, GROUP] as stored, four bytes in an int32: [columns, groups, 8], or [.., 4] for int4."""
    if bits == 8:
        return (codes.view(torch.uint8) ^ ZERO[8]).view(torch.int32)
    low, high = (codes + ZERO[4]).view(torch.uint8).unflatten(-1, (-1, 2, 4)).unbind(-2)
    return (low | (high << 4)).view(torch.int32).flatten(-2)


def _runs(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """[start, stop) as the part before the first whole block, the whole blocks, and the rest; empty ones left out."""
    inside = min(-(-start // BLOCK) * BLOCK, stop)
    last = max(stop // BLOCK * BLOCK, inside)
    return ((a, b) for a, b in ((start, inside), (inside, last), (last, stop)) if a < b)
