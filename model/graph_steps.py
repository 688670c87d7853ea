"""GraphSteps: steps of a stage on a GPU, each one CUDA graph from token ids to the tokens chosen. Hosts hand
over a step's kernels one by one more slowly than the device computes them; a graph is one launch.

Hosts are slow between steps, too: `begin` waits for nothing, and tokens may be references to what the step before
chooses (kernels/gpu/token_refs.py), so that a step can be begun before the one before it is done.

A graph is captured when a batch comes for the first time (that step runs kernel by kernel), and replayed whenever it
comes again: a batch is its tensors, whose contents change (engine/padded_batch.py makes such). Graphs read weights,
tables and cache where they lie, share one pool of memory for what is temporary, and leave results in memory of this
object. They go with their batch or with the cache. Where kernels are interpreted on a CPU, nothing is captured.

Shapes: T tokens, R rows, H hidden size, V vocabulary held here.
"""

import contextlib
import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch

from shoal.kernels.whole_step import StepOutput
from shoal.model.batch import BatchInput, RowSettings
from shoal.model.kv_cache import KVCache
from shoal.model.shard import ModelShard
from shoal.model.spec import DecoderSpec
from shoal.parallel.communicator import Communicator
from shoal.parallel.embedding import best_of_shards

MOST_BEGUN = 2  # steps whose output has not been taken

logger = logging.getLogger("shoal.model")


class StageParts(Protocol):
    """What a step is made of: model/decoder.py has it."""

    spec: DecoderSpec
    shard: ModelShard
    tensor: Communicator
    dtype: torch.dtype
    device: torch.device
    on_layer: Callable[[], None] | None

    def embed(self, batch: BatchInput) -> torch.Tensor: ...
    def forward(self, batch: BatchInput, hidden_TH: torch.Tensor, cache: KVCache) -> torch.Tensor: ...
    def head_shard(self, hidden_RH: torch.Tensor) -> torch.Tensor: ...
    def shard_logits(self, shard_RV: torch.Tensor) -> torch.Tensor: ...


class BegunStep(NamedTuple):
    """A step on its way. hidden_TH: for the stage after; the rest is for `output`."""

    head_RV: torch.Tensor
    told_R2: torch.Tensor
    hidden_TH: torch.Tensor
    group: Communicator
    done: torch.cuda.Event | None

    def output(self, rows: list[int], *, with_head: bool = True) -> StepOutput:
        """What these rows of the batch gave, once the device has it. head_RV holds until the next step is begun; empty
        without it.
        """
        if self.done is not None:
            self.group.wait(self.done)
        chosen_R2 = self.told_R2.numpy()[rows]
        head_RV = self.head_RV[: len(rows) if with_head else 0]
        if with_head and rows != list(range(len(rows))):
            head_RV = self.head_RV[torch.tensor(rows).to(self.head_RV.device)]
        return StepOutput(head_RV, chosen_R2[:, 0].astype(int).tolist(), chosen_R2[:, 1].tolist(), sampled=True)


