"""Filters and penalties agree with their definitions, row by row."""

import pytest
import torch

from shoal.kernels.logit_filters import filter_logits_, filter_reference
from shoal.kernels.penalties import apply_penalties_
from shoal.kernels.token_logprobs import best_tokens, token_logprobs


@pytest.mark.parametrize("vocab", [1, 2, 17, 257, 1500])
@pytest.mark.parametrize("seed", range(4))
def test_filters_equal_the_reference(vocab: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(12, vocab, generator=generator) * 3).round(decimals=1)  # rounding makes ties
    top_k = torch.randint(-1, vocab + 3, (12,), generator=generator)
    top_p = torch.where(
        torch.rand(12, generator=generator) < 0.5, 1.0, torch.rand(12, generator=generator) * 0.98 + 0.01
    )
    min_p = torch.where(torch.rand(12, generator=generator) < 0.5, 0.0, torch.rand(12, generator=generator))
    found = filter_logits_(logits.clone(), top_k, top_p, min_p)
    for row in range(12):
        expected = filter_reference(logits[row], int(top_k[row]), float(top_p[row]), float(min_p[row]))
        assert torch.equal(found[row], expected)
        assert found[row].isfinite().any()


def test_filters_of_an_empty_batch_do_nothing() -> None:
    empty = torch.empty(0, 5)
    assert filter_logits_(empty, torch.empty(0).long(), torch.empty(0), torch.empty(0)).shape == (0, 5)


def test_penalties_equal_their_formula_per_token() -> None:
    logits = torch.tensor([[1.0, -1.0, 2.0, 0.5], [1.0, -1.0, 2.0, 0.5]])
    seen = torch.tensor([[True, True, False, False], [False] * 4])
    counts = torch.tensor([[0, 0, 3, 0], [0, 2, 0, 0]], dtype=torch.int32)
    found = apply_penalties_(
        logits, seen, counts, torch.tensor([0.5, 0.0]), torch.tensor([0.1, 0.2]), torch.tensor([2.0, 1.0])
    )
    expected = torch.tensor([[0.5, -2.0, 1.0 - 0.3 - 0.5, 0.5], [1.0, -1.4, 2.0, 0.5]])
    assert torch.allclose(found, expected)


def test_logprobs_are_of_the_softmax_with_the_rank_of_the_chosen() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0]])
    ids, logprobs, rank = token_logprobs(logits, torch.tensor([2]), 3)
    assert ids.tolist() == [[2, 1, 3, 2]]
    assert torch.allclose(logprobs, logits.log_softmax(-1)[:, ids[0]])
    assert rank.tolist() == [3]
    assert token_logprobs(logits, torch.tensor([0]), 0)[0].tolist() == [[0]]


def test_best_tokens_orders_equals_by_id() -> None:
    values, ids = best_tokens(torch.tensor([[5.0, 7.0, 5.0, 7.0, 7.0]]), 4)
    assert ids.tolist() == [[1, 3, 4, 0]] or ids.tolist() == [[1, 3, 4, 2]]
    assert values.tolist() == [[7.0, 7.0, 7.0, 5.0]]
