"""Worker: one rank of a replica. Holds its shard of the model and of the cache, runs step plans, samples on the last
stage's tensor rank 0.

Life: load -> profile -> allocate_cache -> run, run, ... -> close. Every rank of the replica calls the same methods in
the same order, since each of them may contain collectives. Hidden states go from stage to stage between ranks of equal
tp_rank.
"""

import itertools
import math
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from shoal.configs.schema import ShoalConfig
from shoal.engine.batch_state import BatchState, Padding
from shoal.engine.begun import Begun
from shoal.engine.choosing import Choice, TokenChooser, choices_of
from shoal.engine.messages import PlanRow, RankTiming, RowResult, StepPlan, StepResult, TokenLogprobs
from shoal.engine.profile import ActivationMeter, available_bytes, profile_plan, warm_up_plans
from shoal.engine.sequence_state import SequenceState
from shoal.kernels.build import native_library
from shoal.kernels.huge_pages import touch_ahead
from shoal.model.batch import BatchInput
from shoal.model.checkpoint import Checkpoint, load_parameters
from shoal.model.decoder import Stage
from shoal.model.dummy import dummy_parameters
from shoal.model.families import load_spec
from shoal.model.kv_cache import KVCache
from shoal.model.kv_layout import kv_bytes_per_block, kv_itemsize
from shoal.model.kv_scales import read_kv_scales
from shoal.model.ledger import MemoryReport
from shoal.model.memory_estimate import PROMPT_LOGPROB_ROWS, graph_bytes, graph_sizes, sampling_bytes
from shoal.model.parameters import head_is_shared
from shoal.model.prepare import num_bytes, prepare_weights
from shoal.model.shard import ModelShard
from shoal.model.spec import DecoderSpec
from shoal.parallel.mesh import Mesh

NOT_FINITE = "no token can be chosen: the logits are not finite, or every token is masked"
IDLE_S = 0.5  # after a step nothing is under way
TOUCHED_BYTES = 1 << 30  # of a rank's cache, before steps need them: blocks are used from the first one on
SHARED_BYTES = 1 << 30  # of keys and values of a layer, which a GPU reads while the host launches one layer's kernels
NONE_SAMPLED = -1  # in place of a token
REMEMBERED_STEPS = 8  # steps whose sampled tokens a TokenRef may point at


