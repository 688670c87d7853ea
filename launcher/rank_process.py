"""One rank's process: joins its engine, loads its shard, then runs step plans until told to stop.

A zygote forks it (`main`), torchrun's processes call `run_rank` themselves. The main thread may be in a kernel or a
collective for long; a heartbeat thread says so to the engine meanwhile, and ends the process when the engine is gone.
"""

import faulthandler
import logging
import os
import platform
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, Literal

import torch

from shoal.engine.messages import StepPlan
from shoal.engine.rank_messages import (
    TO_RANK,
    Allocate,
    Begin,
    CacheReady,
    Heartbeat,
    Hello,
    Loaded,
    Loading,
    LogLine,
    Ping,
    Profile,
    Profiled,
    RankFailure,
    Stop,
    ToRank,
)
from shoal.kernels.build import NativeLibrary, load_native
from shoal.launcher.bootstrap import RANK_BOOTSTRAP, RankBootstrap, versions
from shoal.launcher.stack_dump import listen_for_stack_signal
from shoal.launcher.zygote import resolve
from shoal.parallel.activity import Activity, watch_mesh
from shoal.parallel.communicator import CollectiveError
from shoal.parallel.control import Channel, ControlError
from shoal.parallel.control_connect import connect
from shoal.parallel.control_heartbeat import Heartbeat as HeartbeatThread
from shoal.parallel.interfaces import use_interface_of
from shoal.parallel.mesh import Mesh, make_mesh

IDLE_TIMEOUT_S = 3600.0  # an idle engine pings every minute; one that died is noticed by its hangup, at once
PROGRESS_INTERVAL_S = 0.1
MAX_LOG_CHARS = 4096
STACK_AFTER_S = 2.0
STACK_FRAMES = 8


def main(payload: bytes, supervisor_fd: int | None) -> None:
    """Entry of a forked rank."""
    raise SystemExit(run_rank(RANK_BOOTSTRAP.decode(payload)))


