"""What every rank's memory will hold, worked out from spec and shards before anything is spawned. No torch."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from shoal.configs.schema import ShoalConfig
from shoal.kernels.quantized_format import SLAB
from shoal.model.kv_layout import kv_bytes_per_block, kv_itemsize
from shoal.model.ledger import MemoryReport
from shoal.model.parameters import local_parameters
from shoal.model.shard import ModelShard
from shoal.model.spec import DecoderSpec, DenseFfn, Ffn, MoeFfn, Rope

PROMPT_LOGPROB_ROWS = 256  # prompt positions whose logits are in memory at once
SAMPLING_SLICE = 1 << 19  # logits that are sampled, penalised or scored at once
MOST_GRAPHS = 64  # CUDA graphs of steps kept at one time
GRAPH_BYTES_PER_LAYER = 400 << 10  # of each, for its kernels, about
LARGEST_BATCHES = 4  # as many as all batches that are kept come to, about
GRAPH_SCRATCH = 64 << 20  # bytes of attention's partial results and of cuBLAS in graphs
SLICE_COPIES = 20  # float32 copies of a slice that this takes at most, int64 counters and float64 noise included


def weights_bytes(spec: DecoderSpec, shard: ModelShard, itemsize: int, device: str = "cpu") -> int:
    """Bytes of a rank's parameters on a "cpu" or "cuda" device, before the C kernels' padding of float weights to whole
    panels of 32 columns.
    """
    return sum(parameter.num_bytes(itemsize, device) for parameter in local_parameters(spec, shard))


def ffn_elements(ffn: Ffn, hidden_size: int, shard: ModelShard) -> int:
    """Temporary elements per token of a feed-forward: gate and up, the activation, their product, the output: 4 F + H
    (without a gate 3 F + H). Experts hold their top_k outputs beside the widest of them, the shared one included.
    """
    if isinstance(ffn, MoeFfn):
        start, stop = shard.expert_columns(ffn)
        one_expert = 4 * (stop - start) + hidden_size
        shared = ffn_elements(ffn.shared, hidden_size, shard) + hidden_size if ffn.shared else 0
        return ffn.top_k * hidden_size + max(one_expert, shared)
    start, stop = shard.columns(ffn.intermediate_size)
    return (3 if isinstance(ffn, DenseFfn) else 4) * (stop - start) + hidden_size


def token_elements(spec: DecoderSpec, shard: ModelShard) -> int:
    """Temporary elements per token of a rank's worst layer: residual and normed input (2 H), and the larger of
    feed-forward and attention (q, k, v twice for rotary, and its output: (3 q + 4 kv) head_dim).
    """
    hidden, widest = spec.hidden_size, 0
    for layer in spec.layers[shard.first_layer : shard.last_layer]:
        heads = shard.heads(layer.mixer)
        attention = (3 * heads.num_heads + 4 * heads.num_kv_heads) * layer.mixer.head_dim
        widest = max(widest, attention, ffn_elements(layer.ffn, hidden, shard))
    return 2 * hidden + widest


def activation_bytes(spec: DecoderSpec, shard: ModelShard, config: ShoalConfig, itemsize: int) -> int:
    """Estimate of the largest step's temporary tensors on a rank; bring-up replaces it by a measurement: those of
    max_num_batched_tokens tokens, on GPUs with a slab of few-bit weights as floats, or on the last stage what sampling
    takes, when that is more.
    """
    layers = config.scheduler.max_num_batched_tokens * token_elements(spec, shard) * itemsize
    layers += slab_bytes(config, itemsize)
    if not shard.has_head:
        return layers
    return max(layers, sampling_bytes(spec, shard, config))


def slab_bytes(config: ShoalConfig, itemsize: int) -> int:
    """Most bytes of weights of few bits that are floats at one time, for products of many rows on a GPU."""
    few_bits = config.model.quantization in ("int8", "int4") and config.runtime.device == "cuda"
    return SLAB * itemsize if few_bits else 0


def sampling_bytes(spec: DecoderSpec, shard: ModelShard, config: ShoalConfig) -> int:
    """Most bytes that choosing a step's tokens takes on a rank of the last stage.

    R = min(T, max_num_seqs, but at least the rows of prompt log-probabilities worked on at once) rows of float32
    logits: the shard's, the whole vocabulary's, and a copy before they are edited; and the temporaries of one slice.
    """
    start, stop = shard.vocab(spec.vocab_size)
    tokens = config.scheduler.max_num_batched_tokens
    rows = min(tokens, max(config.scheduler.max_num_seqs, PROMPT_LOGPROB_ROWS))
    slice_elements = max(spec.vocab_size, min(rows * spec.vocab_size, SAMPLING_SLICE))
    return 4 * (rows * (stop - start + 2 * spec.vocab_size) + SLICE_COPIES * slice_elements)


class GraphSizes(NamedTuple):
    """What steps that are CUDA graphs are padded to, rising. rows: of steps of one token per row; mixed_rows and
    tokens: of others, whose graphs come in all combinations.
    """

    rows: tuple[int, ...]
    mixed_rows: tuple[int, ...]
    tokens: tuple[int, ...]

    def most(self) -> tuple[int, int]:
        """Rows and tokens of the largest."""
        return max(self.rows[-1], self.mixed_rows[-1]), max(self.rows[-1], self.tokens[-1])


GRAPH_SIZES = GraphSizes(
    rows=(1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256),
    mixed_rows=(8, 32, 128, 256),
    tokens=(16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048),
)


def graph_sizes(config: ShoalConfig) -> GraphSizes | None:
    """What steps are padded to on GPUs; None where they are launched kernel by kernel. config: settled."""
    staged = config.parallel.tensor > 1 and config.runtime.collectives != "nccl"  # through the host
    if config.runtime.device != "cuda" or config.runtime.enforce_eager or staged:
        return None
    rows, tokens = config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens
    limits = (rows, rows, tokens)
    return GraphSizes(*(up_to(sizes, most) for sizes, most in zip(GRAPH_SIZES, limits, strict=True)))


def up_to(sizes: tuple[int, ...], most: int) -> tuple[int, ...]:
    """Those below `most`, and the first that is not."""
    return sizes[: bisect_left(sizes, most) + 1]


def graph_bytes(spec: DecoderSpec, shard: ModelShard, config: ShoalConfig, itemsize: int) -> int:
    """Most bytes that CUDA graphs of steps take on a rank, about: kernels, rotary tables of all positions, results of
    the largest, temporary tensors, of which a pool that serves smaller graphs first may have as much again, and block
    tables of the batches, of which most are small.
    """
    sizes = graph_sizes(config)
    if sizes is None:
        return 0
    rows, tokens = sizes.most()
    start, stop = shard.vocab(spec.vocab_size) if shard.has_head else (0, 0)
    layers = shard.last_layer - shard.first_layer
    passing = tokens * token_elements(spec, shard) * itemsize + rows * (stop - start) * (itemsize + 4)
    positions = config.model.max_model_len or spec.max_position
    ropes: list[Rope] = []
    for layer in spec.layers[shard.first_layer : shard.last_layer]:
        if layer.mixer.rope is not None and layer.mixer.rope not in ropes:
            ropes.append(layer.mixer.rope)
    kept = rows * (stop - start) * itemsize + tokens * spec.hidden_size * itemsize + slab_bytes(config, itemsize)
    kept += 4 * positions * sum(rope.rotary_dim for rope in ropes)
    kept += 4 * rows * len(spec.cache_windows) * 2 * LARGEST_BATCHES * -(-positions // config.cache.block_size)
    return kept + 2 * passing + GRAPH_SCRATCH + MOST_GRAPHS * layers * GRAPH_BYTES_PER_LAYER


def estimate_reports(
    spec: DecoderSpec,
    shards: Sequence[ModelShard],
    config: ShoalConfig,
    *,
    itemsize: int,
    available_bytes: int,
    ranks_per_device: int = 1,
) -> list[MemoryReport]:
    """What the ranks of a replica would report. config: settled; available_bytes: what an idle device can give;
    itemsize: bytes per float weight; ranks_per_device: ranks that share it (all local ones on a CPU).
    """
    weights = [weights_bytes(spec, shard, itemsize, config.runtime.device) for shard in shards]
    reports = []
    for rank, shard in enumerate(shards):
        first = rank - rank % ranks_per_device
        neighbours = sum(weights[first : first + ranks_per_device]) - weights[rank]
        reports.append(
            MemoryReport(
                rank=rank,
                weights_bytes=weights[rank],
                activation_bytes=activation_bytes(spec, shard, config, itemsize)
                + graph_bytes(spec, shard, config, itemsize),
                available_bytes=available_bytes - neighbours,
                block_bytes=kv_bytes_per_block(
                    spec, shard, config.cache.block_size, kv_itemsize(config.cache.dtype, itemsize)
                ),
            )
        )
    return reports
