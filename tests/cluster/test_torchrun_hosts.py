"""torchrun on two hosts, rehearsed in network namespaces: addresses, interfaces, gloo and TCP between them."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.cluster.hosts import Host, joined_hosts

SCRIPT = "tests/launcher/torchrun_script.py"
TIMEOUT_S = 150.0


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    with joined_hosts(2) as made:
        yield made


def start(hosts: list[Host], arguments: list[str], rendezvous: str, per_host: int) -> list[subprocess.Popen[str]]:
    """torchrun on every host, the first one being the master."""
    master = hosts[0].address
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(hosts))]
    command += ["--nproc-per-node", str(per_host)]

    def way(host: Host) -> list[str]:
        if rendezvous == "static":
            return ["--master-addr", master, "--master-port", "29511", "--node-rank", str(host.number)]
        # torchrun looks for the endpoint among the addresses of this machine's name, and would not find it here
        conf = f"is_host={int(host.number == 0)}"
        return [
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            f"{master}:29511",
            "--rdzv-id",
            "drill",
            "--rdzv-conf",
            conf,
        ]

    return [host.start([*command, *way(host), "--local-addr", host.address, *arguments]) for host in hosts]


@pytest.mark.parametrize("rendezvous", ["static", pytest.param("c10d", marks=pytest.mark.slow)])
def test_stages_on_two_hosts_serve_over_their_own_interfaces(hosts: list[Host], rendezvous: str) -> None:
    processes = start(hosts, [SCRIPT, ".", "1", "2", "1", "ends"], rendezvous, per_host=1)
    output, errors = processes[0].communicate(timeout=TIMEOUT_S)
    assert processes[0].returncode == 0, errors
    assert output == "serving 1\n"
    processes[1].communicate(timeout=30)
    assert all(host.pids() == [] for host in hosts)


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_an_attempt_after_a_failed_one_finds_nothing_of_it_on_either_host(hosts: list[Host], rendezvous: str) -> None:
    processes = start(hosts, ["--max-restarts", "1", SCRIPT, ".", "1", "2", "1", "restarts"], rendezvous, per_host=1)
    output, errors = processes[0].communicate(timeout=TIMEOUT_S)
    assert processes[0].returncode == 0, errors
    assert output == "serving 1\n"
    _, errors = processes[1].communicate(timeout=30)
    assert processes[1].returncode == 0, errors


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("layout, per_host", [("tp2_pp2", 2), ("tp2_pp2_dp2", 4)])
def test_demo_model_on_two_hosts_gives_the_tokens_of_one_process(hosts: list[Host], layout: str, per_host: int) -> None:
    """The stages of one replica on two hosts; with two, a host for each."""
    generate = ["generate", "demo", "-p", "def main(", "--max-tokens", "16", "--temperature", "0"]
    alone = subprocess.run(
        [sys.executable, "-m", "shoal", *generate], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    processes = start(hosts, ["-m", "shoal", *generate, "--config", layout], "static", per_host=per_host)
    output, errors = processes[0].communicate(timeout=TIMEOUT_S)
    assert processes[0].returncode == 0, errors
    assert output == alone.stdout
    processes[1].communicate(timeout=30)