class GraphSteps:
    """Of one stage on one cache, for batches with settings, of at most so many rows and tokens."""

    def __init__(self, stage: StageParts, most_rows: int, most_tokens: int) -> None:
        self.stage, self.most_rows, device = stage, most_rows, stage.device
        travel = 0 if stage.shard.has_embedding and stage.shard.has_head else most_tokens
        self.hidden_TH = torch.zeros((travel, stage.spec.hidden_size), dtype=stage.dtype, device=device)
        first, stop = stage.shard.vocab(stage.spec.vocab_size) if stage.shard.has_head else (0, 0)
        self.first_token, rows = first, most_rows if stage.shard.has_head else 0
        self.head_RV = torch.zeros((rows, stop - first), dtype=stage.dtype, device=device)
        self.tokens_R = torch.zeros(rows, dtype=torch.int64, device=device)
        self.chosen_R2 = torch.zeros((rows, 2), dtype=torch.float64, device=device)  # tokens, their logits
        pinned = device.type == "cuda"
        self.told = [torch.zeros((rows, 2), dtype=torch.float64, pin_memory=pinned) for _ in range(MOST_BEGUN)]
        self.num_begun = 0
        self.graphs: WeakKeyDictionary[BatchInput, dict[bool, torch.cuda.CUDAGraph]] = WeakKeyDictionary()
        self.captures = device.type == "cuda"
        if self.captures:
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def begin(
        self, batch: BatchInput, cache: KVCache, receive: Callable[[torch.Tensor], None] | None = None
    ) -> "BegunStep":
        """Hand the step to the device. cache: always the same; receive: fills [T, H] with the hidden states of the
        stage before, where there is one. The output of at most MOST_BEGUN steps may be outstanding.
        """
        assert batch.settings is not None and batch.num_rows <= self.most_rows, batch.num_rows
        hidden_TH = self.hidden_TH[: batch.num_tokens]
        if receive is not None:
            receive(hidden_TH)
        filters = batch.settings.filters and self.stage.tensor.size == 1
        self.replay(batch, filters, partial(self.compute, batch, batch.settings, cache, filters))
        if self.stage.on_layer is not None:
            self.stage.on_layer()
        if not self.stage.shard.has_head:
            return BegunStep(self.head_RV, self.told[0][:0], hidden_TH, self.stage.tensor, None)
        told_R2 = self.told[self.num_begun % MOST_BEGUN][: batch.num_rows]
        self.num_begun += 1
        told_R2.copy_(self.chosen_R2[: batch.num_rows], non_blocking=True)
        done = torch.cuda.current_stream().record_event() if hidden_TH.is_cuda else None
        return BegunStep(self.head_RV, told_R2, hidden_TH, self.stage.tensor, done)

    @torch.inference_mode()
    def compute(self, batch: BatchInput, settings: RowSettings, cache: KVCache, filters: bool) -> None:
        """From the batch's tensors, or hidden_TH, to hidden_TH, or head_RV and chosen_R2. Waits for nothing."""
        stage, count, held_TH = self.stage, batch.num_rows, self.hidden_TH[: batch.num_tokens]
        if stage.shard.has_embedding and stage.shard.has_head:
            from shoal.kernels.gpu.token_refs import launch_token_refs

            launch_token_refs(batch.token_ids_T, self.tokens_R)
        hidden_TH = stage.forward(batch, stage.embed(batch) if stage.shard.has_embedding else held_TH, cache)
        if not stage.shard.has_head:
            held_TH.copy_(hidden_TH)
            return
        hidden_RH = hidden_TH if settings.ends is None else hidden_TH.index_select(0, settings.ends)
        head_RV = self.head_RV[:count].copy_(stage.head_shard(hidden_RH))
        logits_RV = stage.shard_logits(head_RV.to(torch.float32, copy=True))
        tokens_R, picked_R = self.choose(logits_RV, settings, filters)
        self.tokens_R[:count] = self.chosen_R2[:count, 0] = tokens_R
        self.chosen_R2[:count, 1] = picked_R

    def choose(
        self, logits_RV: torch.Tensor, settings: RowSettings, filters: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Every row's token and its logit; filters: only of whole vocabularies."""
        from shoal.kernels.gpu.logit_limits import launch_logit_limits
        from shoal.kernels.gpu.sampling import Choices, launch_sample

        limits = None
        if filters:
            limits = launch_logit_limits(
                logits_RV, settings.temperature, settings.top_k, settings.top_p, settings.min_p
            )
        choices = Choices(settings.temperature, settings.seeds, settings.drawn, settings.sample_indices, limits)
        values_R, tokens_R = launch_sample(logits_RV, None, None, choices, vocab_start=self.first_token)
        picked_R = logits_RV.gather(1, (tokens_R - self.first_token).unsqueeze(1)).squeeze(1)
        if self.stage.tensor.size == 1:
            return tokens_R, picked_R
        return best_of_shards(values_R, tokens_R, picked_R, self.stage.tensor)

    def replay(self, batch: BatchInput, filters: bool, compute: Callable[[], None]) -> None:
        """Compute, by the graph of it where there is one."""
        graph = self.graphs.setdefault(batch, {}).get(filters)
        if graph is not None:
            graph.replay()
            return
        compute()  # also compiles, and makes what is kept, neither of which can be captured
        if self.captures:
            graph = self.capture(compute)
            if graph is not None:
                self.graphs[batch][filters] = graph

    def capture(self, compute: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """The graph of what was just computed. None, and no more graphs, where something in it cannot be captured."""
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self.stream.wait_stream(here)
        try:
            with torch.cuda.stream(self.stream):
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    compute()
                except BaseException:
                    with contextlib.suppress(RuntimeError):
                        graph.capture_end()
                    raise
                graph.capture_end()
        except RuntimeError as error:
            if self.stage.tensor.size > 1:  # whose ranks must all launch a collective from a graph, or none
                raise RuntimeError(f"a step could not be captured; use runtime.enforce_eager: {error}") from error
            self.captures = False
            logger.warning(
                "steps are launched kernel by kernel from now on, since one could not be captured: %s", error
            )
            return None
        here.wait_stream(self.stream)
        return graph
