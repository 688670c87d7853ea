"""Who holds what: the arithmetic of uneven shards. No torch; every function is deterministic, so all ranks agree
without talking.

A shard is a half-open range [start, stop) along one dimension. Sizes need not divide: remainders go to the ranks with
the largest claim, lower ranks first.
"""

from collections.abc import Sequence

import msgspec

Range = tuple[int, int]


def split(total: int, parts: int, weights: Sequence[float] | None = None, multiple: int = 1) -> list[Range]:
    """Divide [0, total) into `parts` contiguous ranges proportional to weights, none empty.

    Boundaries fall on multiples of `multiple` when there are enough of them, else on any integer. Raises ValueError
    when total < parts.
    """
    if total < parts:
        raise ValueError(f"cannot divide {total} among {parts} ranks: at most {total} ranks; lower the parallel size")
    if multiple > 1 and total % multiple == 0 and total // multiple >= parts:
        return [(a * multiple, b * multiple) for a, b in split(total // multiple, parts, weights)]
    shares = list(weights) if weights is not None else [1.0] * parts
    if len(shares) != parts:
        raise ValueError(f"{len(shares)} weights for {parts} ranks; give one per rank")
    scale = total / sum(shares)
    sizes = [max(1, int(share * scale)) for share in shares]
    while sum(sizes) < total:
        rank = max(range(parts), key=lambda r: (shares[r] * scale - sizes[r], -r))
        sizes[rank] += 1
    while sum(sizes) > total:
        rank = max((r for r in range(parts) if sizes[r] > 1), key=lambda r: (sizes[r] - shares[r] * scale, r))
        sizes[rank] -= 1
    ranges, start = [], 0
    for size in sizes:
        ranges.append((start, start + size))
        start += size
    return ranges


class HeadShard(msgspec.Struct, frozen=True, kw_only=True):
    """The heads of one tensor rank: query heads [q_start, q_stop), key/value heads [kv_start, kv_stop).

    q_to_kv: for every local query head the local index of its key/value head.
    """

    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int
    q_to_kv: tuple[int, ...]

    @property
    def num_heads(self) -> int:
        """Local query heads."""
        return self.q_stop - self.q_start

    @property
    def num_kv_heads(self) -> int:
        """Local key/value heads."""
        return self.kv_stop - self.kv_start

    @property
    def uniform(self) -> bool:
        """Whether the local map is the plain GQA one: equal, consecutive groups."""
        group, rest = divmod(self.num_heads, self.num_kv_heads)
        return rest == 0 and all(kv == q // group for q, kv in enumerate(self.q_to_kv))


def shard_heads(
    num_heads: int, num_kv_heads: int, tp_size: int, weights: Sequence[float] | None = None
) -> list[HeadShard]:
    """Heads of every tensor rank: whole KV groups while there are enough, else query heads are divided and KV heads
    replicated.

    Raises ValueError when tp_size exceeds num_heads or num_kv_heads does not divide num_heads.
    """
    if num_heads % num_kv_heads:
        raise ValueError(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
    if tp_size > num_heads:
        raise ValueError(
            f"parallel.tensor = {tp_size} exceeds the {num_heads} query heads of the model; use at most {num_heads}"
        )
    group = num_heads // num_kv_heads
    if tp_size <= num_kv_heads:
        bounds = [(a * group, b * group) for a, b in split(num_kv_heads, tp_size, weights)]
    elif weights is None and tp_size % num_kv_heads == 0:
        copies = split(group, tp_size // num_kv_heads)
        bounds = [(kv * group + a, kv * group + b) for kv in range(num_kv_heads) for a, b in copies]
    else:
        bounds = split(num_heads, tp_size, weights)
    shards = []
    for start, stop in bounds:
        kv_start, kv_stop = start // group, (stop - 1) // group + 1
        mapping = tuple(head // group - kv_start for head in range(start, stop))
        shards.append(HeadShard(q_start=start, q_stop=stop, kv_start=kv_start, kv_stop=kv_stop, q_to_kv=mapping))
    return shards


def split_layers(costs: Sequence[float], stages: int, first_extra: float = 0.0, last_extra: float = 0.0) -> list[Range]:
    """Divide the layers into contiguous, non-empty stages so that the dearest stage is as cheap as possible.

    costs: of each layer; first_extra and last_extra: of the embedding and the head. Among equals the earlier stages are
    longer. Raises ValueError when there are more stages than layers.
    """
    count = len(costs)
    if stages > count:
        raise ValueError(f"parallel.pipeline = {stages} exceeds the {count} layers of the model; use at most {count}")
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    best: dict[tuple[int, int], tuple[float, int]] = {}  # (stages used, layers used) -> (dearest, start of the last)
    for used in range(1, stages + 1):
        for stop in range(used, count - (stages - used) + 1):
            options = [0] if used == 1 else range(used - 1, stop)
            choices = []
            for start in options:
                cost = prefix[stop] - prefix[start] + (first_extra if used == 1 else 0.0)
                cost += last_extra if used == stages else 0.0
                before = best[used - 1, start][0] if used > 1 else 0.0
                choices.append((max(before, cost), -start))
            dearest, start = min(choices)
            best[used, stop] = (dearest, -start)
    ranges, stop = [], count
    for used in range(stages, 0, -1):
        start = best[used, stop][1]
        ranges.append((start, stop))
        stop = start
    return ranges[::-1]
