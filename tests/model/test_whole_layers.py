"""Steps of few tokens and keys run whole layers, or the whole model, in one call, others layer by layer, with the same
bits.
"""

from pathlib import Path

import pytest
import torch

from shoal.kernels.build import native_library
from shoal.kernels.fused_layers import FusedLayers
from tests.model.paged import PagedModel
from tests.model.test_families_parity import load_stage, stage_logits
from tests.model.tiny_models import CONFIGS, make_model

STEPS_APART = {"opt_350m": "matrices around the layers: embeddings of another size than hidden states"}
LAYERS_APART = {"qwen3_moe": "a router of 7 rows, fewer than C packs; models have 8 experts and more"}


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_whole_steps_give_the_bits_of_single_operations(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Of every family; where the step has to be taken apart, of its layers."""
    if native_library() is None:
        pytest.skip("no C compiler here")
    folder = make_model(name, tmp_path)
    stage, single = (load_stage(folder, deterministic=True, dtype=dtype) for _ in range(2))
    for layer in single.layers.values():
        layer.fused_mixer = layer.fused_ffn = None
    apart, whole = (PagedModel(stage.spec, [stage], 4) for _ in range(2))
    for model in (apart, whole):
        model.add("a", list(range(3, 33)))
        model.add("b", list(range(40, 50)))
    for plan in ([("a", 20), ("b", 3)], [("a", 1), ("b", 1)], [("b", 1), ("a", 4)], [("a", 1)]):
        first, second = (model.batch(plan) for model in (apart, whole))
        stops = first.cu_seqlens_q[1:]
        hidden = single.forward(first, single.embed(first), apart.caches[0])
        want = single.head_shard(hidden[stops.long() - 1])
        assert bool(stage.runs(whole.caches[0])) == (name not in LAYERS_APART)
        assert (stage.whole(second, whole.caches[0]) is None) == (name in STEPS_APART | LAYERS_APART)
        if name in STEPS_APART | LAYERS_APART:
            assert torch.equal(stage.forward(second, stage.embed(second), whole.caches[0]), hidden)
        else:
            got, _ = stage.step(second, [stop - 1 for stop in stops.tolist()], whole.caches[0])
            logits = single.shard_logits(want.clone())
            assert torch.equal(got.head_RV, want)
            assert got.best == logits.argmax(-1).tolist() and got.values == logits.amax(-1).tolist()
        for model in (apart, whole):
            for sequence_name, count in plan:
                model.sequences[sequence_name].num_computed += count


def test_a_whole_step_of_many_weights_shows_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if native_library() is None:
        pytest.skip("no C compiler here")
    stage, told, outputs = load_stage(make_model("llama", tmp_path)), list[None](), []
    stage.on_layer = lambda: told.append(None)
    for run_bytes, expected in ((1 << 30, 1), (1, 4)):
        monkeypatch.setattr("shoal.model.fused.RUN_BYTES", run_bytes)
        model = PagedModel(stage.spec, [stage], 4)
        model.add("a", list(range(3, 33)))
        outputs.append(stage.step(model.batch([("a", 30)]), [29, 7], model.caches[0])[0])
        assert len(told) == expected
        told.clear()
    first, second = outputs
    assert torch.equal(first.head_RV, second.head_RV) and first.best == second.best


def test_long_steps_are_not_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = load_stage(make_model("llama", tmp_path))
    model = PagedModel(stage.spec, [stage], 4)
    model.add("a", list(range(3, 33)))
    for name, limit in (("FEW_TOKENS", 29), ("FEW_KEYS", 29)):
        with monkeypatch.context() as patch:
            patch.setattr(f"shoal.model.decoder.{name}", limit)
            assert stage.whole(model.batch([("a", 30)]), model.caches[0]) is None
