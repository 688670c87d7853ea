"""Keys and values in FP8: what is written, what a block costs, where scales come from, and what it does to a model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.configs.schema import ParallelConfig
from shoal.kernels import device
from shoal.kernels.build import load_native
from shoal.kernels.kv_write import kv_write
from shoal.model.checkpoint import Checkpoint, CheckpointError
from shoal.model.families import load_spec
from shoal.model.kv_cache import KVCache
from shoal.model.kv_layout import kv_bytes_per_block, kv_itemsize
from shoal.model.kv_scales import read_kv_scales
from shoal.model.shard import shard_model
from tests.model.paged import PagedModel
from tests.model.raw_safetensors import entry, read_header, write
from tests.model.test_families_parity import load_stage, stage_logits
from tests.model.tiny_models import VOCAB, make_model
from tests.parity import check_close, generate_on_ranks, make_requests

FP8, CPU = torch.float8_e4m3fn, torch.device("cpu")
PROMPTS = [[index * 31 % 97 + 3 for index in range(length)] for length in (1, 9, 30)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def test_elements_are_values_over_the_heads_scale_rounded_and_saturated() -> None:
    keys, values = torch.randn(5, 2, 8) * 100, torch.randn(5, 2, 8)
    scales = torch.tensor([0.5, 0.125]), torch.tensor([2.0, 1.0])
    caches = [torch.zeros(3, 4, 2, 8).to(FP8) for _ in range(2)]
    slots = torch.tensor([3, 0, 11, 7, 4])
    kv_write(keys, values, caches[0], caches[1], slots, scales)
    for cache, written, scale in zip(caches, (keys, values), scales, strict=True):
        wanted = (written / scale[:, None]).clamp(-448, 448).to(FP8)
        assert torch.equal(cache.flatten(0, 1)[slots].float(), wanted.float())


def test_a_block_costs_a_byte_an_element_and_every_head_has_its_layers_scales(root: Path) -> None:
    spec, _ = load_spec(make_model("llama", root))
    for shard in shard_model(spec, ParallelConfig(tensor=3)):
        cache = KVCache(spec, shard, [5], 4, FP8, CPU, {1: (0.5, 2.0)})
        assert cache.num_bytes == 5 * kv_bytes_per_block(spec, shard, 4, kv_itemsize("fp8", 4))[0]
        for index, layer in cache.layers.items():
            assert layer.scales is not None and layer.scales[0].shape == layer.keys.shape[2:3]
            assert [scale[0].item() for scale in layer.scales] == ([0.5, 2.0] if index == 1 else [1.0, 1.0])
    assert kv_itemsize("auto", 2) == 2


@pytest.mark.parametrize(
    ("name", "deterministic"),
    [
        ("llama", False),
        ("gemma2", True),
        pytest.param("mistral", False, marks=pytest.mark.slow),
        pytest.param("qwen3", True, marks=pytest.mark.slow),
    ],
)
def test_the_triton_kernels_compute_what_torch_computes(
    root: Path, name: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton", reason="the Triton kernels need triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("runs in Triton's interpreter only")
    folder = make_model(name, root)
    ids = torch.randint(3, VOCAB, (12,), generator=torch.Generator().manual_seed(4)).tolist()
    exact = stage_logits(load_stage(folder, deterministic=deterministic), ids, [7, 1, 4])
    want = fp8_logits(folder, ids, deterministic)
    load_native("off")
    monkeypatch.setattr(device, "INTERPRET_CPU_TENSORS", True)
    try:
        got = fp8_logits(folder, ids, deterministic)
    finally:
        load_native("auto")
    # a key that lies between two codes may go either way when its last bit differs
    assert (got - want).norm() / want.norm() < 0.01
    assert 1e-5 < (want - exact).norm() / exact.norm() < 0.15


def fp8_logits(folder: Path, ids: list[int], deterministic: bool) -> torch.Tensor:
    """The logits of every position over a cache in FP8."""
    stage = load_stage(folder, deterministic=deterministic)
    model = PagedModel(stage.spec, [stage], 4, cache_dtype=FP8)
    model.add("sequence", ids)
    return model.run("sequence", [7, 1, 4])


def generate(folder: Path, tp_size: int, pp_size: int, **more: Any) -> list[dict[str, Any]]:
    requests = make_requests(PROMPTS, logprobs=4)
    return generate_on_ranks(folder, tp_size, pp_size, requests, cache__dtype="fp8", **more)


def test_layouts_say_the_same(root: Path) -> None:
    folder = make_model("llama", root)
    one = generate(folder, 1, 1)
    check_close(one, generate(folder, 1, 2), 1e-9)
    check_close(one, generate(folder, 3, 1), 0.3)


def test_bits_do_not_depend_on_the_chunks(root: Path) -> None:
    folder = make_model("mistral", root)
    whole, cut = (
        generate(folder, 1, 1, runtime__deterministic=True, scheduler__max_num_batched_tokens=budget)
        for budget in (64, 7)
    )
    assert [(one["tokens"], one["logprobs"]) for one in whole] == [(one["tokens"], one["logprobs"]) for one in cut]


def with_scales(folder: Path, target: Path, scales: dict[str, bytes], dtype: str = "F32") -> Path:
    """The checkpoint with scalars appended to its file, and a config.json that says so as compressed-tensors does."""
    shutil.copytree(folder, target)
    header, data = read_header(target / "model.safetensors")
    for name, value in scales.items():
        header[name] = entry(dtype, [len(value) // (4 if dtype == "F32" else 2)], len(data), len(data) + len(value))
        data += value
    write(target / "model.safetensors", header, data)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}
    (target / "config.json").write_text(json.dumps(config))
    return target


def f32(value: float) -> bytes:
    return torch.tensor([value]).numpy().tobytes()


def test_scales_come_from_the_checkpoint(root: Path, tmp_path: Path) -> None:
    folder = make_model("llama", root)
    scales = {"model.layers.1.self_attn.k_scale": f32(0.5), "model.layers.3.self_attn.v_proj.v_scale": f32(4.0)}
    scaled = with_scales(folder, tmp_path / "scaled", scales)
    with Checkpoint(scaled) as checkpoint:
        assert read_kv_scales(checkpoint.tensors) == {1: (0.5, 1.0), 3: (1.0, 4.0)}
    # powers of two move no bit of a number that is far from the ends of its range
    plain, other = generate(folder, 1, 1), generate(scaled, 2, 1)
    check_close(plain, other, 0.3)
    wild = with_scales(folder, tmp_path / "wild", {"model.layers.0.self_attn.v_scale": f32(2.0**12)})
    assert [one["logprobs"] for one in generate(wild, 1, 1)] != [one["logprobs"] for one in plain]


@pytest.mark.parametrize(
    ("value", "words"),
    [(f32(0.0), "is 0.0; the scale"), (f32(float("nan")), "is nan"), (f32(1.0) * 2, r"is F32 \[2\]; the scale of an")],
)
def test_a_scale_that_is_not_one_positive_number_is_refused(
    root: Path, tmp_path: Path, value: bytes, words: str
) -> None:
    folder = with_scales(make_model("llama", root), tmp_path / "bad", {"model.layers.0.self_attn.k_scale": value})
    with Checkpoint(folder) as checkpoint, pytest.raises(CheckpointError, match=words):
        read_kv_scales(checkpoint.tensors)
