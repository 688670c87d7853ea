"""`ray job submit`: from a checkout, and with a wheel, installed or as the zip archive it is; exit status, log."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import ROOT, joined_hosts
from tests.cluster.ray_hosts import RayHosts
from tests.wheels import build_wheel

pytest.importorskip("ray")
VERSION = "0.1.0+job"
GENERATE = ["--", "python", "-m", "shoal", "generate", "demo", "--config", "ray_tp2", "-p", "def main("]
LENGTH = ["--max-tokens", "12", "--temperature", "0"]
ASK_VERSION = ["--", "python", "-c", "from shoal.configs.version import VERSION; print('version', VERSION)"]
REFUSED = ["-tp", "4", "-pp", "2", "-dp", "8"]


@pytest.fixture(scope="module")
def node() -> Iterator[RayHosts]:
    with joined_hosts(1) as hosts:
        yield RayHosts(hosts, cpus=[4], jobs=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"), VERSION)


@pytest.fixture(scope="module")
def expected() -> str:
    """What one process says."""
    command = [sys.executable, "-m", "shoal", "generate", "demo", "-p", "def main(", *LENGTH]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def submitting(way: str, wheel: Path, folder: Path) -> list[str]:
    """Options of `ray job submit`, as docs/cluster.md gives them."""
    if way == "checkout":
        return ["--working-dir", str(ROOT)]
    if way == "wheel":
        shutil.copy(wheel, folder)
        pip = {
            "packages": ["${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/" + wheel.name],
            "pip_install_options": ["--no-deps"],
        }
        return ["--working-dir", str(folder), "--runtime-env-json", json.dumps({"pip": pip})]
    shutil.copy(wheel, folder / "shoal.zip")
    return ["--working-dir", str(folder / "shoal.zip")]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", ["checkout", "wheel", "zip"])
def test_job_exits_and_logs_as_the_command_does(
    node: RayHosts, wheel: Path, tmp_path: Path, expected: str, way: str
) -> None:
    options = submitting(way, wheel, tmp_path)
    status, log = node.job(*options, *GENERATE, *LENGTH)
    assert status == 0, log
    assert expected in log
    assert "tensor 2 x pipeline 1 x data 1 = 2 ranks" in log
    status, log = node.job(*options, *ASK_VERSION)
    assert status == 0
    assert (f"version {VERSION}" in log) == (way != "checkout"), log
    status, log = node.job(*options, *GENERATE, *REFUSED)
    assert status == 1
    assert "shoal: " in log and "= 64 CPUs" in log and "4 of its 4 CPUs are free" in log
    assert "Traceback" not in log
