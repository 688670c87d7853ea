"""Loading a checkpoint: shards are exact slices, only their bytes are read, and damaged checkpoints are refused."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.configs.schema import ParallelConfig
from shoal.model.checkpoint import Checkpoint, CheckpointError, load_parameters
from shoal.model.checkpoint_files import verify_checksums
from shoal.model.families import load_spec
from shoal.model.families.names import logical_shapes
from shoal.model.parameters import local_parameters
from shoal.model.shard import ModelShard, shard_model
from shoal.model.spec import MoeFfn
from tests.model.raw_safetensors import entry, read_header, write
from tests.model.tiny_models import CONFIGS, make_model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def load(folder: Path, dtype: torch.dtype = torch.float32, shard: ModelShard | None = None) -> dict[str, torch.Tensor]:
    spec, family = load_spec(folder)
    with Checkpoint(folder) as checkpoint:
        return load_parameters(checkpoint, family, spec, shard or shard_model(spec, ParallelConfig())[0], dtype, "cpu")


def gather(folder: Path, parallel: ParallelConfig) -> dict[str, torch.Tensor]:
    """Every logical parameter put together from what the ranks of a layout hold; NaN where none holds it."""
    spec, _ = load_spec(folder)
    whole = {name: torch.full(shape, torch.nan) for name, shape in logical_shapes(spec).items()}
    for shard in shard_model(spec, parallel):
        tensors = load(folder, shard=shard)
        for parameter in local_parameters(spec, shard):
            assert tensors[parameter.name].shape == parameter.shape
            for part in parameter.parts:
                source = tuple(slice(*bounds) for bounds in part.source)
                dest = tuple(slice(*bounds) for bounds in part.dest)
                values = tensors[parameter.name][dest].reshape(whole[part.logical][source].shape)
                known = ~whole[part.logical][source].isnan()
                assert torch.equal(whole[part.logical][source][known], values[known])  # replicas agree
                whole[part.logical][source] = values
    return whole


LAYOUTS = [
    ParallelConfig(tensor=3, pipeline=2),
    ParallelConfig(tensor=4, tensor_weights=[2, 1, 1, 1]),
    ParallelConfig(tensor=2, expert=True),
]


@pytest.mark.parametrize("name", CONFIGS)
def test_shards_of_every_layout_are_slices_of_the_model(name: str, root: Path) -> None:
    folder = make_model(name, root)
    expected = gather(folder, ParallelConfig())
    assert not any(value.isnan().any() for value in expected.values())
    is_moe = any(isinstance(layer.ffn, MoeFfn) for layer in load_spec(folder)[0].layers)
    for parallel in LAYOUTS if is_moe else LAYOUTS[:-1]:
        gathered = gather(folder, parallel)
        differing = [key for key, value in expected.items() if not torch.equal(gathered[key], value)]
        assert not differing, (parallel, differing)


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_half_types_are_read_and_converted(stored: str, root: Path) -> None:
    folder = make_model("gpt2", root, dtype=stored)
    full, half = load(folder), load(folder, getattr(torch, stored))
    for name, value in half.items():
        assert value.dtype == getattr(torch, stored)
        assert torch.equal(full[name], value.float())


def test_sharded_files_hold_the_same_model(root: Path) -> None:
    single, many = make_model("qwen2_moe", root), make_model("qwen2_moe", root, max_shard_size="40KB")
    assert len(list(many.glob("*.safetensors"))) > 3
    for name, value in load(single).items():
        assert torch.equal(load(many)[name], value)


@pytest.mark.parametrize(("name", "prefix"), [("llama", "model."), ("gpt2", "transformer."), ("opt", "model.decoder.")])
def test_base_model_prefix_may_be_absent(name: str, prefix: str, root: Path, tmp_path: Path) -> None:
    folder = make_model(name, root)
    bare = copy(folder, tmp_path)
    rename_tensors(bare, lambda tensor: tensor.removeprefix(prefix))
    for key, value in load(folder).items():
        assert torch.equal(load(bare)[key], value)


def test_stacked_experts_are_read(root: Path, tmp_path: Path) -> None:
    """transformers 5 keeps experts stacked in memory, and writes them so with save_original_format=False."""
    import transformers

    for name in ("mixtral", "qwen2_moe", "qwen3_moe"):
        folder, stacked = make_model(name, root), tmp_path / name
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        model.save_pretrained(stacked, save_original_format=False)
        assert any(key.endswith("experts.gate_up_proj") for key in read_header(stacked / "model.safetensors")[0])
        for parallel in (ParallelConfig(), ParallelConfig(tensor=3), ParallelConfig(tensor=3, expert=True)):
            for shard in shard_model(load_spec(folder)[0], parallel):
                expected = load(folder, shard=shard)
                assert all(torch.equal(value, expected[key]) for key, value in load(stacked, shard=shard).items())


def test_text_part_of_a_gemma3_with_vision_is_loaded(root: Path, tmp_path: Path) -> None:
    text, folder = make_model("gemma3", root), copy(make_model("gemma3", root), tmp_path)
    rename_tensors(folder, lambda tensor: "language_model." + tensor, **{"vision_tower.x": entry("F32", [1], 0, 0)})
    config = json.loads((folder / "config.json").read_text())
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "vision_config": {"a": 1}}
    (folder / "config.json").write_text(json.dumps({**outer, "text_config": config}))
    assert all(torch.equal(value, load(text)[key]) for key, value in load(folder).items())


def test_progress_reaches_the_shards_bytes(root: Path) -> None:
    folder, seen = make_model("llama", root), []
    spec, family = load_spec(folder)
    with Checkpoint(folder) as checkpoint:
        shard = shard_model(spec, ParallelConfig())[0]
        tensors = load_parameters(
            checkpoint, family, spec, shard, torch.float32, "cpu", lambda done, total: seen.append((done, total))
        )
    total = sum(value.nbytes for value in tensors.values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_type_the_config_does_not_declare_is_taken_from_the_weights(root: Path, tmp_path: Path) -> None:
    for stored, shard_size in (("bfloat16", "1GB"), ("float16", "40KB")):
        folder = copy(make_model("llama", root, dtype=stored, max_shard_size=shard_size), tmp_path / stored)
        assert load_spec(folder)[0].dtype == stored
        edit_json(folder / "config.json", lambda config: config.pop("dtype"))
        assert load_spec(folder)[0].dtype == stored
    edit_json(folder / "config.json", lambda config: config.update(torch_dtype="float32"))
    assert load_spec(folder)[0].dtype == "float32"


# Damage


def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True))


def rename_tensors(folder: Path, rename: Callable[[str], str], **more: Any) -> None:
    """Rewrite the single file's header under other names; more entries get the last offset."""
    header, data = read_header(folder / "model.safetensors")
    entries = {name if name == "__metadata__" else rename(name): value for name, value in header.items()}
    for name, value in more.items():
        size = 4
        entries[name] = {**value, "data_offsets": [len(data), len(data) + size]}
        data += bytes(size)
    write(folder / "model.safetensors", entries, data)


