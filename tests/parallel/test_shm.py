"""Shared-memory collectives: right for any size, dtype and sub-group; every misuse and failure is an error that names
the ranks.
"""

import os
import random
import signal

import pytest
import torch

from shoal.kernels.build import load_native
from shoal.parallel.communicator import CollectiveError
from shoal.parallel.groups import GroupSpec
from shoal.parallel.shm import ShmCommunicator
from shoal.parallel.shm_segment import SegmentError, SharedSegment, lay_out
from tests.parallel.collectives import draw, exercise, expected_sum, long_message, wait_for_files
from tests.ranks import Ranks, run_ranks

NATIVE = load_native("auto")
pytestmark = pytest.mark.skipif(NATIVE is None, reason="no C compiler")


@pytest.fixture
def make_segment():
    """Segments that are closed after the test."""
    made = []

    def make(groups: list[tuple[str, list[int]]], world_size: int) -> SharedSegment:
        made.append(SharedSegment.create(world_size, specs(groups)))
        return made[-1]

    yield make
    for segment in made:
        segment.close()


def specs(groups: list) -> list[GroupSpec]:
    return [GroupSpec(name, tuple(ranks)) for name, ranks in groups]


def attach(ranks: Ranks, path: str, groups: list, timeout_s: float = 20.0) -> list[ShmCommunicator]:
    """The communicators of this rank's groups."""
    native = load_native("require")
    segment = SharedSegment.attach(path, ranks.rank, ranks.world_size, specs(groups))
    return [
        ShmCommunicator(segment, index, native, timeout_s)
        for index, (_, members) in enumerate(groups)
        if ranks.rank in members and len(members) > 1
    ]


def exercise_groups(ranks: Ranks, path: str, groups: list, rounds: int) -> int:
    total = 0
    for group in attach(ranks, path, groups):
        total += exercise(group, rounds, seed=len(group.global_ranks))
        long_message(group, 300_000)
    return total


@pytest.mark.parametrize("world_size", [2, 3, 4, 6])
def test_random_operations_on_the_world(make_segment, world_size):
    groups = [("world", list(range(world_size)))]
    path = make_segment(groups, world_size).path
    assert run_ranks(world_size, exercise_groups, path, groups, 40) == [40] * world_size


@pytest.mark.parametrize(("cores", "pinned", "spins"), [({0}, False, False), ({0}, True, True), ({0, 1}, False, True)])
def test_ranks_wait_actively_where_each_has_a_core(make_segment, monkeypatch, cores, pinned, spins):
    groups = [("world", [0, 1])]
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: cores)
    segment = SharedSegment.attach(make_segment(groups, 2).path, 0, 2, specs(groups))
    try:
        assert (ShmCommunicator(segment, 0, NATIVE, 1.0, pinned)._group.most_spins > 0) == spins
    finally:
        segment.close()


@pytest.mark.parametrize("seed", range(3))
def test_random_operations_on_any_subgroups(make_segment, seed):
    plan = random.Random(seed)
    world_size = plan.randrange(4, 7)
    groups = [("tensor", plan.sample(range(world_size), plan.randrange(2, world_size + 1))) for _ in range(3)]
    path = make_segment(groups, world_size).path
    run_ranks(world_size, exercise_groups, path, groups, 30)


