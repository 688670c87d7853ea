"""Faults under load on three hosts, chosen by a seed: whatever is killed, stopped or cut, the streams are those of an
undisturbed run. The replica has its stages on two hosts; the third is spare.
"""

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Host, joined_hosts
from tests.cluster.ray_hosts import RayHosts, named, send, wait_for
from tests.cluster.test_ray_hosts import alone, tokens

pytest.importorskip("ray")
SEED = int(os.environ.get("SHOAL_SEED", "7"))
FLAGS = ["--max-tokens", "160", "--ignore-eos", "--temperature", "0", "--max-num-seqs", "8", "--deterministic"]
NUM_PROMPTS, BEGUN = 48, 8  # a fault comes when so many outputs have been written, and others are being decoded
LIMIT_S = 400.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayHosts]:
    with joined_hosts(3) as hosts:
        yield RayHosts(hosts, cpus=[2, 2, 2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With prompts.txt, and alone.jsonl from one undisturbed process."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "prompts.txt").write_text("".join(f"def f{number}(x):\n" for number in range(NUM_PROMPTS)))
    alone(folder / "prompts.txt", folder / "alone.jsonl", *FLAGS)
    return folder


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


def blink_link(cluster: RayHosts, chance: random.Random) -> None:
    """Shorter than anybody's deadline: what was on its way is sent again."""
    host = chance.choice(with_ranks(cluster))
    host.cut()
    time.sleep(2.0)  # the length of the fault
    host.heal()


FAULTS = [kill_rank, kill_engine, stop_rank, kill_raylet, lose_node, cut_link]
random.Random(SEED).shuffle(FAULTS)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_fault_neither_loses_nor_changes_a_token(
    cluster: RayHosts, folder: Path, fault: Callable[[RayHosts, random.Random], None]
) -> None:
    messages, output = under_load(cluster, folder, fault)
    assert "is ready again" in messages
    assert tokens(output) == tokens(folder / "alone.jsonl")


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_link_that_is_cut_for_a_moment_costs_no_replica(cluster: RayHosts, folder: Path) -> None:
    messages, output = under_load(cluster, folder, blink_link)
    assert "failed" not in messages
    assert tokens(output) == tokens(folder / "alone.jsonl")


def under_load(cluster: RayHosts, folder: Path, fault: Callable[[RayHosts, random.Random], None]) -> tuple[str, Path]:
    """What a run said on standard error, and its output, that a fault came over while it was decoding."""
    output = folder / f"{fault.__name__}.jsonl"
    command = ["generate", "demo", "--prompts", str(folder / "prompts.txt"), "--output", str(output), *FLAGS]
    command += ["--launcher", "ray", "--ray-address", cluster.address, "-tp", "2", "-pp", "2", "--max-restarts", "20"]
    load = cluster.shoal(*command)
    messages: list[str] = []
    reader = threading.Thread(target=lambda: messages.append(load.stderr.read()), daemon=True)  # type: ignore[union-attr]
    reader.start()
    wait_for(lambda: lines(output) >= BEGUN or load.poll() is not None, "the first outputs", LIMIT_S)
    assert load.poll() is None and lines(output) < NUM_PROMPTS, messages
    started = time.monotonic()
    fault(cluster, random.Random(SEED))
    print(f"seed {SEED}: {fault.__name__} took {time.monotonic() - started:.1f} s", flush=True)
    try:
        load.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        load.kill()
    reader.join(20.0)
    print("".join(messages), flush=True)
    assert load.returncode == 0
    return messages[0], output
