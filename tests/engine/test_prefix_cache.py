"""Prefix keys and the longest hit over several cache groups."""

import random

import pytest

from shoal.engine.block_pool import BlockPool
from shoal.engine.prefix_cache import extend_keys, first_visible_block, longest_hit, root_key


def keys_of(tokens: list[int], block_size: int, salt: str | None = None) -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, root_key(salt), tokens, block_size, len(tokens) // block_size)
    return keys


def test_keys_name_the_whole_prefix() -> None:
    one, other = keys_of([1, 2, 3, 4, 5, 6], 2), keys_of([9, 2, 3, 4, 5, 6], 2)
    assert len(one) == 3 and not set(one) & set(other)
    assert keys_of([1, 2, 3, 4, 5, 7], 2)[:2] == one[:2]


def test_keys_depend_on_salt_and_block_size() -> None:
    assert keys_of([1, 2], 2) != keys_of([1, 2], 2, "a") != keys_of([1, 2], 2, "b")
    assert keys_of([1, 2], 2, "") != keys_of([1, 2], 2), "an empty salt is a salt"
    assert keys_of([1, 2, 3, 4], 4) != keys_of([1, 2, 3, 4], 2)[1:]


def test_keys_are_extended_without_repeating_work() -> None:
    tokens = list(range(12))
    keys = keys_of(tokens[:6], 3)
    extend_keys(keys, root_key(None), tokens, 3, 4)
    assert keys == keys_of(tokens, 3)


@pytest.mark.parametrize(
    ("position", "window", "first"), [(0, 4, 0), (3, 4, 0), (5, 4, 1), (6, 4, 1), (7, 4, 2), (9, None, 0)]
)
def test_a_query_sees_its_window_itself_included(position: int, window: int | None, first: int) -> None:
    assert first_visible_block(position, window, block_size=2) == first


def hold(keys: list[bytes], which: set[int]) -> BlockPool:
    pool = BlockPool(len(keys) + 1)
    for block in pool.allocate(len(keys)):
        pool.release(block, keys[block] if block in which else None)
    return pool


def test_a_full_group_serves_what_it_holds_without_a_gap() -> None:
    keys = keys_of(list(range(10)), 2)
    assert longest_hit(keys, [hold(keys, {0, 1, 2, 4})], [None], 2) == 3
    assert longest_hit(keys, [hold(keys, {1, 2})], [None], 2) == 0


def test_a_window_group_needs_only_the_last_window() -> None:
    keys = keys_of(list(range(10)), 2)
    assert longest_hit(keys, [hold(keys, {3, 4})], [4], 2) == 5
    assert longest_hit(keys, [hold(keys, {4})], [4], 2) == 0
    assert longest_hit(keys, [hold(keys, {1, 4})], [3], 2) == 5


def test_the_hit_is_what_every_group_can_serve() -> None:
    keys = keys_of(list(range(10)), 2)
    full, window = hold(keys, {0, 1, 2, 3}), hold(keys, {1, 2, 4})
    assert longest_hit(keys, [full, window], [None, 4], 2) == 3


def test_the_longest_hit_equals_brute_force() -> None:
    rng = random.Random(0)
    keys = keys_of(list(range(24)), 2)
    for _ in range(300):
        windows = [rng.choice([None, 1, 2, 3, 5, 8]) for _ in range(rng.randrange(1, 4))]
        held = [{i for i in range(12) if rng.random() < 0.8} for _ in windows]
        pools = [hold(keys, which) for which in held]

        def fits(count: int, windows: list[int | None] = windows, held: list[set[int]] = held) -> bool:
            seen = [range(0 if w is None else max(0, 2 * count - w + 1) // 2, count) for w in windows]
            return all(set(blocks) <= have for blocks, have in zip(seen, held, strict=True))

        assert longest_hit(keys, pools, windows, 2) == max(c for c in range(13) if fits(c))
