"""Triton attention against the reference: on a GPU where there is one, else through Triton's interpreter (float32 and
float16: its bfloat16 truncates).
"""

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")

from shoal.kernels.attention import paged_attention_reference
from shoal.kernels.gpu import attention
from shoal.kernels.gpu.attention import launch_attention
from tests.kernels.test_attention import paged, random_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SINKS = torch.tensor([0.5, -1.0, 3.0, 0.0, 1.0, -2.0])
UNEVEN = torch.tensor([0, 0, 0, 0, 1, 1], dtype=torch.int32)
ROWS = [(1, 1), (3, 3), (0, 4), (9, 40), (1, 131), (2, 65)]


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixed inputs; scratch that a kernel leaves unwritten is NaN."""
    torch.manual_seed(3)
    real = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = real(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)


def run(arguments: tuple[torch.Tensor, ...], **options: Any) -> torch.Tensor:
    """The kernel's output, on the CPU."""
    q, *rest = (tensor.to(DEVICE) for tensor in arguments)
    moved = {name: value.to(DEVICE) if torch.is_tensor(value) else value for name, value in options.items()}
    out = torch.full(q.shape, float("nan"), dtype=q.dtype, device=DEVICE)
    assert launch_attention(q, *rest, out=out, **moved) is out
    return out.cpu()


@pytest.mark.parametrize(
    ("block_size", "dim", "options"),
    [
        (1, 8, {}),
        (5, 12, {"window": 5, "softcap": 1.5, "sinks": SINKS}),
        (16, 80, {"q_to_kv": UNEVEN, "group_size": 4, "sinks": SINKS}),
        (64, 64, {"window": 64}),
        (256, 112, {"softcap": 2.0}),
        (16, 16, {"deterministic": True, "window": 7, "sinks": SINKS}),
        (128, 96, {"deterministic": True, "softcap": 2.0, "q_to_kv": UNEVEN}),
    ],
)
def test_matches_the_reference_on_mixed_rows(block_size: int, dim: int, options: dict[str, Any]) -> None:
    arguments = paged(random_rows(ROWS, (6, 2), dim), block_size, 3, options.get("window"))
    actual = run(arguments, scale=dim**-0.5, **options)
    expected = {name: value for name, value in options.items() if name not in ("deterministic", "group_size")}
    torch.testing.assert_close(
        actual, paged_attention_reference(*arguments, scale=dim**-0.5, **expected), rtol=1e-5, atol=2e-6
    )


