"""The sampler honours every field, draws from the exact distribution, and a row never depends on its neighbours."""

import numpy as np
import pytest
import torch

from shoal.configs.sampling import SamplingParams
from shoal.engine.sampler import Sampler
from shoal.engine.sequence_state import SequenceState
from shoal.kernels.logit_filters import filter_reference
from shoal.kernels.philox import gumbel_noise

VOCAB = 11
CPU = torch.device("cpu")


def sequence(
    prompt: list[int], output: list[int], bad: list[list[int]] | None = None, **fields: object
) -> SequenceState:
    params = SamplingParams(**{"temperature": 0.0, "seed": 1, **fields})  # type: ignore[arg-type]
    return SequenceState(
        request_id="r",
        token_ids=prompt + output,
        num_prompt_tokens=len(prompt),
        sampling=params,
        seed=params.seed or 0,
        sample_index=0,
        eos_token_ids=[0],
        bad_words_token_ids=bad or [],
        tables=[np.zeros(0, np.int32)],
        num_blocks=[0],
    )


def pick(logits: list[float] | torch.Tensor, state: SequenceState) -> int:
    rows = torch.as_tensor(logits, dtype=torch.float32).clone().unsqueeze(0)
    return Sampler(rows.shape[1], CPU)(rows, [state])[0][0]


@pytest.mark.usefixtures("path")
def test_greedy_takes_the_best_and_the_lowest_id_among_equals() -> None:
    assert pick([0.0, 3.0, 3.0], sequence([1], [])) == 1


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (sequence([1], [], allowed_token_ids=[2, 3]), 2),
        (sequence([1], [], bad=[[1]]), 2),
        (sequence([1], [4], bad=[[4, 1]]), 2),
        (sequence([1, 4], [], bad=[[4, 1]]), 1),
        (sequence([1], [5], bad=[[4, 1]]), 1),
        (sequence([1], [], logit_bias={3: 100.0}), 3),
        (sequence([1], [], logit_bias={1: -100.0}), 2),
        (sequence([1], [], repetition_penalty=10.0), 2),
        (sequence([2], [1], presence_penalty=1.5), 2),
        (sequence([2], [1, 1], frequency_penalty=0.75), 2),
        (sequence([1], [], presence_penalty=2.0), 1),
    ],
)
def test_edits_change_the_greedy_choice(state: SequenceState, expected: int) -> None:
    assert pick([0.0, 5.0, 4.0, 1.0, 0.0, 0.0], state) == expected


@pytest.mark.usefixtures("path")
def test_min_tokens_masks_end_and_stop_tokens_until_it_is_reached() -> None:
    logits = [9.0, 5.0, 8.0]
    assert pick(logits, sequence([1], [1], min_tokens=2, stop_token_ids=[2])) == 1
    assert pick(logits, sequence([1], [1, 1], min_tokens=2, stop_token_ids=[2])) == 0


@pytest.mark.usefixtures("path")
def test_a_row_does_not_depend_on_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(3)
    states = [
        sequence(
            [1, 2], [3] * i, temperature=0.5 * (i % 3), top_k=i % 4, top_p=0.9, seed=i, frequency_penalty=0.2 * (i % 2)
        )
        for i in range(12)
    ]
    logits = torch.randn(12, VOCAB, generator=generator)
    together = Sampler(VOCAB, CPU)(logits.clone(), states)[0]
    for state in states:
        state.counts = None
    assert together == [pick(logits[i], states[i]) for i in range(12)]


def test_a_large_vocabulary_in_slices_with_few_tokens_kept_changes_no_choice() -> None:
    vocab, generator = 70_000, torch.Generator().manual_seed(4)
    states = [
        sequence([1], [2] * i, temperature=0.8, top_k=(0, 5)[i % 2], top_p=(0.9, 1.0)[i // 2 % 2], seed=i)
        for i in range(20)
    ]
    logits = torch.randn(20, vocab, generator=generator) * 3
    chosen = Sampler(vocab, CPU)(logits.clone(), states)[0]
    for row, state in enumerate(states):
        kept = filter_reference(logits[row] / 0.8, state.sampling.top_k, state.sampling.top_p, 0.0)
        counter = (torch.tensor([state.seed]), torch.tensor([state.num_output_tokens]), torch.tensor([0]))
        assert chosen[row] == int((kept + gumbel_noise(*counter, 0, vocab)[0]).argmax())


def test_logprobs_are_of_the_raw_logits_chosen_first() -> None:
    logits = torch.tensor([[0.0, 5.0, 4.0, 1.0]])
    state = sequence([1], [], logprobs=2, logit_bias={3: 50.0})
    tokens, found = Sampler(4, CPU)(logits.clone(), [state])
    assert tokens == [3]
    assert found[0] is not None
    assert found[0].token_ids == [3, 1, 2]
    assert found[0].ranks == [3, 1, 2]
    assert found[0].logprobs == pytest.approx(logits.log_softmax(-1)[0, [3, 1, 2]].tolist())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"top_k": 6, "top_p": 0.8, "temperature": 1.7},
    ],
)
def test_samples_follow_the_exact_distribution(fields: dict[str, float], request: pytest.FixtureRequest) -> None:
    draws = 200_000 if request.config.getoption("--slow") else 20_000
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(5)) * 2
    params = {"temperature": 1.0, **fields}
    scaled = filter_reference(
        logits / params["temperature"], int(params.get("top_k", 0)), params.get("top_p", 1.0), params.get("min_p", 0.0)
    )
    probs = scaled.softmax(-1).double()
    counts = torch.zeros(VOCAB, dtype=torch.float64)
    sampler, chunk = Sampler(VOCAB, CPU), 500
    for start in range(0, draws, chunk):
        states = [sequence([1], [], **{**params, "seed": seed}) for seed in range(start, start + chunk)]
        tokens = sampler(logits.repeat(chunk, 1), states)[0]
        counts += torch.bincount(torch.tensor(tokens), minlength=VOCAB)
    assert counts[probs == 0].sum() == 0
    kept = probs > 0
    chi_square = ((counts[kept] - draws * probs[kept]) ** 2 / (draws * probs[kept])).sum()
    assert chi_square < 45  # 10 degrees of freedom: p < 3e-6
