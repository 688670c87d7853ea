"""run_ranks: run a function on several rank processes, quickly. For every test that needs more than one process.

    from tests.ranks import Ranks, run_ranks

    def sum_ranks(ranks: Ranks, scale: int) -> float:          # a module-level function of the test file
        mesh = make_mesh("gloo", ranks.rank, ranks.world_size, 1, ranks.rendezvous, 20.0)
        ...
        return float(total)

    def test_sum():
        assert run_ranks(3, sum_ranks, 2) == [6.0, 6.0, 6.0]   # results in rank order

One helper process per pytest run imports torch once and forks the ranks of each job (0.05 s instead of 2.5 s each);
they have one thread, run the function and exit. Arguments and results travel as msgpack: numbers, strings, bytes,
None, lists, dicts and torch tensors (tuples come back as lists). An exception on any rank is raised here as
RankFailed with that rank's traceback and output; the remaining ranks get `grace_s` to end by themselves, then are
killed. A job that passes timeout_s is killed and fails too. A test of failures names the ranks that must die in
`dying`: their result is None.

`python -m tests.ranks FD` is the helper's own entry.
"""

import atexit
import contextlib
import ctypes
import importlib
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

ROOT = Path(__file__).resolve().parent.parent
TENSOR_EXT = 1
PR_SET_PDEATHSIG = 1


class RankFailed(AssertionError):
    """A rank raised, died or ran out of time. The text holds its traceback."""


@dataclass(frozen=True)
class Ranks:
    """What a rank function is told. directory: fresh, shared by the ranks of the job, removed after it. timeout_s: of
    the job.
    """

    rank: int
    world_size: int
    directory: Path
    timeout_s: float

    @property
    def rendezvous(self) -> str:
        """A fresh file:// address for make_mesh or init_process_group."""
        return f"file://{self.directory}/rendezvous"


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_s: float = 60.0,
    grace_s: float = 2.0,
    dying: Collection[int] = (),
) -> list[Any]:
    """Run function(ranks, *args) on world_size fresh processes and return their results in rank order. Raises
    RankFailed.
    """
    global _helper
    if _helper is None or _helper.process.poll() is not None:
        _helper = _Helper()
    job = {
        "module": function.__module__,
        "function": function.__qualname__,
        "world_size": world_size,
        "args": list(args),
        "timeout_s": timeout_s,
        "grace_s": grace_s,
        "dying": sorted(dying),
    }
    try:
        answer = _helper.run(job, timeout_s + grace_s + 30.0)
    except BaseException:
        _helper.close()
        raise
    if answer["failure"]:
        raise RankFailed(answer["failure"])
    return answer["results"]


# ---- messages: msgpack with tensors, length-framed


def _encode_other(value: Any) -> msgspec.msgpack.Ext:
    import torch

    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"run_ranks carries numbers, strings, bytes, lists, dicts and tensors, not {type(value).__name__}"
        )
    plain = value.detach().contiguous().cpu()
    data = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return msgspec.msgpack.Ext(
        TENSOR_EXT, msgspec.msgpack.encode([str(plain.dtype).removeprefix("torch."), list(plain.shape), data])
    )


def _decode_ext(code: int, data: memoryview) -> Any:
    import torch

    assert code == TENSOR_EXT
    dtype, shape, raw = msgspec.msgpack.decode(data)
    if not raw:
        return torch.empty(shape, dtype=getattr(torch, dtype))
    return torch.frombuffer(bytearray(raw), dtype=getattr(torch, dtype)).reshape(shape)


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_other)
_decoder = msgspec.msgpack.Decoder(ext_hook=_decode_ext)


def _write(sock: socket.socket, message: Any) -> None:
    data = _encoder.encode(message)
    sock.sendall(struct.pack("<Q", len(data)) + data)


def _read(sock: socket.socket) -> Any:
    size = struct.unpack("<Q", _read_bytes(sock, 8))[0]
    return _decoder.decode(_read_bytes(sock, size))


