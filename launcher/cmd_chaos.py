"""shoal chaos: a fault drill on a model under load, reproducible from its seed, with a report.

    shoal chaos demo --config tp2_dp2 --seed 7 --minutes 2 --deterministic

Kills and stops ranks and engines while streams decode; over Ray through the crews on their hosts. `--faults lose-host`
prints `lose ADDRESS` and waits for a line: whoever runs the drill unplugs that host. Exit status 1 when a request was
lost, when blocks were not free at the end, when no fault could be done, or, with --deterministic, when a stream differs
from an undisturbed run; without it, how many do is reported.
"""

import argparse
import asyncio
import select
import sys
import time
from pathlib import Path
from typing import Any, cast

import msgspec

from shoal.configs.resolved import ResolvedConfig
from shoal.engine.client import EngineError
from shoal.launcher.chaos_drill import Drill
from shoal.launcher.chaos_plan import KINDS, FaultKind, LoadShape, plan_faults, plan_requests
from shoal.launcher.chaos_report import ChaosReport, commit_of, layout_of, report_rows
from shoal.launcher.controller import Controller
from shoal.launcher.kinds import choose_launcher
from shoal.launcher.session import Session, open_session_shown
from shoal.launcher.tables import text_table
from shoal.model.families import load_spec

ROOT = Path(__file__).resolve().parents[1]
LOST: FaultKind = "lose host"
LOSE_TIMEOUT_S = 600.0
FAULTS_PER_PAUSE = 4  # more are planned than fit, should mending be quick


def run(args: argparse.Namespace, resolved: ResolvedConfig) -> int:
    """Drill; returns 0 when it passed. Raises ValueError and EngineError."""
    attach = resolved.config.launcher.attach
    if attach is not None:
        raise ValueError(f"launcher.attach = {attach}: a drill hurts replicas of its own; leave it out")
    kinds = read_kinds(args.faults)
    if LOST in kinds and choose_launcher(resolved.config, {}) != "ray":
        raise ValueError("--faults lose-host: only launcher.kind = ray has several hosts")
    report = asyncio.run(_drill(args, _with_processes(resolved), kinds))
    print(text_table(("chaos", ""), report_rows(report)))
    for error in report.errors:
        print(f"lost: {error}", file=sys.stderr)
    if args.json is not None:
        Path(args.json).write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    return 0 if report.passed else 1


def read_kinds(text: str) -> tuple[FaultKind, ...]:
    """The kinds a comma-separated list names. Raises ValueError."""
    names = {kind.replace(" ", "-"): kind for kind in (*KINDS, LOST)}
    unknown = [name for name in text.split(",") if name not in names]
    if unknown:
        raise ValueError(f"--faults: there is no fault {unknown[0]!r}; there are {', '.join(names)}")
    return tuple(names[name] for name in text.split(","))


async def ask_for_loss(host: str) -> float:
    """Say which host to lose on standard output, and wait for a line on standard input, on which a script on this
    machine may write the moment (time.monotonic) it did so. Returns that, or when the line came. Raises EngineError.
    """
    print(f"lose {host}", flush=True)
    asked = time.monotonic()
    deadline = asked + LOSE_TIMEOUT_S
    while not (await asyncio.to_thread(select.select, [sys.stdin], [], [], 1.0))[0]:
        if time.monotonic() >= deadline:
            raise EngineError(f"nobody said within {LOSE_TIMEOUT_S:g} s that the host is lost")
    line = await asyncio.to_thread(sys.stdin.readline)
    if not line:
        raise EngineError("nobody can say that the host is lost: standard input is at its end")
    now = time.monotonic()
    try:
        return min(max(asked, float(line)), now)
    except ValueError:
        return now


def _with_processes(resolved: ResolvedConfig) -> ResolvedConfig:
    """One rank in this process could not be killed without the drill: it gets a process of its own."""
    config = resolved.config
    if choose_launcher(config, {}) != "inprocess":
        return resolved
    print("launcher.kind = local: the rank gets a process of its own, to be killed", file=sys.stderr)
    launcher = msgspec.structs.replace(config.launcher, kind="local")
    return ResolvedConfig(config=msgspec.structs.replace(config, launcher=launcher), sources=resolved.sources)


async def _drill(args: argparse.Namespace, resolved: ResolvedConfig, kinds: tuple[FaultKind, ...]) -> ChaosReport:
    session = await open_session_shown(resolved)
    try:
        config = session.resolved.config
        controller = session.front_end.client
        if not isinstance(controller, Controller):
            raise ValueError(f"launcher.kind = {config.launcher.kind}: this launcher cannot be drilled; use local")
        seed, layout = config.runtime.seed or 0, config.parallel
        shape = LoadShape(
            pool=args.pool,
            max_output=args.max_output,
            max_model_len=session.front_end.max_model_len,
            vocab_size=session.front_end.vocab_size,
        )
        most = args.count or int(FAULTS_PER_PAUSE * 60 * args.minutes / args.pause) + 1
        faults = plan_faults(seed, most, layout.data, config.ranks_per_replica, kinds, args.pause)
        mend_s = config.launcher.hang_timeout_s + config.launcher.start_timeout_s
        drill = Drill(
            controller,
            plan_requests(seed, shape),
            args.streams,
            mend_s,
            lambda text: print(text, file=sys.stderr),
            ask_for_loss,
        )
        await drill.run(faults, None if args.count else 60 * args.minutes, args.requests)
        return await _report(args, session, controller, drill)
    finally:
        await session.close()


async def _report(args: argparse.Namespace, session: Session, controller: Controller, drill: Drill) -> ChaosReport:
    config = session.resolved.config
    dtype = config.model.dtype
    if dtype == "auto" and session.model_dir is not None:
        dtype = cast(Any, load_spec(session.model_dir)[0].dtype)
    status = await controller.status()
    return ChaosReport(
        seed=config.runtime.seed or 0,
        commit=commit_of(ROOT),
        layout=layout_of(config),
        model=config.model.served_model_name or config.model.path or "?",
        dtype=dtype,
        deterministic=config.runtime.deterministic,
        streams=args.streams,
        elapsed_s=drill.elapsed_s,
        completed=drill.completed,
        hit=drill.hit,
        equal=drill.equal,
        diverged=drill.diverged,
        diverged_hit=drill.diverged_hit,
        lost=drill.lost,
        errors=drill.errors,
        faults=drill.faults,
        restarts=sum(replica.restarts for replica in status.replicas),
        tokens_per_s=drill.tokens / max(drill.elapsed_s, 1e-9),
        idle_blocks_free=await drill.blocks_are_free(),
        samples=drill.samples,
    )
