"""shoal bench: what it prints and writes, and what it refuses before a long run."""

import json
from pathlib import Path
from typing import Any

import pytest

from shoal.launcher import cmd_bench
from shoal.launcher.cli import main
from shoal.launcher.machine import MachineLimits

SHORT = ["demo", "--num-prompts", "2", "--input-len", "6", "--output-len", "3", "--num-blocks", "128"]


@pytest.fixture(autouse=True)
def known_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the machine takes seconds and is not what is tested."""
    limits = MachineLimits(device="cpu", threads=1, dtype="float32", read_bytes_per_s=1e9, gemm_flops_per_s=1e9)
    monkeypatch.setattr(cmd_bench, "measure_limits", lambda *_: limits)


@pytest.mark.parametrize("kind", ["latency", "throughput"])
def test_a_run_is_printed_and_written(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", kind, *SHORT, "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    for name in ("TTFT", "TPOT", "ITL", "output tokens/s", "outside the model", "bandwidth", "GEMM", "sample"):
        assert name in printed
    report: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    assert (report["num_requests"], report["prompt_tokens"], report["output_tokens"]) == (2, 12, 6)
    assert (
        set(report["rank_us_per_step"]) == {"forward", "wait", "sample"} and report["rank_us_per_step"]["forward"] > 0
    )
    assert (report["bandwidth_share"] is None) == (kind == "throughput")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--json", "missing/out.json"], "--json missing/out.json: the folder missing does not exist"),
        (["--plot", "missing/out.png"], "--plot missing/out.png: the folder missing does not exist"),
        (["--input-len", "1020", "--output-len", "20"], "exceed max_model_len 1024"),
    ],
)
def test_what_could_not_end_well_is_refused(more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "throughput", *SHORT, *more]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
