"""BlockTables: hits, growth, windows, what is on its way, and content that is not to be trusted."""

from shoal.engine.block_tables import BlockTables
from shoal.engine.sequence import Sequence
from tests.engine.harness import make_capacity, make_request


def make_tables(num_blocks: int = 16, windows: tuple[int | None, ...] = (None,), caching: bool = True) -> BlockTables:
    return BlockTables(make_capacity(num_blocks=num_blocks, windows=windows), enable_prefix_caching=caching)


def make_seq(prompt: list[int], number: int = 0, **fields: object) -> Sequence:
    request = make_request(f"r{number}", prompt, **fields)  # type: ignore[arg-type]
    return Sequence(request, request.sampling, 64, number)


def advance(tables: BlockTables, seq: Sequence, num_tokens: int) -> list[list[int]]:
    assert tables.room(seq, num_tokens) == num_tokens
    granted = tables.append(seq, num_tokens)
    seq.num_computed += num_tokens
    tables.settle(seq)
    return granted


def compute(tables: BlockTables, seq: Sequence) -> Sequence:
    tables.attach(seq, tables.find_hit(seq))
    advance(tables, seq, seq.pending)
    return seq


def test_a_finished_prompt_and_its_output_are_found_again() -> None:
    tables = make_tables()
    seq = compute(tables, make_seq(list(range(10))))
    seq.tokens += [40, 41, 42]
    advance(tables, seq, 3)
    tables.release(seq)
    assert (tables.pools[0].num_free, tables.pools[0].num_cached) == (13, 3)
    assert tables.find_hit(make_seq([*range(10), 40, 41, 42])) == 3
    assert tables.find_hit(make_seq([*range(10), 40, 41])) == 2, "the last token is always computed"
    assert tables.find_hit(make_seq([*range(10), 40, 41, 42], cache_salt="x")) == 0
    tables.check_integrity([])


def test_a_hit_shares_blocks_with_a_running_sequence() -> None:
    tables = make_tables()
    first = compute(tables, make_seq(list(range(9)), 0))
    second = make_seq([*range(8), 30], 1)
    hit = tables.find_hit(second)
    assert hit == 2 and tables.newly_referenced(second, hit, 0) == 0
    tables.attach(second, hit)
    assert second.tables[0] == first.tables[0][:2] and second.num_computed == 8
    advance(tables, second, 1)
    assert tables.pools[0].num_referenced == 4
    tables.check_integrity([first, second])


def test_content_on_its_way_is_waited_for_until_it_is_published_or_given_up() -> None:
    tables = make_tables()
    first, second = make_seq(list(range(12)), 0), make_seq([*range(12), 5], 1)
    tables.attach(first, tables.find_hit(first))
    assert tables.find_hit(second) == 0 and tables.is_coming(second)
    advance(tables, first, 5)
    assert not tables.is_coming(second)
    assert tables.find_hit(second) == 1 and tables.is_coming(second)
    tables.release(first)
    assert not tables.is_coming(second)


def test_who_must_compute_it_anyway_waits_for_nothing() -> None:
    tables = make_tables()
    first, second = make_seq(list(range(12)), 0), make_seq(list(range(12)), 1, prompt_logprobs=0)
    tables.attach(first, tables.find_hit(first))
    assert tables.find_hit(second) == 0 and not tables.is_coming(second)


def test_windows_give_back_what_fell_out() -> None:
    tables = make_tables(windows=(None, 6))
    seq = compute(tables, make_seq(list(range(18))))
    assert [len(table) for table in seq.tables] == [5, 5]
    seq.tokens += [1]
    advance(tables, seq, 1)
    assert seq.tables[1][:3] == [-1, -1, -1] and -1 not in seq.tables[1][3:]
    assert tables.pools[1].num_referenced == 2 and tables.pools[1].num_cached == 3
    tables.check_integrity([seq])
    tables.release(seq)
    again = make_seq([*range(18), 1], 1)
    tables.attach(again, tables.find_hit(again))
    assert again.tables[1][:2] == [-1, -1] and again.num_computed == 16


def test_a_window_that_lost_its_blocks_limits_the_hit_of_all_groups() -> None:
    tables = make_tables(num_blocks=8, windows=(None, 6))
    tables.release(compute(tables, make_seq(list(range(16)), 0)))
    tables.pools[1].allocate(8)
    assert tables.find_hit(make_seq([*range(16), 1], 1)) == 0


def test_room_is_what_the_scarcest_group_can_hold() -> None:
    tables = make_tables(num_blocks=3)
    first, second = compute(tables, make_seq([1] * 5, 0)), make_seq([2] * 9, 1)
    tables.attach(second, 0)
    assert tables.room(second, 9) == 4
    advance(tables, second, 4)
    assert tables.room(second, 5) == 0
    first.tokens += [7]
    assert tables.room(first, 1) == 1, "its last block is not full"


def test_without_caching_nothing_is_kept_or_found() -> None:
    tables = make_tables(caching=False)
    seq = compute(tables, make_seq(list(range(12))))
    assert not seq.keys
    tables.release(seq)
    assert tables.pools[0].num_free == 16
    assert tables.find_hit(make_seq(list(range(12)))) == 0


def test_untrusted_content_is_forgotten() -> None:
    tables = make_tables()
    seq = compute(tables, make_seq(list(range(12))))
    tables.release(seq, trusted=False)
    assert tables.find_hit(make_seq(list(range(12)))) == 0
    assert tables.pools[0].num_free == 16


def test_untrusted_content_that_fell_out_of_a_window_is_forgotten_too() -> None:
    tables = make_tables(windows=(None, 6))
    seq = compute(tables, make_seq(list(range(18))))
    seq.tokens += [1]
    advance(tables, seq, 1)
    assert tables.pools[1].num_cached == 3
    tables.release(seq, trusted=False)
    assert [pool.num_free for pool in tables.pools] == [16, 16]
    tables.check_integrity([])
