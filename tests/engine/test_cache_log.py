"""What a router is told of a prefix cache is what the cache holds, whatever happens to it."""

import random

from shoal.engine import cache_log
from shoal.engine.cache_log import KEY_BYTES, CacheChanges, CacheLog, split_keys
from tests.engine.harness import make_capacity, make_core, make_request


def follow(held: set[bytes], changes: CacheChanges | None) -> set[bytes]:
    """What somebody knows who was told."""
    if changes is None:
        return held
    held = set() if changes.anew else held
    return held.union(split_keys(changes.stored)).difference(split_keys(changes.removed))


def test_what_comes_and_goes_between_two_looks_is_not_told() -> None:
    log = CacheLog()
    log.stored(b"a" * 32)
    log.stored(b"b" * 32)
    log.removed(b"a" * 32)
    changes = log.take([])
    assert changes == CacheChanges(stored=b"b" * KEY_BYTES)
    log.removed(b"b" * 32)
    log.stored(b"b" * 32)
    assert log.take([]) is None


def test_after_too_many_changes_all_is_told_anew() -> None:
    log = CacheLog()
    for number in range(cache_log.MAX_CHANGES + 2):
        log.stored(number.to_bytes(32, "little"))
    assert log.take([b"x" * 32]) == CacheChanges(stored=b"x" * KEY_BYTES, anew=True)
    assert log.take([]) is None


def test_following_an_engine_gives_its_cache_after_every_step() -> None:
    choose = random.Random(4)
    for windows in ((None,), (8, None)):
        core = make_core(make_capacity(num_blocks=24, windows=windows))
        core.tell_cache()
        pool = core.scheduler.tables.pools[windows.index(None)]
        held: set[bytes] = set()
        for number in range(120):
            shared = [7] * choose.choice((0, 8, 16))
            prompt = shared + [choose.randrange(40) for _ in range(choose.randint(1, 12))]
            core.add(make_request(f"r{number}", prompt, choose.randint(1, 10)))
            for _ in range(choose.randint(0, 6)):
                core.step()
                held = follow(held, core.cache_changes())
                assert held == {key[:KEY_BYTES] for key in pool.keys}
        assert held


def test_the_next_listener_is_told_all_there_is() -> None:
    core = make_core(make_capacity(num_blocks=24))
    core.tell_cache()
    core.add(make_request("r", [*range(12)], 2))
    while core.has_work:
        core.step()
    core.cache_changes()
    keys = {key[:KEY_BYTES] for key in core.scheduler.tables.pools[0].keys}
    core.tell_cache()
    assert keys and follow(set(), core.cache_changes()) == keys
