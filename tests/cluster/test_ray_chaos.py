"""Fault drills over Ray, small: processes on other hosts are reached, and every failure is named with its host."""

from pathlib import Path

import msgspec
import pytest

from shoal.launcher.chaos_report import ChaosReport
from tests.cluster.ray_chaos import chaos_over_ray

pytest.importorskip("ray")
LOAD = ["--pause", "0.5", "--streams", "6", "--pool", "8", "--max-output", "64", "--seed", "7"]


def drilled(cpus: list[int], arguments: list[str], folder: Path) -> ChaosReport:
    file = folder / "report.json"
    assert chaos_over_ray(cpus, [*arguments, *LOAD], file)
    report = msgspec.json.decode(file.read_bytes(), type=ChaosReport)
    assert report.hit and report.lost == 0 and report.equal == report.completed
    assert all(not outcome.skipped and "10.77." in outcome.cause for outcome in report.faults), report.faults
    return report


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_killed_and_stopped_processes_on_other_hosts_lose_nothing(tmp_path: Path) -> None:
    """The stages of each replica are on two hosts."""
    faults = ["--count", "5", "--faults", "kill-rank,kill-engine,stop-rank", "--hang-timeout-s", "4"]
    report = drilled([1, 1, 1, 1], ["-pp", "2", "-dp", "2", *faults], tmp_path)
    assert {outcome.fault.rank for outcome in report.faults} == {0, 1}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_lost_nodes_lose_nothing(tmp_path: Path) -> None:
    """One killed, one cut off, each with a replica of its own; the third takes over."""
    report = drilled([0, 2, 2, 2], ["-tp", "2", "-dp", "2", "--count", "2", "--faults", "lose-host"], tmp_path)
    assert len(report.faults) == 2