def long_run(ranks: Ranks, path: str, groups: list, count: int) -> int:
    """Sums and messages with ranks running ahead and falling behind at random."""
    (group,) = attach(ranks, path, groups)
    pace, size = random.Random(ranks.rank), group.size
    for number in range(count):
        numel = 40_000 if number % 50 == 0 else 64
        total = group.all_reduce(torch.full((numel,), float(number + group.rank)))
        assert bool((total == number * size + size * (size - 1) // 2).all()), number
        for _ in range(pace.randrange(3000) if pace.random() < 0.2 else 0):
            pass
        if number % 7 == 0:
            group.send(total[:64], (group.rank + 1) % size)  # short: a circle of long messages would wait for itself
            assert torch.equal(group.recv(torch.empty(64), (group.rank - 1) % size), total[:64])
    return count


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
def test_a_long_run_at_uneven_pace(make_segment, world_size):
    groups = [("tensor", list(range(world_size)))]
    path = make_segment(groups, world_size).path
    assert run_ranks(world_size, long_run, path, groups, 20_000, timeout_s=200.0) == [20_000] * world_size


def sum_both_ways(ranks: Ranks, path: str, groups: list) -> list[torch.Tensor]:
    """The same elements as one long all-reduce and as many short ones."""
    (group,) = attach(ranks, path, groups)
    value = draw(torch.Generator().manual_seed(ranks.rank), (200_000,), torch.float32) * 1e3
    whole = group.all_reduce(value.clone())
    pieces = [group.all_reduce(piece.clone()) for piece in value.split(4099)]
    return [whole, torch.cat(pieces)]


def test_sums_do_not_depend_on_the_messages_length_and_are_in_rank_order(make_segment):
    groups = [("tensor", [0, 1, 2, 3])]
    answers = run_ranks(4, sum_both_ways, make_segment(groups, 4).path, groups)
    parts = [draw(torch.Generator().manual_seed(rank), (200_000,), torch.float32) * 1e3 for rank in range(4)]
    for whole, pieces in answers:
        assert torch.equal(whole, expected_sum(parts)) and torch.equal(pieces, whole)


def special_values(ranks: Ranks, path: str, groups: list) -> list[torch.Tensor]:
    (group,) = attach(ranks, path, groups)
    out = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        value = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 65504.0, 1e-7, 6e-8, 3e4, 1.0])
        out.append(group.all_reduce(value.to(dtype) * (1.0 if ranks.rank == 0 else 0.5)).float())
    return out


def test_special_values_are_summed_as_torch_does(make_segment):
    groups = [("tensor", [0, 1])]
    first, second = run_ranks(2, special_values, make_segment(groups, 2).path, groups)
    value = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 65504.0, 1e-7, 6e-8, 3e4, 1.0])
    for got, other, dtype in zip(first, second, (torch.float32, torch.bfloat16, torch.float16)):
        want = expected_sum([value.to(dtype), value.to(dtype) * 0.5]).float()
        assert torch.allclose(got, want, rtol=0, atol=0, equal_nan=True)
        assert torch.allclose(got, other, rtol=0, atol=0, equal_nan=True)


def disagree(ranks: Ranks, path: str, groups: list, what: str) -> str:
    (group,) = attach(ranks, path, groups)
    odd = ranks.rank == 1
    try:
        if what == "operation":
            group.barrier() if odd else group.all_reduce(torch.ones(4))
        elif what == "dtype":
            group.all_reduce(torch.ones(4, dtype=torch.bfloat16 if odd else torch.float32))
        elif what == "shape":
            group.all_reduce(torch.ones((9, 2) if odd else (3, 6)))
        elif what == "root":
            group.broadcast(torch.ones(4), 1 if odd else 0)
        elif what == "sizes":
            group.all_gather(torch.ones(2, 3), [3, 3, 4] if odd else [3, 3, 3])
    except CollectiveError as error:
        with pytest.raises(CollectiveError, match="earlier error"):
            group.barrier()
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("operation", ["rank 0: all_reduce #1 float32[4]", "rank 1: barrier #1"]),
        ("dtype", ["rank 0: all_reduce #1 float32[4]", "rank 1: all_reduce #1 bfloat16[4]"]),
        ("shape", ["rank 0: all_reduce #1 float32[3, 6]", "rank 1: all_reduce #1 float32[9, 2]"]),
        ("root", ["rank 0: broadcast #1 float32[4] from rank 0", "rank 1: broadcast #1 float32[4] from rank 1"]),
        ("sizes", ["rank 0: all_gather #1 float32[2, 9]", "rank 1: all_gather #1 float32[2, 10]"]),
    ],
)
def test_disagreement_is_an_error_on_every_rank_that_names_both(make_segment, what, words):
    groups = [("tensor", [0, 1, 2])]
    for text in run_ranks(3, disagree, make_segment(groups, 3).path, groups, what):
        assert "group tensor" in text and all(word in text for word in words), text


def disagree_on_message(ranks: Ranks, path: str, groups: list) -> str:
    (group,) = attach(ranks, path, groups)
    if ranks.rank == 0:
        group.send(torch.ones(3), 1)
        return ""
    with pytest.raises(CollectiveError) as caught:
        group.recv(torch.ones(4), 0)
    return str(caught.value)


