"""Whole layers in one call of C, where nobody has to be asked in between: the halves of kernels/fused.py one after the
other, with what tensor ranks add up. What they compute, to the bit, is what the halves give.

Shapes: T tokens, H hidden size, R rotary_dim.
"""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from shoal.kernels.build import NativeLibrary
from shoal.kernels.fused import (
    FusedFeedForward,
    FusedMixer,
    FusedMixture,
    FusedNorm,
    NativeNorm,
    NativeStep,
    native_norm,
    vector_address,
)
from shoal.kernels.native_ranks import NativeGroup, native_ranks
from shoal.kernels.native_types import INT, INT64, POINTER

_LAYERS = (POINTER, INT64, POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, INT)


class NativeEnding(ctypes.Structure):
    """Mirror of Ending in kernels/native/fused.c."""

    _fields_ = (("biases", POINTER * 2), ("norm", NativeNorm), ("of_sum", ctypes.c_int32))


class NativeLayer(ctypes.Structure):
    """Mirror of Layer there."""

    _fields_ = (
        ("mixer", POINTER),
        ("feed_forward", POINTER),
        ("mixture", POINTER),
        ("k_cache", POINTER),
        ("v_cache", POINTER),
        ("endings", NativeEnding * 2),
        ("step", INT64),
        ("rotation", INT64),
        ("parallel", ctypes.c_int32),
    )


class FusedEnding(NamedTuple):
    """What happens to a branch, once the parts of all ranks are summed, on its way into the residual stream: biases [H]
    are added, two at most; and it is normalised, or with of_sum the stream that it came to.
    """

    biases: tuple[torch.Tensor, ...] = ()
    norm: FusedNorm | None = None
    of_sum: bool = False

    def native(self, dtype: torch.dtype, hidden: int) -> NativeEnding:
        """Its struct, which points into it."""
        addresses = [vector_address(bias, dtype, hidden) for bias in self.biases]
        assert self.norm is None or len(self.norm.weight) == hidden
        return NativeEnding((POINTER * 2)(*addresses), native_norm(self.norm, dtype), self.of_sum)


class FusedLayer(NamedTuple):
    """A layer for FusedLayers. keys, values: its caches; group, rotation: its place in `steps` and `cos_sins`; rotation
    None: no rotary positions; endings: of the mixer's branch and of the other one; parallel: both branches read the
    same x and are one sum, whose ending is the second.
    """

    mixer: FusedMixer
    feed_forward: FusedFeedForward | FusedMixture
    keys: torch.Tensor
    values: torch.Tensor
    group: int
    rotation: int | None
    endings: tuple[FusedEnding, FusedEnding] = (FusedEnding(), FusedEnding())
    parallel: bool = False

    @property
    def scratch_width(self) -> int:
        """Elements that a token's layer works in."""
        beside = self.mixer.hidden if self.parallel else 0  # the second branch until it comes to the first
        return max(self.mixer.scratch_width, self.feed_forward.scratch_width + beside)

    def native(self) -> NativeLayer:
        """Its struct, which points into it."""
        endings = [ending.native(self.keys.dtype, self.mixer.hidden) for ending in self.endings]
        return NativeLayer(
            self.mixer.address, *second_half(self.feed_forward), self.keys.data_ptr(), self.values.data_ptr(),
            (NativeEnding * 2)(*endings), self.group, -1 if self.rotation is None else self.rotation, self.parallel,
        )  # fmt: skip


class FusedLayers:
    """Consecutive layers x + mixer(norm(x)), x + feed_forward(norm(x)), or as their endings and `parallel` have it.
    group: the tensor ranks that hold a part of every layer each; None: one rank alone.
    """

    def __init__(self, library: NativeLibrary, layers: Sequence[FusedLayer], group: NativeGroup | None = None) -> None:
        self.kept, self.group = tuple(layers), group  # the structs point into them
        self.natives = (NativeLayer * len(layers))(*(layer.native() for layer in layers))
        self.scratch_width = max(layer.scratch_width for layer in layers)
        self.call = library.function("shoal_fused_layers", _LAYERS, INT)

    def __call__(
        self, x_TH: torch.Tensor, cos_sins: Sequence[torch.Tensor], steps: Sequence[NativeStep]
    ) -> torch.Tensor:
        """The layers of x: [T, H], the residual stream, in place. cos_sins: [T, R] float32 each, by rotation; steps: by
        cache group. Collective over the group. Returns x. Raises MemoryError and what the group's check raises.
        """
        assert x_TH.is_contiguous()
        branch_TH, scratch = torch.empty_like(x_TH), x_TH.new_empty(len(x_TH) * self.scratch_width)
        step_pointers = (POINTER * len(steps))(*map(ctypes.addressof, steps))
        tables = (POINTER * len(cos_sins))(*(table.data_ptr() for table in cos_sins))
        header = bytearray() if self.group is None else self.group.sum_header(x_TH.dtype, x_TH.shape)
        ranks = None if self.group is None else native_ranks(self.group, header)
        status = self.call(
            ctypes.addressof(self.natives), len(self.natives), ctypes.addressof(step_pointers),
            ctypes.addressof(tables), x_TH.data_ptr(), branch_TH.data_ptr(),
            None if ranks is None else ctypes.addressof(ranks), scratch.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        check_layers(status, len(x_TH), self.group)
        return x_TH


def check_layers(status: int, num_tokens: int, group: NativeGroup | None) -> None:
    """Raise what the status of whole layers stands for, if it is not 0."""
    if status < 0:
        raise MemoryError(f"no memory for the scratch of attention over {num_tokens} tokens")
    if status:
        assert group is not None, "a rank alone waits for nobody"
        group.check(status)


def second_half(half: FusedFeedForward | FusedMixture) -> tuple[int | None, int | None]:
    """Where a layer's feed-forward is, and where its mixture; one of them is None."""
    return (None, half.address) if isinstance(half, FusedMixture) else (half.address, None)
