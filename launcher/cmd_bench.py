"""`shoal bench latency|throughput MODEL`: times, rates, and the share of this machine's limits, measured in the same
run.

latency sends one request at a time; throughput all at once. Both first measure how fast memory is read and matrices are
multiplied, warm the engine up with one request, and ignore end tokens, so that every request has its full length.
"""

import argparse
import asyncio
import importlib.util
import time
from pathlib import Path

import msgspec

from shoal.configs.resolved import ResolvedConfig
from shoal.configs.schema import ParallelConfig
from shoal.launcher.bench_report import BenchReport, make_report, plot_report, report_rows
from shoal.launcher.bench_workload import Trace, Work, make_workload, run_in_turn, run_together
from shoal.launcher.machine import MachineLimits, measure_limits
from shoal.launcher.session import Session, open_session
from shoal.model.families import load_spec
from shoal.model.shard import shard_model
from shoal.model.step_work import StepRows, step_work


def run(args: argparse.Namespace, resolved: ResolvedConfig) -> int:
    """Run the benchmark and print its table; write JSON and picture where asked. Returns 0."""
    import torch

    _check_outputs(args.json, args.plot)
    config = resolved.config
    model = msgspec.structs.replace(config.model, skip_tokenizer_init=True)
    resolved = ResolvedConfig(config=msgspec.structs.replace(config, model=model), sources=resolved.sources)
    report, traces = asyncio.run(measure(args, resolved, torch.get_num_threads()))
    width = max(len(name) for name, _ in report_rows(report))
    print("\n".join(f"{name:{width}}  {value}" for name, value in report_rows(report)))
    if args.json:
        Path(args.json).write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    if args.plot:
        plot_report(report, traces, Path(args.plot))
    return 0


def _check_outputs(json: str | None, plot: str | None) -> None:
    """Raise ValueError for what could not be written at the end of a long run."""
    for flag, name in (("--json", json), ("--plot", plot)):
        if name is not None and not Path(name).absolute().parent.is_dir():
            raise ValueError(f"{flag} {name}: the folder {Path(name).parent} does not exist; make it first")
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'shoal[plot]'")


async def measure(args: argparse.Namespace, resolved: ResolvedConfig, threads: int) -> tuple[BenchReport, list[Trace]]:
    """Start the engine, measure the limits, send the workload."""
    session = await open_session(resolved)
    try:
        front_end, config = session.front_end, session.resolved.config
        assert session.model_dir is not None, "bench has a model"
        spec, _ = load_spec(session.model_dir)
        work = make_workload(
            args.dataset,
            args.num_prompts,
            args.input_len,
            args.output_len,
            spec.vocab_size,
            front_end.max_model_len,
            config.runtime.seed or 0,
        )
        limits = limits_of(session)
        client = front_end.client
        await run_in_turn(client, [Work(work[0].prompt_token_ids, 4)], "warm-up")
        before, start = await client.stats(), time.perf_counter()
        send = run_in_turn if args.kind == "latency" else run_together
        traces = await send(client, work, "bench")
        elapsed_s, after = time.perf_counter() - start, await client.stats()
    finally:
        await session.close()
    layout, rounded, itemsize = config.parallel, config.model.quantization, itemsize_of(limits.dtype)
    (whole,) = shard_model(spec, ParallelConfig(), rounded)
    device = "cpu" if limits.device == "cpu" else "cuda"
    token = step_work(spec, whole, StepRows(sequences=1, tokens=1, context=0), itemsize, itemsize, device)
    report = make_report(
        args.kind,
        traces,
        elapsed_s,
        before,
        after,
        limits,
        int(token.weights_bytes),
        token.flops,
        model=config.model.served_model_name or config.model.path or "?",
        layout=f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}",
        dtype=limits.dtype + ("" if rounded == "none" else f", {rounded} weights"),
    )
    return report, traces


def limits_of(session: Session) -> MachineLimits:
    """The machine's limits in the dtype the model runs in, on its device."""
    import torch

    config = session.resolved.config
    assert session.model_dir is not None
    dtype = config.model.dtype if config.model.dtype != "auto" else load_spec(session.model_dir)[0].dtype
    device = config.runtime.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return measure_limits(torch.device(device), getattr(torch, dtype))


def itemsize_of(dtype: str) -> int:
    """Bytes of one weight."""
    return 4 if dtype == "float32" else 2