def test_a_message_of_another_shape_is_an_error_of_the_receiver(make_segment):
    groups = [("pipeline", [0, 1])]
    text = run_ranks(2, disagree_on_message, make_segment(groups, 2).path, groups)[1]
    assert "rank 1 expected send #1 float32[4]" in text and "rank 0 sent send #1 float32[3]" in text


def lose_one(ranks: Ranks, path: str, groups: list, how: str, timeout_s: float) -> str:
    group, pipeline = attach(ranks, path, groups, timeout_s)
    group.barrier()
    if ranks.rank == 2:
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hangs":
            with pytest.raises(CollectiveError, match=r"recv: waited .* rank 0 \(replica rank 0"):
                pipeline.recv(torch.ones(1), 0)
            finish_together(ranks)
            return ""
        group.abort("disk on fire")
        return ""
    with pytest.raises(CollectiveError) as caught:
        if ranks.rank == 0:
            group.recv(torch.ones(1), 2) if how == "dies" else group.all_reduce(torch.ones(5))
        else:
            group.all_reduce(torch.ones(5))
    if how == "hangs":
        finish_together(ranks)
    return str(caught.value)


def finish_together(ranks: Ranks) -> None:
    """A process that ends would be another failure to those that still wait."""
    (ranks.directory / f"done{ranks.rank}").touch()
    wait_for_files(ranks, ["done0", "done1", "done2"])


def test_a_dead_rank_fails_the_others_at_once_and_is_named(make_segment):
    groups = [("tensor", [0, 1, 2]), ("pipeline", [0, 1, 2])]
    answers = run_ranks(3, lose_one, make_segment(groups, 3).path, groups, "dies", 600.0, dying=[2])
    for text in answers[:2]:
        assert "rank 2 (replica rank 2, not in any operation) has ended" in text, text


def killed_anywhere(ranks: Ranks, path: str, groups: list, seed: int) -> str:
    """Operations without end, until rank 1 is killed in the middle of one (SIGALRM ends a process)."""
    (group,) = attach(ranks, path, groups, 600.0)
    group.barrier()
    if ranks.rank == 1:
        signal.setitimer(signal.ITIMER_REAL, 0.001 + random.Random(seed).random() * 0.05)
    sizes = (1, 5000, 30_000, 300_000)
    number = 0
    try:
        while True:
            number += 1
            group.all_reduce(torch.ones(sizes[number % 4]))
            if ranks.rank < 2:
                group.send(torch.ones(200_000), 1 - ranks.rank) if ranks.rank == number % 2 else group.recv(
                    torch.ones(200_000), 1 - ranks.rank
                )
    except CollectiveError as error:
        return str(error)


@pytest.mark.parametrize("seed", range(4))
def test_a_rank_killed_in_the_middle_of_anything_fails_the_others_at_once(make_segment, seed):
    groups = [("tensor", [0, 1, 2])]
    answers = run_ranks(3, killed_anywhere, make_segment(groups, 3).path, groups, seed, dying=[1], timeout_s=20.0)
    for text in (answers[0], answers[2]):
        assert "rank 1 (replica rank 1" in text and "has ended" in text, text


def test_a_late_rank_is_named_with_what_it_is_doing(make_segment):
    groups = [("tensor", [0, 1, 2]), ("pipeline", [0, 1, 2])]
    answers = run_ranks(3, lose_one, make_segment(groups, 3).path, groups, "hangs", 0.5)
    for text in answers[:2]:
        assert "waited 0.5 s" in text
        assert "rank 2 (replica rank 2, last in recv #1 with rank 0 of group pipeline)" in text


def test_abort_ends_every_wait_with_its_reason(make_segment):
    groups = [("tensor", [0, 1, 2]), ("pipeline", [0, 1, 2])]
    answers = run_ranks(3, lose_one, make_segment(groups, 3).path, groups, "aborts", 600.0)
    for text in answers[:2]:
        assert "aborted by replica rank 2: disk on fire" in text


def wait_forever(ranks: Ranks, path: str, groups: list) -> str:
    (group,) = attach(ranks, path, groups, 600.0)
    if ranks.rank == 0:
        (ranks.directory / "waiting").touch()
    with pytest.raises(CollectiveError) as caught:
        group.recv(torch.ones(1), 1 - ranks.rank)
    return str(caught.value)


