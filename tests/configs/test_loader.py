"""Loading: precedence, sources, and every mistake at once."""

import math
from pathlib import Path
from typing import Any

import pytest

from shoal.configs.fields import sampling_settings, settings
from shoal.configs.loader import load_config, shipped_layouts
from shoal.configs.problems import ConfigError
from shoal.configs.resolved import COMMAND_LINE, DEFAULT, GENERATION_CONFIG, KEYWORD
from shoal.configs.sampling import SamplingParams
from shoal.configs.schema import ShoalConfig

TORCHRUN = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    return path


def refusal(**given: Any) -> ConfigError:
    with pytest.raises(ConfigError) as refused:
        load_config(environ={}, **given)
    return refused.value


def test_without_anything_all_settings_have_their_defaults() -> None:
    resolved = load_config(environ={})
    assert resolved.config == ShoalConfig()
    assert set(resolved.sources.values()) == {DEFAULT}
    assert set(resolved.sources) == settings().keys() | sampling_settings().keys()


def test_command_line_goes_before_keywords_before_file_before_checkpoint_before_defaults(tmp_path: Path) -> None:
    text = """
parallel: {tensor: 3, pipeline: 3}
cache:
  block_size: 8
  memory: 1.5GB
sampling: {temperature: 0.5, top_k: 5}
"""
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.9, "min_p": 0.1, "max_new_tokens": 77}')
    resolved = load_config(
        write(tmp_path, text),
        {"parallel.tensor": 2, "sampling.top_k": 7},
        {"tensor_parallel_size": 4, "pipeline_parallel_size": 2},
        environ={},
    ).with_generation_config(tmp_path)
    config = resolved.config
    assert (config.parallel.tensor, config.parallel.pipeline) == (2, 2)
    assert (config.cache.block_size, config.cache.memory) == (8, 1_500_000_000)
    found = {
        key: resolved.sources[key] for key in ("parallel.tensor", "parallel.pipeline", "cache.memory", "model.path")
    }
    assert list(found.values()) == [COMMAND_LINE, KEYWORD, "my.yaml:5", DEFAULT]
    params = resolved.sampling_params(seed=3)
    assert params == SamplingParams(temperature=0.5, top_k=7, min_p=0.1, max_tokens=77, seed=3)
    assert resolved.sources["sampling.min_p"] == GENERATION_CONFIG
    rows = {row.key: row for row in resolved.settings()}
    assert rows["sampling.temperature"].value == 0.5 and rows["sampling.temperature"].source == "my.yaml:6"


