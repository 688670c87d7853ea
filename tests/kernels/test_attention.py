"""Paged attention on both CPU paths and in variants for other processors: against the reference, and one result
whatever the batch, chunk, blocks and what is shared.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from shoal.kernels.attention import paged_attention, paged_attention_reference
from shoal.kernels.build import NativeLibrary, load_native
from tests.kernels.variants import VARIANTS as PROCESSORS
from tests.kernels.variants import compile_variant

pytestmark = pytest.mark.usefixtures("path")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Compiles a variant the first time it is asked for."""

    @functools.cache
    def find(name: str) -> NativeLibrary:
        return compile_variant(name, ("attention.c",), tmp_path_factory.mktemp(name))

    return find


@pytest.fixture(params=["native", "torch", *PROCESSORS])
def path(request: pytest.FixtureRequest, compiled: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run the test with the C kernels, with torch alone, and with the C kernels of other processors."""
    if load_native("off" if request.param == "torch" else "auto") is None and request.param != "torch":
        pytest.skip("no C compiler here")
    if request.param in PROCESSORS:
        library = compiled(request.param)
        monkeypatch.setattr("shoal.kernels.attention.native_library", lambda: library)
    yield request.param
    load_native("auto")


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


def plain_attention(arguments: tuple[torch.Tensor, ...], scale: float, window: int | None) -> torch.Tensor:
    """Torch's products and softmax row by row in the dtype of the queries."""
    queries, k_cache, v_cache, table, starts, lengths = arguments
    out = torch.empty_like(queries)
    for row, length in enumerate(lengths.tolist()):
        start, stop = int(starts[row]), int(starts[row + 1])
        distance = torch.arange(length - stop + start, length)[:, None] - torch.arange(length)
        seen = (distance >= 0) & (distance < (window or length))
        slots = [(int(table[row, j // k_cache.shape[1]]), j % k_cache.shape[1]) for j in range(length)]
        keys, values = (
            torch.stack([cache[block, offset] for block, offset in slots]).nan_to_num() for cache in (k_cache, v_cache)
        )
        for head in range(queries.shape[1]):
            kv = head * keys.shape[1] // queries.shape[1]
            scores = (queries[start:stop, head] @ keys[:, kv].T * scale).masked_fill(~seen, float("-inf"))
            out[start:stop, head] = torch.softmax(scores, dim=-1) @ values[:, kv]
    return out


@pytest.mark.parametrize("window", [None, 13], ids=["full", "window"])
@pytest.mark.parametrize("dim", [12, 33, 40, 64, 96, 130])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_at_most_twice_as_much_as_torch(dtype: torch.dtype, dim: int, window: int | None) -> None:
    rows = random_rows([(1, 90), (5, 33), (3, 3), (70, 129)], (4, 2), dim, dtype)
    arguments = paged(rows, 8, 5, window)
    scale = dim**-0.5
    actual = paged_attention(*arguments, scale=scale, window=window)
    assert actual.dtype == dtype
    expected = paged_attention_reference(*arguments, scale=scale, window=window)
    allowed = (plain_attention(arguments, scale, window).float() - expected).square().mean().sqrt()
    assert (actual.float() - expected).square().mean().sqrt() <= 2 * allowed
    torch.testing.assert_close(actual.float(), expected, rtol=2e-2, atol=2e-2)


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("heads", "dim"), [((4, 2), 64), ((7, 1), 12), ((3, 3), 80)])
def test_bits_do_not_depend_on_chunk_neighbours_or_blocks(
    options: dict[str, Any], heads: tuple[int, int], dim: int, dtype: torch.dtype
) -> None:
    length = 150
    [(queries, keys, values)] = random_rows([(length, length)], heads, dim, dtype)
    keywords = {"scale": dim**-0.5, "deterministic": True, **options}
    window = options.get("window")
    whole = paged_attention(*paged([(queries, keys, values)], 16, 0, window), **keywords)
    for block_size, cuts in [(7, [0, 1, 2, 64, 100, 101, 150]), (32, [0, 33, 97, 150])]:
        for first, stop in itertools.pairwise(cuts):
            row = (queries[first:stop], keys[:stop], values[:stop])
            before, after = (random_rows(shapes, heads, dim, dtype) for shapes in ([(1, 200), (5, 12)], [(1, 3)]))
            crowd = [*before, row, *after]
            alone = paged_attention(*paged([row], block_size, 2, window), **keywords)
            among = paged_attention(*paged(crowd, block_size, 4, window), **keywords)[6 : 6 + stop - first]
            assert torch.equal(alone, whole[first:stop]) and torch.equal(among, whole[first:stop])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 64])
@pytest.mark.parametrize("broken", [30, 31])
@pytest.mark.parametrize("block_size", [8, 16])
def test_an_overflow_reaches_only_queries_that_see_it(
    block_size: int, broken: int, dim: int, dtype: torch.dtype
) -> None:
    [(queries, keys, values)] = random_rows([(90, 90)], (2, 1), dim, dtype)
    infinite = values.clone()
    infinite[broken] = float("inf")
    for window, last in ((None, 90), (20, broken + 20)):
        keywords = {"scale": 0.25, "deterministic": True, "window": window}
        clean = paged_attention(*paged([(queries, keys, values)], block_size, 0, window), **keywords)
        mixed = paged_attention(*paged([(queries, keys, infinite)], block_size, 0, window), **keywords)
        assert torch.equal(mixed[:broken], clean[:broken]) and torch.equal(mixed[last:], clean[last:])
        assert not mixed[broken:last].isfinite().any()


def test_bits_do_not_depend_on_threads() -> None:
    arguments = paged(random_rows([(1, 300), (40, 90), (1, 17), (64, 64)], (8, 2), 32), 16, 0)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(paged_attention(*arguments, scale=0.2, deterministic=True))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def share(arguments: tuple[torch.Tensor, ...], rows: list[int], keys: int) -> tuple[torch.Tensor, ...]:
    """The same with the blocks of the first `keys` keys of the first row in the tables of all rows given."""
    table = arguments[3].clone()
    table[rows, : keys // arguments[1].shape[1]] = table[rows[0], : keys // arguments[1].shape[1]]
    return *arguments[:3], table, *arguments[4:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("block_size", "options"),
    [(5, {}), (16, {"window": 150}), (16, {"window": 400}), (48, {"softcap": 3.0}), (256, {"sinks": True})],
    ids=str,
)
@pytest.mark.parametrize(("heads", "dim"), [((8, 2), 64), ((3, 3), 20)])
def test_bits_do_not_depend_on_what_rows_share(
    heads: tuple[int, int], dim: int, block_size: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Rows 2 to 11 begin alike; longer and shorter rows, prompts and strangers between and beside them."""
    shapes = [
        (1, 100),
        (3, 300),
        *((1, length) for length in (256, 257, 320, 300, 256, 511, 258, 384)),
        (4, 260),
        (1, 290),
    ]
    common, window = 256, options.get("window")
    rows = random_rows(shapes, heads, dim, dtype)
    for _, keys, values in rows[2:]:
        keys[:common], values[:common] = rows[2][1][:common], rows[2][2][:common]
    keywords = {"scale": dim**-0.5, "deterministic": True, **options}
    if "sinks" in options:
        keywords["sinks"] = torch.randn(heads[0])
    apart = paged(rows, block_size, 7, window)
    expected = paged_attention(*apart, **keywords)
    members = list(range(2, len(rows)))
    for shared, some in ((256, members), (128, members), (70, members[3:]), (256, [2, 3, 5, 7, 8])):
        together = share(apart, some, shared)
        assert torch.equal(paged_attention(*together, **keywords), expected)
    queries, *caches, table, _, lengths = paged(rows[5:6], block_size, 9, window)  # several items of rows
    crowd = queries.expand(40, -1, -1), *caches, table.expand(40, -1).contiguous(), torch.arange(41).int()
    assert torch.equal(
        paged_attention(*crowd, lengths.expand(40).contiguous(), **keywords), expected[7:8].expand(40, -1, -1)
    )
