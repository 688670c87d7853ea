"""What a rank of `shoal doctor` does: every collective once for its result, then many times for its latency.

Forked through a zygote; rank 0 prints one line of JSON, which the zygote hands to the doctor with the rank's log.
"""

import json
import time
from collections.abc import Callable

import msgspec
import torch

from shoal.engine.messages import Message
from shoal.kernels.build import load_native
from shoal.parallel.communicator import Communicator
from shoal.parallel.mesh import make_mesh

SMALL, LARGE = 1024, 1 << 20  # float32 elements: 4 KB and 4 MB
ROUNDS = 50


class Trial(Message, frozen=True, kw_only=True):
    """One rank's part of trying a backend. rendezvous: a file:// address all ranks share."""

    backend: str
    rank: int
    size: int
    rendezvous: str
    timeout_s: float


def seconds_per_call(work: Callable[[], object], group: Communicator, rounds: int) -> float:
    """Mean seconds of one call, all ranks beginning together."""
    work()
    group.barrier()
    start = time.perf_counter()
    for _ in range(rounds):
        work()
    return (time.perf_counter() - start) / rounds


def check(group: Communicator, device: torch.device) -> list[str]:
    """Names of the collectives whose result is wrong, on tensors every rank can predict."""
    rank, size = group.rank, group.size
    wrong = []
    values = torch.arange(7.0, device=device)
    if not torch.equal(group.all_reduce(values * (rank + 1)), values * (size * (size + 1) // 2)):
        wrong.append("all_reduce")
    sizes = [index + 1 for index in range(size)]
    gathered = group.all_gather(torch.full((2, rank + 1), float(rank), device=device), sizes)
    expected = torch.cat([torch.full((2, count), float(index)) for index, count in enumerate(sizes)], dim=1)
    if not torch.equal(gathered.cpu(), expected):
        wrong.append("all_gather")
    if not torch.equal(group.broadcast(values + rank, size - 1).cpu(), torch.arange(7.0) + size - 1):
        wrong.append("broadcast")
    if size > 1:
        received = torch.empty_like(values)
        group.send(values + rank, (rank + 1) % size)
        if not torch.equal(group.recv(received, (rank - 1) % size).cpu(), torch.arange(7.0) + (rank - 1) % size):
            wrong.append("send and recv")
    return wrong


def main(payload: bytes, _supervisor: int | None) -> None:
    """Entry of a forked rank."""
    trial = msgspec.msgpack.decode(payload, type=Trial)
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if trial.backend == "nccl":
        device = torch.device("cuda", trial.rank)
        torch.cuda.set_device(device)  # before the group is made: its barrier runs on the current one
    native = load_native("auto") if trial.backend == "shm" else None
    mesh = make_mesh(
        trial.backend, trial.rank, trial.size, 1, trial.rendezvous, trial.timeout_s, deterministic=False, native=native
    )
    group = mesh.tensor
    wrong = check(group, device)
    small, large = torch.ones(SMALL, device=device), torch.ones(LARGE, device=device)
    latency = seconds_per_call(lambda: group.all_reduce(small), group, ROUNDS)
    bulk = seconds_per_call(lambda: group.all_reduce(large), group, 5)
    group.barrier()
    mesh.close()
    if trial.rank == 0:
        print(json.dumps({"wrong": wrong, "all_reduce_4kb_us": 1e6 * latency, "all_reduce_4mb_ms": 1e3 * bulk}))
