"""shoal chat: lines in, streamed answers out, commands, interrupts; over a fake engine."""

import io
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shoal.launcher.cli import main
from shoal.server.tokenizer import Tokenizer
from tests.shoal import fake_engine
from tests.shoal.fake_engine import DEMO

FLAGS = ["--temperature", "0", "--max-tokens", "6", "--ignore-eos"]


def install(monkeypatch: pytest.MonkeyPatch, **options: Any) -> ModuleType:
    stand_in = fake_engine.module(**options)
    monkeypatch.setitem(sys.modules, "shoal.launcher.bring_up", stand_in)
    return stand_in


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return install(monkeypatch)


def talk(monkeypatch: pytest.MonkeyPatch, lines: str, *arguments: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return main(["chat", DEMO, *arguments])


def prompts_of(engine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts the engine is given from now on."""
    from shoal.engine.engine_core import EngineCore

    seen: list[list[int]] = []
    add = EngineCore.add
    monkeypatch.setattr(
        EngineCore, "add", lambda self, request: seen.append(request.prompt_token_ids) or add(self, request)
    )
    return seen


def test_each_answer_joins_the_conversation(
    engine: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = prompts_of(engine, monkeypatch)
    assert talk(monkeypatch, "hi\n\n  more  \n", "--system", "be brief", *FLAGS) == 0
    answers = capsys.readouterr().out
    tokenizer = Tokenizer.from_folder(DEMO)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert seen[0] == tokenizer.encode_chat(messages)
    first = tokenizer.decode(seen[1], skip_special_tokens=False)
    assert first.startswith(tokenizer.apply_chat_template(messages)) and len(seen) == 2
    assert "more" in first and answers.count("\n") >= 2
    assert not engine.clients[0]._thread.is_alive()


def test_reset_forgets_and_stats_tell(
    engine: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = prompts_of(engine, monkeypatch)
    assert talk(monkeypatch, "/stats\nhi\n/stats\n/reset\nhi\n/help\n/what\n/exit\nnever", *FLAGS) == 0
    shown = capsys.readouterr().out
    assert "conversation: 0 messages, 0 of 256 tokens\n" in shown
    assert "conversation: 2 messages, " in shown and "last answer: 6 tokens, 0 prompt tokens from the cache" in shown
    assert "first after" in shown and "tokens/s" in shown
    assert "the conversation is empty" in shown and "/stats  tokens of" in shown and "unknown command /what" in shown
    assert seen[0] == seen[1] and len(seen) == 2


def test_an_answer_may_take_the_rest_of_the_context(
    engine: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(monkeypatch, "hi\nand now?\n/stats\n/reset\n", "--ignore-eos") == 0
    shown = capsys.readouterr()
    assert "max_model_len is 256" in shown.err and "/reset begins a new conversation" in shown.err
    assert "conversation: 2 messages" in shown.out  # the message that did not fit was taken back


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = install(monkeypatch, step_s=0.005)

    def interrupt() -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if engine.clients and engine.clients[0]._core.stats().generated_tokens > 3:
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.001)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert talk(monkeypatch, "hi\n/stats\n", "--ignore-eos") == 0
    thread.join()
    shown = capsys.readouterr().out
    assert "[stopped]" in shown and "conversation: 2 messages" in shown


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--skip-tokenizer-init"], "a chat needs a tokenizer"),
        (["--set", "sampling.n=2"], "sampling.n = 2: has no effect in a chat"),
        (["--set", "sampling.logprobs=2"], "sampling.logprobs = 2: has no effect in a chat"),
    ],
)
def test_what_cannot_chat_is_refused(
    arguments: list[str],
    text: str,
    engine: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert talk(monkeypatch, "hi\n", *arguments) == 2
    assert text in capsys.readouterr().err


def test_a_model_without_chat_template_is_refused(
    engine: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(DEMO) / name, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    assert main(["chat", str(tmp_path), "--set", "model.load_format=dummy"]) == 2
    assert "has no chat template" in capsys.readouterr().err and engine.clients == []
