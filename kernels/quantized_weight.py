"""QuantizedWeight: codes and scales of a linear's weight in the format of kernels/quantized_format.py; made of floats,
and made floats again.
"""

from collections.abc import Iterator

import torch

from shoal.kernels.quantized_format import BLOCK, GROUP, padded_groups

ZERO = {8: 128, 4: 8}  # what is added to codes when they are stored
SMALLEST = 1e-30  # groups without a larger value are taken for zeros: no scale is subnormal


def quantize_groups(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """values: [..., GROUP] float32, finite. Returns codes [..., GROUP] int8 and scales [...] bfloat16."""
    low, high = values.aminmax(dim=-1)
    if bits == 8:
        scale = torch.maximum(-low, high) / 127
    else:
        scale = torch.where(-low >= high, low, high) / -8
    scale = torch.where(scale.abs() > SMALLEST, scale, 0).bfloat16()
    inverse = torch.where(scale == 0, 0, 1 / scale.float()).unsqueeze(-1)
    limit = (-127, 127) if bits == 8 else (-8, 7)
    return (values * inverse).round_().clamp_(*limit).to(torch.int8), scale


class QuantizedWeight:
    """A weight [columns, inner], or a stack of them [count, columns, inner], of `bits` (8 or 4) bits, in blocked order.

    lead: inputs of the first group before the first column held. codes: uint8 [(count,) blocks, groups, GROUP * BLOCK *
    bits / 8]; scales: bfloat16 [(count,) blocks, groups, BLOCK]. A new one is all zeros; `put` fills it.
    """

    def __init__(self, shape: tuple[int, ...], bits: int, lead: int = 0, *, device: torch.device | str = "cpu") -> None:
        *count, columns, inner = shape
        blocks, groups = -(-columns // BLOCK), padded_groups(inner, lead)
        self.shape, self.bits, self.lead = torch.Size(shape), bits, lead
        self.codes = torch.zeros((*count, blocks, groups, GROUP * BLOCK * bits // 8), dtype=torch.uint8, device=device)
        self.scales = torch.zeros((*count, blocks, groups, BLOCK), dtype=torch.bfloat16, device=device)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def __getitem__(self, index: int) -> "QuantizedWeight":
        """One weight of a stack, sharing its memory."""
        assert len(self.shape) == 3, self.shape
        one = object.__new__(QuantizedWeight)
        one.shape, one.bits, one.lead = torch.Size(self.shape[1:]), self.bits, self.lead
        one.codes, one.scales = self.codes[index], self.scales[index]
        return one

    def columns(self, first: int, stop: int) -> "QuantizedWeight":
        """Columns [first, stop) of one weight, sharing its memory; first is a multiple of BLOCK."""
        assert len(self.shape) == 2 and first % BLOCK == 0, (self.shape, first)
        part, blocks = object.__new__(QuantizedWeight), slice(first // BLOCK, -(-stop // BLOCK))
        part.shape, part.bits, part.lead = torch.Size((stop - first, self.shape[1])), self.bits, self.lead
        part.codes, part.scales = self.codes[blocks], self.scales[blocks]
        return part

    def put(self, first: int, values: torch.Tensor) -> None:
        """Quantise columns [first, first + count) of one weight.

        values: [count, lead + inner up to the end of the last group, or of the whole weight], any float type: whole
        groups, so that the scales are those of the whole weight.
        """
        assert len(self.shape) == 2, self.shape
        groups = self.codes.shape[1]
        missing = groups * GROUP - values.shape[1]
        assert 0 <= missing < GROUP, (values.shape, self.shape, self.lead)
        wide = torch.nn.functional.pad(values.float(), (0, missing)).view(-1, groups, GROUP)
        codes, scales = quantize_groups(wide, self.bits)
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

    def plain(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales in plain order, padded to whole groups."""
        codes = self.int_codes()
        if self.bits == 4:
            pairs = (codes + ZERO[4]).view(torch.uint8).unflatten(-1, (-1, 2))
            codes = pairs[..., 0] | (pairs[..., 1] << 4)
        scales = self.scales.transpose(-1, -2).flatten(-3, -2)
        return codes, scales[..., : self.shape[-2], :].contiguous()

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
        scales = self.scales.float().transpose(-1, -2).flatten(-3, -2)[..., : self.shape[-2], :]
        wide = self.int_codes().unflatten(-1, (-1, GROUP)) * scales.unsqueeze(-1)
        return wide.flatten(-2)[..., self.lead : self.lead + self.shape[-1]]


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
