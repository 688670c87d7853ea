"""Quantised models end to end: the demo's tokens on any layout, with and without C kernels, and from the public API."""

import random
from pathlib import Path
from typing import Any

import pytest

from shoal import LLM, SamplingParams
from shoal.configs.model_path import resolve_model_path
from tests.model.tiny_models import VOCAB, make_model
from tests.parity import check_close, generate_on_ranks, make_requests

WHOLE_GROUPS, CUT_GROUPS = 0.05, 0.3  # nats between the best two tokens that rounding of activations may turn over


def prompts(vocab: int) -> list[list[int]]:
    rng = random.Random(3)
    return [[0, *(rng.randrange(3, vocab) for _ in range(length))] for length in (1, 9, 30)]


def generate(folder: Path, vocab: int, tp_size: int, pp_size: int, kind: str, **more: Any) -> list[dict[str, Any]]:
    requests = make_requests(prompts(vocab), logprobs=4)
    return generate_on_ranks(folder, tp_size, pp_size, requests, model__quantization=kind, **more)


@pytest.mark.parametrize(("kind", "tp_size", "pp_size"), [("int8", 2, 1), ("int4", 3, 1), ("int4", 1, 2)])
def test_the_demo_says_the_same_on_any_layout(kind: str, tp_size: int, pp_size: int) -> None:
    folder = resolve_model_path("demo")
    one = generate(folder, 4096, 1, 1, kind)
    check_close(one, generate(folder, 4096, tp_size, pp_size, kind), 1e-9 if tp_size == 1 else WHOLE_GROUPS)


def test_the_demo_says_the_same_without_c_kernels() -> None:
    folder = resolve_model_path("demo")
    found = [generate(folder, 4096, 1, 1, "int4", runtime__native=native) for native in ("auto", "off")]
    check_close(found[0], found[1], WHOLE_GROUPS)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "olmo2", "qwen2_moe"])
def test_families_say_the_same_on_layouts_that_cut_groups(name: str, tmp_path: Path) -> None:
    folder = make_model(name, tmp_path)
    one = generate(folder, VOCAB, 1, 1, "int8")
    check_close(one, generate(folder, VOCAB, 1, 2, "int8"), 1e-9)
    check_close(one, generate(folder, VOCAB, 3, 1, "int8"), CUT_GROUPS)


def test_bits_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    folder = make_model("mixtral", tmp_path)
    requests = make_requests(prompts(VOCAB), logprobs=2)
    settings: dict[str, Any] = {"model__quantization": "int4", "runtime__deterministic": True}
    together = generate_on_ranks(folder, 1, 1, requests, **settings)
    for request, entry in zip(requests, together, strict=True):
        [alone] = generate_on_ranks(folder, 1, 1, [request], scheduler__max_num_batched_tokens=7, **settings)
        assert alone["tokens"] == entry["tokens"] and alone["logprobs"] == entry["logprobs"]


def test_two_replicas_from_the_public_api() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=8)
    texts: list[list[str]] = []
    for replicas in (1, 2):
        with LLM("demo", quantization="int8", data_parallel_size=replicas) as llm:
            outputs = llm.generate(["def main(", "import os", "The module"], params, use_tqdm=False)
            texts.append([output.outputs[0].text for output in outputs])
    assert texts[0] == texts[1]