def overwrite(folder: Path, tensor: str, value: bytes, file: str = "model.safetensors") -> None:
    """Put bytes at the end of a tensor's data."""
    header, data = read_header(folder / file)
    stop = header[tensor]["data_offsets"][1]
    write(folder / file, header, data[: stop - len(value)] + value + data[stop:])


def edit_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    header, data = read_header(folder / "model.safetensors")
    change(header)
    write(folder / "model.safetensors", header, data)


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def quantise(folder: Path, **settings: Any) -> None:
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=settings))


GATE = "model.layers.3.mlp.gate_proj.weight"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def drop_tensor(folder: Path) -> None:
    rename_tensors(folder, lambda name: name.replace("layers.3.mlp.gate_proj", "layers.4.mlp.gate_proj"))


def reshape_tensor(folder: Path) -> None:
    edit_header(folder, lambda header: header[GATE].update(shape=[48, 56]))


def quantise_tensor(folder: Path) -> None:
    edit_header(folder, lambda header: header[GATE].update(dtype="I32"))


def truncate(folder: Path) -> None:
    path = folder / SINGLE
    path.write_bytes(path.read_bytes()[:-1000])


def twice(folder: Path) -> None:
    [first, second, *_] = sorted(folder.glob("*.safetensors"))
    header, data = read_header(second)
    name = next(name for name in read_header(first)[0] if name != "__metadata__")
    header[name] = entry("F32", [1], len(data), len(data) + 4)
    write(second, header, data + bytes(4))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


