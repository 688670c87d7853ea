"""scripts/gpu_check.py without a GPU: kernels compile within their budgets, and the checks run through the interpreter.

Compiled kernels and interpreted ones cannot be had in one process, so the script is run as people run it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the Triton kernels need triton")

ROOT = Path(__file__).resolve().parents[1]


def gpu_check(path: Path, *arguments: str, limit_s: int = 280) -> tuple[int, str, list[dict[str, Any]]]:
    """Exit status, output and rows of the script."""
    rows = path / "rows.json"
    command = [sys.executable, "scripts/gpu_check.py", "--jobs", "1", "--json", str(rows), "--limit-s", str(limit_s)]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=limit_s + 60)
    assert rows.exists(), done.stdout + done.stderr
    return done.returncode, done.stdout + done.stderr, json.loads(rows.read_text())


def check_budgets(rows: list[dict[str, Any]], least: int) -> None:
    """Everything was compiled, for both capabilities, within its budget."""
    assert not [row for row in rows if not row["ok"]]
    for capability in (80, 90):
        assert sum(row["capability"] == capability for row in rows) >= least


@pytest.mark.parametrize(
    ("only", "least"), [("attention decode 32 x 4096 d128", 1), ("attention decode 32 x 4096 fp8", 1), ("norm", 1)]
)
def test_kernels_compile_for_sm_80_and_sm_90_within_their_budgets(tmp_path: Path, only: str, least: int) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- report begins -->\nold\n<!-- report ends -->\nafter\n")
    status, output, rows = gpu_check(tmp_path, "--report", "--only", only, "--write", str(page))
    assert status == 0, output
    check_budgets(rows, least)
    assert "| sm | registers |" in output
    assert page.read_text().startswith("before") and "old" not in page.read_text() and only in page.read_text()


def test_the_times_of_an_earlier_run_are_written_into_a_page(tmp_path: Path) -> None:
    page, rows = tmp_path / "page.md", tmp_path / "rows.json"
    page.write_text("before\n<!-- times begins -->\nold\n<!-- times ends -->\nafter\n")
    measured = {"ok": True, "detail": "", "device": "a card", "microseconds": 10.0}
    rows.write_text(
        json.dumps(
            [
                {"check": "time", "name": "norm", "gb_per_s": 900.0, "tflop_per_s": 0.5, **measured},
                {"check": "crossover", "name": "dense 1", "library_microseconds": 25.0, **measured},
            ]
        )
    )
    command = [sys.executable, "scripts/gpu_check.py", "--read", str(rows), "--write", str(page)]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text and "a card" in text
    assert "| norm | 10.0 | 900 | 0.5 |" in text and "| dense 1 | 10.0 | 25.0 | 2.50x |" in text


def test_who_waits_is_told_of_every_kernel_that_was_compiled() -> None:
    code = """
import torch, triton
from shoal.kernels.gpu.activation import launch_activation
from shoal.kernels.gpu.compile import call_after_compiling, compiling_for
told = []
call_after_compiling(lambda: told.append(1))
with compiling_for(90) as compiled:
    for _ in range(2):
        launch_activation(torch.empty(3, 8, device="meta"), 0, gated=False)
print(len(told), len(compiled))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.split() == ["1", "2"], done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_kernels_compile_within_their_budgets(tmp_path: Path) -> None:
    status, output, rows = gpu_check(tmp_path, "--report", limit_s=1700)
    assert status == 0, output
    check_budgets(rows, 10)


def test_the_checks_run_through_the_interpreter_and_end_in_a_table(tmp_path: Path) -> None:
    status, output, rows = gpu_check(tmp_path, "--interpret", "--only", "attention fp8 cache", "--seed", "3")
    assert status == 0, output
    assert [(row["check"], row["ok"]) for row in rows] == [("attention", True)]
    assert "seed 3" in output and "worst error of its limit" in output


def test_what_has_no_time_to_run_is_said_to_have_not_run(tmp_path: Path) -> None:
    status, output, rows = gpu_check(tmp_path, "--interpret", "--only", "attention mixed", limit_s=1)
    assert status == 2, output
    assert {row["check"] for row in rows} == {"not run"}


@pytest.mark.slow
def test_a_whole_model_runs_through_the_interpreter(tmp_path: Path) -> None:
    status, output, rows = gpu_check(tmp_path, "--interpret", "--only", "model llama")
    assert status == 0, output
    assert sum(row["check"] == "model" for row in rows) == 5
