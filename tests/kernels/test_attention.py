"""Paged attention on both CPU paths: against the reference, and one result whatever the batch, chunk and blocks."""

import itertools
from typing import Any

import pytest
import torch

from shoal.kernels.attention import paged_attention, paged_attention_reference

pytestmark = pytest.mark.usefixtures("path")


def paged(
    rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], block_size: int, seed: int, window: int | None = None
) -> tuple[torch.Tensor, ...]:
    """Arguments for rows of (queries, keys, values): shuffled blocks, NaN and nonsense block numbers around what may
    be read.
    """
    generator = torch.Generator().manual_seed(seed)
    _, num_kv_heads, dim = rows[0][1].shape
    needs = [-(-len(keys) // block_size) for _, keys, _ in rows]
    order = torch.randperm(sum(needs) + 3, generator=generator).tolist()
    caches = [
        torch.full((len(order), block_size, num_kv_heads, dim), float("nan"), dtype=rows[0][0].dtype) for _ in range(2)
    ]
    table = torch.full((len(rows), max(needs) + 1), -1, dtype=torch.int32)
    for row, (queries, keys, values) in enumerate(rows):
        first = 0 if window is None else max(0, len(keys) - len(queries) - window + 1)
        for position in range(first, len(keys)):
            if position == first or position % block_size == 0:
                table[row, position // block_size] = order.pop()
            block = int(table[row, position // block_size])
            caches[0][block, position % block_size] = keys[position]
            caches[1][block, position % block_size] = values[position]
    counts = torch.tensor([0] + [len(queries) for queries, _, _ in rows])
    lengths = torch.tensor([len(keys) for _, keys, _ in rows], dtype=torch.int32)
    queries = torch.cat([queries for queries, _, _ in rows])
    return queries, *caches, table, counts.cumsum(0).to(torch.int32), lengths


def random_rows(
    shapes: list[tuple[int, int]], heads: tuple[int, int], dim: int, dtype: torch.dtype = torch.float32
) -> list[Any]:
    """Rows of (queries, keys) counts."""
    return [
        (torch.randn(q, heads[0], dim).to(dtype), *(torch.randn(k, heads[1], dim).to(dtype) for _ in range(2)))
        for q, k in shapes
    ]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"window": 5},
    {"window": 64},
    {"softcap": 2.0},
    {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0, 1.0, -2.0])},
    {"window": 9, "softcap": 1.5, "sinks": torch.tensor([0.5, -1.0, 3.0, 0.0, 1.0, -2.0])},
    {"q_to_kv": torch.tensor([0, 0, 0, 0, 1, 1], dtype=torch.int32)},
    {"deterministic": True, "window": 7, "sinks": torch.tensor([0.5, -1.0, 3.0, 0.0, 1.0, -2.0])},
    {"deterministic": True, "softcap": 2.0},
]


@pytest.mark.parametrize("variant", range(len(VARIANTS)))
@pytest.mark.parametrize(("block_size", "dim"), [(1, 16), (5, 12), (16, 80), (256, 64)])
def test_matches_the_reference_on_mixed_rows(variant: int, block_size: int, dim: int) -> None:
    options = dict(VARIANTS[variant])
    rows = random_rows([(1, 1), (3, 3), (1, 70), (0, 4), (9, 20), (1, 131), (66, 66), (2, 65)], (6, 2), dim)
    arguments = paged(rows, block_size, 3, options.get("window"))
    actual = paged_attention(*arguments, scale=dim**-0.5, **options)
    options.pop("deterministic", None)
    expected = paged_attention_reference(*arguments, scale=dim**-0.5, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_caches_are_summed_in_float32(dtype: torch.dtype) -> None:
    arguments = paged(random_rows([(1, 90), (5, 33), (3, 3)], (4, 1), 40, dtype), 8, 5)
    actual = paged_attention(*arguments, scale=0.2)
    assert actual.dtype == dtype
    expected = paged_attention_reference(*arguments, scale=0.2)
    torch.testing.assert_close(actual.float(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-3)


def test_queries_may_be_a_slice_and_out_is_filled() -> None:
    queries, *rest = paged(random_rows([(4, 9), (1, 30)], (3, 3), 24), 4, 6)
    wide = torch.randn(5, 200)
    wide[:, 30 : 30 + 72] = queries.flatten(1)
    out = torch.empty_like(queries)
    assert paged_attention(wide[:, 30:102].view(5, 3, 24), *rest, scale=0.3, out=out) is out
    torch.testing.assert_close(out, paged_attention_reference(queries, *rest, scale=0.3), rtol=1e-5, atol=2e-6)


def test_an_empty_batch_gives_nothing() -> None:
    cache, none = torch.empty(2, 4, 1, 8), torch.empty(0, dtype=torch.int32)
    arguments = torch.empty(0, 2, 8), cache, cache, none.view(0, 1), torch.zeros(1, dtype=torch.int32), none
    assert paged_attention(*arguments, scale=1.0).shape == (0, 2, 8)


@pytest.mark.parametrize("options", [{}, {"window": 37}, {"softcap": 3.0}], ids=["full", "window", "softcap"])
@pytest.mark.parametrize(("heads", "dim"), [((4, 2), 64), ((7, 1), 12), ((3, 3), 80)])
def test_bits_do_not_depend_on_chunk_neighbours_or_blocks(
    options: dict[str, Any], heads: tuple[int, int], dim: int
) -> None:
    length = 150
    [(queries, keys, values)] = random_rows([(length, length)], heads, dim)
    keywords = {"scale": dim**-0.5, "deterministic": True, **options}
    window = options.get("window")
    whole = paged_attention(*paged([(queries, keys, values)], 16, 0, window), **keywords)
    for block_size, cuts in [(7, [0, 1, 2, 64, 100, 101, 150]), (32, [0, 33, 97, 150])]:
        for first, stop in itertools.pairwise(cuts):
            row = (queries[first:stop], keys[:stop], values[:stop])
            crowd = [*random_rows([(1, 200), (5, 12)], heads, dim), row, *random_rows([(1, 3)], heads, dim)]
            alone = paged_attention(*paged([row], block_size, 2, window), **keywords)
            among = paged_attention(*paged(crowd, block_size, 4, window), **keywords)[6 : 6 + stop - first]
            assert torch.equal(alone, whole[first:stop]) and torch.equal(among, whole[first:stop])


def test_a_later_overflow_does_not_reach_earlier_queries() -> None:
    [(queries, keys, values)] = random_rows([(40, 40)], (2, 1), 16)
    clean = paged_attention(*paged([(queries, keys, values)], 8, 0), scale=0.25, deterministic=True)
    broken = values.clone()
    broken[30] = float("inf")
    mixed = paged_attention(*paged([(queries, keys, broken)], 8, 0), scale=0.25, deterministic=True)
    assert torch.equal(mixed[:30], clean[:30])


def test_bits_do_not_depend_on_threads() -> None:
    arguments = paged(random_rows([(1, 300), (40, 90), (1, 17), (64, 64)], (8, 2), 32), 16, 0)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(paged_attention(*arguments, scale=0.2, deterministic=True))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
