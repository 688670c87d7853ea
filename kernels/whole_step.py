"""A step of few tokens in one call of C, from token ids to the best tokens: embedding, layers, last norm, head; or of a
pipeline stage from or to hidden states. Tensor ranks whose collectives are C tell each other what they must in between.
What it computes, to the bit, is what the single operations give one after the other.

For CPUs and prepared weights, like kernels/fused.py. Shapes: T tokens, R rows that sample, H hidden size, V vocabulary
held here.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from shoal.kernels.build import NativeLibrary
from shoal.kernels.fused import FusedNorm, NativeNorm, NativeStep, native_norm, with_bias
from shoal.kernels.fused_layers import FusedLayers, check_layers
from shoal.kernels.native_ranks import NativeGroup, buffer_address, native_ranks
from shoal.kernels.native_types import DTYPE_CODES, FLOAT, INT, INT64, POINTER
from shoal.kernels.weight import PackedWeight, PreparedWeight

_PROTOTYPE = (POINTER, POINTER, POINTER, INT64, INT64, INT)


class NativeModel(ctypes.Structure):
    """Mirror of Model in kernels/native/whole_step.c."""

    _fields_ = (
        *((name, POINTER) for name in ("embedding", "packed_embedding", "learned", "head", "rotations", "rotary_dims")),
        ("norm", NativeNorm),
        *((name, INT64) for name in ("type", "num_layers", "num_rotations", "hidden")),
        *((name, INT64) for name in ("first_token", "num_embedded", "first_output")),
        ("embed_scale", FLOAT),
        ("softcap", FLOAT),
    )


class NativeWork(ctypes.Structure):
    """Mirror of Work there."""

    _fields_ = (
        *((name, POINTER) for name in ("token_ids", "positions", "rows", "steps", "cos_sins")),
        *((name, POINTER) for name in ("x", "branch", "scratch", "normed", "logits", "best", "values")),
        *((name, POINTER) for name in ("ranks", "gather", "told", "heard")),
        ("num_tokens", INT64),
        ("num_rows", INT64),
    )


class StepEmbedding(NamedTuple):
    """Rows of the tokens from first_token on, [rows, H], a tensor or packed; what they are multiplied by, rounded to
    their type, or None; rows for the positions from 0 on that are added to them, [positions, H], or None.
    """

    weight: torch.Tensor | PackedWeight
    first_token: int = 0
    scale: float | None = None
    learned: torch.Tensor | None = None


class StepHead(NamedTuple):
    """What follows the layers: a norm or None, and the head of the tokens from first_token on, [V, H]; bias: [V] or
    None; softcap: of the logits (kernels/softcap.py), or None.
    """

    norm: FusedNorm | None
    weight: PreparedWeight
    bias: torch.Tensor | None
    first_token: int = 0
    softcap: float | None = None


class StepOutput(NamedTuple):
    """What the rows that sample gave. head_RV: the head's product, [R, V], not capped; best: each row's best token of
    all ranks', the first among equals, or the first whose logit is no number; values: their logits, capped. sampled:
    best is the best after temperature, filters and noise, as the rows' settings say.
    """

    head_RV: torch.Tensor
    best: list[int]
    values: list[float]
    sampled: bool = False


class WholeStep:
    """All layers of a pipeline stage with what stands around them, on one cache.

    runs: the layers, one call each; embedding: None where the caller embeds or another stage does; head: None where
    another stage has it; rotary_dims: one per table of cosines and sines; group: the tensor ranks, None for one alone.
    """

    def __init__(
        self,
        library: NativeLibrary,
        runs: Sequence[FusedLayers],
        embedding: StepEmbedding | None,
        head: StepHead | None,
        rotary_dims: Sequence[int],
        dtype: torch.dtype,
        hidden: int,
        group: NativeGroup | None = None,
    ) -> None:
        self.runs, self.embeds, self.rotary_dims, self.group = runs, embedding is not None, tuple(rotary_dims), group
        self.dtype, self.hidden, count = dtype, hidden, len(rotary_dims)
        self.num_outputs = 0 if head is None else head.weight.shape[0]
        self.tables: list[torch.Tensor | None] = [None] * count
        self.table_pointers, self.dims = (POINTER * count)(), (INT64 * count)(*rotary_dims)
        self.native = NativeModel(
            rotations=ctypes.addressof(self.table_pointers), rotary_dims=ctypes.addressof(self.dims),
            type=DTYPE_CODES[dtype], num_layers=sum(len(run.natives) for run in runs), num_rotations=count,
            hidden=hidden,
        )  # fmt: skip
        self.kept = (embedding, head)  # the struct points into them
        if embedding is not None:
            self.set_embedding(embedding)
        if head is not None:
            self.set_head(head)
        self.scratch_width = max(run.scratch_width for run in runs)
        self.call = library.function("shoal_whole_step", _PROTOTYPE, INT)

    def set_embedding(self, embedding: StepEmbedding) -> None:
        """Where C finds it."""
        weight = embedding.weight
        assert weight.dtype == self.dtype and weight.shape[1] == self.hidden and weight.shape[0] > 0
        if isinstance(weight, PackedWeight):
            self.native.packed_embedding = ctypes.addressof(weight.native)
        else:
            assert weight.is_contiguous()
            self.native.embedding = weight.data_ptr()
        self.native.first_token, self.native.num_embedded = embedding.first_token, weight.shape[0]
        self.native.embed_scale = embedding.scale or 0.0
        if (learned := embedding.learned) is not None:
            assert learned.dtype == self.dtype and learned.is_contiguous() and learned.shape[1] == self.hidden
            self.native.learned = learned.data_ptr()

    def set_head(self, head: StepHead) -> None:
        """Likewise."""
        assert head.weight.dtype == self.dtype and head.weight.shape[1] == self.hidden and head.weight.shape[0] > 0
        self.native_head, self.native.norm = with_bias(head.weight, head.bias), native_norm(head.norm, self.dtype)
        self.native.head, self.native.first_output = ctypes.addressof(self.native_head), head.first_token
        self.native.softcap = head.softcap or 0.0

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
    """One shape of step, with its memory. x_TH: the hidden states, going in where the whole step does not embed, coming
    out where it has no head.
    """

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
        self.head_RV = torch.empty((num_rows, whole.num_outputs), dtype=dtype)
        self.best, self.values = (INT64 * num_rows)(), (FLOAT * num_rows)()
        cos_sins = [torch.empty(num_tokens * dim, dtype=torch.float32) for dim in whole.rotary_dims]
        cos_sin_pointers = (POINTER * len(cos_sins))(*(one.data_ptr() for one in cos_sins))
        step_pointers, row_numbers = (POINTER * len(steps))(*map(ctypes.addressof, steps)), (INT64 * num_rows)(*rows)
        self.kept = [token_ids, positions, steps, memory, cos_sins, cos_sin_pointers, step_pointers, row_numbers]
        branch = memory.data_ptr()
        normed = branch + hidden * dtype.itemsize
        self.work = NativeWork(
            token_ids=token_ids.data_ptr(), positions=positions.data_ptr(), rows=ctypes.addressof(row_numbers),
            steps=ctypes.addressof(step_pointers), cos_sins=ctypes.addressof(cos_sin_pointers), x=self.x_TH.data_ptr(),
            branch=branch, scratch=normed + num_rows * whole.hidden * dtype.itemsize, normed=normed,
            logits=self.head_RV.data_ptr(), best=ctypes.addressof(self.best), values=ctypes.addressof(self.values),
            num_tokens=num_tokens, num_rows=num_rows,
        )  # fmt: skip
        if whole.group is not None:
            self.join(whole.group)
        self.runs, first = [], 0
        for run in whole.runs:
            pointers = (whole.native, self.work, run.natives)
            self.runs.append((*map(ctypes.addressof, pointers), first, len(run.natives)))
            first += len(run.natives)

    def join(self, group: NativeGroup) -> None:
        """Have the step add up and compare with the group's other ranks."""
        num_rows = len(self.rows)
        sum_header = group.sum_header(self.x_TH.dtype, self.x_TH.shape)
        gather_header = group.gather_header(torch.float64, (group.size * num_rows, 2))
        ranks, bests = native_ranks(group, sum_header), torch.empty((1 + group.size, num_rows, 2), dtype=torch.float64)
        self.work.ranks, self.work.gather = ctypes.addressof(ranks), buffer_address(gather_header)
        self.work.told, self.work.heard = bests.data_ptr(), bests.data_ptr() + 16 * num_rows
        self.kept += [sum_header, gather_header, ranks, bests]

    def __call__(self, tables: Sequence[torch.Tensor], between: Callable[[], None] | None = None) -> StepOutput:
        """Run the step. The result is valid until the next call. tables: see point_at; between: called after every run
        of layers. Collective over the group. Raises MemoryError and what the group's check raises.
        """
        self.whole.point_at(tables)
        threads = torch.get_num_threads()
        for run in self.runs:
            check_layers(self.whole.call(*run, threads), len(self.x_TH), self.whole.group)
            if between is not None:
                between()
        return StepOutput(self.head_RV, list(self.best), list(self.values))
