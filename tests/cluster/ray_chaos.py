"""`shoal chaos` over Ray on rehearsed hosts, for tests and scripts/drills.py.

The drill runs on the head's host, which has no ranks where hosts are to be lost. A lost node is killed, raylet and all,
or cut off its network, in turns; a fresh one comes up in its place.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.hosts import Host, joined_hosts
from tests.cluster.ray_hosts import RayHosts

END_S = 60.0
MISSED_S = 15.0  # Ray has given up a node that was cut off
LIMITS = ["--deterministic", "--num-blocks", "1024", "--max-model-len", "512", "--max-restarts", "1000"]


def chaos_over_ray(cpus: list[int], arguments: Sequence[str], report: Path) -> bool:
    """Whether a drill passed. cpus: of each host, the head first. arguments: layout and load of `shoal chaos`."""
    with joined_hosts(len(cpus)) as hosts:
        cluster = RayHosts(hosts, cpus)
        place = ["--launcher", "ray", "--ray-address", cluster.address, "--json", str(report.resolve())]
        chaos = cluster.shoal("chaos", "demo", *arguments, *LIMITS, *place)
        shown = threading.Thread(target=_show, args=(chaos,), daemon=True)
        shown.start()
        try:
            _serve(chaos, cluster)
            passed = chaos.wait(END_S) == 0
        finally:
            chaos.kill()
            shown.join(END_S)
        return passed


def _show(chaos: "subprocess.Popen[str]") -> None:
    """Its messages, on standard error."""
    assert chaos.stderr is not None
    for line in chaos.stderr:
        print(line, end="", file=sys.stderr, flush=True)


def _serve(chaos: "subprocess.Popen[str]", cluster: RayHosts) -> None:
    """Lose the hosts it asks for; pass on what else it prints, to its end."""
    assert chaos.stdout is not None and chaos.stdin is not None
    lost = 0
    returning: threading.Thread | None = None
    for line in chaos.stdout:
        if not line.startswith("lose "):
            print(line, end="", flush=True)
            continue
        host = next(host for host in cluster.hosts if host.address == line.split()[1])
        if returning is not None:
            returning.join(END_S)  # there is a spare host again
        cut, lost = lost % 2 == 1, lost + 1
        moment = time.monotonic()
        if cut:
            host.cut()
        else:
            host.kill_all()
        chaos.stdin.write(f"{moment}\n")
        chaos.stdin.flush()
        returning = threading.Thread(target=_bring_back, args=(cluster, host, cut), daemon=True)
        returning.start()
    if returning is not None:
        returning.join(END_S)


def _bring_back(cluster: RayHosts, host: Host, cut: bool) -> None:
    """A fresh node; whatever ran on one that was cut off does not come back."""
    if cut:
        threading.Event().wait(MISSED_S)  # the length of the fault
        host.kill_all()
        host.heal()
    cluster.start_node(host.number)