class Worker:
    """One rank. config is resolved (no `auto` left in dtype, device or max_model_len); shard says what of the spec it
    holds."""

    def __init__(
        self,
        config: ShoalConfig,
        spec: DecoderSpec,
        shard: ModelShard,
        mesh: Mesh,
        model_dir: Path | None,
        device: torch.device,
    ) -> None:
        self.config, self.spec, self.shard, self.mesh = config, spec, shard, mesh
        self.model_dir, self.device = model_dir, device
        self.dtype = getattr(torch, config.model.dtype)
        if device.type == "cuda":
            use_gpu(device)
        self.samples = shard.has_head and shard.tp_rank == 0
        self.ran_at = time.monotonic()  # when the last step ended; infinity within one
        self.graph_sizes = graph_sizes(config) if mesh.tensor.capturable else None
        self.state = self.new_state()
        self.sampled: OrderedDict[int, list[int]] = OrderedDict()  # tokens by step and row
        self.begun: Begun | None = None  # the last plan
        self.forwarded_at = 0.0  # when the device was done with a step that had been begun

    def new_state(self, *, padded: bool = True) -> BatchState:
        """A batch state that holds nothing. padded: steps may be CUDA graphs."""
        padding = None
        if padded and self.graph_sizes is not None:  # of the layout alone: all ranks must pad alike
            itemsize = kv_itemsize(self.config.cache.dtype, self.dtype.itemsize)
            elements = max(2 * layer.mixer.num_kv_heads * layer.mixer.head_dim for layer in self.spec.layers)
            padding = Padding(self.graph_sizes, SHARED_BYTES * self.shard.tp_size // (elements * itemsize))
        return BatchState(self.config.cache.block_size, len(self.spec.cache_windows), self.device, padding)

    def load(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Read (or make) the weights of this rank. on_progress(bytes done, bytes in all). Raises ValueError naming file
        and tensor."""
        self.kv_scales: dict[int, tuple[float, float]] = {}
        if self.config.model.load_format == "dummy":
            weights = dummy_parameters(self.spec, self.shard, self.dtype, self.device, self.config.runtime.seed or 0)
        else:
            assert self.model_dir is not None, "only dummy weights need no checkpoint"
            _, family = load_spec(self.model_dir)
            with Checkpoint(self.model_dir) as checkpoint:
                weights = load_parameters(
                    checkpoint, family, self.spec, self.shard, self.dtype, self.device, on_progress
                )
                if self.config.cache.dtype == "fp8":
                    self.kv_scales = read_kv_scales(checkpoint.tensors)
        library = native_library() if self.device.type == "cpu" else None
        weights = prepare_weights(weights, library, head_is_shared=head_is_shared(self.spec, self.shard))
        self.weights_bytes = sum(map(num_bytes, weights.values()))
        self.stage = Stage(
            self.spec,
            self.shard,
            weights,
            self.mesh.tensor,
            deterministic=self.config.runtime.deterministic,
            max_model_len=self.config.model.max_model_len,
            graph_sizes=None if self.graph_sizes is None else self.graph_sizes.most(),
        )
        self.chooser = TokenChooser(self.stage, self.mesh.tensor)

    def on_layer(self, tick: Callable[[], None]) -> None:
        """Have `tick` called after every layer of a step. The weights must have been loaded."""
        self.stage.on_layer = tick

    def profile(self) -> MemoryReport:
        """Run one step of the largest size on a cache of its own and report what memory this rank needs and has.
        Collective."""
        plan, num_blocks, scale = profile_plan(self.config, self.spec, self.device)
        self.allocate_cache(num_blocks)
        self.state = self.new_state(padded=False)
        for warm_up in warm_up_plans(plan):  # what libraries allocate and compile once is not part of a step
            self.run(warm_up)
        self.state = self.new_state(padded=False)
        with ActivationMeter(self.device) as meter:
            self.run(plan)
        self.state, self.begun = self.new_state(), None
        self.sampled.clear()
        del self.cache
        sampling = sampling_bytes(self.spec, self.shard, self.config) if self.shard.has_head else 0
        graphs = graph_bytes(self.spec, self.shard, self.config, self.dtype.itemsize) if self.graph_sizes else 0
        return MemoryReport(
            rank=self.mesh.rank,
            weights_bytes=self.weights_bytes,
            activation_bytes=max(int(meter.peak_bytes * scale), sampling) + graphs,
            available_bytes=available_bytes(self.device) + self.weights_bytes,
            block_bytes=kv_bytes_per_block(
                self.spec,
                self.shard,
                self.config.cache.block_size,
                kv_itemsize(self.config.cache.dtype, self.dtype.itemsize),
            ),
        )

    def allocate_cache(self, num_blocks: list[int]) -> None:
        """Make the paged cache: num_blocks of every cache group."""
        dtype = torch.float8_e4m3fn if self.config.cache.dtype == "fp8" else self.dtype
        block_size = self.config.cache.block_size
        self.cache = KVCache(self.spec, self.shard, num_blocks, block_size, dtype, self.device, self.kv_scales)
        if self.device.type == "cpu":
            layers = self.cache.layers.values()
            tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
            touch_ahead(tensors, TOUCHED_BYTES, partial(is_idle, weakref.ref(self)))

    @property
    def overlaps(self) -> bool:
        """Whether a plan can be begun before the one before it is done: one rank, which feeds on its own graphs."""
        return self.graph_sizes is not None and self.mesh.world.size == 1

    def run(self, plan: StepPlan) -> StepResult | None:
        """Run one plan; its result on the rank that samples, None elsewhere. Raises PlanMismatch, CollectiveError."""
        return self.finish(self.begin(plan))

    def begin(self, plan: StepPlan) -> Begun:
        """Take a plan, and hand it to the device if that waits for nothing; its rows may refer to the plan before,
        whose result must have been taken before the next is begun. Raises as run.
        """
        self.ran_at = math.inf
        previous = self.begun
        if previous is not None and previous.step is None:
            self.finish(previous)  # it runs first
        pending = previous if previous is not None and not previous.done else None
        self.state.apply(plan, self.resolve_refs(plan, pending))
        begun = self.begun = Begun(plan, pending)
        if pending is not None:
            pending.followers = [
                (sequence, len(sequence.token_ids) - 1, row.ref.row)
                for row in plan.rows
                if row.ref is not None and (sequence := self.state.sequences[row.request_id])
            ]
        if self.overlaps and plan.rows:
            self.try_begin(begun)
        return begun

    def try_begin(self, begun: Begun) -> None:
        """Hand a plan to the device that needs nothing from the host but what is known now."""
        started, plan = time.perf_counter(), begun.plan
        sequences = [self.state.sequences[row.request_id] for row in plan.rows]
        for row, sequence in zip(plan.rows, sequences, strict=True):
            if row.sample and not self.chooser.is_decided_in_graphs(sequence):
                return
            if sequence.sampling.prompt_logprobs is not None and scored_positions(row, sequence):
                return
        batch = self.state.build_padded(plan, sequences)
        if batch is not None:
            begun.step, begun.started = self.stage.begin(batch, self.cache), started

    def finish(self, begun: Begun) -> StepResult | None:
        """The result of a begun plan, as run gives it. Raises as run."""
        if begun.done:
            return begun.result
        if begun.previous is not None:
            self.finish(begun.previous)
            begun.previous = None
        try:
            begun.result = self.run_begun(begun) if begun.step is not None else self.run_now(begun.plan)
        finally:
            self.ran_at = time.monotonic()
        begun.done = True
        for sequence, place, row in begun.followers:
            sequence.token_ids[place] = self.sampled[begun.plan.step][row]
        return begun.result

    def run_begun(self, begun: Begun) -> StepResult:
        """What the device makes of a plan."""
        plan = begun.plan
        assert begun.step is not None
        output = begun.step.output([index for index, row in enumerate(plan.rows) if row.sample], with_head=False)
        forward = time.perf_counter()
        rows = self.row_results(plan, choices_of(output), [None] * len(plan.rows))
        started = max(begun.started, self.forwarded_at)  # before, the device was at the step before
        self.forwarded_at = forward
        timing = RankTiming(self.mesh.rank, forward - started, 0.0, time.perf_counter() - forward)
        return StepResult(epoch=plan.epoch, step=plan.step, rows=rows, timings=[timing])

    def run_now(self, plan: StepPlan) -> StepResult | None:
        """Run a plan that was applied, from beginning to end."""
        if not plan.rows:
            return StepResult(epoch=plan.epoch, step=plan.step, rows=[]) if self.samples else None
        batch = self.state.build(plan)
        sequences = [self.state.sequences[row.request_id] for row in plan.rows]
        scored = (scored_positions(row, sequence) for row, sequence in zip(plan.rows, sequences, strict=True))
        whole = self.stage.whole(batch, self.cache) is not None and not any(scored)
        return (self.run_whole if whole else self.run_parts)(plan, batch, sequences)

    def run_whole(self, plan: StepPlan, batch: BatchInput, sequences: list[SequenceState]) -> StepResult | None:
        """A short step, in one operation as far as the head."""
        started = time.perf_counter()
        stops = itertools.accumulate(row.num_tokens for row in plan.rows)
        last = [stop - 1 for stop, row in zip(stops, plan.rows, strict=True) if row.sample]
        if batch.settings is not None:
            last = [index for index, row in enumerate(plan.rows) if row.sample]
        waited = started

        def receive(hidden_TH: torch.Tensor) -> None:
            nonlocal waited
            self.mesh.pipeline.recv(hidden_TH, self.shard.pp_rank - 1)
            waited = time.perf_counter()

        output, hidden_TH = self.stage.step(batch, last, self.cache, None if self.shard.has_embedding else receive)
        if not self.shard.has_head:
            self.mesh.pipeline.send(hidden_TH, self.shard.pp_rank + 1)
            return None
        forward = time.perf_counter()
        sampling = [sequence for sequence, row in zip(sequences, plan.rows, strict=True) if row.sample]
        choices = self.chooser.of_step(output, sampling)
        if not self.samples:
            return None
        rows = self.row_results(plan, choices, [None] * len(plan.rows))
        timing = RankTiming(self.mesh.rank, forward - waited, waited - started, time.perf_counter() - forward)
        return StepResult(epoch=plan.epoch, step=plan.step, rows=rows, timings=[timing])

    @torch.inference_mode()
    def run_parts(self, plan: StepPlan, batch: BatchInput, sequences: list[SequenceState]) -> StepResult | None:
        """Any step, of any stage."""
        started = time.perf_counter()
        if self.shard.has_embedding:
            hidden_TH = self.stage.embed(batch)
        else:
            shape = (batch.token_ids_T.shape[0], self.spec.hidden_size)
            hidden_TH = torch.empty(shape, dtype=self.dtype, device=self.device)
            self.mesh.pipeline.recv(hidden_TH, self.shard.pp_rank - 1)
        waited = time.perf_counter()
        hidden_TH = self.stage.forward(batch, hidden_TH, self.cache)
        if not self.shard.has_head:
            self.mesh.pipeline.send(hidden_TH.contiguous(), self.shard.pp_rank + 1)
            return None
        forward = time.perf_counter()
        rows = self.results(plan, sequences, hidden_TH)
        if rows is None:
            return None
        timing = RankTiming(self.mesh.rank, forward - waited, waited - started, time.perf_counter() - forward)
        return StepResult(epoch=plan.epoch, step=plan.step, rows=rows, timings=[timing])

    def resolve_refs(self, plan: StepPlan, pending: Begun | None) -> dict[tuple[int, int], int]:
        """The tokens of the plan's TokenRefs, told to all ranks by the one that sampled them; of the pending plan,
        whose tokens are not known yet, references for the device (kernels/gpu/token_refs.py). Collective when there are
        any and none is pending.
        """
        refs = [(row.ref.step, row.ref.row) for row in plan.rows if row.ref is not None]
        if not refs:
            return {}
        if pending is not None:
            assert all(step == pending.plan.step for step, _ in refs), "only the plan before is in flight"
            return {(step, row): -1 - row for step, row in refs}
        known = [self.sampled[step][row] if step in self.sampled else NONE_SAMPLED for step, row in refs]
        tokens = torch.tensor(known, device=self.device)
        sampling_rank = self.mesh.world.size - self.shard.tp_size
        self.mesh.world.broadcast(tokens, sampling_rank)
        return dict(zip(refs, tokens.tolist(), strict=True))

    def results(
        self, plan: StepPlan, sequences: list[SequenceState], hidden_TH: torch.Tensor
    ) -> list[RowResult] | None:
        """Sample the rows that want it and score the prompts that want it. Collective over the tensor group; None off
        its rank 0."""
        stops = list(itertools.accumulate(row.num_tokens for row in plan.rows))
        prompt_logprobs = [
            self.prompt_logprobs(row, sequence, stop, hidden_TH)
            for row, sequence, stop in zip(plan.rows, sequences, stops, strict=True)
        ]
        sampling = [index for index, row in enumerate(plan.rows) if row.sample]
        choices: list[Choice] = []
        if sampling:
            last = torch.tensor([stops[index] - 1 for index in sampling], device=self.device)
            choices = self.chooser(hidden_TH[last], [sequences[index] for index in sampling])
        return self.row_results(plan, choices, prompt_logprobs) if self.samples else None

    def row_results(
        self, plan: StepPlan, choices: list[Choice], prompt_logprobs: list[list[TokenLogprobs] | None]
    ) -> list[RowResult]:
        """The rows' results. choices: of those that sample, in their order; prompt_logprobs: of all."""
        given, tokens, rows = iter(choices), [], []
        for row, scores in zip(plan.rows, prompt_logprobs, strict=True):
            if not row.sample:
                tokens.append(NONE_SAMPLED)
                rows.append(RowResult(row.request_id, [], None, scores))
                continue
            token, logprobs, finite = next(given)
            tokens.append(token)
            if finite:
                rows.append(RowResult(row.request_id, [token], None if logprobs is None else [logprobs], scores))
            else:
                rows.append(RowResult(row.request_id, [], None, scores, NOT_FINITE))
        self.remember(plan.step, tokens)
        return rows

    def prompt_logprobs(
        self, row: PlanRow, sequence: SequenceState, stop: int, hidden_TH: torch.Tensor
    ) -> list[TokenLogprobs] | None:
        """Log-probabilities of the prompt tokens that follow this row's positions, when asked for. Collective over the
        tensor group."""
        count, scored = sequence.sampling.prompt_logprobs, scored_positions(row, sequence)
        if count is None or not scored:
            return None
        offset = stop - row.num_tokens - scored.start
        found: list[TokenLogprobs] = []
        for start in range(scored.start, scored.stop, PROMPT_LOGPROB_ROWS):
            end = min(start + PROMPT_LOGPROB_ROWS, scored.stop)
            hidden_RH, targets = hidden_TH[offset + start : offset + end], sequence.token_ids[start + 1 : end + 1]
            found += [entry for entry in self.chooser.scores(hidden_RH, targets, count) if entry is not None]
        return found if self.samples else None

    def remember(self, step: int, tokens: list[int]) -> None:
        """Keep a step's tokens by row for TokenRefs of later plans, and forget old ones."""
        self.sampled[step] = tokens
        while next(iter(self.sampled)) <= step - REMEMBERED_STEPS:
            self.sampled.popitem(last=False)

    def close(self) -> None:
        """Give back the mesh and the memory."""
        self.mesh.close()
        self.cache = self.stage = self.chooser = self.state = self.begun = None  # type: ignore[assignment]


def is_idle(worker: "weakref.ref[Worker]") -> bool | None:
    """Whether the worker has run nothing for a while; None once it has no cache any more."""
    found = worker()
    if found is None or getattr(found, "cache", None) is None:
        return None
    return time.monotonic() - found.ran_at > IDLE_S


def use_gpu(device: torch.device) -> None:
    """Make the GPU this thread's, and its matrix products exact in float32 and summed in float32 for halves."""
    torch.cuda.set_device(device)
    products = torch.backends.cuda.matmul
    products.allow_tf32 = False
    products.allow_bf16_reduced_precision_reduction = products.allow_fp16_reduced_precision_reduction = False


def scored_positions(row: PlanRow, sequence: SequenceState) -> range:
    """Positions of the row whose next token is of the prompt and wants a log-probability."""
    if sequence.sampling.prompt_logprobs is None:
        return range(0)
    first = row.num_computed_tokens
    return range(first, min(first + row.num_tokens, sequence.num_prompt_tokens - 1))
