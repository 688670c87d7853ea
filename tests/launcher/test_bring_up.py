"""start_engine: who starts the ranks, what is refused before anything is spawned, and one rank in this process."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

import shoal.demo
from shoal.configs.loader import load_config
from shoal.configs.schema import LauncherConfig, ParallelConfig, RuntimeConfig, ShoalConfig
from shoal.engine.messages import Request
from shoal.kernels import build
from shoal.launcher.bring_up import start_engine
from shoal.launcher.cli import main
from shoal.launcher.idle_settings import check_idle
from shoal.launcher.kinds import choose_launcher, is_follower
from shoal.launcher.local_start import cores_of_ranks
from tests.launcher.harness import collect

DEMO = Path(shoal.demo.__file__).parent
VARIABLES = ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
TORCHRUN = {**dict.fromkeys(VARIABLES, "1"), "RANK": "1"}


@pytest.mark.parametrize(
    ("kind", "tensor", "environ", "expected"),
    [
        ("auto", 1, {}, "inprocess"),
        ("auto", 2, {}, "local"),
        ("auto", 2, TORCHRUN, "torchrun"),
        ("local", 1, {}, "local"),
        ("local", 2, TORCHRUN, "local"),
        ("auto", 2, {"RANK": "0", "WORLD_SIZE": "2"}, "local"),
    ],
)
def test_the_launcher_follows_settings_then_torchrun_then_the_layout(
    kind: Any, tensor: int, environ: dict[str, str], expected: str
) -> None:
    config = ShoalConfig(parallel=ParallelConfig(tensor=tensor), launcher=LauncherConfig(kind=kind))
    assert choose_launcher(config, environ) == expected
    assert is_follower(config, environ) == (expected == "torchrun")
    assert not is_follower(config, {**environ, "RANK": "0"})


@pytest.mark.parametrize(
    ("tensor", "data", "threads", "pinned", "expected"),
    [
        (2, 1, 1, True, [(1,), (3,)]),
        (2, 1, 2, True, [(1, 3), (5, 7)]),
        (2, 2, 1, True, [(1,), (3,), (5,), (7,)]),
        (2, 2, 2, True, []),  # not enough cores
        (1, 2, 1, True, []),  # nobody waits for another
        (2, 1, 1, False, []),
    ],
)
def test_tensor_ranks_keep_to_cores_of_their_own_where_there_are_enough(
    tensor: int, data: int, threads: int, pinned: bool, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {7, 1, 5, 3})
    config = ShoalConfig(
        parallel=ParallelConfig(tensor=tensor, data=data),
        runtime=RuntimeConfig(device="cpu", threads=threads, pin_cores=pinned),
    )
    assert cores_of_ranks(config) == expected


@pytest.mark.parametrize(
    ("micro_batches", "data", "expected"),
    [
        (1, 1, [(1,), (3,), (1,), (3,)]),  # two stages in turn on the same cores
        (1, 2, [(1,), (3,), (1,), (3,), (5,), (7,), (5,), (7,)]),
        (1, 3, []),
        (2, 1, [(1,), (3,), (5,), (7,)]),
        (2, 2, []),
    ],
)
def test_stages_that_take_turns_keep_to_the_same_cores(
    micro_batches: int, data: int, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {7, 1, 5, 3})
    config = ShoalConfig(
        parallel=ParallelConfig(tensor=2, pipeline=2, data=data, micro_batches=micro_batches),
        runtime=RuntimeConfig(device="cpu", threads=1),
    )
    assert cores_of_ranks(config) == expected


def test_a_missing_model_and_an_impossible_layout_are_refused_before_a_process_starts() -> None:
    with pytest.raises(ValueError, match=r"model\.path is not set"):
        asyncio.run(start_engine(load_config(), None))
    wide = load_config(keywords={"model": "demo", "tensor_parallel_size": 4000})
    with pytest.raises(ValueError, match="4000"):
        asyncio.run(start_engine(wide, DEMO))


@pytest.mark.parametrize(("level", "shown"), [("warning", True), ("error", False)])
def test_one_rank_reports_what_log_level_asks_for(
    level: str, shown: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(timeout_s: float) -> Any:
        raise build.NativeBuildError("no compiler")

    async def body() -> None:
        settings = {"model": "demo", "num_blocks": 64, "max_model_len": 128, "max_num_batched_tokens": 64}
        engine = await start_engine(load_config(keywords={**settings, "log_level": level}), DEMO)
        await engine.client.close()

    monkeypatch.setattr(build, "_build", no_compiler)
    for name, value in (("warned", False), ("library", None), ("made", False)):
        monkeypatch.setattr(build._Choice, name, value)  # this process's choice is put back afterwards
    logger = logging.getLogger("shoal")
    monkeypatch.setattr(logger, "level", logger.level)  # put back afterwards
    asyncio.run(body())
    assert ("no compiler" in caplog.text) == shown


def test_one_rank_runs_in_this_process_and_reports_its_choices() -> None:
    async def body() -> None:
        settings = {"model": "demo", "num_blocks": 64, "max_model_len": 128, "max_num_batched_tokens": 64}
        resolved = load_config(keywords=settings)
        engine = await start_engine(resolved, DEMO)
        try:
            sampling = resolved.sampling_params(temperature=0.0, max_tokens=4)
            tokens, last = await collect(
                engine.client.submit(Request(request_id="a", prompt_token_ids=[5, 6, 7], sampling=sampling))
            )
            assert len(tokens) == 4 and last.finish_reason == "length"
            assert engine.max_model_len == 128 and engine.vocab_size > 256
            assert engine.report.startswith("tensor 1 x pipeline 1 x data 1 = 1 rank on ")
            assert "64 blocks x 16 tokens" in engine.report
        finally:
            await engine.client.close()

    asyncio.run(body())


def test_settings_of_the_controller_are_said_to_be_idle_in_process(caplog: pytest.LogCaptureFixture) -> None:
    async def start_and_close() -> None:
        resolved = load_config(keywords={"max_restarts": 1, "routing": "round_robin"})
        await (await start_engine(resolved, DEMO)).client.close()

    asyncio.run(start_and_close())
    assert "launcher.routing, launcher.max_restarts: no effect here: one rank" in caplog.text


@pytest.mark.parametrize(
    ("command", "setting", "why"),
    [
        (["generate", "-p", "x"], "controller_grace_s", "detached models, which `shoal up` starts"),
        (["generate", "-p", "x"], "lease_s", "detached models, which `shoal up` starts"),
        (["bench", "latency"], "drain_timeout_s", "waits for what runs when it is told to end"),
    ],
)
def test_settings_a_command_cannot_use_are_refused_and_warned_of_in_files(
    command: list[str],
    setting: str,
    why: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert main([*command, "--model", "demo", f"--{setting.replace('_', '-')}", "5"]) == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert f"launcher.{setting} = 5" in shown and "would not be used" in shown and why in shown
    file = tmp_path / "settings.yaml"
    file.write_text(f"launcher:\n  {setting}: 5\n")
    resolved = load_config(file)
    check_idle(resolved, [f"launcher.{setting}"], why)
    assert f"launcher.{setting}: no effect here: {why}" in caplog.text
