"""Does Shoal work on this GPU? Every Triton kernel against its reference, whole tiny models against transformers,
compute-sanitizer where it is present, times last; within --limit-s seconds, ending in a table.

    python scripts/gpu_check.py                       # on a GPU, with fresh random inputs (the seed is printed)
    python scripts/gpu_check.py --only attention --seed 7
    python scripts/gpu_check.py --interpret           # without a GPU: tiny shapes through Triton's interpreter
    python scripts/gpu_check.py --report              # what kernels compile to on sm_80 and sm_90, as Markdown
    python scripts/gpu_check.py --report --limit-s 1800 --write docs/kernels.md
    python scripts/gpu_check.py --read rows.json --write docs/kernels.md      # times, of a run with --json rows.json

Needs a checkout with the dev extra (transformers is the oracle). Exit status: 0 all passed, 1 something failed, 2 the
time was up before everything had run. Jobs (scripts/gpu_jobs.py) are processes: most of the time is spent compiling,
and one that crashes the device takes only its own checks with it.
"""

import argparse
import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

JOBS = Path(__file__).resolve().parent / "gpu_jobs.py"
ROOT = JOBS.parents[1]
LAYOUTS = ((1, 1), (2, 1), (1, 2))
ROUNDED = (
    ("llama", 1, "--quantization", "int8"),
    ("llama", 2, "--quantization", "int4"),
    ("qwen3_moe", 1, "--quantization", "int4"),
    ("llama", 2, "--quantization", "fp8"),
    ("qwen3_moe", 1, "--quantization", "fp8"),
    ("llama", 1, "--kv-cache-dtype", "fp8"),
    ("gemma2", 2, "--kv-cache-dtype", "fp8"),
)
"""Models with few-bit weights or an FP8 cache: family, tensor size, setting."""
DETERMINISTIC = ("llama", "gemma2", "qwen3_moe")
SANITIZED = ("attention mixed float16", "attention uneven", "attention shared", "rope_kv_write")
MARKS = "<!-- {} begins -->", "<!-- {} ends -->"
Row = dict[str, Any]


class Job(NamedTuple):
    """A process. alone: nothing else may run meanwhile. wrapper: a command in front of it."""

    name: str
    arguments: list[str]
    alone: bool = False
    wrapper: tuple[str, ...] = ()


def plan(args: argparse.Namespace, families: list[str]) -> list[Job]:
    """All jobs, in the order in which they are begun."""
    common = ["--seed", str(args.seed), *(["--interpret"] if args.interpret else [])]
    models = [
        Job(f"model {name} tp{tp} pp{pp}", ["model", name, "--tp", str(tp), "--pp", str(pp), *common])
        for name in families
        for tp, pp in LAYOUTS
        if args.only in f"model {name} tp{tp} pp{pp}"
    ]
    models += [
        Job(f"model {name} tp{tp} {setting} {value}", ["model", name, "--tp", str(tp), setting, value, *common])
        for name, tp, setting, value in ROUNDED
        if name in families
        and args.only in f"model {name} tp{tp} {setting} {value}"
        and not (args.interpret and (tp > 1 or (setting, value) == ("--quantization", "fp8")))
    ]
    only = ["--only", args.only]
    parts = [
        Job(f"kernels, part {part + 1} of {args.jobs}", ["kernels", "--part", str(part), "--of", str(args.jobs), *only])
        for part in range(args.jobs)
    ]
    bits = [
        Job(f"deterministic {name}", ["deterministic", name, *common])
        for name in DETERMINISTIC
        if name in families and args.only in f"deterministic {name}"
    ]
    jobs = [job._replace(arguments=[*job.arguments, *common]) for job in parts]
    if args.interpret:  # whose products have no one order of sums: bits are nothing to compare
        return jobs + models
    jobs = [Job("graphs", ["graphs", "--only", args.only, *common]), *jobs, *bits, *models]
    tool = shutil.which("compute-sanitizer")
    if tool is not None:
        command = (tool, "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all")
        jobs += [
            Job(f"sanitizer: {only}", ["kernels", "--tiny", "--only", only, *common], wrapper=command)
            for only in SANITIZED
        ]
    return [*jobs, *(Job(kind, [kind, *only, *common], alone=True) for kind in ("times", "crossovers"))]


def run(job: Job, deadline: float) -> list[Row]:
    """The rows of a job; one more where it failed or had no time."""
    left = deadline - time.monotonic()
    if left <= 1.0:
        return [{"check": "not run", "name": job.name, "ok": None, "detail": "the time was up"}]
    command = [*job.wrapper, sys.executable, str(JOBS), *job.arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left, cwd=ROOT, env=environment)
        output, errors, status = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as late:
        output, errors, status = _text(late.stdout), _text(late.stderr), None
    rows = [json.loads(line) for line in output.splitlines() if line.startswith('{"check"')]
    if job.wrapper:
        rows = [{**row, "check": f"sanitizer, {row['check']}"} for row in rows]
    if status is None:
        rows.append({"check": "not run", "name": job.name, "ok": None, "detail": "the time was up before its end"})
    elif status != 0:
        last = " / ".join((errors or output).strip().splitlines()[-3:])
        rows.append({"check": "job", "name": job.name, "ok": False, "detail": f"exit status {status}: {last[-400:]}"})
    return rows


def _text(captured: bytes | str | None) -> str:
    """What a process had written when its time was up."""
    return captured.decode(errors="replace") if isinstance(captured, bytes) else captured or ""


