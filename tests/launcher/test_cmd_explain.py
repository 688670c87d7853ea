"""`shoal explain` tells what would run, exactly, and starts nothing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.configs.model_path import resolve_model_path
from shoal.configs.schema import ParallelConfig
from shoal.model.checkpoint import Checkpoint, load_parameters
from shoal.model.families import load_spec
from shoal.model.kv_layout import kv_bytes_per_block
from shoal.model.memory_estimate import weights_bytes
from shoal.model.shard import shard_model


def explain(*args: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "shoal", "explain", "demo", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def explained(*args: str) -> dict[str, Any]:
    done = explain("--json", *args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def covers(ranges: list[list[int]], size: int) -> bool:
    """Whether half-open ranges tile [0, size) in order."""
    stops = [0, *(stop for _, stop in ranges)]
    return all(start == before for before, (start, _) in zip(stops, ranges, strict=False)) and stops[-1] == size


def test_every_layer_head_column_and_row_is_held_once() -> None:
    found = explained("-tp", "3", "-pp", "2")
    with open("shoal/demo/config.json") as file:
        config = json.load(file)
    first = [rank for rank in found["ranks"] if rank["pp_rank"] == 0]
    assert len(found["ranks"]) == 6
    assert covers([rank["heads"][0] for rank in first], config["num_attention_heads"])
    assert covers([rank["columns"][0] for rank in first], config["intermediate_size"])
    assert covers([rank["vocab"] for rank in first], config["vocab_size"])
    assert covers([rank["layers"] for rank in found["ranks"] if rank["tp_rank"] == 0], config["num_hidden_layers"])
    assert [rank["embedding"] for rank in found["ranks"]] == [True] * 3 + [False] * 3


def test_one_rank_holds_exactly_the_checkpoints_weights() -> None:
    found = explained("--dtype", "float32", "-tp", "2")
    folder = resolve_model_path("demo")
    spec, family = load_spec(folder)
    with Checkpoint(folder) as checkpoint:
        for report, shard in zip(found["reports"], shard_model(spec, ParallelConfig(tensor=2)), strict=True):
            weights = load_parameters(checkpoint, family, spec, shard, torch.float32, "cpu")
            assert report["weights_bytes"] == sum(tensor.numel() * 4 for tensor in weights.values())


def test_quantised_weights_are_counted_as_they_will_be() -> None:
    found = explained("--quantization", "int4", "-tp", "2")
    plain = explained("--dtype", "float32", "-tp", "2")
    spec, family = load_spec(resolve_model_path("demo"))
    shards = shard_model(spec, ParallelConfig(tensor=2), "int4")
    with Checkpoint(resolve_model_path("demo")) as checkpoint:
        for report, before, shard in zip(found["reports"], plain["reports"], shards, strict=True):
            weights = load_parameters(checkpoint, family, spec, shard, torch.float32, "cpu")
            assert report["weights_bytes"] == sum(weight.nbytes for weight in weights.values())
            assert report["weights_bytes"] < 0.5 * before["weights_bytes"]


def test_on_gpus_quantised_weights_are_counted_in_the_order_they_have_there() -> None:
    found = explained("--quantization", "int8", "--device", "cuda")
    [shard] = shard_model(load_spec(resolve_model_path("demo"))[0], ParallelConfig(), "int8")
    expected = weights_bytes(load_spec(resolve_model_path("demo"))[0], shard, 4, "cuda")
    assert [report["weights_bytes"] for report in found["reports"]] == [expected]


def test_an_fp8_cache_holds_as_many_tokens_in_a_quarter_of_the_bytes() -> None:
    [report] = explained("--dtype", "float32", "--kv-cache-dtype", "fp8")["reports"]
    spec, _ = load_spec(resolve_model_path("demo"))
    assert [4 * size for size in report["block_bytes"]] == kv_bytes_per_block(
        spec, shard_model(spec, ParallelConfig())[0], 16, 4
    )


def test_the_source_of_every_setting_is_named() -> None:
    found = explained("--config", "tp2_pp2", "--set", "cache.block_size=32", "--temperature", "0.5")
    sources = {key: source for key, _, source in found["settings"]}
    assert sources["parallel.tensor"].startswith("tp2_pp2.yaml:")
    assert sources["cache.block_size"] == sources["sampling.temperature"] == "command line"
    assert sources["cache.num_blocks"] == "default"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-tp", "99"], "parallel.tensor"),
        (["-pp", "99"], "parallel.pipeline"),
        (["--kv-cache-memory-bytes", "64KiB"], "lower model.max_model_len to"),
        (["--max-model-len", "100000"], "max_model_len"),
        (["-tp", "2", "--enable-expert-parallel"], "parallel.expert = true has nothing to divide"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_number_to_change(args: list[str], message: str) -> None:
    done = explain(*args)
    assert done.returncode == 2
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_without_weights_is_explained_with_a_warning(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(resolve_model_path("demo") / name, tmp_path)
    command = [sys.executable, "-m", "shoal", "explain", str(tmp_path), "--served-model-name", "mine"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "a start would refuse the weights" in done.stdout
    assert done.stdout.startswith("mine: llama")


def test_the_text_shows_layout_and_ledger() -> None:
    text = explain("-tp", "2").stdout
    assert "Who holds what" in text
    assert "largest context x concurrency" in text
    assert "Speed, at most" in text
    assert "of this host, measured now" in text


def test_speed_is_told_for_the_device_that_would_run() -> None:
    rates = explained("--dtype", "float32", "--max-num-seqs", "8")["rates"]
    assert rates["limits"]["source"].endswith("measured now")
    assert [row["load"] for row in rates["rows"]] == [
        "1 stream, 512 tokens each",
        "8 streams, 512 tokens each",
        "prompts of 512 tokens",
    ]
    assert all(row["tokens_per_s"] > 0 for row in rates["rows"])
    assert "4 times that for int8 weights" in explained("--quantization", "int8")["rates"]["limits"]["source"]


def test_cards_that_are_not_here_are_planned_for_by_their_data_sheet() -> None:
    found = explained("--gpu", "h100", "-tp", "2")
    assert found["plan"]["num_blocks"][0] > 0
    assert found["rates"]["limits"]["read_bytes_per_s"] == 3.35e12
    assert found["rates"]["limits"]["flops_per_s"] == 67e12  # the demo is float32
    assert "on cuda" in found["notes"][0]
    assert explained("--device", "cuda")["rates"] is None
    shared = explained("--gpu", "h100", "-tp", "2", "--ranks-per-device", "2")
    assert len(shared["notes"]) == 1, "no card is seen that is not there"


def test_what_does_not_fit_has_no_speed() -> None:
    done = explain("--kv-cache-memory-bytes", "64KiB")
    assert done.returncode == 2 and "Speed" not in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--gpu", "h1000"], "did you mean h100?"),
        (["--gpu", "l4", "--device", "cpu"], "leave one of them out"),
    ],
)
def test_a_card_that_cannot_be_planned_for_is_refused(args: list[str], message: str) -> None:
    done = explain(*args)
    assert done.returncode == 2
    assert message in " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in done.stderr


def test_what_a_cluster_may_settle_otherwise_is_said() -> None:
    assert "the hosts that Ray gives" in explained("--launcher", "ray", "-tp", "2")["notes"][1]
    assert len(explained("-tp", "2")["notes"]) == 1
