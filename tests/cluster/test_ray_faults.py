"""Faults under load on three hosts, chosen by a seed: whatever is killed, stopped or cut, the streams are those of an
undisturbed run. The replica has its stages on two hosts; the third is spare.
"""

import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Host, joined_hosts
from tests.cluster.ray_hosts import RayHosts, named, send, wait_for
from tests.cluster.test_ray_hosts import alone, tokens

pytest.importorskip("ray")
SEED = int(os.environ.get("SHOAL_SEED", "7"))
FLAGS = ["--max-tokens", "900", "--ignore-eos", "--temperature", "0", "--set", "runtime.deterministic=true"]
RECOVERY_S = 120.0


@pytest.fixture
def cluster() -> Iterator[RayHosts]:
    with joined_hosts(3) as hosts:
        yield RayHosts(hosts, cpus=[2, 2, 2])


class Load:
    """A `shoal generate` on the head's host, whose messages are read as they come."""

    def __init__(self, cluster: RayHosts, prompts: Path, output: Path) -> None:
        flags = ["--launcher", "ray", "--ray-address", cluster.address, "-tp", "2", "-pp", "2"]
        flags += ["--set", "launcher.max_restarts=20"]
        self.process = cluster.shoal(
            "generate", "demo", "--prompts", str(prompts), "--output", str(output), *FLAGS, *flags
        )
        self.messages: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.messages.append(line.rstrip())

    def seen(self, pattern: str) -> int:
        """How many messages match."""
        return sum(1 for line in self.messages if re.search(pattern, line))

    def wait(self, pattern: str, times: int, what: str) -> None:
        """Wait for the n-th message of a kind; fail when the command has ended."""
        wait_for(
            lambda: self.seen(pattern) >= times or self.process.poll() is not None,
            f"{what}; it said:\n" + "\n".join(self.messages),
            RECOVERY_S,
        )
        assert self.process.poll() is None, f"ended while waiting for {what}:\n" + "\n".join(self.messages)


def with_ranks(cluster: RayHosts) -> list[Host]:
    """Hosts other than the head's with ranks of the replica."""
    return [host for host in cluster.hosts[1:] if named(host, "^shoal-rank-")]


def engine_host(cluster: RayHosts) -> Host:
    return next(host for host in cluster.hosts if named(host, "^shoal-engine-"))


def kill_rank(cluster: RayHosts, chance: random.Random) -> None:
    hosts = [host for host in cluster.hosts if named(host, "^shoal-rank-")]
    send([chance.choice(named(chance.choice(hosts), "^shoal-rank-"))])


def kill_engine(cluster: RayHosts, chance: random.Random) -> None:
    send(named(engine_host(cluster), "^shoal-engine-"))


def stop_rank(cluster: RayHosts, chance: random.Random) -> None:
    hosts = [host for host in cluster.hosts if named(host, "^shoal-rank-")]
    send([chance.choice(named(chance.choice(hosts), "^shoal-rank-"))], signal.SIGSTOP)


def kill_raylet(cluster: RayHosts, chance: random.Random) -> None:
    host = chance.choice(with_ranks(cluster))
    send(named(host, "/raylet "))
    wait_for(lambda: not named(host, "^shoal-"), "the node's processes to end", 30.0)
    host.kill_all()
    cluster.start_node(host.number)


def lose_node(cluster: RayHosts, chance: random.Random) -> None:
    host = chance.choice(with_ranks(cluster))
    host.kill_all()
    cluster.start_node(host.number)


def cut_link(cluster: RayHosts, chance: random.Random) -> None:
    """Longer than Ray bears: its node ends there, and is started again."""
    host = chance.choice(with_ranks(cluster))
    host.cut()
    time.sleep(12.0)  # the length of the fault
    host.heal()
    wait_for(lambda: not named(host, "/raylet "), "Ray to give its node up", 60.0)
    host.kill_all()
    cluster.start_node(host.number)


FAULTS = (kill_rank, kill_engine, stop_rank, kill_raylet, lose_node, cut_link)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_no_fault_loses_or_changes_a_token(cluster: RayHosts, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"def f{number}(x):\n" for number in range(60)))
    expected = alone(prompts, tmp_path / "alone.jsonl", *FLAGS)
    chance = random.Random(SEED)
    faults = list(FAULTS)
    chance.shuffle(faults)
    load = Load(cluster, prompts, tmp_path / "ray.jsonl")
    load.wait("largest context", 1, "the start")
    for number, fault in enumerate(faults, 1):
        print(f"seed {SEED}, fault {number}: {fault.__name__}", flush=True)
        started = time.monotonic()
        fault(cluster, chance)
        load.wait("is ready again", number, f"recovery from {fault.__name__}")
        print(f"  ready again after {time.monotonic() - started:.1f} s", flush=True)
    try:
        load.process.wait(900)
    except subprocess.TimeoutExpired:
        pytest.fail("the run did not end:\n" + "\n".join(load.messages))
    assert load.process.returncode == 0, "\n".join(load.messages)
    assert tokens(tmp_path / "ray.jsonl") == expected
