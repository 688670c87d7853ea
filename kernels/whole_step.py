"""A step of few tokens on one rank alone in one call of C, from token ids to the best tokens: embedding, layers, last
norm, head. What it computes, to the bit, is what the single operations give one after the other.

For CPUs and prepared weights, like kernels/fused.py. Shapes: T tokens, R rows that sample, H hidden size, V vocabulary.
"""

import ctypes
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from shoal.kernels.build import NativeLibrary
from shoal.kernels.fused import FusedLayers, FusedNorm, NativeStep, native_norm, with_bias
from shoal.kernels.native_types import FLOAT, INT, INT64, POINTER
from shoal.kernels.weight import PackedWeight, PreparedWeight

_PROTOTYPE = (POINTER, POINTER, POINTER, INT64, INT64, INT)


class NativeModel(ctypes.Structure):
    """Mirror of Model in kernels/native/whole_step.c."""

    _fields_ = (
        ("embedding", POINTER),
        ("packed_embedding", POINTER),
        ("norm", POINTER),
        ("head", POINTER),
        ("rotations", POINTER),
        ("rotary_dims", POINTER),
        ("num_layers", INT64),
        ("num_rotations", INT64),
        ("hidden", INT64),
        ("eps", FLOAT),
        ("offset", FLOAT),
    )


class NativeWork(ctypes.Structure):
    """Mirror of Work there."""

    _fields_ = (
        *((name, POINTER) for name in ("token_ids", "positions", "rows", "steps", "cos_sins")),
        *((name, POINTER) for name in ("x", "branch", "scratch", "normed", "logits", "best", "values")),
        ("num_tokens", INT64),
        ("num_rows", INT64),
    )


class StepOutput(NamedTuple):
    """What the rows that sample gave. head_RV: the head's product, [R, V]; best: each row's best token, the first among
    equals, or the first whose logit is no number; values: their logits.
    """

    head_RV: torch.Tensor
    best: list[int]
    values: list[float]


class WholeStep:
    """All layers of a model with what stands around them, on one cache.

    runs: the layers, one call each; embedding: [vocabulary, H], a tensor or packed, None where the caller embeds; norm:
    the last one, or None; head_bias: [V] or None; rotary_dims: one per table of cosines and sines.
    """

    def __init__(
        self,
        library: NativeLibrary,
        runs: Sequence[FusedLayers],
        embedding: torch.Tensor | PackedWeight | None,
        norm: FusedNorm | None,
        head: PreparedWeight,
        head_bias: torch.Tensor | None,
        rotary_dims: Sequence[int],
    ) -> None:
        self.runs, self.embeds, self.head, self.rotary_dims = runs, embedding is not None, head, tuple(rotary_dims)
        self.dtype, self.hidden, count = head.dtype, head.shape[1], len(rotary_dims)
        self.native_head, native = with_bias(head, head_bias), native_norm(norm, head.dtype)
        self.tables: tuple[torch.Tensor, ...] = ()
        self.table_pointers, self.dims = (POINTER * count)(), (INT64 * count)(*rotary_dims)
        packed, plain = (embedding, None) if isinstance(embedding, PackedWeight) else (None, embedding)
        assert embedding is None or (embedding.dtype == head.dtype and embedding.shape[1] == self.hidden)
        assert plain is None or plain.is_contiguous()
        self.kept = (embedding, norm, head, head_bias)  # the struct points into them
        self.native = NativeModel(
            None if plain is None else plain.data_ptr(),
            None if packed is None else ctypes.addressof(packed.native),
            native.weight, ctypes.addressof(self.native_head),
            ctypes.addressof(self.table_pointers), ctypes.addressof(self.dims),
            sum(len(run.natives) for run in runs), count, self.hidden, native.eps, native.offset,
        )  # fmt: skip
        self.scratch_width = max(run.scratch_width for run in runs)
        self.call = library.function("shoal_whole_step", _PROTOTYPE, INT)

    def __call__(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        x_TH: torch.Tensor | None,
        rows: Sequence[int],
        tables: Sequence[torch.Tensor],
        steps: Sequence[NativeStep],
        between: Callable[[], None] | None = None,
    ) -> StepOutput:
        """Run the step. Raises MemoryError.

        token_ids, positions: [T] int64; x: [T, H], overwritten, None where the step embeds; rows: the tokens that
        sample; tables: cosines and sines of every position, [positions, R] float32; steps: by cache group; between:
        called after every run of layers.
        """
        num_tokens, num_rows = len(token_ids), len(rows)
        assert (x_TH is None) == self.embeds and token_ids.dtype == positions.dtype == torch.int64
        self.point_at(tables)
        hidden, itemsize = num_tokens * self.hidden, self.dtype.itemsize
        memory = torch.empty(2 * hidden + num_tokens * self.scratch_width + num_rows * self.hidden, dtype=self.dtype)
        cos_sin = torch.empty(num_tokens * sum(self.rotary_dims), dtype=torch.float32)
        head_RV = torch.empty((num_rows, self.head.shape[0]), dtype=self.dtype)
        x = memory.data_ptr()
        branch = x + hidden * itemsize
        normed = branch + hidden * itemsize
        scratch = normed + num_rows * self.hidden * itemsize
        row_numbers, best, values = (INT64 * num_rows)(*rows), (INT64 * num_rows)(), (FLOAT * num_rows)()
        step_pointers = (POINTER * len(steps))(*map(ctypes.addressof, steps))
        starts = itertools.accumulate(self.rotary_dims[:-1], initial=0)
        cos_sins = (POINTER * len(tables))(*(cos_sin.data_ptr() + 4 * num_tokens * start for start in starts))
        work = NativeWork(
            token_ids.data_ptr(), positions.data_ptr(), ctypes.addressof(row_numbers),
            ctypes.addressof(step_pointers), ctypes.addressof(cos_sins),
            x if x_TH is None else x_TH.data_ptr(), branch, scratch, normed, head_RV.data_ptr(),
            ctypes.addressof(best), ctypes.addressof(values), num_tokens, num_rows,
        )  # fmt: skip
        first, threads = 0, torch.get_num_threads()
        for run in self.runs:
            count = len(run.natives)
            if self.call(
                ctypes.addressof(self.native),
                ctypes.addressof(work),
                ctypes.addressof(run.natives),
                first,
                count,
                threads,
            ):
                raise MemoryError(f"no memory for the scratch of attention over {num_tokens} tokens")
            first += count
            if between is not None:
                between()
        return StepOutput(head_RV, list(best), list(values))

    def point_at(self, tables: Sequence[torch.Tensor]) -> None:
        """Have C read these tables of cosines and sines; others come when they have grown."""
        for index, table in enumerate(tables):
            if index >= len(self.tables) or table is not self.tables[index]:
                assert table.is_contiguous() and table.shape[1] == self.rotary_dims[index]
                self.table_pointers[index] = table.data_ptr()
        self.tables = tuple(tables)
