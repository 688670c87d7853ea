"""Commands told to end: what runs finishes, what waits does not begin, the second signal ends now, nothing is left."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.launcher.draining import Drain
from tests.launcher.harness import TAG, processes_tagged, run, wait_until
from tests.shoal.fake_engine import DEMO

ROOT = Path(__file__).resolve().parents[2]
FAKE = [sys.executable, str(Path(__file__).with_name("batch_script.py")), str(ROOT)]
FLAGS = ["--temperature", "0", "--ignore-eos"]
QUICK_S = 15.0


def start(*command: str, tag: str = "") -> subprocess.Popen[str]:
    """A process whose streams are pipes."""
    env = {**os.environ, TAG: tag, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, bufsize=0, env=env)


def first_of(process: subprocess.Popen[str]) -> str:
    """The first character of its output, waited for."""
    assert process.stdout is not None
    return process.stdout.read(1)


def test_generate_over_ranks_finishes_what_runs_and_leaves_nothing(tmp_path: Path) -> None:
    tag, out, prompts = uuid.uuid4().hex, tmp_path / "out.jsonl", tmp_path / "in.txt"
    prompts.write_text("".join(f"def f{number}(\n" for number in range(40)))
    command = [sys.executable, "-m", "shoal", "generate", "demo", "-tp", "2", "--prompts", str(prompts), *FLAGS]
    process = start(*command, "--max-tokens", "100", "--max-num-seqs", "1", "--output", str(out), tag=tag)
    wait_until(lambda: process.poll() is not None or (out.exists() and out.read_text().count("\n") > 0), "one", 120.0)
    process.send_signal(signal.SIGTERM)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 143, shown
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert 1 <= len(records) < 40 and all(len(record["token_ids"]) == 100 for record in records)
    assert f"ended by SIGTERM, {40 - len(records)} prompts have no output" in shown
    wait_until(lambda: processes_tagged(tag) == [], "everything to end", 5.0)


def test_a_stream_that_has_begun_comes_to_its_end() -> None:
    process = start(*FAKE, "0.02", "generate", DEMO, "-p", "hello", *FLAGS, "--max-tokens", "40")
    begun = first_of(process)
    process.send_signal(signal.SIGTERM)
    rest, shown = process.communicate(timeout=QUICK_S)
    assert process.returncode == 0 and begun + rest and "40 tokens in" in shown


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_second_signal_ends_at_once(command: str) -> None:
    """What runs would take a minute."""
    prompt = ["-p", "hello"] if command == "generate" else []
    process = start(*FAKE, "0.3", command, DEMO, *prompt, *FLAGS, "--max-tokens", "200")
    assert process.stdin is not None and process.stderr is not None
    process.stdin.write("hello\n")
    first_of(process)
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: "once more ends now" in process.stderr.readline(), "the first signal's answer")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=QUICK_S)
    assert process.returncode == 143


def test_a_drain_is_bounded() -> None:
    process = start(*FAKE, "0.3", "chat", DEMO, *FLAGS, "--max-tokens", "200", "--set", "launcher.drain_timeout_s=0.5")
    assert process.stdin is not None
    process.stdin.write("hello\n")
    first_of(process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=QUICK_S)
    assert process.returncode == 143


def test_chat_finishes_the_answer_and_ends_at_once_between_answers() -> None:
    process = start(*FAKE, "0.02", "chat", DEMO, *FLAGS, "--max-tokens", "30")
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("hello\n/stats\n")
    first_of(process)
    process.send_signal(signal.SIGTERM)
    rest, shown = process.communicate(timeout=QUICK_S)
    assert process.returncode == 143 and rest.endswith("\n") and "conversation:" not in rest
    assert "finishing the answer" in shown and "ended by SIGTERM" in shown
    process = start(*FAKE, "0.0", "chat", DEMO, *FLAGS, "--max-tokens", "3")
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("/stats\n")
    assert process.stdout.readline().startswith("conversation: 0")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=QUICK_S)
    assert process.returncode == 143


def test_items_are_taken_as_there_is_room_for_them_and_never_more() -> None:
    taken, most = 0, 0
    drain = Drain(1.0)

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(5000):
            taken += 1
            yield number

    done: list[int] = []

    async def work(number: int) -> None:
        nonlocal most
        most = max(most, drain.num_running)
        assert taken - len(done) <= 8
        await asyncio.sleep(0)
        done.append(number)

    async def body() -> None:
        await drain.feed(items(), 8, work, lambda number: True)
        assert sorted(done) == list(range(5000)) and most == 8

    run(body())


def test_the_first_failure_ends_the_others() -> None:
    ended: list[int] = []

    async def work(number: int) -> None:
        if number == 2:
            raise ValueError("the third")
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(number)

    async def body() -> None:
        with pytest.raises(ValueError, match="the third"):
            await Drain(1.0).feed(range(10), 4, work, lambda number: True)
        assert sorted(ended) == [0, 1, 3]

    run(body())
