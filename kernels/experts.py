"""Routed gated experts of a layer: y_t = sum over the experts e of t of weight_e down_e(act(gate_e x_t) * up_e x_t).

C over prepared weights (kernels/native/experts.c): tokens sorted by expert, one team of threads for all experts. A
token's experts are summed in rising order in float32, so its result does not depend on the other tokens. Without C, and
on GPUs, parallel/experts.py computes expert after expert.
"""

import ctypes
from collections.abc import Sequence

import torch

from shoal.kernels.activation import KINDS, gated_activation_reference
from shoal.kernels.build import NativeLibrary
from shoal.kernels.linear import linear_reference
from shoal.kernels.native_types import INT, INT64, POINTER
from shoal.kernels.weight import NativeWeight, PreparedWeight

_PROTOTYPE = (POINTER, POINTER, POINTER, POINTER, INT64, POINTER, POINTER, INT)
SLICE_PAIRS = 4096  # (token, expert) pairs of a call: bounds its scratch


def experts_reference(
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
    gate_up: Sequence[torch.Tensor],
    down: Sequence[torch.Tensor],
    kind: str,
) -> torch.Tensor:
    """Token after token in float32; gate_up [2 F, H] and down [H, F] of every expert. Returns float32 [T, H]."""
    out_TH = torch.zeros(x_TH.shape)
    for token, (weights, ids) in enumerate(zip(weights_TK, ids_TK.tolist(), strict=True)):
        for weight, expert in zip(weights, ids, strict=True):
            active = gated_activation_reference(linear_reference(x_TH[token], gate_up[expert]), kind)
            out_TH[token] += weight * linear_reference(active, down[expert]).float()
    return out_TH


class ExpertsStruct(ctypes.Structure):
    """Mirror of Experts in kernels/native/experts.h."""

    _fields_ = (
        ("up", POINTER),
        ("down", POINTER),
        ("first", INT64),
        ("count", INT64),
        ("top_k", INT64),
        ("kind", ctypes.c_int32),
    )


class NativeExperts:
    """Some experts of a layer, from number `first` on. gate_up: [2 F, H], down: [H, F] each; kind: a key of KINDS."""

    def __init__(
        self,
        library: NativeLibrary,
        gate_up: Sequence[PreparedWeight],
        down: Sequence[PreparedWeight],
        first: int,
        kind: str,
    ) -> None:
        assert len(gate_up) == len(down) > 0 and gate_up[0].shape[0] == 2 * down[0].shape[1]
        up_structs, down_structs = ((NativeWeight * len(w))(*(one.native for one in w)) for w in (gate_up, down))
        self.kept = (gate_up, down, up_structs, down_structs)  # the struct points into them
        self.hidden, self.inner = down[0].shape
        self.dtype, self.weight_bytes = down[0].dtype, sum(one.nbytes for one in (*gate_up, *down))
        self.first, self.count, self.kind = first, len(down), KINDS[kind]
        self.pointers = ctypes.addressof(up_structs), ctypes.addressof(down_structs)
        self.call = library.function("shoal_experts", _PROTOTYPE, INT)

    def native(self, top_k: int) -> ExpertsStruct:
        """The struct for tokens of top_k experts each; it lives as long as these experts."""
        return ExpertsStruct(*self.pointers, self.first, self.count, top_k, self.kind)

    def scratch_width(self, top_k: int) -> int:
        """Elements that a token's experts work in."""
        return top_k * (2 * self.hidden + 3 * self.inner)

    def __call__(self, x_TH: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
        """x: [T, H]; weights: [T, K] float32; ids: [T, K] int64, different within a row, over all experts.

        Returns [T, H] in x's dtype: zeros where none of a token's experts is held here. Raises MemoryError.
        """
        tokens, top_k = ids_TK.shape
        x_TH, weights_TK, ids_TK = x_TH.contiguous(), weights_TK.contiguous(), ids_TK.contiguous()
        assert weights_TK.dtype == torch.float32 and ids_TK.dtype == torch.int64
        out_TH, step, native = torch.empty_like(x_TH), max(1, SLICE_PAIRS // top_k), self.native(top_k)
        scratch = x_TH.new_empty(min(tokens, step) * self.scratch_width(top_k))
        for start in range(0, tokens, step):
            x, weights, ids, out = (t[start : start + step] for t in (x_TH, weights_TK, ids_TK, out_TH))
            status = self.call(
                ctypes.byref(native), x.data_ptr(), weights.data_ptr(), ids.data_ptr(), len(x), scratch.data_ptr(),
                out.data_ptr(), torch.get_num_threads(),
            )  # fmt: skip
            if status:
                raise MemoryError(f"no memory to sort {len(x)} tokens by expert")
        return out_TH
