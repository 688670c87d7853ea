"""Tensor parallelism of the whole decoder: any legal number of ranks computes what one rank computes."""

import random
from functools import cache

import pytest
import torch

from shoal.configs.schema import ParallelConfig
from shoal.model.decoder import Stage
from shoal.model.dummy import dummy_parameters
from shoal.model.shard import shard_model
from shoal.parallel.communicator import Communicator, SingleCommunicator
from shoal.parallel.mesh import make_mesh
from tests.model.paged import PagedModel
from tests.model.specs import SPECS, VOCAB
from tests.ranks import Ranks, run_ranks

CHUNKS = [13, 1, 1, 10, 5]
CPU = torch.device("cpu")
PROMPT = random.Random(0).choices(range(VOCAB), k=sum(CHUNKS))


def compute(
    name: str, parallel: ParallelConfig, group: Communicator, deterministic: bool, chunks: list[int]
) -> torch.Tensor:
    """The logits of PROMPT by one tensor rank: [len(PROMPT), VOCAB]. A neighbour is computed along."""
    spec = SPECS[name]()
    shard = shard_model(spec, parallel)[group.rank]
    params = dummy_parameters(spec, shard, torch.float32, CPU, seed=1)
    model = PagedModel(spec, [Stage(spec, shard, params, group, deterministic=deterministic)], block_size=4)
    model.add("a", PROMPT)
    model.add("b", PROMPT[::-1])
    return torch.cat([model.step([("b", 1), ("a", count)])["a"] for count in chunks])


def compute_on_ranks(ranks: Ranks, name: str, options: dict[str, object], deterministic: bool) -> torch.Tensor:
    """compute() on every rank of a group."""
    parallel = ParallelConfig(tensor=ranks.world_size, **options)  # type: ignore[arg-type]
    mesh = make_mesh("gloo", ranks.rank, ranks.world_size, 1, ranks.rendezvous, 30.0, deterministic)
    try:
        return compute(name, parallel, mesh.tensor, deterministic, CHUNKS)
    finally:
        mesh.close()


@cache
def alone(name: str) -> torch.Tensor:
    """What one rank computes, all at once."""
    return compute(name, ParallelConfig(), SingleCommunicator("tensor"), False, [len(PROMPT)])


def check(name: str, world_size: int, **options: object) -> None:
    """Every rank's logits equal one rank's, and each other's to the bit."""
    results = run_ranks(world_size, compute_on_ranks, name, options, False)
    expected = alone(name)
    assert expected.std() > 0.1
    for result in results:
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("name", list(SPECS))
def test_two_ranks_equal_one(name: str) -> None:
    check(name, 2)


@pytest.mark.parametrize(
    ("name", "world_size"),
    [
        ("heads-8-8", 3),
        ("heads-6-2", 4),
        ("heads-5-1", 3),
        ("learned", 3),
        ("parallel-residual", 4),
        ("gemma", 5),
        ("olmo", 4),
        ("moe-shared", 3),
    ],
)
def test_ranks_that_divide_nothing_equal_one(name: str, world_size: int) -> None:
    check(name, world_size)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [3, 4, 5])
@pytest.mark.parametrize("name", list(SPECS))
def test_every_number_of_ranks_equals_one(name: str, world_size: int) -> None:
    if world_size <= SPECS[name]().layers[0].mixer.num_heads:
        check(name, world_size)


@pytest.mark.parametrize(("name", "world_size"), [("moe", 2), ("moe-shared", 3)])
def test_whole_experts_per_rank_equal_one(name: str, world_size: int) -> None:
    check(name, world_size, expert=True)


@pytest.mark.parametrize("name", ["heads-6-2", "olmo"])
def test_unequal_devices_equal_one(name: str) -> None:
    check(name, 3, tensor_weights=[2.0, 1.0, 1.0])


def chunks_on_ranks(ranks: Ranks, name: str) -> bool:
    """Whether the bits are the same for two ways to cut the prompt."""
    mesh = make_mesh("gloo", ranks.rank, ranks.world_size, 1, ranks.rendezvous, 30.0, True)
    try:
        parallel = ParallelConfig(tensor=ranks.world_size)
        runs = [compute(name, parallel, mesh.tensor, True, chunks) for chunks in (CHUNKS, [len(PROMPT)])]
        return torch.equal(*runs)
    finally:
        mesh.close()


@pytest.mark.parametrize("name", ["gemma", "olmo", "moe-shared", "parallel-residual"])
def test_deterministic_bits_do_not_depend_on_chunks(name: str) -> None:
    assert run_ranks(2, chunks_on_ranks, name) == [True, True]