def run_rank(bootstrap: RankBootstrap) -> int:
    """Be a rank until the engine says stop (0), is gone, or something fails (1)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the owner decides when ranks end
    faulthandler.enable()
    listen_for_stack_signal()
    start_timeout_s = bootstrap.model.config.launcher.start_timeout_s
    channel = connect(bootstrap.address, bootstrap.key, TO_RANK, "the engine", min(30.0, start_timeout_s))
    if channel.own_host is not None:
        use_interface_of(channel.own_host)  # tensors go where plans come from
    rank = _Rank(bootstrap, channel)
    heart = HeartbeatThread(channel, rank.heartbeat, lambda: os._exit(1))
    heart.start()
    try:
        rank.serve()
        return 0
    except ControlError as error:
        print(f"rank {bootstrap.rank} ends: {error}", flush=True)
        return 1
    except Exception as error:  # noqa: BLE001 - told to the engine
        rank.fail(error)
        return 1
    finally:
        heart.stop()
        rank.close()
        channel.close()


class _Rank:
    """What the process holds and says."""

    def __init__(self, bootstrap: RankBootstrap, channel: "Channel[ToRank]") -> None:
        self._bootstrap, self._channel = bootstrap, channel
        self._config = bootstrap.model.config
        self._worker: Any = None
        self._mesh: Mesh | None = None
        self._activity = Activity()
        self._next_progress = 0.0
        self._serving = self._in_step = False

    def heartbeat(self) -> Heartbeat:
        """What to tell the engine now."""
        now, at = time.monotonic(), self._activity
        (count, waiting), for_s = at.look(), now - at.since
        return Heartbeat(
            rank=self._bootstrap.rank,
            doing=at.doing,
            for_s=for_s,
            step=self._in_step,
            count=count,
            waits="" if waiting is None else waiting.what,
            waits_s=0.0 if waiting is None else now - waiting.since,
            stack=main_stack() if for_s > STACK_AFTER_S and self._in_step else "",
        )

    def serve(self) -> None:
        """All of the rank's life. Raises what the worker raises, ControlError when the engine is gone."""
        native = self._prepare()
        limits = self._config.launcher
        begin = self._channel.receive(limits.start_timeout_s)
        if isinstance(begin, Stop):
            return
        assert isinstance(begin, Begin), f"the engine sent a {type(begin).__name__} before Begin"
        self._load(begin.rendezvous, native)
        while True:
            self._now("waiting for a plan")
            message = self._channel.receive(IDLE_TIMEOUT_S)
            match message:
                case StepPlan():
                    self._now(f"in step {message.step}", in_step=True)
                    result = self._worker.run(message)
                    if result is not None:
                        self._channel.send(result, limits.step_timeout_s)
                case Profile():
                    self._now("running the profiling step")
                    self._channel.send(Profiled(report=self._worker.profile()))
                case Allocate():
                    self._now("allocating the cache")
                    self._worker.allocate_cache(message.num_blocks)
                    self._channel.send(CacheReady(rank=self._bootstrap.rank))
                    self._serving = True
                case Ping():
                    pass
                case Stop():
                    return

    def _prepare(self) -> NativeLibrary | None:
        """Set threads, device and logging; introduce the rank. Returns the C kernels, None where there are none."""
        boot = self._bootstrap
        handler = _ToEngine(self._channel, boot.rank)
        logging.basicConfig(level=self._config.runtime.log_level.upper(), handlers=[handler], force=True)
        logging.captureWarnings(True)
        if boot.cores:
            os.sched_setaffinity(0, boot.cores)  # before torch makes threads, which inherit it
        torch.set_num_threads(boot.threads)
        torch.set_num_interop_threads(1)
        native = None
        if boot.device == "cpu":
            self._now("loading the C kernels")
            native = load_native(self._config.runtime.native)
        else:
            torch.cuda.set_device(boot.device)
            from shoal.kernels.gpu.compile import call_after_compiling  # only here: it imports Triton

            call_after_compiling(self._activity.tick)  # the first steps compile for longer than hangs may take
        self._channel.send(
            Hello(
                rank=boot.rank,
                pid=os.getpid(),
                host=platform.node(),
                versions=versions(),
                config=boot.config_fingerprint,
                native="" if native is None else native.fingerprint,
            )
        )
        self._now("waiting for the other ranks")
        return native

    def _load(self, rendezvous: str, native: NativeLibrary | None) -> None:
        """Join the other ranks and load."""
        boot, config = self._bootstrap, self._config
        make_worker = resolve(boot.model.worker)
        self._now(f"joining the other ranks ({config.runtime.collectives})")
        made = make_mesh(
            config.runtime.collectives,
            boot.rank,
            config.parallel.tensor,
            config.parallel.pipeline,
            rendezvous,
            config.launcher.step_timeout_s,
            config.runtime.deterministic,
            native,
            boot.device,
            pinned=bool(boot.cores),
        )
        mesh = self._mesh = watch_mesh(made, self._activity)
        model_dir = None if boot.model.model_dir is None else Path(boot.model.model_dir)
        self._worker = make_worker(config, boot.model.spec, boot.shard, mesh, model_dir, torch.device(boot.device))
        self._now("loading weights")
        self._worker.load(self._progress)
        self._worker.on_layer(self._activity.tick)
        self._channel.send(Loaded(rank=boot.rank))

    def _progress(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now >= self._next_progress or done >= total:
            self._next_progress = now + PROGRESS_INTERVAL_S
            self._channel.try_send(Loading(rank=self._bootstrap.rank, done=done, total=total))

    def _now(self, doing: str, in_step: bool = False) -> None:
        self._in_step = in_step
        self._activity.begin(doing)

    def fail(self, error: Exception) -> None:
        """Tell the engine why this rank ends, and the log in case the engine cannot be told."""
        detail = "".join(traceback.format_exception(error))
        print(detail, flush=True)
        kind: Literal["error", "consequence", "refusal"] = "error"
        cause = f"{type(error).__name__} while {self._activity.doing}: {error}"
        if isinstance(error, CollectiveError):
            kind = "consequence"
        elif isinstance(error, ValueError) and not self._serving:
            kind, cause = "refusal", str(error)
        elif self._mesh is not None:
            self._mesh.abort(f"rank {self._bootstrap.rank} failed: {error}")  # who waits for it need not wait on
        failure = RankFailure(rank=self._bootstrap.rank, cause=cause, detail=detail, kind=kind)
        try:
            self._channel.send(failure, timeout_s=2.0)
        except ControlError:
            pass  # it is gone, and the log has it

    def close(self) -> None:
        """Give back memory and groups; what goes wrong here must not hide an earlier error."""
        if self._worker is not None:
            try:
                self._worker.close()
            except Exception:  # noqa: BLE001 - the process ends now
                traceback.print_exc()


def main_stack() -> str:
    """Where the main thread is: the innermost STACK_FRAMES frames, the last call last."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return ""
    return "".join(traceback.format_list(traceback.extract_stack(frame)[-STACK_FRAMES:])).rstrip()


class _ToEngine(logging.Handler):
    """Sends log records to the engine, as many as it takes."""

    def __init__(self, channel: Channel, rank: int) -> None:
        super().__init__()
        self._channel, self._rank = channel, rank

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        try:
            text = self.format(record)[:MAX_LOG_CHARS]
            self._channel.try_send(LogLine(rank=self._rank, level=record.levelno, text=text))
        except ControlError:
            pass  # the main thread will notice
