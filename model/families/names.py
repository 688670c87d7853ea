"""Where logical parameters lie in a checkpoint: names, fused and transposed tensors, interleaved heads, stacked
experts. No torch.

A family writes one Place (or several candidates) per module; `locate` turns them into one Source per logical parameter:
a strided view of a checkpoint tensor's elements, from which any block of rows and columns can be read.
"""

from collections.abc import Collection, Mapping
from math import prod
from typing import Literal

import msgspec

from shoal.model.parameters import local_parameters
from shoal.model.shard import ModelShard
from shoal.model.spec import DecoderSpec, MoeFfn

Shape = tuple[int, ...]


class Source(msgspec.Struct, frozen=True):
    """A logical parameter as a view of the elements of `tensor`, whose whole shape in the file is `shape`.

    Element (row, column) is at offset + row * row_stride + column * column_stride; with group_rows, rows come in groups
    of that many, group_stride elements apart, and `row` counts within the group. A vector has one column.
    """

    tensor: str
    shape: Shape
    offset: int
    row_stride: int
    column_stride: int
    group_rows: int | None = None
    group_stride: int = 0


class Place(msgspec.Struct, frozen=True):
    """How one module is stored. name: a template with {base}, {layer}, {expert}; the parameter's kind (weight, bias) is
    appended.

    fused: siblings that share the tensor, in order, on top of each other along the output dimension.
    layout: "rows" is [out, in]; "transposed" is [in, out]; "heads" interleaves the fused siblings head by head, [heads,
    fused, head_dim]. stacked: experts along a leading dimension of a tensor whose name ends without a kind.
    """

    name: str
    fused: tuple[str, ...] = ()
    layout: Literal["rows", "transposed", "heads"] = "rows"
    head_dim: int = 0
    stacked: bool = False


Names = Mapping[str, str | Place | tuple[str | Place, ...]]
"""Module key -> its Place, a plain template, or candidates of which the first that the checkpoint has is taken. Keys
are logical names without `layers.N.`, the expert's number and the kind: `embed`, `mixer.q`, `ffn.experts.gate`."""


class LogicalName(msgspec.Struct, frozen=True):
    """A logical parameter's name, taken apart."""

    key: str
    kind: str
    layer: int | None
    expert: int | None


def parse_logical(name: str) -> LogicalName:
    """`layers.3.ffn.experts.7.gate.weight` -> key `ffn.experts.gate`, kind `weight`, layer 3, expert 7."""
    parts = name.split(".")
    kind = parts.pop() if parts[-1] in ("weight", "bias") else ""
    layer = expert = None
    if parts[0] == "layers":
        layer, parts = int(parts[1]), parts[2:]
    if "experts" in parts:
        at = parts.index("experts") + 1
        expert = int(parts.pop(at))
    return LogicalName(".".join(parts), kind, layer, expert)


def logical_shapes(spec: DecoderSpec) -> dict[str, Shape]:
    """The global shape of every logical parameter of a model, in the order of computation."""
    whole = ModelShard(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, first_layer=0, last_layer=len(spec.layers))
    return {
        part.logical: tuple(stop for _, stop in part.source)
        for parameter in local_parameters(spec, whole)
        for part in parameter.parts
    }


def place_source(
    place: Place, tensor: str, logical: str, name: LogicalName, shapes: Mapping[str, Shape], num_experts: int
) -> Source:
    """The view of `logical`, taken apart as `name`, within `tensor`, stored as `place` says."""
    own, shape = name.key.rsplit(".", 1)[-1], shapes[logical]
    siblings = [own]
    rows_of = {own: shape[0]}
    if place.fused:
        siblings = list(place.fused)
        stem = logical.removesuffix(f"{own}.{name.kind}")
        rows_of = {sibling: shapes[f"{stem}{sibling}.{name.kind}"][0] for sibling in siblings}
    total, first = sum(rows_of.values()), sum(rows_of[sibling] for sibling in siblings[: siblings.index(own)])
    width = shape[1] if len(shape) == 2 else 1
    file_shape: Shape = (total,) if len(shape) == 1 else (total, width)
    offset, row_stride, column_stride = first * width, width, 1
    group_rows, group_stride = None, 0
    if place.layout == "transposed" and len(shape) == 2:
        file_shape, offset, row_stride, column_stride = (width, total), first, 1, total
    elif place.layout == "heads":
        group_rows, offset = place.head_dim, siblings.index(own) * place.head_dim * width
        group_stride = len(siblings) * place.head_dim * width
    if place.stacked:
        offset += (name.expert or 0) * prod(file_shape)
        file_shape = (num_experts, *file_shape)
    return Source(tensor, file_shape, offset, row_stride, column_stride, group_rows, group_stride)


def tensor_name(place: Place, name: LogicalName, base: str, layer_template: str) -> str:
    """The checkpoint's name for a parameter stored at `place`."""
    layer = base + layer_template.format(index=name.layer)
    text = place.name.format(base=base, layer=layer, expert=name.expert)
    return text if place.stacked or not name.kind else f"{text}.{name.kind}"


def candidates(entry: str | Place | tuple[str | Place, ...]) -> list[Place]:
    """An entry of Names as a list of Places."""
    entries = entry if isinstance(entry, tuple) else (entry,)
    return [Place(item) if isinstance(item, str) else item for item in entries]


def locate(
    spec: DecoderSpec, names: Names, bases: tuple[str, ...], layer_template: str, available: Collection[str]
) -> dict[str, Source]:
    """One Source per logical parameter. bases: prefixes of the base model, the first under which the embedding exists
    is used.

    A parameter none of whose candidates is in `available` gets its first candidate: the caller reports it missing.
    """
    shapes = logical_shapes(spec)
    places = {key: candidates(entry) for key, entry in names.items()}
    embedding = LogicalName("embed", "weight", None, None)
    first = places["embed"][0]
    base = next((b for b in bases if tensor_name(first, embedding, b, layer_template) in available), bases[0])
    sources = {}
    for logical in shapes:
        name = parse_logical(logical)
        options = [(place, tensor_name(place, name, base, layer_template)) for place in places[name.key]]
        place, tensor = next((option for option in options if option[1] in available), options[0])
        ffn = None if name.layer is None else spec.layers[name.layer].ffn
        num_experts = ffn.num_experts if isinstance(ffn, MoeFfn) else 0
        sources[logical] = place_source(place, tensor, logical, name, shapes, num_experts)
    return sources
