"""torch.distributed collectives: the same contract as shared memory, over gloo on the loopback device."""

import os
import signal

import pytest
import torch

from shoal.parallel.communicator import CollectiveError
from shoal.parallel.mesh import make_mesh
from shoal.parallel.torch_comm import TorchCommunicator
from tests.parallel.collectives import draw, exercise, expected_sum, long_message, wait_for_files
from tests.ranks import Ranks, run_ranks


def exercise_mesh(
    ranks: Ranks, tp_size: int, pp_size: int, rounds: int, deterministic: bool, device: str = "cpu"
) -> int:
    mesh = make_mesh("gloo", ranks.rank, tp_size, pp_size, ranks.rendezvous, 20.0, deterministic, device=device)
    total = 0
    for group in (mesh.world, mesh.tensor, mesh.pipeline):
        if group.size > 1:
            total += exercise(group, rounds, seed=group.size, exact_sums=deterministic or group.size == 2)
            long_message(group, 300_000)
    mesh.close()
    mesh.close()
    return total


@pytest.mark.parametrize(
    ("tp_size", "pp_size", "deterministic"), [(2, 1, False), (2, 2, True), (1, 3, True), (4, 1, False)]
)
def test_random_operations_on_every_group(tp_size, pp_size, deterministic):
    groups = 1 + (tp_size > 1) + (pp_size > 1)
    done = run_ranks(tp_size * pp_size, exercise_mesh, tp_size, pp_size, 20, deterministic)
    assert done == [20 * groups] * (tp_size * pp_size)


def test_staged_operations_keep_the_contract() -> None:
    """Through host memory, as ranks that share a GPU do; on CPU tensors, which staging passes on."""
    assert run_ranks(2, exercise_mesh, 2, 1, 20, True, "cuda:0") == [40, 40]


def sum_halves(ranks: Ranks) -> list[torch.Tensor]:
    mesh = make_mesh("gloo", ranks.rank, ranks.world_size, 1, ranks.rendezvous, 20.0)
    generator = torch.Generator().manual_seed(ranks.rank)
    return [mesh.tensor.all_reduce(draw(generator, (999,), dtype) * 8) for dtype in (torch.bfloat16, torch.float16)]


def test_halves_are_summed_in_float32_even_when_not_deterministic():
    answers = run_ranks(4, sum_halves)
    generators = [torch.Generator().manual_seed(rank) for rank in range(4)]
    for index, dtype in enumerate((torch.bfloat16, torch.float16)):
        want = expected_sum([draw(generator, (999,), dtype) * 8 for generator in generators])
        assert all(torch.equal(answer[index], want) for answer in answers)


def sum_both_ways(ranks: Ranks) -> list[torch.Tensor]:
    group = make_mesh("gloo", ranks.rank, 4, 1, ranks.rendezvous, 20.0, deterministic=True).tensor
    value = draw(torch.Generator().manual_seed(ranks.rank), (50_000,), torch.float32) * 1e3
    pieces = [group.all_reduce(piece.clone()) for piece in value.split(7001)]
    return [group.all_reduce(value), torch.cat(pieces)]


def test_deterministic_sums_do_not_depend_on_the_messages_length():
    parts = [draw(torch.Generator().manual_seed(rank), (50_000,), torch.float32) * 1e3 for rank in range(4)]
    for whole, pieces in run_ranks(4, sum_both_ways):
        assert torch.equal(whole, expected_sum(parts)) and torch.equal(whole, pieces)


def disagree(ranks: Ranks, what: str) -> str:
    group = make_mesh("gloo", ranks.rank, 3, 1, ranks.rendezvous, 20.0).tensor
    odd = ranks.rank == 1
    with pytest.raises(CollectiveError) as caught:
        if what == "operation":
            group.barrier() if odd else group.all_reduce(torch.ones(4))
        elif what == "dtype":
            group.all_reduce(torch.ones(4, dtype=torch.bfloat16 if odd else torch.float32))
        else:
            group.all_reduce(torch.ones((9, 2) if odd else (3, 6)))
    with pytest.raises(CollectiveError, match="earlier error"):
        group.barrier()
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("operation", ["rank 0: all_reduce #1 float32[4]", "rank 1: barrier #1"]),
        ("dtype", ["rank 0: all_reduce #1 float32[4]", "rank 1: all_reduce #1 bfloat16[4]"]),
        ("shape", ["rank 0: all_reduce #1 float32[3, 6]", "rank 1: all_reduce #1 float32[9, 2]"]),
    ],
)
def test_disagreement_is_an_error_on_every_rank_that_names_both(what, words):
    for text in run_ranks(3, disagree, what):
        assert "group tensor" in text and all(word in text for word in words), text


