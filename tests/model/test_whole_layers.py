"""Steps of few tokens and keys run whole layers in one call, others layer by layer, with the same bits."""

from pathlib import Path

import pytest
import torch

from shoal.kernels.build import native_library
from shoal.kernels.fused import FusedLayers
from tests.model.test_families_parity import load_stage, stage_logits
from tests.model.tiny_models import make_model


def test_whole_layers_give_the_bits_of_single_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if native_library() is None:
        pytest.skip("no C compiler here")
    calls: list[int] = []
    real = FusedLayers.__call__

    def counting(self, *args):
        calls.append(len(args[0]))
        return real(self, *args)

    monkeypatch.setattr(FusedLayers, "__call__", counting)
    stage, token_ids = load_stage(make_model("llama", tmp_path)), list(range(3, 33))
    together = stage_logits(stage, token_ids, [20, 1, 9])
    assert calls == [20, 1, 9]
    for name in ("FEW_TOKENS", "FEW_KEYS"):
        with monkeypatch.context() as patch:
            patch.setattr(f"shoal.model.decoder.{name}", 0)
            assert torch.equal(stage_logits(stage, token_ids, [20, 1, 9]), together)
    assert calls == [20, 1, 9], "neither limit let any step through"