INFINITY = torch.tensor([float("inf")]).numpy().tobytes()
NAN = torch.tensor([float("nan")]).numpy().tobytes()
LARGE = torch.tensor([-7e4]).numpy().tobytes()

SINGLE_FILE_DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, r"model\.safetensors: tensor '.*' ends at byte .*truncated; download it again"),
    "missing tensor": (drop_tensor, rf"tensor '{GATE}' is missing \(it holds layers\.3\.ffn\.gate\.weight \[56, 48\]"),
    "surplus tensor": (drop_tensor, r"model\.safetensors: tensor 'model\.layers\.4\.mlp.*' \[56, 48\] is surplus"),
    "wrong shape": (
        reshape_tensor,
        rf"safetensors: tensor '{GATE}' has shape \[48, 56\], config.json makes it \[56, 48\]",
    ),
    "wrong type": (quantise_tensor, rf"safetensors: tensor '{GATE}' is stored as I32; supported are F32, F16, BF16"),
    "NaN": (
        lambda folder: overwrite(folder, GATE, NAN),
        rf"safetensors: tensor '{GATE}' holds a value that is not finite",
    ),
    "infinity": (
        lambda folder: overwrite(folder, "model.norm.weight", INFINITY),
        r"safetensors: tensor 'model\.norm\.weight' holds a value that is not finite",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), r"config\.json.*not valid JSON"),
    "larger config": (
        lambda folder: edit_json(folder / "config.json", lambda config: config.update(vocab_size=103)),
        r"tensor 'model\.embed_tokens\.weight' has shape \[101, 48\], config.json makes it \[103, 48\]",
    ),
    "fewer layers than weights": (
        lambda folder: edit_json(folder / "config.json", lambda config: config.update(num_hidden_layers=3)),
        r"tensor 'model\.layers\.3\..* is surplus: no part of a llama model needs it\n(.*\n)*  and 1 more",
    ),
    "no weights": (lambda folder: (folder / SINGLE).unlink(), "has neither model.safetensors nor"),
    "pickled": (
        lambda folder: (folder / SINGLE).rename(folder / "pytorch_model.bin"),
        r"holds pytorch_model\.bin, a pickled checkpoint.*Convert it to safetensors: .*save_pretrained\(new_folder\)",
    ),
    "GGUF": (
        lambda folder: (folder / SINGLE).rename(folder / "m.gguf"),
        "GGUF.*use the model's Hugging Face safetensors",
    ),
    "adapter": (
        lambda folder: (
            (folder / SINGLE).rename(folder / "adapter_model.safetensors")
            and (folder / "adapter_config.json").write_text("{}")
        ),
        "holds a LoRA adapter, not a model",
    ),
    "AWQ": (lambda folder: quantise(folder, quant_method="awq"), "quantised with AWQ .*unquantised checkpoint"),
    "GPTQ": (lambda folder: quantise(folder, quant_method="gptq"), "quantised with GPTQ .*unquantised checkpoint"),
    "old GPTQ": (
        lambda folder: (folder / "quantize_config.json").write_text("{}"),
        "quantised with GPTQ.*unquantised checkpoint",
    ),
    "old bitsandbytes": (lambda folder: quantise(folder, load_in_4bit=True), "quantised with bitsandbytes"),
}

SHARDED_DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing file": (
        lambda folder: first_shard(folder).unlink(),
        "1 of .* files named by .*are missing: model-00001-of",
    ),
    "missing index": (lambda folder: (folder / INDEX).unlink(), f"has neither .*, but no index: download {INDEX} too"),
    "index is no JSON": (lambda folder: (folder / INDEX).write_text("[1"), f"{INDEX}: not valid JSON"),
    "index without map": (lambda folder: (folder / INDEX).write_text("{}"), f"{INDEX}: weight_map must be an object"),
    "index names a path": (
        lambda folder: edit_json(folder / INDEX, lambda index: index["weight_map"].update({GATE: "../x.safetensors"})),
        f"tensor '{GATE}' is said to be in '../x.safetensors', which is not a safetensors file of the folder",
    ),
    "index names another file": (
        lambda folder: edit_json(
            folder / INDEX, lambda index: index["weight_map"].update({GATE: first_shard(folder).name})
        ),
        f"model-00001-of-.*: tensor '{GATE}' is not in this file, where {INDEX} says it is",
    ),
    "tensor in two files": (twice, r"model-00002-of-.*: tensor '.*' is in model-00001-of-.* too"),
}