def run_all(jobs: list[Job], workers: int, deadline: float) -> list[Row]:
    """Several at once, then those that want the device to themselves."""
    rows: list[Row] = []
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for done in pool.map(lambda job: run(job, deadline), [job for job in jobs if not job.alone]):
            rows += done
            for row in done:
                if row["ok"] is not True:
                    print(f"{row['check']} {row['name']}: {row['detail']}", flush=True)
    for job in jobs:
        if job.alone:
            rows += run(job, deadline)
    return rows


def show(rows: list[Row]) -> str:
    """Times, what did not pass, and a line per kind of check."""
    timed = {kind: [row for row in rows if row["check"] == kind] for kind in ("time", "crossover")}
    lines = []
    for kind, mine in timed.items():
        if mine:
            lines += ["", f"{kind}s (medians)", *(f"  {row['name']:68} {row['detail']}" for row in mine)]
    lines += ["", f"{'check':28} {'passed':>7} {'failed':>7} {'not run':>8}   worst error of its limit"]
    for check in dict.fromkeys(row["check"] for row in rows):
        mine = [row for row in rows if row["check"] == check]
        counts = [sum(row["ok"] is value for row in mine) for value in (True, False, None)]
        shares = [row["error"] / row["limit"] for row in mine if row.get("limit")]
        worst = f"{max(shares):.0%}" if shares else ""
        lines.append(f"{check:28} {counts[0]:7} {counts[1]:7} {counts[2]:8}   {worst}")
    return "\n".join(lines)


def markdown(rows: list[Row]) -> str:
    """The compile report, one line per kernel and capability."""
    lines = [
        "| case | must move | must compute | kernel | sm | registers | spilled B | shared KiB | warps | stages |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    compiled = [row for row in rows if row["check"] == "compile" and "function" in row]
    for row in sorted(compiled, key=lambda row: row["kernel"]):
        work = f"{row['bytes_moved'] / 1e6:.1f} MB | {row['flops'] / 1e9:.2f} GFLOP"
        kernel = f"{row['function']} | {row['capability']} | {row['registers']} | {row['spill_bytes']}"
        shared = f"{row['shared_bytes'] / 1024:.0f} | {row['warps']} | {row['stages']}"
        lines.append(f"| {row['kernel']} {row['case']} | {work} | {kernel} | {shared} |")
    return "\n".join(lines)


def times_markdown(rows: list[Row]) -> str:
    """What was measured, one line per case, then ours beside the library's."""
    times = [row for row in rows if row["check"] == "time"]
    lines = [f"On one {times[0]['device']}:", "", "| case | us | GB/s | TFLOP/s |", "|---|---|---|---|"]
    lines += [
        f"| {row['name']} | {row['microseconds']:.1f} | {row['gb_per_s']:.0f} | {row['tflop_per_s']:.1f} |"
        for row in times
    ]
    lines += ["", "| contest | ours, us | library, us | library is slower by |", "|---|---|---|---|"]
    lines += [
        f"| {row['name']} | {row['microseconds']:.1f} | {row['library_microseconds']:.1f} | "
        f"{row['library_microseconds'] / row['microseconds']:.2f}x |"
        for row in rows
        if row["check"] == "crossover"
    ]
    return "\n".join(lines)


def write_between(path: Path, name: str, text: str) -> None:
    """Put the text between the marks of that name of a page. Raises ValueError when they are not there."""
    begin, end = (mark.format(name) for mark in MARKS)
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{path} has no lines {begin!r} and {end!r} to put the {name} between")
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def family_names() -> list[str]:
    """The tiny models of tests/model/tiny_models.py."""
    code = "from tests.model.tiny_models import CONFIGS; print(*CONFIGS)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.split()


def main() -> int:
    """Plan, run, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interpret", action="store_true", help="without a GPU")
    parser.add_argument("--report", action="store_true", help="compile reports as Markdown; no GPU needed")
    parser.add_argument("--read", type=Path, help="run nothing, take the rows that --json wrote")
    parser.add_argument("--write", type=Path, help="with --report or --read: put it between the marks of this page")
    parser.add_argument(
        "--only",
        default="",
        help="checks whose kernel and name (or `model NAME tpN ppN`, `deterministic NAME`) contain this",
    )
    parser.add_argument("--families", nargs="*", help="tiny models to run; default: all, with --interpret llama alone")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31)
    parser.add_argument("--jobs", type=int, default=max(1, min(8, (os.cpu_count() or 2) // 2)))
    parser.add_argument("--limit-s", type=float, default=600.0)
    parser.add_argument("--json", type=Path, help="also write every row here")
    args = parser.parse_args()
    if args.write is not None and not args.report and args.read is None:
        parser.error("--write takes the report, which --report makes, or times, which --read takes from a file")
    if args.read is not None:
        rows = json.loads(args.read.read_text())
        if args.write is not None:
            write_between(args.write, "times", times_markdown(rows))
        print(show(rows))
        return 0
    deadline = time.monotonic() + args.limit_s
    if args.report:
        jobs = [
            Job("report", ["report", "--part", str(part), "--of", str(args.jobs), "--only", args.only])
            for part in range(args.jobs)
        ]
    else:
        families = args.families if args.families is not None else ["llama"] if args.interpret else family_names()
        print(f"seed {args.seed}, {args.jobs} jobs at once", flush=True)
        jobs = plan(args, families)
    rows = run_all(jobs, args.jobs, deadline)
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if args.write is not None:
        write_between(args.write, "report", markdown(rows))
    print(markdown(rows) if args.report else show(rows))
    if any(row["ok"] is False for row in rows):
        return 1
    return 2 if any(row["ok"] is None for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
