"""Launches by torchrun: world rank 0 is the front end, the others ranks; nothing outlives torchrun."""

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.launcher.harness import TAG, processes_tagged, wait_until

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("torchrun_script.py")
TIMEOUT_S = 150.0


def start(layout: tuple[int, int, int], how: str, *options: str) -> tuple[subprocess.Popen[str], str]:
    """torchrun with as many processes as the layout has ranks; returns it and its processes' tag."""
    tag, (tensor, pipeline, data) = uuid.uuid4().hex, layout
    sizes = [str(size) for size in layout]
    command = [
        "torch.distributed.run",
        "--nproc-per-node",
        str(tensor * pipeline * data),
        *options,
        str(SCRIPT),
        str(ROOT),
    ]
    torchrun = subprocess.Popen(
        [sys.executable, "-m", *command, *sizes, how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, TAG: tag},
    )
    return torchrun, tag


def serve_and_end(layout: tuple[int, int, int], how: str = "ends") -> None:
    """A launch that ends in order: only world rank 0 prints, and nothing is left."""
    torchrun, tag = start(layout, how)
    output, errors = torchrun.communicate(timeout=TIMEOUT_S)
    assert torchrun.returncode == 0, errors
    assert output == f"serving {layout[2]}\n"
    wait_until(lambda: processes_tagged(tag) == [], "everything to end", 3.0)


def test_two_replicas_of_two_ranks_serve_and_nothing_outlives_a_killed_torchrun() -> None:
    torchrun, tag = start((1, 2, 2), "waits")
    assert torchrun.stdout is not None and torchrun.stderr is not None
    line = torchrun.stdout.readline()
    assert line == "serving 2\n", torchrun.stderr.read()
    names = [name for name, _ in processes_tagged(tag) if name.startswith("shoal")]
    engines = ["shoal-engine-0", "shoal-engine-1"]
    assert names == [*engines, "shoal-rank-0", "shoal-rank-0", "shoal-zygote", "shoal-zygote"]
    torchrun.send_signal(signal.SIGKILL)
    torchrun.communicate(timeout=20)
    wait_until(lambda: processes_tagged(tag) == [], "everything to end", 3.0 + 3.0)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(2, 2, 1), (2, 1, 2), (1, 1, 2)])
def test_a_launch_ends_in_order_and_only_the_front_end_prints(layout: tuple[int, int, int]) -> None:
    serve_and_end(layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(2, 2, 1), (1, 2, 2)], ids=["one replica on two", "a replica on each"])
def test_hosts_of_their_own_are_joined_over_tcp(layout: tuple[int, int, int]) -> None:
    serve_and_end(layout, "hosts")


@pytest.mark.slow
def test_a_restarted_attempt_starts_from_nothing_of_the_first() -> None:
    torchrun, tag = start((1, 2, 1), "restarts", "--max-restarts", "1")
    output, errors = torchrun.communicate(timeout=TIMEOUT_S)
    assert torchrun.returncode == 0, errors
    assert output == "serving 1\n"
    wait_until(lambda: processes_tagged(tag) == [], "everything to end", 3.0 + 3.0)


@pytest.mark.slow
def test_a_process_with_other_settings_is_named() -> None:
    torchrun, tag = start((2, 2, 1), "differs")
    _, errors = torchrun.communicate(timeout=TIMEOUT_S)
    assert torchrun.returncode != 0
    assert "world rank 2 was given other settings or another model than world rank 0" in errors
    wait_until(lambda: processes_tagged(tag) == [], "everything to end", 3.0 + 3.0)


@pytest.mark.slow
def test_a_terminated_torchrun_leaves_nothing() -> None:
    torchrun, tag = start((2, 2, 1), "waits")
    assert torchrun.stdout is not None and torchrun.stderr is not None
    assert torchrun.stdout.readline() == "serving 1\n"
    torchrun.send_signal(signal.SIGTERM)
    torchrun.communicate(timeout=30)
    wait_until(lambda: processes_tagged(tag) == [], "everything to end", 3.0 + 3.0)


def test_a_world_of_the_wrong_size_is_refused_with_both_numbers() -> None:
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}
    world = {**variables, "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "test"}
    done = subprocess.run(
        [sys.executable, "-m", "shoal", "generate", "demo", "-tp", "2", "-pp", "2", "-p", "x"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, **world},
    )
    assert done.returncode == 2
    assert "torchrun started 3 processes" in done.stderr and "has 4 ranks" in done.stderr.replace("\n", " ")
    assert "--nproc-per-node" in done.stderr
