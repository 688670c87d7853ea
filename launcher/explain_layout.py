"""Who holds what: the rows of `shoal explain`'s layout table, one per rank, and how unequal the shares are. Spawns
nothing."""

from collections.abc import Sequence
from itertools import pairwise

import msgspec

from shoal.model.parameters import local_parameters
from shoal.model.shard import ModelShard
from shoal.model.spec import Attention, DecoderSpec, Ffn, MoeFfn
from shoal.parallel.sharding import Range


class RankShare(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank of a replica holds. Ranges are half-open. heads, kv_heads, columns and experts are those of each
    kind of layer on it, most often one kind. parameters: elements of all its tensors; share: of the parameters of an
    equal division."""

    rank: int
    tp_rank: int
    pp_rank: int
    layers: Range
    heads: list[Range]
    kv_heads: list[Range]
    uneven_head_map: bool
    columns: list[Range]
    experts: list[Range]
    vocab: Range | None
    embedding: bool
    head: bool
    parameters: int
    share: float


def feed_forward_columns(ffn: Ffn, shard: ModelShard) -> Range:
    """The columns of a feed-forward (of each expert) on a rank."""
    return shard.expert_columns(ffn) if isinstance(ffn, MoeFfn) else shard.columns(ffn.intermediate_size)


def distinct(ranges: Sequence[Range]) -> list[Range]:
    """Each range once, in order of appearance."""
    return list(dict.fromkeys(ranges))


def rank_shares(spec: DecoderSpec, shards: Sequence[ModelShard]) -> list[RankShare]:
    """The table of one replica; every replica is alike."""
    counts = [sum(parameter.numel for parameter in local_parameters(spec, shard)) for shard in shards]
    equal = sum(counts) / len(counts)
    rows = []
    for rank, (shard, count) in enumerate(zip(shards, counts, strict=True)):
        layers = spec.layers[shard.first_layer : shard.last_layer]
        mixers: list[Attention] = [layer.mixer for layer in layers]
        heads = [shard.heads(mixer) for mixer in mixers]
        moes = [layer.ffn for layer in layers if isinstance(layer.ffn, MoeFfn)]
        rows.append(
            RankShare(
                rank=rank,
                tp_rank=shard.tp_rank,
                pp_rank=shard.pp_rank,
                layers=(shard.first_layer, shard.last_layer),
                heads=distinct([(head.q_start, head.q_stop) for head in heads]),
                kv_heads=distinct([(head.kv_start, head.kv_stop) for head in heads]),
                uneven_head_map=not all(head.uniform for head in heads),
                columns=distinct([feed_forward_columns(layer.ffn, shard) for layer in layers]),
                experts=distinct([shard.experts(ffn) for ffn in moes]),
                vocab=shard.vocab(spec.vocab_size) if shard.has_embedding or shard.has_head else None,
                embedding=shard.has_embedding,
                head=shard.has_head,
                parameters=count,
                share=count / equal,
            )
        )
    return rows


def show_range(span: Range) -> str:
    """A half-open range as people read it: 0-7 for [0, 8)."""
    start, stop = span
    return str(start) if stop - start == 1 else f"{start}-{stop - 1}"


def show_ranges(spans: Sequence[Range]) -> str:
    """Several ranges, or a dash."""
    return ", ".join(show_range(span) for span in spans) or "-"


LAYOUT_COLUMNS = (
    "rank",
    "stage",
    "shard",
    "layers",
    "q heads",
    "kv heads",
    "ffn cols",
    "experts",
    "vocab",
    "params",
    "share",
)


def layout_table(shares: Sequence[RankShare]) -> list[tuple[str, ...]]:
    """Cells under LAYOUT_COLUMNS."""
    rows: list[tuple[str, ...]] = []
    for row in shares:
        holds = [name for name, there in (("embed", row.embedding), ("head", row.head)) if there]
        vocab = "-" if row.vocab is None else f"{show_range(row.vocab)} ({'+'.join(holds)})"
        rows.append(
            (
                str(row.rank),
                str(row.pp_rank),
                str(row.tp_rank),
                show_range(row.layers),
                show_ranges(row.heads),
                show_ranges(row.kv_heads) + (" *" if row.uneven_head_map else ""),
                show_ranges(row.columns),
                show_ranges(row.experts),
                vocab,
                f"{row.parameters / 1e6:.2f}M",
                f"{row.share:.0%}",
            )
        )
    return rows


def layout_notes(shares: Sequence[RankShare]) -> list[str]:
    """What the table shows, in words: the worst share, replicated and unevenly mapped heads."""
    worst = max(shares, key=lambda row: row.share)
    notes = [f"The fullest rank is {worst.rank}: {worst.share:.0%} of an equal share."]
    if any(row.uneven_head_map for row in shares):
        notes.append("* key/value heads serve unequal numbers of query heads on this rank.")
    first_stage = [row for row in shares if row.pp_rank == 0]
    if any(a.kv_heads[0][1] > b.kv_heads[0][0] for a, b in pairwise(first_stage)):
        notes.append("Key/value heads are replicated: fewer of them than tensor ranks, or a split inside a group.")
    return notes
