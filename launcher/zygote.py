"""The zygote: a process with torch imported and nothing else done, that forks ranks and engines in milliseconds.

    python -m shoal.launcher.zygote FD OWNER_PID MODULE...        # started by shoal.launcher.processes, not by hand

It runs no torch operation and does not touch CUDA, so it has one thread and a fork of it is safe. FD is a control
channel to the owner; a child that supervises others (an engine) gets a channel of its own. Whoever's channel closes
loses the children forked through it, and when the owner is gone (its channel or getppid says so) everything ends:
within POLL_S, whatever killed the owner. Children die with the zygote (PDEATHSIG), ignore SIGINT, and write to a
bounded log that is told when they end.
"""

import ctypes
import gc
import importlib
import os
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from shoal.launcher.stack_dump import hold_stack_signal, listen_for_stack_signal
from shoal.launcher.zygote_messages import (
    OWNER_MESSAGES,
    Exited,
    Fork,
    Forked,
    Loaded,
    OwnerMessage,
    Signal,
    ZygoteMessage,
)
from shoal.parallel.control import Channel, ControlError

POLL_S = 0.5
LOG_BYTES = 32 << 10
PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15


def name_process(name: str) -> None:
    """What `ps` and `top` show (15 bytes)."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the parent ends; end now when it already has."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


class _Connection:
    """One who forks: the owner, or a child that supervises."""

    def __init__(self, channel: "Channel[OwnerMessage]") -> None:
        self.channel = channel
        self.children: dict[int, _Child] = {}
        self.open = True


class _Child:
    """A forked process and the end of what it wrote."""

    def __init__(self, process_id: int, pid: int, connection: _Connection, log_fd: int) -> None:
        self.process_id, self.pid, self.connection, self.log_fd = process_id, pid, connection, log_fd
        self._tail = bytearray()
        os.set_blocking(log_fd, False)

    def read_log(self) -> bool:
        """Take what was written; False at its end."""
        while True:
            try:
                data = os.read(self.log_fd, 1 << 16)
            except BlockingIOError:
                return True
            if not data:
                return False
            self._tail += data
            del self._tail[:-LOG_BYTES]

    @property
    def log(self) -> str:
        """The last of what it wrote."""
        return self._tail.decode(errors="replace")


class Zygote:
    """The serving loop. Never returns: `run` ends the process."""

    def __init__(self, owner: "Channel[OwnerMessage]", owner_pid: int) -> None:
        self._owner_pid, self._pid = owner_pid, os.getpid()
        self._children: dict[int, _Child] = {}
        self._selector = selectors.DefaultSelector()
        self._owner = self._connect(owner)
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._drain_wakeups)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # only to be woken by it

    def run(self) -> NoReturn:
        """Serve until the owner is gone."""
        while self._owner.open and os.getppid() == self._owner_pid:
            for key, _ in self._selector.select(POLL_S):
                key.data()
            self._reap()
        for child in self._children.values():
            os.kill(child.pid, signal.SIGKILL)
        for child in self._children.values():
            os.waitpid(child.pid, 0)
        os._exit(0)

    def _connect(self, channel: "Channel[OwnerMessage]") -> _Connection:
        connection = _Connection(channel)
        self._selector.register(channel, selectors.EVENT_READ, lambda: self._read(connection))
        return connection

    def _read(self, connection: _Connection) -> None:
        try:
            for message in connection.channel.poll():
                match message:
                    case Fork():
                        self._fork(connection, message)
                    case Signal() if message.process_id in connection.children:
                        os.kill(connection.children[message.process_id].pid, message.signal)
        except ControlError:
            self._disconnect(connection)

    def _disconnect(self, connection: _Connection) -> None:
        """Whoever forked is gone: so are its children."""
        connection.open = False
        self._selector.unregister(connection.channel)
        connection.channel.close()
        for child in connection.children.values():
            os.kill(child.pid, signal.SIGKILL)

    def _fork(self, connection: _Connection, message: Fork) -> None:
        log_read, log_write = os.pipe2(os.O_CLOEXEC)
        ours, theirs = socket.socketpair() if message.supervises else (None, None)
        try:
            pid = os.fork()
        except OSError as error:
            os.close(log_read)
            os.close(log_write)
            self._tell(connection, Exited(process_id=message.process_id, pid=0, status=1, log=f"fork failed: {error}"))
            return
        if pid == 0:
            self._become(message, log_read, log_write, ours, theirs)
        os.close(log_write)
        child = _Child(message.process_id, pid, connection, log_read)
        self._children[pid] = connection.children[message.process_id] = child
        self._selector.register(log_read, selectors.EVENT_READ, lambda: self._read_log(child))
        if ours is not None and theirs is not None:
            theirs.close()
            self._connect(Channel(ours, OWNER_MESSAGES, message.name))
        self._tell(connection, Forked(process_id=message.process_id, pid=pid))

    def _become(
        self,
        message: Fork,
        log_read: int,
        log_write: int,
        ours: socket.socket | None,
        theirs: socket.socket | None,
    ) -> NoReturn:
        """In the child: let go of everything of the zygote's, then do the work."""
        status = 1
        try:
            die_with_parent(self._pid)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.dup2(log_write, 1)
            os.dup2(log_write, 2)
            listen_for_stack_signal()
            for key in list(self._selector.get_map().values()):
                if isinstance(key.fileobj, Channel):
                    key.fileobj.release()
                else:
                    os.close(key.fd)
            self._selector.close()
            for fd in (self._wake_write, log_read, log_write):
                os.close(fd)
            if ours is not None:
                ours.close()
            sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
            name_process(f"shoal-{message.name}".replace(" ", "-"))
            resolve(message.entry)(message.payload, None if theirs is None else theirs.detach())
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:  # noqa: BLE001 - told through the log and the exit status
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _read_log(self, child: _Child) -> None:
        if not child.read_log():
            self._selector.unregister(child.log_fd)

    def _reap(self) -> None:
        while self._children:
            pid, wait_status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            child = self._children.pop(pid)
            del child.connection.children[child.process_id]
            child.read_log()
            if child.log_fd in self._selector.get_map():
                self._selector.unregister(child.log_fd)
            os.close(child.log_fd)
            status = os.waitstatus_to_exitcode(wait_status)
            self._tell(child.connection, Exited(process_id=child.process_id, pid=pid, status=status, log=child.log))

    def _tell(self, connection: _Connection, message: ZygoteMessage) -> None:
        """Report; one that does not listen for seconds is as good as gone."""
        if not connection.open:
            return
        try:
            connection.channel.send(message, timeout_s=2.0)
        except ControlError:
            self._disconnect(connection)

    def _drain_wakeups(self) -> None:
        try:
            os.read(self._wake_read, 4096)
        except BlockingIOError:
            pass


