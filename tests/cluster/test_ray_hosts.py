"""Ray on three hosts, rehearsed in network namespaces: tensor groups inside a host, stages across, replicas spread."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import joined_hosts
from tests.cluster.ray_hosts import RayHosts

pytest.importorskip("ray")
PROMPTS = ["def main(", "import os", "class A", "for i in"]
LENGTH = ["--max-tokens", "16", "--temperature", "0"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    return path


def alone(prompts: Path, output: Path, *flags: str) -> list[list[int]]:
    """Tokens of one process."""
    command = [sys.executable, "-m", "shoal", "generate", "demo", "--prompts", str(prompts), "--output", str(output)]
    subprocess.run([*command, *(flags or LENGTH)], check=True, capture_output=True, timeout=600)
    return tokens(output)


def tokens(path: Path) -> list[list[int]]:
    return [json.loads(line)["token_ids"] for line in path.read_text().splitlines()]


@pytest.fixture
def two_nodes() -> Iterator[RayHosts]:
    with joined_hosts(2) as hosts:
        yield RayHosts(hosts, cpus=[1, 1])


@pytest.mark.timeout(400)
def test_stages_on_two_nodes_give_the_tokens_of_one_process(two_nodes: RayHosts, prompts: Path, tmp_path: Path) -> None:
    flags = ["--launcher", "ray", "--ray-address", two_nodes.address, "-pp", "2"]
    output = tmp_path / "ray.jsonl"
    two_nodes.run_shoal("generate", "demo", "--prompts", str(prompts), "--output", str(output), *LENGTH, *flags)
    assert tokens(output) == alone(prompts, tmp_path / "alone.jsonl")
    refused = two_nodes.shoal("generate", "demo", "-p", "x", *flags, "-tp", "2")
    _, errors = refused.communicate(timeout=100)
    assert refused.returncode == 2
    assert "= 4 CPUs" in errors and "2 of its 2 CPUs are free" in errors


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("cpus", [[4, 2, 2], [2, 2, 2, 2]], ids=["one_replica_split", "both_replicas_split"])
def test_all_axes_on_several_nodes_give_the_tokens_of_one_process(
    cpus: list[int], prompts: Path, tmp_path: Path
) -> None:
    """Tensor 2 inside a host, pipeline 2 across hosts, data 2. On three hosts one has room for a whole replica, which
    shares memory there; on four the stages of both are apart.
    """
    output = tmp_path / "ray.jsonl"
    with joined_hosts(len(cpus)) as hosts:
        cluster = RayHosts(hosts, cpus)
        command = ["generate", "demo", "--prompts", str(prompts), "--output", str(output), *LENGTH]
        cluster.run_shoal(*command, "--config", "ray_tp2_pp2_dp2", "--ray-address", cluster.address)
    assert tokens(output) == alone(prompts, tmp_path / "alone.jsonl")
