"""A model that stays on a cluster: up, attached front ends, scaling, the controller's death, down."""

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import joined_hosts
from tests.cluster.ray_hosts import RayHosts, named, wait_for
from tests.cluster.test_ray_hosts import LENGTH, alone, tokens

pytest.importorskip("ray")
SHOAL = [sys.executable, "-m", "shoal"]
LONG = ["--max-tokens", "800", "--ignore-eos", "--temperature", "0"]


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where detached controllers keep their journals."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def node(state: Path) -> Iterator[RayHosts]:
    with joined_hosts(1) as hosts:
        yield RayHosts(hosts, cpus=[4])


def back(node: RayHosts, pid: int) -> bool:
    """Whether another process than this is the controller, and serves."""
    asked = node.shoal("status", "prod", "--ray-address", node.address, "--json")
    output, _ = asked.communicate(timeout=60.0)
    status = json.loads(output) if asked.returncode == 0 else {"pid": pid}  # between two lives nobody answers
    return status["pid"] != pid and status["state"] == "serving"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_up_that_is_interrupted_leaves_nothing(state: Path, node: RayHosts, number: int) -> None:
    up = node.shoal("up", "demo", "--name", "prod", "-tp", "2", "--ray-address", node.address)
    wait_for(lambda: named(node.hosts[0], "ray::Crew") != [] or up.poll() is not None, "a crew", 100.0)
    assert up.poll() is None
    up.send_signal(number)
    _, errors = up.communicate(timeout=60)
    assert up.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[signal.Signals(number)], errors
    wait_for(lambda: named(node.hosts[0], "^shoal-|shoal.launcher.zygote|ray::Crew") == [], "all to end", 20.0)
    assert list(state.glob("shoal/detached/*")) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_detached_model_serves_scales_survives_its_controller_and_goes_down(
    state: Path, node: RayHosts, tmp_path: Path
) -> None:
    at = ["--ray-address", node.address]
    prompts, output = tmp_path / "prompts.txt", tmp_path / "attached.jsonl"
    prompts.write_text("".join(f"def f{number}(x):\n" for number in range(24)))
    expected = alone(prompts, tmp_path / "alone.jsonl", *LONG)
    node.run_shoal("up", "demo", "--name", "prod", "-tp", "2", *at)
    taken = node.shoal("up", "demo", "--name", "prod", "-tp", "2", *at)
    _, errors = taken.communicate(timeout=100)
    assert taken.returncode == 2 and "is up already" in errors

    stranger = node.hosts[0].start([*SHOAL, "status", "prod", *at], {**node.env, "RAY_AUTH_TOKEN": "00" * 32})
    _, errors = stranger.communicate(timeout=100)
    assert stranger.returncode == 2 and "the token that was found is not the one of the cluster" in errors

    ranks, pid = named(node.hosts[0], "^shoal-rank-"), node.status("prod")["pid"]
    load = node.shoal(
        *["generate", "demo", "--attach", "prod", "--prompts", str(prompts), "--output", str(output), *LONG, *at]
    )
    errors_of_load: list[str] = []
    assert load.stderr is not None
    reader = threading.Thread(target=lambda: errors_of_load.append(load.stderr.read()), daemon=True)  # type: ignore[union-attr]
    reader.start()
    wait_for(lambda: node.status("prod")["controller"]["tokens"] > 0, "the first tokens", 100.0)
    os.kill(pid, signal.SIGKILL)
    assert load.wait(400) == 0, errors_of_load
    assert tokens(output) == expected
    assert named(node.hosts[0], "^shoal-rank-") == ranks, "the ranks held out"
    logs = node.run_shoal("logs", "prod", *at)
    assert re.search(r"the controller is back and finds replicas \[0\] of 1, and [1-9]\d* requests under way", logs)
    assert [path.name for path in state.glob("shoal/detached/prod-*/*")] == ["journal"]

    node.run_shoal("scale", "prod", "--replicas", "2", *at)
    replicas = node.status("prod")["controller"]["replicas"]
    assert [replica["state"] for replica in replicas] == ["ready", "ready"]
    ranks, pid = named(node.hosts[0], "^shoal-rank-"), node.status("prod")["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: back(node, pid), "the controller to be back", 100.0)
    assert node.run_shoal("generate", "demo", "--attach", "prod", "-p", "def main(", *LENGTH, *at).strip()
    replicas = node.status("prod")["controller"]["replicas"]
    assert [(replica["state"], replica["restarts"]) for replica in replicas] == [("ready", 0)] * 2
    assert named(node.hosts[0], "^shoal-rank-") == ranks, "both replicas held out, as many as `scale` last said"

    too_many = node.shoal("scale", "prod", "--replicas", "3", *at)
    _, errors = too_many.communicate(timeout=100)
    assert too_many.returncode == 2 and "0 of its 4 CPUs are free" in errors
    node.run_shoal("scale", "prod", "--replicas", "1", *at)
    node.run_shoal("down", "prod", *at)
    assert list(state.glob("shoal/detached/*")) == []
    wait_for(lambda: named(node.hosts[0], "^shoal-") == [], "the model's processes to end", 20.0)
    gone = node.shoal("status", "prod", *at)
    _, errors = gone.communicate(timeout=100)
    assert gone.returncode == 2 and "up: none" in errors
