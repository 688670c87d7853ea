"""How long the machine's limits are measured for."""

import pytest
import torch

from shoal.launcher import machine


@pytest.mark.parametrize(("takes_s", "runs"), [(0.01, 60), (0.25, 3), (1.0, 3), (5.0, 1)])
def test_slow_work_is_measured_few_times(takes_s: float, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])

    def work() -> None:
        now[0] += takes_s

    best = machine.best_seconds(work, torch.device("cpu"), 0.6)
    assert best == pytest.approx(takes_s) and abs(round(now[0] / takes_s) - runs) <= 1
