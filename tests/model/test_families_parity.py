"""Every family on one rank against transformers in float32: logits within 1e-4, greedy tokens equal, through the paged
cache with random chunks."""

import random
from pathlib import Path

import pytest
import torch

from shoal.configs.schema import ParallelConfig
from shoal.kernels.build import native_library
from shoal.model.checkpoint import Checkpoint, load_parameters
from shoal.model.decoder import Stage
from shoal.model.families import load_spec
from shoal.model.parameters import head_is_shared
from shoal.model.prepare import prepare_weights
from shoal.model.shard import Quantization, shard_model
from shoal.parallel.communicator import SingleCommunicator
from tests.model.paged import PagedModel, random_chunks
from tests.model.tiny_models import CONFIGS, VOCAB, load_oracle, make_model

LENGTH = 50
TOLERANCE = 1e-4


def load_stage(
    folder: Path,
    max_model_len: int | None = None,
    *,
    deterministic: bool = False,
    quantization: Quantization = "none",
    dtype: torch.dtype = torch.float32,
) -> Stage:
    """The whole model of a checkpoint as one stage."""
    spec, family = load_spec(folder)
    [shard] = shard_model(spec, ParallelConfig(), quantization)
    with Checkpoint(folder) as checkpoint:
        weights = load_parameters(checkpoint, family, spec, shard, dtype, "cpu")
    weights = prepare_weights(weights, native_library(), head_is_shared=head_is_shared(spec, shard))
    group = SingleCommunicator("tensor")
    return Stage(spec, shard, weights, group, deterministic=deterministic, max_model_len=max_model_len)


def short_stage(name: str, folder: Path) -> Stage:
    """A stage for sequences of at most 64 tokens, up to which LongRoPE takes the short factors, as transformers
    does.
    """
    return load_stage(folder, max_model_len=64 if name == "phi3_longrope" else None)


def stage_logits(stage: Stage, token_ids: list[int], chunks: list[int], block_size: int = 4) -> torch.Tensor:
    """The logits of every position, computed in these chunks through a paged cache: [len(token_ids), vocab_size]."""
    model = PagedModel(stage.spec, [stage], block_size)
    model.add("sequence", token_ids)
    return model.run("sequence", chunks)


def oracle_logits(folder: Path, token_ids: list[int], stepwise: bool = False) -> torch.Tensor:
    """The same from transformers, in one forward, or token by token through its cache."""
    oracle = load_oracle(folder)
    with torch.inference_mode():
        if not stepwise:
            return oracle(torch.tensor([token_ids])).logits[0]
        cache, rows = None, []
        for token in token_ids:
            out = oracle(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0, -1])
        return torch.stack(rows)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_greedy_tokens_equal_transformers(name: str, root: Path) -> None:
    folder, rng = make_model(name, root), random.Random(name)
    stage = short_stage(name, folder)
    tokens = [rng.randrange(3, VOCAB) for _ in range(LENGTH)]
    expected = oracle_logits(folder, tokens, stepwise=name == "llama_dynamic")
    spread = expected.std().item()
    assert spread > 0.5, f"logits of {name} spread by {spread}: too little to tell tokens apart"
    for chunks in ([LENGTH], random_chunks(LENGTH, rng, 9)):
        got = stage_logits(stage, tokens, chunks, block_size=rng.choice([1, 3, 8]))
        difference = (got - expected).abs().max().item()
        assert difference < TOLERANCE, f"{name} in chunks {chunks}: logits differ by {difference}"


def test_longrope_beyond_the_original_length_takes_the_long_factors(root: Path) -> None:
    folder, rng = make_model("phi3_longrope", root), random.Random(0)
    tokens = [rng.randrange(3, VOCAB) for _ in range(80)]
    got = stage_logits(load_stage(folder), tokens, random_chunks(80, rng, 30))
    assert (got - oracle_logits(folder, tokens)).abs().max().item() < TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_continuation_equals_transformers(name: str, root: Path) -> None:
    folder, rng = make_model(name, root), random.Random(name)
    stage = short_stage(name, folder)
    prompt, count = [rng.randrange(3, VOCAB) for _ in range(12)], 24
    model = PagedModel(stage.spec, [stage], block_size=4)
    model.add("sequence", prompt)
    for chunk in random_chunks(len(prompt) - 1, rng, 5):
        model.step([("sequence", chunk)])
    tokens = model.greedy("sequence", count)
    logits = oracle_logits(folder, prompt + tokens[:-1], stepwise=name == "llama_dynamic")[len(prompt) - 1 :]
    best = logits.topk(2).values
    gaps = (best[:, 0] - best[:, 1]).tolist()
    differing = [i for i, token in enumerate(tokens) if token != int(logits[i].argmax())]
    assert not differing, f"{name}: positions {differing} differ, gaps {[gaps[i] for i in differing]}"
    assert min(gaps) > 1e-3, f"{name}: the smallest gap is {min(gaps)}; draw other weights"
