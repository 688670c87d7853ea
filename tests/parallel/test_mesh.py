"""The groups of a replica: who is in which, over every backend and rendezvous."""

import os
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from shoal.kernels.build import load_native
from shoal.parallel.communicator import CollectiveError, SingleCommunicator
from shoal.parallel.groups import GroupSpec, replica_groups
from shoal.parallel.mesh import make_mesh
from shoal.parallel.shm_segment import SharedSegment
from tests.ranks import Ranks, run_ranks

needs_native = pytest.mark.skipif(load_native("auto") is None, reason="no C compiler")
BACKENDS = [pytest.param("shm", marks=needs_native), "gloo"]


def test_groups_of_a_replica():
    groups = replica_groups(2, 3)
    assert groups[0] == GroupSpec("world", (0, 1, 2, 3, 4, 5))
    assert [g.ranks for g in groups if g.name == "tensor"] == [(0, 1), (2, 3), (4, 5)]
    assert [g.ranks for g in groups if g.name == "pipeline"] == [(0, 2, 4), (1, 3, 5)]
    with pytest.raises(ValueError, match="at least 1"):
        replica_groups(0, 1)


def describe(ranks: Ranks, backend: str, tp_size: int, pp_size: int, rendezvous: str | None = None) -> list:
    mesh = make_mesh(
        backend, ranks.rank, tp_size, pp_size, rendezvous or ranks.rendezvous, 20.0, True, load_native("auto")
    )
    groups = []
    for group in (mesh.world, mesh.tensor, mesh.pipeline):
        total = group.all_reduce(torch.tensor([1 << ranks.rank]))
        members = [rank for rank in range(ranks.world_size) if int(total) >> rank & 1]
        assert members == list(group.global_ranks) and group.global_ranks[group.rank] == ranks.rank
        groups.append([group.name, members, isinstance(group, SingleCommunicator)])
    last, first = mesh.pipeline.size - 1, 0
    if mesh.pipeline.rank == last and last > 0:  # also from the last stage to the first
        mesh.pipeline.send(torch.full((3,), ranks.rank), first)
    elif mesh.pipeline.rank == first and last > 0:
        assert int(mesh.pipeline.recv(torch.zeros(3, dtype=torch.int64), last)[0]) == mesh.pipeline.global_ranks[last]
    mesh.close()
    return groups


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_rank_is_in_its_groups(backend):
    answers = run_ranks(6, describe, backend, 2, 3)
    for rank, groups in enumerate(answers):
        stage, place = divmod(rank, 2)
        assert groups == [
            ["world", [0, 1, 2, 3, 4, 5], False],
            ["tensor", [2 * stage, 2 * stage + 1], False],
            ["pipeline", [place, place + 2, place + 4], False],
        ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_axes_of_size_one_need_no_communication(backend):
    for rank, groups in enumerate(run_ranks(2, describe, backend, 2, 1)):
        assert groups[1:] == [["tensor", [0, 1], False], ["pipeline", [rank], True]]


def test_one_rank_meets_nobody():
    mesh = make_mesh("gloo", 0, 1, 1, None, 1.0)
    assert torch.equal(mesh.world.all_reduce(torch.ones(2)), torch.ones(2))
    mesh.abort("nobody hears it")
    mesh.close()


@needs_native
def test_a_segment_made_by_the_owner():
    segment = SharedSegment.create(4, replica_groups(2, 2))
    try:
        assert len(run_ranks(4, describe, "shm", 2, 2, segment.path)) == 4
    finally:
        segment.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tcp_store_served_by_somebody(backend):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    run_ranks(2, describe, backend, 1, 2, f"tcp://127.0.0.1:{store.port}")


def ports_of_gloo(ranks: Ranks) -> list[str]:
    """Local addresses this process listens on, and what is left of the variable."""
    mesh = make_mesh("gloo", ranks.rank, 2, 1, ranks.rendezvous, 20.0)
    inodes = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    listening = []
    with open("/proc/net/tcp") as table:
        for line in list(table)[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                listening.append(socket.inet_ntoa(bytes.fromhex(fields[1].split(":")[0])[::-1]))
    mesh.close()
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    return listening


def test_gloo_listens_on_the_loopback_device_only():
    for listening in run_ranks(2, ports_of_gloo):
        assert set(listening) <= {"127.0.0.1"}


def meet_nobody(ranks: Ranks, backend: str) -> str:
    with pytest.raises(CollectiveError) as caught:
        make_mesh(backend, ranks.rank, 3, 1, ranks.rendezvous, 0.5, False, load_native("auto"))
    return str(caught.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_that_do_not_come_are_an_error_within_the_deadline(backend):
    texts = run_ranks(2, meet_nobody, backend)
    if backend == "shm":
        assert all("rank 2 (replica rank 2, never attached)" in text for text in texts)
    else:
        assert all("0.5 s" in text for text in texts)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("mpi", 0, 2, 1, "file:///x", 1.0), "no collectives called 'mpi'"),
        (("gloo", 2, 2, 1, "file:///x", 1.0), "rank 2 is not in a replica"),
        (("gloo", 0, 2, 1, None, 1.0), "need a rendezvous"),
        (("gloo", 0, 2, 1, "http://x", 1.0), "neither file://"),
        (("shm", 0, 2, 1, "file:///x", 1.0), "need the C kernels"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        make_mesh(*arguments)
