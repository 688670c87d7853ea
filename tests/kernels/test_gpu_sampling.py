"""The Triton sampler against the CPU operations: the same noise, edits, limits, tokens and log-probabilities."""

import pytest
import torch

from shoal.kernels.logit_filters import filter_reference
from shoal.kernels.penalties import apply_penalties_
from shoal.kernels.philox import gumbel_noise
from shoal.kernels.token_logprobs import token_logprobs
from tests.kernels.gpu_support import DEVICE, poisoned_empty, random  # noqa: F401

from shoal.kernels.gpu.logit_limits import SHARD as LIMITS_SHARD, launch_logit_limits  # isort: skip
from shoal.kernels.gpu.logprobs import join_row_sums, launch_row_sums  # isort: skip
from shoal.kernels.gpu.sample_rows import RowPenalties, RowSampling, sample_rows  # isort: skip
from shoal.kernels.gpu.sampling import SHARD, Choices, launch_sample  # isort: skip
from shoal.kernels.gpu.token_refs import launch_token_refs  # isort: skip

pytestmark = pytest.mark.usefixtures("poisoned_empty")
NEAR_TIE = 1e-4  # shared/DESIGN.md: tokens may differ where the two best choices are this close


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def columns() -> tuple[torch.Tensor, ...]:
    seeds = torch.tensor([1, -5, 2**62 + 12345, 7], device=DEVICE)
    positions = torch.tensor([0, 1, 2**20, 3], device=DEVICE)
    return seeds, positions, torch.tensor([0, 3, 0, 1], device=DEVICE)


@pytest.mark.parametrize("vocab_start", [0, 5, 1002])
def test_a_shard_has_the_noise_of_its_place_in_the_vocabulary(vocab_start: int) -> None:
    temperature = torch.tensor([1.0, 0.7, 0.0, 2.0], device=DEVICE)
    for size in (1, 301):
        logits = random(4, size) * 3
        values, tokens = launch_sample(
            logits.clone(), None, None, Choices(temperature, *columns()), vocab_start=vocab_start
        )
        scores = logits / temperature.clamp(min=1e-9).unsqueeze(1)
        noisy = scores + gumbel_noise(*(c.cpu() for c in columns()), vocab_start, vocab_start + size).to(DEVICE)
        expected = torch.where(temperature.unsqueeze(1) > 0, noisy, logits)
        assert torch.equal(tokens - vocab_start, expected.argmax(-1))
        torch.testing.assert_close(values, expected.amax(-1), rtol=1e-6, atol=1e-6)


def test_the_best_of_several_shards_and_the_lowest_of_equals() -> None:
    logits = torch.zeros(4, SHARD + 100, device=DEVICE)
    logits[1, [SHARD + 50, 7]] = 2.0
    logits[2, SHARD + 3] = float("nan")
    logits[3] = float("-inf")
    zeros = torch.zeros(4, device=DEVICE)
    _, tokens = launch_sample(logits, None, None, Choices(zeros, *columns()))
    assert tokens.tolist() == [0, 7, SHARD + 3, 0]
    assert launch_sample(logits[:0], None, None, Choices(zeros[:0], *(c[:0] for c in columns())))[1].shape == (0,)


FILTERS = [(1.0, 0, 0.8, 0.0), (0.5, 10, 1.0, 0.1), (1.0, 20, 0.6, 0.0), (1.0, 0, 0.33, 0.0), (1.3, 0, 0.4, 0.02),
           (1.0, 3, 1e-6, 0.0), (1.0, 400, 1.0, 0.0)]  # fmt: skip


