"""The report of a fault drill: what was done, what it cost, and whether anything was lost; JSON and a table."""

import subprocess
from pathlib import Path

import msgspec

from shoal.configs.schema import ShoalConfig
from shoal.launcher.bench_report import percentile
from shoal.launcher.chaos_plan import PlannedFault
from shoal.launcher.vitals import Vitals


class FaultOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """One fault as it went. at_s: since the drill began. decoding: streams that were decoding on the replica. cause: as
    the controller named it. noticed_s, recovered_s: after the fault. skipped: why it was not done.
    """

    fault: PlannedFault
    at_s: float
    decoding: int = 0
    cause: str = ""
    noticed_s: float | None = None
    recovered_s: float | None = None
    skipped: str = ""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """The launch's vitals at a moment of the drill."""

    at_s: float
    vitals: Vitals


class ChaosReport(msgspec.Struct, kw_only=True):
    """completed: requests that ran to their end. hit: those of them whose replica died under them. equal: completed
    ones equal to an undisturbed run, tokens and log-probabilities; diverged: the others. lost: ended with an error.
    """

    seed: int
    commit: str
    layout: str
    model: str
    dtype: str
    deterministic: bool
    streams: int
    elapsed_s: float
    completed: int
    hit: int
    equal: int
    diverged: int
    diverged_hit: int
    lost: int
    errors: list[str]
    faults: list[FaultOutcome]
    restarts: int
    tokens_per_s: float
    idle_blocks_free: bool
    samples: list[Sample]

    @property
    def passed(self) -> bool:
        """Nothing lost, every block free at the end, and in deterministic mode nothing diverged; of the faults that
        were planned, at least one was done.
        """
        done = not self.faults or any(not outcome.skipped for outcome in self.faults)
        return done and not self.lost and self.idle_blocks_free and not (self.deterministic and self.diverged)


def commit_of(folder: Path) -> str:
    """The checkout's commit, with "+" when it has changes; "unknown" outside of one."""
    try:
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()


def layout_of(config: ShoalConfig) -> str:
    """In words."""
    layout = config.parallel
    return f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}"


def report_rows(report: ChaosReport) -> list[tuple[str, str]]:
    """The report as (name, value) lines of a table."""
    done = [outcome for outcome in report.faults if not outcome.skipped]
    kinds = {kind: sum(outcome.fault.kind == kind for outcome in done) for kind in {o.fault.kind for o in done}}
    noticed = [outcome.noticed_s for outcome in done if outcome.noticed_s is not None]
    recovered = [outcome.recovered_s for outcome in done if outcome.recovered_s is not None]
    rows = [
        ("drill", f"{report.model}, {report.dtype}, {report.layout}, seed {report.seed}, commit {report.commit}"),
        ("faults", ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items())) or "NONE COULD BE DONE"),
        ("streams", f"{report.streams} at a time, {report.completed} completed, {report.tokens_per_s:.0f} tokens/s"),
        ("hit", f"{report.hit} had a replica die under them while decoding"),
        ("equal", f"{report.equal} of {report.completed} equal an undisturbed run, {report.diverged} diverged"),
        ("lost", str(report.lost)),
    ]
    for name, values in (("noticed", noticed), ("mended", recovered)):
        if values:
            rows.append((name, f"p50 {percentile(values, 50):.2f} s, max {max(values):.2f} s after the fault"))
    if len(report.samples) > 1:
        rows.append(("vitals", f"{_vitals(report.samples[0])} -> {_vitals(report.samples[-1])}"))
    rows.append(("blocks", "all free or cached at the end" if report.idle_blocks_free else "SOME STILL REFERENCED"))
    return rows


def _vitals(sample: Sample) -> str:
    vitals = sample.vitals
    return (
        f"{vitals.memory_bytes >> 20} MiB, {vitals.processes} processes, {vitals.threads} threads, "
        f"{vitals.descriptors} descriptors, {vitals.shm_files} shm files"
    )
