"""BatchInput: what one step hands to every layer. Built by the worker from a StepPlan, read by the mixers.

T tokens of R rows (requests), G cache groups; int64 positions and tokens, int32 tables.
"""

from dataclasses import dataclass, field

import torch

from shoal.kernels.fused import NativeStep, make_step
from shoal.kernels.whole_step import WholeCall


@dataclass(frozen=True, slots=True)
class GroupTables:
    """Where one cache group keeps the rows' keys and values.

    block_table_RB: [num_rows, max_blocks] int32, -1 or stale beyond a row's blocks and before its window, never read
    there. slot_mapping_T: [num_tokens] int64, block * block_size + offset where each token's key and value go.
    shared_keys: so many first keys are in the same blocks for all rows, and every query sees them; 0 where that is not
    looked for (it only helps on GPUs).
    """

    block_table_RB: torch.Tensor
    slot_mapping_T: torch.Tensor
    shared_keys: int = 0
    _native: list[NativeStep] = field(default_factory=list, repr=False)  # made when first asked for

    def native_step(self, batch: "BatchInput", block_size: int) -> NativeStep:
        """This group's part of the batch for the fused operations; the batch must live as long."""
        if not self._native:
            step = make_step(self.block_table_RB, batch.cu_seqlens_q, batch.seq_lens, self.slot_mapping_T, block_size)
            self._native.append(step)
        return self._native[0]


@dataclass(slots=True)
class RowSettings:
    """How rows are sampled, [num_rows] each: temperature, top_p, min_p float32; the rest int64, drawn: output tokens
    before this one. ends: each row's last token; None where every row has one token, and no more are there. Else
    tokens beyond the last row's belong to no row. filters: whether any row drops unlikely tokens.
    """

    temperature: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    top_k: torch.Tensor
    seeds: torch.Tensor
    drawn: torch.Tensor
    sample_indices: torch.Tensor
    ends: torch.Tensor | None = None
    filters: bool = False


@dataclass(slots=True, eq=False, weakref_slot=True)
class BatchInput:
    """token_ids_T, positions_T: [num_tokens] int64. cu_seqlens_q: [num_rows + 1] int32, row r's tokens are [cu[r], cu[r
    + 1]). seq_lens: [num_rows] int32, tokens in the cache after this step (the last token's position + 1).
    max_seqlen_q, max_seqlen_k: ints. groups: one per cache group of DecoderSpec.cache_windows. settings: of batches
    whose tensors and ints stay from step to step, so that a step can be a CUDA graph; only contents change.
    """

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    cu_seqlens_q: torch.Tensor
    seq_lens: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    groups: tuple[GroupTables, ...]
    settings: RowSettings | None = None
    num_tokens: int = field(init=False)
    num_rows: int = field(init=False)
    whole: WholeCall | None = field(default=None, repr=False)  # of the last step that was run whole

    @property
    def has_gaps(self) -> bool:
        """Whether some tokens may belong to no row."""
        return self.settings is not None and self.settings.ends is not None

    def __post_init__(self) -> None:
        self.num_tokens, self.num_rows = len(self.token_ids_T), len(self.seq_lens)
