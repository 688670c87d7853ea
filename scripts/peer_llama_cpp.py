"""llama.cpp beside the other engines, through its own benchmark programs: llama-bench and llama-batched-bench.

They make their own random token ids, and every run loads the model anew (not counted). Batches are uniform there: the
mean prompt and output lengths of the workload stand for its requests. What they cannot express is not measured.
"""

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

TIMEOUT_S = 1800.0
SCRIPT = Path(__file__).with_name("write_gguf.py")


def write_gguf(python: str, model: Path, folder: str) -> str:
    """The checkpoint as GGUF, by an interpreter that has the gguf package. Returns the file's path."""
    path = str(Path(folder) / "model.gguf")
    subprocess.run([python, str(SCRIPT), str(model), path], check=True, timeout=TIMEOUT_S)
    return path


class LlamaCpp:
    """The two programs of a folder on one model."""

    name = "llama.cpp"

    def __init__(self, binaries: str, model: Path, python: str, threads: int) -> None:
        self.binaries, self.threads = Path(binaries), threads
        self.folder = tempfile.TemporaryDirectory(prefix="shoal-gguf-")
        self.gguf = write_gguf(python, model, self.folder.name)

    def run(self, program: str, *arguments: str) -> str:
        """Standard output of one of them. Raises RuntimeError with its last line when it fails."""
        command = [str(self.binaries / program), "-m", self.gguf, "-t", str(self.threads), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
            raise RuntimeError(f"{program} ended with {done.returncode}: {last}")
        return done.stdout

    def rate(self, workload: str, requests: list[dict[str, Any]]) -> float | None:
        """Tokens per second as bench_peers counts them; None for a workload they cannot express."""
        mean_in = round(sum(len(r["ids"]) for r in requests) / len(requests))
        mean_out = round(sum(r["max_tokens"] for r in requests) / len(requests))
        if workload in ("decode", "prompt"):
            sizes = ["-p", str(mean_in), "-n", "0"]
            if workload == "decode":  # after a prompt whose time does not count
                sizes = ["-p", "0", "-d", str(mean_in), "-n", str(mean_out)]
            return float(json.loads(self.run("llama-bench", "-r", "1", "-o", "json", *sizes))[0]["avg_ts"])
        if workload != "batch":
            return None
        count = len(requests)
        sizes = ["-npp", str(mean_in), "-ntg", str(mean_out), "-npl", str(count)]
        context = str(count * (mean_in + mean_out + 8))
        out = self.run("llama-batched-bench", "-c", context, "--output-format", "jsonl", *sizes)
        report = json.loads(next(line for line in out.splitlines() if line.startswith("{")))
        return count * mean_out / float(report["t"])

    def close(self) -> None:
        """Delete the model."""
        self.folder.cleanup()
