"""gathered(sharded layer) == unsharded layer, for every layer and legal size, also non-dividing ones."""

from typing import Any

import pytest
import torch

from shoal.kernels.activation import gated_activation_reference
from shoal.kernels.build import load_native
from shoal.kernels.linear import linear
from shoal.kernels.moe_routing import moe_routing
from shoal.kernels.rms_norm import rms_norm_reference
from shoal.parallel.communicator import Communicator, SingleCommunicator
from shoal.parallel.embedding import VocabEmbedding, VocabHead
from shoal.parallel.experts import Experts
from shoal.parallel.linear import ColumnLinear, RowLinear
from shoal.parallel.mesh import make_mesh
from shoal.parallel.norm import ShardedRmsNorm
from shoal.parallel.sharding import split
from tests.ranks import Ranks, run_ranks

BACKEND = "gloo" if load_native("auto") is None else "shm"
SIZES = [1, 2, 3, 4]
TOKENS, HIDDEN, COLUMNS, VOCAB, EXPERTS = 5, 24, 37, 101, 7


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def parts(total: int, group: Communicator, weights: list[float] | None = None) -> tuple[int, int]:
    return split(total, group.size, weights)[group.rank]


def two_linears(group: Communicator, deterministic: bool, weights: list[float] | None) -> torch.Tensor:
    start, stop = parts(COLUMNS, group, weights)
    up, down = rand(COLUMNS, HIDDEN), rand(HIDDEN, COLUMNS)
    column = ColumnLinear(up[start:stop], rand(COLUMNS)[start:stop], deterministic=deterministic)
    row = RowLinear(down[:, start:stop].contiguous(), rand(HIDDEN), group, deterministic=deterministic)
    return row(column(rand(TOKENS, HIDDEN)))


def embedding(group: Communicator, deterministic: bool, weights: list[float] | None) -> torch.Tensor:
    start, stop = parts(VOCAB, group, weights)
    table = rand(VOCAB, HIDDEN).bfloat16()
    ids = torch.tensor([[0, VOCAB - 1, 50], [33, 34, 67]])
    return VocabEmbedding(table[start:stop], (start, stop), group)(ids)


def head(group: Communicator, deterministic: bool, weights: list[float] | None) -> torch.Tensor:
    ranges = split(VOCAB, group.size, weights)
    start, stop = ranges[group.rank]
    bias = rand(VOCAB)[start:stop]
    layer = VocabHead(rand(VOCAB, HIDDEN)[start:stop], bias, ranges, group, deterministic=deterministic)
    return layer(rand(TOKENS, HIDDEN))


def norm(group: Communicator, deterministic: bool, weights: list[float] | None) -> torch.Tensor:
    ranges = split(COLUMNS, group.size, weights)
    start, stop = ranges[group.rank]
    layer = ShardedRmsNorm(
        rand(COLUMNS)[start:stop], 1e-3, COLUMNS, group, deterministic=deterministic, unit_offset=True
    )
    local = layer(rand(2, TOKENS, COLUMNS)[..., start:stop])
    return group.all_gather(local.contiguous(), [b - a for a, b in ranges])


def routing() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = rand(TOKENS, HIDDEN)
    return x, *moe_routing(linear(x, rand(EXPERTS, HIDDEN), deterministic=True), 3, normalize=True)


def sliced_experts(group: Communicator, deterministic: bool, weights: list[float] | None) -> torch.Tensor:
    start, stop = parts(COLUMNS, group, weights)
    gate_up, down = rand(EXPERTS, 2 * COLUMNS, HIDDEN), rand(EXPERTS, HIDDEN, COLUMNS)
    mine = torch.cat([gate_up[:, start:stop], gate_up[:, COLUMNS + start : COLUMNS + stop]], 1)
    local_down = down[:, :, start:stop].contiguous()
    experts = Experts(mine, local_down, (0, EXPERTS), "silu", group, deterministic=deterministic)
    return experts(*routing())


def whole_experts(group: Communicator, deterministic: bool, weights: list[float] | None) -> torch.Tensor:
    start, stop = parts(EXPERTS, group, weights)
    gate_up, down = rand(EXPERTS, 2 * COLUMNS, HIDDEN), rand(EXPERTS, HIDDEN, COLUMNS)
    experts = Experts(gate_up[start:stop], down[start:stop], (start, stop), "silu", group, deterministic=deterministic)
    return experts(*routing())


LAYERS = {f.__name__: f for f in (two_linears, embedding, head, norm, sliced_experts, whole_experts)}