def resolve(entry: str) -> Callable[..., object]:
    """The object that "module:attribute" names. Raises ValueError when the text is of another form."""
    module, separator, attribute = entry.partition(":")
    if not separator:
        raise ValueError(f"{entry!r} must be module:attribute")
    return getattr(importlib.import_module(module), attribute)


def main(arguments: list[str]) -> NoReturn:
    """Import what the children will need, then serve."""
    fd, owner_pid, modules = int(arguments[0]), int(arguments[1]), arguments[2:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hold_stack_signal()
    name_process("shoal-zygote")
    owner = Channel(socket.socket(fileno=fd), OWNER_MESSAGES, "the owner")
    # No thread may watch the owner here: it would not survive a fork. A timer's signal is enough while importing.
    signal.signal(signal.SIGALRM, lambda *_: None if os.getppid() == owner_pid else os._exit(1))
    signal.setitimer(signal.ITIMER_REAL, POLL_S, POLL_S)
    gc.disable()
    try:
        for module in modules:
            importlib.import_module(module)
        cuda = "torch" in sys.modules and sys.modules["torch"].version.cuda is not None
    except Exception:  # noqa: BLE001 - the owner shows it
        owner.send(Loaded(pid=os.getpid(), error=traceback.format_exc()))
        sys.exit(1)
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    gc.collect()
    gc.freeze()
    gc.enable()
    owner.send(Loaded(pid=os.getpid(), cuda=cuda))
    Zygote(owner, owner_pid).run()


if __name__ == "__main__":
    # The module itself, not __main__: what children import must be the same objects.
    from shoal.launcher import zygote

    zygote.main(sys.argv[1:])