def receive_wrongly(ranks: Ranks) -> str:
    group = make_mesh("gloo", ranks.rank, 1, 2, ranks.rendezvous, 20.0).pipeline
    if ranks.rank == 0:
        group.send(torch.ones(3), 1)
        wait_for_files(ranks, ["done1"])
        return ""
    with pytest.raises(CollectiveError) as caught:
        group.recv(torch.ones(4), 0)
    (ranks.directory / "done1").touch()
    return str(caught.value)


def test_a_message_of_another_shape_is_an_error_of_the_receiver():
    text = run_ranks(2, receive_wrongly)[1]
    assert "rank 1 expected send #1 float32[4]" in text and "rank 0 sent send #1 float32[3]" in text


def lose_one(ranks: Ranks, how: str, timeout_s: float) -> str:
    group = make_mesh("gloo", ranks.rank, 3, 1, ranks.rendezvous, timeout_s).tensor
    group.barrier()
    if ranks.rank == 2:
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        wait_for_files(ranks, ["done0", "done1"])
        return ""
    with pytest.raises(CollectiveError) as caught:
        group.all_reduce(torch.ones(5))
    (ranks.directory / f"done{ranks.rank}").touch()
    wait_for_files(ranks, ["done0", "done1"])  # an ending process would be a second failure to its peers
    return str(caught.value)


def test_a_dead_rank_fails_the_others_and_is_named():
    for text in run_ranks(3, lose_one, "dies", 30.0, dying=[2])[:2]:
        assert "rank 2 (replica rank 2)" in text, text


def test_a_late_rank_fails_the_others_at_the_deadline_and_is_named():
    for text in run_ranks(3, lose_one, "hangs", 1.0)[:2]:
        assert "waited at most 1 s" in text and "rank 2 (replica rank 2)" in text, text


def misuse(ranks: Ranks) -> list[str]:
    group = make_mesh("gloo", ranks.rank, 2, 1, ranks.rendezvous, 20.0).tensor
    attempts = [
        lambda: group.all_reduce(torch.ones(4, 4).t()[:, :2]),
        lambda: group.all_reduce(torch.ones(4, dtype=torch.bool)),
        lambda: group.all_reduce(torch.ones(4, dtype=torch.complex64)),
        lambda: group.all_gather(torch.ones(2, 3), [4, 4]),
        lambda: group.all_gather(torch.ones(2, 3), [3, 3], 2),
        lambda: group.broadcast(torch.ones(4), 2),
        lambda: group.send(torch.ones(4), group.rank),
        lambda: group.all_reduce(torch.ones(4, device="meta")),
    ]
    texts = []
    for attempt in attempts:
        with pytest.raises(CollectiveError) as caught:
            attempt()
        texts.append(str(caught.value))
    group.barrier()
    group.close()
    with pytest.raises(CollectiveError, match="closed"):
        group.barrier()
    return texts


def test_misuse_is_refused_before_anything_is_sent():
    texts = run_ranks(2, misuse)[0]
    assert "contiguous" in texts[0] and "cannot sum torch.bool" in texts[1]


def flood(ranks: Ranks, count: int) -> int:
    """Many more messages than may be pending, while the receiver is busy elsewhere."""
    group = make_mesh("gloo", ranks.rank, 1, 2, ranks.rendezvous, 20.0).pipeline
    value = torch.empty(1000)
    for number in range(count):
        if ranks.rank == 0:
            group.send(value.fill_(number), 1)
        else:
            assert float(group.recv(value, 0).sum()) == 1000.0 * number
    group.close()
    return len(group._pending)


def test_unreceived_messages_are_bounded_and_none_is_lost():
    assert run_ranks(2, flood, 50) == [0, 0]


class Busy:
    """A device's event that comes after so many looks."""

    def __init__(self, looks: float) -> None:
        self.looks = looks

    def query(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def test_a_graph_that_hangs_is_waited_for_within_the_timeout() -> None:
    """NCCL watches no collective that is part of a CUDA graph."""
    group = TorchCommunicator("tensor", None, (0, 1), 0, backend="nccl", timeout_s=0.2, deterministic=False)  # type: ignore[arg-type]
    assert group.capturable
    group.wait(Busy(3))  # type: ignore[arg-type]
    with pytest.raises(CollectiveError, match=r"group tensor, rank 0 of 2.*rank 1.*a graph took more than 0.2 s"):
        group.wait(Busy(float("inf")))  # type: ignore[arg-type]
    with pytest.raises(CollectiveError, match="unusable after an earlier error"):
        group.barrier()
