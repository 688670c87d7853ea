"""What one step asks of a rank: bytes it must read and FLOP it must do, worked out from spec and shard. No torch.

Counted are products with weights, and attention with the keys and values of the cache: what bounds a step's time from
below wherever it runs. Left out as small: norms, rotary, activation, sampling, reading and writing the step's own
rows. `explain` predicts with it, `bench` puts what it measures beside it.
"""

from typing import NamedTuple

from shoal.model.parameters import LocalParameter, local_parameters
from shoal.model.shard import ModelShard
from shoal.model.spec import Attention, DecoderSpec, MoeFfn

HEAD = ("head.", "embed.", "embed_out.")  # of the rows that sample alone; embed where it is the head as well


class StepRows(NamedTuple):
    """The rows of a step. sequences: how many, a mean where it is no whole number; tokens: new ones of each, of which
    the last one's logits are needed; context: tokens of each that are in the cache already.
    """

    sequences: float
    tokens: int
    context: int


class StepWork(NamedTuple):
    """weights_bytes: of weights that are read once; cache_bytes: of keys and values, read once for each row; flops:
    multiplications and additions.
    """

    weights_bytes: float
    cache_bytes: float
    flops: float


def step_work(
    spec: DecoderSpec, shard: ModelShard, rows: StepRows, itemsize: int, kv_itemsize: int, device: str = "cpu"
) -> StepWork:
    """The work of one step on a rank.

    itemsize, kv_itemsize: bytes of a float weight and of a cached element; device: "cpu" or "cuda", which lays out
    quantised weights differently. Experts are taken to be chosen evenly: E experts of which T tokens choose k each are
    read but for the share (1 - k / E) ** T that nobody chose.
    """
    weights_bytes = flops = 0.0
    tied_head = spec.tie_embeddings and shard.has_head
    for parameter in local_parameters(spec, shard):
        num_bytes, numel = parameter.num_bytes(itemsize, device), parameter.numel
        if parameter.name == "positions.weight" or (parameter.name == "embed.weight" and not tied_head):
            continue  # one row for each token
        if ".experts." in parameter.name:
            chosen, share = expert_use(spec, parameter, rows)
            weights_bytes += share * num_bytes
            flops += 2 * chosen * numel
        else:
            weights_bytes += num_bytes
            if len(parameter.shape) > 1:
                uses = rows.sequences if parameter.name.startswith(HEAD) else rows.sequences * rows.tokens
                flops += 2 * uses * numel
    cache_bytes = 0.0
    for layer in spec.layers[shard.first_layer : shard.last_layer]:
        heads, dim = shard.heads(layer.mixer), layer.mixer.head_dim
        read, seen = attended(layer.mixer, rows)
        cache_bytes += rows.sequences * read * 2 * heads.num_kv_heads * dim * kv_itemsize
        flops += rows.sequences * seen * 4 * heads.num_heads * dim
    return StepWork(weights_bytes, cache_bytes, flops)


def expert_use(spec: DecoderSpec, parameter: LocalParameter, rows: StepRows) -> tuple[float, float]:
    """How many tokens multiply with each expert of a rank's stack, in the mean, and the share of it that is read."""
    ffn = spec.layers[int(parameter.name.split(".")[1])].ffn
    assert isinstance(ffn, MoeFfn), "only mixtures have experts"
    tokens, chance = rows.sequences * rows.tokens, ffn.top_k / ffn.num_experts
    return tokens * chance, 1 - (1 - chance) ** tokens


def attended(mixer: Attention, rows: StepRows) -> tuple[float, float]:
    """Cached positions that a row of a layer reads, and those that its tokens see, summed over them: a token sees
    itself and all before it, but no more than the window together.
    """
    total = rows.context + rows.tokens
    window = total if mixer.window is None else min(mixer.window, total)
    growing = max(0, min(rows.tokens, window - rows.context))  # tokens that see less than the window
    seen = growing * (rows.context + (growing + 1) / 2) + (rows.tokens - growing) * window
    return min(rows.context, window - 1), seen
