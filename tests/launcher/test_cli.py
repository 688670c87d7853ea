"""The command line's frame: parsing, exit statuses, and how failures look. Commands are replaced by small ones."""

import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from shoal.configs.checks import TORCHRUN_VARIABLES
from shoal.configs.resolved import ResolvedConfig
from shoal.engine.client import EngineError
from shoal.launcher.cli import main
from shoal.launcher.commands import COMMANDS

Run = Any


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ResolvedConfig]]:
    """What the commands were called with; they do nothing else."""
    calls: list[tuple[Any, ResolvedConfig]] = []
    for command in COMMANDS.values():
        install(monkeypatch, command.module, lambda args, resolved: calls.append((args, resolved)) or 0)
    return calls


def install(monkeypatch: pytest.MonkeyPatch, module: str, run: Run) -> None:
    """Let a command be this function."""
    stand_in = types.ModuleType(module)
    stand_in.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module, stand_in)


def settings_of(seen: list[tuple[Any, ResolvedConfig]], *arguments: str) -> ResolvedConfig:
    assert main(list(arguments)) == 0
    return seen[-1][1]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err


def test_flags_reach_the_settings(seen: list[tuple[Any, ResolvedConfig]]) -> None:
    line = "generate demo -p x -tp 2 -pp 2 --data-parallel-size 3 --tensor-weights 2,1 --pipeline-layers 3,4"
    line += " --kv-cache-memory-bytes 4GiB --enable-expert-parallel --no-enable-prefix-caching --seed 7"
    line += " --max-tokens null --temperature 1e-1 --stop a --stop 1 --stop-token-ids 1,2 --step-timeout-s 5"
    resolved = settings_of(seen, *line.split(), "--logit-bias", "{5: -1.5}", "--set", "cache.block_size=32")
    config = resolved.config
    assert (config.model.path, config.parallel.tensor, config.parallel.pipeline, config.parallel.data) == (
        "demo",
        2,
        2,
        3,
    )
    assert config.parallel.tensor_weights == [2.0, 1.0] and config.parallel.pipeline_layers == [3, 4]
    assert config.parallel.expert and not config.cache.enable_prefix_caching
    assert (config.cache.memory, config.cache.block_size, config.launcher.step_timeout_s) == (4 << 30, 32, 5.0)
    assert config.runtime.seed == 7
    assert config.sampling == {
        "max_tokens": None,
        "temperature": 0.1,
        "stop": ["a", "1"],
        "stop_token_ids": [1, 2],
        "logit_bias": {5: -1.5},
    }
    assert resolved.sources["cache.block_size"] == resolved.sources["parallel.data"] == "command line"


def test_command_line_goes_before_the_file(seen: list[tuple[Any, ResolvedConfig]], tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: {path: ./there}\nparallel: {tensor: 2, pipeline: 2}\n")
    resolved = settings_of(seen, "explain", "--config", str(file), "-tp", "1")
    assert (resolved.config.parallel.tensor, resolved.config.parallel.pipeline) == (1, 2)
    assert resolved.sources["model.path"] == "mine.yaml:1"
    assert settings_of(seen, "chat", "demo", "--config", "tp2_pp2").config.world_size == 4
    assert settings_of(seen, "doctor").config.model.path is None


def test_text_settings_are_taken_as_they_stand(seen: list[tuple[Any, ResolvedConfig]]) -> None:
    assert settings_of(seen, "chat", "123").config.model.path == "123"
    assert settings_of(seen, "chat", "--model", "null").config.model.path == "null"
    assert settings_of(seen, "chat", "a", "--set", "model.revision='007'").config.model.revision == "007"
    args, _ = seen[-1]
    assert main(["generate", "demo", "-p", "no", "--prompt", "a b", "--seed", "0x10"]) == 0
    args, resolved = seen[-1]
    assert args.prompt == ["no", "a b"] and resolved.config.runtime.seed == 16


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "a command is missing"),
        ("genrate demo", "did you mean generate?"),
        ("--versio", "unknown flag --versio; did you mean --version?"),
        ("chat", "no model is named"),
        ("generate demo --blok-size=3", "unknown flag --blok-size; did you mean --block-size?"),
        ("generate demo --block-siz 3", "unknown flag --block-siz; did you mean --block-size?"),
        ("generate demo --max-model 3", "unknown flag --max-model; did you mean"),
        ("generate demo -t 2", "unknown flag -t; did you mean -tp?"),
        ("generate demo -pp2", "unknown flag -pp2; did you mean -pp?"),
        ("generate demo -tp", "expected one argument"),
        ("generate demo extra", "unexpected argument extra"),
        ("generate a --model b", "model.path is given twice"),
        ("explain demo --tensor-parallel-size 1 -tp 2", "--tensor-parallel-size/-tp is given twice"),
        ("explain demo --deterministic --no-deterministic", "--deterministic/--no-deterministic is given twice"),
        ("explain demo --config tp2 --config pp2", "--config is given twice"),
        ("explain demo -tp 2 --set parallel.tensor=2", "parallel.tensor is given twice"),
        ("explain demo --set tensor=2", "must be SECTION.KEY=VALUE"),
        ("explain demo --set cache.block_size=[", "not valid YAML"),
        ("explain demo --set cache.blocksize=3", "did you mean cache.block_size?"),
        ("explain demo --block-size 300", "cache.block_size = 300 (command line): must be an integer from 1 to 256"),
        ("explain demo --block-size true", "not a truth value"),
        ("explain demo --kv-cache-memory-bytes 4G", "write 4GiB or 4GB"),
        ("explain demo --tensor-weights 2,x -tp 2", "parallel.tensor_weights = [2, 'x']"),
        ("explain demo --config nowhere", "is no shipped layout"),
        ("explain demo --config ./nowhere.yaml", "No such file"),
        ("explain demo --dtype bf16", "did you mean bfloat16?"),
        ("generate demo -p x --n 2 --temperature 0", "must be 1 with temperature = 0"),
        ("bench demo", "invalid choice: 'demo'"),
        ("bench latency demo --num-prompts 0", "must be an integer of at least 1"),
    ],
)
def test_wrong_command_lines_end_with_2_and_say_what_to_write(
    seen: list[tuple[Any, ResolvedConfig]], capsys: pytest.CaptureFixture[str], line: str, words: str
) -> None:
    assert words in refused(capsys, *line.split())
    assert not seen