@pytest.mark.parametrize("vocab", [500, 2 * LIMITS_SHARD + 5])
def test_limits_keep_what_the_filters_keep(vocab: int) -> None:
    logits = random(len(FILTERS) + 1, vocab) * 2
    logits[2], logits[3], logits[4] = logits[2].round(), 0.0, (logits[4] * 2).round() / 2
    settings = [*FILTERS, (0.0, 5, 0.5, 0.1)]
    temperature, top_p, min_p = (
        torch.tensor([setting[index] for setting in settings], device=DEVICE) for index in (0, 2, 3)
    )
    top_k = torch.tensor([setting[1] for setting in settings], device=DEVICE)
    limits, last_ids = launch_logit_limits(logits, temperature, top_k, top_p, min_p)
    assert limits[-1] == float("-inf")
    for row, (heat, k, p, m) in enumerate(FILTERS):
        scaled = (logits[row] / heat).cpu()
        kept = (scaled > limits[row].cpu()) | (
            (scaled == limits[row].cpu()) & (torch.arange(vocab) <= last_ids[row].cpu())
        )
        assert torch.equal(kept, filter_reference(scaled, k, p, m) > float("-inf")), FILTERS[row]


def test_rows_are_edited_penalised_filtered_and_sampled_as_on_cpus() -> None:
    vocab, logits, rows = 300, random(6, 300) * 2, []
    before, expected = logits.clone().cpu(), []
    for row, (heat, k, p, m) in enumerate([*FILTERS[:3], (0.0, 0, 1.0, 0.0), (0.9, 0, 1.0, 0.0), (1.5, 0, 1.0, 0.0)]):
        biases = [(row, 3.0), (299, float("-inf"))] if row % 2 else []
        seen, counts = torch.rand(vocab) < 0.3, torch.randint(0, 3, (vocab,), dtype=torch.int32)
        penalties = RowPenalties(seen.to(DEVICE), counts.to(DEVICE), 0.5, 0.1, 1.2) if row % 3 else None
        rows.append(RowSampling(heat, k, p, m, 11 - row, 5 * row, row % 2, biases, penalties))
        x = before[row]
        for token, value in biases:
            x[token] += value
        if penalties is not None:
            one = torch.ones(1)
            apply_penalties_(x[None], seen[None], counts[None], 0.5 * one, 0.1 * one, 1.2 * one)
        if heat > 0:
            x = filter_reference(x / heat, k, p, m)
            x = x + gumbel_noise(*(torch.tensor([n]) for n in (11 - row, 5 * row, row % 2)), 0, vocab)[0]
        expected.append(x)
    tokens = sample_rows(logits, rows)[1].tolist()
    torch.testing.assert_close(logits.cpu(), before, rtol=1e-6, atol=1e-6)
    for token, x in zip(tokens, expected, strict=True):
        best = x.topk(2).values
        assert token == int(x.argmax()) or float(best[0] - best[1]) < NEAR_TIE


def test_log_probabilities_ranks_and_shards_joined() -> None:
    logits, chosen = random(3, 5000) * 4, torch.tensor([17, 4999, 0], device=DEVICE)
    logits[1, 100:4200] = float("-inf")
    picked = logits.gather(1, chosen[:, None]).squeeze(1).contiguous()
    largest, total, above = launch_row_sums(logits, picked)
    logprobs = logits.cpu().double().log_softmax(-1)
    close = {"rtol": 1e-6, "atol": 1e-5}
    torch.testing.assert_close(
        (picked - largest - total.log()).cpu(), logprobs[range(3), chosen.tolist()].float(), **close
    )
    _, _, ranks = token_logprobs(logits.cpu(), chosen.cpu(), 0)
    assert torch.equal((above + 1).cpu(), ranks)
    halves = [launch_row_sums(part, picked) for part in (logits[:, :2048], logits[:, 2048:])]
    joined = join_row_sums(*(torch.stack(parts, 1) for parts in zip(*halves, strict=True)))
    for one, other in zip(joined, (largest, total, above), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [1, 5, 300])
def test_references_become_the_tokens_they_stand_for(count: int) -> None:
    ids, chosen = torch.randint(0, 1000, (count,), device=DEVICE), torch.randint(0, 1000, (7,), device=DEVICE)
    rows = torch.randint(0, 7, (count,), device=DEVICE)
    follows = torch.rand(count, device=DEVICE) < 0.5
    expected = torch.where(follows, chosen[rows], ids)
    given = torch.where(follows, -1 - rows, ids)
    launch_token_refs(given, chosen)
    assert torch.equal(given, expected)
