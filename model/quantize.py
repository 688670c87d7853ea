"""Quantising while weights arrive: a rank's quantised tensors are filled slab by slab, so that no float copy of a
whole weight is ever held.

A slab is some columns of one part of a local parameter (model/parameters.py), with the inputs of whole groups: a rank
whose slice begins or ends within a group sees its neighbours' inputs too, and so finds the scales that every layout
finds.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from shoal.kernels.device import has_gpu_kernels
from shoal.kernels.fp8_weight import Fp8ChannelWeight
from shoal.kernels.quantized_format import BLOCK
from shoal.kernels.quantized_weight import QuantizedWeight
from shoal.kernels.span_weight import SpanWeight
from shoal.kernels.weight import RoundedWeight
from shoal.model.parameters import BITS, LocalParameter
from shoal.parallel.sharding import Range

SLAB_ELEMENTS = 1 << 22  # floats held at once: 16 MiB, and a few times as much while they are rounded


class Slab(NamedTuple):
    """Values to be quantised. source: ranges of the logical parameter to be read. weight, column: where they go."""

    logical: str
    source: tuple[Range, Range]
    weight: RoundedWeight
    column: int

    @property
    def shape(self) -> tuple[int, int]:
        """Columns and inputs to be read."""
        (first, stop), (start, end) = self.source
        return stop - first, end - start


def new_parameter(parameter: LocalParameter, dtype: torch.dtype, device: torch.device) -> torch.Tensor | RoundedWeight:
    """Memory for one local tensor, to be filled. Quantised ones are for activations of `dtype`."""
    if parameter.rounding is None:
        return torch.empty(parameter.shape, dtype=dtype, device=device)
    if parameter.rounding == "fp8":
        return Fp8ChannelWeight(parameter.shape, parameter.lead, dtype=dtype, device=device)
    bits = BITS[parameter.rounding]
    if has_gpu_kernels(device):
        return SpanWeight.zeros(parameter.shape, bits, parameter.lead, dtype=dtype, device=device)
    return QuantizedWeight(parameter.shape, bits, parameter.lead, dtype=dtype)


def slabs(parameter: LocalParameter, weight: RoundedWeight, widths: Mapping[str, int]) -> Iterator[Slab]:
    """Everything to be read for one quantised tensor. widths: inputs of every logical parameter."""
    weights = weight.unstacked() if len(weight.shape) == 3 else [weight]
    for part in parameter.parts:
        (first, stop), held = part.source
        inputs = parameter.whole_groups(held, widths[part.logical])
        slot, column = (part.dest[0][0], part.dest[1][0]) if len(part.dest) == 3 else (0, part.dest[0][0])
        step = max(1, SLAB_ELEMENTS // (inputs[1] - inputs[0]) // BLOCK) * BLOCK
        for row in range(first, stop, step):
            yield Slab(part.logical, ((row, min(row + step, stop)), inputs), weights[slot], column + row - first)