def run_layers(ranks: Ranks, deterministic: bool, weights: list[float] | None) -> dict[str, torch.Tensor]:
    """Every layer's gathered result, computed in one job."""
    mesh = make_mesh(
        BACKEND, ranks.rank, ranks.world_size, 1, ranks.rendezvous, 20.0, deterministic, load_native("auto")
    )
    results = {name: layer(mesh.tensor, deterministic, weights) for name, layer in LAYERS.items()}
    mesh.close()
    return results


def expected() -> dict[str, torch.Tensor]:
    """The same layers written plainly."""
    x, weights, ids = routing()
    gate_up, down = rand(EXPERTS, 2 * COLUMNS, HIDDEN), rand(EXPERTS, HIDDEN, COLUMNS)
    mixture = torch.zeros(TOKENS, HIDDEN)
    for token in range(TOKENS):
        for weight, expert in zip(weights[token], ids[token]):
            hidden = gated_activation_reference((gate_up[expert] @ x[token]).unsqueeze(0), "silu")
            mixture[token] += weight * (down[expert] @ hidden[0])
    ids_of_vocab = torch.tensor([[0, VOCAB - 1, 50], [33, 34, 67]])
    up = rand(TOKENS, HIDDEN) @ rand(COLUMNS, HIDDEN).t() + rand(COLUMNS)
    return {
        "two_linears": up @ rand(HIDDEN, COLUMNS).t() + rand(HIDDEN),
        "embedding": rand(VOCAB, HIDDEN).bfloat16()[ids_of_vocab],
        "head": rand(TOKENS, HIDDEN) @ rand(VOCAB, HIDDEN).t() + rand(VOCAB),
        "norm": rms_norm_reference(rand(2, TOKENS, COLUMNS), rand(COLUMNS), 1e-3, unit_offset=True),
        "sliced_experts": mixture,
        "whole_experts": mixture,
    }


def check(answers: list[dict[str, Any]]) -> None:
    for name, want in expected().items():
        for answer in answers:
            assert torch.equal(answer[name], answers[0][name]), f"{name} differs between ranks"
        if name == "embedding":
            assert torch.equal(answers[0][name], want)
        assert torch.allclose(answers[0][name], want, rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("size", SIZES)
def test_gathered_sharded_layers_equal_unsharded_ones(size):
    check(run_ranks(size, run_layers, True, None))


@pytest.mark.parametrize("weights", [[2.0, 1.0, 1.0], [1.0, 5.0]])
def test_also_with_unequal_shards_and_torchs_own_linear(weights):
    check(run_ranks(len(weights), run_layers, False, weights))


def test_one_rank_of_each_layer_needs_no_other():
    group = SingleCommunicator("tensor")
    check([{name: layer(group, False, None) for name, layer in LAYERS.items()}])


def add_bias(ranks: Ranks) -> torch.Tensor:
    mesh = make_mesh(BACKEND, ranks.rank, 3, 1, ranks.rendezvous, 20.0, True, load_native("auto"))
    row = RowLinear(torch.zeros(4, 2), torch.full((4,), 1.0), mesh.tensor, deterministic=True)
    return row(torch.ones(2, 2))


def test_row_linear_adds_bias_once():
    assert all(torch.equal(y, torch.ones(2, 4)) for y in run_ranks(3, add_bias))


def test_a_tokens_experts_do_not_depend_on_other_tokens():
    group = SingleCommunicator("tensor")
    x, gate_up, down = rand(40, HIDDEN), rand(EXPERTS, 2 * COLUMNS, HIDDEN), rand(EXPERTS, HIDDEN, COLUMNS)
    experts = Experts(gate_up, down, (0, EXPERTS), "silu", group, deterministic=True)
    weights, ids = moe_routing(linear(x, rand(EXPERTS, HIDDEN), deterministic=True), 2, normalize=False)
    whole = experts(x, weights, ids)
    for rows in (slice(0, 1), slice(3, 20), slice(39, 40), slice(10, 11)):
        assert torch.equal(experts(x[rows], weights[rows], ids[rows]), whole[rows])
    nothing = experts(x[:0], weights[:0], ids[:0])
    assert nothing.shape == (0, HIDDEN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_keep_the_dtype(dtype):
    group = SingleCommunicator("tensor")
    gate_up, down = rand(EXPERTS, 2 * COLUMNS, HIDDEN).to(dtype), rand(EXPERTS, HIDDEN, COLUMNS).to(dtype)
    x, weights, ids = routing()
    mixture = Experts(gate_up, down, (0, EXPERTS), "gelu_tanh", group, deterministic=True)(x.to(dtype), weights, ids)
    assert mixture.dtype == dtype
    head = VocabHead(rand(VOCAB, HIDDEN).to(dtype), None, [(0, VOCAB)], group, deterministic=True)
    assert head(x.to(dtype)).dtype == torch.float32
