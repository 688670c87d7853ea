"""shoal batch: OpenAI's format in and out, every line answered once however often it is killed; over a fake engine."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shoal.engine.fake_executor import StepLatency
from shoal.launcher import cmd_batch
from shoal.launcher.batch_file import AnswerFile
from shoal.launcher.cli import main
from shoal.launcher.stragglers import PATIENCE, Stragglers
from tests.launcher.controllers import answer, fakes
from tests.launcher.harness import collect, request, run, until, wait_until
from tests.shoal import fake_engine
from tests.shoal.fake_engine import DEMO

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("batch_script.py")
BODY = {"prompt": "hello", "max_tokens": 6, "temperature": 0, "ignore_eos": True}


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    stand_in = fake_engine.module()
    monkeypatch.setitem(sys.modules, "shoal.launcher.bring_up", stand_in)
    return stand_in


def line(
    custom_id: str, body: dict[str, Any] | None = None, url: str = "/v1/completions", **more: Any
) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body or BODY, **more}


def write(folder: Path, *lines: dict[str, Any]) -> list[str]:
    """The arguments of a batch of these lines."""
    (folder / "in.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines), encoding="utf-8")
    return ["batch", str(folder / "in.jsonl"), DEMO, "-o", str(folder / "out.jsonl")]


def answers(folder: Path) -> dict[str, Any]:
    """The answers by id; each is there once."""
    texts = (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(text) for text in texts]
    by_id = {each["custom_id"]: each for each in found}
    assert len(by_id) == len(found), "a line was answered twice"
    return by_id


def comparable(found: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from run to run."""
    for each in found.values():
        each["response"]["body"].pop("created", None)
        each["response"]["body"].get("usage", {}).pop("prompt_tokens_details", None)
    return found


