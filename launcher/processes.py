"""Starting and ending processes through a zygote: the owner's side. No torch.

A front end starts one `Zygote` per launch; whoever was forked to supervise others (an engine) gets a
`ZygoteConnection` by its descriptor.
"""

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from shoal.launcher.zygote_messages import ZYGOTE_MESSAGES, Exited, Fork, Forked, Loaded, Signal
from shoal.parallel.control import Channel, ControlError, PeerGone

PRELOAD = ("torch", "shoal.launcher.rank_process", "shoal.launcher.engine_process", "shoal.engine.worker")


class LaunchError(RuntimeError):
    """A process could not be started, or ended before it was ready: the text names it and the cause."""


def describe_exit(exited: Exited) -> str:
    """How a process ended, in words: `killed by SIGKILL`, `exit code 1`."""
    if exited.status < 0:
        try:
            name = signal.Signals(-exited.status).name
        except ValueError:
            name = f"signal {-exited.status}"
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}"
    return f"ended with exit code {exited.status}"


def signal_ours(pid: int, number: int) -> bool:
    """Send a signal to a process of this host that is called as Shoal's are; False when there is no such one."""
    try:
        if not Path(f"/proc/{pid}/comm").read_text().startswith("shoal-"):
            return False
        os.kill(pid, number)
    except OSError:
        return False
    return True


class ZygoteConnection:
    """Forks children through a zygote and learns how they end. Closing it ends them all.

    running: process ids that were forked here and have not been reported as ended.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._next_id = 0
        self.running: dict[int, str] = {}
        self.pids: dict[int, int] = {}

    @classmethod
    def from_fd(cls, fd: int) -> "ZygoteConnection":
        """The connection a supervising child was given."""
        return cls(Channel(socket.socket(fileno=fd), ZYGOTE_MESSAGES, "the zygote"))

    def fileno(self) -> int:
        """For selectors: readable when `poll` has news."""
        return self._channel.fileno()

    def fork(self, name: str, entry: str, payload: bytes, supervises: bool = False) -> int:
        """Start a child that calls entry(payload, descriptor); returns its process id (not its pid). Raises
        LaunchError.
        """
        process_id = self._next_id
        self._next_id += 1
        try:
            self._channel.send(
                Fork(process_id=process_id, name=name, entry=entry, payload=payload, supervises=supervises)
            )
        except ControlError as error:
            raise LaunchError(f"cannot start {name}: {error}") from None
        self.running[process_id] = name
        return process_id

    def signal(self, process_id: int, number: int) -> None:
        """Send a signal to a child; one that has ended is no error."""
        if process_id in self.running:
            try:
                self._channel.send(Signal(process_id=process_id, signal=number))
            except ControlError:
                pass  # without its zygote the child is dead already

    def poll(self) -> list[Exited]:
        """The children that ended since the last call, without waiting. Raises PeerGone when the zygote is gone."""
        ended = []
        for message in self._channel.poll():
            match message:
                case Exited():
                    self.running.pop(message.process_id, None)
                    ended.append(message)
                case Forked():
                    self.pids[message.process_id] = message.pid
        return ended

    def wait(self, process_ids: Sequence[int], timeout_s: float) -> list[Exited]:
        """Wait until these children ended; returns what ended meanwhile. Check `running` for those that did not in
        time.
        """
        deadline = time.monotonic() + timeout_s
        ended: list[Exited] = []
        while any(process_id in self.running for process_id in process_ids):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self], [], [], left)[0]:
                break
            try:
                ended += self.poll()
            except PeerGone:
                self.running.clear()
        return ended

    def end(self, process_ids: Sequence[int], timeout_s: float) -> list[Exited]:
        """Kill these children now and wait until they are gone."""
        for process_id in process_ids:
            self.signal(process_id, signal.SIGKILL)
        return self.wait(process_ids, timeout_s)

    def close(self) -> None:
        """Close the connection: the zygote kills whatever still runs. Idempotent."""
        self._channel.close()


class Zygote:
    """A zygote of this process. It is started by the constructor and imports while the caller goes on; `loaded` waits
    for it.
    """

    def __init__(self, preload: Sequence[str] = PRELOAD) -> None:
        if not sys.executable:
            raise LaunchError(
                "this Python does not know its own executable (sys.executable), so ranks cannot be started"
            )
        ours, theirs = socket.socketpair()
        command = [
            sys.executable,
            "-P",
            "-m",
            "shoal.launcher.zygote",
            str(theirs.fileno()),
            str(os.getpid()),
            *preload,
        ]
        try:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                env=_environment(),
            )
        except OSError as error:
            ours.close()
            raise LaunchError(f"cannot start {sys.executable}: {error}") from error
        finally:
            theirs.close()
        self._channel: Channel = Channel(ours, ZYGOTE_MESSAGES, "the zygote")
        self.connection = ZygoteConnection(self._channel)
        self.pid, self._owner_pid = self._process.pid, os.getpid()
        self.cuda = False
        self._loaded = False

    def loaded(self, timeout_s: float) -> None:
        """Wait until it can fork; sets `cuda`. Raises LaunchError with the cause when it cannot. Idempotent."""
        if self._loaded:
            return
        try:
            message = self._channel.receive(timeout_s)
        except ControlError as error:
            raise LaunchError(f"the zygote did not start: {error}; its messages are above") from None
        assert isinstance(message, Loaded), "a zygote introduces itself first"
        if message.error is not None:
            raise LaunchError(f"the zygote could not import what ranks need\n{message.error}")
        self.cuda, self._loaded = message.cuda, True

    def close(self, timeout_s: float = 2.0) -> None:
        """End it and all that was forked through it. Idempotent; without effect in a fork of its owner."""
        if os.getpid() != self._owner_pid:
            return
        self._channel.close()
        if not self._loaded:
            self._process.kill()  # it is importing, and would look at the channel only afterwards
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()


def _environment() -> dict[str, str]:
    """The caller's environment, with its module search path, so that the zygote finds the same torch and the same
    shoal, installed or from a checkout. OpenBLAS must not start threads at import: they would not survive a fork.
    """
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
