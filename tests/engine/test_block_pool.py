"""BlockPool: three states, references, eviction from the leaves."""

import pytest

from shoal.engine.block_pool import BlockPool


def states(pool: BlockPool) -> tuple[int, int, int]:
    return pool.num_free, pool.num_cached, pool.num_referenced


def test_a_block_without_a_key_is_free_again_after_release() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    assert states(pool) == (1, 0, 2)
    for block in blocks:
        pool.release(block)
    assert states(pool) == (3, 0, 0)
    pool.check_integrity([])


def test_a_published_block_stays_cached_and_is_found() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.publish(block, b"k")
    pool.release(block)
    assert states(pool) == (1, 1, 0)
    assert pool.lookup(b"k") == block
    pool.acquire(block)
    pool.acquire(block)
    assert states(pool) == (1, 0, 1)
    pool.check_integrity([[block], [block]])


def test_release_can_publish() -> None:
    pool = BlockPool(1)
    (block,) = pool.allocate(1)
    pool.release(block, b"k")
    assert pool.lookup(b"k") == block
    assert states(pool) == (0, 1, 0)


def test_free_blocks_are_taken_before_cached_ones() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(2)
    pool.release(first, b"a")
    assert pool.allocate(1) != [first]
    assert pool.lookup(b"a") == first
    pool.release(second)
    pool.allocate(2)
    assert pool.lookup(b"a") is None


def test_the_block_released_longest_ago_is_evicted_first() -> None:
    pool = BlockPool(3)
    a, b, c = pool.allocate(3)
    for block, key in ((b, b"b"), (c, b"c"), (a, b"a")):
        pool.release(block, key)
    used_again = pool.lookup(b"b")
    assert used_again == b
    pool.acquire(b)
    pool.release(b)
    assert pool.allocate(2) == [c, a]
    assert pool.lookup(b"b") == b


def test_chains_are_evicted_from_their_leaves() -> None:
    """Two sequences share the blocks 0 and 1; whichever ends first, a parent outlives its children."""
    for order in ((0, 1), (1, 0)):
        pool = BlockPool(6)
        shared = pool.allocate(2)
        tables = [shared + pool.allocate(2), shared + pool.allocate(2)]
        for block in shared:
            pool.publish(block, bytes([block]))
            pool.acquire(block)
        for which in order:
            for index in reversed(range(4)):
                pool.release(tables[which][index], bytes([tables[which][index]]))
        parents = {block: table[:at] for table in tables for at, block in enumerate(table)}
        gone: set[int] = set()
        for _ in range(6):
            (block,) = pool.allocate(1)
            gone.add(block)
            assert not gone & set(parents[block]) or block in shared
        assert len(gone) == 6


def test_equal_content_is_published_once_and_the_twin_counts_as_used() -> None:
    pool = BlockPool(3)
    a, b, c = pool.allocate(3)
    pool.release(a, b"same")
    pool.release(b, b"other")
    pool.publish(c, b"same")
    assert pool.lookup(b"same") == a
    pool.release(c, b"same")
    assert states(pool) == (1, 2, 0)
    pool.allocate(1)
    assert pool.allocate(1) == [b], "the twin was used later than the other block"
    pool.check_integrity([[b], [c]])


def test_a_twin_takes_over_when_the_first_block_was_evicted() -> None:
    pool = BlockPool(2)
    a, b = pool.allocate(2)
    pool.release(a, b"same")
    assert pool.allocate(1) == [a]
    pool.release(b, b"same")
    assert pool.lookup(b"same") == b


def test_forgotten_content_is_not_found_any_more() -> None:
    pool = BlockPool(2)
    a, b = pool.allocate(2)
    pool.publish(a, b"k")
    pool.forget(b"k")
    pool.forget(b"unknown")
    assert pool.lookup(b"k") is None
    pool.release(a)
    assert states(pool) == (1, 0, 1)
    pool.release(b, b"cached")
    pool.forget(b"cached")
    assert states(pool) == (2, 0, 0)


def test_more_than_available_is_our_own_mistake() -> None:
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="3 blocks wanted, 2 available"):
        pool.allocate(3)
    (block,) = pool.allocate(1)
    pool.release(block)
    with pytest.raises(AssertionError, match="not referenced"):
        pool.release(block)


def test_integrity_is_against_the_tables() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.check_integrity([[block]])
    with pytest.raises(AssertionError, match="references differ"):
        pool.check_integrity([])
