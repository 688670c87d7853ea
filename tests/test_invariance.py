"""A request's tokens and logprobs do not depend on neighbours, chunking, cache hits, preemption or restart: bit for
bit when deterministic.
"""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.model.tiny_models import VOCAB, make_model
from tests.parity import generate_on_ranks, make_requests

MODELS = ["llama", "gemma2", "qwen3_moe"]
SAMPLING: dict[str, Any] = {
    "temperature": 0.9,
    "top_p": 0.95,
    "seed": 11,
    "logprobs": 2,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.2,
    "max_tokens": 10,
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(request.param, tmp_path_factory.getbasetemp())


def requests(count: int = 6) -> list[dict[str, Any]]:
    rng = random.Random(3)
    return make_requests(
        [[rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 40))] for _ in range(count)], **SAMPLING
    )


def run(
    model: Path, work: list[dict[str, Any]], tp_size: int = 1, pp_size: int = 1, **more: Any
) -> list[dict[str, Any]]:
    found = generate_on_ranks(model, tp_size, pp_size, work, **{"runtime__deterministic": True, **more})
    return [{"tokens": entry["tokens"], "logprobs": entry["logprobs"]} for entry in found]


def test_alone_equals_in_a_crowd(model: Path) -> None:
    work = requests()
    crowd = run(model, work)
    assert [run(model, [request])[0] for request in work[:3]] == crowd[:3]


@pytest.mark.parametrize("budget", [3, 512])
def test_chunking_changes_nothing(model: Path, budget: int) -> None:
    work = requests()
    assert run(model, work, scheduler__max_num_batched_tokens=budget, scheduler__max_num_seqs=3) == run(model, work)


def test_preemption_changes_nothing(model: Path) -> None:
    work = requests()
    squeezed = run(model, work, num_blocks=14, least_preemptions=1, cache__enable_prefix_caching=False)
    assert squeezed == run(model, work)


def test_a_cache_hit_changes_nothing(model: Path) -> None:
    work = [request | {"prompt_token_ids": [5] * 9 + request["prompt_token_ids"]} for request in requests(4)]
    again = [request | {"request_id": request["request_id"] + "-again"} for request in work]
    both = generate_on_ranks(model, 1, 1, work + again, scheduler__max_num_seqs=1, runtime__deterministic=True)
    cold = run(model, work, cache__enable_prefix_caching=False)
    assert all(entry["cached"] > 0 for entry in both[len(work) :])
    assert [{"tokens": entry["tokens"], "logprobs": entry["logprobs"]} for entry in both] == cold + cold


def test_resuming_from_any_prefix_of_the_output_changes_nothing(model: Path) -> None:
    work = requests(2)
    whole = run(model, work)
    resumed = [
        request | {"request_id": f"{index}-{cut}", "emitted_token_ids": entry["tokens"][:cut]}
        for index, (request, entry) in enumerate(zip(work, whole, strict=True))
        for cut in range(1, len(entry["tokens"]))
    ]
    found = run(model, resumed)
    for request, entry in zip(resumed, found, strict=True):
        index, cut = map(int, request["request_id"].split("-"))
        assert entry == {"tokens": whole[index]["tokens"][cut:], "logprobs": whole[index]["logprobs"][cut:]}


def test_bfloat16_repeats_itself_bit_for_bit(model: Path) -> None:
    work = requests(5)
    half = {"model__dtype": "bfloat16"}
    crowd = run(model, work, **half)
    assert run(model, work[:1], **half) == crowd[:1]
    assert run(model, work, scheduler__max_num_batched_tokens=5, scheduler__max_num_seqs=2, **half) == crowd
    assert run(model, work, cache__enable_prefix_caching=False, cache__block_size=7, **half) == crowd


def test_without_the_c_kernels_too(model: Path) -> None:
    work = requests(4)
    plain = {"runtime__native": "off", "backend": "gloo"}
    crowd = run(model, work, **plain)
    assert run(model, work[:1], **plain) == crowd[:1]
    assert run(model, work, scheduler__max_num_batched_tokens=5, **plain) == crowd
    with_kernels = [entry["tokens"] for entry in run(model, work)]
    assert [entry["tokens"] for entry in crowd] == with_kernels
    assert [entry["tokens"] for entry in run(model, work[:2], 2, 1, **plain)] == with_kernels[:2]


def test_a_sharded_replica_repeats_itself_bit_for_bit(model: Path) -> None:
    work = requests(4)
    crowd = run(model, work, 2, 1)
    assert run(model, work[:1], 2, 1) == crowd[:1]
    assert run(model, work, 2, 1, scheduler__max_num_batched_tokens=5) == crowd


def test_sampled_tokens_are_the_same_on_every_layout(model: Path) -> None:
    work = requests()
    single = [entry["tokens"] for entry in run(model, work)]
    for tp_size, pp_size in ((2, 1), (1, 2)):
        assert [entry["tokens"] for entry in run(model, work, tp_size, pp_size)] == single
