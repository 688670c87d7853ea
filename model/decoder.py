"""Stage: the part of the one decoder that a rank computes. Every family runs through it; a DecoderSpec says what it is.

    hidden = stage.embed(batch)                        # first stage
    hidden = stage.forward(batch, hidden, cache)       # every stage; hidden [num_tokens, hidden_size] travels
    logits = stage.logits(hidden[rows])                # last stage; or head_shard, of which rows can be gathered
    output = stage.step(batch, rows, cache)            # all of it at once, where it can be (stage.whole)

Under tensor parallelism every rank of the group calls the same methods in the same order. Collectives: one all-reduce
for the embedding, two per layer (one where both branches read the same input), a gather for logits that must be whole.
Shapes: T tokens, R rows, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch

from shoal.kernels.build import native_library
from shoal.kernels.fused_layers import FusedEnding, FusedLayer, FusedLayers
from shoal.kernels.linear import linear
from shoal.kernels.softcap import softcap_
from shoal.kernels.whole_step import StepOutput, WholeStep
from shoal.model.attention import AttentionMixer
from shoal.model.batch import BatchInput
from shoal.model.feed_forward import make_feed_forward, scoped
from shoal.model.fused import (
    FEW_KEYS,
    FEW_TOKENS,
    fuse_feed_forward,
    fuse_mixer,
    fused_norm,
    runs_of_layers,
    step_embedding,
    step_head,
)
from shoal.model.graph_steps import BegunStep, GraphSteps
from shoal.model.kv_cache import KVCache, LayerCache
from shoal.model.norms import NormLayer, make_norm
from shoal.model.parameters import head_is_shared
from shoal.model.rotary import RotaryTable
from shoal.model.shard import ModelShard
from shoal.model.spec import DecoderSpec, Layer, Rope
from shoal.parallel.communicator import Communicator
from shoal.parallel.embedding import VocabEmbedding, VocabHead


class DecoderLayer:
    """One block: mixer and feed-forward with their norms around the residual stream."""

    def __init__(
        self,
        spec: Layer,
        shard: ModelShard,
        params: Mapping[str, Any],
        group: Communicator,
        *,
        deterministic: bool,
    ) -> None:
        self.group, self.residual = group, spec.residual
        self.mixer = AttentionMixer(spec.mixer, shard, scoped(params, "mixer."), group, deterministic=deterministic)
        ffn = scoped(params, "ffn.")
        self.ffn = make_feed_forward(spec.ffn, shard, ffn, group, deterministic=deterministic)
        self.pre_mixer, self.post_mixer, self.pre_ffn, self.post_ffn = (
            make_norm(getattr(spec, name), params, name)
            for name in ("pre_mixer_norm", "post_mixer_norm", "pre_ffn_norm", "post_ffn_norm")
        )
        self.fused_mixer = fuse_mixer(self.pre_mixer, self.mixer)
        self.fused_ffn = fuse_feed_forward(self.pre_ffn, self.ffn)

    def fused(self, cache: LayerCache, rotation: int | None) -> FusedLayer | None:
        """The whole layer for the fused operations; None where there is more to it."""
        parallel, normed = (self.residual == kind for kind in ("parallel", "normed"))
        if self.fused_mixer is None or self.fused_ffn is None or cache.scales is not None:
            return None
        if parallel and (self.post_mixer or self.post_ffn):
            return None
        biases = [() if half.out_bias is None else (half.out_bias,) for half in (self.mixer, self.ffn)]
        if parallel:
            biases = [(), (*biases[0], *biases[1])]
        endings = (
            FusedEnding(biases[0], fused_norm(self.post_mixer), normed),
            FusedEnding(biases[1], fused_norm(self.post_ffn), normed),
        )
        place = (cache.keys, cache.values, cache.group, rotation)
        return FusedLayer(self.fused_mixer, self.fused_ffn, *place, endings, parallel)

    def reduced(self, partial_TH: torch.Tensor, *biases: torch.Tensor | None) -> torch.Tensor:
        """The sum of all ranks' parts, in place, then the biases."""
        out_TH = self.group.all_reduce(partial_TH)
        for bias_H in biases:
            if bias_H is not None:
                out_TH += bias_H
        return out_TH

    def mix(
        self,
        x_TH: torch.Tensor,
        branch_TH: torch.Tensor | None,
        cos_sin_TR: torch.Tensor | None,
        batch: BatchInput,
        cache: LayerCache,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x + branch, this rank's part of the attention of its norm)."""
        if self.fused_mixer is not None and cache.scales is None:  # C does not read FP8
            x_TH, _ = summed(x_TH, branch_TH, None)
            step = batch.groups[cache.group].native_step(batch, cache.keys.shape[1])
            return x_TH, self.fused_mixer(x_TH, cos_sin_TR, step, cache.keys, cache.values)
        x_TH, normed_TH = summed(x_TH, branch_TH, self.pre_mixer)
        return x_TH, self.mixer.partial(normed_TH, cos_sin_TR, batch, cache)

    def feed(self, x_TH: torch.Tensor, branch_TH: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(x + branch, this rank's part of the feed-forward of its norm)."""
        if self.fused_ffn is not None:
            x_TH, _ = summed(x_TH, branch_TH, None)
            return x_TH, self.fused_ffn(x_TH)
        x_TH, normed_TH = summed(x_TH, branch_TH, self.pre_ffn)
        return x_TH, self.ffn.partial(normed_TH)

    def __call__(
        self,
        x_TH: torch.Tensor,
        branch_TH: torch.Tensor | None,
        cos_sin_TR: torch.Tensor | None,
        batch: BatchInput,
        cache: LayerCache,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The layer of x + branch, what the layer before returned (branch None: x alone): (x, branch), [T, H] each.

        Their sum is left to the next layer, whose norm follows it. x is not changed; branch may be overwritten.
        """
        x_TH, mixed_TH = self.mix(x_TH, branch_TH, cos_sin_TR, batch, cache)
        if self.residual == "parallel":
            return x_TH, self.parallel_branches(x_TH, mixed_TH)
        mixed_TH = self.reduced(mixed_TH, self.mixer.out_bias)
        if self.residual == "normed":
            return self.normed_sums(x_TH, mixed_TH), None
        if self.post_mixer:
            mixed_TH = self.post_mixer(mixed_TH)
        x_TH, out_TH = self.feed(x_TH, mixed_TH)
        out_TH = self.reduced(out_TH, self.ffn.out_bias)
        if self.post_ffn:
            out_TH = self.post_ffn(out_TH)
        return x_TH, out_TH

    def normed_sums(self, x_TH: torch.Tensor, mixed_TH: torch.Tensor) -> torch.Tensor:
        """The normed residual form, from the mixer's whole output on."""
        assert self.post_mixer and self.post_ffn, "a normed residual has both norms"
        x_TH = self.post_mixer(mixed_TH.add_(x_TH))
        _, out_TH = self.feed(x_TH, None)
        return self.post_ffn(self.reduced(out_TH, self.ffn.out_bias).add_(x_TH))

    def parallel_branches(self, x_TH: torch.Tensor, mixed_TH: torch.Tensor) -> torch.Tensor:
        """The parallel residual form: both branches' parts are summed over ranks in one all-reduce, unless norms
        follow.
        """
        _, out_TH = self.feed(x_TH, None)
        if self.post_mixer or self.post_ffn:
            mixed_TH = self.reduced(mixed_TH, self.mixer.out_bias)
            out_TH = self.reduced(out_TH, self.ffn.out_bias)
            mixed_TH = self.post_mixer(mixed_TH) if self.post_mixer else mixed_TH
            out_TH = self.post_ffn(out_TH) if self.post_ffn else out_TH
            return out_TH.add_(mixed_TH)
        return self.reduced(out_TH.add_(mixed_TH), self.mixer.out_bias, self.ffn.out_bias)


def summed(
    x_TH: torch.Tensor, branch_TH: torch.Tensor | None, norm: NormLayer | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + branch, its norm), without a branch or a norm just what is left. x is not changed; branch may be."""
    if branch_TH is None:
        return x_TH, x_TH if norm is None else norm(x_TH)
    if norm is not None:
        return norm.of_sum(x_TH, branch_TH)
    x_TH = branch_TH.add_(x_TH)
    return x_TH, x_TH


def is_short(batch: BatchInput) -> bool:
    """Whether the step may run whole layers in one call."""
    return batch.num_tokens <= FEW_TOKENS and batch.num_rows * batch.max_seqlen_k <= FEW_KEYS


class Stage:
    """Layers [shard.first_layer, shard.last_layer) of a decoder, with the embedding on the first stage and the head
    on the last.

    params: the tensors of parameters.local_parameters(spec, shard) by name, all of one dtype on one device. tensor: the
    group of the ranks that share every layer. deterministic: every row has one order of sums whatever the batch.
    on_layer: called after each layer and head, so that somebody sees a long step advance.
    max_model_len: positions that may occur; default: the model's own limit. graph_sizes: most rows and
    tokens of a batch with settings, whose steps can be CUDA graphs.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        shard: ModelShard,
        params: Mapping[str, Any],
        tensor: Communicator,
        *,
        deterministic: bool = False,
        max_model_len: int | None = None,
        graph_sizes: tuple[int, int] | None = None,
    ) -> None:
        assert tensor.size == shard.tp_size and tensor.rank == shard.tp_rank, (tensor.rank, tensor.size, shard)
        self.spec, self.shard, self.tensor, self.graph_sizes = spec, shard, tensor, graph_sizes
        self.graphs: WeakKeyDictionary[KVCache, GraphSteps] = WeakKeyDictionary()
        self.on_layer: Callable[[], None] | None = None
        self.layers = {
            index: DecoderLayer(
                spec.layers[index], shard, scoped(params, f"layers.{index}."), tensor, deterministic=deterministic
            )
            for index in range(shard.first_layer, shard.last_layer)
        }
        some = next(iter(params.values()))
        self.dtype, self.deterministic = some.dtype, deterministic
        self.embed_in, self.embed_out = params.get("embed_in.weight"), params.get("embed_out.weight")
        self.device = some.device
        self._make_tables(max_model_len or spec.max_position, self.device)
        vocab = shard.vocab_ranges(spec.vocab_size)
        if shard.has_embedding:
            self.embedding = VocabEmbedding(params["embed.weight"], vocab[shard.tp_rank], tensor)
            learned = spec.learned_positions
            self.learned_rows = None if learned is None else params["positions.weight"][learned.offset :]
            scale = spec.embed_scale
            self.embed_scale = None if scale is None else torch.tensor(scale).to(self.dtype).item()
        if shard.has_head:
            self.final_norm = make_norm(spec.final_norm, params, "final_norm")
            weight = params["embed.weight" if head_is_shared(spec, shard) else "head.weight"]
            self.head = VocabHead(weight, params.get("head.bias"), vocab, tensor, deterministic=deterministic)

    def _make_tables(self, max_model_len: int, device: torch.device) -> None:
        """One rotary table per different Rope of the layers; self.rotations[layer] says which, None for none."""
        ropes: list[Rope] = []
        self.rotations: dict[int, int | None] = {}
        for index in self.layers:
            rope = self.spec.layers[index].mixer.rope
            if rope is not None and rope not in ropes:
                ropes.append(rope)
            self.rotations[index] = None if rope is None else ropes.index(rope)
        whole = self.graph_sizes is not None
        self.tables = [RotaryTable(rope, max_model_len, device, whole=whole) for rope in ropes]

    @torch.inference_mode()
    def embed(self, batch: BatchInput) -> torch.Tensor:
        """The embeddings of the batch's tokens, with learned positions where the model has them: [T, H]."""
        hidden_TH = self.embedding(batch.token_ids_T)
        if self.embed_scale is not None:
            hidden_TH *= self.embed_scale
        if self.embed_in is not None:
            hidden_TH = linear(hidden_TH, self.embed_in, deterministic=self.deterministic)
        if self.learned_rows is not None:
            hidden_TH += self.learned_rows[batch.positions_T]
        return hidden_TH

    @torch.inference_mode()
    def forward(self, batch: BatchInput, hidden_TH: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """This stage's layers. hidden: [T, H], from embed or from the stage before; it may be overwritten. The tokens'
        keys and values are written to the cache. Returns [T, H].
        """
        looked_up = [table.lookup(batch.positions_T, batch.max_seqlen_k) for table in self.tables]
        if is_short(batch) and (runs := self.runs(cache)):
            steps = [group.native_step(batch, cache.block_size) for group in batch.groups]
            for run in runs:
                run(hidden_TH, looked_up, steps)
                if self.on_layer is not None:
                    self.on_layer()
            return hidden_TH
        branch_TH: torch.Tensor | None = None
        for index, layer in self.layers.items():
            rotation = self.rotations[index]
            cos_sin_TR = None if rotation is None else looked_up[rotation]
            hidden_TH, branch_TH = layer(hidden_TH, branch_TH, cos_sin_TR, batch, cache.layers[index])
            if self.on_layer is not None:
                self.on_layer()
        return hidden_TH if branch_TH is None else branch_TH.add_(hidden_TH)

    def runs(self, cache: KVCache) -> list[FusedLayers]:
        """The layers on this cache in few calls of whole layers; none where one of them has to be taken apart."""
        if cache.runs is None:
            layers = [layer.fused(cache.layers[index], self.rotations[index]) for index, layer in self.layers.items()]
            whole = [layer for layer in layers if layer is not None]
            alone, native = self.tensor.size == 1, self.tensor.native()
            fit = whole and len(whole) == len(layers) and (alone or native is not None)
            cache.runs = runs_of_layers(whole, native) if fit else []
        return cache.runs

    def whole(self, batch: BatchInput, cache: KVCache) -> WholeStep | GraphSteps | None:
        """All of a short step in one operation, as far as this stage has it; None where it has to be taken apart."""
        if batch.settings is not None and self.graph_sizes is not None:
            if cache not in self.graphs:
                self.graphs[cache] = GraphSteps(self, *self.graph_sizes)
            return self.graphs[cache]
        if not is_short(batch):
            return None
        if cache.whole is None:
            cache.whole = self.make_whole(cache)
        return cache.whole[0] if cache.whole else None

    def make_whole(self, cache: KVCache) -> list[WholeStep]:
        """See whole: at most one."""
        runs, library, shard = self.runs(cache), native_library(), self.shard
        head = embedding = None
        if shard.has_head and self.embed_out is None:
            head = step_head(self.final_norm, self.head, self.spec.final_softcap)
        if not runs or library is None or (shard.has_head and head is None):
            return []
        if shard.has_embedding and self.embed_in is None:
            embedding = step_embedding(self.embedding, self.embed_scale, self.learned_rows)
        rotary_dims = [table.rope.rotary_dim for table in self.tables]
        hidden, group = self.spec.hidden_size, self.tensor.native()
        return [WholeStep(library, runs, embedding, head, rotary_dims, self.dtype, hidden, group)]

    def begin(self, batch: BatchInput, cache: KVCache) -> BegunStep:
        """A step of a batch with settings, on its way: of a stage that has both embedding and head."""
        whole = self.whole(batch, cache)
        assert isinstance(whole, GraphSteps), "asked for settings only where there are graphs"
        return whole.begin(batch, cache)

    def step(
        self,
        batch: BatchInput,
        rows: list[int],
        cache: KVCache,
        receive: Callable[[torch.Tensor], None] | None = None,
    ) -> tuple[StepOutput, torch.Tensor]:
        """All of a step for which `whole` is not None, from token ids or hidden states to the head's product with
        `rows` of the tokens (of the rows, where the batch has settings) and the best token of each, or to hidden states
        [T, H] on a stage without a head. receive: fills [T, H] with the hidden states of the stage before, where there
        is one.
        """
        whole, call = self.whole(batch, cache), batch.whole
        if isinstance(whole, GraphSteps):
            begun = whole.begin(batch, cache, receive)
            return begun.output(rows if self.shard.has_head else []), begun.hidden_TH
        assert whole is not None, "asked for before"
        if call is None or call.whole is not whole or call.rows != rows:
            steps = [group.native_step(batch, cache.block_size) for group in batch.groups]
            call = batch.whole = whole.prepare(batch.token_ids_T, batch.positions_T, rows, steps)
        if receive is not None:
            receive(call.x_TH)
        elif not whole.embeds:
            call.x_TH.copy_(self.embed(batch))
        return call([table.up_to(batch.max_seqlen_k) for table in self.tables], self.on_layer), call.x_TH

    @torch.inference_mode()
    def logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """The logits of rows of the last stage's hidden state ([R, H]): [R, V] float32, whole on every rank of the
        group.
        """
        return self.gather_logits(self.head_shard(hidden_RH))

    @torch.inference_mode()
    def head_shard(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """This rank's shard of the head's product with rows of the last stage's hidden state, for shard_logits and
        gather_logits: [R, local vocabulary].
        """
        normed_RH = hidden_RH if self.final_norm is None else self.final_norm(hidden_RH)
        if self.embed_out is not None:
            normed_RH = linear(normed_RH, self.embed_out, deterministic=self.deterministic)
        shard_RV = self.head.shard(normed_RH)
        if self.on_layer is not None:
            self.on_layer()  # scoring a long prompt calls this many times
        return shard_RV

    @torch.inference_mode()
    def shard_logits(self, shard_RV: torch.Tensor) -> torch.Tensor:
        """Logits of this rank's shard of the vocabulary: float32 [R, local vocabulary], no collective. shard_RV may be
        overwritten.
        """
        return self.capped(shard_RV.float())

    @torch.inference_mode()
    def gather_logits(self, shard_RV: torch.Tensor) -> torch.Tensor:
        """Logits of the whole vocabulary from the ranks' shards: float32 [R, V]. shard_RV may be overwritten."""
        return self.capped(self.head.gather(shard_RV))

    def capped(self, logits_RV: torch.Tensor) -> torch.Tensor:
        """The final soft cap, where the model has one, in place."""
        cap = self.spec.final_softcap
        return logits_RV if cap is None else softcap_(logits_RV, cap)