def test_all_configuration_errors_stand_in_one_panel(
    seen: list[tuple[Any, ResolvedConfig]], capsys: pytest.CaptureFixture[str]
) -> None:
    text = refused(capsys, "explain", "demo", "--block-size", "0", "--dtype", "x", "--max-num-seqs", "-1")
    assert text.splitlines()[0] == "shoal: configuration: 3 problems" and len(text.splitlines()) == 4


def test_under_torchrun_only_the_first_rank_tells_of_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in TORCHRUN_VARIABLES:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert main(["generate", "demo", "-p", "x", "-tp", "2"]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert "torchrun started 1 processes" in refused(capsys, "generate", "demo", "-p", "x", "-tp", "2")


def failing(error: BaseException) -> Run:
    def run(args: Any, resolved: ResolvedConfig) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (EngineError("rank 1 ended with signal 9"), 1, "rank 1 ended with signal 9"),
        (ValueError("prompt has 70 tokens, the limit is 64"), 2, "the limit is 64"),
        (KeyError("x"), 1, "KeyError: 'x' (at test_cli.py:"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failures_of_commands_are_one_panel_and_an_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, status: int, words: str
) -> None:
    install(monkeypatch, "shoal.launcher.cmd_chat", failing(error))
    assert main(["chat", "demo"]) == status
    captured = capsys.readouterr()
    assert words in captured.err and "Traceback" not in captured.err and captured.out == ""


def test_first_cause_is_told_and_debug_adds_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = EngineError("the engine could not start")
    error.__cause__ = OSError("port 80 is taken")
    install(monkeypatch, "shoal.launcher.cmd_chat", failing(error))
    assert main(["chat", "demo"]) == 1
    assert "because: port 80 is taken" in capsys.readouterr().err
    assert main(["chat", "demo", "--log-level", "debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_sigterm_ends_a_command_cleanly_with_143(monkeypatch: pytest.MonkeyPatch) -> None:
    cleaned = []

    def run(args: Any, resolved: ResolvedConfig) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        except Exception:  # noqa: BLE001  a command that takes every failure for its own
            return 1
        finally:
            cleaned.append(True)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    install(monkeypatch, "shoal.launcher.cmd_chat", run)
    assert main(["chat", "demo"]) == 143
    assert cleaned and signal.getsignal(signal.SIGTERM) == before


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        text = capsys.readouterr().out
        assert "examples:" in text and ("--config" in text) == COMMANDS[name].takes_settings
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("shoal ")


def test_every_command_has_its_module() -> None:
    folder = Path(__file__).resolve().parents[2] / "launcher"
    assert {path.stem for path in folder.glob("cmd_*.py")} == {f"cmd_{name}" for name in COMMANDS}


def test_generate_without_a_model_says_that_it_takes_the_demo(tmp_path: Path) -> None:
    args = ["generate", "--config", "tp2_pp2", "-p", "import os", "--max-tokens", "2", "--ignore-eos"]
    done = subprocess.run(
        [sys.executable, "-m", "shoal", *args], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "no MODEL is named: using demo" in done.stderr


@pytest.mark.parametrize("start", [["-m", "shoal"], ["-c", "import sys, shoal.__main__ as m; sys.exit(m.main())"]])
def test_program_answers_from_the_shell(start: list[str]) -> None:
    done = subprocess.run([sys.executable, *start, "explain"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("shoal: usage\n  no model is named\n")


def test_reader_that_goes_away_is_no_failure_worth_a_panel() -> None:
    command = f"{sys.executable} -m shoal generate --help | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("usage: shoal generate") and "Traceback" not in done.stderr
