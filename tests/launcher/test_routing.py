"""Which replica a request goes to: what it has cached, within a bound on its load."""

import asyncio
import random

import msgspec
import pytest

from shoal.configs.schema import ShoalConfig
from shoal.engine.cache_log import KEY_BYTES
from shoal.engine.executor import CacheGroup, Capacity
from shoal.engine.fake_executor import StepLatency
from shoal.engine.messages import Request
from shoal.engine.prefix_cache import extend_keys, root_key
from shoal.launcher.fleet_simulation import Fleet
from shoal.launcher.prefix_routing import PrefixRouting
from shoal.launcher.processes import Zygote
from shoal.launcher.replicas import make_routing
from shoal.launcher.routing import LeastLoaded, RoundRobin, Routing
from tests.launcher.fake_worker import config
from tests.launcher.harness import collect, request, run
from tests.launcher.test_recovery import controlled


def keys_of(wanted: Request, blocks: int, block_size: int = 4) -> list[bytes]:
    """As a replica tells them."""
    keys: list[bytes] = []
    extend_keys(keys, root_key(wanted.cache_salt), wanted.prompt_token_ids, block_size, blocks)
    return [key[:KEY_BYTES] for key in keys]


def test_policies_by_turn_and_by_load() -> None:
    wanted, loads = request([1]), {0: 30, 1: 10, 2: 10}
    turns = RoundRobin()
    assert [turns.rank(wanted, loads)[0] for _ in range(4)] == [0, 1, 2, 0]
    least = LeastLoaded()
    assert {least.rank(wanted, loads)[0] for _ in range(4)} == {1, 2}
    assert all(least.rank(wanted, loads)[2] == 0 for _ in range(3))


def test_the_longest_cached_prefix_wins_within_the_bound() -> None:
    routing = PrefixRouting(4, load_factor=2.0)
    wanted = request(list(range(20)), 30)
    routing.cache_changed(1, keys_of(wanted, 2), [], anew=False)
    routing.cache_changed(2, keys_of(wanted, 4), [], anew=False)
    assert routing.rank(wanted, {0: 0, 1: 0, 2: 0})[:2] == [2, 1]
    assert routing.hits(wanted, [0, 1, 2]) == {0: 0, 1: 2, 2: 4}
    assert routing.rank(wanted, {0: 100, 1: 100, 2: 250})[0] == 2, "250 + 50 is within 2 x (100 + 50)"
    assert routing.rank(wanted, {0: 100, 1: 100, 2: 251})[0] == 1, "past the bound"
    assert routing.rank(wanted, {0: 0, 1: 51, 2: 51})[0] == 0
    routing.cache_changed(2, [], keys_of(wanted, 1), anew=False)
    assert routing.rank(wanted, {0: 0, 1: 0, 2: 0})[0] == 1, "without its first block the rest is out of reach"
    routing.cache_changed(1, [], [], anew=True)
    routing.forget(2)
    assert routing.num_entries == 0


def test_equal_prefixes_of_other_salts_are_not_shared() -> None:
    routing = PrefixRouting(4, load_factor=9.0)
    plain = request(list(range(20)))
    salted = Request(request_id="s", prompt_token_ids=list(range(20)), sampling=plain.sampling, cache_salt="x")
    routing.cache_changed(1, keys_of(plain, 4), [], anew=False)
    assert routing.hits(salted, [0, 1]) == {0: 0, 1: 0}


def test_prompts_that_are_being_computed_count_until_they_are_done_or_given_back() -> None:
    routing = PrefixRouting(4, load_factor=4.0)
    first, second = request(list(range(20)), 8, "a"), request([*range(20), 5], 8, "b")
    routing.sent(first, 1)
    routing.sent(second, 1)
    assert routing.rank(request([*range(16), 9, 9]), {0: 0, 1: 30})[0] == 1
    routing.arrived(first, 1)
    assert routing.hits(first, [1]) == {1: 4}, "the second still computes it"
    routing.arrived(second, 1)
    assert routing.hits(first, [1]) == {1: 0} and routing.num_entries == 0


def test_a_factor_below_one_is_refused_and_settings_choose() -> None:
    with pytest.raises(ValueError, match="load_factor"):
        PrefixRouting(4, 0.5)
    assert isinstance(make_routing(config()), PrefixRouting)


def test_a_fleet_in_virtual_time_finds_more_prefixes_by_prefix_and_is_the_same_every_time() -> None:
    capacity = Capacity(
        block_size=4, groups=[CacheGroup(name="full", window=None, num_blocks=60)], max_model_len=200, vocab_size=100
    )
    choose = random.Random(1)
    arrivals = []
    for number in range(120):
        asked = request([*[choose.randrange(8)] * 60, *range(choose.randint(1, 9))], 6, f"r{number}")
        arrivals.append(msgspec.structs.replace(asked, arrival=number * 0.02))

    def fleet(routing: Routing) -> Fleet:
        made = Fleet(4, ShoalConfig(), capacity, StepLatency(base_s=0.005, token_s=0.0005), routing)
        made.run(arrivals)
        return made

    prefix, again, turns = fleet(PrefixRouting(4, 2.0)), fleet(PrefixRouting(4, 2.0)), fleet(RoundRobin())
    assert prefix.requests == again.requests and len(prefix.requests) == 120
    hits = [sum(done.cached_tokens for done in made.requests.values()) for made in (prefix, turns)]
    assert hits[0] > hits[1]
    assert all(done.ttft_s > 0 for done in prefix.requests.values())


def test_replicas_tell_what_they_hold_and_prefixes_find_it(zygote: Zygote) -> None:
    async def body() -> None:
        async with controlled(zygote, config(1, data=2)) as controller:
            prompts = [[number] * 64 for number in range(5)]  # an odd number: taking turns would not do
            homes: dict[int, int] = {}
            for turn in range(3):
                for number, prompt in enumerate(prompts):
                    asked = request([*prompt, turn], 4, f"r{number}-{turn}")
                    stream = controller.submit(asked)
                    first = await anext(stream)
                    ((_, replica, _),) = controller.progress()
                    assert homes.setdefault(number, replica) == replica
                    assert first.num_cached_tokens == (64 if turn else 0)
                    async for _ in stream:
                        pass
            assert set(homes.values()) == {0, 1}

    run(body())


def test_many_requests_with_one_new_prefix_come_together(zygote: Zygote) -> None:
    async def body() -> None:
        async with controlled(zygote, config(1, data=2)) as controller:
            asked = [request([*range(90), 99, number], 2, f"r{number}") for number in range(4)]
            await asyncio.gather(*(collect(controller.submit(each)) for each in asked))
            stats = await controller.stats()
            assert sum(replica.cache_hit_tokens for replica in stats) >= 2 * 80

    run(body())
