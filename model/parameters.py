"""The parameter table of a rank: every local tensor, its shape, and the ranges of logical parameters it is made of.

Logical parameters are the unsharded, canonical tensors ([out, in] weights) that families map to checkpoint tensors:
    embed.weight [V, H]   positions.weight [P, H]   final_norm.{weight,bias} [H]   head.{weight [V, H], bias [V]}
    with embeddings of another size E than H: embed.weight, head.weight [V, E]   embed_in.weight [H, E]
    embed_out.weight [E, H]
    layers.I.{pre_mixer,post_mixer,pre_ffn,post_ffn}_norm.{weight,bias} [H]
    layers.I.mixer.{q,k,v,o}.{weight,bias}   layers.I.mixer.{q_norm,k_norm}.{weight,bias}
    layers.I.mixer.sinks [num_heads]
    layers.I.ffn.{gate,up,down}.{weight,bias}   layers.I.ffn.router.weight [E, H]
    layers.I.ffn.experts.E.{gate,up,down}.weight
    layers.I.ffn.shared.{gate,up,down}.weight   layers.I.ffn.shared_gate.weight [1, H]
Local tensors are what the decoder computes with: query, key and value rows are fused into mixer.qkv, gate and up into
ffn.gate_up, experts are stacked. With shard.quantization the weights of linears are rounded: int8 and int4
(kernels/quantized_format.py) to 8 or 4 bits in the layers, experts included, and to 8 in the head, and in the embedding
where that is the head as well; fp8 (kernels/fp8_weight.py) those in the layers alone. Other embeddings, norms, biases,
routers and sinks are floats always. The ledger, `explain`, the loader and the decoder all read this one table. No
torch.
"""

from collections.abc import Iterator
from math import prod
from typing import Literal

import msgspec

from shoal.kernels.quantized_format import GROUP, quantized_bytes
from shoal.model.shard import ModelShard, Quantization
from shoal.model.spec import Attention, DecoderSpec, GatedFfn, Layer, MoeFfn, Norm
from shoal.parallel.sharding import Range

Rounding = Literal["int8", "int4", "fp8"]
BITS = {"int8": 8, "int4": 4}  # of their codes
FP8_SCALE_BYTES = 4  # of a column


class Part(msgspec.Struct, frozen=True):
    """A block of a logical parameter and where it goes. source: ranges per dimension of the logical parameter; dest:
    ranges per dimension of the local tensor (which has one leading dimension more for stacked experts)."""

    logical: str
    source: tuple[Range, ...]
    dest: tuple[Range, ...]