def test_the_maker_can_abort_before_anyone_has_come(make_segment):
    groups = [("tensor", [0, 1])]
    segment = make_segment(groups, 2)
    segment.abort("told to stop")
    segment.abort("a second reason is not needed")
    assert all("aborted by the launcher: told to stop" in t for t in run_ranks(2, wait_forever, segment.path, groups))


def misuse(ranks: Ranks, path: str, groups: list) -> list[str]:
    (group,) = attach(ranks, path, groups)
    attempts = [
        lambda: group.all_reduce(torch.ones(4, 4).t()[:, :2]),
        lambda: group.all_reduce(torch.ones(4, dtype=torch.bool)),
        lambda: group.all_reduce(torch.ones(4, dtype=torch.complex64)),
        lambda: group.all_gather(torch.ones(2, 3), [4, 4]),
        lambda: group.all_gather(torch.ones(2, 3), [3]),
        lambda: group.broadcast(torch.ones(4), 2),
        lambda: group.send(torch.ones(4), group.rank),
        lambda: group.recv(torch.ones(4), -1),
        lambda: group.all_reduce(torch.ones(4, device="meta")),
    ]
    texts = []
    for attempt in attempts:
        with pytest.raises(CollectiveError) as caught:
            attempt()
        texts.append(str(caught.value))
    group.barrier()  # nothing was sent, so the group is whole
    group.close()
    group.close()
    with pytest.raises(CollectiveError, match="closed"):
        group.barrier()
    return texts


def test_misuse_is_refused_before_anything_is_sent(make_segment):
    groups = [("tensor", [0, 1])]
    texts = run_ranks(2, misuse, make_segment(groups, 2).path, groups)[0]
    assert "contiguous" in texts[0] and "strides" in texts[0]
    assert "cannot sum torch.bool" in texts[1]
    assert all("group tensor, rank 0 of 2" in text for text in texts)


def attach_wrongly(ranks: Ranks, path: str) -> list[str]:
    texts = []
    right = specs([("tensor", [0, 1])])
    SharedSegment.attach(path, 0, 2, right)
    for rank, world_size, groups, where in [
        (1, 2, specs([("pipeline", [0, 1])]), path),
        (1, 2, specs([("tensor", [1, 0])]), path),
        (1, 3, right, path),
        (1, 2, right, path + "999"),
    ]:
        with pytest.raises(SegmentError) as caught:
            SharedSegment.attach(where, rank, world_size, groups)
        texts.append(str(caught.value))
    return texts


def test_attaching_to_another_layout_or_nothing_is_refused(make_segment):
    (texts,) = run_ranks(1, attach_wrongly, make_segment([("tensor", [0, 1])], 2).path)
    assert "bytes" in texts[0] and "another layout" in texts[1] and "gloo" in texts[3]


def attach_twice(ranks: Ranks, path: str, groups: list) -> str:
    attach(ranks, path, groups)
    with pytest.raises(SegmentError, match="started twice") as caught:
        SharedSegment.attach(path, ranks.rank, 2, specs(groups))
    return str(caught.value)


def test_one_place_cannot_be_taken_twice(make_segment):
    groups = [("tensor", [0, 1])]
    run_ranks(2, attach_twice, make_segment(groups, 2).path, groups)


def test_nothing_is_ever_visible_in_dev_shm_and_the_segment_is_small(make_segment):
    before = set(os.listdir("/dev/shm"))
    segment = make_segment([("world", list(range(8))), ("tensor", [0, 1, 2, 3]), ("tensor", [4, 5, 6, 7])], 8)
    assert set(os.listdir("/dev/shm")) == before
    assert segment.bytes < 16 << 20
    fds = len(os.listdir("/proc/self/fd"))
    segment.close()
    segment.close()
    assert len(os.listdir("/proc/self/fd")) == fds - 2  # ours and the mapping's own


def test_too_many_ranks_and_too_little_memory_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="at most 64 ranks, not 65"):
        SharedSegment.create(65, [GroupSpec("world", tuple(range(65)))])

    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SegmentError, match=r"cannot reserve \d+ KiB .* No space left .* gloo"):
        SharedSegment.create(2, [GroupSpec("world", (0, 1))])
    layouts, total = lay_out(64, [GroupSpec("world", tuple(range(64))), GroupSpec("tensor", tuple(range(64)))])
    assert total < 64 << 20 and all(layout.ring_bytes >= 4096 for layout in layouts)
