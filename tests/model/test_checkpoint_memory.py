"""Loading a checkpoint of 40 MB in a process of its own: how many bytes are read, how much memory is taken."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.model.families import load_spec
from tests.model.raw_safetensors import entry, write

MEASURE = """
import json, os, sys, torch
from shoal.configs.schema import ParallelConfig
from shoal.model.checkpoint import Checkpoint, load_parameters
from shoal.model.families import load_spec
from shoal.model.shard import shard_model

def kib(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

spec, family = load_spec(sys.argv[1])
results = []
layouts = [(tp, pp, torch.bfloat16) for tp in (1, 2, 3, 4) for pp in (1, 2)] + [(tp, 1, torch.float32) for tp in (1, 3)]
for tp, pp, dtype in layouts:
    for shard in shard_model(spec, ParallelConfig(tensor=tp, pipeline=pp)):
        for attempt in range(1 if results else 2):  # the first load warms up what torch sets up once
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
            before = kib("VmRSS")
            with Checkpoint(sys.argv[1]) as checkpoint:
                tensors = load_parameters(checkpoint, family, spec, shard, dtype, "cpu")
                read = checkpoint.bytes_read
            peak = kib("VmHWM") - before
            elements = sum(tensor.numel() for tensor in tensors.values())
            del tensors
        name = f"TP{tp} PP{pp} {dtype} tensor rank {shard.tp_rank} stage {shard.pp_rank}"
        results.append([name, peak * 1024, read, elements, dtype.itemsize])
print(json.dumps(results))
"""


def test_every_shard_reads_its_bytes_and_needs_its_memory(tmp_path: Path) -> None:
    """At most 1.02 times the shard is read, headers included; peak memory is at most the shard and the largest
    tensor.
    """
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 12000,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec, family = load_spec(tmp_path)
    header: dict[str, Any] = {}
    end = 0
    for source in family.sources(spec, ()).values():
        size = 4 * torch.Size(source.shape).numel()
        header[source.tensor] = entry("F32", list(source.shape), end, end + size)
        end += size
    largest = max(value["data_offsets"][1] - value["data_offsets"][0] for value in header.values())
    write(tmp_path / "model.safetensors", header, torch.randn(end // 4).numpy().tobytes())
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )
    if "PermissionError" in done.stderr:
        pytest.skip("the kernel does not let a process reset its peak memory")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results) == (1 + 2 + 3 + 4) * 3 + 1 + 3
    for name, peak, read, elements, itemsize in results:
        assert read <= 1.02 * 4 * elements, f"{name}: {read} bytes read for a shard of {4 * elements}"
        assert peak <= itemsize * elements + largest, f"{name}: peak {peak}, shard {itemsize * elements}, {largest}"
