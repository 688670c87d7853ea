"""What the zygote's tests fork: entries that answer through a file or the log, wait, fail, or fork again."""

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

import msgspec

from shoal.launcher.stack_dump import STACK_SIGNAL


def report(payload: bytes, fd: int | None) -> None:
    """Write what this process is like, as JSON, to the file named by the payload."""
    torch = sys.modules["torch"]
    state = {
        "pid": os.getpid(),
        "ppid": os.getppid(),
        "sid": os.getsid(0),
        "threads": threading.active_count(),
        "kernel_threads": len(os.listdir("/proc/self/task")),
        "cuda": torch.cuda.is_initialized(),
        "name": Path("/proc/self/comm").read_text().strip(),
        "sigint_ignored": signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
        "descriptors": sorted(os.readlink(f"/proc/self/fd/{n}").split(":")[0] for n in range(64) if is_open(n)),
        "main": "user_script" in getattr(sys.modules["__main__"], "__file__", ""),
    }
    with open(payload.decode(), "wb") as file:
        file.write(msgspec.json.encode(state))


def is_open(fd: int) -> bool:
    """Whether this process has the descriptor."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def leave(payload: bytes, fd: int | None) -> None:
    """Exit with the code in the payload."""
    sys.exit(int(payload))


def fail(payload: bytes, fd: int | None) -> None:
    """Raise."""
    print("about to fail")
    raise RuntimeError("the reason")


def talk(payload: bytes, fd: int | None) -> None:
    """Write more than the log keeps."""
    for number in range(20_000):
        print(f"line {number}")


def crash(payload: bytes, fd: int | None) -> None:
    """Read address zero."""
    ctypes.string_at(0)


def wait(payload: bytes, fd: int | None) -> None:
    """Wait to be killed, for a minute at most."""
    if payload:
        with open(payload.decode(), "w") as file:
            file.write(str(os.getpid()))
    time.sleep(60)


def wait_deaf(payload: bytes, fd: int | None) -> None:
    """Wait like `wait`, deaf to the stack signal until the payload's file with ".listen" is there."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {STACK_SIGNAL})
    with open(payload.decode(), "w") as file:
        file.write(str(os.getpid()))
    while not os.path.exists(payload.decode() + ".listen"):
        time.sleep(0.01)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {STACK_SIGNAL})
    wait(b"", None)


def supervise(payload: bytes, fd: int | None) -> None:
    """Fork one child that waits, note both pids in the payload's file, and wait too."""
    from shoal.launcher.processes import ZygoteConnection

    assert fd is not None
    connection = ZygoteConnection.from_fd(fd)
    connection.fork("grandchild", "tests.launcher.children:wait", payload + b".child")
    while not os.path.exists(payload.decode() + ".child") or not Path(payload.decode() + ".child").read_text():
        time.sleep(0.01)
    wait(payload, None)
