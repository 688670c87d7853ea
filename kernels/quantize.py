"""Rounding to few bits, as kernels/quantized_format.py describes it: weights once, activations in every product."""

import torch
import torch.nn.functional as F

from shoal.kernels.quantized_format import GROUP, padded_groups

SMALLEST = 1e-30  # groups without a larger value are taken for zeros: no scale is subnormal


def quantize_groups(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights. values: [..., GROUP] float32, finite. Returns codes [..., GROUP] int8 and scales [...] bfloat16."""
    low, high = values.aminmax(dim=-1)
    if bits == 8:
        most = torch.maximum(-low, high)
        scale = most / torch.full_like(most, 127)  # a true quotient: torch on GPUs multiplies by 1 / number
    else:
        scale = torch.where(-low >= high, low, high) / -8
    scale = torch.where(scale.abs() > SMALLEST, scale, 0).bfloat16()
    inverse = torch.where(scale == 0, 0, 1 / scale.float()).unsqueeze(-1)
    limit = (-127, 127) if bits == 8 else (-8, 7)
    return (values * inverse).round_().clamp_(*limit).to(torch.int8), scale


def quantize_rows(x: torch.Tensor, lead: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations. x: [rows, inner], any float type, whose first input is number `lead` of its group.

    A group's scale is max |x| / 127; codes are rounded half to even. Returns codes [rows, groups, GROUP] int8, and
    scales [rows, groups] float32, not a number where x is not finite.
    """
    groups = padded_groups(x.shape[1], lead)
    values = F.pad(x.float(), (lead, groups * GROUP - lead - x.shape[1])).view(len(x), groups, GROUP)
    most = values.abs().amax(-1)
    # a true quotient, as in C: torch turns number / tensor into a product with the reciprocal
    inverse = torch.where(most > SMALLEST, torch.full_like(most, 127) / most, 0)
    scales = torch.where(most > SMALLEST, most / 127, 0) + (values * 0).sum(-1)
    codes = (values * inverse.unsqueeze(-1)).round_().nan_to_num_(0, 0, 0)
    return codes.to(torch.int8), scales
