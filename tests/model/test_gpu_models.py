"""Whole tiny models through the Triton kernels in Triton's interpreter, against transformers in float32.

It shows that the decoder hands the kernels what they take. On a GPU scripts/gpu_check.py does the same for real.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shoal.kernels import device
from shoal.kernels.build import load_native
from shoal.model.shard import Quantization
from tests.model.rounded import rounded_checkpoint
from tests.model.test_families_parity import TOLERANCE, load_stage, oracle_logits, stage_logits
from tests.model.tiny_models import CONFIGS, VOCAB, make_model

triton = pytest.importorskip("triton", reason="the Triton kernels need triton")
FAST = {"llama", "qwen3_moe"}
NAMES = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in CONFIGS]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny models of this file lie."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def triton_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU tensors go through the Triton kernels, and no weights are in an order of C's own."""
    if not triton.knobs.runtime.interpret:
        pytest.skip("runs in Triton's interpreter only")
    load_native("off")
    monkeypatch.setattr(device, "INTERPRET_CPU_TENSORS", True)
    yield
    load_native("auto")


@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize("name", NAMES)
def test_logits_through_the_triton_kernels_equal_transformers(root: Path, name: str) -> None:
    folder = make_model(name, root)
    ids = torch.randint(3, VOCAB, (12,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = oracle_logits(folder, ids)
    stage = load_stage(folder, 64 if name == "phi3_longrope" else None, deterministic=name == "llama")
    torch.testing.assert_close(stage_logits(stage, ids, [7, 1, 4]), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize(
    ("name", "quantization"),
    [("llama", "int4"), ("qwen3_moe", "int8"), pytest.param("qwen3_moe", "int4", marks=pytest.mark.slow)],
)
def test_quantised_weights_give_the_tokens_of_the_floats_they_stand_for(
    root: Path, tmp_path: Path, name: str, quantization: Quantization
) -> None:
    folder = make_model(name, root)
    ids = torch.randint(3, VOCAB, (6,), generator=torch.Generator().manual_seed(2)).tolist()
    expected = oracle_logits(rounded_checkpoint(folder, tmp_path / "rounded", quantization), ids)
    stage = load_stage(folder, deterministic=name == "llama", quantization=quantization)
    torch.testing.assert_close(stage_logits(stage, ids, [5, 1]), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize("name", ["gpt2", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_fp8_weights_and_activations_stay_near_the_floats_and_chunks_change_no_bit(root: Path, name: str) -> None:
    folder = make_model(name, root)
    ids = torch.randint(3, VOCAB, (6,), generator=torch.Generator().manual_seed(3)).tolist()
    expected = oracle_logits(folder, ids)
    stage = load_stage(folder, deterministic=True, quantization="fp8")
    logits = stage_logits(stage, ids, [5, 1])
    assert 1e-3 < (logits - expected).norm() / expected.norm() < 0.15
    assert torch.equal(stage_logits(stage, ids, [6]), logits)
