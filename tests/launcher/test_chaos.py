"""The fault drill: reproducible from its seed, every stream compared, and a report that would show a loss."""

import json
import os
from pathlib import Path

import msgspec
import pytest

from shoal.configs.schema import RuntimeConfig
from shoal.launcher.chaos_drill import Drill
from shoal.launcher.chaos_plan import KINDS, LoadShape, plan_faults, plan_requests
from shoal.launcher.chaos_report import ChaosReport, report_rows
from shoal.launcher.cli import main
from shoal.launcher.cmd_chaos import read_kinds
from shoal.launcher.fake_replica import VOCAB_SIZE, FakeReplica
from shoal.launcher.processes import signal_ours
from shoal.launcher.vitals import read_vitals
from tests.launcher.controllers import fakes, settings
from tests.launcher.harness import run

SHAPE = LoadShape(pool=40, max_output=60, vocab_size=VOCAB_SIZE)
TEXTS = dict.fromkeys(("commit", "layout", "model", "dtype"), "")
PASSED = {**TEXTS, "deterministic": True, "idle_blocks_free": True, "errors": [], "faults": [], "samples": []}


def test_a_plan_follows_from_its_seed() -> None:
    faults = plan_faults(7, 50, 2, 4, KINDS, 1.0)
    assert faults == plan_faults(7, 50, 2, 4, KINDS, 1.0) != plan_faults(8, 50, 2, 4, KINDS, 1.0)
    assert {fault.kind for fault in faults} == set(KINDS) and {fault.replica for fault in faults} == {0, 1}
    assert plan_requests(7, SHAPE) == plan_requests(7, SHAPE) != plan_requests(8, SHAPE)


@pytest.mark.parametrize("replicas", [1, 2])
def test_five_kills_under_three_hundred_requests_lose_and_change_nothing(replicas: int) -> None:
    async def body() -> None:
        config = msgspec.structs.replace(settings(), runtime=RuntimeConfig(seed=1))
        async with fakes(replicas, step_s=0.001, config=config) as (controller, _):
            drill = Drill(controller, plan_requests(3, SHAPE), streams=12)
            await drill.run(plan_faults(3, 5, replicas, 1, ("kill rank",), 0.05), requests=300)
            assert drill.completed >= 300 and drill.equal == drill.completed and not drill.errors
            assert drill.hit >= 5 and drill.lost == 0
            assert [outcome.skipped for outcome in drill.faults] == [""] * 5
            assert all(outcome.decoding and outcome.recovered_s is not None for outcome in drill.faults)
            assert drill.faults[0].cause == "rank 0: killed by SIGKILL"
            assert await drill.blocks_are_free()

    run(body())


def test_a_stream_that_changes_is_counted() -> None:
    async def body() -> None:
        async with fakes(1, step_s=0.001) as (controller, factory):
            make = factory.__call__

            async def another_model(number: int) -> FakeReplica:
                replica = await make(number)
                replica.executor.ranks.model.vocab_size = 99
                return replica

            controller._slots[0]._factory = another_model
            drill = Drill(controller, plan_requests(3, SHAPE), streams=4)
            await drill.run(plan_faults(3, 1, 1, 1, ("kill rank",), 0.01), requests=20)
            assert drill.diverged > 0 and drill.diverged_hit > 0

    run(body())


def test_a_drill_in_which_no_fault_could_be_done_is_not_passed() -> None:
    async def body() -> None:
        async with fakes(1, step_s=0.001) as (controller, _):
            drill = Drill(controller, plan_requests(3, SHAPE), streams=4)
            await drill.run(plan_faults(3, 1, 1, 1, ("lose host",), 0.01), requests=20)
            assert [outcome.skipped for outcome in drill.faults] == ["hosts cannot be lost here"]
            report = msgspec.convert({**dict.fromkeys(ChaosReport.__struct_fields__, 0), **PASSED}, ChaosReport)
            assert report.passed
            report.faults = drill.faults
            assert not report.passed

    run(body())


def test_kinds_are_read_from_text_and_mistakes_are_named() -> None:
    assert read_kinds("kill-rank,stop-engine,lose-host") == ("kill rank", "stop engine", "lose host")
    with pytest.raises(ValueError, match="there is no fault 'melt'"):
        read_kinds("kill-rank,melt")


def test_vitals_count_this_process() -> None:
    vitals = read_vitals()
    assert vitals.processes >= 1 and vitals.threads >= 1 and vitals.descriptors > 2
    assert vitals.memory_bytes > 1 << 20


def test_what_cannot_be_drilled_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chaos", "demo", "--config", "dp2", "--faults", "lose-host"]) == 2
    assert "only launcher.kind = ray has several hosts" in capsys.readouterr().err
    assert main(["chaos", "demo", "--attach", "prod"]) == 2
    assert "launcher.attach = prod: a drill hurts replicas of its own" in capsys.readouterr().err


def test_only_processes_of_this_project_are_signalled() -> None:
    assert not signal_ours(os.getpid(), 0) and not signal_ours(1 << 30, 0)


@pytest.mark.slow
def test_the_demo_model_survives_kills_on_two_replicas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    load = ["--count", "2", "--pause", "0.5", "--streams", "4", "--pool", "6", "--max-output", "48"]
    limits = ["--deterministic", "--num-blocks", "256", "--max-model-len", "256", "--seed", "7"]
    faults = ["--faults", "kill-rank,kill-engine", "--json", str(file)]
    assert main(["chaos", "demo", "--config", "dp2", *load, *limits, *faults]) == 0
    report = msgspec.json.decode(file.read_bytes(), type=ChaosReport)
    assert report.passed and report.hit and report.equal == report.completed and report.seed == 7
    assert len(json.loads(file.read_text())["faults"]) == 2
    assert dict(report_rows(report))["lost"] == "0" and "hit" in capsys.readouterr().out
