"""Hosts for tests: network namespaces joined by a bridge, each with an address of its own; commands run inside them.

Needs root and iproute2. Everything ends with the fixture: what runs in the namespaces, links, temporary folders.
"""

import contextlib
import os
import platform
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMAND_TIMEOUT_S = 20.0
END_TIMEOUT_S = 10.0


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


class Host:
    """One namespace. folder: for its temporary files; short, as it holds Unix sockets."""

    def __init__(self, number: int, tag: str) -> None:
        self.number, self.name = number, f"shoal-{tag}-{number}"
        self.address = f"10.77.{int(tag[:2], 16)}.{number + 1}"
        self.inside, self.outside = "eth0", f"sh{tag}{number}"
        self.folder = Path(tempfile.mkdtemp(prefix=f"sh{tag}{number}-", dir="/tmp"))
        self.files = Path("/etc/netns") / self.name
        self.started: list[subprocess.Popen[str]] = []

    def start(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Run a command in the namespace, its input and output as pipes."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.name, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(self.folder), "PYTHONPATH": str(ROOT), **(env or {})},
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def name_itself(self) -> None:
        """The files `ip netns exec` puts into /etc there: the machine's name is this address, and no name is asked of a
        server that cannot be reached.
        """
        self.files.mkdir(parents=True)
        (self.files / "hosts").write_text(f"127.0.0.1 localhost\n{self.address} {platform.node()}\n")
        (self.files / "resolv.conf").write_text(f"nameserver {self.address}\noptions timeout:1 attempts:1\n")

    def pids(self) -> list[int]:
        """Of everything that runs in the namespace."""
        done = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, timeout=20)
        return [int(line) for line in done.stdout.split()]

    def cut(self) -> None:
        """Unplug it from the bridge."""
        _ip("link", "set", self.outside, "down")

    def heal(self) -> None:
        """Plug it in again."""
        _ip("link", "set", self.outside, "up")

    def kill_all(self) -> None:
        """End everything in it, as the loss of the host would."""
        deadline = time.monotonic() + END_TIMEOUT_S
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() >= deadline:
                raise RuntimeError(f"{self.name}: {pids} do not end")
            time.sleep(0.02)
        for process in self.started:
            process.communicate(timeout=END_TIMEOUT_S)
        self.started.clear()


def why_not() -> str | None:
    """Why namespaces cannot be made here; None when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    name = f"shoal-try-{uuid.uuid4().hex[:6]}"
    try:
        _ip("netns", "add", name)
        _ip("netns", "del", name)
        _ip("link", "add", "shoaltry", "type", "bridge")
        _ip("link", "del", "shoaltry")
    except RuntimeError as error:
        return f"network namespaces are not permitted: {error}"
    return None


@contextlib.contextmanager
def joined_hosts(count: int) -> Iterator[list[Host]]:
    """Hosts on one bridge. Skips the test with the reason where they cannot be made."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    tag = uuid.uuid4().hex[:6]
    bridge, hosts = f"sb{tag}", [Host(number, tag) for number in range(count)]
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("link", "set", bridge, "up")
        for host in hosts:
            host.name_itself()
            _ip("netns", "add", host.name)
            _ip("link", "add", host.outside, "type", "veth", "peer", "name", host.inside, "netns", host.name)
            _ip("link", "set", host.outside, "master", bridge, "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.inside)
            _ip("-n", host.name, "link", "set", host.inside, "up")
            _ip("-n", host.name, "route", "add", "default", "dev", host.inside)
        yield hosts
    finally:
        for host in hosts:
            with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
                host.kill_all()
            for undo in (("netns", "del", host.name), ("link", "del", host.outside)):
                with contextlib.suppress(RuntimeError):
                    _ip(*undo)
            shutil.rmtree(host.folder, ignore_errors=True)
            shutil.rmtree(host.files, ignore_errors=True)
        with contextlib.suppress(OSError):
            Path("/etc/netns").rmdir()  # when it is empty
        with contextlib.suppress(RuntimeError):
            _ip("link", "del", bridge)
