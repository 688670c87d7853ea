"""Numbers of a benchmark run: percentiles, the share of the machine's limits, as table, JSON and picture.

TTFT: from sending to the first token. TPOT: (end to end - TTFT) / (tokens - 1). ITL: gap between two tokens. Decoding
one token of one request reads every weight once, so tokens/s x weight bytes is the bandwidth used; every token costs
two FLOP per weight it touches.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from shoal.engine.messages import EngineStats
from shoal.launcher.bench_workload import Trace
from shoal.launcher.machine import MachineLimits

PERCENTILES = (50, 90, 99)


class BenchReport(msgspec.Struct, kw_only=True):
    """Everything a run says. Times in milliseconds by percentile ("p50": ...).

    rank_us_per_step: of the rank that samples, its layers ("forward"), what it waits for before them ("wait"), logits
    and sampling ("sample").
    """

    kind: str
    model: str
    layout: str
    dtype: str
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    elapsed_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft_ms: dict[str, float]
    tpot_ms: dict[str, float]
    itl_ms: dict[str, float]
    engine_us_per_step: float
    rank_us_per_step: dict[str, float]
    steps: int
    weights_bytes: int
    limits: MachineLimits
    bandwidth_share: float | None
    gemm_share: float


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the nearest ranks; NaN of nothing."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summary_ms(values: Sequence[float]) -> dict[str, float]:
    """Percentiles and mean of seconds, in milliseconds."""
    found = {f"p{percent}": round(1e3 * percentile(values, percent), 3) for percent in PERCENTILES}
    return {"mean": round(1e3 * sum(values) / len(values), 3) if values else float("nan"), **found}


def make_report(
    kind: str,
    traces: Sequence[Trace],
    elapsed_s: float,
    before: Sequence[EngineStats],
    after: Sequence[EngineStats],
    limits: MachineLimits,
    weights_bytes: int,
    flops_per_token: float,
    **labels: Any,
) -> BenchReport:
    """Put the traces of one run together. labels: model, layout, dtype."""
    output = sum(len(trace.token_times) for trace in traces)
    prompt = sum(trace.prompt_len for trace in traces)
    cached = sum(trace.num_cached_tokens for trace in traces)
    gaps = [b - a for trace in traces for a, b in pairwise(trace.token_times)]
    tpot = [
        (trace.token_times[-1] - trace.token_times[0]) / (len(trace.token_times) - 1)
        for trace in traces
        if len(trace.token_times) > 1
    ]

    def spent(name: str) -> float:
        return sum(getattr(stats, name) for stats in after) - sum(getattr(stats, name) for stats in before)

    steps = int(spent("steps"))
    decode_s = sum(trace.token_times[-1] - trace.token_times[0] for trace in traces if trace.token_times)
    alone = kind == "latency" and decode_s > 0
    return BenchReport(
        kind=kind,
        num_requests=len(traces),
        prompt_tokens=prompt,
        output_tokens=output,
        cached_tokens=cached,
        elapsed_s=elapsed_s,
        output_tokens_per_s=output / elapsed_s,
        total_tokens_per_s=(output + prompt) / elapsed_s,
        ttft_ms=summary_ms([trace.token_times[0] - trace.sent for trace in traces if trace.token_times]),
        tpot_ms=summary_ms(tpot),
        itl_ms=summary_ms(gaps),
        engine_us_per_step=1e6 * spent("engine_s") / max(1, steps),
        rank_us_per_step={part: 1e6 * spent(f"{part}_s") / max(1, steps) for part in ("forward", "wait", "sample")},
        steps=steps,
        weights_bytes=weights_bytes,
        limits=limits,
        bandwidth_share=(output - len(traces)) / decode_s * weights_bytes / limits.read_bytes_per_s if alone else None,
        gemm_share=(output + prompt - cached) / elapsed_s * flops_per_token / limits.gemm_flops_per_s,
        **labels,
    )


def report_rows(report: BenchReport) -> list[tuple[str, str]]:
    """The report as (name, value) lines of a table."""
    times = [
        (name, "  ".join(f"{key} {value:.1f}" for key, value in summary.items()) + " ms")
        for name, summary in (("TTFT", report.ttft_ms), ("TPOT", report.tpot_ms), ("ITL", report.itl_ms))
    ]
    share = "" if report.bandwidth_share is None else f"{report.bandwidth_share:.1%} of"
    return [
        ("model", f"{report.model}, {report.dtype}, {report.layout}"),
        ("requests", f"{report.num_requests}: {report.prompt_tokens} prompt, {report.output_tokens} output tokens"),
        ("throughput", f"{report.output_tokens_per_s:.1f} output tokens/s, {report.total_tokens_per_s:.1f} in all"),
        *times,
        ("last stage", ", ".join(f"{part} {us:.0f}" for part, us in report.rank_us_per_step.items()) + " us per step"),
        ("engine", f"{report.engine_us_per_step:.0f} us per step outside the model, {report.steps} steps"),
        ("bandwidth", f"{share} {report.limits.read_bytes_per_s / 1e9:.1f} GB/s measured in this run".strip()),
        ("GEMM", f"{report.gemm_share:.1%} of {report.limits.gemm_flops_per_s / 1e9:.0f} GFLOP/s measured in this run"),
    ]


def plot_report(report: BenchReport, traces: Sequence[Trace], path: Path) -> None:
    """Distribution of TTFT and ITL as a picture. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    first = sorted(1e3 * (trace.token_times[0] - trace.sent) for trace in traces if trace.token_times)
    gaps = sorted(1e3 * (b - a) for trace in traces for a, b in pairwise(trace.token_times))
    for axes, values, name in ((left, first, "TTFT"), (right, gaps, "ITL")):
        axes.plot(values, [(index + 1) / len(values) for index in range(len(values))], drawstyle="steps-post")
        axes.set(xlabel=f"{name} (ms)", ylabel="share of samples", ylim=(0, 1.02), title=name)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{report.model} {report.layout} {report.dtype}: {report.output_tokens_per_s:.0f} output tokens/s")
    figure.savefig(path, dpi=120)
