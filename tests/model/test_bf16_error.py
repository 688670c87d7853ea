"""Whole models in bfloat16: their logits are off by at most twice what transformers in bfloat16 is off by, each against
transformers in float32 on the same weights.
"""

from pathlib import Path

import pytest
import torch
import transformers

from shoal.configs.schema import ParallelConfig
from shoal.kernels.build import native_library
from shoal.model.checkpoint import Checkpoint, load_parameters
from shoal.model.decoder import Stage
from shoal.model.families import load_spec
from shoal.model.parameters import head_is_shared
from shoal.model.prepare import prepare_weights
from shoal.model.shard import shard_model
from shoal.parallel.communicator import SingleCommunicator
from tests.model.test_families_parity import oracle_logits, stage_logits
from tests.model.tiny_models import CONFIGS, VOCAB, make_model

LENGTH = 60
FAST = ("llama", "gemma2", "qwen3", "mixtral")
SHORT = {"phi3_longrope": 64}  # positions up to which it takes the short factors, as transformers does


def bf16_stage(folder: Path, max_model_len: int | None) -> Stage:
    """The whole model as one stage in bfloat16."""
    spec, family = load_spec(folder)
    [shard] = shard_model(spec, ParallelConfig())
    with Checkpoint(folder) as checkpoint:
        weights = load_parameters(checkpoint, family, spec, shard, torch.bfloat16, "cpu")
    weights = prepare_weights(weights, native_library(), head_is_shared=head_is_shared(spec, shard))
    return Stage(spec, shard, weights, SingleCommunicator("tensor"), max_model_len=max_model_len)


def usual_error(errors_TV: torch.Tensor) -> float:
    """The median over positions of the root mean square: a near tie of experts that falls otherwise is not rounding."""
    return errors_TV.square().mean(-1).sqrt().median().item()


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)
def test_logits_in_bfloat16_are_as_near_as_torchs(name: str, tmp_path: Path) -> None:
    folder = make_model(name, tmp_path, dtype="bfloat16")
    token_ids = torch.randint(3, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(5)).tolist()
    want = oracle_logits(folder, token_ids, stepwise=name == "llama_dynamic")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.inference_mode():
        plain = theirs(torch.tensor([token_ids])).logits[0].float()
    stage = bf16_stage(folder, SHORT.get(name))
    allowed = 2 * usual_error(plain - want)
    assert allowed > 0
    for chunks in ([LENGTH], [1] * 20 + [LENGTH - 20]):
        error = usual_error(stage_logits(stage, token_ids, chunks).float() - want)
        assert error <= allowed, f"{chunks[:1]}: {error:.2e}, allowed {allowed:.2e}"
