"""The arithmetic of uneven shards: everything is held once, nobody is empty, stages are as balanced as can be."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.parallel.sharding import HeadShard, shard_heads, split, split_layers

parts_and_weights = st.integers(1, 12).flatmap(
    lambda parts: st.tuples(
        st.just(parts), st.none() | st.lists(st.floats(0.01, 100.0), min_size=parts, max_size=parts)
    )
)


def covers(ranges: list[tuple[int, int]], total: int) -> bool:
    """Consecutive, non-empty, from 0 to total."""
    return (
        [a for a, _ in ranges] == [0, *(b for _, b in ranges[:-1])]
        and all(a < b for a, b in ranges)
        and (ranges[-1][1] == total)
    )


@given(parts_and_weights, st.integers(0, 500), st.sampled_from([1, 2, 8, 64]))
def test_split_covers_everything_and_leaves_nobody_empty(spread, extra, multiple):
    parts, weights = spread
    total = parts + extra
    ranges = split(total, parts, weights, multiple)
    assert len(ranges) == parts and covers(ranges, total)
    if total % multiple == 0 and total // multiple >= parts:
        assert all(a % multiple == 0 for a, _ in ranges)


@given(parts_and_weights, st.integers(0, 5000))
def test_split_is_within_one_of_the_share_where_every_share_is_at_least_one(spread, extra):
    parts, weights = spread
    total = parts + extra
    weights = weights or [1.0] * parts
    shares = [total * weight / sum(weights) for weight in weights]
    sizes = [b - a for a, b in split(total, parts, weights)]
    if min(shares) >= 1:
        assert all(abs(size - share) < 1 + 1e-6 for size, share in zip(sizes, shares))


def test_split_examples():
    assert split(10, 3) == [(0, 4), (4, 7), (7, 10)]
    assert split(8, 3, [2, 1, 1]) == [(0, 4), (4, 6), (6, 8)]
    assert split(24, 3, multiple=8) == [(0, 8), (8, 16), (16, 24)]
    assert split(3, 3, [100, 1, 1]) == [(0, 1), (1, 2), (2, 3)]


def test_split_refuses_more_ranks_than_items_and_weights_that_do_not_fit():
    with pytest.raises(ValueError, match="cannot divide 3 among 4 ranks"):
        split(3, 4)
    with pytest.raises(ValueError, match="2 weights for 3 ranks"):
        split(9, 3, [1.0, 2.0])


@given(st.integers(1, 8), st.integers(1, 8), st.data())
def test_heads_are_held_once_and_see_their_own_key_value_head(num_kv_heads, group, data):
    num_heads = num_kv_heads * group
    tp_size = data.draw(st.integers(1, num_heads))
    weights = data.draw(st.none() | st.lists(st.floats(0.1, 10.0), min_size=tp_size, max_size=tp_size))
    shards = shard_heads(num_heads, num_kv_heads, tp_size, weights)
    assert covers([(s.q_start, s.q_stop) for s in shards], num_heads)
    for shard in shards:
        assert shard.num_heads == len(shard.q_to_kv)
        for local, kv in enumerate(shard.q_to_kv):
            assert 0 <= kv < shard.num_kv_heads
            assert shard.kv_start + kv == (shard.q_start + local) // group
        assert set(shard.q_to_kv) == set(range(shard.num_kv_heads)), "a key/value head nobody uses"
    if tp_size <= num_kv_heads:
        assert all(shard.uniform for shard in shards)
        assert covers([(s.kv_start, s.kv_stop) for s in shards], num_kv_heads), "a key/value head held twice"
    elif weights is None and tp_size % num_kv_heads == 0:
        assert all(shard.num_kv_heads == 1 for shard in shards)


@given(st.integers(1, 8), st.integers(1, 8), st.data())
def test_no_rank_holds_many_more_heads_than_another_without_weights(num_kv_heads, group, data):
    tp_size = data.draw(st.integers(1, num_kv_heads * group))
    sizes = [shard.num_heads for shard in shard_heads(num_kv_heads * group, num_kv_heads, tp_size)]
    unit = group if tp_size <= num_kv_heads else 1
    assert max(sizes) - min(sizes) <= unit


def test_head_examples():
    assert [s.num_heads for s in shard_heads(8, 8, 3)] == [3, 3, 2]
    assert [s.num_heads for s in shard_heads(6, 2, 4)] == [2, 1, 2, 1]
    middle = shard_heads(6, 2, 3)[1]
    assert middle == HeadShard(q_start=2, q_stop=4, kv_start=0, kv_stop=2, q_to_kv=(0, 1)) and middle.uniform
    assert [(s.q_start, s.q_stop, s.kv_start, s.kv_stop) for s in shard_heads(8, 2, 4)] == [
        (0, 2, 0, 1), (2, 4, 0, 1), (4, 6, 1, 2), (6, 8, 1, 2),
    ]  # fmt: skip
    odd = HeadShard(q_start=0, q_stop=3, kv_start=0, kv_stop=2, q_to_kv=(0, 0, 1))
    assert not odd.uniform
    with pytest.raises(ValueError, match=r"parallel.tensor = 9 exceeds the 8 query heads"):
        shard_heads(8, 2, 9)
    with pytest.raises(ValueError, match="8 is not a multiple of num_key_value_heads 3"):
        shard_heads(8, 3, 2)


def dearest(ranges: list[tuple[int, int]], costs: list[float], first: float, last: float) -> float:
    totals = [sum(costs[a:b]) for a, b in ranges]
    totals[0] += first
    totals[-1] += last
    return max(totals)


@given(
    st.lists(st.integers(1, 20).map(float), min_size=1, max_size=9), st.data(), st.integers(0, 30), st.integers(0, 30)
)
def test_no_other_division_has_a_cheaper_dearest_stage(costs, data, first, last):
    stages = data.draw(st.integers(1, len(costs)))
    ranges = split_layers(costs, stages, first, last)
    assert len(ranges) == stages and covers(ranges, len(costs))
    best = min(
        dearest(list(zip((0, *cuts), (*cuts, len(costs)))), costs, first, last)
        for cuts in combinations(range(1, len(costs)), stages - 1)
    )
    assert dearest(ranges, costs, first, last) == best


def test_equal_layers_are_divided_evenly_and_earlier_stages_are_longer():
    assert split_layers([1.0] * 12, 3) == [(0, 4), (4, 8), (8, 12)]
    assert split_layers([1.0] * 10, 4) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert split_layers([1.0] * 5, 2) == [(0, 3), (3, 5)]
    assert split_layers([1.0] * 4, 2, first_extra=0.0, last_extra=2.0) == [(0, 3), (3, 4)]
    with pytest.raises(ValueError, match=r"parallel.pipeline = 3 exceeds the 2 layers"):
        split_layers([1.0, 1.0], 3)


def test_layers_of_a_deep_model_are_divided_quickly():
    ranges = split_layers([1.0] * 126, 16)
    assert covers(ranges, 126) and max(b - a for a, b in ranges) == 8
