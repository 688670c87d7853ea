"""What every Communicator must do, as rank functions shared by the tests of shared memory and of torch.distributed."""

import random
import signal

import torch

from shoal.parallel.communicator import Communicator
from tests.ranks import Ranks

SUMMED = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64)
COPIED = (*SUMMED, torch.uint8, torch.bool)
SIZES = (0, 1, 3, 63, 1000, 8192, 8193, 70000, 300001)


def draw(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A random tensor, the same for the same generator state."""
    if dtype == torch.bool or not dtype.is_floating_point:
        return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)
    return (torch.rand(shape, generator=generator) * 2 - 1).to(dtype)


def expected_sum(parts: list[torch.Tensor]) -> torch.Tensor:
    """The sum in rank order, halves in float32 and rounded once."""
    dtype = parts[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    return total.to(dtype)


def exercise(group: Communicator, rounds: int, seed: int, exact_sums: bool = True) -> int:
    """Random operations, each checked against what all ranks know; returns how many. Same seed on every rank of the
    group.
    """
    plan = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(rounds):
        kind = plan.choice(["sum", "sum", "gather", "broadcast", "exchange", "barrier"])
        if kind == "sum":
            dtype, numel = plan.choice(SUMMED), plan.choice(SIZES)
            parts = [draw(generator, (numel,), dtype) for _ in range(group.size)]
            mine = parts[group.rank].clone()
            assert group.all_reduce(mine) is mine
            close = torch.equal if exact_sums else torch.allclose
            assert close(mine, expected_sum(parts)), (dtype, numel)
        elif kind == "gather":
            dtype, dim = plan.choice(COPIED), plan.randrange(-3, 3)
            shape = [plan.choice([1, 2, 5, 31]) for _ in range(3)]
            sizes = [plan.choice([0, 1, 4, 700]) for _ in range(group.size)]
            parts = [draw(generator, (*shape[: dim % 3], size, *shape[dim % 3 + 1 :]), dtype) for size in sizes]
            got = group.all_gather(parts[group.rank], sizes, dim)
            assert got.is_contiguous() and torch.equal(got, torch.cat(parts, dim)), (dtype, dim, sizes)
        elif kind == "broadcast":
            dtype, root, numel = plan.choice(COPIED), plan.randrange(group.size), plan.choice(SIZES)
            value = draw(generator, (numel,), dtype)
            mine = value.clone() if group.rank == root else torch.zeros_like(value)
            assert torch.equal(group.broadcast(mine, root), value)
        elif kind == "exchange":
            ring_around(group, plan, generator)
        else:
            group.barrier()
    return rounds


def ring_around(group: Communicator, plan: random.Random, generator: torch.Generator) -> None:
    """Everyone sends a few tensors to a rank at a fixed distance, which then receives them in order."""
    distance, dtype = plan.randrange(1, group.size), plan.choice(COPIED)
    shapes = [(plan.choice([0, 1, 5, 100]), plan.choice([1, 7])) for _ in range(3)]
    values = [[draw(generator, shape, dtype) for shape in shapes] for _ in range(group.size)]
    for value in values[group.rank]:
        scratch = value.clone()
        group.send(scratch, (group.rank + distance) % group.size)
        scratch.zero_()  # a sent tensor may be overwritten
    source = (group.rank - distance) % group.size
    for value in values[source]:
        assert torch.equal(group.recv(torch.empty_like(value), source), value)


def long_message(group: Communicator, numel: int) -> None:
    """A message longer than any buffer, from the first rank to the last."""
    value = torch.arange(numel, dtype=torch.int64)
    if group.rank == 0:
        group.send(value, group.size - 1)
    elif group.rank == group.size - 1:
        assert torch.equal(group.recv(torch.empty_like(value), 0), value)


def wait_for_files(ranks: Ranks, names: list[str]) -> None:
    """Wait until other ranks of the job have made these files in its directory. The job's deadline is the limit."""
    while not all((ranks.directory / name).exists() for name in names):
        signal.sigtimedwait([], 0.01)
