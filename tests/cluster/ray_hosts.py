"""A Ray cluster over network namespaces: a node in each, with a private temporary folder; commands of shoal there."""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cluster.hosts import Host

PORT = 6390
DASHBOARD = "http://127.0.0.1:8265"
START_TIMEOUT_S = 150.0
NOTICE_S = 6.0  # after which Ray's health checks have found a node that is gone


def ray_environment() -> dict[str, str]:
    """Of every process of one cluster: its token, and how soon a lost node is noticed."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "1000",
        "RAY_health_check_failure_threshold": "5",
        "RAY_raylet_start_wait_time_s": "120",
        "OMP_NUM_THREADS": "1",
    }


class RayHosts:
    """Started nodes, the head in the first host."""

    def __init__(self, hosts: list[Host], cpus: list[int], jobs: bool = False) -> None:
        """cpus: that each node says it has. jobs: the head takes jobs, and no node finds the checkout by itself."""
        self.hosts, self.env, self._cpus = hosts, ray_environment(), cpus
        self.address = f"{hosts[0].address}:{PORT}"
        if jobs:
            search = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
            self.env |= {"PYTHONPATH": "", "PATH": search}
        head = ["--head", "--port", str(PORT), "--include-dashboard", str(jobs).lower()]
        self._wait(self._launch(hosts[0], head))
        for starting in [self._launch(host, ["--address", self.address]) for host in hosts[1:]]:
            self._wait(starting)

    def start_node(self, number: int) -> None:
        """Start the node of a host again, after its loss."""
        self._wait(self._launch(self.hosts[number], ["--address", self.address]))

    def _launch(self, host: Host, arguments: list[str]) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments]
        command += ["--node-ip-address", host.address, "--num-cpus", str(self._cpus[host.number])]
        command += ["--temp-dir", str(host.folder)]
        command += ["--object-store-memory", str(80 << 20), "--disable-usage-stats"]
        return host.start(command, self.env)

    @staticmethod
    def _wait(process: subprocess.Popen[str]) -> None:
        output, errors = process.communicate(timeout=START_TIMEOUT_S)
        assert process.returncode == 0, output + errors

    def shoal(self, *arguments: str, host: int = 0) -> subprocess.Popen[str]:
        """Start a command of shoal on a host."""
        return self.hosts[host].start([sys.executable, "-m", "shoal", *arguments], self.env)

    def run_shoal(self, *arguments: str, timeout_s: float = 150.0) -> str:
        """A command's standard output, once it has ended well."""
        process = self.shoal(*arguments)
        output, errors = process.communicate(timeout=timeout_s)
        assert process.returncode == 0, f"shoal {' '.join(arguments)}\n{output}\n{errors}"
        return output

    def job(self, *arguments: str, timeout_s: float = 200.0) -> tuple[int, str]:
        """`ray job submit`: its exit status, and the job's log among what it says."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", DASHBOARD, *arguments]
        process = self.hosts[0].start(command, self.env)
        output, errors = process.communicate(timeout=timeout_s)
        return process.returncode, output + errors

    def status(self, name: str) -> dict[str, Any]:
        """`shoal status --json`."""
        process = self.shoal("status", name, "--ray-address", self.address, "--json")
        output, errors = process.communicate(timeout=60.0)
        assert process.returncode in (0, 1) and output, errors
        found: dict[str, Any] = json.loads(output)
        return found


def named(host: Host, pattern: str) -> list[int]:
    """Processes in a namespace whose name (as `ps` shows it) or command line matches."""
    found = []
    for pid in host.pids():
        try:
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if re.search(pattern, name) or re.search(pattern, line):
            found.append(pid)
    return sorted(found)


def send(pids: list[int], number: int = signal.SIGKILL) -> None:
    """A signal to processes, which must be there."""
    assert pids, "nothing to send a signal to"
    for pid in pids:
        os.kill(pid, number)


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float) -> None:
    """Wait for a condition, and fail by name when it does not come true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.1)