@pytest.mark.parametrize("name", SINGLE_FILE_DAMAGE)
def test_damaged_checkpoint_is_refused(name: str, root: Path, tmp_path: Path) -> None:
    damage, message = SINGLE_FILE_DAMAGE[name]
    folder = copy(make_model("llama", root), tmp_path)
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", SHARDED_DAMAGE)
def test_damaged_sharded_checkpoint_is_refused(name: str, root: Path, tmp_path: Path) -> None:
    damage, message = SHARDED_DAMAGE[name]
    folder = copy(make_model("llama", root, max_shard_size="40KB"), tmp_path)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_value_beyond_the_run_type_is_refused(root: Path, tmp_path: Path) -> None:
    folder = copy(make_model("llama", root), tmp_path)
    overwrite(folder, GATE, LARGE)
    load(folder, torch.bfloat16)
    with pytest.raises(CheckpointError, match=rf"tensor '{GATE}' holds 70000, beyond torch\.float16 \(65504\)"):
        load(folder, torch.float16)


def test_headers_of_the_whole_model_are_checked_before_any_weight_is_read(root: Path, tmp_path: Path) -> None:
    folder = copy(make_model("llama", root), tmp_path)
    reshape_tensor(folder)
    spec, family = load_spec(folder)
    first = shard_model(spec, ParallelConfig(tensor=2, pipeline=2))[0]
    with Checkpoint(folder) as checkpoint:
        before = checkpoint.bytes_read
        with pytest.raises(CheckpointError, match=GATE):  # a layer of the other stage
            load_parameters(checkpoint, family, spec, first, torch.float32, "cpu")
        assert checkpoint.bytes_read == before


def test_buffers_of_old_releases_and_the_copy_of_a_tied_head_are_ignored(root: Path, tmp_path: Path) -> None:
    folder = copy(make_model("llama3", root), tmp_path)
    more = {
        "lm_head.weight": entry("F32", [1], 0, 0),
        "model.layers.0.self_attn.rotary_emb.inv_freq": entry("F32", [1], 0, 0),
    }
    rename_tensors(folder, lambda name: name, **more)
    load(folder)
    folder = copy(make_model("gpt2", root), tmp_path / "gpt2")
    rename_tensors(folder, lambda name: name, **{"transformer.h.0.attn.bias": entry("U8", [1, 1, 2, 2], 0, 0)})
    load(folder)


def test_head_of_an_untied_model_is_not_ignored(root: Path, tmp_path: Path) -> None:
    folder = copy(make_model("llama", root), tmp_path)
    edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=True))
    load(folder)  # tied: the head's own tensor is not used, as in transformers
    folder = copy(make_model("llama3", root), tmp_path / "other")
    edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=False))
    with pytest.raises(CheckpointError, match=r"tensor 'lm_head\.weight' is missing \(it holds head\.weight"):
        load(folder)


# Checksums


def manifest_of(folder: Path) -> Path:
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in folder.glob("*.safetensors")]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    return folder / "SHA256SUMS"


def test_checksums_of_an_intact_folder_agree(root: Path, tmp_path: Path) -> None:
    folder = copy(make_model("llama", root, max_shard_size="40KB"), tmp_path)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert verify_checksums(folder, manifest_of(folder)) == size


def test_changed_missing_and_unlisted_files_are_named(root: Path, tmp_path: Path) -> None:
    folder = copy(make_model("llama", root), tmp_path)
    manifest = manifest_of(folder)
    overwrite(folder, GATE, b"\1")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: SHA-256 is .* says .*; download the file again"):
        verify_checksums(folder, manifest)
    manifest.write_text("0" * 64 + "  other.safetensors\n")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the manifest .* has no sum for it"):
        verify_checksums(folder, manifest)
    manifest.write_text("nonsense\n")
    with pytest.raises(CheckpointError, match=r"SHA256SUMS:1: expected"):
        verify_checksums(folder, manifest)
    with pytest.raises(CheckpointError, match=r"model\.checksums = .*no such file"):
        verify_checksums(folder, folder / "none")
