"""The decoder on one rank against transformers: logits, greedy tokens, chunks, neighbours, stages, rope scaling."""

import random
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from shoal.kernels.build import load_native
from shoal.model.checkpoint import Checkpoint, load_parameters
from shoal.model.decoder import Stage
from shoal.model.families import load_spec
from shoal.model.shard import ModelShard
from shoal.model.spec import DecoderSpec
from shoal.parallel.communicator import SingleCommunicator
from tests.model.paged import PagedModel, random_chunks
from tests.model.tiny_models import VOCAB, make_model

CPU = torch.device("cpu")


def make_stages(
    folder: Path, cuts: tuple[int, ...] = (), dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[DecoderSpec, list[Stage]]:
    """The stages of a checkpoint on one tensor rank; cuts: layers at which a new stage begins."""
    spec, family = load_spec(folder)
    bounds, stages = [0, *cuts, len(spec.layers)], []
    with Checkpoint(folder) as checkpoint:
        for pp_rank, (first, last) in enumerate(pairwise(bounds)):
            shard = ModelShard(
                tp_rank=0, tp_size=1, pp_rank=pp_rank, pp_size=len(cuts) + 1, first_layer=first, last_layer=last
            )
            params = load_parameters(checkpoint, family, spec, shard, dtype, CPU)
            stages.append(Stage(spec, shard, params, SingleCommunicator("tensor"), **options))
    return spec, stages


@cache
def oracle(folder: Path) -> transformers.PreTrainedModel:
    """The same checkpoint in transformers."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def oracle_logits(folder: Path, token_ids: list[int]) -> torch.Tensor:
    """transformers' logits of a whole sequence, [len(token_ids), vocab_size]."""
    return oracle(folder)(torch.tensor([token_ids])).logits[0]


def tokens(count: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    return random.Random(seed).choices(range(3, VOCAB), k=count)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny models of this file lie."""
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("name", ["llama", "llama_bias", "llama3", "llama_linear", "llama_yarn"])
def test_logits_equal_transformers_whatever_the_chunks(root: Path, name: str) -> None:
    folder = make_model(name, root)
    spec, stages = make_stages(folder)
    rng, ids = random.Random(3), tokens(90)
    expected = oracle_logits(folder, ids)
    for block_size, chunks in [(4, [90]), (16, [70] + [1] * 20), (1, random_chunks(90, rng, 20))]:
        model = PagedModel(spec, stages, block_size)
        model.add("a", ids)
        torch.testing.assert_close(model.run("a", chunks), expected, rtol=0, atol=1e-4)


def test_greedy_tokens_equal_transformers(root: Path) -> None:
    folder = make_model("llama", root)
    spec, stages = make_stages(folder)
    prompt = tokens(9, 1)
    model = PagedModel(spec, stages, 5)
    model.add("a", prompt)
    expected = oracle(folder).generate(
        torch.tensor([prompt]), max_new_tokens=40, min_new_tokens=40, do_sample=False, eos_token_id=None
    )
    assert model.greedy("a", 40) == expected[0, len(prompt) :].tolist()


def test_every_layer_and_every_head_is_told(root: Path) -> None:
    spec, (stage,) = make_stages(make_model("llama", root))
    told: list[None] = []
    stage.on_layer = lambda: told.append(None)
    model = PagedModel(spec, [stage], 5)
    model.add("a", tokens(9))
    model.run("a", [9])
    assert len(told) == len(spec.layers) + 1


@pytest.fixture
def without_native() -> Iterator[None]:
    """Run the test as on a machine without a C compiler."""
    load_native("off")
    yield
    load_native("auto")


@pytest.mark.usefixtures("without_native")
def test_logits_equal_transformers_without_the_c_kernels(root: Path) -> None:
    folder = make_model("gemma2", root)
    spec, stages = make_stages(folder)
    ids = tokens(60)
    model = PagedModel(spec, stages, 8)
    model.add("a", ids)
    torch.testing.assert_close(model.run("a", [30, 1, 1, 28]), oracle_logits(folder, ids), rtol=0, atol=1e-4)


@pytest.mark.usefixtures("without_native")
def test_deterministic_bits_without_the_c_kernels(root: Path) -> None:
    check_independence(*make_stages(make_model("gemma2", root), deterministic=True), exact=True)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ["llama3", "gemma2", "qwen2_moe"])
def test_logits_do_not_depend_on_neighbours_chunks_or_blocks(root: Path, name: str, deterministic: bool) -> None:
    check_independence(*make_stages(make_model(name, root), deterministic=deterministic), exact=deterministic)


def check_independence(spec: DecoderSpec, stages: list[Stage], exact: bool) -> None:
    """A sequence computed whole and alone, and in random chunks among others: equal, or equal to the bit."""
    ids = tokens(70, 2)
    alone = PagedModel(spec, stages, 16)
    alone.add("a", ids)
    whole = alone.run("a", [70])
    crowd, rng = PagedModel(spec, stages, 3, seed=1), random.Random(5)
    for index, length in enumerate([40, 9, 70, 25, 1]):
        crowd.add(f"n{index}", tokens(length, 10 + index))
    crowd.add("a", ids)
    parts = []
    while any(sequence.num_computed < len(sequence.token_ids) for sequence in crowd.sequences.values()):
        plan = []
        for name, sequence in crowd.sequences.items():
            left = len(sequence.token_ids) - sequence.num_computed
            count = rng.randint(0, min(left, 12))
            if count:
                plan.append((name, count))
        rng.shuffle(plan)
        if plan:
            parts += [logits for name, logits in crowd.step(plan).items() if name == "a"]
    mixed = torch.cat(parts)
    if exact:
        assert torch.equal(mixed, whole)
    torch.testing.assert_close(mixed, whole, rtol=0, atol=2e-5)


def test_stages_together_equal_one(root: Path) -> None:
    folder = make_model("llama3", root)  # tied embeddings: the last stage has a head of its own
    spec, one = make_stages(folder)
    ids = tokens(33)
    whole = PagedModel(spec, one, 8)
    whole.add("a", ids)
    expected = whole.run("a", [20, 13])
    for cuts in [(1,), (3,), (1, 2, 3)]:
        _, stages = make_stages(folder, cuts)
        model = PagedModel(spec, stages, 8)
        model.add("a", ids)
        assert torch.equal(model.run("a", [20, 13]), expected)


def test_dynamic_ntk_equals_transformers_from_within_the_original_length(root: Path) -> None:
    folder = make_model("llama_dynamic", root)  # original length 32
    spec, stages = make_stages(folder)
    prompt = tokens(32, 4)
    model = PagedModel(spec, stages, 8)
    model.add("a", prompt)
    torch.testing.assert_close(model.run("a", [13, 19]), oracle_logits(folder, prompt), rtol=0, atol=1e-4)
    model.remove("a")
    model.add("a", prompt)
    fresh = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = fresh.generate(torch.tensor([prompt]), max_new_tokens=30, min_new_tokens=30, do_sample=False)
    assert model.greedy("a", 30) == expected[0, 32:].tolist()


def test_dynamic_ntk_beyond_the_original_length_does_not_depend_on_chunks(root: Path) -> None:
    spec, stages = make_stages(make_model("llama_dynamic", root))
    ids = tokens(100, 5)
    results = []
    for chunks in ([100], [20] + [1] * 30 + [50], [50, 50]):
        model = PagedModel(spec, stages, 8)
        model.add("a", ids)
        results.append(model.run("a", chunks))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=2e-5)


def test_a_step_without_rows_gives_nothing(root: Path) -> None:
    spec, stages = make_stages(make_model("llama", root))
    assert PagedModel(spec, stages, 4).step([]) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_to_float32(root: Path, dtype: torch.dtype) -> None:
    folder = make_model("llama", root)
    spec, stages = make_stages(folder, dtype=dtype)
    model = PagedModel(spec, stages, 16)
    ids = tokens(40)
    model.add("a", ids)
    actual, expected = model.run("a", [25, 15]), oracle_logits(folder, ids)
    error = (actual - expected).norm() / expected.norm()
    assert actual.dtype == torch.float32 and error < (0.05 if dtype == torch.bfloat16 else 0.01)
