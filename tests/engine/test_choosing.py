"""Choosing over shards of the vocabulary: the ranks together choose what one rank chooses, and gather few rows."""

import numpy as np
import pytest
import torch

from shoal.configs.sampling import SamplingParams
from shoal.engine.choosing import TokenChooser, filters
from shoal.engine.messages import TokenLogprobs
from shoal.engine.sampler import Sampler
from shoal.engine.sequence_state import SequenceState
from shoal.engine.shard_logprobs import shard_scores
from shoal.parallel.mesh import make_mesh
from tests.ranks import Ranks, run_ranks

CPU, VOCAB, RANGES = torch.device("cpu"), 103, [(0, 40), (40, 72), (72, 103)]
SETTINGS: list[dict] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.3},
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {"temperature": 2.0, "allowed_token_ids": [3, 39, 40, 71, 72, 102]},
    {"temperature": 0.0, "allowed_token_ids": [73]},
    {"temperature": 1.5, "logit_bias": {5: 4.0, 60: 3.0, 101: -100.0}},
    {"temperature": 1.0, "min_tokens": 9, "stop_token_ids": [45, 100]},
]


def sequences(settings: list[dict], position: int = 3) -> list[SequenceState]:
    """A sequence per setting, with some tokens behind it."""
    return [
        SequenceState(
            request_id=str(row),
            token_ids=[(7 * row + 11 * index) % VOCAB for index in range(4 + position)],
            num_prompt_tokens=4,
            sampling=SamplingParams(**fields),
            seed=100 + row,
            sample_index=row % 2,
            eos_token_ids=[2],
            bad_words_token_ids=[[9]],
            tables=[np.zeros(0, np.int32)],
            num_blocks=[0],
        )
        for row, fields in enumerate(settings)
    ]


class HeadOnly:
    """A stage that is its head: the hidden states are the logits."""

    def __init__(self, logits_RV: torch.Tensor, group: object, ranges: list[tuple[int, int]]) -> None:
        self.logits_RV, self.group, self.device, self.spec, self.gathered = logits_RV, group, CPU, self, 0
        self.shard, self.vocab_size, self.ranges = self, logits_RV.shape[1], ranges

    def vocab_ranges(self, _: int) -> list[tuple[int, int]]:
        return self.ranges

    def vocab(self, _: int) -> tuple[int, int]:
        return self.ranges[self.group.rank]

    def head_shard(self, rows_R: torch.Tensor) -> torch.Tensor:
        return self.logits_RV[rows_R, slice(*self.vocab(0))].clone()

    def shard_logits(self, shard_RV: torch.Tensor) -> torch.Tensor:
        return shard_RV

    def gather_logits(self, shard_RV: torch.Tensor) -> torch.Tensor:
        self.gathered += len(shard_RV)
        return self.group.all_gather(shard_RV, [stop - start for start, stop in self.ranges])


def drawn_logits() -> torch.Tensor:
    logits_RV = torch.randn(len(SETTINGS), VOCAB, generator=torch.Generator().manual_seed(5)) * 2
    logits_RV[0, [30, 50, 90]] = 20.0  # equal in every shard
    return logits_RV


@pytest.mark.usefixtures("path")
def test_the_best_of_the_shards_is_the_best_of_the_whole() -> None:
    logits_RV = drawn_logits()
    values_R, tokens_R = Sampler(VOCAB, CPU).best(logits_RV.clone(), sequences(SETTINGS))
    parts = [Sampler(VOCAB, CPU, held).best(logits_RV[:, slice(*held)].clone(), sequences(SETTINGS)) for held in RANGES]
    values_RS, tokens_RS = (torch.stack(found, 1) for found in zip(*parts, strict=True))
    best_R1 = values_RS.argmax(1, keepdim=True)
    assert torch.equal(tokens_RS.gather(1, best_R1).squeeze(1), tokens_R) and tokens_R[0] == 30
    assert torch.equal(values_RS.gather(1, best_R1).squeeze(1), values_R)


