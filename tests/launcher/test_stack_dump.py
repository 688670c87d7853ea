"""The stacks of processes that are stopped, have never said a word, or take the signal late."""

import os
import signal
import threading
from pathlib import Path

from shoal.launcher.processes import Zygote
from shoal.launcher.stack_dump import STACK_SIGNAL, dump_stacks
from tests.launcher.harness import wait_until

CHILDREN = "tests.launcher.children"


def pending(pid: int) -> bool:
    """Whether the signal waits for the process to take it."""
    status = Path(f"/proc/{pid}/status").read_text().partition("SigPnd:")[2].split()[0]
    return bool(int(status, 16) & 1 << (STACK_SIGNAL - 1))


def forked(zygote: Zygote, entry: str, path: Path) -> tuple[int, int]:
    """A child that has written its pid: process id and pid."""
    process_id = zygote.connection.fork("rank 7", f"{CHILDREN}:{entry}", str(path).encode())
    wait_until(lambda: path.exists() and path.read_text() != "", "the child", 30)
    return process_id, int(path.read_text())


def log_of(zygote: Zygote, process_id: int) -> str:
    """What a child wrote, which is ended."""
    (exited,) = zygote.connection.end([process_id], 20)
    return exited.log


def test_a_stopped_process_writes_its_stack_and_is_waited_for(zygote: Zygote, tmp_path: Path) -> None:
    process_id, pid = forked(zygote, "wait", tmp_path / "pid")
    os.kill(pid, signal.SIGSTOP)
    dump_stacks([pid], 20.0)
    log = log_of(zygote, process_id)
    assert "most recent call first" in log and "in wait" in log


def test_a_signal_that_is_taken_late_is_waited_for(zygote: Zygote, tmp_path: Path) -> None:
    """As on a host that is too busy to let the process run."""
    process_id, pid = forked(zygote, "wait_deaf", tmp_path / "pid")
    os.kill(pid, signal.SIGSTOP)
    asking = threading.Thread(target=dump_stacks, args=([pid], 20.0))
    asking.start()
    wait_until(lambda: pending(pid), "the signal to wait")
    assert asking.is_alive()
    (tmp_path / "pid.listen").touch()
    asking.join(20.0)
    log = log_of(zygote, process_id)
    assert "most recent call first" in log and "in wait" in log


def test_a_process_that_is_gone_is_no_error(zygote: Zygote, tmp_path: Path) -> None:
    process_id, pid = forked(zygote, "wait", tmp_path / "pid")
    log_of(zygote, process_id)
    dump_stacks([pid], 20.0)