def _read_bytes(sock: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while len(view):
        count = sock.recv_into(view)
        if count == 0:
            raise EOFError("the other side closed the socket")
        view = view[count:]
    return data


# ---- the side of the test


class _Helper:
    """The process that forks ranks, seen from the test."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.ranks", str(theirs.fileno())],
                cwd=ROOT,
                env={**os.environ, **single, "PYTHONPATH": os.pathsep.join(paths)},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self.sock = ours
        atexit.register(self.close)

    def run(self, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        self.sock.settimeout(timeout_s)
        try:
            _write(self.sock, job)
            return _read(self.sock)
        except (EOFError, OSError) as error:
            raise RankFailed(f"the helper of run_ranks does not answer: {error}") from error

    def close(self) -> None:
        self.sock.close()
        with contextlib.suppress(OSError):
            self.process.kill()  # its ranks go with it (PDEATHSIG)
        self.process.wait(10)


_helper: _Helper | None = None


# ---- the side of the helper


def _serve(sock: socket.socket) -> None:
    """Run jobs until the test's side closes."""
    _die_with_parent()
    while True:
        try:
            job = _read(sock)
        except EOFError:
            return
        _write(sock, _run_job(job, sock))


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _run_job(job: dict[str, Any], sock: socket.socket) -> dict[str, Any]:
    directory = Path(tempfile.mkdtemp(prefix="shoal-ranks-"))
    children: dict[int, tuple[int, socket.socket]] = {}
    with contextlib.suppress(Exception):  # imported once here, every fork has it; a module that cannot be fails there
        importlib.import_module(job["module"])
    try:
        for rank in range(job["world_size"]):
            ours, theirs = socket.socketpair()
            pid = os.fork()
            if pid == 0:
                for inherited in [sock, ours, *(other for _, other in children.values())]:
                    inherited.close()
                _rank_main(job, rank, directory, theirs)
            theirs.close()
            children[rank] = (pid, ours)
        return _collect(job, children, directory)
    finally:
        for pid, ours in children.values():
            ours.close()
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        shutil.rmtree(directory, ignore_errors=True)


def _collect(job: dict[str, Any], children: dict[int, tuple[int, socket.socket]], directory: Path) -> dict[str, Any]:
    """Take every rank's answer; after the first failure the others get grace_s."""
    waiting = {ours: rank for rank, (_, ours) in children.items()}
    results: list[Any] = [None] * job["world_size"]
    failures: list[str] = []
    deadline = time.monotonic() + job["timeout_s"]
    while waiting:
        ready, _, _ = select.select(list(waiting), [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            why = (
                f"had not ended after {job['timeout_s']:g} s"
                if not failures
                else "was still running when another had failed"
            )
            failures += [_report(rank, why, directory) for rank in sorted(waiting.values())]
            break
        for ours in ready:
            rank = waiting.pop(ours)
            try:
                results[rank], error = _read(ours)
            except (EOFError, OSError):
                error = None if rank in job["dying"] else "ended without an answer"
            if error:
                failures.append(_report(rank, error, directory))
                deadline = min(deadline, time.monotonic() + job["grace_s"])
    return {"results": results, "failure": "\n\n".join(failures)}


def _report(rank: int, what: str, directory: Path) -> str:
    log = directory / f"rank{rank}.log"
    output = log.read_text(errors="replace")[-4000:].strip() if log.exists() else ""
    return f"rank {rank}: {what}" + (f"\n--- its output ---\n{output}" if output else "")


def _rank_main(job: dict[str, Any], rank: int, directory: Path, sock: socket.socket) -> None:
    """The life of a forked rank; never returns."""
    try:
        _die_with_parent()
        log = os.open(directory / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        result, error = None, None
        try:
            import torch

            torch.set_num_threads(1)
            function: Any = importlib.import_module(job["module"])
            for name in job["function"].split("."):
                function = getattr(function, name)
            result = function(Ranks(rank, job["world_size"], directory, job["timeout_s"]), *job["args"])
            _encoder.encode(result)
        except BaseException:  # noqa: BLE001  whatever it is, the test must see it
            result, error = None, traceback.format_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        _write(sock, [result, error])
    finally:
        os._exit(0)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
