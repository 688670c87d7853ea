"""ModelShard: which layers, heads, columns, experts and vocabulary rows of a spec one rank holds. No torch, nothing
spawned."""

from collections.abc import Sequence
from typing import Literal

import msgspec

from shoal.configs.schema import ParallelConfig
from shoal.kernels.quantized_format import GROUP
from shoal.model.spec import Attention, DecoderSpec, Ffn, MoeFfn
from shoal.parallel.sharding import HeadShard, Range, shard_heads, split, split_layers

Quantization = Literal["none", "int8", "int4", "fp8"]
COLUMN_MULTIPLE = 8  # feed-forward and vocabulary boundaries fall on it where they can: whole vectors and cache lines


class ModelShard(msgspec.Struct, frozen=True, kw_only=True):
    """The part of one rank. Layers [first_layer, last_layer) of the spec; tensor shard tp_rank of tp_size of each.

    expert_parallel: whole experts per rank instead of a slice of each. quantization: how linears are held; feed-forward
    boundaries then fall on whole groups of inputs where they can.
    """

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    first_layer: int
    last_layer: int
    tensor_weights: tuple[float, ...] | None = None
    expert_parallel: bool = False
    quantization: Quantization = "none"

    @property
    def has_embedding(self) -> bool:
        """Whether this is the first stage."""
        return self.pp_rank == 0

    @property
    def has_head(self) -> bool:
        """Whether this is the last stage."""
        return self.pp_rank == self.pp_size - 1

    def heads(self, mixer: Attention) -> HeadShard:
        """The heads of this rank in a layer."""
        return shard_heads(mixer.num_heads, mixer.num_kv_heads, self.tp_size, self.tensor_weights)[self.tp_rank]

    def columns(self, size: int) -> Range:
        """This rank's range of a feed-forward of `size` columns."""
        whole = size % GROUP == 0 and size // GROUP >= self.tp_size
        multiple = GROUP if self.quantization != "none" and whole else COLUMN_MULTIPLE
        return split(size, self.tp_size, self.tensor_weights, multiple)[self.tp_rank]

    def vocab(self, vocab_size: int) -> Range:
        """This rank's vocabulary rows, of the embedding and of the head."""
        return self.vocab_ranges(vocab_size)[self.tp_rank]

    def vocab_ranges(self, vocab_size: int) -> list[Range]:
        """The vocabulary rows of every tensor rank."""
        return split(vocab_size, self.tp_size, self.tensor_weights, COLUMN_MULTIPLE)

    def experts(self, ffn: MoeFfn) -> Range:
        """The experts of this rank: all of them, unless experts are held whole."""
        if not self.expert_parallel:
            return (0, ffn.num_experts)
        return split(ffn.num_experts, self.tp_size, self.tensor_weights)[self.tp_rank]

    def expert_columns(self, ffn: MoeFfn) -> Range:
        """This rank's columns of each expert it holds."""
        return (0, ffn.intermediate_size) if self.expert_parallel else self.columns(ffn.intermediate_size)


def ffn_parameters(ffn: Ffn, hidden_size: int) -> int:
    """Weights of a feed-forward that one token touches."""
    if isinstance(ffn, MoeFfn):
        active = ffn.top_k * 3 * ffn.intermediate_size * hidden_size + ffn.num_experts * hidden_size
        return active + (ffn_parameters(ffn.shared, hidden_size) if ffn.shared else 0)
    return (3 if ffn.__struct_config__.tag == "gated" else 2) * ffn.intermediate_size * hidden_size


def layer_costs(spec: DecoderSpec) -> tuple[list[float], float, float]:
    """Predicted cost of every layer, of the embedding and of the head, in weights read per token."""
    costs = []
    for layer in spec.layers:
        mixer = layer.mixer
        attention = 2 * (mixer.num_heads + mixer.num_kv_heads) * mixer.head_dim * spec.hidden_size
        costs.append(float(attention + ffn_parameters(layer.ffn, spec.hidden_size)))
    hidden, embed = spec.hidden_size, spec.embed_size or spec.hidden_size
    projection = hidden * embed if spec.embed_size is not None else 0
    return costs, float(embed + projection), float(spec.vocab_size * embed + projection)


def stage_ranges(spec: DecoderSpec, stages: int, by_hand: Sequence[int] | None = None) -> list[Range]:
    """The layers of every stage: by hand (parallel.pipeline_layers) or balanced by predicted cost, embedding and head
    counted."""
    if by_hand is None:
        costs, embedding, head = layer_costs(spec)
        return split_layers(costs, stages, embedding, head)
    if len(by_hand) != stages or sum(by_hand) != len(spec.layers):
        raise ValueError(
            f"parallel.pipeline_layers = {list(by_hand)} must be {stages} numbers "
            f"that sum to the model's {len(spec.layers)} layers"
        )
    ranges, start = [], 0
    for size in by_hand:
        ranges.append((start, start + size))
        start += size
    return ranges


def shard_model(spec: DecoderSpec, parallel: ParallelConfig, quantization: Quantization = "none") -> list[ModelShard]:
    """The shard of every rank of a replica, in rank order: rank = pp_rank * tensor + tp_rank.

    Raises ValueError naming the setting when the model cannot be divided so.
    """
    if parallel.expert and not any(isinstance(layer.ffn, MoeFfn) for layer in spec.layers):
        raise ValueError(
            f"parallel.expert = true has nothing to divide: this {spec.family} model has no experts; leave it out"
        )
    weights = tuple(parallel.tensor_weights) if parallel.tensor_weights else None
    shards = [
        ModelShard(
            tp_rank=tp_rank,
            tp_size=parallel.tensor,
            pp_rank=pp_rank,
            pp_size=parallel.pipeline,
            first_layer=first,
            last_layer=last,
            tensor_weights=weights,
            expert_parallel=parallel.expert,
            quantization=quantization,
        )
        for pp_rank, (first, last) in enumerate(stage_ranges(spec, parallel.pipeline, parallel.pipeline_layers))
        for tp_rank in range(parallel.tensor)
    ]
    check_shardable(spec, shards[0])
    return shards


def check_shardable(spec: DecoderSpec, shard: ModelShard) -> None:
    """Raise ValueError when some layer cannot be divided among shard.tp_size ranks."""
    shard.vocab(spec.vocab_size)
    for index, layer in enumerate(spec.layers):
        try:
            shard.heads(layer.mixer)
            if isinstance(layer.ffn, MoeFfn):
                shard.experts(layer.ffn)
                shard.expert_columns(layer.ffn)
                if layer.ffn.shared:
                    shard.columns(layer.ffn.shared.intermediate_size)
            else:
                shard.columns(layer.ffn.intermediate_size)
        except ValueError as error:
            raise ValueError(f"parallel.tensor = {shard.tp_size} does not fit layer {index}: {error}") from None