def on_ranks(ranks: Ranks, settings: list[dict], broken: bool, scored: int | None = None) -> tuple[list, int]:
    """What a rank's chooser says of drawn logits, and the rows it gathered. scored: best tokens told of a prompt."""
    logits_RV = drawn_logits()[: len(settings)]
    if broken:
        logits_RV[0, 50], logits_RV[1] = float("nan"), float("-inf")
    mesh = make_mesh("gloo", ranks.rank, ranks.world_size, 1, ranks.rendezvous, 30.0, True)
    try:
        stage = HeadOnly(logits_RV, mesh.tensor, RANGES if ranks.world_size == 3 else [(0, VOCAB)])
        chooser, rows_R = TokenChooser(stage, mesh.tensor), torch.arange(len(settings))  # type: ignore[arg-type]
        if scored is not None:
            found = chooser.scores(rows_R, [(37 * row) % VOCAB for row in range(len(settings))], scored)
            return [(entry.token_ids, entry.logprobs, entry.ranks) for entry in found if entry], stage.gathered
        chosen = chooser(rows_R, sequences(settings))
        return [(one.token, one.finite, plain(one.logprobs)) for one in chosen], stage.gathered
    finally:
        mesh.close()


def plain(entry: TokenLogprobs | None) -> tuple | None:
    return None if entry is None else (entry.token_ids, entry.logprobs, entry.ranks)


def check_scores(ours: tuple | None, theirs: tuple | None) -> None:
    """The same tokens and ranks, log-probabilities but for the order of sums."""
    if ours is None or theirs is None:
        assert ours is theirs
        return
    assert (ours[0], ours[2]) == (theirs[0], theirs[2])
    torch.testing.assert_close(torch.tensor(ours[1]), torch.tensor(theirs[1]), rtol=1e-6, atol=2e-6)


def test_ranks_choose_what_one_rank_chooses_and_gather_only_rows_that_filter() -> None:
    told = [{**fields, "logprobs": count} for fields, count in zip(SETTINGS, [0, 5, 2, 20, 0, 1, 31, 3], strict=True)]
    mixed = [*told[:3], {"temperature": 1.0, "top_k": 5}, {"temperature": 0.0, "logprobs": 40}, SETTINGS[5]]
    for settings, gathered in ((SETTINGS, 0), (told, 0), (mixed, 2)):
        [(one, _)] = run_ranks(1, on_ranks, settings, False)
        many = run_ranks(3, on_ranks, settings, False)
        assert [count for _, count in many] == [gathered] * 3 and many[1][0] == []
        for (token, fine, scores), (other, other_fine, other_scores) in zip(one, many[0][0], strict=True):
            assert token == other and fine and other_fine
            check_scores(scores, other_scores)


@pytest.mark.parametrize(("count", "gathered"), [(0, 0), (7, 0), (35, len(SETTINGS))])
def test_prompts_are_scored_as_on_one_rank(count: int, gathered: int) -> None:
    [(one, _)] = run_ranks(1, on_ranks, SETTINGS, False, count)
    many = run_ranks(3, on_ranks, SETTINGS, False, count)
    assert many[0][1] == gathered and len(one) == len(many[0][0]) == len(SETTINGS)
    for ours, theirs in zip(one, many[0][0], strict=True):
        check_scores(ours, theirs)


@pytest.mark.usefixtures("path")
def test_a_shard_tells_its_sums_ranks_and_best_tokens() -> None:
    logits_RV = drawn_logits()
    held, chosen_R = slice(40, 72), logits_RV[:, 7]
    lse, above, *best = shard_scores(logits_RV[:, held].clone(), chosen_R, 2, 40).unbind(1)
    torch.testing.assert_close(lse, logits_RV[:, held].double().logsumexp(1), rtol=1e-6, atol=1e-6)
    assert torch.equal(above, (logits_RV[:, held] > chosen_R[:, None]).sum(1).double())
    values, columns = logits_RV[:, held].topk(2)
    assert torch.equal(torch.stack(best, 1), torch.cat([values.double(), columns.double() + 40], 1))


def test_rows_that_have_no_finite_logit_to_choose_are_told() -> None:
    [(found, _), *_] = run_ranks(3, on_ranks, SETTINGS[:3], True)
    assert [fine for _, fine, _ in found] == [False, False, True]


def test_only_filters_of_rows_that_are_drawn_need_whole_logits() -> None:
    assert all(filters(SamplingParams(**fields)) for fields in ({"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}))
    assert not any(filters(SamplingParams(**fields)) for fields in [*SETTINGS, {"temperature": 0.0, "top_k": 3}])
