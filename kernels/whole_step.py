"""A step of few tokens on one rank alone in one call of C, from token ids to the best tokens: embedding, layers, last
norm, head. What it computes, to the bit, is what the single operations give one after the other.

For CPUs and prepared weights, like kernels/fused.py. Shapes: T tokens, R rows that sample, H hidden size, V vocabulary.
"""

import ctypes
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
        self.tables: list[torch.Tensor | None] = [None] * count
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

    def prepare(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        rows: Sequence[int],
        steps: Sequence[NativeStep],
    ) -> "WholeCall":
        """What a step needs, to be run as often as these tensors get other contents.

        token_ids, positions: [T] int64; rows: the tokens that sample; steps: by cache group.
        """
        return WholeCall(self, token_ids, positions, rows, steps)

    def point_at(self, tables: Sequence[torch.Tensor]) -> None:
        """Have C read these tables of cosines and sines, [positions, rotary_dim] float32; others come when they have
        grown.
        """
        for index, table in enumerate(tables):
            if self.tables[index] is not table:
                assert table.is_contiguous() and table.shape[1] == self.rotary_dims[index]
                self.table_pointers[index], self.tables[index] = table.data_ptr(), table


class WholeCall:
    """One shape of step, with its memory."""

    def __init__(
        self,
        whole: WholeStep,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        rows: Sequence[int],
        steps: Sequence[NativeStep],
    ) -> None:
        assert token_ids.dtype == positions.dtype == torch.int64
        self.whole, self.rows = whole, list(rows)
        num_tokens, num_rows, dtype = len(token_ids), len(rows), whole.dtype
        hidden = num_tokens * whole.hidden
        self.x_TH = torch.empty((num_tokens, whole.hidden), dtype=dtype)
        memory = torch.empty(hidden + num_tokens * whole.scratch_width + num_rows * whole.hidden, dtype=dtype)
        self.head_RV = torch.empty((num_rows, whole.head.shape[0]), dtype=dtype)
        self.best, self.values = (INT64 * num_rows)(), (FLOAT * num_rows)()
        cos_sins = [torch.empty(num_tokens * dim, dtype=torch.float32) for dim in whole.rotary_dims]
        cos_sin_pointers = (POINTER * len(cos_sins))(*(one.data_ptr() for one in cos_sins))
        step_pointers, row_numbers = (POINTER * len(steps))(*map(ctypes.addressof, steps)), (INT64 * num_rows)(*rows)
        self.kept = (token_ids, positions, steps, memory, cos_sins, cos_sin_pointers, step_pointers, row_numbers)
        branch = memory.data_ptr()
        normed = branch + hidden * dtype.itemsize
        scratch = normed + num_rows * whole.hidden * dtype.itemsize
        self.work = NativeWork(
            token_ids.data_ptr(), positions.data_ptr(), ctypes.addressof(row_numbers),
            ctypes.addressof(step_pointers), ctypes.addressof(cos_sin_pointers), self.x_TH.data_ptr(), branch, scratch,
            normed, self.head_RV.data_ptr(), ctypes.addressof(self.best), ctypes.addressof(self.values),
            num_tokens, num_rows,
        )  # fmt: skip
        self.runs, first = [], 0
        for run in whole.runs:
            pointers = (whole.native, self.work, run.natives)
            self.runs.append((*map(ctypes.addressof, pointers), first, len(run.natives)))
            first += len(run.natives)

    def __call__(self, tables: Sequence[torch.Tensor], between: Callable[[], None] | None = None) -> StepOutput:
        """Run the step; x_TH holds the embeddings where the whole step has none. The result is valid until the next
        call. tables: see point_at; between: called after every run of layers. Raises MemoryError.
        """
        self.whole.point_at(tables)
        threads = torch.get_num_threads()
        for run in self.runs:
            if self.whole.call(*run, threads):
                raise MemoryError(f"no memory for the scratch of attention over {len(self.x_TH)} tokens")
            if between is not None:
                between()
        return StepOutput(self.head_RV, list(self.best), list(self.values))
