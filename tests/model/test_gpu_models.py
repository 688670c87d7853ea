"""Whole tiny models through the Triton kernels in Triton's interpreter, against transformers in float32.

It shows that the decoder hands the kernels what they take. On a GPU scripts/gpu_check.py does the same for real.
"""

from pathlib import Path

import pytest
import torch

from shoal.kernels import device
from shoal.kernels.build import load_native
from tests.model.test_families_parity import TOLERANCE, load_stage, oracle_logits, stage_logits
from tests.model.tiny_models import CONFIGS, VOCAB, make_model

triton = pytest.importorskip("triton", reason="the Triton kernels need triton")
FAST = {"llama", "qwen3_moe"}
NAMES = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in CONFIGS]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny models of this file lie."""
    return tmp_path_factory.mktemp("models")


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="runs in Triton's interpreter only")
@pytest.mark.parametrize("name", NAMES)
def test_logits_through_the_triton_kernels_equal_transformers(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(name, root)
    ids = torch.randint(3, VOCAB, (12,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = oracle_logits(folder, ids)
    load_native("off")  # no weights in an order of C's own
    monkeypatch.setattr(device, "INTERPRET_CPU_TENSORS", True)
    try:
        logits = stage_logits(
            load_stage(folder, 64 if name == "phi3_longrope" else None, deterministic=name == "llama"), ids, [7, 1, 4]
        )
    finally:
        load_native("auto")
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
