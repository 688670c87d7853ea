"""shoal generate: text to the terminal, JSON Lines to a file, mistakes with their place; over a fake engine."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shoal.engine.fake_executor import Fault
from shoal.launcher.cli import main
from shoal.server.tokenizer import Tokenizer
from tests.shoal import fake_engine
from tests.shoal.fake_engine import DEMO

FLAGS = ["--temperature", "0", "--max-tokens", "8", "--ignore-eos"]


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    stand_in = fake_engine.module()
    monkeypatch.setitem(sys.modules, "shoal.launcher.bring_up", stand_in)
    return stand_in


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(DEMO)


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_one_prompt_is_streamed_to_standard_output(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["generate", DEMO, "-p", "hello", *FLAGS]) == 0
    shown = capsys.readouterr()
    assert main(["generate", DEMO, "-p", "hello", *FLAGS, "--output", str(tmp_path / "out.jsonl")]) == 0
    assert shown.out == records(tmp_path / "out.jsonl")[0]["text"] + "\n"
    assert "memory: all of it" in shown.err and "8 tokens in" in shown.err and "tokens/s" in shown.err


def test_several_prompts_are_printed_in_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", DEMO, "-p", "one", "-p", "two " * 30, "-p", "three", *FLAGS]) == 0
    shown = capsys.readouterr()
    headings = [line for line in shown.out.splitlines() if line.startswith("--- ")]
    assert headings[0] == "--- 1/3: one" and headings[2] == "--- 3/3: three"
    assert headings[1].startswith("--- 2/3: two two") and headings[1].endswith("...") and len(headings[1]) < 80
    assert "3 of 3 requests" in shown.err and "24 generated" in shown.err


def test_a_file_of_objects_becomes_a_file_of_objects(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [
        {"prompt": "a", "id": "first", "max_tokens": 2},
        {"prompt_token_ids": [5, 6, 7], "cache_salt": "x", "logprobs": 1, "prompt_logprobs": 0},
        {"messages": [{"role": "user", "content": "hi"}], "n": 2, "temperature": 1.0, "seed": 3},
        {"prompt": "é" * 3, "logit_bias": {"17": 1.5}, "stop": ["zzz"], "priority": 1},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    assert main(["generate", DEMO, "--prompts", str(source), "--output", str(target), *FLAGS]) == 0
    found = records(target)
    assert [record["id"] for record in found] == ["first", "1", "2", "2", "3"]
    assert [record["finish_reason"] for record in found] == ["length"] * 5
    assert len(found[0]["token_ids"]) == 2 and found[0]["prompt"] == "a"
    assert found[0]["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "cached_tokens": 0}
    assert found[1]["prompt"] == [5, 6, 7] and len(found[1]["logprobs"]) == 8
    assert set(found[1]["logprobs"][0][0]) == {"token_id", "token", "logprob", "rank"}
    assert found[1]["prompt_logprobs"][0] is None and len(found[1]["prompt_logprobs"]) == 3
    assert [record.get("index") for record in found] == [None, None, 0, 1, None]
    assert found[2]["prompt"] == tokenizer.apply_chat_template(lines[2]["messages"])
    assert found[3]["text"] == tokenizer.decode(found[3]["token_ids"], skip_special_tokens=True)


def test_a_text_file_has_one_prompt_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("first  line\r\n\n  {not json}\n", encoding="utf-8")
    assert main(["generate", DEMO, "--prompts", str(source), "-p", "flag", "--output", str(target), *FLAGS]) == 0
    assert [record["prompt"] for record in records(target)] == ["flag", "first  line", "  {not json}"]
    with source.open(encoding="utf-8") as standard_input:
        monkeypatch.setattr(sys, "stdin", standard_input)
        assert main(["generate", DEMO, "--prompts", "-", "--output", str(target), *FLAGS]) == 0
    assert [record["prompt"] for record in records(target)] == ["first  line", "  {not json}"]


def test_without_max_tokens_an_answer_has_at_most_256(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    assert main(["generate", DEMO, "-p", "a", "--ignore-eos", "--max-model-len", "64", "--output", str(target)]) == 0
    assert len(records(target)[0]["token_ids"]) == 62


MISTAKES = {
    '{"prompt": "a", "temprature": 1}': ["in.jsonl:1: unknown field 'temprature'; did you mean temperature?"],
    '{"prompt": "a"}\n{"prompt": "a", "messages": []}': ["in.jsonl:2: must have exactly one of prompt, prompt_token"],
    '{"id": 3}\n\n[1]\n{': [
        "in.jsonl:1: must have exactly",
        "in.jsonl:3: must be a JSON object, found list",
        "jsonl:4: is",
    ],
    '{"prompt": "a", "top_p": 2}': ["in.jsonl:1: ", "top_p = 2"],
    '{"prompt": "a", "priority": "high"}': ["in.jsonl:1: priority must be an integer, found 'high'"],
    '{"prompt": "a", "id": 1.5}': ["in.jsonl:1: id must be a string or an integer"],
    '{"messages": "hi"}': ["in.jsonl:1: messages must be a list"],
    '{"prompt": "a"}\n{"prompt_token_ids": []}': ["in.jsonl:2: the prompt is empty"],
    '{"messages": [{"content": "hi"}]}': ["in.jsonl:1: messages[0] has no role"],
    "": ["in.jsonl: holds no prompt"],
}


@pytest.mark.parametrize("content", MISTAKES)
def test_mistakes_in_a_file_are_named_by_line(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(content, encoding="utf-8")
    assert main(["generate", DEMO, "--prompts", str(source), *FLAGS]) == 2
    shown = capsys.readouterr().err
    for text in MISTAKES[content]:
        assert text in shown


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], 'no prompt: give -p "text" or --prompts FILE'),
        (["--prompts", "/nowhere.txt"], "--prompts /nowhere.txt: cannot be read: No such file"),
        (["-p", "a", "--output", "/nowhere/out.jsonl"], "--output /nowhere/out.jsonl: cannot be written"),
        (["-p", "a", "--logprobs", "2"], "logprobs are written to --output only"),
        (["-p", "a " * 400], "-p: the prompt has 402 tokens and max_model_len is 256"),
        (["-p", "a", "--stop", "x", "--no-detokenize"], "stop strings need text"),
    ],
)
def test_mistakes_of_usage_end_with_status_2(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", DEMO, *arguments]) == 2
    assert text in capsys.readouterr().err


def test_token_ids_are_printed_where_there_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt_token_ids": [1, 2]}')
    assert main(["generate", DEMO, "--prompts", str(source), "--skip-tokenizer-init", *FLAGS]) == 0
    ids = capsys.readouterr().out.split()
    assert len(ids) == 8 and all(token_id.isdecimal() for token_id in ids)


def test_a_failing_engine_ends_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = fake_engine.module(fault=Fault(step=2, rank=3))
    monkeypatch.setitem(sys.modules, "shoal.launcher.bring_up", stand_in)
    assert main(["generate", DEMO, "-p", "a", *FLAGS]) == 1
    assert "rank 3: ended by a planned fault" in capsys.readouterr().err
    assert not stand_in.clients[0]._thread.is_alive()


def test_a_model_shoal_does_not_run_is_named_before_its_tokenizer_is_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["FooForCausalLM"], "model_type": "foo"}')
    assert main(["generate", str(tmp_path), "-p", "a"]) == 2
    shown = capsys.readouterr().err
    assert "FooForCausalLM" in shown and "tokenizer" not in shown