class LocalParameter(msgspec.Struct, frozen=True):
    """One tensor of a rank. rounding: how it is quantised, None for floats."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    rounding: Rounding | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def lead(self) -> int:
        """Inputs of the first group of a quantised weight that lie before this slice; a group of FP8 is the row."""
        start = self.parts[0].source[-1][0]
        return start if self.rounding == "fp8" else start % GROUP

    def whole_groups(self, inputs: Range, width: int) -> Range:
        """The inputs of all groups that have some of these. width: inputs of the logical parameter."""
        if self.rounding == "fp8":
            return (0, width)
        return inputs[0] - inputs[0] % GROUP, min(-(-inputs[1] // GROUP) * GROUP, width)

    def num_bytes(self, itemsize: int, device: str = "cpu") -> int:
        """Bytes it takes when floats take itemsize. device: "cpu" or "cuda", which orders codes its own way."""
        if self.rounding is None:
            return self.numel * itemsize
        *count, columns, inner = self.shape
        if self.rounding == "fp8":
            return prod(count) * columns * (inner + FP8_SCALE_BYTES)
        bits = BITS[self.rounding]
        return prod(count) * quantized_bytes(columns, inner, self.lead, bits, blocked=device != "cuda")


def whole(name: str, *shape: int) -> LocalParameter:
    """A parameter every rank holds entirely."""
    ranges = tuple((0, size) for size in shape)
    return LocalParameter(name, shape, (Part(name, ranges, ranges),))


def stacked(name: str, pieces: list[tuple[str, Range]], width: int | None) -> LocalParameter:
    """Row ranges of several logical parameters on top of each other; width is the second dimension, None for
    vectors."""
    columns: tuple[Range, ...] = () if width is None else ((0, width),)
    parts, row = [], 0
    for logical, (start, stop) in pieces:
        parts.append(Part(logical, ((start, stop), *columns), ((row, row + stop - start), *columns)))
        row += stop - start
    return LocalParameter(name, (row,) if width is None else (row, width), tuple(parts))


def column_slice(name: str, rows: int, columns: Range) -> LocalParameter:
    """A range of input columns of a row-parallel weight."""
    width = columns[1] - columns[0]
    return LocalParameter(name, (rows, width), (Part(name, ((0, rows), columns), ((0, rows), (0, width))),))


def norm_parameters(name: str, norm: Norm | None, size: int) -> Iterator[LocalParameter]:
    """Weight and bias of a norm, when it is there."""
    if norm is not None:
        yield whole(f"{name}.weight", size)
        if norm.bias:
            yield whole(f"{name}.bias", size)


def attention_parameters(prefix: str, mixer: Attention, hidden: int, shard: ModelShard) -> Iterator[LocalParameter]:
    """qkv, output projection, query/key norms and sinks of one layer."""
    heads, dim = shard.heads(mixer), mixer.head_dim
    q_rows, kv_rows = (heads.q_start * dim, heads.q_stop * dim), (heads.kv_start * dim, heads.kv_stop * dim)
    rows = {"q": q_rows, "k": kv_rows, "v": kv_rows}
    yield stacked(f"{prefix}.qkv.weight", [(f"{prefix}.{x}.weight", rows[x]) for x in "qkv"], hidden)
    if mixer.qkv_bias:
        yield stacked(f"{prefix}.qkv.bias", [(f"{prefix}.{x}.bias", rows[x]) for x in "qkv"], None)
    yield column_slice(f"{prefix}.o.weight", hidden, q_rows)
    if mixer.out_bias:
        yield whole(f"{prefix}.o.bias", hidden)
    if mixer.qk_norm is not None:
        for x, local in (("q", q_rows), ("k", kv_rows)):
            for kind in ("weight", "bias") if mixer.qk_norm.norm.bias else ("weight",):
                name = f"{prefix}.{x}_norm.{kind}"
                yield whole(name, dim) if mixer.qk_norm.per_head else stacked(name, [(name, local)], None)
    if mixer.sinks:
        yield stacked(f"{prefix}.sinks", [(f"{prefix}.sinks", (heads.q_start, heads.q_stop))], None)


def gated_parameters(prefix: str, columns: Range, hidden: int, bias: bool) -> Iterator[LocalParameter]:
    """gate_up and down of one gated feed-forward."""
    yield stacked(f"{prefix}.gate_up.weight", [(f"{prefix}.{x}.weight", columns) for x in ("gate", "up")], hidden)
    if bias:
        yield stacked(f"{prefix}.gate_up.bias", [(f"{prefix}.{x}.bias", columns) for x in ("gate", "up")], None)
    yield column_slice(f"{prefix}.down.weight", hidden, columns)
    if bias:
        yield whole(f"{prefix}.down.bias", hidden)


def moe_parameters(prefix: str, ffn: MoeFfn, hidden: int, shard: ModelShard) -> Iterator[LocalParameter]:
    """Router, this rank's experts (stacked) and the shared expert."""
    first, last = shard.experts(ffn)
    columns = shard.expert_columns(ffn)
    width, count = columns[1] - columns[0], last - first
    gate_up, down = [], []
    for expert in range(first, last):
        slot, base = (expert - first, expert - first + 1), f"{prefix}.experts.{expert}"
        for index, x in enumerate(("gate", "up")):
            rows = (index * width, (index + 1) * width)
            gate_up.append(Part(f"{base}.{x}.weight", (columns, (0, hidden)), (slot, rows, (0, hidden))))
        down.append(Part(f"{base}.down.weight", ((0, hidden), columns), (slot, (0, hidden), (0, width))))
    yield whole(f"{prefix}.router.weight", ffn.num_experts, hidden)
    yield LocalParameter(f"{prefix}.experts.gate_up.weight", (count, 2 * width, hidden), tuple(gate_up))
    yield LocalParameter(f"{prefix}.experts.down.weight", (count, hidden, width), tuple(down))
    if ffn.shared is not None:
        yield from gated_parameters(
            f"{prefix}.shared", shard.columns(ffn.shared.intermediate_size), hidden, ffn.shared.bias
        )
        if ffn.shared_gate:
            yield whole(f"{prefix}.shared_gate.weight", 1, hidden)


