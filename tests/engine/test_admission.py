"""Admission: the projected peak of the running set, and requests that can never run."""

import pytest

from shoal.engine.admission import Admission, check_fits_alone
from shoal.engine.block_tables import BlockTables
from shoal.engine.sequence import Sequence
from tests.engine.harness import make_capacity, make_request


def make_tables(num_blocks: int, windows: tuple[int | None, ...] = (None,), block_size: int = 4) -> BlockTables:
    capacity = make_capacity(block_size=block_size, num_blocks=num_blocks, windows=windows)
    return BlockTables(capacity, enable_prefix_caching=True)


def make_seq(prompt: list[int], max_tokens: int, number: int = 0) -> Sequence:
    request = make_request(f"r{number}", prompt, max_tokens)
    return Sequence(request, request.sampling, 64, number)


def start(tables: BlockTables, seq: Sequence) -> Sequence:
    tables.attach(seq, tables.find_hit(seq))
    tables.append(seq, tables.room(seq, seq.pending))
    seq.num_computed = len(seq.tokens)
    tables.settle(seq)
    return seq


def beside(tables: BlockTables, *running: Sequence) -> Admission:
    admission = Admission(tables)
    for seq in running:
        admission.enter(seq)
    return admission


def test_a_request_larger_than_the_cache_names_numbers_and_fix() -> None:
    check_fits_alone(make_tables(8), 4, 33)
    with pytest.raises(ValueError, match=r"needs 9 blocks of 4 tokens.*the cache has 8: raise cache.num_blocks to 9"):
        check_fits_alone(make_tables(8), 4, 34)


def test_a_window_needs_only_its_own_length() -> None:
    check_fits_alone(make_tables(3, windows=(8,)), 4, 64)
    with pytest.raises(ValueError, match=r"needs 3 blocks .*'window8'.* has 2"):
        check_fits_alone(make_tables(2, windows=(8,)), 4, 64)


def test_the_peak_counts_that_short_outputs_end_first() -> None:
    """A holds 2 blocks at its end, B 5 then; when B ends with 10 blocks, A has gone."""
    a, b = make_seq([1, 2, 3, 4], 4, 0), make_seq([5, 6, 7, 8], 36, 1)
    for num_blocks, fits in ((10, True), (9, False)):
        tables = make_tables(num_blocks)
        start(tables, a)
        assert beside(tables, a).fits([a], b, 0) is fits
        tables.release(a)


def test_a_shared_prefix_is_counted_once() -> None:
    tables = make_tables(9)
    prompt = list(range(16))
    a = start(tables, make_seq([*prompt, 20], 8, 0))
    b = make_seq([*prompt, 30], 8, 1)
    hit = tables.find_hit(b)
    assert hit == 4
    admission = beside(tables, a)
    assert admission.fits([a], b, hit)
    assert not admission.fits([a], b, 0)


def test_the_guess_of_output_lengths_follows_what_ends() -> None:
    tables = make_tables(8)
    admission = Admission(tables)
    seq = make_seq([1], 60)
    assert admission.remaining(seq) == 60
    for _ in range(200):
        admission.observe(10)
    assert admission.remaining(seq) == 10
    seq.tokens += [1] * 30
    assert admission.remaining(seq) == 4, "a block's worth, however long it is already"
    seq.tokens += [1] * 29
    assert admission.remaining(seq) == 1, "but never beyond its end"


def test_window_groups_are_projected_at_their_bound() -> None:
    a, b = make_seq([1, 2, 3, 4], 50, 0), make_seq([5, 6, 7, 8], 50, 1)
    for num_blocks, fits in ((6, True), (5, False)):
        tables = make_tables(num_blocks, windows=(8,))
        start(tables, a)
        assert beside(tables, a).fits([a], b, 0) is fits
        tables.release(a)


def test_what_fits_whatever_it_becomes_is_asked_no_further() -> None:
    a, b = make_seq([1, 2, 3, 4], 12, 0), make_seq([5, 6, 7, 8], 16, 1)  # 4 and 5 blocks at their longest
    tables = make_tables(9)
    start(tables, a)
    admission = beside(tables, a)
    admission.remaining = lambda seq: pytest.fail("looked closer")  # type: ignore[method-assign]
    assert admission.fits([a], b, 0)
    admission.leave(a)
    assert admission.most_blocks == 0
