"""Whole layers in one call of C, where nobody has to be asked in between: the halves of kernels/fused.py one after the
other, with what tensor ranks add up. What they compute, to the bit, is what the halves give.

Shapes: T tokens, H hidden size, R rotary_dim.
"""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from shoal.kernels.build import NativeLibrary
from shoal.kernels.fused import FusedFeedForward, FusedMixer, FusedMixture, NativeStep
from shoal.kernels.native_ranks import NativeGroup, native_ranks
from shoal.kernels.native_types import INT, INT64, POINTER

_LAYERS = (POINTER, INT64, POINTER, POINTER, POINTER, POINTER, INT, POINTER, POINTER, INT)


class NativeLayer(ctypes.Structure):
    """Mirror of Layer in kernels/native/fused.c."""

    _fields_ = (
        ("mixer", POINTER),
        ("feed_forward", POINTER),
        ("mixture", POINTER),
        ("k_cache", POINTER),
        ("v_cache", POINTER),
        ("step", INT64),
        ("rotation", INT64),
    )


class FusedLayer(NamedTuple):
    """A layer for FusedLayers. keys, values: its caches; group, rotation: its place in `steps` and `cos_sins`; rotation
    None: no rotary positions.
    """

    mixer: FusedMixer
    feed_forward: FusedFeedForward | FusedMixture
    keys: torch.Tensor
    values: torch.Tensor
    group: int
    rotation: int | None


class FusedLayers:
    """Consecutive layers x + mixer(norm(x)), x + feed_forward(norm(x)). group: the tensor ranks that hold a part of
    every layer each; None: one rank alone.
    """

    def __init__(self, library: NativeLibrary, layers: Sequence[FusedLayer], group: NativeGroup | None = None) -> None:
        self.kept, self.group = tuple(layers), group  # the structs point into them
        self.natives = (NativeLayer * len(layers))(
            *(
                NativeLayer(
                    layer.mixer.address, *second_half(layer.feed_forward), layer.keys.data_ptr(),
                    layer.values.data_ptr(), layer.group, -1 if layer.rotation is None else layer.rotation,
                )
                for layer in layers
            )
        )  # fmt: skip
        self.scratch_width = max(max(layer.mixer.scratch_width, layer.feed_forward.scratch_width) for layer in layers)
        self.call = library.function("shoal_fused_layers", _LAYERS, INT)

    def __call__(
        self,
        x_TH: torch.Tensor,
        branch_TH: torch.Tensor | None,
        cos_sins: Sequence[torch.Tensor],
        steps: Sequence[NativeStep],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layers of x + branch (None: of x alone): (x, branch), both [T, H], whose sum is the residual stream. What
        is given is overwritten. cos_sins: [T, R] float32 each, by rotation; steps: by cache group. Collective over the
        group. Raises MemoryError and what the group's check raises.
        """
        out_TH = torch.empty_like(x_TH) if branch_TH is None else branch_TH
        assert x_TH.is_contiguous() and out_TH.is_contiguous()
        scratch = x_TH.new_empty(len(x_TH) * self.scratch_width)
        step_pointers = (POINTER * len(steps))(*map(ctypes.addressof, steps))
        tables = (POINTER * len(cos_sins))(*(table.data_ptr() for table in cos_sins))
        header = bytearray() if self.group is None else self.group.sum_header(x_TH.dtype, x_TH.shape)
        ranks = None if self.group is None else native_ranks(self.group, header)
        status = self.call(
            ctypes.addressof(self.natives), len(self.natives),
            ctypes.addressof(step_pointers), ctypes.addressof(tables),
            x_TH.data_ptr(), out_TH.data_ptr(), branch_TH is not None,
            None if ranks is None else ctypes.addressof(ranks), scratch.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        check_layers(status, len(x_TH), self.group)
        return x_TH, out_TH


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