def test_chats_and_completions_are_answered_in_openais_format(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 5, "n": 2, "temperature": 1.0}
    scored = {**chat, "n": 1, "logprobs": True, "top_logprobs": 2, "logit_bias": {"17": 1.0}}
    several = {**BODY, "prompt": ["a", [5, 6, 7]], "n": 2, "temperature": 1.0, "logprobs": 1}
    arguments = write(
        tmp_path,
        line("chat", chat, "/v1/chat/completions"),
        line("scored", scored, "/v1/chat/completions"),
        line("text"),
        line("several", several),
    )
    assert main([*arguments, "--ignore-eos"]) == 0
    found = answers(tmp_path)
    assert {each["response"]["status_code"] for each in found.values()} == {200}
    body = found["chat"]["response"]["body"]
    assert (body["object"], [choice["index"] for choice in body["choices"]]) == ("chat.completion", [0, 1])
    assert body["choices"][0]["message"]["role"] == "assistant" and body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 10 and body["model"] == DEMO
    (position, *_) = found["scored"]["response"]["body"]["choices"][0]["logprobs"]["content"]
    assert len(position["top_logprobs"]) == 2 and position["bytes"] == list(position["token"].encode())
    assert found["text"]["response"]["body"]["object"] == "text_completion"
    choices = found["several"]["response"]["body"]["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3] and len(choices[0]["logprobs"]["tokens"]) == 6


def test_mistakes_are_answered_under_their_id_and_others_are_not_disturbed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {
        "model": (404, {**BODY, "model": "gpt-4"}),
        "field": (400, {**BODY, "temprature": 1}),
        "stream": (400, {**BODY, "stream": True}),
        "range": (400, {**BODY, "top_p": 7}),
        "long": (400, {**BODY, "prompt": [1] * 1000}),
        "none": (400, {"max_tokens": 5}),
    }
    arguments = write(tmp_path, line("fine"), *(line(name, body) for name, (_, body) in wrong.items()))
    assert main(arguments) == 0
    found = answers(tmp_path)
    assert found["fine"]["response"]["status_code"] == 200
    for name, (status, _) in wrong.items():
        assert found[name]["response"]["status_code"] == status, found[name]
        assert found[name]["response"]["body"]["error"]["message"]
    assert "did you mean temperature" in found["field"]["response"]["body"]["error"]["message"]
    assert "6 lines were answered with an error" in capsys.readouterr().err


def test_lines_nobody_could_be_answered_under_are_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = write(tmp_path, line("a"), line("a"), {"url": "/v1/completions"})
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert "in.jsonl:2: custom_id 'a' was given in line 1 already" in shown and "in.jsonl:3: must be" in shown


def test_a_batch_goes_on_from_whole_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = write(tmp_path, *(line(f"r{number}") for number in range(5)))
    assert main(arguments) == 0
    whole = answers(tmp_path)
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_text("".join(lines[:2]) + lines[2][:40], encoding="utf-8")
    assert main(arguments) == 0
    assert comparable(answers(tmp_path)) == comparable(whole)
    assert "2 of 5 lines have their answer already" in capsys.readouterr().err
    assert main(arguments) == 0
    (tmp_path / "out.jsonl").write_text("precious notes\n", encoding="utf-8")
    assert main(arguments) == 2
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == "precious notes\n"


def test_a_long_batch_has_no_more_under_way_than_its_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: list[int] = []
    answer_one = cmd_batch._Batch._answer

    async def counted(*arguments: Any) -> None:
        tasks.append(len(asyncio.all_tasks()))
        await answer_one(*arguments)

    monkeypatch.setattr(cmd_batch._Batch, "_answer", counted)
    arguments = write(tmp_path, *(line(f"r{number}", {**BODY, "max_tokens": 1}) for number in range(1500)))
    assert main([*arguments, "--max-num-seqs", "4", "--max-queued-requests", "4"]) == 0
    assert len(answers(tmp_path)) == len(tasks) == 1500
    assert max(tasks) <= 2 * 8 + 3, "of each line one and of its prompt one; and the command's own"


def test_a_batch_is_read_from_a_pipe_too(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    arguments = write(tmp_path, line("a"), line("b"))
    text = (tmp_path / "in.jsonl").read_text()
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(text,), daemon=True)
    writer.start()
    assert main(["batch", str(tmp_path / "pipe"), *arguments[2:]]) == 0
    assert set(answers(tmp_path)) == {"a", "b"}


def test_two_batches_do_not_write_to_one_file(tmp_path: Path) -> None:
    first = AnswerFile(str(tmp_path / "out.jsonl"))
    with pytest.raises(ValueError, match="another batch writes to it"):
        AnswerFile(str(tmp_path / "out.jsonl"))
    first.close()
    AnswerFile(str(tmp_path / "out.jsonl")).close()


def test_a_batch_that_is_killed_again_and_again_equals_one_clean_run(tmp_path: Path) -> None:
    choose = random.Random(5)
    clean, killed = tmp_path / "clean", tmp_path / "killed"
    lines = [line(f"r{n}", {**BODY, "temperature": 1.0, "max_tokens": choose.randint(5, 40)}) for n in range(60)]
    for folder in (clean, killed):
        folder.mkdir()
    assert main(write(clean, *lines)) == 0
    arguments = [sys.executable, str(SCRIPT), str(ROOT), "0.02", *write(killed, *lines), "--max-num-seqs", "4"]
    out, kills = killed / "out.jsonl", 0
    for _ in range(3):
        before = len(out.read_bytes().splitlines()) if out.exists() else 0
        batch = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
        wanted = before + choose.randint(3, 12)
        wait_until(
            lambda wanted=wanted, batch=batch: (
                batch.poll() is not None or (out.exists() and len(out.read_bytes().splitlines()) >= wanted)
            ),
            "some answers",
            60.0,
        )
        batch.send_signal(signal.SIGKILL)
        kills += batch.wait(20) == -signal.SIGKILL
    assert kills == 3
    assert main(write(killed, *lines)) == 0
    assert comparable(answers(killed)) == comparable(answers(clean))


def test_sigterm_finishes_what_runs_and_leaves_the_rest_for_the_next_time(tmp_path: Path) -> None:
    lines = [line(f"r{n}", {**BODY, "max_tokens": 30}) for n in range(30)]
    limits = ["--max-num-seqs", "2", "--max-queued-requests", "2"]
    arguments = [sys.executable, str(SCRIPT), str(ROOT), "0.02", *write(tmp_path, *lines), *limits]
    batch = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    out = tmp_path / "out.jsonl"
    wait_until(lambda: out.exists() and len(out.read_bytes().splitlines()) >= 2, "answers", 60.0)
    batch.send_signal(signal.SIGTERM)
    _, shown = batch.communicate(timeout=30)
    assert batch.returncode == 143
    assert "finishing what runs, at most 30 s; once more ends now" in shown
    found = answers(tmp_path)
    assert 2 <= len(found) < 30 and f"{30 - len(found)} lines have no answer yet" in shown
    assert main(write(tmp_path, *lines)) == 0
    assert len(answers(tmp_path)) == 30


def test_requests_on_a_far_slower_replica_go_on_elsewhere() -> None:
    async def body() -> None:
        async with fakes(2, step_s=0.002) as (controller, factory):
            factory.lives[1][0].executor.latency = StepLatency(base_s=0.2)
            watch = Stragglers(controller)
            asked = [request([3, number], 200, f"r{number}") for number in range(4)]
            streams = [asyncio.create_task(collect(controller.submit(each))) for each in asked]
            slots = controller._slots
            await until(lambda: slots[0].served and slots[1].served, "both to serve")
            for _ in range(PATIENCE + 1):
                seen = {each: tokens for each, _, tokens in controller.progress()}
                await until(
                    lambda seen=seen: (
                        not slots[0].in_flight
                        or any(t > seen[r] + 20 for r, n, t in controller.progress() if n == 0 and r in seen)
                    ),
                    "progress",
                )
                await watch.look()
            assert watch.moved == 2
            for each, (tokens, _) in zip(asked, await asyncio.gather(*streams), strict=True):
                assert tokens == answer(each)

    run(body())