def test_float16_is_summed_in_float32_and_rounded_once() -> None:
    arguments = paged(random_rows(ROWS, (6, 2), 40, torch.float16), 8, 5)
    expected = paged_attention_reference(*arguments, scale=0.2)
    torch.testing.assert_close(run(arguments, scale=0.2).float(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("heads", [(4, 4), (5, 1), (40, 2)], ids=["plain", "one_kv_head", "more_heads_than_a_tile"])
def test_any_number_of_query_heads_per_kv_head_is_packed(heads: tuple[int, int]) -> None:
    arguments = paged(random_rows([(1, 30), (12, 20), (3, 3)], heads, 16), 4, 7)
    expected = paged_attention_reference(*arguments, scale=0.3)
    torch.testing.assert_close(run(arguments, scale=0.3), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("per_head", [False, True], ids=["per_tensor", "per_head"])
def test_an_fp8_cache_is_read_with_its_scales(per_head: bool) -> None:
    q, keys, values, *tables = paged(random_rows([(1, 50), (10, 20)], (6, 2), 24, torch.float16), 8, 6)
    caches = [tensor.nan_to_num().to(torch.float8_e4m3fn) for tensor in (keys, values)]
    scales = tuple(torch.rand(2 if per_head else 1) + 0.5 for _ in range(2))
    for uneven in (None, UNEVEN):
        options: dict[str, Any] = {"kv_scales": scales, "q_to_kv": uneven, "scale": 0.2}
        arguments = (q, *caches, *tables)
        out = torch.full(q.shape, float("nan"), dtype=q.dtype, device=DEVICE)
        moved = [tensor.to(DEVICE) for tensor in arguments]
        options_there = {
            **options,
            "kv_scales": tuple(scale.to(DEVICE) for scale in scales),
            "q_to_kv": None if uneven is None else uneven.to(DEVICE),
        }
        launch_attention(*moved, out=out, **options_there)
        expected = paged_attention_reference(*arguments, **options)
        torch.testing.assert_close(out.cpu().float(), expected, rtol=3e-3, atol=3e-3)


def test_every_byte_of_an_fp8_cache_is_read_as_torch_reads_it() -> None:
    """Rows of one key, whose value is the output: all finite e4m3 numbers."""
    numbers = torch.tensor([number for number in range(256) if number % 128 != 127], dtype=torch.uint8)
    values = numbers.view(torch.float8_e4m3fn).view(2, 1, 1, 127)
    arguments = (
        torch.zeros(2, 1, 127), torch.zeros(2, 1, 1, 127).to(torch.float8_e4m3fn), values,
        torch.arange(2, dtype=torch.int32)[:, None], torch.arange(3, dtype=torch.int32),
        torch.ones(2, dtype=torch.int32),
    )  # fmt: skip
    out, one = torch.full((2, 1, 127), float("nan"), device=DEVICE), torch.ones(1, device=DEVICE)
    launch_attention(*(tensor.to(DEVICE) for tensor in arguments), scale=1.0, out=out, kv_scales=(one, one))
    assert torch.equal(out.cpu(), values.float()[:, 0])


def test_queries_may_be_a_slice_of_the_fused_projection() -> None:
    queries, *rest = paged(random_rows([(4, 9), (1, 30)], (3, 3), 24), 4, 6)
    wide = torch.randn(5, 200)
    wide[:, 30 : 30 + 72] = queries.flatten(1)
    out = torch.full(queries.shape, float("nan"), device=DEVICE)
    launch_attention(wide.to(DEVICE)[:, 30:102].view(5, 3, 24), *(t.to(DEVICE) for t in rest), scale=0.3, out=out)
    expected = paged_attention_reference(queries, *rest, scale=0.3)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=2e-6)


def test_an_empty_batch_launches_nothing() -> None:
    cache, none = torch.empty(2, 4, 1, 8), torch.empty(0, dtype=torch.int32)
    arguments = torch.empty(0, 2, 8), cache, cache, none.view(0, 1), torch.zeros(1, dtype=torch.int32), none
    assert run(arguments, scale=1.0).shape == (0, 2, 8)


@pytest.mark.parametrize("options", [{}, {"window": 60}], ids=["full", "window"])
def test_decode_gives_the_same_however_its_keys_are_split(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = paged(random_rows([(1, 140), (1, 3)], (4, 2), 16), 16, 2, options.get("window"))
    expected = paged_attention_reference(*arguments, scale=0.25, **options)
    for least, bound in ((32, {}), (64, {"max_seqlen_q": 1, "max_seqlen_k": 140}), (1024, {})):
        monkeypatch.setattr(attention, "MIN_SPLIT_KEYS", least)
        actual = run(arguments, scale=0.25, **options, **bound)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shared", [48, 100])
def test_a_shared_prefix_read_once_gives_what_each_row_reading_it_does(
    shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "MIN_SPLIT_KEYS", 64)
    rows = random_rows([(1, 120), (2, 150), (1, 101)], (6, 2), 16)
    arguments = paged(rows, 4, 2)
    _, k_cache, v_cache, table, _, _ = arguments
    table[1:, : shared // 4] = table[0, : shared // 4]
    expected = paged_attention_reference(*arguments, scale=0.25, sinks=SINKS)
    owned = paged(rows, 4, 2)[3][1:, : shared // 4]
    k_cache[owned.flatten().long()] = v_cache[owned.flatten().long()] = float("nan")  # nobody reads them any more
    actual = run(arguments, scale=0.25, sinks=SINKS, shared_keys=shared, max_seqlen_q=2)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.usefixtures("dots_in_one_order")
@pytest.mark.parametrize("options", [{}, {"window": 20}, {"softcap": 3.0, "sinks": SINKS[:4]}])
def test_bits_do_not_depend_on_chunk_neighbours_blocks_or_splits(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SEGMENT_KEYS", 32)
    length, heads, dim = 71, (4, 1), 16
    [(queries, keys, values)] = random_rows([(length, length)], heads, dim)
    keywords = {"scale": dim**-0.5, "deterministic": True, **options}
    window = options.get("window")
    whole = run(paged([(queries, keys, values)], 16, 0, window), **keywords)
    splits: list[int] = []
    launch = attention._Call.launch

    def spying(call: Any, plan: Any, *rest: Any) -> None:
        splits.append(plan.splits)
        launch(call, plan, *rest)

    monkeypatch.setattr(attention._Call, "launch", spying)
    for block_size, cuts in [(7, [70, 71]), (64, [0, 33, 36, 70, 71])]:
        for first, stop in itertools.pairwise(cuts):
            row = (queries[first:stop], keys[:stop], values[:stop])
            crowd = [*random_rows([(1, 100), (5, 12)], heads, dim), row]
            alone = run(paged([row], block_size, 2, window), **keywords)
            among = run(paged(crowd, block_size, 4, window), **keywords)[6 : 6 + stop - first]
            assert torch.equal(alone, whole[first:stop]) and torch.equal(among, whole[first:stop])
    assert 1 in splits and max(splits) > 1