def test_checkpoint_that_does_not_sample_means_greedy(tmp_path: Path) -> None:
    resolved = load_config(environ={})
    assert resolved.with_generation_config(tmp_path) is resolved
    path = tmp_path / "generation_config.json"
    path.write_text('{"do_sample": false, "temperature": 0.6, "top_p": 0.9, "top_k": null, "eos_token_id": [1, 2]}')
    assert resolved.with_generation_config(tmp_path).config.sampling == {"temperature": 0.0}
    path.write_text('{"temperature": -1}')
    with pytest.raises(ConfigError, match=r"sampling.temperature = -1 \(generation_config.json\)"):
        resolved.with_generation_config(tmp_path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        resolved.with_generation_config(tmp_path)


def test_every_mistake_is_reported_at_once_with_its_place(tmp_path: Path) -> None:
    text = """\
parallel:
  tensor: 2
  tensr: 3
  tensor_weights: [1, 2, .nan]
cache: {block_size: 300, reserve: 3G}
blok: {}
block_size: 3
sampling: {temperature: -1, topp: 2}
model: {dtype: bf16, max_model_len: "16", skip_tokenizer_init: no}
runtime: 3
"""
    error = refusal(
        file=write(tmp_path, text),
        overrides={"runtime.threads": True},
        keywords={"tensor": 1, "dtyp": "x", "seed": 1.5},
    )
    assert str(error).splitlines() == [
        "blok (my.yaml:6): unknown section",
        "block_size (my.yaml:7): is no section; in a file this setting is cache.block_size",
        "runtime = 3 (my.yaml:10): must be a mapping of settings, such as `parallel:` with `tensor: 2` below it",
        "tensor (Python keyword): unknown keyword; did you mean tensor_parallel_size?",
        "dtyp (Python keyword): unknown keyword; did you mean dtype?",
        "parallel.tensr (my.yaml:3): unknown key; did you mean parallel.tensor?",
        "sampling.topp (my.yaml:8): unknown sampling parameter; did you mean top_p?",
        "model.skip_tokenizer_init = no (my.yaml:9): must be true or false, not a text",
        "model.dtype = bf16 (my.yaml:9): must be one of auto, float32, bfloat16, float16; did you mean bfloat16?",
        "model.max_model_len = 16 (my.yaml:9): must be an integer from 1 to 2147483647, or null, not a text",
        "parallel.tensor_weights = [1, 2, nan] (my.yaml:4): must be a finite number",
        "cache.block_size = 300 (my.yaml:5): must be an integer from 1 to 256",
        "cache.reserve = 3G (my.yaml:5): has the unknown unit G; write 3GiB or 3GB; a size is such as 4GiB, 512MiB "
        "or 1.5GB",
        "runtime.seed = 1.5 (Python keyword): must be an integer from 0 to 9223372036854775807, or null",
        "runtime.threads = true (command line): must be an integer from 1 to 2147483647, or null, not a truth value",
        "sampling.temperature = -1 (my.yaml:8): must be a number of at least 0",
    ]


BAD = [
    ({"cache.block_size": 0}, "from 1 to 256"),
    ({"cache.block_size": 16.0}, "an integer"),
    ({"cache.block_size": None}, "an integer"),
    ({"cache.gpu_memory_utilization": 1.5}, "above 0 and at most 1"),
    ({"cache.gpu_memory_utilization": math.nan}, "finite"),
    ({"launcher.start_timeout_s": math.inf}, "finite"),
    ({"launcher.start_timeout_s": 0}, "above 0"),
    ({"launcher.kind": "mpi"}, "one of auto, inprocess, local, torchrun"),
    ({"parallel.tensor": -1}, "from 1 to 4096"),
    ({"parallel.tensor": 10**30}, "from 1 to 4096"),
    ({"parallel.expert": 1}, "true or false"),
    ({"parallel.pipeline_layers": [0, 1], "parallel.pipeline": 2}, "each item an integer"),
    ({"parallel.pipeline_layers": [True]}, "each item an integer"),
    ({"parallel.tensor_weights": "2,1"}, "a list"),
    ({"model.path": ""}, "not empty"),
    ({"model.path": 3}, "a text"),
    ({"runtime.seed": -1}, "from 0 to"),
    ({"scheduler.prefill_share": 0}, "above 0"),
    ({"cache.blocksize": 1}, "did you mean cache.block_size?"),
    ({"cache.tensor": 1}, "did you mean parallel.tensor?"),
    ({"cache.zzz": 1}, "cache has block_size"),
    ({"cach.block": 1}, "did you mean cache?"),
    ({"sampling.stop": ""}, "not empty"),
    ({"sampling.n": 2, "sampling.temperature": 0}, "must be 1 with temperature = 0"),
    # between settings
    ({"parallel.tensor_weights": [2, 1]}, "2 weights, but parallel.tensor is 1"),
    ({"parallel.pipeline_layers": [3]}, None),
    ({"parallel.pipeline_layers": [3, 4, 5], "parallel.pipeline": 2}, "-pp 3 would fit"),
    ({"parallel.micro_batches": 3, "parallel.pipeline": 2}, "at most parallel.pipeline, which is 2"),
    ({"parallel.micro_batches": 2}, "at most parallel.pipeline, which is 1"),
    ({"parallel.micro_batches": 2, "parallel.pipeline": 2}, None),
    ({"scheduler.max_num_seqs": 3000}, "at most scheduler.max_num_batched_tokens = 2048"),
    ({"scheduler.max_num_batched_tokens": 64}, None),
    ({"cache.num_blocks": 4, "cache.memory": "1GiB"}, "leave one of them out"),
    ({"cache.num_blocks": 4, "model.max_model_len": 65}, "at least 5 blocks, or max_model_len at most 64"),
    ({"cache.num_blocks": 4, "model.max_model_len": 64}, None),
    ({"model.checksums": "sums", "model.load_format": "dummy"}, "reads no file"),
    ({"model.tokenizer": "t", "model.skip_tokenizer_init": True}, "would not be used"),
    ({"model.path": "demo", "model.revision": "main"}, "only hub repositories"),
    ({"model.quantization": "int8", "runtime.device": "cuda"}, None),
    ({"model.quantization": "int8", "runtime.device": "cpu"}, None),
    ({"model.quantization": "fp8", "runtime.device": "cpu"}, "is for GPUs, and runtime.device is cpu"),
    ({"model.quantization": "int2"}, "int2"),
    ({"runtime.collectives": "shm", "runtime.device": "cuda"}, "runtime.device is cuda"),
    ({"runtime.collectives": "nccl", "runtime.device": "cpu"}, "runtime.device is cpu"),
    ({"runtime.collectives": "shm", "runtime.native": "off"}, "runtime.native is off"),
    ({"parallel.ranks_per_device": 3, "parallel.tensor": 2}, "the layout has 2 ranks; at most that"),
    ({"parallel.ranks_per_device": 2, "runtime.device": "cpu"}, "runtime.device is cpu, where all share the memory"),
    (
        {"parallel.ranks_per_device": 2, "parallel.tensor": 2, "runtime.collectives": "nccl"},
        "refuse two ranks on one GPU",
    ),
    ({"runtime.native": "require", "runtime.device": "cuda"}, "run on CPUs"),
    ({"launcher.routing": "least_loaded", "launcher.load_factor": 3.0}, "would not be used"),
    ({"launcher.routing": "prefix", "cache.enable_prefix_caching": False}, "take least_loaded"),
    ({"launcher.routing": "prefix", "launcher.load_factor": 3.0}, None),
    ({"launcher.kind": "inprocess", "parallel.data": 2}, "layout 1 x 1 x 2 .* has 2"),
    ({"launcher.kind": "torchrun"}, "RANK, LOCAL_RANK, WORLD_SIZE"),
]


@pytest.mark.parametrize(("overrides", "words"), BAD)
def test_each_bad_configuration_is_refused_by_name(overrides: dict[str, Any], words: str | None) -> None:
    if words is None:
        load_config(None, overrides, environ={})
        return
    error = refusal(overrides=overrides)
    assert len(error.problems) == 1
    with pytest.raises(ConfigError, match=words):
        raise error


def test_checks_between_settings_wait_for_right_values() -> None:
    error = refusal(overrides={"parallel.tensor": "x", "parallel.tensor_weights": [1, 2]})
    assert [problem.key for problem in error.problems] == ["parallel.tensor"]


def test_world_size_of_torchrun_must_be_the_layouts() -> None:
    assert load_config("tp2_pp2", environ=TORCHRUN).config.world_size == 4
    with pytest.raises(ConfigError, match=r"torchrun started 4 processes, but the layout 2 x 1 x 1 .* has 2"):
        load_config("tp2", environ=TORCHRUN)
    with pytest.raises(ConfigError, match=r"would not be used: the processes are torchrun's"):
        load_config("tp2_pp2", {"launcher.max_restarts": 3}, environ=TORCHRUN)
    load_config("tp2", {"launcher.kind": "local", "launcher.max_restarts": 3}, environ=TORCHRUN)
    slurm = {name: value for name, value in TORCHRUN.items() if not name.startswith("TORCHELASTIC")}
    load_config("tp2", environ=slurm)
    load_config("tp2_pp2", {"launcher.kind": "torchrun"}, environ=slurm)


@pytest.mark.parametrize("name", ["single", "tp2", "tp4", "pp2", "tp2_pp2", "dp2", "tp2_dp2", "tp2_pp2_dp2"])
def test_shipped_layouts_have_the_sizes_of_their_names_and_no_model(name: str) -> None:
    resolved = load_config(name, environ={})
    sizes = dict.fromkeys(("tp", "pp", "dp"), 1)
    if name != "single":
        sizes |= {part[:2]: int(part[2:]) for part in name.split("_")}
    parallel = resolved.config.parallel
    assert (parallel.tensor, parallel.pipeline, parallel.data) == tuple(sizes.values())
    assert resolved.config.model.path is None and name in shipped_layouts()


def test_file_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "did you mean tp2?" in str(refusal(file="tp22"))
    assert "No such file" in str(refusal(file=tmp_path / "none.yaml"))
    assert "Is a directory" in str(refusal(file=tmp_path))
    assert "must be a mapping" in str(refusal(file=write(tmp_path, "- a\n")))
    assert "my.yaml:2" in str(refusal(file=write(tmp_path, "cache:\n  a: 1\n  a: 2\n"))).replace(
        "my.yaml:3", "my.yaml:2"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("parallel: {tensor: 2}")
    assert "for the file write ./mine" in str(refusal(file="mine"))
    assert load_config("./mine", environ={}).config.parallel.tensor == 2
    assert load_config(Path("mine"), environ={}).config.parallel.tensor == 2
    assert load_config(write(tmp_path, "cache:\n"), environ={}).config == ShoalConfig()


def test_keywords_are_those_vllm_users_know() -> None:
    keywords = {
        "model": "demo",
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
        "seed": 1,
        "dtype": "float32",
    }
    config = load_config(keywords=keywords, environ={}).config
    assert (config.model.path, config.model.dtype) == ("demo", "float32")
    assert config.parallel.tensor == 2 and config.parallel.expert and config.runtime.seed == 1
    assert "did you mean max_model_len" in str(refusal(keywords={"max_modellen": 3}))


def test_a_hang_is_not_shorter_than_the_time_between_two_signs_of_life() -> None:
    assert load_config(None, {"launcher.hang_timeout_s": 1.5}, environ={}).config.launcher.hang_timeout_s == 1.5
    assert "1.5" in str(refusal(overrides={"launcher.hang_timeout_s": 1.0}))


def test_bad_default_sampling_is_refused_with_its_change() -> None:
    resolved = load_config(None, {"sampling.n": 2}, environ={})
    with pytest.raises(ConfigError, match="must be 1 with temperature = 0"):
        resolved.sampling_params(temperature=0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"launcher.address": "10.0.0.1:6379", "launcher.kind": "local"},
            "is about Ray clusters, and launcher.kind is",
        ),
        ({"launcher.ray_auth": "off"}, "is about Ray clusters, and launcher.kind is auto"),
        ({"launcher.kind": "ray", "launcher.address": "10.0.0.1"}, "must be auto, local, or host:port"),
        ({"launcher.attach": "prod", "parallel.tensor": 2}, "runs already with settings of its own"),
        ({"launcher.attach": "prod", "model.quantization": "int8"}, "runs already with settings of its own"),
        ({"launcher.attach": "prod", "runtime.deterministic": True}, "runs already with settings of its own"),
        ({"launcher.attach": "prod", "launcher.routing": "round_robin"}, "runs already with settings of its own"),
        ({"launcher.attach": "prod", "launcher.kind": "local"}, "starts nothing"),
    ],
)
def test_settings_of_ray_that_could_not_take_effect_are_refused(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(None, overrides)
    assert message in str(refusal.value)


def test_address_of_a_detached_model_needs_no_launcher() -> None:
    config = load_config(None, {"launcher.attach": "prod", "launcher.address": "10.0.0.1:6379"}).config
    assert config.launcher.attach == "prod"