def layer_parameters(index: int, layer: Layer, hidden: int, shard: ModelShard) -> Iterator[LocalParameter]:
    """Everything one layer needs on this rank."""
    prefix, ffn = f"layers.{index}", layer.ffn
    for name in ("pre_mixer_norm", "post_mixer_norm", "pre_ffn_norm", "post_ffn_norm"):
        yield from norm_parameters(f"{prefix}.{name}", getattr(layer, name), hidden)
    yield from attention_parameters(f"{prefix}.mixer", layer.mixer, hidden, shard)
    if isinstance(ffn, MoeFfn):
        yield from moe_parameters(f"{prefix}.ffn", ffn, hidden, shard)
    elif isinstance(ffn, GatedFfn):
        yield from gated_parameters(f"{prefix}.ffn", shard.columns(ffn.intermediate_size), hidden, ffn.bias)
    else:
        columns = shard.columns(ffn.intermediate_size)
        yield stacked(f"{prefix}.ffn.up.weight", [(f"{prefix}.ffn.up.weight", columns)], hidden)
        if ffn.bias:
            yield stacked(f"{prefix}.ffn.up.bias", [(f"{prefix}.ffn.up.bias", columns)], None)
        yield column_slice(f"{prefix}.ffn.down.weight", hidden, columns)
        if ffn.bias:
            yield whole(f"{prefix}.ffn.down.bias", hidden)


def head_is_shared(spec: DecoderSpec, shard: ModelShard) -> bool:
    """Whether the head computes with the embedding's own tensor: tied, and both on this rank."""
    return spec.tie_embeddings and shard.has_embedding and shard.has_head


LINEARS = ("mixer.qkv", "mixer.o", "gate_up", "ffn.up", "down")
HEAD_ROUNDING: dict[Quantization, Rounding | None] = {"none": None, "int8": "int8", "int4": "int8", "fp8": None}


def weight_rounding(name: str, quantization: Quantization, tied: bool) -> Rounding | None:
    """How a local tensor is quantised; None when it is not. tied: the embedding is the head as well."""
    module, _, kind = name.rpartition(".")
    if quantization == "none" or kind != "weight":
        return None
    if module == "head" or (module == "embed" and tied):
        return HEAD_ROUNDING[quantization]
    return quantization if module.endswith(LINEARS) else None


def local_parameters(spec: DecoderSpec, shard: ModelShard) -> Iterator[LocalParameter]:
    """The whole table of a rank, in the order of computation. A tied head on another stage than the embedding is a
    tensor of its own."""
    for parameter in float_parameters(spec, shard):
        rounding = weight_rounding(parameter.name, shard.quantization, spec.tie_embeddings)
        yield parameter if rounding is None else msgspec.structs.replace(parameter, rounding=rounding)


def float_parameters(spec: DecoderSpec, shard: ModelShard) -> Iterator[LocalParameter]:
    """The table with no word on rounding."""
    vocab, hidden, embed = shard.vocab(spec.vocab_size), spec.hidden_size, spec.embed_size or spec.hidden_size
    if shard.has_embedding:
        yield stacked("embed.weight", [("embed.weight", vocab)], embed)
        if spec.embed_size is not None:
            yield whole("embed_in.weight", hidden, embed)
        if spec.learned_positions is not None:
            yield whole("positions.weight", spec.learned_positions.num_positions, hidden)
    for index in range(shard.first_layer, shard.last_layer):
        yield from layer_parameters(index, spec.layers[index], hidden, shard)
    if shard.has_head:
        yield from norm_parameters("final_norm", spec.final_norm, hidden)
        if spec.embed_size is not None:
            yield whole("embed_out.weight", embed, hidden)
        if not head_is_shared(spec, shard):
            source = "embed.weight" if spec.tie_embeddings else "head.weight"
            yield stacked("head.weight", [(source, vocab)], embed)
        if spec.head_bias:
            yield stacked("head.bias", [("head.bias", vocab)], None)
