"""Asking processes for the Python stacks of their threads, also stopped ones that have never said a word.

faulthandler writes the stacks when STACK_SIGNAL comes; SIGCONT has a stopped process take it. It goes to the main
thread, which then stands still: a handler in another one would read the main thread's frames while they change. /proc
tells when the signal has been taken and its handler has returned: on a busy host that may be seconds later.
"""

import ctypes
import faulthandler
import os
import signal
import time
from collections.abc import Collection
from pathlib import Path

STACK_SIGNAL = signal.SIGUSR2
_BIT = 1 << (STACK_SIGNAL - 1)
POLL_S = 0.01
_LIBC = ctypes.CDLL(None)
LOOKS = 2  # in a row: between taking a signal and running its handler the kernel shows neither


def hold_stack_signal() -> None:
    """Keep the signal waiting, also in children, until they listen: it would end them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {STACK_SIGNAL})


def listen_for_stack_signal() -> None:
    """Write this process's stacks to its standard error whenever the signal comes, or has come."""
    faulthandler.register(STACK_SIGNAL, all_threads=True)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {STACK_SIGNAL})


def dump_stacks(pids: Collection[int], timeout_s: float) -> None:
    """Have children of a zygote write their stacks, and wait until they have, at most timeout_s. Those that have ended
    are no error.
    """
    # a thread may block every signal all its life (drivers' do); one that starts to runs the handler
    before = {pid: _threads_that_block(pid) for pid in pids}
    for pid in pids:
        _signal(pid)
    deadline = time.monotonic() + timeout_s
    looks = dict.fromkeys(pids, 0)
    while any(count < LOOKS for count in looks.values()) and time.monotonic() < deadline:
        time.sleep(POLL_S)
        looks = {pid: count + 1 if _written(pid, before[pid]) else 0 for pid, count in looks.items()}


def _signal(pid: int) -> None:
    try:
        if Path(f"/proc/{pid}/comm").read_text().startswith("shoal-"):  # or the number is another's by now
            _LIBC.tgkill(pid, pid, STACK_SIGNAL)
            os.kill(pid, signal.SIGCONT)
    except OSError:
        pass  # it has ended


def _written(pid: int, before: set[str]) -> bool:
    """Whether the signal is neither on its way nor being handled."""
    try:
        pending = _mask(Path(f"/proc/{pid}/status").read_text(), "SigPnd")
    except OSError:
        return True  # it has ended
    return pending is not None and not pending & _BIT and not _threads_that_block(pid) - before


def _threads_that_block(pid: int) -> set[str]:
    found = set()
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        try:
            blocked = _mask(status.read_text(), "SigBlk")
        except OSError:
            continue  # it has just ended
        if blocked is not None and blocked & _BIT:
            found.add(status.parent.name)
    return found


def _mask(status: str, name: str) -> int | None:
    """A set of signals in a status file; None where the system does not tell."""
    for line in status.splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value, 16)
    return None
